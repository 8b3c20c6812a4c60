"""``prefix-attn convert | check``: files and models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefix_attn.cli.shared import ERR, AsJson, Model, show


def convert(
    source: Annotated[str, typer.Argument(help="A prefix: folder, .pt or .bin file, Hub id.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Folder to write, other than the source's.", show_default=False)],
    to: Annotated[
        str,
        typer.Option(help="'prefix-attn' (PEFT's files wherever PEFT has such a prefix), or 'peft' (or say why not)."),
    ] = "prefix-attn",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the base model, of which only config.json is read."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a prefix of any library as ours or PEFT's, and say what is not as it was.

    It reads ours, PEFT's (PREFIX_TUNING, CARTRIDGE), adapters', cartridges (.pt) and the original PrefixTuning (.bin).

    MLPs are folded. Of pickles nothing is read but tensors.

    PEFT's files of encoder-decoders have slots that no layer uses, or two layers share: the report maps them.

    How many layers its decoder has, and how many heads a model of adapters has, is not in the files: --model says it.

    [bold]prefix-attn convert their-peft-bart-prefix converted --model facebook/bart-base[/bold]

    [bold]prefix-attn convert cache_last.pt converted --to peft --json[/bold]
    """
    from prefix_attn.hf.io.convert import convert as run
    from prefix_attn.hf.io.convert import read_config

    report = run(source, target, to=to, base=None if model is None else read_config(model))
    table = Table(title=Text(f"{report['format']} -> {target}"), show_header=False)
    for name, value in report.items():
        if name != "notes" and value not in (None, []):
            table.add_row(name, f"{value:,}" if isinstance(value, int) else Text(str(value)))
    show(report, as_json, table)
    for note in () if as_json else report["notes"]:
        ERR.print(f"[bold]note:[/] {escape(note)}", highlight=False, soft_wrap=True)


def check(
    model: Model = "smollm2",
    adapter: Annotated[str | None, typer.Option(help="Folder or Hub id of a prefix; default: a new one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Try on a model what must hold for a prefix on it: causality, padding, cache, gradients, files, frozen weights.

    Exit status 1 if anything does not hold. [bold]prefix-attn check --model Qwen/Qwen3-0.6B[/bold]
    """
    import torch

    from prefix_attn.hf.check import examine
    from prefix_attn.hf.load import load_base

    findings = []
    with ERR.status("trying"):
        base, _ = load_base(model, dtype=torch.float32)
        for finding in examine(base, adapter):
            findings.append(finding._asdict() | {"holds": finding.holds})
            mark = "[green]holds[/]" if finding.holds else "[bold red]FAILS[/]"
            ERR.print(
                f"{mark}  {finding.name}: {finding.value:.1e}, at most {finding.bound:.0e}",
                highlight=False,
                soft_wrap=True,
            )
    show(findings, as_json, f"{sum(f['holds'] for f in findings)} of {len(findings)} hold")
    if not all(f["holds"] for f in findings):
        raise typer.Exit(1)
