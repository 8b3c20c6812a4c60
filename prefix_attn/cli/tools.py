"""``prefix-attn convert | check``: convert prefixes between libraries, check that a model works."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from prefix_attn.cli.shared import ERR, AsJson, Model, check_adapter, check_writable, show
from prefix_attn.quoting import shortened


def convert(
    source: Annotated[
        str, typer.Argument(help="A prefix: a folder, a .pt or .bin file, or a Hub id.", show_default=False)
    ],
    target: Annotated[
        Path, typer.Argument(help="Folder to write. It must differ from the source.", show_default=False)
    ],
    to: Annotated[
        Literal["prefix-attn", "peft"],
        typer.Option(
            help="'prefix-attn' (PEFT's files where PEFT can hold the prefix), or 'peft' (an error where it cannot)."
        ),
    ] = "prefix-attn",
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub id of the base model. Only its config.json is read."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a prefix of any library to our format or PEFT's, and report what changed.

    It reads ours, PEFT's (PREFIX_TUNING, CARTRIDGE), adapters', cartridges (.pt) and the original PrefixTuning (.bin).

    MLPs are folded into the prefix. Only tensors are read from pickles.

    PEFT's files for encoder-decoders have slots that no layer uses or that two layers share. The report maps them.

    Some files lack the number of decoder layers (PEFT's) or of heads (adapters'). Give --model to supply them.

    [bold]prefix-attn convert their-peft-bart-prefix converted --model facebook/bart-base[/bold]

    [bold]prefix-attn convert cache_last.pt converted --to peft --json[/bold]
    """
    check_adapter(source)
    check_writable(target)
    from prefix_attn.hf.io.convert import convert as run
    from prefix_attn.hf.io.convert import read_config

    report = run(source, target, to=to, base=None if model is None else read_config(model))
    table = Table(title=Text(f"{report['format']} -> {target}"), show_header=False)
    for name, value in report.items():
        if name != "notes" and value not in (None, []):
            table.add_row(name, f"{value:,}" if isinstance(value, int) else Text(shortened(value, 1000)))
    show(report, as_json, table)
    for note in () if as_json else report["notes"]:
        ERR.print(f"[bold]note:[/] {escape(note)}", highlight=False, soft_wrap=True)


def check(
    model: Model,
    adapter: Annotated[str | None, typer.Option(help="Folder or Hub id of a prefix. Default: a new one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Test a prefix on a model: causality, padding, cache, gradients, files, frozen weights.

    The exit status is 1 if any test fails. [bold]prefix-attn check --model Qwen/Qwen3-0.6B[/bold]
    """
    import torch

    from prefix_attn.hf.load import check_base, load_base

    check_base(model)
    if adapter is not None:
        check_adapter(adapter)
    from prefix_attn.hf.check import examine

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
