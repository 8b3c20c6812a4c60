"""Different prefixes in one batch: every row is as if alone, whatever is run, trained or swapped meanwhile."""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import PrefixConfig, PrefixModel
from prefix_attn.hf import model as model_module
from prefix_attn.hf.attach import running
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from tests.hf import test_gradients  # noqa: F401  registers the attention "concatenating"
from tests.hf.models import CACHE, VOCABULARY, tiny, tokens
from tests.numerics import GRADIENT, LONG, MODEL, close, close_in_norm

CONFIGS = {
    "long": {"num_virtual_tokens": 7},
    "short": {"num_virtual_tokens": 2},
    "still": {"num_virtual_tokens": 4, "position_mode": "none"},
}
ROWS = ["long", "short", None, "still", "long"]
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}


def prefixed(name: str = "llama", layers: int = 3, **options: Any) -> PrefixModel:
    model = PrefixModel(tiny(name, num_hidden_layers=layers))
    for prefix, config in CONFIGS.items():
        model.add_prefix(prefix, PrefixConfig(**config | options))
    return model.eval()


def only(model: PrefixModel, name: str | None) -> AbstractContextManager[None]:
    """The model with one prefix for all rows, or none."""
    if name is None:
        return model.disable_prefix()
    model.set_prefix(name)
    return nullcontext()


