"""PrefixAttention by itself: without a prefix the original bit for bit, with one the concatenation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import prefix_attn.nn
from prefix_attn import PrefixAttention, prefix_attention
from tests.multihead import (
    CAUSAL,
    HOLES,
    LAYOUTS,
    MASKS,
    MODULES,
    PADDING,
    SQUARE,
    B,
    Concatenated,
    D,
    E,
    H,
    P,
    S,
    T,
    check_concatenation,
    fits,
    module,
    tensors,
)
from tests.numerics import DRAWS, close

masks = pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
layouts = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@layouts
@masks
def test_no_prefix_is_the_original(masks: dict[str, Any], layout: str) -> None:
    """Bit for bit: output, weights and what dropout drops; in torch's fast path too, which eval without grad takes."""
    for dtype, options in ((torch.bfloat16, {}), *((torch.float32, options) for options in MODULES.values())):
        mha = module(layout, dtype=dtype, dropout=0.3, **options)
        # Trainable as the original: torch rounds a product with a frozen weight otherwise, the original's too.
        ours = PrefixAttention.from_multihead(mha, 0).requires_grad_()
        for together, training, need_weights in product(fits(masks, mha), (True, False), (True, False)):
            call = tensors(layout, masks, mha, together=together) | {"need_weights": need_weights}
            results = []
            for one in (mha.train(training), ours.train(training)):
                torch.manual_seed(3)
                with torch.set_grad_enabled(training):
                    results.append(one(**call, average_attn_weights=together))
            (out, weights), (again, weights_again) = results
            assert torch.equal(again, out)
            assert out.isfinite().all()
            assert (weights is None) is (weights_again is None) is (not need_weights)
            assert weights is None or torch.equal(weights_again, weights)


def calls(layout: str, masks: dict[str, Any], dtype: torch.dtype, **options: Any) -> list[Any]:
    """(module, arguments) of every kind of module that fits the masks."""
    made = []
    for kind in MODULES.values():
        mha = module(layout, dtype=dtype, **kind)
        attn = PrefixAttention.from_multihead(mha, P).requires_grad_()
        made += [(attn, tensors(layout, masks, mha, together=one) | options) for one in fits(masks, mha)]
    return made


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@layouts
@masks
def test_prefix_is_the_concatenation(masks: dict[str, Any], layout: str, need_weights: bool) -> None:
    check_concatenation(calls(layout, masks, torch.float32, need_weights=need_weights, average_attn_weights=False))


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@layouts
def test_prefix_is_the_concatenation_in_bfloat16(layout: str, need_weights: bool) -> None:
    """All masks as one."""
    options = {"need_weights": need_weights, "average_attn_weights": False}
    check_concatenation([c for masks in MASKS.values() for c in calls(layout, masks, torch.bfloat16, **options)])


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_a_query_whose_keys_are_masked_sees_the_prefix_alone(name: str, need_weights: bool) -> None:
    attn = PrefixAttention.from_multihead(module(), P).requires_grad_()
    hidden = PADDING.clone() if name == "key_padding_mask" else HOLES.clone()
    hidden[1:3] = True
    call = tensors("batch first", {name: hidden}, attn, together=False)
    check_concatenation([(attn, call | {"need_weights": need_weights})])
    out, _ = attn(**call, need_weights=need_weights)
    query = F.linear(call["query"][1], *(t[:E] for t in (attn.in_proj_weight, attn.in_proj_bias)))
    scores = torch.einsum("shd,hpd->hsp", query.view(-1, H, D), attn.prefix_key) * D**-0.5
    alone = attn.out_proj((scores.softmax(-1) @ attn.prefix_value).transpose(0, 1).flatten(1))
    rows = alone if name == "key_padding_mask" else alone[:, :0]  # a 3-D mask hides one head of two
    torch.testing.assert_close(out[1][:, : rows.shape[1]], rows)


