"""A frozen transformers model made ready for prefixes, and what its own keys and values look like."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefix_attn.hf import attention
from prefix_attn.hf.attention import STATE, Capture, PrefixState
from prefix_attn.hf.banks import Rows, grow
from prefix_attn.hf.config import PrefixConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Attachment:
    """``base``, frozen, its attention routed through ours: the way for a prefix into each of its layers.

    ``layers``, ``heads`` and ``head_dim`` are those of keys and values, as the attention layers really use them.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        """Attach.

        Raises:
            NotImplementedError: the model's attention cannot be served; ``base`` is unchanged then.
        """
        self.base = base
        self._name = type(base).__name__
        self._now = _Now()
        self.layers = base.config.get_text_config().num_hidden_layers
        if base.config.is_encoder_decoder:
            raise NotImplementedError(
                f"{self._name} is an encoder-decoder model; this version serves decoder-only models"
            )
        if not base._can_set_attn_implementation():
            raise NotImplementedError(
                f"{self._name} computes attention outside transformers' AttentionInterface: no prefix can enter it"
            )
        self._before = base.config._attn_implementation, [p.requires_grad for p in base.parameters()]
        # The state enters above the checkpointed layers: what is recomputed in backward was captured together with its
        # arguments.
        self._backbone = backbone(base)
        self._hook = self._backbone.register_forward_pre_hook(self._inject, with_kwargs=True)
        base.set_attn_implementation(attention.NAME)
        try:
            self.heads, self.head_dim = self._probe()
        except Exception:
            self.remove()
            raise
        base.requires_grad_(False)
        self._checkpointed = [m for m in base.modules() if hasattr(m, "gradient_checkpointing")]

    def remove(self) -> None:
        """Leave ``base`` as it was."""
        implementation, trainable = self._before
        self._hook.remove()
        self.base.set_attn_implementation(implementation)
        for parameter, flag in zip(self.base.parameters(), trainable):
            parameter.requires_grad_(flag)

    @contextmanager
    def running(self, kv: Tensor, config: PrefixConfig, rows: Rows | None = None) -> Iterator[None]:
        """Forwards of ``base`` within the context attend to prefixes.

        Args:
            kv: a prefix (2 * L, H, P, D), or a bank (N, 2 * L, H, P, D).
            config: of the prefix; of any in a bank.
            rows: of a bank.

        Raises:
            RuntimeError: on leaving, if a layer did not ask for it. There is no silent "no prefix".
        """
        bridge = None
        if kv.requires_grad and torch.is_grad_enabled() and self._is_reentrant():
            leaf = kv.detach().requires_grad_()
            kv, bridge = leaf, (kv, leaf)
        shift = config.shift if rows is None else rows.shifts
        state = PrefixState(kv, shift=shift, backend=config.backend, rows=rows)
        with self._set(state, bridge):
            yield
        if len(state.served) != self.layers:
            missing = sorted(set(range(self.layers)) - state.served)
            raise RuntimeError(f"{self._name} did not hand the prefix to layers {missing}")

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Forwards of ``base`` within the context are those of the frozen model."""
        with self._set(None, None):
            yield

    def capture(self, tokens: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys (rotated to positions 0..T - 1) and values of each layer for ``tokens``: (1, H, T, D).

        ``tokens`` are ids (T,), or input embeddings (T, hidden size), which the gradients of keys and values reach. The
        model is in eval mode meanwhile: no dropout, and no checkpointing, whose reentrant kind would cut the graph.
        """
        state = Capture()
        gradients = torch.set_grad_enabled(tokens.requires_grad and torch.is_grad_enabled())
        with evaluating(self.base), gradients, self._set(state, None):
            if tokens.is_floating_point():
                self._backbone(inputs_embeds=tokens[None], use_cache=False)
            else:
                device = self.base.get_input_embeddings().weight.device
                self.base(input_ids=tokens[None].to(device), use_cache=False)
        return state.layers

    def kv(self, tokens: Tensor) -> Tensor:
        """What ``capture`` gives, as a prefix: (2 * L, H, T, D), key and value of layer l at 2 * l and 2 * l + 1."""
        layers = self.capture(tokens)
        return torch.stack([t[0] for layer in range(self.layers) for t in layers[layer]])

    @contextmanager
    def _set(self, state: PrefixState | Capture | None, bridge: tuple[Tensor, Tensor] | None) -> Iterator[None]:
        before = self._now.state, self._now.bridge
        self._now.state, self._now.bridge = state, bridge
        try:
            yield
        finally:
            self._now.state, self._now.bridge = before

    def _probe(self) -> tuple[int, int]:
        """(heads, head size) of the keys and values that reach our attention function for one token."""
        kv = self.capture(torch.zeros(1, dtype=torch.int64))
        if missing := sorted(set(range(self.layers)) - kv.keys()):
            raise NotImplementedError(f"layers {missing} of {self._name} do not call transformers' AttentionInterface")
        shapes = {(k.shape[1], k.shape[3], v.shape[3]) for k, v in kv.values()}
        heads, size, value_size = next(iter(shapes))
        if len(shapes) > 1 or size != value_size:
            raise NotImplementedError(
                f"{self._name} has layers of different (heads, key, value size): {sorted(shapes)}"
            )
        return heads, size

    def _inject(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        state, bridge = self._now.state, self._now.bridge
        if state is None:
            return None
        kwargs = kwargs | {STATE: state}
        if len(args) > 1:
            raise NotImplementedError(f"{self._name} hands more than input_ids to its backbone by position")
        if args:
            kwargs["input_ids"] = args[0]
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = positions(kwargs)
        shift = state.shift
        if isinstance(shift, Tensor):
            shift = grow(shift, _tokens(kwargs).shape[0])
        kwargs["position_ids"] = kwargs["position_ids"] + shift
        if bridge is not None:
            embeddings = kwargs.get("inputs_embeds")
            if embeddings is None:
                embeddings = self.base.get_input_embeddings()(kwargs["input_ids"])
            kwargs |= {"input_ids": None, "inputs_embeds": _Bridge.apply(embeddings, *bridge)}
        return (), kwargs

    def _is_reentrant(self) -> bool:
        """Whether the next forward checkpoints with ``use_reentrant=True``."""
        for module in self._checkpointed:
            if module.gradient_checkpointing and module.training:
                function = getattr(module, "_gradient_checkpointing_func", None)
                return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
        return False


class FromEmbeddings(nn.Module):
    """What stands in the place of a prefix's MLP where input embeddings are trained: the frozen model itself."""

    def __init__(self, attachment: Attachment) -> None:
        """Through the model of ``attachment``."""
        super().__init__()
        self._attachment = attachment

    def forward(self, embeddings: Tensor) -> Tensor:
        """(P, hidden size) -> (P, 2 * L * H * D) float32: the model's own keys and values for them."""
        dtype = self._attachment.base.get_input_embeddings().weight.dtype
        return self._attachment.kv(embeddings.to(dtype)).permute(2, 0, 1, 3).flatten(1).float()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` is in eval mode within the context, and each of its modules as it was after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def backbone(base: PreTrainedModel) -> nn.Module:
    """The module that holds the list of layers and runs them.

    Raises:
        NotImplementedError: there is none.
    """
    layers = base.config.get_text_config().num_hidden_layers
    for module in base.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == layers:
                return module
    raise NotImplementedError(f"{type(base).__name__} has no list of {layers} layers")


def initial_kv(attachment: Attachment, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """(2 * L, H, P, D) float32: the model's own keys and values of P tokens, or zeros."""
    kv = attachment.kv(_initial_ids(attachment.base, config, tokenizer)).float().cpu()
    return torch.zeros_like(kv) if config.init == "zero" else kv


def initial_embeddings(
    base: PreTrainedModel, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None
) -> Tensor:
    """(P, hidden size) float32: the model's own input embeddings of P tokens, or zeros."""
    module = base.get_input_embeddings()
    with torch.no_grad():
        embeddings = module(_initial_ids(base, config, tokenizer).to(module.weight.device)).float()
    return torch.zeros_like(embeddings) if config.init == "zero" else embeddings.clone()


def _initial_ids(base: PreTrainedModel, config: PrefixConfig, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """(P,): the tokens that a prefix starts from."""
    P = config.num_virtual_tokens
    vocabulary = base.get_input_embeddings().weight.shape[0]
    if config.init != "text":
        ids = torch.randint(vocabulary, (P,))
        # The first position is where models leave the attention that they have no use for, and they know it by its bos.
        # SmolLM2 on E2E, P = 10, four seeds: 3.25 without prefix, 3.24 to 3.31 with bos, 3.30 to 3.51 without it.
        bos = getattr(base.config.get_text_config(), "bos_token_id", None)
        if isinstance(bos, int) and 0 <= bos < vocabulary:
            ids[0] = bos
        return ids
    ids = config.init_token_ids
    if ids is None:
        if tokenizer is None:
            raise ValueError("init_text needs the tokenizer: get_prefix_model(base, config, tokenizer=...)")
        ids = tokenizer(config.init_text, add_special_tokens=False)["input_ids"]
    if not len(ids) or not all(0 <= i < vocabulary for i in ids):
        raise ValueError(f"the initial text must have tokens in 0..{vocabulary - 1}, got {list(ids)[:8]}")
    return torch.tensor(ids).repeat(-(-P // len(ids)))[:P]


def positions(kwargs: dict[str, Any]) -> Tensor:
    """Positions of the new tokens: from a 2-D attention mask (padding takes none), else after those in the cache."""
    tokens = _tokens(kwargs)
    length, mask = tokens.shape[1], kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    cache = kwargs.get("past_key_values")
    past = 0 if cache is None else cache.get_seq_length()
    return torch.arange(length, device=tokens.device)[None] + past


def _tokens(kwargs: dict[str, Any]) -> Tensor:
    """(B, S) ids or (B, S, width) embeddings, whichever the backbone was given."""
    embeddings = kwargs.get("inputs_embeds")
    return kwargs["input_ids"] if embeddings is None else embeddings


class _Now(threading.local):
    """What the forwards of this thread run with: others may run the same model with other prefixes meanwhile."""

    state: PrefixState | Capture | None = None
    bridge: tuple[Tensor, Tensor] | None = None

    def __reduce__(self) -> tuple[type[_Now], tuple[()]]:
        """A copy of the model runs nothing yet."""
        return type(self), ()


class _Bridge(torch.autograd.Function):
    """Hands the gradient that gathered on a leaf to the graph that made the leaf's values.

    Reentrant checkpointing runs a backward inside the backward for each layer. Through a shared graph (the MLP, the
    view per layer) the first would free what the second needs; so layers see a detached leaf, and this node, whose
    place below all layers makes it run last, passes the leaf's gradient on. It also makes the hidden states require a
    gradient, without which reentrant checkpointing drops the prefix's.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, kv: Tensor, leaf: Tensor) -> Tensor:
        """The embeddings, unchanged."""
        ctx.leaf = leaf
        return embeddings.view_as(embeddings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradient of the embeddings where wanted, and the leaf's."""
        return grad if ctx.needs_input_grad[0] else None, ctx.leaf.grad, None
