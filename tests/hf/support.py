"""What works with which architecture, found by trying: the tables of docs/models.md.

    python -m tests.hf.support --write docs/models.md

One tiny random model per architecture. "yes": the results are those of the same prefix by concatenation, or of the same
model run in the plainest way. "refused": attaching raises, with the reason. "not in the model": the bare model fails
the same check. Anything else would be wrong, and an error here; tests/hf/test_support.py compares every row.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.attach.gradient_checkpointing import set_checkpointing
from tests.hf import quantised, test_encoder, test_encoder_decoder, test_gradients, vision
from tests.hf.models import (
    _LLAMA,
    _MULTI_HEAD,
    CACHE,
    CONFIGS,
    ENCODER_DECODERS,
    ENCODERS,
    VOCABULARY,
    tiny,
    tokens,
)
from tests.numerics import MODEL, close

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
    | {"num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1, "qk_rope_head_dim": 8},
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
_BARTS = {n: v for n, v in ENCODER_DECODERS["bart"].items() if n != "scale_embedding"}
MORE_ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "blenderbot": _BARTS,
    "blenderbot-small": _BARTS,
    "led": _BARTS,
    "mvp": _BARTS,
    "nllb-moe": _BARTS | {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "pegasus_x": _BARTS,
    "plbart": _BARTS,
}
MORE_ENCODERS: dict[str, dict[str, Any]] = {
    "albert": ENCODERS["bert"] | {"embedding_size": 16},
    "camembert": ENCODERS["roberta"],
    "data2vec-text": ENCODERS["roberta"],
    "deberta-v2": ENCODERS["bert"],
    "ernie": ENCODERS["bert"],
    "fnet": {n: v for n, v in ENCODERS["bert"].items() if "attention" not in n},
    "megatron-bert": ENCODERS["bert"],
    "mpnet": ENCODERS["bert"],
    "roberta-prelayernorm": ENCODERS["roberta"],
    "xlm-roberta-xl": ENCODERS["roberta"],
}
_BERTS = ("camembert", "roberta"), ("data2vec-text", "data2vec_text"), ("ernie", "ernie"), ("megatron-bert", "bert")
_BERTS += ("roberta-prelayernorm", "roberta_prelayernorm"), ("xlm-roberta-xl", "roberta")
test_encoder.PATHS |= {name: f"{stack}.encoder.layer.{{}}.attention.self" for name, stack in _BERTS}
test_encoder.FIRST |= {name: 2 for name, config in MORE_ENCODERS.items() if config is ENCODERS["roberta"]}
QUIET = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 5}


def prefixed(name: str) -> PrefixModel:
    return get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=P)).eval()


def batch(model: Any) -> dict[str, Tensor]:
    """A forward of ``model`` with a loss."""
    name = model.config.model_type
    if name in ENCODER_DECODERS:
        return test_encoder_decoder.inputs(name, 2) | {"labels": tokens(2, 5)}
    if name in ENCODERS:
        return test_encoder.inputs() | {"labels": test_encoder.LABELS}
    return {"input_ids": tokens(), "labels": tokens()}


def prompt(model: Any) -> dict[str, Any]:
    """What ``model`` generates from."""
    name = model.config.model_type
    if name not in ENCODER_DECODERS:
        return {"inputs": tokens(2, 9)} | QUIET
    given = {n: t for n, t in test_encoder_decoder.inputs(name, 2).items() if not n.startswith("decoder")}
    return given | {"do_sample": False, "suppress_tokens": [0, 1], "max_new_tokens": 5}


def padded() -> tuple[Tensor, Tensor]:
    """Token ids with three padding tokens on the left, and their mask."""
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.int64), tokens(2, 9)], dim=1)
    return ids, (ids != 0).long()


def left_padding(model: Any) -> None:
    ids, mask = padded()
    close(model(ids, attention_mask=mask).logits[:, 3:], model(ids[:, 3:]).logits, MODEL)


def right_padding(model: Any) -> None:
    if model.main_input_name != "input_ids":
        raise ValueError("sound has no padding")
    ids = tokens(2, 9)
    behind = torch.cat([ids, torch.full((2, 3), getattr(model.config, "pad_token_id", None) or 0)], dim=1)
    mask = (torch.arange(12) < 9).long().expand(2, -1)
    decoder = {"decoder_input_ids": tokens(2, 5)} if model.config.is_encoder_decoder else {}
    logits = model(behind, attention_mask=mask, **decoder).logits
    close(logits[:, :9] if logits.shape[1] == 12 else logits, model(ids, **decoder).logits, MODEL)


def no_cache(model: Any) -> None:
    assert torch.equal(model.generate(**prompt(model), use_cache=False), model.generate(**prompt(model)))


def beams(model: Any) -> None:
    options = prompt(model) | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(model.generate(**options, use_cache=False), model.generate(**options))


def static_cache(model: Any) -> None:
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**prompt(model), **static), model.generate(**prompt(model)))


def two_turns(model: Any) -> None:
    """The second goes on from the cache of a generate, which the caller made."""
    cache = DynamicCache(config=model.config)
    made = model.generate(tokens(2, 9), **{CACHE: cache}, **QUIET)
    ids = torch.cat([made, tokens(2, 3)], dim=1)
    close(model(ids[:, -4:], **{CACHE: cache}).logits, model(ids).logits[:, -4:], MODEL)


def assisted(model: Any) -> None:
    """Tokens proposed from the prompt, checked several at a time."""
    ids = tokens(1, 9).repeat(1, 2)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **QUIET), model.generate(ids, **QUIET))


def attentions(name: str) -> None:
    """Weights over [prefix ; sequence], that sum to 1 but for sinks; without the prefix those of the bare model."""
    model = prefixed(name)
    given: dict[str, Any] = {n: t[:1] for n, t in batch(model).items()} | {"output_attentions": True}
    with torch.no_grad():
        out, bare = model(**given), tiny(name, attn_implementation="eager")(**given)
        with model.disable_prefix():
            frozen = model(**given)
    for key in [key for key in bare if key.endswith("attentions") and bare[key]]:
        assert len(out[key]) == len(bare[key])
        for weights, plain, own in zip(out[key], frozen[key], bare[key]):
            close(plain, own, MODEL)
            assert weights.shape[-1] == own.shape[-1] + P
            assert (weights >= 0).all()
            total = weights.sum(-1)
            torch.testing.assert_close(total, total.clamp(max=1))


def packing(model: Any) -> None:
    """Two sequences in one row, told apart by positions that start again."""
    a, b = tokens(1, 5), tokens(1, 7)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(torch.cat([a, b], dim=1), position_ids=positions, use_cache=False).logits
    close(packed, torch.cat([model(a).logits, model(b).logits], dim=1), MODEL)


def checkpointing(name: str) -> None:
    """Both kinds; layer 0's gradient is in the prefix's."""
    model, given = prefixed(name).train(), batch(tiny(name))
    cache = {} if name in ENCODERS else {"use_cache": False}
    leaf = model.prefixes["default"].embedding

    def grad() -> Tensor:
        leaf.grad = None
        model(**given, **cache).loss.backward()
        assert leaf.grad is not None
        return leaf.grad.clone()

    expected = grad()
    for use_reentrant in (False, True):
        set_checkpointing(model, use_reentrant=use_reentrant)
        close(grad(), expected, MODEL)


def half_precision(name: str) -> None:
    """A bfloat16 model with a float32 prefix: its gradient is float32 and points where the float32 model's does."""
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = get_prefix_model(tiny(name).to(dtype), PrefixConfig(num_virtual_tokens=P, init="zero")).eval()
        leaf = model.prefixes["default"].embedding
        given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in batch(model).items()}
        model(**given).loss.backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        grads.append(leaf.grad.flatten())
    # mT5 alone is at 0.96, and plain concatenation no better; all others are above 0.99.
    assert torch.cosine_similarity(*grads, dim=0) > (0.9 if name == "mt5" else 0.97)


