"""Prefix tuning on E2E: ours, PEFT's, and the frozen model, trained and evaluated the same way.

    python -m benchmarks.e2e --method prefix --train devset.csv --test testset_w_refs.csv --out results.jsonl
    python -m benchmarks.e2e --table results.jsonl
    python -m benchmarks.e2e --plot results.jsonl --out curve.png

Only the wrapper around the model differs between methods. About a tenth of the training file's inputs, chosen by hash,
are held out for the validation loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

# With another process on the machine, OpenMP threads that spin while they wait make every step several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import e2e_report
from prefix_attn.data import Example, collate, encode, read_examples
from prefix_attn.evaluate import generate_text, validation_loss
from prefix_attn.hf.load import load_base
from prefix_attn.metrics import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("prefix", "peft", "frozen")
HELD_OUT_ROWS = 160
VALIDATE_EVERY = 10
WARMUP = 20
SAMPLES = 5
PACKAGES = ("torch", "transformers", "peft", "prefix-attn", "sacrebleu")

Row = dict[str, list[int]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.table:
        print(e2e_report.table(e2e_report.read(args.table)))
    elif args.plot:
        if args.out is None:
            parser.error("--plot needs --out")
        e2e_report.plot(e2e_report.read(args.plot), args.out)
    elif args.method is None or args.train is None or args.out is None or (args.generate and args.test is None):
        parser.error("a run needs --method, --train and --out, and --generate needs --test")
    else:
        torch.set_num_threads(args.threads)
        _run_all(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.e2e", description="Prefix tuning on E2E.")
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--model", default="smollm2", help="what prefix_attn.hf.load.load_base takes")
    parser.add_argument("--train", type=Path, help="E2E csv with columns mr, ref")
    parser.add_argument("--test", type=Path, help="E2E csv; all references of an mr count")
    parser.add_argument("--seeds", default=[0], type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--virtual-tokens", type=int, default=10)
    parser.add_argument("--mlp", action=argparse.BooleanOptionalAction, default=False, help="prefix_projection")
    parser.add_argument("--mlp-width", type=int, default=512, help="hidden size of the MLP")
    parser.add_argument("--init", default="random", help="of PrefixConfig; PEFT has its own")
    parser.add_argument("--init-text", help="for --init text")
    parser.add_argument("--batch-size", type=int, default=8, help="of training")
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument(
        "--generate", action="store_true", help="generate for the test file with the first seed, and score"
    )
    parser.add_argument("--generate-batch-size", type=int, default=16)
    parser.add_argument("--num-beams", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--limit", type=int, help="use this many test inputs, evenly spaced, instead of all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--save", type=Path, help="folder; each run saves its prefix in a folder of its own there")
    parser.add_argument("--out", type=Path, help="jsonl that results are appended to, or the picture of --plot")
    parser.add_argument("--plot", type=Path, metavar="RESULTS", help="draw validation loss against steps")
    parser.add_argument("--table", type=Path, metavar="RESULTS", help="print a markdown table")
    return parser


# Runs -----------------------------------------------------------------------------------------------------------------


def _run_all(args: argparse.Namespace) -> None:
    settings = _settings(args)
    done = {_key(run) for run in e2e_report.read(args.out)} if args.out.exists() else set()
    for seed in [0] if args.method == "frozen" else args.seeds:  # nothing is random in a frozen model
        if _key({"method": args.method, "seed": seed, "settings": settings}) in done:
            print(f"{args.method}, seed {seed}: in {args.out} already", file=sys.stderr)
            continue
        result = _run(args, seed, settings)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What makes two trainings different, apart from method and seed. Threads, folders and decoding do not."""
    names = ["model", "max_length"]
    if args.method != "frozen":
        names += ["steps", "lr", "virtual_tokens", "mlp", "batch_size"] + ["mlp_width"] * args.mlp
    if args.method == "prefix":
        names += ["init", "init_text"]
    return {"train": args.train.name} | {name: getattr(args, name) for name in names}


def _key(run: dict[str, Any]) -> str:
    return json.dumps([run["method"], run["seed"], run["settings"]], sort_keys=True)


