"""Self-study: a prefix learns a text from conversations about it (Eyuboglu et al. 2025, Cartridges).

The frozen model reads the text in chunks and writes the conversations, or somebody else did. The prefix learns to
predict what the model with the chunk in front predicts at each of their tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate import PartialState

from prefix_attn.hf.attach.ranks import is_first
from prefix_attn.hf.io.writing import replace
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.comparison import Exam, compared
from prefix_attn.training.conversations import LENGTH, Told, prompt_for, written
from prefix_attn.training.distill import (
    TOP_K,
    VALIDATION_ROWS,
    check_student,
    chunks,
    digest_of,
    ids_of,
    largest_chunk,
    learn,
)
from prefix_attn.training.examples import Example
from prefix_attn.training.positions import check_rows, room_for_rows
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.teacher import Lesson, Teacher
from prefix_attn.training.tokens import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024  # tokens
HELD_OUT = 16  # one conversation in so many is validated on


def self_study(
    model: PrefixModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str | Sequence[str],
    settings: TrainingSettings,
    *,
    conversations: int | Iterable[Told],
    validation: Iterable[Told] | None = None,
    top_k: int = TOP_K,
    chunk_tokens: int | None = None,
    prompt: Prompt | None = None,
    skip_bad_rows: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the active prefix of ``model`` to act like ``document`` in front of conversations, and save it.

    ``settings.output`` gets the conversations, what the teacher predicts on them, and all that ``train.train`` leaves.
    The loss is ``distill.divergence``.

    Args:
        model: its active prefix is trained. One with ``init="document"`` starts close to the document.
        tokenizer: the model's tokenizer.
        document: the text to learn, or several. One that is longer than a chunk is read in chunks.
        settings: how to train. ``max_length`` is that of a conversation, by default 256 tokens.
        conversations: how many to write; or conversations, which are not written then, each with the number of the
            chunk that the teacher has in front, or with None for all of the text.
        validation: conversations to validate on. Default: one in 16 of the others, which is not trained on.
        top_k: as in ``distill``.
        chunk_tokens: the most tokens of a chunk. Default: 1,024, if the window has room for them.
        prompt: what stands around a question. Default: the tokenizer's chat template, or where there is none
            ``QUESTION``.
        skip_bad_rows: leave out conversations that were given and do not fit into a row.
        options: as in ``train.fit``.

    Returns:
        What ``distill`` returns, with ``comparison``: see ``comparison.compared``.

    Raises:
        ValueError: there is no tokenizer; there are fewer conversations than chunks; none can be used;
            the text is too short for a chunk, or too long for conversations about all of it;
            ``settings.output`` holds another self-study; or as in ``distill``.
        NotImplementedError: as in ``distill``.
    """
    if tokenizer is None:
        raise ValueError("self-study writes texts, which takes the base model's tokenizer: it has none")
    check_student(model, settings)
    PartialState(cpu=model.device.type == "cpu")
    prompt = prompt or prompt_for(tokenizer)
    room = room_for_rows(model)
    length = settings.max_length or min(LENGTH, LENGTH if room is None else room // 2)
    check_rows(model, length)
    settings = dataclasses.replace(settings, max_length=length)
    reading = _Reading.of(model, ids_of(tokenizer, document), length, chunk_tokens, top_k)
    own = list[Told]() if isinstance(conversations, int) else list(conversations)
    asked = None if validation is None else list(validation)
    reading.check([*own, *(asked or [])])
    if asked == []:
        raise ValueError("there are no conversations to validate on: leave validation out, or give some")
    if isinstance(conversations, int):
        task = reading.task
        own = written(reading.teacher, tokenizer, reading.texts, conversations, settings, prompt=prompt, task=task)
    train, held_out = _split(own, asked)
    encoder, skip = Encoder(tokenizer, length, prompt=prompt), skip_bad_rows or isinstance(conversations, int)
    lesson, checked = (reading.lesson(some, encoder, skip=skip) for some in (train, held_out))
    exam = Exam(model, tokenizer, prompt, checked, held_out)
    before = exam.before()
    counts = {"document_tokens": len(reading.whole), "chunks": len(reading.texts), "rows": len(lesson.rows)}
    kept = {"task": reading.task, "prompt": prompt, "options": options, "extra": counts}
    metrics = learn(model, reading.teacher, lesson, checked, tokenizer.pad_token_id, settings, **kept)
    metrics["comparison"] = compared(exam, before, reading.teacher)
    if is_first():
        replace(settings.output / "metrics.json", json.dumps(metrics, indent=2).encode())
    return metrics


class _Reading(NamedTuple):
    """What the teacher reads: chunks, all of the texts in one, and how much of it has room in the window."""

    teacher: Teacher
    texts: list[list[int]]
    whole: list[int]
    most: int | None
    task: dict[str, Any]

    @classmethod
    def of(cls, model: PrefixModel, documents: list[list[int]], length: int, size: int | None, top_k: int) -> _Reading:
        """``size`` is the most tokens of a chunk, and ``length`` that of a conversation."""
        most = largest_chunk(model, 2 * length)  # what asks for a question is as long as a conversation
        chosen = size or min(CHUNK, most or CHUNK, max(map(len, documents)))
        texts = chunks(documents, size if size is not None else chosen, most)
        task = {"document": digest_of(documents), "top_k": top_k, "chunk_tokens": chosen}
        teacher = Teacher(model.base_model, texts[0], length, top_k)
        return cls(teacher, texts, [token for ids in documents for token in ids], most, task)

    def check(self, told: Sequence[Told]) -> None:
        """Refuse conversations about chunks that are not there, or about a text that does not fit into the window."""
        for chunk, _ in told:
            if chunk is None and self.most is not None and len(self.whole) > self.most:
                raise ValueError(
                    f"the text has {len(self.whole)} tokens, and the model's window has room for {self.most}: the "
                    "conversations need a 'chunk', the number of the one that they are about"
                )
            if chunk is not None and not 0 <= chunk < len(self.texts):
                count = len(self.texts)
                raise ValueError(f"a conversation is about chunk {chunk}, and there are {count}: the first is 0")

    def lesson(self, told: Sequence[Told], encoder: Encoder, *, skip: bool) -> Lesson:
        """Conversations as rows, those about one text behind one another. The last text is all of them."""
        last, place = len(self.texts), 0

        def examples() -> Iterator[Example]:
            nonlocal place
            for chunk, example in told:
                place = last if chunk is None else chunk  # that of the rows that follow
                yield example

        rows = encoder.rows(examples(), skip_bad_rows=skip, name="conversations")
        placed = sorted(((place, row) for row in rows), key=lambda pair: pair[0])
        return Lesson([row for _, row in placed], [place for place, _ in placed], [*self.texts, self.whole])


def _split(told: list[Told], validation: list[Told] | None) -> tuple[list[Told], list[Told]]:
    """Conversations to train on, and to validate on."""
    if validation is not None:
        return told, validation[:VALIDATION_ROWS]
    if len(told) < 2:
        raise ValueError(f"{len(told)} conversations leave none to train on or to validate on: take at least 2")
    places = range(min(HELD_OUT, len(told)) - 1, len(told), HELD_OUT)[:VALIDATION_ROWS]
    return [pair for i, pair in enumerate(told) if i not in places], [told[i] for i in places]
