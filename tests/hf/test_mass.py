"""Shares of softmax mass that go to a prefix, against softmax sums and against attention that is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model, prefix_mass
from prefix_attn.hf.mass import plot_mass
from tests.hf.models import tiny, tokens
from tests.hf.test_banks import left_padded
from tests.hf.test_gradients import full_mask
from tests.numerics import FLOAT, close

P = 4
_given: dict[str, Any] = {}


def summing(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """All probabilities of [prefix ; sequence ; sink]; those of the prefix are summed and kept."""
    group = query.shape[1] // key.shape[1]
    pk, pv = (t.expand(len(query), -1, -1, -1) for t in _given["layers"][module.layer_idx])
    key, value = (torch.cat(t, dim=2).repeat_interleave(group, dim=1) for t in ((pk, key), (pv, value)))
    logits = query @ key.mT * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    seen = torch.arange(query.shape[2]) >= _given["starts"][:, None]
    visible = torch.cat([seen[:, None, :, None].expand(-1, 1, -1, P), mask], dim=-1)
    sink = torch.full((query.shape[1],), -torch.inf) if s_aux is None else s_aux
    logits = logits.masked_fill(~visible, -torch.inf)
    logits = torch.cat([logits, sink[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    weights = logits.softmax(-1).nan_to_num()
    _given["shares"].append(weights[..., :P].sum(-1))
    return (weights[..., :-1] @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("summing", summing)
AttentionMaskInterface.register("summing", full_mask)


@pytest.mark.parametrize("mode", ["kv", "infix"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_equals_softmax_sums(name: str, mode: str) -> None:
    """Grouped heads, windows, softcaps, sinks, padding; two batches; only tokens that see an infix count."""
    base = tiny(name)
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, mode=mode, position_mode="none"))
    batches = []
    for rows, length in ((3, 9), (2, 12)):
        ids, mask = left_padded(rows, length)
        labels = torch.where(torch.arange(length) > 4 + torch.arange(rows)[:, None], ids, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    done: list[int] = []
    got = prefix_mass(model.train(), batches, done.append)
    assert done == [3, 2]
    assert model.training
    assert list(got) == ["decoder"]

    base.set_attn_implementation("summing")
    kv = model.prefixes["default"]()
    sums, count = torch.zeros(3, 4, dtype=torch.float64), 0.0
    for batch in batches:
        rows = len(batch["input_ids"])
        starts = 4 + torch.arange(rows) if mode == "infix" else torch.zeros(rows)
        _given.update(layers=list(zip(kv[::2], kv[1::2])), starts=starts, shares=[])
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with model.disable_prefix(), torch.no_grad():
            base.eval()(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions)
        counted = batch["attention_mask"] * (torch.arange(positions.shape[1]) >= starts[:, None])
        sums += torch.stack([(share * counted[:, None]).sum((0, 2)) for share in _given["shares"]]).double()
        count += counted.sum().item()
    close(got["decoder"], sums / count, FLOAT)
    assert got["decoder"].std() > 1e-3


@pytest.mark.parametrize(("name", "shift"), [("bart", False), ("t5", False), ("t5", True), ("bert", False)])
def test_where_all_keys_weigh_the_same(name: str, shift: bool) -> None:
    """Queries of zero and no bias by distance: a prefix of 4 beside n tokens gets 4 / (4 + n), at every site."""
    base = tiny(name)
    for module, parameter in base.named_parameters():
        if any(part in module for part in ("q_proj", ".q.", "query", "relative_attention_bias")):
            parameter.data.zero_()
    mode = {"position_mode": "shift"} if shift else {}
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, **mode))
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = {"input_ids": tokens(3, 7), "attention_mask": mask}
    if name != "bert":
        labels = tokens(3, 5)
        labels[2, 3:] = -100
        batch |= {"labels": labels}
    got = prefix_mass(model, [batch])
    own = (7 * 2 * P / (P + 7) + 5 * P / (P + 5)) / 19
    wanted = {"encoder": own}
    if name != "bert":
        steps = [P / (P + n) for n in range(1, 6)]
        wanted["cross"] = (8 * P / (P + 7) + 5 * P / (P + 5)) / 13
        wanted["decoder"] = (2 * sum(steps) + sum(steps[:3])) / 13
    assert got.keys() == wanted.keys()
    for site, share in wanted.items():
        assert got[site].shape == (3 if site == "encoder" else 2, 4)
        close(got[site], torch.full_like(got[site], share), FLOAT)


def test_some_layers_and_the_heat_map(tmp_path: Path) -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=P, layers=[2, 0]))
    before = model(tokens()).logits
    mass = prefix_mass(model, [{"input_ids": tokens()}])
    assert mass["decoder"].shape == (2, 4)
    assert torch.equal(model(tokens()).logits, before)
    plot_mass(mass, {"decoder": [0, 2]}, tmp_path / "new" / "mass.png")
    assert (tmp_path / "new" / "mass.png").read_bytes().startswith(b"\x89PNG")


def test_an_offloaded_model() -> None:
    """Its weights are on no device until a module runs, its layers may be on another, and batches are on the CPU."""
    config = PrefixConfig(num_virtual_tokens=P, init_token_ids=[5], init="text", mode="infix")
    batch = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), "labels": tokens()}
    expected = prefix_mass(get_prefix_model(tiny("llama"), config), [batch])
    base = cpu_offload(tiny("llama"), execution_device=torch.device("cpu"))
    torch.testing.assert_close(prefix_mass(get_prefix_model(base, config), [batch]), expected)


def test_errors() -> None:
    model = PrefixModel(tiny("llama"))
    with pytest.raises(ValueError, match="no active prefix"):
        prefix_mass(model, [])
    model.add_prefix("plain", PrefixConfig())
    with pytest.raises(ValueError, match="no token saw the prefix"):
        prefix_mass(model, [])
    model.add_prefix("gated", PrefixConfig(gate="zero"))
    with pytest.raises(ValueError, match="gated has a gate"):
        prefix_mass(model, [])
