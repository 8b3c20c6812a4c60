"""The operator alone: attention to a learned prefix that the whole batch shares.

Run it with ``python examples/prefix_attention.py``. It needs torch and nothing else. It shows the forward pass beside
the plain formula, a backward pass that reaches the prefix alone, a bank of prefixes from which every row picks its
own, and which backend runs a call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from prefix_attn import explain, prefix_attention

BATCH, QUERY_HEADS, KEY_HEADS, TOKENS, PREFIX, HEAD_SIZE = 8, 12, 4, 64, 20, 32


def main() -> None:
    """Four steps, each with its number on the left of what it prints."""
    torch.manual_seed(0)
    query = torch.randn(BATCH, QUERY_HEADS, TOKENS, HEAD_SIZE)
    key, value = torch.randn(2, BATCH, KEY_HEADS, TOKENS, HEAD_SIZE)  # grouped: three query heads share a key head

    # 1. The prefix has no batch dimension. The result is that of attention over [prefix ; sequence].
    prefix_key, prefix_value = torch.randn(2, KEY_HEADS, PREFIX, HEAD_SIZE)
    out = prefix_attention(query, key, value, prefix_key, prefix_value)  # causal, by default
    whole_key = torch.cat([prefix_key.expand(BATCH, -1, -1, -1), key], dim=2)
    whole_value = torch.cat([prefix_value.expand(BATCH, -1, -1, -1), value], dim=2)
    visible = torch.ones(TOKENS, PREFIX + TOKENS, dtype=torch.bool).tril(PREFIX)
    plain = F.scaled_dot_product_attention(query, whole_key, whole_value, attn_mask=visible, enable_gqa=True)
    difference = (out - plain).abs().max().item()
    print(f"1. {tuple(out.shape)}, at most {difference:.1e} from torch's attention on {BATCH} copies of the prefix")

    # 2. Train the prefix: queries, keys and values come from a frozen model and get no gradient.
    prefix_key.requires_grad_()
    prefix_value.requires_grad_()
    optimizer = torch.optim.Adam([prefix_key, prefix_value], lr=0.1)
    target, losses = torch.randn(QUERY_HEADS, 1, HEAD_SIZE), []
    for _ in range(50):
        loss = (prefix_attention(query, key, value, prefix_key, prefix_value) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"2. loss {losses[0]:.3f} -> {losses[-1]:.3f}; query has {'a' if query.grad is not None else 'no'} gradient")

    # 3. A bank of three prefixes: every row names one, and -1 is none.
    bank_key, bank_value = torch.randn(2, 3, KEY_HEADS, PREFIX, HEAD_SIZE)
    ids = torch.tensor([2, 0, -1, 1, 0, 2, -1, 1])
    mixed = prefix_attention(query, key, value, bank_key, bank_value, prefix_ids=ids)
    apart = 0.0
    for b, i in enumerate(ids.tolist()):
        prefix = (None, None) if i < 0 else (bank_key[i], bank_value[i])
        row = slice(b, b + 1)
        alone = prefix_attention(query[row], key[row], value[row], *prefix)
        apart = max(apart, (mixed[row] - alone).abs().max().item())
    print(f"3. rows with prefixes {ids.tolist()}: at most {apart:.1e} from each row alone")

    # 4. Which backend runs the call, and why not the others?
    print(f"4. {explain(query, key, value, prefix_key, prefix_value)}")


if __name__ == "__main__":
    main()