def test_weights_are_those_of_prefix_then_sequence() -> None:
    """(B, S, P + T), rows sum to 1; the last columns are the original's, extra keys at the end, but for a factor."""
    for extra, options in ((0, {}), (2, MODULES["extra keys"])):
        mha = module(**options)
        call = tensors("batch first", {"key_padding_mask": PADDING}, mha, together=False)
        attn = PrefixAttention.from_multihead(mha, P)
        weights = attn(**call)[1]
        assert weights.shape == (B, S, P + T + extra)
        torch.testing.assert_close(weights.sum(-1), torch.ones(B, S))
        heads = attn(**call, average_attn_weights=False)[1]
        assert heads.shape == (B, H, S, P + T + extra)
        torch.testing.assert_close(heads.mean(1), weights)
        original = mha(**call, average_attn_weights=False)[1]
        rest = heads[..., P:]
        torch.testing.assert_close(rest / rest.sum(-1, keepdim=True), original)
        assert attn(*(call[n][0] for n in ("query", "key", "value")))[1].shape == (S, P + T + extra)


def test_float_attn_mask_has_a_gradient() -> None:
    """A learned bias, as models with relative positions hand in."""
    attn = PrefixAttention.from_multihead(module(), P)
    call = tensors("batch first", {"attn_mask": torch.randn(S, T)}, attn, together=False)
    grads = []
    for one in (attn, Concatenated(attn)):
        bias = call["attn_mask"].clone().requires_grad_()
        out, _ = one(**call | {"attn_mask": bias}, need_weights=False)
        grads += torch.autograd.grad(out.square().sum(), bias)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_dropout_drops_prefix_and_sequence_in_training_alone(need_weights: bool) -> None:
    """With every value the same the output is the sum of what was kept: its mean is 1, its spread the weights'."""
    attn = PrefixAttention(E, H, P, dropout=0.4, batch_first=True)
    with torch.no_grad():
        attn.in_proj_weight.zero_()  # every weight is 1 / (P + T)
        attn.in_proj_bias[2 * E :] = 1.0
        attn.prefix_key.zero_()
        attn.prefix_value.fill_(1.0)
        attn.out_proj.weight.copy_(torch.eye(E))
    tokens = torch.randn(500, T, E)
    with torch.no_grad():
        dropped, weights = attn(tokens, tokens, tokens, need_weights=need_weights, average_attn_weights=False)
        kept, _ = attn.eval()(tokens, tokens, tokens, need_weights=need_weights)
    torch.testing.assert_close(kept, torch.ones_like(kept))
    sums = dropped[..., ::D]
    close(sums.mean().item(), 1.0, DRAWS)
    close(sums.std().item(), (0.4 / 0.6 / (P + T)) ** 0.5, DRAWS)
    if weights is not None:
        torch.testing.assert_close(weights.sum(-1).transpose(1, 2), sums)
        for part in (weights[..., :P], weights[..., P:]):
            close((part == 0).float().mean().item(), 0.4, DRAWS)


# masks: is_causal, whether there is a key_mask, the rows of the bias; as the operator is given them.
OPERATOR = {
    "none": (False, False, None),
    "bool padding": (False, True, None),
    "float padding": (False, True, None),
    "finite padding": (False, False, B),
    "bool 2-D": (False, False, 1),
    "float 3-D": (False, False, B),
    "causal": (True, False, None),
    "float causal": (True, False, None),
    "causal S<T": (False, False, 1),
    "causal without hint": (False, False, 1),
    "bool both": (False, True, B),
    "causal and padding": (True, True, None),
    "causal and float padding": (True, True, None),
    "bool and float": (False, True, 1),
}


