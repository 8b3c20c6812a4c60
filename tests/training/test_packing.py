"""Rows one behind the other in one row: the loss and the gradients of the padded batch, by the packed operator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from prefix_attn import PrefixConfig, get_prefix_model
from prefix_attn.hf.attach import packed as packed_module
from prefix_attn.training.evaluate import target_loss
from prefix_attn.training.packing import check_packing, pack
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import IGNORED, Row, collate
from prefix_attn.training.train import train
from tests.hf.models import tiny
from tests.numerics import GRADIENT, MODEL, close
from tests.tokens import byte_tokenizer
from tests.training.test_train import EXAMPLES, model

ROWS: list[Row] = [
    {"input_ids": [5, 6, 7, 8, 9, 3, 2], "labels": [IGNORED, IGNORED, 7, 8, 9, 3, 2]},
    {"input_ids": [4, 3, 9], "labels": [4, IGNORED, 9]},  # a first token that nothing predicts
    {"input_ids": [1, 2, 3, 4], "labels": [IGNORED, 2, IGNORED, 4]},
]


def test_pack() -> None:
    batch = {name: tensor.tolist() for name, tensor in pack(ROWS[1:]).items()}
    assert batch == {
        "input_ids": [[4, 3, 9, 1, 2, 3, 4]],
        "labels": [[IGNORED, IGNORED, 9, IGNORED, 2, IGNORED, 4]],
        "position_ids": [[0, 1, 2, 0, 1, 2, 3]],
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each call of the packed operator."""
    found: list[int] = []
    operator = packed_module.prefix_attention_varlen

    def counted(*args: Any, **options: Any) -> Any:
        found.append(len(options["cu_seqlens_q"]) - 1)
        return operator(*args, **options)

    monkeypatch.setattr(packed_module, "prefix_attention_varlen", counted)
    return found


# name of the model, options of its prefix, how many of its 3 layers are packed
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {}, 3),
    "gate": ("llama", {"gate": "zero"}, 3),
    "lengths": ("llama", {"layers": {0: 3, 2: 1}}, 3),
    "positions": ("gpt2", {}, 3),
    "softcap and windows": ("gemma2", {}, 1),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_loss_is_that_of_padded_rows(case: str, calls: list[int]) -> None:
    """Windows shorter than a sequence keep their layers to the mask. Both give the same."""
    name, options, layers = MODELS[case]
    options = {"num_virtual_tokens": 3} | options
    tuned = get_prefix_model(tiny(name), PrefixConfig(**options)).eval()
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    losses = [target_loss(tuned, batch) for batch in (collate(ROWS, 0), pack(ROWS))]
    close(losses[1], losses[0], MODEL)
    grads = [torch.autograd.grad(loss, parameters) for loss in losses]
    close(grads[1], grads[0], GRADIENT)
    assert calls == [3] * layers
    check_packing(tuned, ROWS)


def test_a_model_that_does_not_tell_rows_apart_is_refused() -> None:
    """transformers' gpt-oss makes its masks without positions."""
    with pytest.raises(NotImplementedError, match="GptOssForCausalLM lets packed rows see one another: leave out"):
        check_packing(get_prefix_model(tiny("gpt_oss"), PrefixConfig(num_virtual_tokens=3)), ROWS)
    with pytest.raises(NotImplementedError, match="takes a causal model"):
        check_packing(tiny("bart"), ROWS)


def test_a_training_takes_the_same_steps(tmp_path: Path, calls: list[int]) -> None:
    losses = []
    for packing in (False, True):
        settings = TrainingSettings(tmp_path / str(packing), steps=4, batch_size=3, validate_every=4, packing=packing)
        found = train(model(), byte_tokenizer(), EXAMPLES, EXAMPLES[:2], settings)
        losses.append(torch.tensor([loss for _, loss in found["train_loss"]]))
        assert json.loads((tmp_path / str(packing) / "metrics.json").read_text())["steps"] == 4
    close(losses[1], losses[0], MODEL)
    assert calls.count(3) == 3 * 4
