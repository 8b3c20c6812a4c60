"""What a prefix that was learnt from a text is worth: beside no prefix, its start, and the text itself in front."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prefix_attn.hf.attach.wrapper import evaluating
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.evaluate import validation_loss
from prefix_attn.training.examples import Example
from prefix_attn.training.generate import Generator, inputs_of
from prefix_attn.training.positions import positions_of
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.teacher import Lesson, Teacher
from prefix_attn.training.tokens import batches
from prefix_attn.training.train import VALIDATION_BATCH

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3  # questions whose answers are shown
ANSWER = 48  # tokens of these answers
REQUEST, RUNS = 16, 3  # tokens of an answer whose time is taken, and how often
_log = logging.getLogger(__name__)
WAYS = {"nothing": "nothing", "start": "the prefix before training", "prefix": "the prefix", "text": "the text"}


class Exam:
    """The loss of held-out answers, and answers to some of their questions."""

    def __init__(
        self,
        model: PrefixModel,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Prompt,
        lesson: Lesson,
        told: Sequence[tuple[int | None, Example]],
    ) -> None:
        """``lesson`` has the rows of the conversations ``told``, with labels. The last of its texts is all of them."""
        self.model, self.tokenizer, self.prompt, self.lesson = model, tokenizer, prompt, lesson
        self.whole = lesson.texts[-1]
        self.questions = [example for _, example in told[:SHOWN]]
        self._chunks = [-1 if chunk is None else chunk for chunk, _ in told[:SHOWN]]
        width = max(len(row["input_ids"]) for row in lesson.rows)
        window = positions_of(model.base_model)
        self.fits = window is None or len(self.whole) + width + ANSWER <= window

    def loss(self, model: Any, rows: Sequence[Any] | None = None) -> float:
        """Nats per token of the answers, those of ``rows`` or of all."""
        given = self.lesson.rows if rows is None else rows
        return validation_loss(model, batches(given, VALIDATION_BATCH, self.tokenizer.pad_token_id))

    def answers(self, model: Any, questions: Sequence[Example] | None = None) -> list[str]:
        """The model's own to ``questions``, or to all of them, greedily."""
        generator = Generator(model, self.tokenizer, prompt=self.prompt, batch_size=SHOWN, max_new_tokens=ANSWER)
        return generator.texts([example.prompt for example in questions or self.questions])

    def before(self) -> dict[str, Any]:
        """What the model says without a prefix, and with the one that training starts from."""
        _log.info("measuring what the model answers with nothing in front, and with the prefix before training")
        with self.model.disable_prefix():
            found = {"nothing": (self.loss(self.model), self.answers(self.model))}
        return found | {"start": (self.loss(self.model), self.answers(self.model))}

    def behind_text(self, teacher: Teacher) -> tuple[float, list[str]]:
        """The same with all of the text in front. Where it does not fit, each row is behind its own chunk."""
        if self.fits:
            teacher.put(self.whole)
            return self.loss(teacher.model), self.answers(teacher.model)
        total, tokens = 0.0, 0
        for context in dict.fromkeys(self.lesson.contexts):
            rows = [row for row, other in zip(self.lesson.rows, self.lesson.contexts, strict=True) if other == context]
            count = sum(label >= 0 for row in rows for label in row["labels"])
            teacher.put(self.lesson.texts[context])
            total, tokens = total + self.loss(teacher.model, rows) * count, tokens + count
        answers = list[str]()
        for question, context in zip(self.questions, self._chunks, strict=True):
            teacher.put(self.lesson.texts[context])
            answers += self.answers(teacher.model, [question])
        return total / tokens, answers


