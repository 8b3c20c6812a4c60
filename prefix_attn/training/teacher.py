"""The teacher of a distillation: the frozen model with a text in front, and what it predicts, kept on disk.

The text is not read again for every row: its keys and values are a prefix. They are computed once, shared by the rows
of a batch and never trained. What the teacher predicts is computed once for each row, whatever the number of epochs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from prefix_attn.hf.attach.wrapper import evaluating
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.head import sum_over
from prefix_attn.training.parts import make_parts
from prefix_attn.training.positions import positions_of
from prefix_attn.training.row_file import digest
from prefix_attn.training.tokens import Batch, Row, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "teacher"  # in the folder of a run
BATCH = 16  # rows


class Target:
    """What the teacher predicts at N tokens: the k likeliest next tokens and their log-probabilities, (N, k) each."""

    def __init__(self, logits: Tensor, top_k: int) -> None:
        """Take them from logits (N, V), which are not kept."""
        values, self.ids = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
        self.log_probs = values.float() - logits.float().logsumexp(-1, keepdim=True)

    def extend(self, other: Target) -> None:
        """Put those of other tokens behind these."""
        self.ids = torch.cat([self.ids, other.ids])
        self.log_probs = torch.cat([self.log_probs, other.log_probs])


class Context:
    """The frozen model with a text in front of every row."""

    def __init__(self, base: PreTrainedModel) -> None:
        """``put`` comes before anything else."""
        self.model = PrefixModel(base)
        self._ids: list[int] | None = None

    def put(self, ids: Sequence[int]) -> None:
        """Take the text with these tokens. Its keys and values are computed, if it is another one than before.

        Raises:
            NotImplementedError: prefixes of this model take no positions, as a text would.
        """
        if self._ids == list(ids):
            return
        self._ids = None
        if self.model.active_prefix is not None:
            self.model.delete_prefix("default")
        config = PrefixConfig(
            num_virtual_tokens=len(ids), init="text", init_token_ids=list(ids), num_frozen_tokens=len(ids)
        )
        self.model.add_prefix("default", config)
        if self.model.prefix_configs["default"].position_mode != "shift":
            kind = type(self.model.base_model).__name__
            raise NotImplementedError(f"{kind}: its prefixes take no positions, as a text would")
        self._ids = list(ids)


class Teacher(Context):
    """A ``Context`` that says what it predicts."""

    def __init__(self, base: PreTrainedModel, ids: Sequence[int], row_length: int, top_k: int) -> None:
        """``ids`` are the first text. Rows after a text have up to ``row_length`` tokens."""
        if top_k < 1:
            raise ValueError(f"top_k must be positive, got {top_k}")
        super().__init__(base)
        self.row_length, self.top_k = row_length, top_k
        self.put(ids)

    def put(self, ids: Sequence[int]) -> None:
        """As ``Context`` has it.

        Raises:
            ValueError: the text has fewer than two tokens, or does not fit into the model's window with a row.
        """
        if len(ids) < 2:
            raise ValueError(f"the document must have at least 2 tokens, got {len(ids)}")
        window = positions_of(self.model.base_model)
        if window is not None and len(ids) + self.row_length > window:
            raise ValueError(
                f"the document has {len(ids)} tokens, which with {self.row_length} behind them do not fit into the "
                f"model's {window}: distill it in parts, or take a model with a longer window"
            )
        super().put(ids)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Target:
        """Distributions at the tokens of ``batch`` that are not padding."""
        vocabulary = self.model.config.get_text_config().vocab_size
        found = Target(torch.empty(0, vocabulary, device=self.model.device), self.top_k)

        def read(logits: Tensor, _: slice) -> Tensor:
            found.extend(Target(logits, self.top_k))
            return logits.new_zeros(())

        with evaluating(self.model):
            sum_over(self.model, batch, batch["attention_mask"].bool(), read)
        return found


@dataclass
class Lesson:
    """Rows to learn from, and the text in front of each of them as the teacher reads it.

    Attributes:
        rows: their tokens. Labels are not used.
        contexts: for each row the place of its text in ``texts``.
        texts: the tokens of the texts.
    """

    rows: list[Row]
    contexts: list[int]
    texts: Sequence[Sequence[int]]

    def batches(self) -> list[range]:
        """Rows that the teacher reads together: they follow one another behind one text."""
        starts = [0]
        for place in range(1, len(self.rows)):
            if self.contexts[place] != self.contexts[place - 1] or place - starts[-1] == BATCH:
                starts.append(place)
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(self.rows)]) if a < b]


class Taught(Sequence[Row]):
    """Rows with what the teacher predicts at their tokens, ``top_ids`` and ``top_log_probs``, (tokens, k) each."""

    def __init__(self, rows: Sequence[Row], parts: Sequence[Path], sizes: Sequence[int]) -> None:
        """``parts`` are the files of ``taught``, each for as many rows as ``sizes`` says. They are mapped, not read."""
        self._rows = [{"input_ids": row["input_ids"]} for row in rows]
        self._targets: list[tuple[Tensor, Tensor]] = []
        for path, size in zip(parts, sizes, strict=True):
            counts = [len(row["input_ids"]) for row in rows[len(self._targets) : len(self._targets) + size]]
            found = load_file(path)
            self._targets += zip(*(found[name].split(counts) for name in ("ids", "log_probs")), strict=True)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """A row, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        ids, log_probs = self._targets[index]
        return {**self._rows[index], "top_ids": ids, "top_log_probs": log_probs}

    @property
    def digest(self) -> str:
        """Of the rows, as ``row_file.digest``."""
        return digest(self._rows)


