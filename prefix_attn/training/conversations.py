"""The conversations of self-study: the frozen model reads a chunk of a text, asks about it, and answers.

A seed says how a question begins. There are five kinds, those of Eyuboglu et al. 2025 (Cartridges). The keys and values
of a chunk are a prefix: they are computed once, and all conversations about the chunk share them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prefix_attn.hf.attach.ranks import is_first
from prefix_attn.hf.io.files import read_json
from prefix_attn.hf.io.writing import replace
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.examples import Example
from prefix_attn.training.generate import Generator
from prefix_attn.training.parts import make_parts
from prefix_attn.training.prompts import CHAT, Prompt
from prefix_attn.training.ranks import sums
from prefix_attn.training.resume import check_same, keep
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.teacher import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 256  # tokens of a conversation: at most a quarter is the question, at most half the answer
BATCH = 16  # conversations that are written together
TEMPERATURE = 0.5
FACTS, FILE, FOLDER = "self_study.json", "conversations.jsonl", "conversations"  # in the folder of a run
QUESTION = Prompt("Question: {source}\nAnswer:", one_line=True)  # for a tokenizer without a chat template

ASK = Prompt("{source}")  # the text goes on as a page of exercises does: a small model asks about nothing else then
HEADING = "\n\nQuestions about the text above\n\n1."
ENDS = ("\n\n", "\n2")
SEEDS: Mapping[str, Sequence[str]] = {  # how a question begins
    "summary": ("Summarise the", "In a few sentences, what is", "Give the main points of"),
    "structure": ("List the", "Make a table of the", "Write as JSON the"),
    "question": ("What is", "Which", "When"),
    "use case": ("How do I", "What should I do if", "I want to"),
    "creative": ("Imagine that", "Compare the", "Write a story about"),
}
_log = logging.getLogger(__name__)

Told = tuple[int | None, Example]  # a conversation, and the chunk that it is about; None: the whole text


def prompt_for(tokenizer: PreTrainedTokenizerBase, template: str | None = None, **options: Any) -> Prompt:
    """What stands around a question: ``template``, or the tokenizer's chat template, or ``QUESTION``.

    ``options`` are other fields of ``Prompt``.
    """
    if template is not None:
        return Prompt(template, **options)
    if getattr(tokenizer, "chat_template", None):
        return Prompt(CHAT, **options)
    return dataclasses.replace(QUESTION, **options)


def written(
    reader: Context,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Sequence[int]],
    count: int,
    settings: TrainingSettings,
    *,
    prompt: Prompt,
    task: Mapping[str, Any],
) -> list[Told]:
    """Conversations about the chunks ``texts``, as many about each, in ``settings.output`` and from there.

    A conversation depends on the seed, the chunk and its place among ``count``. Those that are there already stay.

    Raises:
        ValueError: there are fewer than chunks; the folder has those of another self-study; or none has an answer.
    """
    if count < len(texts):
        raise ValueError(f"{count} conversations about {len(texts)} chunks leave some unread: take at least as many")
    facts = {"conversations": count, **task, "seed": settings.seed, "max_length": settings.max_length}
    facts |= {**dataclasses.asdict(prompt), "dtype": str(reader.model.dtype).removeprefix("torch.")}
    device = reader.model.device
    _begin(settings, facts, device)
    parts = list(_parts(count, len(texts)))
    paths = [settings.output / FOLDER / f"{number:05}.jsonl" for number in range(len(parts))]

    def make(number: int) -> bytes:
        chunk, numbers = parts[number]
        reader.put(texts[chunk])
        rows = _write(reader.model, tokenizer, numbers, prompt, settings)
        return "".join(json.dumps(row | {"chunk": chunk}, ensure_ascii=False) + "\n" for row in rows).encode()

    sizes = [len(numbers) for _, numbers in parts]
    make_parts(paths, make, sizes, shown="writing conversations", unit=" conversations", device=device)
    content = b"".join(path.read_bytes() for path in paths)
    if is_first():
        replace(settings.output / FILE, content)
    rows = [json.loads(line) for line in content.decode().split("\n") if line]
    found = [(row["chunk"], Example(row["source"], (row["target"],))) for row in rows if row["target"].strip()]
    if not found:
        raise ValueError(f"the model answered none of its {count} questions: take another model or template")
    if len(found) < count:
        _log.warning("%d of %d conversations have no answer: left out", count - len(found), count)
    return found


def _begin(settings: TrainingSettings, facts: Mapping[str, Any], device: torch.device) -> None:
    """Note what is written, or see that it is what was written before."""
    file = settings.output / FACTS
    known = file.is_file()
    sums(0, device=device)  # no process writes before all have looked
    if known:
        if not settings.resume:
            raise ValueError(
                f"{settings.output}: holds conversations of another run; resume it, or take another folder"
            )
        check_same(settings.output, read_json(file), facts)
    elif is_first():
        for path in (settings.output / FOLDER).glob("*.jsonl"):  # nothing says what these are about
            path.unlink()
        keep(settings.output, facts, FACTS)


def _parts(count: int, chunks: int) -> Iterator[tuple[int, range]]:
    """Chunks, and the numbers of the conversations that are written about them together."""
    for chunk in range(chunks):
        numbers = range(chunk * count // chunks, (chunk + 1) * count // chunks)
        yield from ((chunk, numbers[i : i + BATCH]) for i in range(0, len(numbers), BATCH))


def _write(
    model: PrefixModel,
    tokenizer: PreTrainedTokenizerBase,
    numbers: Sequence[int],
    prompt: Prompt,
    settings: TrainingSettings,
) -> list[dict[str, Any]]:
    """The conversations with these ``numbers``, about the text that is the prefix of ``model``."""
    kinds = list(SEEDS)
    kind_of = [kinds[n % len(kinds)] for n in numbers]
    begins = [SEEDS[kind][n // len(kinds) % len(SEEDS[kind])] for kind, n in zip(kind_of, numbers, strict=True)]
    told = hashlib.sha256(f"{settings.seed} {numbers[0]}".encode()).digest()
    chosen: dict[str, Any] = {"batch_size": BATCH, "temperature": TEMPERATURE}
    chosen["seed"] = int.from_bytes(told[:4], "big")
    length = settings.max_length or LENGTH
    asking = Generator(model, tokenizer, prompt=ASK, max_new_tokens=max(1, length // 4), stop=ENDS, **chosen)
    ends = asking.texts([f"{HEADING} {begin}" for begin in begins])
    questions = [" ".join(f"{begin} {end}".split()) for begin, end in zip(begins, ends, strict=True)]
    answering = Generator(model, tokenizer, prompt=prompt, max_new_tokens=max(1, length // 2), **chosen)
    answers = [answer.strip() for answer in answering.texts(questions)]
    found = zip(questions, answers, kind_of, strict=True)
    return [{"source": question, "target": answer, "kind": kind} for question, answer, kind in found]
