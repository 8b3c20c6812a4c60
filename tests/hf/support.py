"""What works with which architecture, found by trying: the table of docs/models.md.

    python -m tests.hf.support --write docs/models.md

One tiny random model per architecture. "yes": the results are those of the same prefix by concatenation, or of the same
model run in the plainest way. "refused": attaching raises, with the reason. "not in the model": the bare model fails
the same check. Anything else would be wrong, and an error here; tests/hf/test_support.py compares every row.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.bridge import set_checkpointing
from tests.hf import test_gradients
from tests.hf.models import _LLAMA, _MULTI_HEAD, CONFIGS, VOCABULARY, tiny, tokens

P = 4
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_ROUTED = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_HEADS = _LLAMA | {"head_dim": 8}
MORE: dict[str, dict[str, Any]] = {
    "arcee": _LLAMA,
    "biogpt": _MULTI_HEAD | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layerdrop": 0.0},
    "cohere": _LLAMA,
    "cohere2": _LLAMA | {"sliding_window": 6},
    "deepseek_v3": _MULTI_HEAD
    | _ROUTED
    | _LATENT
    | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    "ernie4_5": _LLAMA,
    "exaone4": _LLAMA | {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "gemma": _HEADS,
    "glm": _HEADS,
    "glm4": _HEADS,
    "gpt_bigcode": _GPT | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "granite": _LLAMA,
    "helium": _HEADS,
    "hunyuan_v1_dense": _HEADS,
    "llama4_text": _HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 48},
    "mixtral": _LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1},
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "persimmon": _MULTI_HEAD,
    "phi": _MULTI_HEAD,
    "qwen2_moe": _LLAMA | _EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": _HEADS | _EXPERTS,
    "seed_oss": _HEADS | {"residual_dropout": 0.0},
    "starcoder2": _LLAMA | {"sliding_window": None},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "codegen": _GPT | {"rotary_dim": 4},
    "falcon": _MULTI_HEAD,
    "gptj": _GPT | {"rotary_dim": 4},
    "mamba": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2},
    "minimax": _HEADS,
    "mpt": {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
    "nemotron": _LLAMA,
    "stablelm": _LLAMA,
}
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}


def prefixed(name: str) -> PrefixModel:
    return get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P)).eval()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def padded() -> tuple[Tensor, Tensor]:
    """Token ids with three padding tokens on the left, and their mask."""
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.int64), tokens(2, 9)], dim=1)
    return ids, (ids != 0).long()


def left_padding(model: Any) -> None:
    ids, mask = padded()
    close(model(ids, attention_mask=mask).logits[:, 3:], model(ids[:, 3:]).logits)


def no_cache(model: Any) -> None:
    out = model.generate(tokens(2, 9), **QUIET)
    assert torch.equal(model.generate(tokens(2, 9), use_cache=False, **QUIET), out)


def beams(model: Any) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2} | QUIET
    out = model.generate(tokens(2, 9), **options)
    assert torch.equal(model.generate(tokens(2, 9), use_cache=False, **options), out)


def static_cache(model: Any) -> None:
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(
        model.generate(tokens(2, 9), **static, **QUIET),
        model.generate(tokens(2, 9), **QUIET),
    )


def packing(model: Any) -> None:
    """Two sequences in one row, told apart by positions that start again."""
    a, b = tokens(1, 5), tokens(1, 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(torch.cat([a, b], dim=1), position_ids=positions, use_cache=False).logits
    close(packed, torch.cat([model(a).logits, model(b).logits], dim=1))


def checkpointing(name: str) -> None:
    """Both kinds; layer 0's gradient is in the prefix's."""
    model, ids = prefixed(name).train(), tokens()
    leaf = model.prefixes["default"].embedding

    def grad() -> Tensor:
        leaf.grad = None
        model(ids, labels=ids, use_cache=False).loss.backward()
        assert leaf.grad is not None
        return leaf.grad.clone()

    expected = grad()
    for use_reentrant in (False, True):
        set_checkpointing(model, use_reentrant=use_reentrant)
        close(grad(), expected)


def half_precision(name: str) -> None:
    """A bfloat16 model with a float32 prefix: its gradient is float32 and points where the float32 model's does."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = get_prefix_model(tiny(name).to(dtype), PrefixConfig(num_virtual_tokens=P, init="zero")).eval()
        leaf = model.prefixes["default"].embedding
        model(tokens(), labels=tokens()).loss.backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        grads.append(leaf.grad.flatten())
    assert torch.cosine_similarity(*grads, dim=0) > 0.97


def files(name: str) -> None:
    model = prefixed(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PrefixModel.from_pretrained(tiny(name), folder).eval()
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


# Ways of running, which a bare model has too, and what a prefix adds.
RUNNING: dict[str, Callable[[Any], None]] = {
    "left padding": left_padding,
    "no cache": no_cache,
    "static cache": static_cache,
    "beam search": beams,
    "packing": packing,
}
PREFIX: dict[str, Callable[[str], None]] = {
    "equals concatenation": test_gradients.test_every_layer_against_concatenation,
    "checkpointing": checkpointing,
    "bfloat16 model": half_precision,
    "files": files,
}


def row(name: str) -> list[str]:
    """The cells of one architecture, after its name."""
    try:
        prefixed(name)
    except NotImplementedError as error:
        return [f"refused: {error}", *[""] * (len(PREFIX) + len(RUNNING) - 1)]
    for check in PREFIX.values():
        check(name)
    return [*["yes"] * len(PREFIX), *(ways_of_running(name, check) for check in RUNNING.values())]


def ways_of_running(name: str, check: Callable[[Any], None]) -> str:
    try:
        check(prefixed(name))
    except (AssertionError, TypeError, ValueError):
        try:
            check(tiny(name))
        except (AssertionError, TypeError, ValueError):
            return "not in the model"
        raise
    return "yes"


def page() -> str:
    """docs/models.md."""
    head = [
        "# Which models",
        "",
        "Written by `python -m tests.hf.support --write docs/models.md`, which tries every cell with transformers "
        f"{transformers.__version__}",
        "on a tiny random model; its docstring says what the words mean. A test compares each row with a new trial.",
        "",
    ]
    titles = ["architecture", *PREFIX, *RUNNING]
    rows = [" | ".join([name, *row(name)]) for name in sorted(CONFIGS)]
    return "\n".join([*head, f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {r} |" for r in rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.hf.support", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="the page to write")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    CONFIGS.update(MORE)
    options.write.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
