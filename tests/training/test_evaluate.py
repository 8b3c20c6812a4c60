"""Generation in batches, and the loss on targets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import get_prefix_model
from prefix_attn.training.evaluate import generate_text, target_loss, validation_loss
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tokens import IGNORED, collate, prompt_ids
from tests.hf.models import spread, tiny
from tests.numerics import FLOAT, GRADIENT, close
from tests.tokens import END, byte_tokenizer

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}


# Generation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_batches_and_order_do_not_change_the_texts(name: str, num_beams: int) -> None:
    """BART has learned positions, so padding on the left would change what it reads."""
    model, tokenizer = spread(tiny(name, **SIZES)), byte_tokenizer()
    sources = ["a", "a much longer source", "medium one", "b", "a much longer one too"]
    done: list[int] = []
    options = {"num_beams": num_beams, "max_new_tokens": 6}
    together = generate_text(model, tokenizer, sources, batch_size=3, progress=done.append, **options)
    alone = [generate_text(model, tokenizer, [source], **options)[0] for source in sources]
    assert together == alone
    assert done == [3, 2]
    assert len(set(together)) > 1


def test_outputs_are_whole_or_their_first_line_and_the_mode_is_restored() -> None:
    class Parrot(torch.nn.Module):
        """Continues every prompt with the same text."""

        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(is_encoder_decoder=False)
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            assert not self.training
            assert options["do_sample"] is False
            text = tokenizer("\n  The first. \nThe second.")["input_ids"] + [END]
            return torch.cat([input_ids, torch.tensor([text] * len(input_ids))], 1)

    tokenizer, model = byte_tokenizer(), Parrot().train()
    one_line = Prompt(one_line=True)
    assert generate_text(model, tokenizer, ["a", "bcd"], prompt=one_line) == ["The first."] * 2
    assert generate_text(model, tokenizer, ["a", "bcd"]) == ["\n  The first. \nThe second."] * 2
    assert model.training
    assert generate_text(model, tokenizer, []) == []


def test_sources_are_cut_to_the_places_of_the_encoder(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny("bart", **SIZES | {"max_position_embeddings": 8}), byte_tokenizer()
    long, short = generate_text(model, tokenizer, ["abcdefghijkl", "abcdefgl"], max_new_tokens=4)
    assert long == short
    assert "1 of 2 sources are longer than 8 of the encoder's positions: cut" in caplog.text


def test_prompts_are_cut_to_the_places_of_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 has no embedding beyond its last position. Long prompts raised an IndexError."""
    base, tokenizer = tiny("gpt2", **SIZES | {"max_position_embeddings": 20}), byte_tokenizer()
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=3))
    long, short = generate_text(model, tokenizer, ["abcdefghijkl" * 2, "abcdefghij"], max_new_tokens=4)
    assert long == short
    assert "1 of 2 sources are longer than 13 of the model's positions: cut" in caplog.text
    with pytest.raises(ValueError, match="20 positions, of which outputs and prefix take 18"):
        generate_text(model, tokenizer, ["a"], max_new_tokens=15)


def test_prompt_ids_are_those_of_the_frame() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(prompt_ids(tokenizer, "a b")) == "a b\n=>"


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
    """For other states torch copies the weights of the head once per row. Beams give one state each."""
    model, contiguous, widths = tiny("llama", **SIZES).eval(), [], []
    model.lm_head.register_forward_hook(lambda module, args, out: contiguous.append(args[0].is_contiguous()))
    target_loss(model, BATCH)
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    for beams in (1, 3):
        generate_text(model, byte_tokenizer(), ["a", "bc"], max_new_tokens=3, num_beams=beams)
    assert all(contiguous)
    assert len(widths) >= 4
    assert set(widths) == {1}


def test_long_beams_are_preferred_by_a_length_penalty() -> None:
    """Log-likelihoods are negative. Divided by a high power of the length, that of a long text is larger."""
    model, tokenizer = tiny("llama", **SIZES).eval(), byte_tokenizer()
    texts = [
        generate_text(model, tokenizer, ["a", "bc", "d e"], max_new_tokens=8, num_beams=4, length_penalty=power)
        for power in (-20.0, 20.0)
    ]
    short, long = (sum(map(len, found)) for found in texts)
    assert short < long


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
