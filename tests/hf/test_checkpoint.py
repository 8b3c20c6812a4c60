"""Files: what is written, that a kill cannot halve it, and that nothing bad gets in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.hub import CARD
from prefix_attn.hf.io import checkpoint, files
from tests.hf.models import tiny, tokens

P, WIDTH = 4, 2 * 3 * 2 * 8  # of the tiny Llama: 3 layers, 2 key/value heads of size 8


def prefixed(seed: int = 0, **config: Any) -> PrefixModel:
    base = tiny("llama")
    torch.manual_seed(seed)
    return get_prefix_model(base, PrefixConfig(num_virtual_tokens=P, **config))


@torch.no_grad()
def logits(model: PrefixModel) -> torch.Tensor:
    return model.eval()(tokens()).logits


def saved(folder: Path, **config: Any) -> Path:
    prefixed(**config).save_pretrained(folder, training_state=True)
    return folder


@pytest.mark.parametrize("mode", ["shift", "none"])
@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
def test_round_trip(tmp_path: Path, projection: bool, mode: str) -> None:
    """The logits after loading are the same bits, whichever way the prefix was made."""
    model = prefixed(prefix_projection=projection, position_mode=mode, dropout=0.5)
    model.save_pretrained(tmp_path)
    names = [CARD, checkpoint.ADAPTER_CONFIG, checkpoint.ADAPTER]
    assert sorted(f.name for f in tmp_path.iterdir()) == names
    tensors = load_file(tmp_path / checkpoint.ADAPTER)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == {
        "prompt_embeddings": ((P, WIDTH), torch.float32)
    }
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path)
    assert again.prefix_configs["default"].position_mode == mode
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(logits(again), logits(model))


def test_fold_changes_nothing_but_the_parameters() -> None:
    model = prefixed(prefix_projection=True, encoder_depth=2)
    before = logits(model)
    model.fold()
    assert torch.equal(logits(model), before)
    assert model.get_nb_trainable_parameters()[0] == P * WIDTH


@pytest.mark.parametrize("projection", [False, True], ids=["flat", "mlp"])
def test_training_goes_on_where_it_was(tmp_path: Path, projection: bool) -> None:
    """With the training state, the next gradients are the same bits, the MLP's too."""

    def grads(model: PrefixModel) -> dict[str, torch.Tensor]:
        model.eval()(tokens(), labels=tokens()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    model = prefixed(prefix_projection=projection, encoder_hidden_size=16)
    model.save_pretrained(tmp_path, training_state=True)
    again = grads(PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True))
    expected = grads(model)
    assert again.keys() == expected.keys()
    assert len(again) == (5 if projection else 1)
    assert all(torch.equal(again[n], g) for n, g in expected.items())


def test_training_state_of_another_prefix_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A kill between the renames, or a copied file, leaves a training state beside a prefix that is not its own."""
    saved(tmp_path, prefix_projection=True)
    old = (tmp_path / checkpoint.TRAINING).read_bytes()
    newer = prefixed(seed=1, prefix_projection=True)
    newer.save_pretrained(tmp_path)
    assert not (tmp_path / checkpoint.TRAINING).exists()
    (tmp_path / checkpoint.TRAINING).write_bytes(old)
    again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    assert "another prefix" in caplog.text
    assert torch.equal(logits(again), logits(newer))


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
def test_a_kill_leaves_the_old_prefix_or_the_new_one(
    tmp_path: Path, renames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Death after any number of renames: the folder loads, here and for training, as one of the two."""
    old, new = prefixed(0, prefix_projection=True), prefixed(1, prefix_projection=True)
    old.save_pretrained(tmp_path, training_state=True)
    done: list[str] = []

    def replace(source: Any, target: Any, real: Callable[..., None] = os.replace) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(Path(target).name)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            new.save_pretrained(tmp_path, training_state=True)
    assert len(list(tmp_path.iterdir())) == 4
    for is_trainable in (False, True):
        again = PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=is_trainable)
        assert any(torch.equal(logits(again), logits(m)) for m in (old, new))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / checkpoint.ADAPTER_CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def edit_tensor(tensor: torch.Tensor, name: str = checkpoint.KEY) -> Callable[[Path], None]:
    """PEFT's form: without metadata."""
    return lambda folder: save_file({name: tensor}, folder / checkpoint.ADAPTER)


