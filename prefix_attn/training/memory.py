"""How much memory a training takes, before it runs.

The estimate adds up what is there at the peak, when the backward begins:

    loaded       the weights; on a CPU also the libraries, 0.45 GB
    optimizer    12 bytes for each trained number: its gradient and AdamW's two moments
    activations  what autograd keeps for the backward. It is counted in the forwards of one row of 8 and of 24 tokens
    a layer      the backward of a layer needs about as much again as the layer kept
    logits       those of ``head.AT_ONCE``, in four copies: the loss is computed on so many at a time

With gradient checkpointing only the input of each layer is kept, and one layer is computed again at a time. Attention
through the operator keeps no scores, so that activations grow with the number of tokens and not with its square.
Measured peaks are in docs/training.md.
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prefix_attn.hf.model import PrefixModel
from prefix_attn.training.evaluate import target_loss
from prefix_attn.training.head import AT_ONCE, base_of
from prefix_attn.training.positions import room_for_rows
from prefix_attn.training.tokens import IGNORED

LIBRARIES = 450_000_000  # of a process on a CPU that has imported torch and transformers
SHORT, LONG = 8, 24  # tokens of the rows that are counted
COPIES = 4  # of the logits, in float32
# What a process on a CPU takes for each byte of activations, without and with gradient checkpointing: glibc's heap has
# holes between what is kept. Measured on SmolLM2-135M: docs/training.md.
HOLES = {False: 1.5, True: 4.0}
SHARE = 0.7  # of the free memory is planned with


class Memory(NamedTuple):
    """Bytes that a training takes."""

    loaded: int  # when it begins
    fixed: int  # on top of that, whatever the batch is
    token: float  # on top of that, for each token of a batch, padding included

    def total(self, batch_size: int, length: int) -> int:
        """The peak for batches of ``batch_size`` rows of ``length`` tokens. Packed rows are padded to no length."""
        return int(self.loaded + self.fixed + self.token * batch_size * length)

    def longest(self, batch_size: int, free: int) -> int:
        """The longest rows for which ``free`` bytes suffice, when the model is loaded. At least 0."""
        return max(0, int((free - self.fixed) / (self.token * batch_size)))


def training_memory(model: Any, *, gradient_checkpointing: bool = False, bf16: bool = False) -> Memory:
    """What training ``model`` takes. Runs it twice on a short row.

    Args:
        model: one with a prefix, or any whose trainable parameters are to be trained, on its device.
        gradient_checkpointing: whether it will be on. It must be off now.
        bf16: whether products will be in bfloat16, by autocast.
    """
    base = base_of(model)
    config, weights = base.config.get_text_config(), _unique([*model.parameters(), *model.buffers()])
    short, long = (_kept(model, length, bf16=bf16) for length in (SHORT, LONG))
    token = (long - short) / (LONG - SHORT)
    fixed = max(0.0, short - token * SHORT)  # weights in bfloat16, and what depends on the prefix alone
    layers = config.num_hidden_layers * (2 if base.config.is_encoder_decoder else 1)
    working = token / layers
    if gradient_checkpointing:
        token = layers * config.hidden_size * base.get_input_embeddings().weight.element_size() + working
        fixed /= layers
    on_cpu = base.device.type == "cpu"
    token = (token + working) * (HOLES[gradient_checkpointing] if on_cpu else 1)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loaded = sum(weights.values()) + LIBRARIES * on_cpu
    return Memory(loaded, int(12 * trained + fixed + COPIES * 4 * AT_ONCE), token)


def longest_rows(model: PrefixModel, batch_size: int, *, gradient_checkpointing: bool, bf16: bool) -> tuple[int, str]:
    """The longest rows that can be trained on, and what it is that has no room for longer ones.

    Memory is not asked where several processes train: each would find another length.

    Raises:
        ValueError: there is no room for any.
    """
    room = room_for_rows(model)
    rooms = [] if room is None else [(room, "the model's positions")]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        needed = training_memory(model, gradient_checkpointing=gradient_checkpointing, bf16=bf16)
        rooms.append((needed.longest(batch_size, int(SHARE * free_bytes(model.device))), "memory"))
    length, why = min(rooms, default=(sys.maxsize, "nothing"))
    if length < 1:
        raise ValueError(f"there is no room ({why}) for {batch_size} rows: take a smaller batch, or another device")
    return length, why


def free_bytes(device: torch.device) -> int:
    """What can be allocated on ``device`` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # accelerate's dependency

    return psutil.virtual_memory().available


def give_back() -> None:
    """Return freed memory to the system, where the C library would keep it: glibc's heap has holes between live blocks.

    For a training with gradient checkpointing that is half of the peak.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _kept(model: Any, length: int, *, bf16: bool) -> int:
    """Bytes that autograd keeps for the backward of a row of ``length`` tokens, the weights themselves excluded."""
    device = base_of(model).device
    ids = torch.ones(1, length, dtype=torch.int64, device=device)
    labels = ids.clone()
    labels[:, 0] = IGNORED
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    weights, found = _unique([*model.parameters(), *model.buffers()]), dict[int, int]()

    def keep(tensor: Tensor) -> Tensor:
        found.update(_unique([tensor]))
        return tensor

    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with (
            torch.random.fork_rng(),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            target_loss(model, batch)
    finally:
        for module, training in modes:
            module.training = training
    return sum(size for place, size in found.items() if place not in weights)


def _unique(tensors: list[Tensor]) -> dict[int, int]:
    """The sizes of the storages of ``tensors`` by where they are."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
