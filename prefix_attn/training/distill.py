"""Context distillation: train a short prefix to replace a long text (Eyuboglu et al. 2025, Cartridges).

The teacher is the frozen model with the text in front. The student is the same model with a short trained prefix, so
one copy of the model is enough. A text that is longer than the model's window goes by chunks: each row is read behind
the chunk that it belongs to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor

from prefix_attn.hf.attach.wrapper import evaluating
from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.head import sum_over
from prefix_attn.training.positions import check_rows, positions_of, room_for_rows
from prefix_attn.training.prompts import Prompt, plain_ids
from prefix_attn.training.ranks import share, sums
from prefix_attn.training.resume import facts_of_settings, find_checkpoint, last_checkpoint
from prefix_attn.training.row_file import digest
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.teacher import FOLDER, Lesson, Target, TaughtCollator, Teacher, target_of, taught
from prefix_attn.training.tokens import Batch, Row
from prefix_attn.training.train import VALIDATION_BATCH, fit, has_bfloat16

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOP_K = 20
LENGTH = 96  # tokens of a piece
VALIDATION_ROWS = 64


def distill(
    model: PrefixModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str | Sequence[str],
    settings: TrainingSettings,
    *,
    validation: str | None = None,
    top_k: int = TOP_K,
    chunk_tokens: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train the active prefix of ``model`` to act like ``document`` in front of a text, and save it.

    The training texts are consecutive pieces of the document, ``settings.max_length`` tokens each, by default 96. The
    loss is ``divergence``. Everything else is as in ``train.train``.

    Args:
        model: its active prefix is trained. One with ``init="document"`` starts close to the document.
        tokenizer: the model's tokenizer.
        document: the text to distil, or several.
        settings: how to train.
        validation: a text; the validation loss is measured on its pieces. Default: pieces of the document that start
            half a piece later than those of the training.
        top_k: how many tokens of each teacher distribution are compared one by one.
        chunk_tokens: the teacher reads so many tokens of a document at a time. Default: all, or what fits into the
            model's window.
        options: as in ``train.fit``.

    Returns:
        What ``train.train`` returns, with ``document_tokens``, ``chunks`` and ``rows``. Losses are in nats per token.

    Raises:
        ValueError: the document is too short, the prefix is an infix, or as in ``train.train``.
        NotImplementedError: the model is an encoder-decoder, or its prefixes take no positions, as a text would.
    """
    check_student(model, settings)
    length = settings.max_length or min(LENGTH, room_for_rows(model) or LENGTH)
    check_rows(model, length)
    documents = ids_of(tokenizer, document)
    texts = chunks(documents, chunk_tokens, largest_chunk(model, length))
    lesson = _lesson([pieces(text, length) for text in texts], texts)
    if validation is None:
        held_out = _lesson([pieces(text[length // 2 :], length) for text in texts], texts)
    else:
        (other,) = ids_of(tokenizer, validation)
        rows = pieces(other, length)  # behind each chunk in turn
        held_out = _lesson([rows[i :: len(texts)] for i in range(len(texts))], texts)
    teacher = Teacher(model.base_model, texts[0], length, top_k)
    return learn(
        model,
        teacher,
        lesson,
        Lesson(held_out.rows[:VALIDATION_ROWS], held_out.contexts[:VALIDATION_ROWS], texts),
        tokenizer.pad_token_id,
        dataclasses.replace(settings, max_length=length),
        task={"document": digest_of(documents), "top_k": top_k, "chunk_tokens": chunk_tokens},
        options=options,
        extra={"document_tokens": sum(map(len, documents)), "chunks": len(texts), "rows": len(lesson.rows)},
    )


def learn(
    model: PrefixModel,
    teacher: Teacher,
    lesson: Lesson,
    held_out: Lesson,
    pad_id: int,
    settings: TrainingSettings,
    *,
    task: Mapping[str, Any],
    prompt: Prompt | None = None,
    options: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """Train the active prefix of ``model`` on the rows of ``lesson``: to predict what ``teacher`` predicts behind them.

    What the teacher predicts is computed first, and kept in ``settings.output``, so that a resumed run goes on with it.
    The validation loss is that of ``held_out``. Other arguments are those of ``fit``.
    """
    PartialState(cpu=model.device.type == "cpu")  # joins the other processes of torchrun, which share the rows
    folder = settings.output / FOLDER
    if not settings.resume and last_checkpoint(settings.output) is None:
        for path in folder.glob("*.safetensors"):  # of a run that did not begin to train
            path.unlink(missing_ok=True)
    kept = {"shown": "teacher: validation rows", "bf16": False}
    measured = taught(teacher, held_out, pad_id, folder, **kept) if held_out.rows else []
    rows = taught(teacher, lesson, pad_id, folder, shown="teacher", bf16=has_bfloat16(model.device))
    collator = TaughtCollator(pad_id)
    ready = [collator(measured[i : i + VALIDATION_BATCH]) for i in range(0, len(measured), VALIDATION_BATCH)]
    return fit(
        model,
        rows,
        pad_id,
        (lambda: mean_divergence(model, target_of, ready)) if ready else None,
        settings,
        held_out=[{"input_ids": row["input_ids"]} for row in held_out.rows],
        task=task,
        objective=lambda student, batch: divergence(student, target_of(batch), batch),
        collator=collator,
        prompt=prompt,
        options=options,
        extra=extra,
    )


def check_student(model: PrefixModel, settings: TrainingSettings) -> None:
    """Refuse a model, or an active prefix, that cannot stand for a text in front, and a folder of another training."""
    if model.config.is_encoder_decoder:
        raise NotImplementedError("distillation puts one text in front of another, which takes a causal model")
    config = model.prefix_configs.get(model.active_prefix or "")
    if config is not None and config.mode == "infix":
        raise ValueError("an infix stands within a row, and cannot stand for a text in front: take mode='kv'")
    if settings.packing:
        raise ValueError("packing takes rows with labels, and a distillation has none: leave it out")
    if config is not None:
        find_checkpoint(settings, facts_of_settings(settings, config))  # early: what follows takes time


def ids_of(tokenizer: PreTrainedTokenizerBase, document: str | Sequence[str]) -> list[list[int]]:
    """Tokens of one text, or of several. Names of special tokens are text."""
    documents = [document] if isinstance(document, str) else document
    return [plain_ids(tokenizer, text) for text in documents]


def digest_of(documents: Iterable[Sequence[int]]) -> str:
    """SHA-256 of the tokens of texts."""
    return digest([{"input_ids": list(ids)} for ids in documents])


def largest_chunk(model: PrefixModel, length: int) -> int | None:
    """The most tokens of a text that the model reads with a row of ``length`` behind. None: any number."""
    window = positions_of(model.base_model)
    return None if window is None else window - length


def chunks(documents: Iterable[Sequence[int]], size: int | None, most: int | None) -> list[list[int]]:
    """Each document in chunks of almost equal length, of at most ``size`` tokens, or of ``most``.

    Raises:
        ValueError: ``size`` is below 2 or above ``most``, or no document is as long; a document is too short to read;
            ``most`` is below 2.
    """
    documents = list(documents)
    if most is not None and most < 2:
        raise ValueError("max_length leaves the text no room in the model's window: take a shorter one")
    if short := [len(ids) for ids in documents if len(ids) < 2]:
        raise ValueError(f"the document must have at least 2 tokens, got {short[0]}")
    longest = max(map(len, documents))
    if size is not None and size < 2:
        raise ValueError(f"chunk_tokens must be at least 2, got {size}")
    if size is not None and size > longest:
        raise ValueError(f"chunk_tokens={size}: the document has {longest} tokens; take fewer, or leave it out")
    if size is not None and most is not None and size > most:
        raise ValueError(f"chunk_tokens={size}: the model's window leaves room for {most} tokens; take at most as many")
    found = []
    for ids in documents:
        count = -(-len(ids) // (size or most or len(ids)))
        found += [list(ids[i * len(ids) // count : (i + 1) * len(ids) // count]) for i in range(count)]
    return found


def _lesson(rows_of: Sequence[Sequence[Row]], texts: Sequence[Sequence[int]]) -> Lesson:
    """The rows behind each of ``texts``."""
    contexts = [number for number, rows in enumerate(rows_of) for _ in rows]
    return Lesson([row for rows in rows_of for row in rows], contexts, texts)


def pieces(ids: Sequence[int], length: int) -> list[Row]:
    """Rows of ``length`` tokens, one after the other. A last piece of a single token is left out.

    They have no labels: with them the model would compute a loss of its own.
    """
    found = [list(ids[i : i + length]) for i in range(0, len(ids), length)]
    return [{"input_ids": piece} for piece in found if len(piece) > 1]


def divergence(student: Any, target: Target, batch: Batch) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher in nats, averaged over tokens.

    The teacher's top k tokens are compared one by one and the rest of the vocabulary as a whole. This is a lower bound.
    It needs k numbers per token from the teacher instead of V, and is 0 if both agree on the k tokens.
    """
    at = batch["attention_mask"].bool()

    def score(logits: Tensor, some: slice) -> Tensor:
        return _divergence(logits, target.ids[some], target.log_probs[some])

    inputs = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "attention_mask")}
    return sum_over(student, inputs, at, score) / at.sum()


def _divergence(logits: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    """The sum of it over the tokens whose logits (N, V) these are."""
    log_q = logits.gather(-1, ids).float() - logits.float().logsumexp(-1, keepdim=True)
    smallest = torch.finfo(torch.float32).eps  # both remainders are 1 minus a rounded sum
    rest_p = (1 - log_p.exp().sum(-1)).clamp(min=smallest)
    rest_q = (1 - log_q.exp().sum(-1)).clamp(min=smallest)
    return ((log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())).sum()


@torch.no_grad()
def mean_divergence(model: PrefixModel, teacher: Callable[[Batch], Target], batches: Sequence[Batch]) -> float:
    """Average ``divergence`` from what ``teacher`` predicts, over the tokens of all batches: there is at least one."""
    device = next(model.parameters()).device
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch, counts in share(batches):
            given = {name: tensor.to(device) for name, tensor in batch.items()}
            count = int(given["attention_mask"].sum())
            loss = float(divergence(model, teacher(given), given))
            if counts:
                total, tokens = total + loss * count, tokens + count
    total, tokens = sums(total, tokens, device=device)
    return total / tokens
