"""Where PEFT's prefix tuning is wrong or refuses: what it does there, and ours against a plain concatenation.

docs/peft.md is the list; a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from torch import Tensor

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from tests.hf import test_gradients  # noqa: F401  registers the attention "concatenating"
from tests.hf.models import tiny, tokens
from tests.numerics import MODEL, close, close_in_norm

pytestmark = pytest.mark.peft
P = 5
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "peft.md"


def pair(name: str = "llama") -> tuple[Any, PrefixModel, Tensor]:
    """A PEFT model, ours with the same prefix, and ours' parameter."""
    kind = "SEQ_2_SEQ_LM" if name == "bart" else "CAUSAL_LM"
    torch.manual_seed(0)
    layers = {"encoder_layers": 4, "decoder_layers": 4} if name == "bart" else {}
    peft = get_peft_model(tiny(name, **layers), PrefixTuningConfig(task_type=kind, num_virtual_tokens=P)).eval()
    ours = get_prefix_model(tiny(name, **layers), PrefixConfig(num_virtual_tokens=P)).eval()
    leaf = ours.prefixes["default"].embedding
    if name != "bart":
        leaf.data.copy_(peft.prompt_encoder["default"].embedding.weight.data)
    return peft, ours, leaf


def concatenated(ours: PrefixModel, ids: Tensor, positions: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of the frozen model with the prefix concatenated in each layer, and gradients for it."""
    base, kv = ours.base_model, ours.prefixes["default"]()
    before = base.config._attn_implementation
    base.set_attn_implementation("concatenating")
    try:
        with ours.disable_prefix():
            options = {"attention_mask": mask, "position_ids": positions + P, "use_cache": False}
            return base(ids, concatenated_prefix=list(zip(kv[::2], kv[1::2])), **options).logits
    finally:
        base.set_attn_implementation(before)


def sliding_window() -> None:
    peft, ours, leaf = pair("mistral")
    ids = tokens(1, 40)
    (theirs,) = torch.autograd.grad(
        peft(input_ids=ids).logits[0, -1].square().sum(), peft.prompt_encoder["default"].embedding.weight
    )
    assert (theirs == 0).all()
    logits, expected = ours(ids).logits, concatenated(ours, ids, torch.arange(40)[None])
    close(logits, expected, MODEL)
    grad, wanted = (torch.autograd.grad(t[0, -1].square().sum(), leaf)[0] for t in (logits, expected))
    close_in_norm(grad, wanted, MODEL)
    assert wanted.abs().max() > 0


def packed() -> None:
    peft, ours, _ = pair()
    ids, positions = tokens(1, 12), torch.cat([torch.arange(5), torch.arange(7)])[None]
    apart = torch.cat([concatenated(ours, part, torch.arange(part.shape[1])[None]) for part in ids.split([5, 7], 1)], 1)
    assert (peft(input_ids=ids, position_ids=positions + P).logits - apart).abs().max() > 0.1
    close(ours(ids, position_ids=positions).logits, apart, MODEL)


def left_padding() -> None:
    peft, ours, _ = pair()
    ids = tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], dim=1)
    mask, alone = (padded != 0).long(), concatenated(ours, ids, torch.arange(9)[None])
    # Llama's positions are relative, so that only their distance from the prefix is off.
    assert (peft(input_ids=padded, attention_mask=mask).logits[:, 3:] - alone).abs().max() > 1e-2
    close(ours(padded, attention_mask=mask).logits[:, 3:], alone, MODEL)


def greedy(ours: PrefixModel, ids: Tensor) -> Tensor:
    """Six more tokens, each from a full forward by concatenation."""
    with torch.no_grad():
        for _ in range(6):
            logits = concatenated(ours, ids, torch.arange(ids.shape[1])[None])
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


def no_cache() -> None:
    peft, ours, _ = pair()
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        peft.generate(input_ids=tokens(), attention_mask=torch.ones_like(tokens()), use_cache=False, **QUIET)
    assert torch.equal(ours.generate(tokens(), use_cache=False, **QUIET), greedy(ours, tokens()))


def second_turn() -> None:
    peft, ours, _ = pair()
    ids = tokens(1, 12)
    whole = concatenated(ours, ids, torch.arange(12)[None])
    first = peft(input_ids=ids[:, :8], use_cache=True)
    second = peft(input_ids=ids[:, 8:], past_key_values=first.past_key_values)
    assert (second.logits - whole[:, 8:]).abs().max() > 0.1
    first = ours(ids[:, :8], use_cache=True)
    close(ours(ids[:, 8:], past_key_values=first.past_key_values).logits, whole[:, 8:], MODEL)


def checkpointing() -> None:
    base = tiny("llama")
    set_checkpointing(base, use_reentrant=False)
    with pytest.raises(ValueError, match="gradient checkpointing"):
        get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    _, ours, leaf = pair()
    expected = concatenated(ours, tokens(), torch.arange(tokens().shape[1])[None])
    (wanted,) = torch.autograd.grad(expected.square().sum(), leaf)
    set_checkpointing(ours.train(), use_reentrant=True)
    ours(tokens(), use_cache=False).logits.square().sum().backward()
    close_in_norm(leaf.grad, wanted, MODEL)


def encoder_decoder() -> None:
    """Ours: every slot has a gradient; test_encoder_decoder.py compares each with concatenation."""
    peft, ours, leaf = pair("bart")
    given = {"input_ids": tokens(2, 7), "labels": tokens(2, 5)}
    weight = peft.prompt_encoder["default"].embedding.weight
    (theirs,) = torch.autograd.grad(peft(**given).loss, weight)
    slots = theirs.view(P, 4, -1).abs().amax((0, 2))
    assert [bool(size > 0) for size in slots] == [True, False, True, False]
    (grad,) = torch.autograd.grad(ours(**given).loss, leaf)
    assert grad.view(P, 24, -1).abs().amax((0, 2)).min() > 0


def adapter_names() -> None:
    peft, ours, _ = pair()
    peft.add_adapter("other", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P))
    names, ids = ["other", "default"], tokens()
    assert torch.equal(peft(input_ids=ids, adapter_names=names).logits, peft(input_ids=ids).logits)
    ours.add_prefix("other", PrefixConfig(num_virtual_tokens=P))
    kv = ours.prefixes["default"]
    expected = concatenated(ours, ids, torch.arange(ids.shape[1])[None])[1]
    close(ours(ids, adapter_names=names).logits[1], expected, MODEL)
    kv.load_state_dict(ours.prefixes["other"].state_dict())
    close(ours(ids, adapter_names=names).logits[0], concatenated(ours, ids, torch.arange(ids.shape[1])[None])[0], MODEL)


def training_goes_on(folder: Path) -> None:
    peft, ours, _ = pair()
    peft.save_pretrained(folder)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        PeftModel.from_pretrained(tiny("llama"), folder, is_trainable=True)
    again = PrefixModel.from_pretrained(tiny("llama"), folder, is_trainable=True)
    leaf = again.prefixes["default"].embedding
    logits, expected = again(tokens()).logits, concatenated(ours, tokens(), torch.arange(tokens().shape[1])[None])
    close(logits, expected, MODEL)
    assert torch.autograd.grad(logits.square().sum(), leaf)[0].abs().max() > 0


CASES: dict[str, Callable[..., None]] = {
    "Sliding windows: the prefix scrolls out of sight; its gradient is exactly 0.": sliding_window,
    "Packed sequences (`position_ids` that start again) see each other.": packed,
    "Left padding counts as positions in a bare forward, and so in training.": left_padding,
    "`generate(use_cache=False)` raises.": no_cache,
    "`past_key_values` of an earlier turn are dropped.": second_turn,
    "Gradient checkpointing raises.": checkpointing,
    "Encoder-decoder models with an even number of layers: half of the prefix has no effect and no gradient.": (
        encoder_decoder
    ),
    "`adapter_names`, another prefix for each row, are ignored.": adapter_names,
    "A saved prefix cannot be trained further.": training_goes_on,
}


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.__name__)
def test_where_peft_is_wrong(case: Callable[..., None], tmp_path: Path) -> None:
    case(*([tmp_path] if case is training_goes_on else []))


def test_the_page_is_the_list() -> None:
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [line[2:] for line in page if line.startswith("* ")] == list(CASES)
