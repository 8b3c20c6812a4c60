"""Context distillation: the teacher is the text in front, and the student gets closer to it, also on other texts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.training.distill import Target, Teacher, distill, divergence, mean_divergence, pieces
from prefix_attn.training.settings import TrainingSettings
from prefix_attn.training.tokens import collate
from tests.hf.models import tiny
from tests.numerics import FLOAT, close
from tests.test_cli import run as prefix_attn
from tests.tokens import END, byte_tokenizer

DOCUMENT = "The inn is north of the river. The river is cold. North of the inn is a hill. " * 2
OTHER = "Is the hill cold? The river is north. A cold inn is on the hill."


def base() -> torch.nn.Module:
    return tiny("llama", vocab_size=257, max_position_embeddings=256)


def student(P: int = 8) -> PrefixModel:
    torch.manual_seed(0)
    return get_prefix_model(
        base(), PrefixConfig(num_virtual_tokens=P, init="document", init_text=DOCUMENT), byte_tokenizer()
    )


def batch(text: str, length: int = 24) -> dict[str, torch.Tensor]:
    return collate(pieces(byte_tokenizer()(text)["input_ids"], length), END)


def test_the_teacher_is_the_text_in_front() -> None:
    """It gives the frozen model's own logits, also with padded rows."""
    model, given = base(), batch(OTHER)
    ids = byte_tokenizer()(DOCUMENT)["input_ids"]
    target = Teacher(model, ids, 24, 5)(given)
    expected = []
    for row, mask in zip(given["input_ids"], given["attention_mask"]):
        text = torch.cat([torch.tensor(ids), row[mask.bool()]])
        expected.append(model(input_ids=text[None]).logits[0, len(ids) :].log_softmax(-1))
    values, tokens = torch.cat(expected).topk(5)
    assert torch.equal(target.ids, tokens)
    torch.testing.assert_close(target.log_probs, values)
    assert len(tokens) == len(byte_tokenizer()(OTHER)["input_ids"])


class Fixed(torch.nn.Module):
    """A model with given logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, **batch: torch.Tensor) -> Fixed:
        return self


@pytest.mark.parametrize("top_k", [1, 3, 6, 50])
def test_divergence_is_that_of_the_coarser_distributions(top_k: int) -> None:
    """All tokens except the k likeliest count as one. With k = V it is the full divergence."""
    torch.manual_seed(0)
    p, q = torch.randn(2, 2, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    p64, q64 = p[mask.bool()].double().softmax(-1), q[mask.bool()].double().softmax(-1)
    order = p64.argsort(descending=True)[:, : min(top_k, 6)]
    parts = []
    for distribution in (p64, q64):
        kept = distribution.gather(-1, order)
        parts.append(torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], -1)[:, : 6 if top_k >= 6 else None])
    expected = (parts[0] * (parts[0] / parts[1]).log()).sum(-1).mean()
    model, target = Fixed(q), Target(p[mask.bool()], top_k)
    loss = divergence(model, target, {"attention_mask": mask})
    torch.testing.assert_close(loss.detach(), expected.float())
    assert target.ids.shape == (8, min(top_k, 6))
    loss.backward()
    assert model.logits.grad.isfinite().all()
    assert model.logits.grad[0, 3:].abs().max() == 0
    close(float(divergence(Fixed(p), target, {"attention_mask": mask}).detach()), 0.0, FLOAT)


def test_pieces_have_every_token_once() -> None:
    assert [row["input_ids"] for row in pieces(range(10), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [row["input_ids"] for row in pieces(range(5), 4)] == [[0, 1, 2, 3]]
    assert pieces([1], 4) == []


def test_distils_on_other_texts_too(tmp_path: Path) -> None:
    """On an unseen text the full distributions are closer than with the initial prefix, or with none."""
    model, tokenizer = student(), byte_tokenizer()
    weights = {name: tensor.clone() for name, tensor in model.base_model.state_dict().items()}
    teacher = Teacher(model.base_model, tokenizer(DOCUMENT)["input_ids"], 24, 257)
    unseen = [batch(OTHER)]
    with model.disable_prefix():
        nothing = mean_divergence(model, teacher, unseen)
    before = mean_divergence(model, teacher, unseen)
    settings = TrainingSettings(tmp_path, steps=60, batch_size=4, max_length=24, validate_every=20, learning_rate=3e-2)
    metrics = distill(model, tokenizer, DOCUMENT, settings)
    after = mean_divergence(model, teacher, unseen)
    assert after < 0.6 * min(before, nothing)
    curve = [loss for _, loss in metrics["validation_loss"]]
    assert curve[-1] < curve[0] / 2
    assert sum(loss for _, loss in metrics["train_loss"][-5:]) < sum(loss for _, loss in metrics["train_loss"][:5]) / 2
    assert (metrics["document_tokens"], metrics["rows"]) == (len(DOCUMENT), math.ceil(len(DOCUMENT) / 24))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.base_model.state_dict().items())
    loaded = PrefixModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded.prefixes["default"].embedding, model.prefixes["default"].embedding)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "document.txt").write_text(DOCUMENT)
    (tmp_path / "other.txt").write_text(OTHER)
    command = ("train", "--model", tmp_path / "model", "--distill-from", tmp_path / "document.txt", "--max-length", 24)
    small = ("--virtual-tokens", 8, "--steps", 8, "--batch-size", 4, "--learning-rate", 3e-2, "--top-k", 10)
    extra = ("--validation", tmp_path / "other.txt", "--output", tmp_path / "out", "--json")
    assert prefix_attn(monkeypatch, *command, *small, *extra) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["validation_loss"][-1][1] < metrics["validation_loss"][0][1]
    assert metrics["document_tokens"] == len(DOCUMENT)
    assert prefix_attn(monkeypatch, *command, "--data", "aws", "--output", tmp_path / "x") == 1
    assert "--data and --distill-from exclude one another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("length", "row", "top_k", "message"),
    [
        (240, 24, 5, "the document has 240 tokens, which with 24 behind them do not fit into the model's 256"),
        (1, 24, 5, "the document must have at least 2 tokens, got 1"),
        (100, 24, 0, "top_k must be positive, got 0"),
    ],
)
def test_refuses(length: int, row: int, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Teacher(base(), [1] * length, row, top_k)


def test_refuses_an_infix(tmp_path: Path) -> None:
    model = get_prefix_model(base(), PrefixConfig(num_virtual_tokens=4, mode="infix"))
    with pytest.raises(ValueError, match="an infix stands within a row"):
        distill(model, byte_tokenizer(), DOCUMENT, TrainingSettings(tmp_path, steps=1))