@pytest.mark.parametrize("name", OPERATOR)
def test_the_operator_runs_with_the_smallest_mask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The prefix as it is; causality and padding as flags where they are just that."""
    calls = []

    def record(*args: Tensor, **options: Any) -> Any:
        calls.append((args, options))
        return prefix_attention(*args, **options)

    monkeypatch.setattr(prefix_attn.nn, "prefix_attention", record)
    attn = PrefixAttention.from_multihead(module(), P)
    attn(**tensors("batch first", MASKS[name], attn, together=False), need_weights=False)
    ((args, options),) = calls
    assert args[3] is attn.prefix_key
    assert args[4] is attn.prefix_value
    bias = options["bias"]
    rows = None if bias is None else bias.shape[0]
    assert (options["is_causal"], options["key_mask"] is not None, rows) == OPERATOR[name]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an op returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        # An expanded view holds nothing: count what the memory behind it holds.
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in made]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_the_prefix_is_never_expanded_to_the_batch(need_weights: bool) -> None:
    """Forward and backward hold nothing of B * P * E; with weights, those: B * H * S * P."""
    batch, length = 64, 512
    attn = PrefixAttention.from_multihead(module(add_bias_kv=True), length)
    tokens = torch.randn(batch, 2, E)
    with Largest() as largest:
        out, _ = attn(tokens, tokens, tokens, need_weights=need_weights)
        out.sum().backward()
    assert largest.elements < batch * length * E / 2
    assert largest.elements >= length * E


@pytest.mark.parametrize("options", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_from_multihead_copies_and_freezes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    mha = module("sequence first", dtype=dtype, dropout=0.1, **options).eval()
    attn = PrefixAttention.from_multihead(mha, P)
    ours, theirs = attn.state_dict(), mha.state_dict()
    assert set(ours) - set(theirs) == {"prefix_key", "prefix_value"}
    assert all(torch.equal(ours[n], t) and ours[n].data_ptr() != t.data_ptr() for n, t in theirs.items())
    assert {n for n, p in attn.named_parameters() if p.requires_grad} == {"prefix_key", "prefix_value"}
    assert all(p.requires_grad for p in mha.parameters())
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert {(p.shape, p.dtype) for p in (attn.prefix_key, attn.prefix_value)} == {((H, P, D), exact)}
    assert (attn.training, attn.dropout, attn.batch_first, attn.prefix_length) == (False, 0.1, False, P)


def test_state_dict_of_the_original_loads() -> None:
    mha, attn = module(), PrefixAttention(E, H, P, batch_first=True)
    assert all(p.requires_grad for p in attn.parameters())
    missing, unexpected = attn.load_state_dict(mha.state_dict(), strict=False)
    assert (sorted(missing), unexpected) == (["prefix_key", "prefix_value"], [])
    missing, unexpected = mha.load_state_dict(attn.state_dict(), strict=False)
    assert (missing, sorted(unexpected)) == ([], ["prefix_key", "prefix_value"])


@pytest.mark.parametrize("options", [{}, MODULES["sizes"]], ids=["", "sizes"])
def test_the_prefix_starts_as_keys_and_values_of_normal_inputs(options: dict[str, Any]) -> None:
    """Those of the projections that were copied, biases too: their mean and covariance are the keys' and values'."""
    mha = module(**options)
    attn = PrefixAttention.from_multihead(mha, 40_000)
    weights = (mha.k_proj_weight, mha.v_proj_weight) if options else mha.in_proj_weight.chunk(3)[1:]
    for prefix, weight, bias in zip((attn.prefix_key, attn.prefix_value), weights, mha.in_proj_bias.chunk(3)[1:]):
        rows = prefix.detach().transpose(0, 1).flatten(1)
        close(rows.mean(0), bias.detach(), DRAWS)
        close(rows.T.cov(), (weight @ weight.T).detach(), DRAWS)


def test_same_seed_same_projections_and_prefix() -> None:
    """Without a prefix the constructor draws what the original's draws."""
    made = []
    for make in (
        nn.MultiheadAttention,
        lambda *sizes: PrefixAttention(*sizes, 0),
        lambda *sizes: PrefixAttention(*sizes, P),
    ):
        torch.manual_seed(5)
        made.append((make(E, H).in_proj_weight, torch.rand(())))
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][0], made[2][0])
    assert made[0][1] == made[1][1]


x = torch.randn(B, S, E)
keys = torch.randn(B, T, E)


def nested(**options: Any) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)], **options)


