"""PrefixAttention inside torch's own layers and models, whose fused paths know no prefix."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_attn import PrefixAttention
from tests.multihead import CAUSAL, PADDING, SQUARE, B, Concatenated, E, H, P, S, T, additive
from tests.numerics import FLOAT, HALF, close_in_norm

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(E, H, 2 * E, **{"dropout": 0.0, "batch_first": True} | options)


def attach(model: nn.Module, length: int) -> nn.Module:
    """As README says."""
    model.requires_grad_(False)
    for name, one in list(model.named_modules()):
        if isinstance(one, nn.MultiheadAttention):
            model.set_submodule(name, PrefixAttention.from_multihead(one, length))
    return model


def by_concatenation(model: nn.Module) -> nn.Module:
    """The same model, with the same prefixes, on torch's attention; in training mode, whose only path is the plain."""
    peer = copy.deepcopy(model)
    for name, one in list(peer.named_modules()):
        if isinstance(one, PrefixAttention):
            peer.set_submodule(name, Concatenated(one))
    return peer.train()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], dict[str, Any]]] = {
    "encoder": (encoder_layer, ("src",), {}),
    "encoder, gelu, norm first": (lambda: encoder_layer(activation="gelu", norm_first=True), ("src",), {}),
    "encoder, padding": (encoder_layer, ("src",), {"src_key_padding_mask": PADDING}),
    "encoder, causal": (encoder_layer, ("src",), {"src_mask": SQUARE, "is_causal": True}),
    "encoder, sequence first": (lambda: encoder_layer(batch_first=False), ("src",), {}),
    "decoder": (
        lambda: nn.TransformerDecoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True),
        ("tgt", "memory"),
        {
            "tgt_mask": CAUSAL[:, :S],
            "tgt_is_causal": True,
            "tgt_key_padding_mask": PADDING[:, :S],
            "memory_key_padding_mask": PADDING,
        },
    ),
    "encoders": (lambda: nn.TransformerEncoder(encoder_layer(), 2), ("src",), {"mask": SQUARE}),
    "encoders, padding": (
        lambda: nn.TransformerEncoder(encoder_layer(), 2),
        ("src",),
        {"src_key_padding_mask": PADDING},
    ),
    "decoders": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 2 * E, dropout=0.0, batch_first=True), 2),
        ("tgt", "memory"),
        {"tgt_mask": additive(CAUSAL[:, :S]), "memory_key_padding_mask": PADDING},
    ),
}
MODES: dict[str, tuple[bool, Callable[[], Any]]] = {
    "train": (True, torch.enable_grad),
    "eval": (False, torch.enable_grad),
    "no_grad": (False, torch.no_grad),
    "inference_mode": (False, torch.inference_mode),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_inside_a_layer_it_is_the_concatenation(name: str, mode: str) -> None:
    """On every path that torch has.

    In eval, where no weight of its own needs a gradient, nn.TransformerEncoderLayer runs a fused kernel on its
    attention's weights in place of its attention: the prefix would be dropped, and not train either.
    """
    make, inputs, options = LAYERS[name]
    model = attach(make(), P)
    peer = by_concatenation(model)
    training, context = MODES[mode]
    tokens = {n: torch.randn(B, T if n in ("src", "memory") else S, E) for n in inputs}
    expected = peer(**tokens, **options)
    with context():
        out = model.train(training)(**tokens, **options)
    nested = name == "encoders, padding" and not training  # whose output is 0 at padding
    shown = ~PADDING if nested else torch.ones(out.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(out[shown], expected[shown].detach())
    assert not out[~shown].any()
    if mode in ("train", "eval"):
        prefixes = [[p for p in m.parameters() if p.requires_grad] for m in (model, peer)]
        upstream = torch.randn(out[shown].shape)
        grads = [torch.autograd.grad((t[shown] * upstream).sum(), p) for t, p in zip((out, expected), prefixes)]
        assert len(grads[0]) == len(grads[1]) == 2 * sum(isinstance(m, PrefixAttention) for m in model.modules())
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_inside_a_layer_no_prefix_is_the_original(name: str, dtype: torch.dtype) -> None:
    """To the bit, in every mode; in bfloat16 a prefix is the concatenation to the precision of that."""
    make, inputs, options = LAYERS[name]
    original = make().to(dtype).requires_grad_(False)
    tokens = {n: torch.randn(B, T if n in ("src", "memory") else S, E).to(dtype) for n in inputs}
    options = {n: m.to(dtype) if torch.is_tensor(m) and m.is_floating_point() else m for n, m in options.items()}
    ours = attach(copy.deepcopy(original), 0)
    for training, context in MODES.values():
        with context():
            outs = [model.train(training)(**tokens, **options) for model in (ours, original)]
        assert torch.equal(*outs)
    prefixed = attach(original, P)
    expected = by_concatenation(prefixed)(**tokens, **options)
    got = prefixed.train()(**tokens, **options)
    close_in_norm(got.float(), expected.float(), FLOAT if dtype == torch.float32 else HALF)


def test_an_encoder_made_of_a_prefixed_layer_does_not_nest() -> None:
    layer = attach(encoder_layer(), P)
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        encoder = nn.TransformerEncoder(layer, num_layers=2).eval()
    tokens = torch.randn(B, T, E)
    with torch.no_grad():
        out = encoder(tokens, src_key_padding_mask=PADDING)
        expected = by_concatenation(encoder)(tokens, src_key_padding_mask=PADDING)
    torch.testing.assert_close(out, expected)


class ViT(nn.Module):
    """Patches, a class token, positions, an encoder, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, E, kernel_size=4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, E))
        self.positions = nn.Parameter(torch.randn(1, 17, E))
        layer = encoder_layer(activation="gelu", norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(E, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(images), -1, -1), tokens], dim=1)
        return self.head(self.encoder(tokens + self.positions)[:, 0])


def test_training_a_vit_moves_the_prefix_alone() -> None:
    """It learns what another prefix does, in train, eval and under autocast; other weights stay bit for bit."""
    images, model = torch.randn(12, 3, 16, 16), attach(ViT(), P)
    teacher = copy.deepcopy(model)
    for layer in teacher.encoder.layers:
        layer.self_attn.reset_prefix()
    goal = teacher(images).detach()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for step in range(30):
        model.train(step % 2 == 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 3 == 0):
            loss = F.mse_loss(model(images), goal)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if n.endswith(("prefix_key", "prefix_value"))}
    assert len(moved) == 4


@pytest.mark.parametrize("length", [0, P])
def test_compiles_into_one_graph(length: int) -> None:
    layer = attach(encoder_layer(), length)
    tokens = torch.randn(B, T, E, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for options in ({}, {"src_key_padding_mask": PADDING}, {"src_mask": SQUARE, "is_causal": True}):
        expected = layer(tokens, **options)
        torch.testing.assert_close(compiled(tokens, **options), expected)
        wanted = [tokens, *(p for p in layer.parameters() if p.requires_grad and p.numel())]
        got, exact = (torch.autograd.grad(f(tokens, **options).square().sum(), wanted) for f in (compiled, layer))
        torch.testing.assert_close(got, exact)


def test_no_prefix_takes_the_fused_path_of_the_layers() -> None:
    """The output of padding is an exact 0 only where nn.TransformerEncoder nested the batch and fused the layer."""
    encoder = nn.TransformerEncoder(encoder_layer(), num_layers=2).eval()
    tokens = torch.randn(B, T, E)
    with torch.no_grad():
        expected = encoder(tokens, src_key_padding_mask=PADDING)
        attach(encoder, 0)
        assert torch.equal(encoder(tokens, src_key_padding_mask=PADDING), expected)
    assert not expected[PADDING].any()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda attn: pickle.loads(pickle.dumps(attn))], ids=["copy", "pickle"])
def test_a_copy_is_equal_and_apart(way: Callable[[nn.Module], nn.Module]) -> None:
    """In a layer too: the copy must remember to keep off the fused path."""
    layer = attach(encoder_layer(), P).eval()
    tokens = torch.randn(B, T, E)
    with torch.no_grad():
        expected, again = layer(tokens), way(layer)
        layer.self_attn.prefix_value.zero_()
        assert torch.equal(again(tokens), expected)
        assert not torch.equal(layer(tokens), expected)
