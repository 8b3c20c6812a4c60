"""The loss on targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import get_prefix_model
from prefix_attn.training.evaluate import target_loss, validation_loss
from prefix_attn.training.tokens import IGNORED, collate
from tests.hf.models import tiny
from tests.numerics import FLOAT, GRADIENT, close
from tests.tokens import END

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}


# Loss -----------------------------------------------------------------------------------------------------------------


BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [4, 3, 9, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[IGNORED, IGNORED, 7, 8, 9], [IGNORED, IGNORED, 9, IGNORED, IGNORED]]),
}
ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 0.5}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox", "gpt_oss", "bart", "t5"])
def test_target_loss_is_the_loss_of_the_model(name: str) -> None:
    model = tiny(name, **(ROUTER if name == "gpt_oss" else {})).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    expected = model(**BATCH).loss
    torch.manual_seed(0)  # of dropout
    found = target_loss(model, BATCH)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (found, expected)]
    close(*grads, GRADIENT)


def test_target_loss_leaves_out_what_no_loss_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    model, widths = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    target_loss(model, BATCH)
    target_loss(model, BATCH | {"labels": BATCH["input_ids"]})
    assert widths == [3, 4]  # the last column is predicted, and predicts nothing


def test_the_head_reads_contiguous_states() -> None:
    """For other states torch copies the weights of the head once per row."""
    model, contiguous = tiny("llama", **SIZES).eval(), []
    model.lm_head.register_forward_hook(lambda module, args, out: contiguous.append(args[0].is_contiguous()))
    target_loss(model, BATCH)
    assert contiguous == [True]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"mode": "embedding"},
        {"mode": "infix"},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_target_loss_of_a_prefix(config: dict[str, Any]) -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=3, **config))
    for head in model.heads["default"].parameters():
        head.data.mul_(2)
    torch.testing.assert_close(target_loss(model, BATCH), model(**BATCH).loss)


def test_target_loss_of_packed_rows() -> None:
    model = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=3))
    batch = {"input_ids": BATCH["input_ids"][:1], "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    batch["labels"] = torch.tensor([[IGNORED, 6, 7, IGNORED, 9]])
    torch.testing.assert_close(target_loss(model, batch), model(**batch).loss)
    close(validation_loss(model, [batch]), float(model(**batch).loss.detach()), FLOAT)


@pytest.mark.peft
@pytest.mark.parametrize("name", ["PrefixTuningConfig", "PromptTuningConfig", "LoraConfig"])
def test_target_loss_of_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    sizes = {} if name == "LoraConfig" else {"num_virtual_tokens": 3}
    model = peft.get_peft_model(tiny("llama"), getattr(peft, name)(task_type="CAUSAL_LM", **sizes)).eval()
    torch.testing.assert_close(target_loss(model, BATCH), model(**BATCH).loss)


def test_target_loss_is_float32() -> None:
    """In half precision a loss would have three digits."""
    for name in ("llama", "bart"):
        model = tiny(name).bfloat16()
        loss = target_loss(model, BATCH)
        assert loss.dtype == torch.float32
        logits, labels = model(**BATCH).logits.float(), BATCH["labels"]
        logits, labels = (logits, labels) if name == "bart" else (logits[:, :-1], labels[:, 1:])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        torch.testing.assert_close(loss, expected)


# Validation loss ------------------------------------------------------------------------------------------------------


def test_validation_loss_weighs_tokens() -> None:
    model = tiny("llama", **SIZES).train()
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORED, 6, 7, 8, 9]},
        {"input_ids": [1, 2, 3], "labels": [IGNORED, IGNORED, 3]},
        {"input_ids": [4, 9], "labels": [IGNORED, 9]},
    ]
    apart = validation_loss(model, [collate(rows[:1], END), collate(rows[1:], END)])
    together = validation_loss(model, [collate(rows, END)])
    assert model.training
    total, count = 0.0, 0
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for i, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                total, count = total - float(logits[i, label].detach()), count + 1
    assert count == 6
    close(apart, total / count, FLOAT)
    close(together, total / count, FLOAT)
    without = {"input_ids": [1, 2], "labels": [IGNORED, IGNORED]}
    assert validation_loss(model, [collate([without], END), collate(rows, END)]) == together


def test_validation_loss_of_an_encoder_decoder_counts_the_first_token() -> None:
    model = tiny("bart").train()
    rows = [{"input_ids": [5, 6, 7], "labels": [6, 7, 1]}, {"input_ids": [3, 1], "labels": [1]}]
    losses = [float(model(**collate([row], 0)).loss.detach()) for row in rows]
    expected = (3 * losses[0] + losses[1]) / 4
    close(validation_loss(model, [collate(rows, 0)]), expected, FLOAT)
    close(validation_loss(model, [collate([row], 0) for row in rows]), expected, FLOAT)


def test_validation_loss_needs_targets() -> None:
    with pytest.raises(ValueError, match="no target tokens"):
        validation_loss(tiny("llama", **SIZES), [])
