"""A LightningModule around a PrefixModel: fit, checkpoints, resuming and weight averaging, as around any module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader

from prefix_attn import PrefixConfig, PrefixTuning, get_prefix_model
from tests.hf.models import tiny, tokens

pytestmark = [
    # Lightning 2.6 calls torch 2.13 by a name that is on its way out.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
    # Advice about speed, which a test does not need.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # Our bases come in eval mode, and Lightning asks whether that was meant.
    pytest.mark.filterwarnings("ignore:Found \\d+ module\\(s\\) in eval mode"),
]
P = 4


class Tuner(LightningModule):
    """Nothing in it knows of prefixes, but for the line that makes the model."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(3)
        if kind == "table":
            self.model: Any = PrefixTuning(tiny("llama"), P, 32)
        else:
            base = tiny("llama").requires_grad_(False)
            base.model.norm.requires_grad_(kind == "norm")
            self.model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=P))

    def training_step(self, ids: Tensor, _: int) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def trainer(folder: Path, epochs: int, *callbacks: Any) -> Trainer:
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, callbacks=[*callbacks], **quiet)


def data() -> DataLoader[Tensor]:
    return DataLoader(list(tokens(8)), batch_size=8)  # an epoch is a step


@pytest.mark.parametrize("kind", ["prefix", "norm", "table"])
def test_fit_checkpoint_and_resume(kind: str, tmp_path: Path) -> None:
    """The checkpoint holds what is trained, loads strictly, and an epoch and another are two."""
    straight, first = Tuner(kind), Tuner(kind)
    start = {name: tensor.clone() for name, tensor in straight.state_dict().items()}
    trained = {"table": ["model.prefix"]}.get(kind, ["model.prefixes.default.embedding"])
    assert set(start) == {*trained, *(["model.base_model.model.norm.weight"] if kind == "norm" else [])}
    trainer(tmp_path, 2).fit(straight, data())
    run = trainer(tmp_path, 1)
    run.fit(first, data())
    run.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == start.keys()
    loaded = Tuner.load_from_checkpoint(tmp_path / "one.ckpt", strict=True)
    with torch.no_grad():
        assert torch.equal(loaded.eval().model(tokens()).logits, first.eval().model(tokens()).logits)
    resumed = Tuner(kind)
    trainer(tmp_path, 2).fit(resumed, data(), ckpt_path=tmp_path / "one.ckpt")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)
        assert not torch.equal(start[name], tensor)


def test_the_average_of_weights(tmp_path: Path) -> None:
    """Lightning's moving average copies the module, starts from the first step, and is in place at the end."""
    ends = []
    for epochs, callbacks in ((1, ()), (2, ()), (2, (EMAWeightAveraging(decay=0.5),))):
        tuner = Tuner("prefix")
        trainer(tmp_path, epochs, *callbacks).fit(tuner, data())
        ends.append(tuner.model.prefixes["default"].embedding.detach())
    first, second, mean = ends
    assert not torch.equal(first, second)
    torch.testing.assert_close(mean, (first + second) / 2)
