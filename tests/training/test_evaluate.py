"""The loss on targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import get_prefix_model
from prefix_attn.training.evaluate import target_loss, validation_loss
from prefix_attn.training.head import AT_ONCE
from prefix_attn.training.tokens import IGNORED, collate
from tests.hf.models import CONFIGS, ENCODER_DECODERS, spread, tiny
from tests.numerics import FLOAT, GRADIENT, close
from tests.tokens import END

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}


# Loss -----------------------------------------------------------------------------------------------------------------


BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [4, 3, 9, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[IGNORED, IGNORED, 7, 8, 9], [IGNORED, IGNORED, 9, IGNORED, IGNORED]]),
}
# What stands around the heads: a soft cap (Gemma 2), a scale behind them (Granite, Cohere) or before (T5), a bias (Phi,
# BART), a layer (XLM-R), a decoder inside the body (OPT), and a loss of the model's own (gpt-oss).
HEADS = (
    "llama",
    "gpt2",
    "gemma2",
    "gpt_neox",
    "opt",
    "granite",
    "cohere",
    "phi",
    "xlm-roberta",
    "gpt_oss",
    "bart",
    "t5",
)
OWN = {
    "gpt_oss": {"output_router_logits": True, "router_aux_loss_coef": 0.5},
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.3},
    "t5": {"tie_word_embeddings": True},
    "xlm-roberta": {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def headed(name: str) -> PreTrainedModel:
    """A tiny model whose head has everything that its kind can have."""
    own = OWN.get(name, {})
    if name in CONFIGS or name in ENCODER_DECODERS:
        model = tiny(name, **own)
    else:
        torch.manual_seed(0)
        model = spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS["gpt_neox"] | own)))
    for bias in (getattr(model, "final_logits_bias", None), getattr(getattr(model, "lm_head", None), "bias", None)):
        if bias is not None:
            torch.nn.init.normal_(bias)
    return model


@pytest.mark.parametrize("at_once", [AT_ONCE, 2 * 97])
@pytest.mark.parametrize("name", [*HEADS, "t5"])
def test_target_loss_is_the_loss_of_the_model(name: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefix_attn.training.head.AT_ONCE", at_once)
    model = headed(name).train()
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
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[:2].numel()))
    target_loss(model, BATCH)
    target_loss(model, BATCH | {"labels": BATCH["input_ids"]})
    assert widths == [2, 4, 2, 8]  # one column to see that the head reads what the body gives, then each target


class Compiled(torch.nn.Module):
    """As torch.compile wraps a model: it runs what it has compiled, whatever is hooked on since."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self._orig_mod, self.config = model, model.config

    def forward(self, **inputs: torch.Tensor) -> Any:
        return self._orig_mod(**inputs)


def test_a_model_that_hides_its_states_is_read_at_once(caplog: pytest.LogCaptureFixture) -> None:
    model, widths = tiny("llama"), []
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[:2].numel()))
    hidden = Compiled(model)
    hidden.forward = lambda logits_to_keep=0, **inputs: Compiled.forward(hidden, **inputs)
    torch.testing.assert_close(target_loss(hidden, BATCH), target_loss(model, BATCH))
    assert widths == [10, 2, 4]
    assert "Compiled does not show what its head reads" in caplog.text


def test_the_head_reads_contiguous_states() -> None:
    """For other states torch copies the weights of the head once per row."""
    model, contiguous = tiny("llama", **SIZES).eval(), []
    model.lm_head.register_forward_hook(lambda module, args, out: contiguous.append(args[0].is_contiguous()))
    target_loss(model, BATCH)
    assert contiguous == [True, True]


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
