"""What works with models of images and text: the checks of a table of docs/models.md, and of test_vision.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from tests.hf.models import CACHE
from tests.hf.vision_models import CONFIGS, IMAGE, WIDE, WIDTH, batch, row, tiny
from tests.numerics import GRADIENT, MODEL, close, close_in_norm

FRONT = torch.tensor([7, 11, 13, 17])  # a text whose keys and values, or embeddings, are the prefix
P = len(FRONT)
QUIET = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": 4, "max_new_tokens": 4, "suppress_tokens": [IMAGE]}


def rows(name: str, *images: bool) -> list[Tensor]:
    """Rows of different lengths, each with or without an image."""
    return [row(name, length, image=image) for length, image in zip((5, 8, 3), images)]


def inputs(name: str, texts: Sequence[Tensor], left: Sequence[int] | None = None) -> dict[str, Tensor]:
    """``batch`` without labels."""
    return {n: t for n, t in batch(name, texts, left).items() if n != "labels"}


def with_text(name: str, **changes: Any) -> PrefixModel:
    """A model whose prefix is a text: its keys and values in every layer."""
    config = PrefixConfig(num_virtual_tokens=P, init="text", init_token_ids=FRONT.tolist())
    return get_prefix_model(tiny(name, **changes), config).eval()


def with_embeddings(name: str) -> PrefixTuning:
    """A model whose virtual tokens are a text."""
    base = tiny(name)
    model = PrefixTuning(base, P, WIDTH).eval()
    model.prefix.data = base.get_input_embeddings()(FRONT).detach().clone()
    return model


def in_front(name: str, text: Tensor) -> dict[str, Tensor]:
    """The inputs of the bare model for a row with FRONT before it."""
    given = inputs(name, [torch.cat([FRONT, text])])
    if name == "paligemma":
        types = inputs(name, [text])["token_type_ids"]
        given["token_type_ids"] = torch.cat([types.new_zeros(1, P), types], dim=1)
    return given


def padding(name: str, model: PrefixModel | None = None) -> None:
    """Rows that are padded on the left, on the right and on both sides are those alone: logits, loss and gradient."""
    model = with_text(name) if model is None else model
    leaf = model.prefixes["default"].embedding
    for images in ((True, True, True), (False, False, False), (True, False, True)):
        texts = rows(name, *images)
        room = max(map(len, texts)) + 2
        left = [room - len(texts[0]), 0, (room - len(texts[2])) // 2]
        given = batch(name, texts, left, room)
        out, alone = model(**given), [model(**batch(name, [text])) for text in texts]
        for i, (start, text) in enumerate(zip(left, texts)):
            close(out.logits[i, start : start + len(text)], alone[i].logits[0], MODEL)
        targets = [(batch(name, [text])["labels"] != -100).sum() for text in texts]
        expected = sum(one.loss * count for one, count in zip(alone, targets)) / sum(targets)
        torch.testing.assert_close(out.loss, expected)
        close_in_norm(*(torch.autograd.grad(loss, leaf)[0] for loss in (out.loss, expected)), GRADIENT)


def text_in_front(name: str) -> None:
    """A prefix of a text's keys and values is the text in front of each row: logits, and greedy tokens."""
    model, bare, texts = (
        with_text(name, **WIDE.get(name, {})),
        tiny(name, **WIDE.get(name, {})),
        rows(name, True, False, True),
    )
    given = inputs(name, texts)
    logits, made = model(**given).logits, model.generate(**given, **QUIET)
    for i, text in enumerate(texts):
        before = in_front(name, text)
        if name == "paligemma":  # nothing may see what comes later, as the keys of a prefix do not
            before["token_type_ids"].fill_(1)
            got = model(**inputs(name, [text]) | {"token_type_ids": torch.ones(1, len(text))}).logits[0]
        else:
            got = logits[i, -len(text) :]
        close(got, bare(**before).logits[0, P:], MODEL)
        if name != "paligemma":
            assert torch.equal(made[i, -4:], bare.generate(**before, **QUIET)[0, -4:])


def virtual_tokens(name: str) -> None:
    """PrefixTuning with a text's embeddings: logits, and greedy tokens."""
    model, bare, texts = with_embeddings(name), tiny(name), rows(name, True, False, True)
    given = inputs(name, texts)
    logits, made = model(**given).logits, model.generate(**given, **QUIET)
    assert logits.shape[1] == given["input_ids"].shape[1]
    for i, text in enumerate(texts):
        before = in_front(name, text)
        close(logits[i, -len(text) :], bare(**before).logits[0, P:], MODEL)
        assert torch.equal(made[i, -4:], bare.generate(**before, **QUIET)[0, -4:])