def edit_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def edit_metadata(**metadata: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = {n: v if isinstance(v, str) else json.dumps(v) for n, v in metadata.items()}
        save_file({checkpoint.KEY: torch.zeros(P, WIDTH)}, folder / checkpoint.ADAPTER, values)

    return edit


HUGE = json.dumps({checkpoint.KEY: {"dtype": "F32", "shape": [1 << 30, 1 << 20], "data_offsets": [0, 1 << 52]}})
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda f: (f / checkpoint.ADAPTER_CONFIG).unlink(), "no such file"),
    "no tensors": (lambda f: (f / checkpoint.ADAPTER).unlink(), "no such file"),
    "not JSON": (edit_bytes(checkpoint.ADAPTER_CONFIG, lambda b: b[:-9]), "not JSON"),
    "not text": (edit_bytes(checkpoint.ADAPTER_CONFIG, lambda b: b"\xff\xfe\x80"), "not JSON"),
    "deep JSON": (edit_bytes(checkpoint.ADAPTER_CONFIG, lambda b: b"[" * 100_000), "not JSON"),
    "a list": (edit_bytes(checkpoint.ADAPTER_CONFIG, lambda b: b"[]"), "must be a JSON object, got 'list'"),
    "another method": (edit_config(peft_type="LORA"), "PREFIX_TUNING, got 'LORA'"),
    "another layer count": (edit_config(num_layers=4), "num_layers is 4, LlamaForCausalLM needs 3"),
    "another head count": (edit_config(num_attention_heads=4), "num_attention_heads is 4, LlamaForCausalLM needs 2"),
    "another head size": (edit_config(token_dim=32), "token_dim is 32, LlamaForCausalLM needs 16"),
    "encoder-decoder": (edit_config(num_transformer_submodules=2), "encoder-decoder"),
    "another base": (edit_config(base_model_name_or_path="somebody/other-135m"), "trained for somebody/other-135m"),
    "wrong width": (edit_tensor(torch.zeros(P, WIDTH + 2)), rf"need .*\({P}, {WIDTH}\).* has .*\({P}, {WIDTH + 2}\)"),
    "wrong length": (edit_tensor(torch.zeros(P + 1, WIDTH)), rf"has .*\({P + 1}, {WIDTH}\)"),
    "wrong name": (edit_tensor(torch.zeros(P, WIDTH), name="embedding"), "the file has {'embedding'"),
    "NaN": (edit_tensor(torch.full((P, WIDTH), torch.nan)), "finite"),
    "infinite": (edit_tensor(torch.full((P, WIDTH), torch.inf)), "finite"),
    "integers": (edit_tensor(torch.ones(P, WIDTH, dtype=torch.int32)), "floating-point"),
    "truncated": (edit_bytes(checkpoint.ADAPTER, lambda b: b[:-1]), "damaged"),
    "empty": (edit_bytes(checkpoint.ADAPTER, lambda b: b""), "damaged"),
    "a pickle": (edit_bytes(checkpoint.ADAPTER, lambda b: b"\x80\x04cos\nsystem\n."), "damaged"),
    "a huge header": (edit_bytes(checkpoint.ADAPTER, lambda b: b"\xff" * 8 + b), "damaged"),
    "a huge tensor": (
        edit_bytes(checkpoint.ADAPTER, lambda b: len(HUGE).to_bytes(8, "little") + HUGE.encode()),
        "damaged",
    ),
    "metadata not JSON": (edit_metadata(prefix_config="{"), "Expecting"),
    "metadata of another type": (edit_metadata(prefix_config=[1]), "list"),
    "an unknown field": (edit_metadata(prefix_config={"evil": 1}), "unknown fields"),
    "another model type": (edit_metadata(base={"model_type": "gpt2", "hidden_size": 32}), "trained for a base model"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_bad_files_are_refused(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    """One clear ValueError that names the file; the model in memory goes on as it was."""
    model = prefixed()
    model.base_model.config._name_or_path = "somebody/tiny"
    before = logits(model)
    damage(saved(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        model.load_prefix(tmp_path, "bad")
    assert str(tmp_path) in str(caught.value)
    assert model.prefix_names == ["default"]
    assert model.active_prefix == "default"
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("changes", [{"encoder_depth": 10**9}, {"encoder_hidden_size": 10**12}], ids=["depth", "width"])
def test_a_hostile_training_state_allocates_nothing(tmp_path: Path, changes: dict[str, int]) -> None:
    saved(tmp_path, prefix_projection=True)
    metadata = files.read_metadata(tmp_path / checkpoint.ADAPTER)
    metadata["prefix_config"] = json.dumps(json.loads(metadata["prefix_config"]) | changes)
    for name in (checkpoint.ADAPTER, checkpoint.TRAINING):
        save_file(load_file(tmp_path / name), tmp_path / name, metadata)
    with pytest.raises(ValueError, match="training_state"):
        PrefixModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)


def test_a_base_in_another_folder_is_the_same_base(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path)
    edit_config(base_model_name_or_path="somebody/tiny")(tmp_path)
    base = tiny("llama")
    for name, warned in (("/models/tiny", False), ("/models/other", True)):
        base.config._name_or_path = name
        PrefixModel.from_pretrained(base, tmp_path)
        assert ("is loaded into" in caplog.text) == warned


def test_failure_to_load_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    base = tiny("llama")
    attention = base.config._attn_implementation
    with pytest.raises(ValueError, match="no such file"):
        PrefixModel.from_pretrained(base, tmp_path)
    assert base.config._attn_implementation == attention
    assert all(p.requires_grad for p in base.parameters())


def test_neither_folder_nor_repository() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        PrefixModel.from_pretrained(tiny("llama"), "/nowhere/at/all")
    with pytest.raises(ValueError, match="within reach"):
        PrefixModel.from_pretrained(tiny("llama"), "nobody/nowhere")