def taught(teacher: Teacher, lesson: Lesson, pad_id: int, folder: Path, *, shown: str, bf16: bool = False) -> Taught:
    """The rows of ``lesson`` with what ``teacher`` predicts.

    Args:
        teacher: reads them behind their texts.
        lesson: the rows.
        pad_id: token that pads the rows of a batch.
        folder: what was computed is kept there, and what is there is not computed again.
        shown: what the progress bar says.
        bf16: whether products are in bfloat16, as in training.
    """
    model, parts = teacher.model, lesson.batches()
    name = _name(teacher, lesson, bf16)
    paths = [folder / f"{name}-{number:05}.safetensors" for number in range(len(parts))]

    def make(number: int) -> bytes:
        some = parts[number]
        teacher.put(lesson.texts[lesson.contexts[some[0]]])
        rows = [{"input_ids": lesson.rows[i]["input_ids"]} for i in some]
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows, pad_id).items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            found = teacher(batch)
        return save({"ids": found.ids.int().cpu().contiguous(), "log_probs": found.log_probs.cpu().contiguous()})

    sizes = [len(some) for some in parts]
    make_parts(paths, make, sizes, shown=shown, unit=" rows", device=model.device)
    return Taught(lesson.rows, paths, sizes)


def _name(teacher: Teacher, lesson: Lesson, bf16: bool) -> str:
    """A name for what this teacher predicts on these rows."""
    texts = [digest([{"input_ids": list(text)}]) for text in lesson.texts]
    facts = [str(teacher.model.config._name_or_path), str(teacher.model.dtype), bf16, teacher.top_k, BATCH]
    told = json.dumps([facts, texts, lesson.contexts, digest([{"i": row["input_ids"]} for row in lesson.rows])])
    return hashlib.sha256(told.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class TaughtCollator:
    """``collate`` for rows of ``Taught``: ``top_ids`` and ``top_log_probs`` are (B, S, k), 0 at padding."""

    pad_id: int

    def __call__(self, rows: Sequence[Any]) -> Batch:
        """One batch of ``rows``."""
        batch = collate([{"input_ids": row["input_ids"]} for row in rows], self.pad_id)
        for name in ("top_ids", "top_log_probs"):
            batch[name] = torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True)
        return batch


def target_of(batch: Batch) -> Target:
    """What the teacher predicts at the tokens of ``batch``, which ``TaughtCollator`` made."""
    found, at = Target.__new__(Target), batch["attention_mask"].bool()
    found.ids, found.log_probs = batch["top_ids"][at].long(), batch["top_log_probs"][at]
    return found
