"""Folders with damaged, hostile or foreign states: one sentence, and the model goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hf.models import tiny
from tests.hf.test_folders import P, logits, trained, trainer


class Hostile:
    """Runs a command when it is unpickled by somebody who trusts the file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("false",)


def with_entry(name: str, value: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(trained("flat").state_dict() | {name: value}, folder / "state.pt")


def two_models(folder: Path) -> None:
    models = nn.ModuleDict({"a": trained("flat"), "b": trained("flat")})
    torch.save(models.state_dict(), folder / "state.pt")


def shard(name: str) -> Callable[[Path], None]:
    """An index that lists this file."""
    listed = {"weight_map": {"prefixes.default.embedding": name}}
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps(listed)) and None


def dcp(folder: Path) -> None:
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"")


def unshown(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


EXTRA = "prefixes.default._extra_state"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a whole Lightning module": (
        with_entry("callbacks", Hostile()),
        r"wants to run .*; torch.save\(model.st",
    ),
    "another model": (lambda f: torch.save({"x.weight": torch.ones(2)}, f / "a.ckpt"), r"neither a cart.*'x.weight'"),
    "weights of the base": (lambda f: tiny("llama").save_pretrained(f), r"has prefixes.NAME.embedding, this file has"),
    "two models": (two_models, r"prefixes of several models, at \['a.', 'b.'\]"),
    "two files": (lambda f: [torch.save({}, f / n) for n in ("a.pt", "b.ckpt")], r"has \['a.pt', 'b.ckpt'\]; name one"),
    "only an optimizer": (lambda f: torch.save({}, f / "optimizer.pt"), r"the folder has \['optimizer.pt'\]; what can"),
    "a training": (lambda f: trainer(trained("flat"), f, max_steps=2).train(), r"folders \['checkpoint-2'\] may be"),
    "torch's shards": (dcp, r"'pytorch_model_fsdp_0'\] is in shards .*\.dcp_to_torch_save"),
    "a shard outside": (shard("../model.safetensors"), "outside of its folder"),
    "a shard that is none": (shard("a\0b"), "outside of its folder"),
    "a shard of half a name": (shard("\ud800"), r"outside of its folder: \['\\ud800'"),
    "a shard of two lines": (shard("a\nb"), "outside of its folder"),
    "a long shard": (shard("a" * 999), "outside of its folder"),
    "no JSON": (with_entry(EXTRA, unshown(b"{")), "bytes of a JSON object"),
    "a list": (with_entry(EXTRA, unshown(b"[1]")), "bytes of a JSON object"),
    "an unknown field": (with_entry(EXTRA, unshown(b'{"backend": "evil"}')), r"unknown fields \['backend'\]"),
    "a bad value": (with_entry(EXTRA, unshown(b'{"mode": "evil"}')), "mode must be one of"),
    "a huge entry": (with_entry(EXTRA, torch.zeros(1 << 20, dtype=torch.uint8)), "bytes of a JSON object"),
    "integers": (with_entry("prefixes.default.embedding", torch.ones(P, 96, dtype=torch.int32)), "floating-point"),
    "NaN": (with_entry("prefixes.default.embedding", torch.full((P, 96), torch.nan)), "finite"),
    "another width": (with_entry("prefixes.default.embedding", torch.ones(P, 98)), r"need .*\(4, 96\)"),
    "a claimed size": (with_entry("prefixes.default.embedding", torch.ones(1).expand(1 << 20, 96)), "claims the size"),
    "half an MLP": (with_entry("prefixes.default.mlp.0.weight", torch.ones(16, 96)), "an MLP must have"),
    "a number for a matrix": (with_entry("prefixes.default.frozen", torch.ones(())), "index out of range"),
    "integers for a norm": (
        with_entry("base_model.model.norm.weight", torch.ones(32, dtype=torch.int32)),
        "norm.weight of the base model must hold finite numbers of torch.float32, has torch.int32",
    ),
    "a gate of another size": (with_entry("prefixes.default.gate", torch.ones(2, 4)), r"\(2, 4\)"),
    "a head that is none": (with_entry("heads.default.nothing.weight", torch.ones(2, 4)), "no head"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_files_are_refused(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    """One ValueError that says what was found; the model in memory goes on as it was, and nothing is run."""
    model = trained("flat")
    before = logits(model)
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        model.load_prefix(tmp_path, "bad")
    assert str(tmp_path) in str(caught.value)
    assert model.prefix_names == ["default"]
    assert torch.equal(logits(model), before)
