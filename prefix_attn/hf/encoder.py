"""The parameters of one prefix: P virtual key/value pairs for each of L layers.

There are two parametrisations (Li and Liang 2021, section 4.3). *flat* trains the keys and values themselves. *mlp*
trains a small table and an MLP that turns it into keys and values, and is folded into *flat* after training. Both run
once per forward of the model, not once per sample.
"""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# Of the MLP: what keeps shapes and has no parameters.
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "identity": nn.Identity,
    "leaky_relu": nn.LeakyReLU,
    "mish": nn.Mish,
    "relu": nn.ReLU,
    "selu": nn.SELU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}
UNSHOWN = "_extra_state"  # torch's name of what a state_dict holds besides parameters and buffers


class PrefixEncoder(nn.Module):
    """Makes the keys and values of all layers from its parameters, which are float32 in every model.

    ``embedding`` has PEFT's layout. Without an MLP it is (P, 2 * L * H * D): a row viewed as (2 * L, H, D) holds the
    key of layer l at 2 * l and its value at 2 * l + 1. With an MLP it is (P, H * D). Any module that turns
    ``embedding`` into the flat layout can take the MLP's place.

    The first tokens can be ``frozen``: F rows in the flat layout that are not trained, bypass the MLP and get no
    dropout. ``embedding`` then has rows for the other P - F. A ``gate`` (L, query heads) is the factor of each query
    head's attention to the prefix, and starts at 0.

    ``unshown`` holds the fields of the prefix's configuration that the shapes do not tell. If there are any,
    ``state_dict`` has them as an entry of numbers, because files of tensors hold nothing else.

    Examples:
        >>> encoder = PrefixEncoder(num_virtual_tokens=4, num_layers=3, num_heads=2, head_dim=8)
        >>> encoder().shape  # (2 * layers, heads, tokens, head size): key, value, key, ...
        torch.Size([6, 2, 4, 8])
    """

    frozen: nn.Parameter | None
    gate: nn.Parameter | None

    def __init__(
        self,
        num_virtual_tokens: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        *,
        hidden_size: int | None = None,
        depth: int = 1,
        activation: str = "tanh",
        dropout: float = 0.0,
        num_frozen_tokens: int = 0,
        gate_heads: int | None = None,
    ) -> None:
        """Sizes P, L, H (key/value heads), D and F.

        ``hidden_size`` = None is flat, ``depth`` counts hidden layers, each with an ``activation`` of ACTIVATIONS;
        ``gate_heads`` are the query heads to gate.
        """
        super().__init__()
        self.register_state_dict_post_hook(_tell)
        self.register_load_state_dict_pre_hook(_compare)
        self.num_layers, self.num_heads, self.head_dim = num_layers, num_heads, head_dim
        width = 2 * num_layers * num_heads * head_dim
        self.dropout = nn.Dropout(dropout)
        self.mlp: nn.Module | None = None
        self.unshown: dict[str, Any] = {}
        # A parameter, as in PEFT: DistributedDataParallel sends buffers in every forward.
        rows = nn.Parameter(torch.zeros(num_frozen_tokens, width), requires_grad=False)
        self.register_parameter("frozen", rows if num_frozen_tokens else None)
        self.gate = None if gate_heads is None else nn.Parameter(torch.zeros(num_layers, gate_heads))
        trained = num_virtual_tokens - num_frozen_tokens
        if hidden_size is None:
            self.embedding = nn.Parameter(torch.zeros(trained, width))
            return
        self.embedding = nn.Parameter(torch.randn(trained, num_heads * head_dim))
        sizes = [num_heads * head_dim, *[hidden_size] * depth]
        hidden = [m for n, k in pairwise(sizes) for m in (nn.Linear(n, k), ACTIVATIONS[activation]())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(hidden_size, width))

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return self.num_frozen_tokens + self.embedding.shape[0]

    @property
    def num_frozen_tokens(self) -> int:
        """F."""
        return 0 if self.frozen is None else self.frozen.shape[0]

    def prompt_embeddings(self) -> Tensor:
        """(P, 2 * L * H * D) float32: what is stored on disk."""
        return self._after_frozen(self._trained())

    def forward(self) -> Tensor:
        """(2 * L, H, P, D) float32, contiguous: key and value of layer l at 2 * l and 2 * l + 1."""
        flat = self._after_frozen(self.dropout(self._trained()))
        return flat.view(-1, 2 * self.num_layers, self.num_heads, self.head_dim).permute(1, 2, 0, 3).contiguous()

    @torch.no_grad()
    def set_kv(self, kv: Tensor) -> None:
        """Start from ``kv`` (2 * L, H, P, D).

        The MLP is fitted in closed form: its last layer's bias becomes the mean over its rows, its weight the least
        squares solution of smallest norm for the rest: exact while it has no more rows than hidden units. The layers
        below keep their random start, so the rows stay apart and every parameter has a gradient.
        """
        rows = kv.permute(2, 0, 1, 3).reshape(kv.shape[2], -1).to(self.embedding)
        if self.frozen is not None:
            self.frozen.copy_(rows[: self.num_frozen_tokens])
            rows = rows[self.num_frozen_tokens :]
        if self.mlp is None:
            self.embedding.copy_(rows)
            return
        assert isinstance(self.mlp, nn.Sequential)
        last = self.mlp[-1]
        assert isinstance(last, nn.Linear)
        hidden = self.mlp[:-1](self.embedding)
        mean = rows.mean(0)
        weight = torch.linalg.lstsq(hidden.double(), (rows - mean).double(), driver="gelsd").solution
        last.bias.copy_(mean)
        last.weight.copy_(weight.T)

    def fold(self) -> None:
        """Replace the MLP by the prefix that it makes (Li and Liang 2021, section 4.3)."""
        if self.mlp is not None:
            self.embedding = nn.Parameter(self._trained().detach().clone(), self.embedding.requires_grad)
            self.mlp = None

    def requires_grad_(self, requires_grad: bool = True) -> PrefixEncoder:
        """As of any module, but what is frozen stays so."""
        super().requires_grad_(requires_grad)
        if self.frozen is not None:
            self.frozen.requires_grad_(False)
        return self

    def _trained(self) -> Tensor:
        """(P - F, 2 * L * H * D): the rows that are not frozen."""
        return self.embedding if self.mlp is None else self.mlp(self.embedding)

    def _after_frozen(self, rows: Tensor) -> Tensor:
        return rows if self.frozen is None else torch.cat([self.frozen.detach(), rows])


