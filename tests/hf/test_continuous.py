"""generate_batch: transformers' continuous batching writes what ``generate`` writes for each prompt alone."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel
from tests.hf.models import spread, tiny

SIZES = {"max_position_embeddings": 128, "eos_token_id": 1}
# Later ones run continuous batching with their own attention functions alone.
TAKES_OTHERS = Version(transformers.__version__) < Version("5.18")
NEW = 12


def config(**options: Any) -> Any:
    return transformers.ContinuousBatchingConfig(block_size=16, num_blocks=32, max_batch_tokens=24, **options)


def served(name: str, **prefixes: dict[str, Any]) -> PrefixModel:
    torch.manual_seed(0)
    model = PrefixModel(spread(tiny(name, **SIZES)))
    for prefix, options in prefixes.items():
        model.add_prefix(prefix, PrefixConfig(**options))
        for parameter in model.prefixes[prefix].parameters():
            torch.nn.init.normal_(parameter.data)
    return model.eval()


def alone(model: PrefixModel, prompt: list[int], name: str | None) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, prefix_names=[name])
    return out[0, len(prompt) :].tolist()


PROMPTS = [[5, 6, 7], [5, 6, 7], list(range(8, 40)), [5, 6, 7], [9], list(range(8, 40)), [30, 31] * 6]
NAMES = ["a", "b", "a", None, "b", None, "a"]


if TAKES_OTHERS:

    @pytest.mark.parametrize("gated", [False, True], ids=["", "gate"])
    @pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gemma2", "gpt_oss"])
    def test_requests_have_their_prefixes(name: str, gated: bool) -> None:
        """Chunked prompts, equal prompts with different prefixes, sliding windows, softcap and sinks."""
        options: dict[str, Any] = {"gate": "zero", "position_mode": "none"} if gated else {}
        model = served(name, a={"num_virtual_tokens": 3} | options, b={"num_virtual_tokens": 9} | options)
        expected = [alone(model, prompt, prefix) for prompt, prefix in zip(PROMPTS, NAMES, strict=True)]
        found = model.generate_batch(PROMPTS, None, config(), prefix_names=NAMES, max_new_tokens=NEW)
        assert [output.generated_tokens for output in found.values()] == expected
        assert expected[0] != expected[1] != expected[3]
        # The model is as before: with its prefix, and without pages.
        assert alone(model, PROMPTS[0], "a") == expected[0]

    def test_the_active_prefix_shares_blocks_and_none_is_the_base_model() -> None:
        model = served("llama", a={"num_virtual_tokens": 3}, b={"num_virtual_tokens": 9})
        prompts = [list(range(8, 60)), list(range(8, 60)), list(range(8, 50))]
        found = model.generate_batch(prompts, None, config(), max_new_tokens=NEW)
        assert [output.generated_tokens for output in found.values()] == [alone(model, p, "b") for p in prompts]
        with model.disable_prefix():
            found = model.generate_batch(prompts, None, config(), max_new_tokens=NEW)
        assert [output.generated_tokens for output in found.values()] == [alone(model, p, None) for p in prompts]

    def test_nothing_of_a_call_is_left() -> None:
        """Neither in the model nor in its process, also where the call fails."""
        threads = set(threading.enumerate())
        model = served("llama", a={"num_virtual_tokens": 3})
        base, prompt = model._base(), list(range(8, 40))
        expected, hooks = alone(model, prompt, "a"), len(base.model._forward_pre_hooks)
        given = transformers.GenerationConfig(max_new_tokens=NEW)
        with pytest.raises(KeyError, match="1"):
            model.generate_batch([prompt], given, config(), prefix_names=["a"], progress={}.__getitem__)
        handle = base.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(RuntimeError, match="division by zero"):
            model.generate_batch([prompt], given, config(), prefix_names=["a"])
        handle.remove()
        (found,) = model.generate_batch([prompt], given, config(), prefix_names=["a"]).values()
        assert found.generated_tokens == expected
        assert (given.eos_token_id, given.max_new_tokens) == (None, NEW)
        assert base.config._attn_implementation == "prefix_attn"
        assert len(base.model._forward_pre_hooks) == hooks
        assert set(threading.enumerate()) <= threads
        assert model.generate_batch([], prefix_names=[]) == {}

    def test_outputs_that_are_too_long_are_refused() -> None:
        """Before the engine starts, which a table of positions that ends would stop."""
        model = served("gpt2", a={"num_virtual_tokens": 3})
        with pytest.raises(ValueError, match="max_new_tokens=126: input 1 has 2 tokens, and the model 125 positions"):
            model.generate_batch([[5]] + [[5, 6]], None, config(), prefix_names=[None, "a"], max_new_tokens=126)

    def test_outputs_have_20_tokens_where_nobody_says_how_many() -> None:
        """The default of ``generate``, which warns that it is one."""
        model, prompt = served("llama", a={"num_virtual_tokens": 3}), list(range(8, 40))
        model.base_model.config.eos_token_id = model.generation_config.eos_token_id = None
        longer = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=21)[0, len(prompt) :].tolist()
        (found,) = model.generate_batch([prompt], None, config()).values()
        assert found.generated_tokens == longer[:20]
        assert len(longer) == 21

    def test_blocks_of_an_engine_that_was_kept_are_not_used() -> None:
        """They have no prefix."""
        torch.manual_seed(0)
        base, prompt = spread(tiny("llama", **SIZES)).eval(), list(range(8, 60))
        given = transformers.GenerationConfig(max_new_tokens=2, eos_token_id=1)
        base.generate_batch([prompt], given, config(), persistent_manager=True, warmup=False)
        model = PrefixModel(base)
        model.add_prefix("a", PrefixConfig(num_virtual_tokens=3))
        torch.nn.init.normal_(next(model.prefixes["a"].parameters()).data)
        (found,) = model.eval().generate_batch([prompt], None, config(), max_new_tokens=NEW).values()
        assert found.generated_tokens == alone(model, prompt, "a")

    @pytest.mark.parametrize("prompts", [[[]], [[5], []], [5, 6], ["ab"], [[5, 10**6]], [[-1]], [[5.0]]])
    def test_what_is_no_prompt_is_refused(prompts: Any) -> None:
        """An empty prompt in a batch took its first token from its neighbour."""
        model = served("llama", a={"num_virtual_tokens": 3})
        with pytest.raises(ValueError, match=r"input \d (must be the tokens|has .* no token)"):
            model.generate_batch(prompts, None, config(), max_new_tokens=2)

    @pytest.mark.parametrize("rule", [{"num_beams": 2}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}])
    def test_rules_that_would_be_left_out_are_refused(rule: dict[str, Any]) -> None:
        model = served("llama", a={"num_virtual_tokens": 3})
        with pytest.raises(NotImplementedError, match=next(iter(rule))):
            model.generate_batch([[5, 6]], transformers.GenerationConfig(**rule), config())

    def test_what_no_prefix_would_reach_is_refused() -> None:
        model = served("llama", a={"num_virtual_tokens": 3}, infix={"num_virtual_tokens": 3, "mode": "infix"})
        with pytest.raises(NotImplementedError, match="infix is an infix, which generate_batch does not take"):
            model.generate_batch([[5, 6]], None, config(), max_new_tokens=2)
        with pytest.raises(ValueError, match="for each of 1 inputs"):
            model.generate_batch([[5, 6]], None, config(), prefix_names=["a", "a"])
        with pytest.raises(ValueError, match="for each of 1 inputs"):
            model.generate_batch([[5, 6]], None, config(), prefix_names="a")
        with pytest.raises(NotImplementedError, match="use_cuda_graph: which prefixes"):
            model.generate_batch([[5, 6]], None, config(use_cuda_graph=True), prefix_names=["a"], max_new_tokens=2)
        model.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="the attention function is 'sdpa'"):
            model.generate_batch([[5, 6]], None, config(), prefix_names=["a"], max_new_tokens=2)

else:

    def test_a_transformers_that_takes_no_prefix_is_refused_by_version() -> None:
        model = served("llama", a={"num_virtual_tokens": 3})
        with pytest.raises(NotImplementedError, match=rf"transformers {transformers.__version__} .* 5.17 takes others"):
            model.generate_batch([[5, 6]], prefix_names=["a"], max_new_tokens=2)