def left_padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids of which row r begins with r padding tokens, and their mask."""
    mask = (torch.arange(length) >= torch.arange(batch)[:, None]).long()
    return tokens(batch, length) * mask, mask


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
def test_every_row_is_as_if_alone(name: str) -> None:
    """Prompts of different lengths, padded; logits, and tokens of every way of caching and searching."""
    model = prefixed(name)
    ids, mask = left_padded(len(ROWS), 9)
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "static cache": {"cache_implementation": "static", "disable_compile": True},
        "no cache": {"use_cache": False},
        "beams": {"num_beams": 3, "num_return_sequences": 2},
    }
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, prefix_names=ROWS).logits
    made = {
        way: model.generate(ids, attention_mask=mask, prefix_names=ROWS, **QUIET, **options)
        for way, options in ways.items()
    }
    for row, prefix in enumerate(ROWS):
        prompt = ids[row : row + 1, row:]
        with only(model, prefix), torch.no_grad():
            close(logits[row, row:], model(prompt).logits[0], MODEL)
            for way, options in ways.items():
                expected = model.generate(prompt, **QUIET, **options)
                count = len(expected)
                assert torch.equal(made[way][row * count : (row + 1) * count, row:], expected), (way, row)


def test_sampled_sequences_have_the_prefix_of_their_row() -> None:
    model, ids = prefixed(), tokens(3, 5)
    sampling = QUIET | {"do_sample": True, "num_return_sequences": 2}
    sampling |= {"output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids, prefix_names=["short", None, "still"], **sampling)
    assert len(set(map(tuple, out.sequences.tolist()))) == 6
    for row, sequence in enumerate(out.sequences):
        with only(model, ["short", None, "still"][row // 2]), torch.no_grad():
            expected = model(sequence[None]).logits[0, 4:-1]
        close(torch.stack([step[row] for step in out.logits]), expected, MODEL)


@pytest.mark.parametrize("assistant", ["another model", "the prompt"])
def test_assisted_decoding(assistant: str) -> None:
    """Several tokens at a time are checked against the cache: the same tokens as one by one."""
    model, ids = prefixed(), tokens(1, 9).repeat(1, 2)
    options = (
        {"assistant_model": tiny("llama", seed=1)} if assistant == "another model" else {"prompt_lookup_num_tokens": 2}
    )
    for name in ("long", "still"):
        got = model.generate(ids, prefix_names=[name], **options, **QUIET)
        with only(model, name):
            assert torch.equal(got, model.generate(ids, **QUIET))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_turns_that_share_a_cache(name: str) -> None:
    """The cache holds the sequences alone, so each turn names the prefixes again."""
    model, ids = prefixed(name), tokens(len(ROWS), 12)
    with torch.no_grad():
        expected = model(ids, prefix_names=ROWS).logits
        first = model(ids[:, :8], prefix_names=ROWS, use_cache=True)
        second = model(ids[:, 8:], prefix_names=ROWS, **{CACHE: first[CACHE]})
    close(torch.cat([first.logits, second.logits], dim=1), expected, MODEL)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mistral"])
def test_gradients_against_concatenation(name: str) -> None:
    """Each prefix gets the gradient of its own rows, of every layer; the reference is independent, row by row."""
    model, ids = prefixed(name), tokens(len(ROWS), 11)
    encoders = model.prefixes
    leaves = [encoder.embedding for encoder in encoders.values()]
    weight = torch.randn(len(ROWS), 11, VOCABULARY)
    logits = model(ids, prefix_names=ROWS).logits
    grads = torch.autograd.grad((logits * weight).sum(), leaves)

    model.base_model.set_attn_implementation("concatenating")
    expected = []
    for row, prefix in zip(ids, ROWS):
        kv = encoders["long"]()[:, :, :0] if prefix is None else encoders[prefix]()
        positions = torch.arange(11)[None] + (0 if prefix is None else model.prefix_configs[prefix].shift)
        options = {"position_ids": positions, "concatenated_prefix": list(zip(kv[::2], kv[1::2])), "use_cache": False}
        with model.disable_prefix():
            expected.append(model(row[None], **options).logits)
    reference = torch.cat(expected)
    close(logits, reference, MODEL)
    for prefix, got, wanted in zip(CONFIGS, grads, torch.autograd.grad((reference * weight).sum(), leaves)):
        per_layer = (len(wanted), 6, -1)
        close_in_norm(got.view(per_layer), wanted.view(per_layer), MODEL, dim=(0, 2), name=prefix)


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
@pytest.mark.parametrize("checkpointing", [None, "new", "reentrant"])
def test_training(checkpointing: str | None, projection: bool) -> None:
    """A prefix learns from its own rows alone, also where layers run again in backward; who has no row, nothing."""
    model = prefixed(prefix_projection=projection, encoder_hidden_size=8).train()
    names, ids = ["short", "long", None, "short"], tokens(4, 9)
    weight = torch.randn(4, 9, VOCABULARY)

    def grads(rows: list[int], **named: Any) -> dict[str, Tensor | None]:
        model.zero_grad()
        (model(ids[rows], use_cache=False, **named).logits * weight[rows]).sum().backward()
        return {name: parameter.grad for name, parameter in model.prefixes.named_parameters()}

    expected = {}
    for prefix in ("short", "long"):
        model.set_prefix(prefix)
        own = grads([row for row, name in enumerate(names) if name == prefix])
        expected |= {name: grad for name, grad in own.items() if name.startswith(prefix)}
    if checkpointing is not None:
        set_checkpointing(model, use_reentrant=checkpointing == "reentrant")
    for _ in range(2):
        for name, grad in grads([0, 1, 2, 3], prefix_names=names).items():
            if name.startswith("still"):
                assert grad is None
            else:
                assert expected[name].abs().max() > 0
                close(grad, expected[name], LONG)


def test_frozen_and_trainable_prefixes_share_a_batch() -> None:
    model, ids = prefixed().train(), tokens(2, 9)
    model.prefixes["long"].requires_grad_(False)
    model(ids, labels=ids, prefix_names=["long", "short"]).loss.backward()
    assert model.prefixes["long"].embedding.grad is None
    assert model.prefixes["short"].embedding.grad.abs().max() > 0


def test_half_precision_base_with_float32_prefixes() -> None:
    ids, losses = tokens(len(ROWS), 9), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = prefixed()
        model.base_model.to(dtype)
        losses.append(model(ids, labels=ids, prefix_names=ROWS).loss)
    losses[1].backward()
    grads = [parameter.grad for parameter in model.prefixes.parameters()]
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)
    assert abs(losses[0].item() - losses[1].item()) < 0.1


def test_compiled() -> None:
    """One graph, other sizes included; losses and gradients as in eager execution."""
    torch._dynamo.reset()
    model = prefixed(layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    parameters = list(model.prefixes.parameters())
    for length in (9, 13):
        ids = tokens(len(ROWS), length)
        losses = [m(ids, labels=ids, prefix_names=ROWS, use_cache=False).loss for m in (compiled, model)]
        torch.testing.assert_close(*losses)
        close(*(torch.autograd.grad(loss, parameters) for loss in losses), GRADIENT)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_row_depends_on_who_shares_the_batch(name: str) -> None:
    """Li and Liang 2021, section 8: prefixes of users batched together. To the bit.

    With the batch's size the matrix products of the model itself round differently, so the size stays. Where attention
    is one too (a window's mask goes to the backend composed), rows agree to rounding: test_every_row_is_as_if_alone.
    """
    model = prefixed(name, backend="cpu")
    ids, _ = left_padded(len(ROWS), 9)
    for mine in (*CONFIGS, None):
        seen = []
        for others in (["short"] * 4, ["long", None, "still", "long"], [None] * 4, ["still", "short", "short", None]):
            ids = torch.cat([ids[:1], torch.randint_like(ids[1:], 1, VOCABULARY)])
            mask = torch.ones_like(ids)
            mask[1:, : len(seen)] = 0
            out = model.generate(
                ids,
                attention_mask=mask,
                prefix_names=[mine, *others],
                output_logits=True,
                return_dict_in_generate=True,
                **QUIET,
            )
            seen.append(torch.stack([step[0] for step in out.logits]))
        assert all(torch.equal(logits, seen[0]) for logits in seen[1:])


def test_equal_names_are_one_shared_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bank is made for one prefix, nor for none."""
    monkeypatch.setattr(model_module, "make_bank", None)
    model, ids = prefixed(), tokens(3, 9)
    for name in ("short", None):
        with only(model, name):
            expected = model(ids).logits
        model.set_prefix("long")
        assert torch.equal(model(ids, prefix_names=[name] * 3).logits, expected)
        assert torch.equal(model(ids, adapter_names=[name or "__base__"] * 3).logits, expected)


class Meeting:
    """A streamer: generates that are given the same one make each step together."""

    def __init__(self, threads: int, between_steps: Callable[[], None]) -> None:
        self.barrier = Barrier(threads, between_steps, timeout=60)

    def put(self, _: Tensor) -> None:
        self.barrier.wait()

    def end(self) -> None:
        pass


def test_threads_and_hot_swaps() -> None:
    """Three generates take turns, step by step, on one model, whose prefixes come and go between the steps."""
    model, ids, disabled = prefixed(), tokens(2, 9), ExitStack()
    calls: list[dict[str, Any]] = [{"prefix_names": ["long", "still"]}, {"prefix_names": [None, "short"]}, {}]
    model.set_prefix("still")
    expected = [model.generate(ids, **call, **QUIET) for call in calls]
    changes: list[Callable[[], Any]] = [
        lambda: model.set_prefix("long"),
        lambda: model.add_prefix("new", PrefixConfig(num_virtual_tokens=3)),
        lambda: model.delete_prefix("long"),
        lambda: model.delete_prefix("still"),
        lambda: model.generate(ids, prefix_names=["new", "short"], **QUIET),
        lambda: disabled.enter_context(model.disable_prefix()),
        lambda: model.delete_prefix("short"),
    ]
    todo = iter(changes)
    meeting = Meeting(len(calls), lambda: next(todo)())
    with disabled, ThreadPoolExecutor(len(calls)) as pool:
        running = [pool.submit(model.generate, ids, streamer=meeting, **call, **QUIET) for call in calls]
        for future, tokens_alone in zip(running, expected):
            assert torch.equal(future.result(), tokens_alone)
    assert next(todo, None) is None
    assert model.prefix_names == ["new"]


def test_a_thousand_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call does, counted in functions called, depends on the prefixes that it names alone."""
    monkeypatch.setattr(
        model_module, "initial_kv", lambda _, config, __: torch.randn(2, 2, config.num_virtual_tokens, 8)
    )
    model, ids = PrefixModel(tiny("llama", num_hidden_layers=1)).eval(), tokens(3, 5)
    made: list[Any] = []

    def add(names: range) -> None:
        for number in names:
            model.add_prefix(str(number), PrefixConfig(num_virtual_tokens=1 + number % 9))
            model.prefixes[str(number)].register_forward_hook(lambda encoder, *_: made.append(encoder))

    def work(**named: Any) -> int:
        count = 0

        def profile(_: Any, event: str, __: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        with torch.no_grad():
            model(ids, **named)
            gc.disable()
            sys.setprofile(profile)
            try:
                model(ids, **named)
            finally:
                sys.setprofile(None)
                gc.enable()
        return count

    add(range(3))
    few = [work(prefix_names=["0", "2", "0"]), work()]
    add(range(3, 1000))
    model.set_prefix("2")
    made.clear()
    assert [work(prefix_names=["0", "2", "0"]), work()] == few
    assert made == [model.prefixes[name] for name in ("0", "2", "0", "2", "2", "2")]


def test_the_bank_holds_what_the_call_names_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, states = prefixed(), []
    real = running.PrefixState

    def state(kv: Tensor, slots: Any, **rest: Any) -> Any:
        states.append((kv, rest["rows"]))
        return real(kv, slots, **rest)

    monkeypatch.setattr(running, "PrefixState", state)
    model.generate(tokens(4, 5), prefix_names=["still", None, "short", "still"], num_beams=2, **QUIET)
    ((kv, rows),) = states
    assert kv.shape == (2, 6, 2, 4, 8)
    assert rows.ids.tolist() == [0, -1, 1, 0]
    assert rows.lengths.tolist() == [4, 2]
    assert rows.shifts.tolist() == [[0], [0], [2], [0]]


def test_a_copy_of_a_model_is_a_model() -> None:
    """What is running in this thread is not part of it."""
    model, ids = prefixed(), tokens(2, 9)
    other = copy.deepcopy(model)
    other.prefixes["long"].embedding.data.mul_(2)
    names = ["long", "short"]
    ours, theirs = (m(ids, prefix_names=names).logits for m in (model, other))
    assert torch.equal(ours[1], theirs[1])
    assert (ours[0] - theirs[0]).abs().max() > 1e-2


ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few": ({"prefix_names": ["long"]}, ValueError, "a name, or None, for each of 2 rows, got 1"),
    "too many": ({"prefix_names": ["long"] * 4}, ValueError, "for each of 2 rows, got 4"),
    "unknown": ({"prefix_names": ["long", "x"]}, ValueError, r"'x'; there are \['long', 'short', 'still', 'eager'\]"),
    "a string": ({"prefix_names": "ab"}, TypeError, "prefix_names must be a list with a name.* got 'ab'"),
    "numbers": ({"adapter_names": [0, 1]}, TypeError, r"got \[0, 1\]"),
    "twice": ({"prefix_names": [None] * 2, "adapter_names": [None] * 2}, ValueError, "give one of them"),
    "backends": (
        {"prefix_names": ["long", "eager"]},
        ValueError,
        "one backend, got {'long': 'auto', 'eager': 'eager'}",
    ),
}


@pytest.mark.parametrize(("names", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(names: dict[str, Any], error: type[Exception], message: str) -> None:
    model, ids = prefixed(), tokens(2, 5)
    model.add_prefix("eager", PrefixConfig(backend="eager"))
    for call in (model.forward, model.generate):
        for prompts in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
            with pytest.raises(error, match=message):
                call(**prompts, **names)
    with pytest.raises(error, match=message):
        model.generate(ids, **names)