def _tell(encoder: PrefixEncoder, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Add to a state_dict what its shapes do not show."""
    if encoder.unshown:
        told = json.dumps(encoder.unshown).encode()
        state_dict[prefix + UNSHOWN] = torch.tensor(list(told), dtype=torch.uint8)


def _compare(
    encoder: PrefixEncoder,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Refuse a state_dict of another kind of prefix with the same shapes."""
    told = state_dict.pop(prefix + UNSHOWN, None)
    here = json.loads(json.dumps(encoder.unshown))
    if told is not None and read_unshown(told) != here:
        name = prefix.rstrip(".") or "this"
        error_msgs.append(f"{name} is a prefix with {here}, the state is of one with {read_unshown(told)}")


def read_unshown(entry: Any) -> dict[str, Any]:
    """What the entry ``UNSHOWN`` of a state_dict says.

    Raises:
        ValueError: it says nothing of that kind.
    """
    if not isinstance(entry, Tensor) or entry.dim() != 1 or entry.numel() > 1 << 16:
        raise ValueError(f"{UNSHOWN} must be the bytes of a JSON object")
    try:
        told = json.loads(bytes(entry.to("cpu", torch.uint8).tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{UNSHOWN} must be the bytes of a JSON object ({error})") from None
    if not isinstance(told, dict):
        raise ValueError(f"{UNSHOWN} must be the bytes of a JSON object, got {type(told).__name__!r}")
    return told
