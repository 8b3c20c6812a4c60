"""How much of a text a prefix has learnt: self-study beside distillation on the text's own pieces.

``python -m benchmarks.self_study TEXT QUESTIONS --tokens 2700 --output runs/study`` learns the first tokens of a text
and appends a line of JSON for each prefix to ``results.jsonl``. It measures the loss of two things that no training
saw: answers to QUESTIONS, which somebody wrote before, and the 512 tokens that follow in the text. Each is measured
with nothing in front, with the prefix before training, with the prefix, and with all of the text that it has learnt.
A run that was stopped goes on when it is started again. Lines that are there are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.load import load_base
from prefix_attn.training.comparison import recovered
from prefix_attn.training.conversations import LENGTH, Told, prompt_for
from prefix_attn.training.data import Examples
from prefix_attn.training.distill import distill, pieces
from prefix_attn.training.evaluate import validation_loss
from prefix_attn.training.resume import last_checkpoint
from prefix_attn.training.self_study import self_study
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.teacher import Context
from prefix_attn.training.tokens import batches, encode
from prefix_attn.training.train import VALIDATION_BATCH

CONTINUATION, PIECE = 512, 128  # tokens of the text behind the part that is learnt, and of a row of it


def read_told(path: Path) -> list[Told]:
    """Conversations that self-study wrote, or somebody, each with its chunk."""
    found = []
    for row, example in Examples(path, skip_bad_rows=True).records(check=True):
        chunk: Any = row.get("chunk")
        found.append((None if chunk is None else int(chunk), example))
    return found


def continuation_loss(model: Any, ids: list[int], pad_id: int) -> float:
    """Nats per token of the rows that ``ids`` make."""
    rows = [row | {"labels": row["input_ids"]} for row in pieces(ids, PIECE)]
    return validation_loss(model, batches(rows, 4, pad_id))


def measured(model: PrefixModel, rest: list[int], pad_id: int, learnt: list[int]) -> dict[str, float]:
    """The loss of what follows the text, with nothing, the prefix and the text in front."""
    with model.disable_prefix():
        nothing = continuation_loss(model, rest, pad_id)
    context = Context(model.base_model)
    context.put(learnt)
    text = continuation_loss(context.model, rest, pad_id)
    context.model.attachment.remove()
    return {"nothing": nothing, "prefix": continuation_loss(model, rest, pad_id), "text": text}


def learn(options: argparse.Namespace, way: str, P: int) -> dict[str, Any]:
    """Train one prefix and measure it."""
    base, tokenizer = load_base(options.model, dtype=options.dtype)
    ids = tokenizer(options.text.read_text(), verbose=False)["input_ids"]
    learnt, rest = ids[: options.tokens], ids[options.tokens : options.tokens + CONTINUATION]
    document, folder = tokenizer.decode(learnt), options.output / f"{way}-{P}"
    torch.manual_seed(options.seed)
    config = PrefixConfig(num_virtual_tokens=P, init="document", init_text=document)
    model, pad = get_prefix_model(base, config, tokenizer), tokenizer.pad_token_id
    start = measured(model, rest, pad, learnt)
    questions = read_told(options.questions)
    settings = TrainingSettings(
        folder,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        validate_every=options.steps // 2,
        max_length=options.max_length,
        seed=options.seed,
        resume=last_checkpoint(folder) is not None or (folder / "self_study.json").is_file(),
    )
    since = time.perf_counter()
    result: dict[str, Any] = {"way": way, "P": P, "tokens": len(learnt), "steps": options.steps}
    if way == "self-study":
        known = options.output / "conversations.jsonl"
        told = read_told(known) if known.is_file() else options.conversations
        metrics = self_study(model, tokenizer, document, settings, conversations=told, validation=questions)
        if not known.is_file():
            known.write_bytes((folder / "conversations.jsonl").read_bytes())
        result["questions"] = metrics["comparison"]
    else:
        metrics = distill(model, tokenizer, document, settings)
        rows, _ = encode(tokenizer, [told for _, told in questions], options.max_length, prompt=prompt_for(tokenizer))
        result["questions"] = {"loss": {"prefix": validation_loss(model, batches(rows, VALIDATION_BATCH, pad))}}
    found = measured(model, rest, pad, learnt)
    result["continuation"] = {"loss": found | {"start": start["prefix"]}, "recovered": recovered(found)}
    result |= {name: metrics[name] for name in ("seconds", "peak_memory_bytes", "train_loss", "validation_loss")}
    return result | {"wall": time.perf_counter() - since, "rate": options.learning_rate, "seed": options.seed}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--tokens", type=int, default=2700, help="of the text that are learnt")
    parser.add_argument("--virtual-tokens", default="256", help="one or several, with commas")
    parser.add_argument("--ways", default="self-study,pieces")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--max-length", type=int, default=LENGTH, help="of a conversation, or of a piece")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for P in map(int, options.virtual_tokens.split(",")):
        for way in options.ways.split(","):
            if any((row["way"], row["P"]) == (way, P) for row in done):
                continue
            row = learn(options, way, P)
            with file.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(json.dumps({name: row[name] for name in ("way", "P", "questions", "continuation", "wall")}, indent=1))


if __name__ == "__main__":
    main()