def same_tokens(name: str, *, beams: int = 1, **options: Any) -> None:
    """Whatever the way of generating."""
    model = with_text(name)
    given = inputs(name, rows(name, True, True)) | QUIET | {"num_beams": beams}
    assert torch.equal(model.generate(**given, **options), model.generate(**given))


def two_turns(name: str) -> None:
    """The second goes on from the cache of the first, whose rows have padding."""
    model = with_text(name)
    texts, more = rows(name, True, False, True), torch.randint(5, 80, (3, 4))
    first, cache = inputs(name, texts), DynamicCache(config=model.config.get_text_config())
    model(**first, **{CACHE: cache}, use_cache=True)
    mask = torch.cat([first["attention_mask"], torch.ones_like(more)], dim=1)
    logits = model(input_ids=more, attention_mask=mask, **{CACHE: cache}).logits
    for i, text in enumerate(texts):
        whole = inputs(name, [torch.cat([text, more[i]])])
        if name == "paligemma":  # an answer is causal, a prompt is not
            types = inputs(name, [text])["token_type_ids"]
            whole["token_type_ids"] = torch.cat([types, types.new_ones(1, 4)], dim=1)
        close(logits[i], model(**whole).logits[0, -4:], MODEL)


def several_prefixes(name: str) -> None:
    """Rows of one batch with prefixes of different lengths, and with none."""
    model, texts, names = with_text(name), rows(name, True, False, True), ["longer", None, "default"]
    model.add_prefix("longer", PrefixConfig(num_virtual_tokens=P + 2))
    given = inputs(name, texts) | {"prefix_names": names}
    logits, made = model(**given).logits, model.generate(**given, **QUIET)
    for i, text in enumerate(texts):
        alone = inputs(name, [text]) | {"prefix_names": names[i : i + 1]}
        close(logits[i, -len(text) :], model(**alone).logits[0], MODEL)
        assert torch.equal(made[i, -4:], model.generate(**alone, **QUIET)[0, -4:])


def embedding_mode(name: str) -> None:
    """Trained embeddings of a text give its keys and values, also after a batch with images."""
    model, given = (
        get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, mode="embedding")).eval(),
        with_text(name),
    )
    encoder, texts = model.prefixes["default"], batch(name, rows(name, True, True))
    encoder.embedding.data = model.base_model.get_input_embeddings()(FRONT).detach().clone()
    for _ in range(2):
        out, expected = model(**texts), given(**texts)
        close(out.logits, expected.logits, MODEL)
    (grad,) = torch.autograd.grad(out.loss, encoder.embedding)
    assert (grad.norm(dim=-1) > 0).all()


def infix(name: str) -> None:
    """Seen from the last token of the prompt on, whatever the padding."""
    model = get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P, mode="infix")).eval()
    texts = rows(name, True, False, True)
    logits = model(**inputs(name, texts), infix_start=torch.full((3,), max(map(len, texts)) - 2)).logits
    for i, text in enumerate(texts):
        alone = model(**inputs(name, [text]), infix_start=torch.tensor([len(text) - 2])).logits
        close(logits[i, -len(text) :], alone[0], MODEL)


def checkpointing(name: str) -> None:
    """Both kinds."""
    model, given = with_text(name).train(), batch(name, rows(name, True, False, True))
    leaf = model.prefixes["default"].embedding

    def grad() -> Tensor:
        leaf.grad = None
        model(**given, use_cache=False).loss.backward()
        assert leaf.grad is not None
        return leaf.grad.clone()

    expected = grad()
    for use_reentrant in (False, True):
        set_checkpointing(model, use_reentrant=use_reentrant)
        close_in_norm(grad(), expected, GRADIENT)


CHECKS: dict[str, Callable[[str], None]] = {
    "padding": padding,
    "text in front": text_in_front,
    "PrefixTuning": virtual_tokens,
    "mode embedding": embedding_mode,
    "infix": infix,
    "several prefixes": several_prefixes,
    "checkpointing": checkpointing,
    "no cache": partial(same_tokens, use_cache=False),
    "static cache": partial(same_tokens, cache_implementation="static", disable_compile=True),
    "beam search": partial(same_tokens, beams=2, use_cache=False),
    "two turns": two_turns,
}
INTRODUCTION = "With and without images. What reads the images keeps its own attention."


def table() -> list[str]:
    """The lines of the page."""
    titles = ["architecture", *CHECKS]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in sorted(CONFIGS):
        for check in CHECKS.values():
            check(name)
        lines += [f"| {' | '.join([name, *['yes'] * len(CHECKS)])} |"]
    return lines