def files(name: str) -> None:
    model = prefixed(name)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PrefixModel.from_pretrained(tiny(name), folder).eval()
    assert torch.equal(again(**batch(model)).logits, model(**batch(model)).logits)


# Ways of running, which a bare model has too, and what a prefix adds.
RUNNING: dict[str, Callable[[Any], None]] = {
    "left padding": left_padding,
    "right padding": right_padding,
    "no cache": no_cache,
    "static cache": static_cache,
    "beam search": beams,
    "packing": packing,
    "two turns": two_turns,
    "assisted": assisted,
}
PREFIX: dict[str, Callable[[str], None]] = {
    "equals concatenation": test_gradients.test_every_layer_against_concatenation,
    "checkpointing": checkpointing,
    "bfloat16 model": half_precision,
    "files": files,
    "attentions": attentions,
}
slots = test_encoder_decoder.test_every_slot_against_concatenation
layers = test_encoder.test_every_layer_against_concatenation
SEQ2SEQ = ("right padding", "no cache", "static cache", "beam search")


class Table(NamedTuple):
    """Architectures of one kind, and what is tried with them."""

    configs: dict[str, dict[str, Any]]
    more: dict[str, dict[str, Any]]
    prefix: dict[str, Callable[[str], None]]
    running: dict[str, Callable[[Any], None]]

    @property
    def titles(self) -> list[str]:
        return [*self.prefix, *self.running]


TABLES = {
    "Decoders": Table(CONFIGS, MORE, PREFIX, RUNNING),
    "Encoder-decoders": Table(
        ENCODER_DECODERS,
        MORE_ENCODER_DECODERS,
        PREFIX | {"equals concatenation": partial(slots, case="all")},
        {title: RUNNING[title] for title in SEQ2SEQ},
    ),
    "Encoders": Table(
        ENCODERS,
        MORE_ENCODERS,
        PREFIX | {"equals concatenation": partial(layers, mode="shift")},
        {"right padding": right_padding},
    ),
}


def row(kind: str, name: str) -> list[str]:
    """The cells of one architecture, after its name."""
    table = TABLES[kind]
    try:
        prefixed(name)
    except NotImplementedError as error:
        return [f"refused: {error}", *[""] * (len(table.titles) - 1)]
    for check in table.prefix.values():
        check(name)
    return [*["yes"] * len(table.prefix), *(ways_of_running(name, check) for check in table.running.values())]


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
    lines = [
        "# Which models",
        "",
        "Written by `python -m tests.hf.support --write docs/models.md`, which tries every cell with transformers "
        f"{transformers.__version__}",
        "on a tiny random model; its docstring says what the words mean. A test compares each row with a new trial.",
        "",
    ]
    for kind, table in TABLES.items():
        titles = ["architecture", *table.titles]
        lines += [f"## {kind}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        lines += [f"| {' | '.join([name, *row(kind, name)])} |" for name in sorted(table.configs)]
        lines += [""]
    lines += ["## Images and text", "", vision.INTRODUCTION, "", *vision.table(), ""]
    lines += [
        "## Quantised bases",
        "",
        "On a CPU: errors relative to concatenation; larger where activations are rounded too.",
        "",
    ]
    lines += ["| base | by | errors | training |", "|---|---|---|---|", *quantised.rows(), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.hf.support", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, required=True, metavar="FILE", help="the page to write")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    for table in TABLES.values():
        table.configs.update(table.more)
    options.write.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
