"""Files with the names and layouts of other libraries, and the prefix that is in them.

The layouts are those of adapters 1.3.0, Cartridges and the original PrefixTuning; what they make of a prefix is in
their own words: MLPs are run here as modules of torch, as theirs are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

P, WIDTH, HEADS = 4, 32, 4  # of the tiny models; GPT-2, BART and BERT have as many heads of keys as of queries


def table(slots: int, *, width: int = WIDTH, seed: int = 0) -> Tensor:
    """(P, 2 * slots * width)."""
    return torch.randn(P, 2 * slots * width, generator=torch.Generator().manual_seed(seed))


def mlp(slots: int, *, depth: int = 1, width: int = WIDTH, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Parameters named wte and control_trans, as adapters and the original name them; (P, 2 * slots * width)."""
    torch.manual_seed(seed)
    wte = nn.Embedding(P, WIDTH)
    hidden = [m for _ in range(depth - 1) for m in (nn.Linear(12, 12), nn.Tanh())]
    trans = nn.Sequential(nn.Linear(WIDTH, 12), nn.Tanh(), *hidden, nn.Linear(12, 2 * slots * width))
    module = nn.ModuleDict({"wte": wte, "control_trans": trans})
    with torch.no_grad():
        return dict(module.state_dict()), trans(wte(torch.arange(P)))


def adapters(
    folder: Path, model_type: str, model_class: str, sites: dict[str, dict[str, Tensor]], **changes: Any
) -> Path:
    """The folder of a prefix named "task": the pool, and the same tensors once more for each module that uses it."""
    options = {"architecture": "prefix_tuning", "prefix_length": P, "non_linearity": "tanh", "flat": False}
    options |= {"use_gating": False, "leave_out": [], "dropout": 0.0, "bottleneck_size": 12} | changes
    config = {"config": options, "hidden_size": WIDTH, "model_class": model_class, "model_name": ""}
    config |= {"model_type": model_type, "name": "task", "version": "adapters.1.3.0"}
    tensors = {}
    for path in ("model.layers.0.self_attn.prefix_tuning.pool", "model.layers.1.self_attn.prefix_tuning.pool"):
        for pool in (path, "model.prefix_tuning"):
            for site, part in sites.items():
                tensors |= {f"{pool}.prefix_tunings.task.{site}.{name}": t for name, t in part.items()}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_adapter.bin")
    return folder


def cartridge(path: Path, rows: Tensor, heads: int, *, frozen: int, old: bool = False) -> Path:
    """A cache of Cartridges' with the prefix ``rows`` (P, 2 * L * H * D), its first tokens frozen."""
    kv = rows.view(P, -1, heads, 8).permute(1, 2, 0, 3)[:, None]  # (2 * L, 1, H, P, D)
    first = "fixed" if old else "frozen"
    content = {}
    for name, part in ((first, kv[..., :frozen, :]), ("trainable", kv[..., frozen:, :])):
        for kind, layers in (("keys", part[::2]), ("values", part[1::2])):
            parameters = [nn.Parameter(t.clone()) for t in layers] if part.shape[3] else []
            content[f"{name}_{kind}"] = nn.ParameterList(parameters)
    torch.save(content, path)
    return path


def original(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], *, zipped: bool = True) -> Path:
    """What ``save_pretrained`` of the original module writes; before torch 1.6 not as a zip file."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["PrefixTuning"]} | config))
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    return folder


GPT2 = {"model_type": "gpt2", "n_layer": 3, "n_head": HEADS, "n_embd": WIDTH, "preseqlen": P}
BART = {
    "model_type": "bart",
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "decoder_attention_heads": HEADS,
    "preseqlen": P,
}
