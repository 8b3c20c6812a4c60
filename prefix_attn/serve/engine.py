"""The embedded engine: it writes for many clients at a time, with one model and one prefix per row."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from prefix_attn.hf.model import PrefixModel
from prefix_attn.hf.rules import check_rules
from prefix_attn.serve.prompts import limit_of, shift_of
from prefix_attn.serve.request import Generation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOIN = 8  # tokens between two looks at who waits: joining reads all prompts of a batch again
STOPPING = "the server is stopping"
_log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """As many requests wait as may wait."""


class Stopping(RuntimeError):
    """The engine takes no more requests."""


class Engine:
    """Generations of a ``PrefixModel``, batched by ``generate``.

    One thread runs the model. Rows that wait join a batch that has room: it stops, and starts again with them and with
    what its rows have written so far. Nothing is kept between requests, so nothing can cross from one to another.
    """

    def __init__(
        self, model: PrefixModel, tokenizer: PreTrainedTokenizerBase, *, max_batch: int = 16, max_waiting: int = 256
    ) -> None:
        """Take a model.

        Args:
            model: its prefixes may share a batch.
            tokenizer: of the model.
            max_batch: rows of a batch.
            max_waiting: more requests are refused.

        Raises:
            NotImplementedError: the model's generation_config asks for what is not done here.
        """
        check_rules(model.generation_config, "prefix-attn serve")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.max_batch, self.max_waiting = max_batch, max_waiting
        self._waiting: deque[Generation] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to write."""
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="prefix_attn engine", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """End after the token that is being made. What was not finished fails."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def stop(self) -> None:
        """``end``, and wait until it ended."""
        self.end()
        if self._thread is not None:
            self._thread.join()

    def submit(self, generations: Sequence[Generation]) -> None:
        """Queue ``generations``, all or none.

        Raises:
            Busy: too many wait already.
            Stopping: the engine ends.
        """
        with self._changed:
            if self._stopping:
                raise Stopping(STOPPING)
            self._forget_those_who_left()
            if len(self._waiting) + len(generations) > self.max_waiting:
                raise Busy(f"{len(self._waiting)} requests wait, and at most {self.max_waiting} may: try again later")
            self._waiting.extend(generations)
            self._changed.notify()

    def _run(self) -> None:
        rows: list[Generation] = []
        while self._has_joined(rows):
            try:
                self._write(rows)
            except Exception as error:  # one batch must not end the server
                _log.exception("a batch failed")
                for row in rows:
                    row.fail(f"{type(error).__name__}: {error}")
        for row in (*rows, *self._waiting):
            row.fail(STOPPING)
        self._waiting.clear()

    def _forget_those_who_left(self) -> None:
        if any(row.is_over for row in self._waiting):
            self._waiting = deque(row for row in self._waiting if not row.is_over)

    def _has_joined(self, rows: list[Generation]) -> bool:
        """Fill ``rows`` with those who wait, without those that are over. False when the engine stops."""
        while True:
            rows[:] = [row for row in rows if not row.is_over]
            with self._changed:
                self._changed.wait_for(lambda: rows or self._waiting or self._stopping)
                if self._stopping:
                    return False
                while self._waiting and len(rows) < self.max_batch:
                    if not (row := self._waiting.popleft()).is_over:
                        rows.append(row)
            if rows:
                return True

    def _write(self, rows: Sequence[Generation]) -> None:
        """Write until all ``rows`` are over, or others may join."""
        prompts = [row.prompt + row.tokens for row in rows]
        pad = self.tokenizer.pad_token_id or 0  # any token does: nobody sees it
        width = max(map(len, prompts))
        device = self.model.device
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        # An infix stands behind the prompt, not behind what was written since.
        starts = torch.tensor([width - len(row.tokens) - 1 for row in rows], device=device)
        # Rows that are over go on unseen until the batch ends, which is before one of them has no position left.
        taken = max(shift_of(self.model, row.prefix) + len(row.prompt) + len(row.tokens) for row in rows)
        infix = any(config.mode == "infix" for config in self.model.prefix_configs.values())
        self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            prefix_names=[row.prefix for row in rows],
            infix_start=starts if infix else None,
            max_new_tokens=min(limit_of(self.model) - taken, max(row.left for row in rows)),
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=None,
            repetition_penalty=1.0,  # each row has its own
            logits_processor=LogitsProcessorList([_Choose(rows)]),
            stopping_criteria=StoppingCriteriaList([_Deliver(rows, width, self._others_may_join)]),
        )

    def _others_may_join(self, rows: Sequence[Generation], written: int) -> bool:
        if self._stopping or written % JOIN:
            return self._stopping
        with self._changed:
            self._forget_those_who_left()
            room = sum(row.is_over for row in rows) + self.max_batch - len(rows)
            return bool(self._waiting and room)


class _Choose(LogitsProcessor):
    """Each row chooses its token. Transformers' own sampling has one temperature and one generator for all rows."""

    def __init__(self, rows: Sequence[Generation]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.stack([self._chosen(row, logits) for row, logits in zip(self.rows, scores, strict=True)])

    def _chosen(self, row: Generation, logits: Tensor) -> Tensor:
        try:
            return logits if row.is_over else row.choose(logits)
        except Exception as error:  # of this row: the others go on
            _log.exception("a request failed")
            row.fail(f"{type(error).__name__}: {error}")
            return logits


class _Deliver(StoppingCriteria):
    """Hands the last token of each row on. It ends rows that are over, and all of them where others may join."""

    def __init__(self, rows: Sequence[Generation], width: int, others: Callable[..., bool]) -> None:
        self.rows, self.width, self.others = rows, width, others

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            row.add(token)
        if self.others(self.rows, input_ids.shape[1] - self.width):
            return torch.ones(len(self.rows), dtype=torch.bool, device=input_ids.device)
        return torch.tensor([row.is_over for row in self.rows], device=input_ids.device)
