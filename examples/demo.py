"""The project in ten minutes, for real: ``make demo``, or ``python examples/demo.py``.

Trains a prefix of 10 virtual tokens for a frozen SmolLM2-135M on AWS operation records -> first sentence of their
documentation, shows what that changed on services that it never saw, saves the prefix, loads it again and generates.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm.auto import tqdm

VIRTUAL_TOKENS = 10
STEPS = 120
SHOWN, SCORED, VALIDATED = 5, 48, 32


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="examples/demo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of 8 records")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the adapter")
    parser.add_argument("--model", default="smollm2", help="any model that prefix-attn takes")
    args = parser.parse_args()
    run(args.steps, args.out, args.model)


def run(steps: int, out: Path, model: str) -> dict[str, Any]:
    """Train, compare, save, reload; returns the figures that it printed."""
    import torch

    from prefix_attn.hf.config import PrefixConfig
    from prefix_attn.hf.load import load_base
    from prefix_attn.hf.model import PrefixModel, get_prefix_model
    from prefix_attn.training.aws import aws_records
    from prefix_attn.training.metrics import score
    from prefix_attn.training.prompts import Prompt
    from prefix_attn.training.settings import TrainingSettings
    from prefix_attn.training.train import train

    logging.getLogger("prefix_attn.training.metrics").setLevel(logging.ERROR)
    console, start = Console(emoji=False), time.perf_counter()
    with console.status(f"loading {escape(model)} (converted from GGUF on the first run: about a minute)"):
        base, tokenizer = load_base(model)
    records = {split: aws_records(split) for split in ("train", "dev", "test")}
    test = _spread(records["test"], SCORED)
    torch.manual_seed(0)
    prefixed = get_prefix_model(base, PrefixConfig(num_virtual_tokens=VIRTUAL_TOKENS), tokenizer)
    trainable, total = prefixed.get_nb_trainable_parameters()
    console.print(f"{model} on {base.device}: {trainable:,} of {total:,} parameters train ({trainable / total:.3%})")

    with prefixed.disable_prefix():
        before = _texts(prefixed, tokenizer, test, "before")
    for earlier in out.glob("checkpoint-*"):
        shutil.rmtree(earlier)  # the demo begins anew each time
    settings = TrainingSettings(out, steps, validate_every=max(steps // 2, 1), max_length=96)
    held_out, prompt = _spread(records["dev"], VALIDATED), Prompt(one_line=True)
    metrics = train(prefixed, tokenizer, records["train"], held_out, settings, prompt=prompt)
    after = _texts(prefixed, tokenizer, test, "after")

    with console.status("loading the saved prefix into a fresh model"):
        fresh, _ = load_base(model)
        reloaded = PrefixModel.from_pretrained(fresh, out)
    shown = _spread(range(len(test)), SHOWN)
    chosen = [test[i] for i in shown]
    again = _texts(reloaded, tokenizer, chosen, "reloaded")
    if again != _texts(prefixed, tokenizer, chosen, "trained"):  # in the same batch: another one rounds otherwise
        raise RuntimeError("the reloaded prefix writes something else than the trained one")

    for i, example, text in zip(shown, chosen, again, strict=True):
        old, new, wanted = escape(before[i]), escape(after[i]), escape(example.references[0])
        console.print(f"\n[dim]{escape(example.source)}[/]\n   before     {old}", highlight=False)
        console.print(f"   after      [bold]{new}[/]\n   reloaded   {escape(text)}", highlight=False)
        console.print(f"   reference  {wanted}", highlight=False)
    references = [example.references for example in test]
    scores = {"before": score(before, references), "after": score(after, references)}
    table = Table("", "BLEU", "chrF++", "ROUGE-L", title=f"{len(test)} records of unseen services")
    for name, values in scores.items():
        table.add_row(name, *(f"{values[metric]:.1f}" for metric in ("bleu", "chrf", "rougeL")))
    console.print(table)
    (_, first), (_, last) = metrics["validation_loss"][0], metrics["validation_loss"][-1]
    console.print(f"validation loss {first:.3f} -> {last:.3f}; adapter, metrics and plot in {out}")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    return {"scores": scores, "validation_loss": metrics["validation_loss"], "trainable_parameters": trainable}


def _spread(examples: Any, count: int) -> list[Any]:
    """``count`` examples, evenly over all: neighbours are operations of one service."""
    return [examples[i * len(examples) // count] for i in range(min(count, len(examples)))]


def _texts(model: Any, tokenizer: Any, examples: list[Any], name: str) -> list[str]:
    from prefix_attn.training.generate import generate_text
    from prefix_attn.training.prompts import Prompt

    options = {"prompt": Prompt(one_line=True), "max_new_tokens": 32, "batch_size": 16}
    with tqdm(total=len(examples), desc=name, unit="record") as bar:
        return generate_text(model, tokenizer, [e.source for e in examples], progress=bar.update, **options)


if __name__ == "__main__":
    main()
