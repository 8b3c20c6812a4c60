"""``PrefixAttention``: torch.nn.MultiheadAttention with a learned prefix, in its place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefix_attn.call import check_shape, is_readable
from prefix_attn.functional import prefix_attention


class PrefixAttention(nn.MultiheadAttention):
    r"""``torch.nn.MultiheadAttention`` whose queries also attend to P learned keys and values.

        out = Concat_h(softmax([Q_h Pk_h^T ; Q_h K_h^T + masks] / sqrt(D)) [Pv_h ; V_h]) W_o

    The whole batch shares the prefix. It is never expanded to the batch, and no mask hides it. Everything else is as in
    the original: arguments, masks (True = ignored), dropout, names in the state dict. With ``prefix_length`` = 0 the
    original's forward runs.

    * ``need_weights=True``, the default, computes all scores, as in the original. The weights have P more columns,
      before those of the sequence, and rows sum to 1: (B, S, P + T), or (B, H, S, P + T) for each head.
    * ``is_causal`` is a hint that ``attn_mask`` is the causal mask, as in the original. The mask's values may then go
      unread.
    * A query whose keys are all masked attends to the prefix alone. Without a prefix the original gives NaN or 0.
    * nn.TransformerEncoderLayer has a fused path that knows no prefix. It is not taken. nn.TransformerEncoder makes
      nested tensors of padded batches; they are padded again for the call.

    Args:
        embed_dim: E, of queries and outputs.
        num_heads: H; the head size D = E / H.
        prefix_length: P, at least 0.
        dropout: probability of dropping an attention weight in training, also of the prefix.
        bias: whether the projections have biases.
        add_bias_kv: add one learned key and value.
        add_zero_attn: add one key and value of zeros.
        kdim: features of ``key``, default E.
        vdim: features of ``value``, default E.
        batch_first: (B, S, E) instead of (S, B, E).
        device: of all parameters.
        dtype: of all parameters but the prefix.

    Attributes:
        prefix_key: (H, P, D) parameter. It is float32 beside half-precision projections: small updates would vanish in
            half precision.
        prefix_value: (H, P, D) parameter, like ``prefix_key``.

    Raises:
        ValueError: ``prefix_length`` is negative.
        TypeError: it is no int.

    Examples:
        >>> attention = PrefixAttention.from_multihead(nn.MultiheadAttention(64, 4, batch_first=True), prefix_length=10)
        >>> x = torch.randn(2, 8, 64)
        >>> attention(x, x, x, need_weights=False)[0].shape
        torch.Size([2, 8, 64])
        >>> [name for name, parameter in attention.named_parameters() if parameter.requires_grad]
        ['prefix_key', 'prefix_value']

    Source: Li and Liang 2021, section 4.2 (prefix activations of every layer).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        prefix_length: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """All parameters are trained; ``from_multihead`` trains the prefix alone."""
        if not isinstance(prefix_length, int):
            raise TypeError(f"prefix_length must be an int, got {type(prefix_length).__name__}")
        if prefix_length < 0:
            raise ValueError(f"prefix_length must be at least 0, got {prefix_length}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if prefix_length:
            # What nn.TransformerEncoderLayer and nn.TransformerEncoder ask before they run their fused kernel on our
            # weights in place of our forward. Our own forward asks whether there is an in_proj_weight.
            self._qkv_same_embed_dim = False
        weight = self.out_proj.weight
        exact = torch.promote_types(weight.dtype, torch.float32)
        prefix = torch.empty(num_heads, prefix_length, self.head_dim, device=weight.device, dtype=exact)
        self.prefix_key = nn.Parameter(prefix)
        self.prefix_value = nn.Parameter(torch.empty_like(prefix))
        self.reset_prefix()

    @classmethod
    def from_multihead(cls, mha: nn.MultiheadAttention, prefix_length: int) -> PrefixAttention:
        """A copy of ``mha`` with a prefix. All but the prefix is frozen. Dtype, device and mode stay the same.

        Args:
            mha: the trained module. It is not changed.
            prefix_length: P, at least 0.

        Raises:
            TypeError: ``mha`` is no nn.MultiheadAttention, or its class has its own forward.
        """
        if getattr(type(mha), "forward", None) is not nn.MultiheadAttention.forward:
            raise TypeError(f"mha must be a torch.nn.MultiheadAttention with its forward, got {type(mha).__name__}")
        copy = cls(
            mha.embed_dim,
            mha.num_heads,
            prefix_length,
            dropout=mha.dropout,
            bias=mha.in_proj_bias is not None,
            add_bias_kv=mha.bias_k is not None,
            add_zero_attn=mha.add_zero_attn,
            kdim=mha.kdim,
            vdim=mha.vdim,
            batch_first=mha.batch_first,
            device=mha.out_proj.weight.device,
            dtype=mha.out_proj.weight.dtype,
        )
        copy.load_state_dict(copy.state_dict() | mha.state_dict())
        copy.reset_prefix()
        copy.requires_grad_(False)
        copy.prefix_key.requires_grad_()
        copy.prefix_value.requires_grad_()
        return copy.train(mha.training)

    @property
    def prefix_length(self) -> int:
        """P."""
        return self.prefix_key.shape[1]

    @torch.no_grad()
    def reset_prefix(self) -> None:
        """Start from the keys and values that the projections make of P standard normal inputs.

        A LayerNorm before the attention gives such inputs, so the prefix starts where the module's own keys and values
        lie, and takes the share of the attention that P more tokens would (Li and Liang 2021, section 7.4: prefixes
        that start from real activations beat random ones). Call it again after loading other projections.
        """
        inputs = torch.randn(self.prefix_length, max(self.embed_dim, self.kdim, self.vdim)).to(self.out_proj.weight)
        _, key, value = self._project(*(inputs[:, :n] for n in (self.embed_dim, self.kdim, self.vdim)))
        self.prefix_key.copy_(key[0])
        self.prefix_value.copy_(value[0])

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend to [prefix ; sequence].

        Args:
            query: (B, S, E) with ``batch_first``, else (S, B, E); (S, E) is one sample.
            key: (B, T, kdim), (T, B, kdim) or (T, kdim).
            value: (B, T, vdim), (T, B, vdim) or (T, vdim).
            key_padding_mask: (B, T) or (T): bool, True = ignored, or floating, added to the scores.
            need_weights: also return the weights; slower.
            attn_mask: (S, T) or (B * H, S, T): bool, True = ignored, or floating, added to the scores.
            average_attn_weights: weights are the mean over heads.
            is_causal: ``attn_mask`` is the causal mask (query i sees keys up to i, whatever S and T are).

        Returns:
            (B, S, E), (S, B, E) or (S, E); and None or the weights, after dropout: (B, S, P + T) or (B, H, S, P + T),
            without B for one sample. ``add_bias_kv`` and ``add_zero_attn`` add their columns at the end.

        Raises:
            ValueError: a shape, or ``is_causal`` without ``attn_mask``.
            TypeError: a mask's dtype.
            NotImplementedError: nested tensors other than those of a self-attention without masks
                and weights.
        """
        if self.prefix_length == 0:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query.is_nested or key.is_nested or value.is_nested:
            plain = query is key is value and key_padding_mask is None and attn_mask is None and not need_weights
            return self._forward_nested(query, plain=plain), None
        self._check(query, key, value, key_padding_mask, attn_mask, is_causal)
        batched = query.dim() == 3
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]

        q, k, v = self._project(query, key, value)
        pk, pv = self._shared(self.prefix_key, self.bias_k), self._shared(self.prefix_value, self.bias_v)
        # torch's causal mask starts at the top left, the operator's ends at the bottom right: one where S = T.
        causal = is_causal and q.shape[2] == k.shape[2] and not need_weights
        key_mask, bias = _masks(key_padding_mask, None if causal else attn_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = _attend(q, k, v, pk.to(q.dtype), pv.to(q.dtype), key_mask, bias, dropout)
            weights = weights.roll(self.prefix_length - pk.shape[1], dims=-1)  # what _shared put first goes last
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            out = prefix_attention(q, k, v, pk, pv, key_mask=key_mask, bias=bias, is_causal=causal, dropout_p=dropout)
            weights = None
        return self._join(out, batched), weights

    def _forward_nested(self, tokens: Tensor, *, plain: bool) -> Tensor:
        """Self-attention over samples of different lengths: padded, masked, nested again.

        ``plain``: the call is what nn.TransformerEncoder makes, self-attention without masks and weights.
        """
        if not (plain and self.batch_first and tokens.layout == torch.strided):
            raise NotImplementedError(
                "nested tensors must be those of nn.TransformerEncoder: strided, batch_first, query, key and value "
                "the same tensor, no masks, need_weights=False"
            )
        lengths = [sample.shape[0] for sample in tokens.unbind()]
        padded = tokens.to_padded_tensor(0.0)
        steps = torch.arange(padded.shape[1], device=padded.device)
        padding = steps >= torch.tensor(lengths, device=padded.device)[:, None]
        out, _ = self.forward(padded, padded, padded, padding, need_weights=False)
        return torch.nested.as_nested_tensor([sample[:n] for sample, n in zip(out, lengths)])

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        """Raise ValueError for a shape or a hint without its mask, TypeError for a mask's dtype."""
        sizes = {"E": self.embed_dim, "Ek": self.kdim, "Ev": self.vdim}
        if query.dim() == 2:
            layout, sizes["B"] = "{} {}", 1
        else:
            layout = "B {} {}" if self.batch_first else "{} B {}"
        check_shape("query", query, layout.format("S", "E").split(), sizes)
        check_shape("key", key, layout.format("T", "Ek").split(), sizes)
        check_shape("value", value, layout.format("T", "Ev").split(), sizes)
        sizes["B*H"] = sizes["B"] * self.num_heads
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, "T" if query.dim() == 2 else "B T", sizes)
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, "S T" if attn_mask.dim() == 2 else "B*H S T", sizes)
        elif is_causal:
            raise ValueError("is_causal is a hint about attn_mask, which must be given with it, got None")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values of each head, (B, H, S or T, D): views, whatever the order of the inputs."""
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = separate if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = [F.linear(*one) for one in zip((query, key, value), weights, biases)]
        heads = [part.unflatten(-1, (self.num_heads, self.head_dim)) for part in parts]
        if query.dim() == 2:
            return [t.transpose(0, 1)[None] for t in heads]
        return [t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0, 3) for t in heads]

    def _join(self, heads: Tensor, batched: bool) -> Tensor:
        """Outputs of each head (B, H, S, D) in the order of the inputs, through the output projection."""
        out = heads.transpose(1, 2).flatten(2)
        if not batched:
            return self.out_proj(out[0])
        return self.out_proj(out if self.batch_first else out.transpose(0, 1))

    def _shared(self, prefix: Tensor, bias: Tensor | None) -> Tensor:
        """(H, _, D): all keys, or values, that the batch shares. ``add_bias_kv`` and ``add_zero_attn`` are such too."""
        parts = [] if bias is None else [bias.view(self.num_heads, 1, self.head_dim)]
        if self.add_zero_attn:
            parts.append(torch.zeros_like(prefix[:, :1]))
        return torch.cat([*parts, prefix], dim=1) if parts else prefix


def _check_mask(name: str, mask: Tensor, layout: str, sizes: dict[str, int]) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} must be bool or floating, got {mask.dtype}")
    check_shape(name, mask, layout.split(), sizes)


def _masks(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, query: Tensor, T: int
) -> tuple[Tensor | None, Tensor | None]:
    """torch's masks as the operator's: ``key_mask`` (B, T), True = visible, and ``bias`` (1 or B, H, S, T)."""
    B, H, S, _ = query.shape
    key_mask = bias = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = query.new_zeros(attn_mask.shape).masked_fill(attn_mask, -torch.inf)
        attn_mask = attn_mask.to(query.dtype)
        bias = attn_mask.expand(1, H, S, T) if attn_mask.dim() == 2 else attn_mask.view(B, H, S, T)
    if key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
        key_mask = ~key_padding_mask
    elif key_padding_mask is not None and _is_boolean(key_padding_mask):
        key_mask = key_padding_mask == 0
    elif key_padding_mask is not None:
        padding = key_padding_mask.to(query.dtype)[:, None, None].expand(B, H, S, T)
        bias = padding if bias is None else bias + padding
    return key_mask, bias


def _is_boolean(mask: Tensor) -> bool:
    """Whether it holds 0 and -inf alone, as nn.TransformerEncoderLayer makes of booleans.

    The operator is about twice as fast with a ``key_mask`` as with a ``bias``. Values are read only where that needs no
    device synchronisation.
    """
    return is_readable(mask) and not mask.requires_grad and bool(((mask == 0) | (mask == -torch.inf)).all())


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    key_mask: Tensor | None,
    bias: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """The operator where the weights (B, H, S, P + T) are wanted too. The prefix is not expanded here either."""
    query = query * query.shape[-1] ** -0.5
    sequence = query @ key.mT
    if bias is not None:
        sequence = sequence + bias
    if key_mask is not None:
        sequence = sequence.masked_fill(~key_mask[:, None, None], -torch.inf)
    scores = torch.cat([torch.einsum("bhsd,hpd->bhsp", query, prefix_key), sequence], dim=-1)
    weights = F.dropout(scores.softmax(-1), dropout)
    P = prefix_key.shape[1]
    out = torch.einsum("bhsp,hpd->bhsd", weights[..., :P], prefix_value) + weights[..., P:] @ value
    return out, weights