ERRORS: dict[str, tuple[Callable[[PrefixAttention], Any], type[Exception], str]] = {
    "prefix_length type": (lambda _: PrefixAttention(E, H, 0.1), TypeError, "prefix_length must be an int, got float"),
    "prefix_length range": (
        lambda _: PrefixAttention(E, H, -1),
        ValueError,
        "prefix_length must be at least 0, got -1",
    ),
    "not a module": (lambda _: PrefixAttention.from_multihead(3, P), TypeError, "mha must be .*, got int"),
    "twice": (lambda a: PrefixAttention.from_multihead(a, P), TypeError, "mha must be .*, got PrefixAttention"),
    "query": (
        lambda a: a(x[..., :4], keys, keys),
        ValueError,
        r"query must be \(B, S, E\) = \(\*, \*, 16\), got \(3, 9, 4",
    ),
    "query dim": (lambda a: a(x[None], keys, keys), ValueError, r"query must be \(B, S, E\)"),
    "key batch": (
        lambda a: a(x, keys[:2], keys),
        ValueError,
        r"key must be \(B, T, Ek\) = \(3, \*, 16\), got \(2, 11, 16\)",
    ),
    "value length": (
        lambda a: a(x, keys, keys[:, 1:]),
        ValueError,
        r"value must be .* = \(3, 11, 16\), got \(3, 10, 16\)",
    ),
    "one sample": (lambda a: a(x[0], keys, keys), ValueError, r"key must be \(T, Ek\) = \(\*, 16\), got \(3, 11, 16\)"),
    "padding shape": (
        lambda a: a(x, keys, keys, PADDING[:, 1:]),
        ValueError,
        r"key_padding_mask must be \(B, T\) = \(3, 11\), got \(3, 10\)",
    ),
    "padding of one sample": (
        lambda a: a(x[0], keys[0], keys[0], PADDING[:1]),
        ValueError,
        r"key_padding_mask must be \(T\) = \(11\), got \(1, 11\)",
    ),
    "padding dtype": (
        lambda a: a(x, keys, keys, PADDING.long()),
        TypeError,
        "key_padding_mask must be bool or floating, got torch.int64",
    ),
    "mask shape": (
        lambda a: a(x, keys, keys, attn_mask=SQUARE),
        ValueError,
        r"attn_mask must be \(S, T\) = \(9, 11\), got \(11, 11\)",
    ),
    "mask heads": (
        lambda a: a(x, keys, keys, attn_mask=HOLES[:B]),
        ValueError,
        r"attn_mask must be \(B\*H, S, T\) = \(6, 9, 11\), got \(3, 9, 11\)",
    ),
    "mask dtype": (
        lambda a: a(x, keys, keys, attn_mask=CAUSAL.byte()),
        TypeError,
        "attn_mask must be bool or floating, got torch.uint8",
    ),
    "hint without mask": (lambda a: a(x, x, x, is_causal=True), ValueError, "is_causal is a hint about attn_mask"),
    "hint without mask, weights": (
        lambda a: a(x, x, x, need_weights=True, is_causal=True),
        ValueError,
        "is_causal is a hint about attn_mask",
    ),
    "nested weights": (lambda a: a(*[nested()] * 3), NotImplementedError, "nested tensors must be those of"),
    "nested keys": (
        lambda a: a(nested(), nested(), nested(), need_weights=False),
        NotImplementedError,
        "query, key and value the same tensor",
    ),
    "jagged": (
        lambda a: a(*[nested(layout=torch.jagged)] * 3, need_weights=False),
        NotImplementedError,
        "nested tensors must be those of nn.TransformerEncoder: strided",
    ),
    "nested, sequence first": (
        lambda _: PrefixAttention(E, H, P)(*[nested()] * 3, need_weights=False),
        NotImplementedError,
        "nested tensors must be those of nn.TransformerEncoder: strided, batch_first",
    ),
    "head size": (
        lambda _: PrefixAttention(257, 1, P)(*[torch.randn(2, 257)] * 3, need_weights=False),
        ValueError,
        "head size D must lie in 1..256, got 257",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("name", ERRORS)
def test_refusals(name: str) -> None:
    call, error, message = ERRORS[name]
    attn = PrefixAttention(E, H, P, batch_first=True)
    with pytest.raises(error, match=message):
        call(attn)