def _run(args: argparse.Namespace, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    base, tokenizer = load_base(args.model, dtype=torch.float32, device=args.device)
    kept, held_out = hold_out(read_examples(args.train))
    rows, cut = encode(tokenizer, kept, args.max_length)
    validation_rows = encode(tokenizer, held_out, args.max_length)[0][:HELD_OUT_ROWS]
    validation_rows.sort(key=lambda row: len(row["input_ids"]))  # less padding; the loss is weighted by tokens
    validation = [
        collate(validation_rows[i : i + 16], tokenizer.pad_token_id) for i in range(0, len(validation_rows), 16)
    ]
    torch.manual_seed(seed)
    model = _wrap(base, tokenizer, args)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) if args.method != "frozen" else 0
    total = sum(p.numel() for p in base.parameters())
    result: dict[str, Any] = {
        "method": args.method,
        "seed": seed,
        "settings": settings,
        "versions": _versions(),
        "device": _device_name(base.device),
        "threads": torch.get_num_threads(),
        "train_rows": len(rows),
        "train_rows_cut": cut,
        "validation_rows": len(validation_rows),
        "trainable_parameters": trainable,
        "trainable_share": trainable / (total + trainable),
    }
    if args.method == "frozen":
        result["validation"] = [[0, validation_loss(model, validation)]]
    else:
        label = f"{args.method}, seed {seed}"
        result |= train(model, batches(rows, args.batch_size, seed, tokenizer.pad_token_id), validation, args, label)
    if args.save and args.method != "frozen":
        model.save_pretrained(args.save / f"{args.method}-seed{seed}")
    if args.generate and (args.method == "frozen" or seed == args.seeds[0]):  # hours of decoding, and one seed's worth
        result |= _generate(model, tokenizer, args)
    return result


def hold_out(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; the hash of the input decides, so that it never depends on the file's order."""

    def is_held_out(example: Example) -> bool:
        return hashlib.sha1(example.source.encode()).digest()[0] < 26  # 26 / 256

    return [e for e in examples if not is_held_out(e)], [e for e in examples if is_held_out(e)]


def batches(rows: Sequence[Row], size: int, seed: int, pad_id: int) -> Iterator[dict[str, Tensor]]:
    """Endless batches; the order depends on the seed alone, and not on what the method draws from torch's generator."""
    shuffle = random.Random(seed).shuffle
    while True:
        order = list(range(len(rows)))
        shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            yield collate([rows[i] for i in order[start : start + size]], pad_id)


def _wrap(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> Any:
    """The model of one method."""
    if args.method == "frozen":
        return base
    shared: dict[str, Any] = {"num_virtual_tokens": args.virtual_tokens, "prefix_projection": args.mlp}
    if args.mlp:
        shared["encoder_hidden_size"] = args.mlp_width
    if args.method == "prefix":
        from prefix_attn import PrefixConfig, get_prefix_model

        config = PrefixConfig(init=args.init, init_text=args.init_text, **shared)
        return get_prefix_model(base, config, tokenizer)
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", **shared))


def train(
    model: Any,
    data: Iterator[dict[str, Tensor]],
    validation: Sequence[dict[str, Tensor]],
    args: argparse.Namespace,
    label: str,
) -> dict[str, Any]:
    """Train for ``args.steps`` steps; losses, and the time that the steps took without the validation."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, args.steps))
    losses: list[float] = []
    curve = [[0, validation_loss(model, validation)]]
    seconds = 0.0
    model.train()
    with tqdm(total=args.steps, desc=label, file=sys.stderr) as bar:
        for step in range(1, args.steps + 1):
            batch = {name: tensor.to(device) for name, tensor in next(data).items()}
            start = time.perf_counter()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))  # waits for the device, so it belongs to the time of the step
            seconds += time.perf_counter() - start
            if step % VALIDATE_EVERY == 0 or step == args.steps:
                curve.append([step, validation_loss(model, validation)])
            bar.update()
            bar.set_postfix(train=f"{losses[-1]:.3f}", validation=f"{curve[-1][1]:.3f}")
    return {
        "train_loss": losses,
        "validation": curve,
        "seconds": seconds,
        "seconds_per_step": seconds / max(args.steps, 1),
    }


def _learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / WARMUP, max(steps - step, 0) / max(steps - WARMUP, 1))


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, Any]:
    """Metrics on the test file, with all references, and a few of the texts."""
    examples = read_examples(args.test)
    if args.limit is not None and args.limit < len(examples):
        examples = [examples[i * len(examples) // args.limit] for i in range(args.limit)]
    start = time.perf_counter()
    with tqdm(total=len(examples), desc="generate", file=sys.stderr) as bar:
        texts = generate_text(
            model,
            tokenizer,
            [example.source for example in examples],
            num_beams=args.num_beams,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.generate_batch_size,
            progress=bar.update,
        )
    seconds = time.perf_counter() - start
    shown = range(0, len(examples), max(1, len(examples) // SAMPLES))
    return {
        "test": args.test.name,
        "test_inputs": len(examples),
        "num_beams": args.num_beams,
        "max_new_tokens": args.max_new_tokens,
        "generate_seconds": seconds,
        "metrics": score(texts, [example.references for example in examples]),
        "samples": [{"source": examples[i].source, "output": texts[i]} for i in shown][:SAMPLES],
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # PackageNotFoundError is one; a source tree that is not installed has no version
            continue
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"


if __name__ == "__main__":
    main()
