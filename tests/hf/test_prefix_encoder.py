"""PrefixEncoder: the layout on disk, the fit of the MLP, what trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from prefix_attn.hf.encoder import PrefixEncoder
from tests.numerics import MODEL, close

P, L, H, D = 6, 3, 2, 4
FORMS = {"flat": {}, "mlp": {"hidden_size": 12}, "deep": {"hidden_size": 12, "depth": 3}}


def encoder(**options: int | float | None) -> PrefixEncoder:
    return PrefixEncoder(P, L, H, D, **options)


def target() -> Tensor:
    return torch.randn(2 * L, H, P, D)


def test_layout_is_peft_s() -> None:
    """Row p viewed as (2 * L, H, D) holds layer l's key at 2 * l and its value at 2 * l + 1."""
    made = encoder()
    made.embedding.data = torch.arange(float(P * 2 * L * H * D)).view(P, -1)
    kv = made()
    assert kv.shape == (2 * L, H, P, D)
    assert kv.is_contiguous()
    rows = made.embedding.view(P, 2 * L, H, D)
    for layer, head, token in ((0, 0, 0), (1, 1, 5), (2, 0, 3)):
        assert torch.equal(kv[2 * layer, head, token], rows[token, 2 * layer, head])
        assert torch.equal(kv[2 * layer + 1, head, token], rows[token, 2 * layer + 1, head])


@pytest.mark.parametrize("form", FORMS)
def test_starts_from_given_keys_and_values(form: str) -> None:
    """Exactly so while P is at most the hidden size: the MLP is fitted, in float64, to rounding."""
    made, kv = encoder(**FORMS[form]), target()
    made.set_kv(kv)
    if form == "flat":
        assert torch.equal(made(), kv)
    else:
        torch.testing.assert_close(made(), kv)


def test_narrow_mlp_starts_from_the_best_fit() -> None:
    """With fewer hidden units than tokens no weight of the last layer does better; the mean over tokens is exact."""
    made, kv = encoder(hidden_size=3), target()
    made.set_kv(kv)
    last = made.mlp[-1]
    hidden = made.mlp[:-1](made.embedding).detach().double()
    rest = (kv.permute(2, 0, 1, 3).reshape(P, -1) - last.bias).double()
    orthogonal = hidden.T @ (rest - hidden @ last.weight.double().T)
    close(orthogonal, torch.zeros_like(orthogonal), MODEL)
    torch.testing.assert_close(last.bias.view(2 * L, H, D), kv.mean(2))


@pytest.mark.parametrize("form", FORMS)
def test_every_parameter_has_a_gradient_after_the_fit(form: str) -> None:
    """A fit that saturates a Tanh or zeroes a layer would freeze what lies below it."""
    made = encoder(**FORMS[form])
    made.set_kv(target())
    grads = torch.autograd.grad((made() * target()).sum(), list(made.parameters()))
    assert len(grads) == {"flat": 1, "mlp": 5, "deep": 9}[form]
    assert all(g.abs().max() > 1e-4 for g in grads)


def test_fitted_mlp_learns() -> None:
    """A hundred steps towards another prefix take most of the way: the start is no trap."""
    made, goal = encoder(hidden_size=12), target()
    made.set_kv(target())
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        loss = (made() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("form", FORMS)
def test_fold_keeps_the_prefix_and_the_training_state(form: str) -> None:
    made = encoder(**FORMS[form])
    made.set_kv(target())
    before = made()
    for trainable in (True, False):
        made.requires_grad_(trainable)
        made.fold()
        assert torch.equal(made(), before)
        assert [(p.shape, p.requires_grad) for p in made.parameters()] == [((P, 2 * L * H * D), trainable)]
    assert torch.equal(made.prompt_embeddings(), made.embedding)


def test_dropout_leaves_the_stored_prefix_alone() -> None:
    made = encoder(dropout=0.5)
    made.set_kv(target())
    dropped = made()
    kept = dropped != 0
    assert 0.2 < kept.float().mean() < 0.8
    made.eval()
    torch.testing.assert_close(dropped[kept], 2 * made()[kept])
    assert made.prompt_embeddings().count_nonzero() == made.embedding.numel()


def test_mlp_runs_once_per_forward() -> None:
    """Not once per token of the batch, nor per layer: one product of (P, hidden) with the last layer."""
    made, seen = encoder(hidden_size=12), []
    assert isinstance(made.mlp, nn.Sequential)
    made.mlp[-1].register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape)))
    made()
    assert seen == [(P, 12)]