def compared(exam: Exam, before: Mapping[str, Any], teacher: Teacher) -> dict[str, Any]:
    """The prefix beside nothing, its start and the text, once it is trained.

    Returns:
        ``loss``: nats per token of held-out answers, by what stands in front: "nothing", "start" (the prefix before
        training), "prefix" and "text". ``recovered``: the share of the text's gain over nothing that the prefix has,
        None where the text gains nothing. ``tokens``, ``bytes`` (keys and values) and ``seconds`` of a request that is
        answered with 16 tokens: of "prefix" and "text". ``compression``: tokens of text per virtual token. ``answers``:
        to some questions, by what stands in front. ``whole``: whether all of the text fits into the window; if not,
        "text" is the chunk that a question is about.
    """
    _log.info("comparing the prefix with nothing and with the text in front")
    model = exam.model
    found = dict(before) | {"prefix": (exam.loss(model), exam.answers(model)), "text": exam.behind_text(teacher)}
    loss = {name: value for name, (value, _) in found.items()}
    front = exam.whole if exam.fits else max(exam.lesson.texts[:-1], key=len)
    teacher.put(front)
    encoders = {"prefix": _encoder(model), "text": _encoder(teacher.model)}
    tokens = {name: encoder.num_virtual_tokens for name, encoder in encoders.items()}
    size = torch.finfo(model.dtype).bits // 8
    return {
        "loss": loss,
        "recovered": recovered(loss),
        "tokens": tokens,
        "compression": len(exam.whole) / tokens["prefix"],
        "bytes": {name: encoder.prompt_embeddings().numel() * size for name, encoder in encoders.items()},
        "seconds": {"prefix": _seconds(exam, []), "text": _seconds(exam, front)},
        "answers": [
            {"question": example.source} | {name: answers[i] for name, (_, answers) in found.items()}
            for i, example in enumerate(exam.questions)
        ],
        "whole": exam.fits,
    }


def recovered(loss: Mapping[str, float]) -> float | None:
    """The share of the text's gain over nothing that the prefix has. None: the text gains nothing."""
    gain = loss["nothing"] - loss["text"]
    return (loss["nothing"] - loss["prefix"]) / gain if gain > 0 else None


def shown(found: Mapping[str, Any]) -> str:
    """What ``compared`` returns, as a table of text."""
    lines = [f"{'in front':<28}{'tokens':>8}{'loss':>8}{'MB':>9}{'s a request':>13}"]
    for name, label in WAYS.items():
        if name == "text" and not found["whole"]:
            label = "its chunk of the text"
        line = f"{label:<28}{found['tokens'].get('prefix' if name == 'start' else name, 0):>8,}"
        line += f"{found['loss'][name]:>8.3f}"
        if name in found["bytes"]:
            line += f"{found['bytes'][name] / 1e6:>9.2f}{found['seconds'][name]:>13.2f}"
        lines.append(line)
    share = "the text gains nothing"
    if found["recovered"] is not None:
        share = f"the prefix has {found['recovered']:.0%} of the text's gain"
    lines.append(f"{share}; {found['compression']:,.1f} tokens of text per virtual token")
    for entry in found["answers"]:
        lines.append(f"\n{entry['question']}")
        lines += [f"  {label}: {' '.join(entry[name].split())}" for name, label in WAYS.items()]
    return "\n".join(lines)


def _encoder(model: PrefixModel) -> Any:
    return model.find_prefix(model.active_prefix or "default")[0]


def _seconds(exam: Exam, text: Sequence[int]) -> float:
    """The time of a request: behind the prefix, or without it behind a ``text`` that is read as any prompt is."""
    asked = [*text, *Generator(exam.model, exam.tokenizer, prompt=exam.prompt).prompt_ids(exam.questions[0].prompt)]
    model, pad = exam.model, exam.tokenizer.pad_token_id
    options = {"min_new_tokens": REQUEST, "max_new_tokens": REQUEST, "do_sample": False, "pad_token_id": pad}
    took = []
    with evaluating(model), torch.no_grad():
        for _ in range(RUNS):
            since = time.perf_counter()
            model.generate(**inputs_of(model, pad, [asked]), **options, prefix_names=[None] if text else None)
            took.append(time.perf_counter() - since)
    return statistics.median(took)
