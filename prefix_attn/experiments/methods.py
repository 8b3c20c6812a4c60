"""The methods that are compared. Each turns a base model into one that trains and runs like all others."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prefix_attn.experiments.plan import Run
from prefix_attn.hf.attach.slots import find_layers
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.load import is_encoder_decoder
from prefix_attn.hf.model import get_prefix_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# Methods that put something in front of the text or between input and output. An encoder-decoder has no such place.
CAUSAL = ("discrete", "embedding", "infix")


def require(runs: Iterable[Run]) -> None:
    """Check that all ``runs`` are possible, before the first of them takes hours.

    Raises:
        ModuleNotFoundError: some of ``runs`` are PEFT's methods, and PEFT is missing.
        NotImplementedError: a model has no place for what a run trains.
    """
    runs = list(runs)
    pairs = {model: is_encoder_decoder(model) for model in {run.model for run in runs}}
    for run in runs:
        if pairs[run.model] and run.method in CAUSAL:
            raise NotImplementedError(
                f"{run.model} is an encoder-decoder, and the method {run.method} for causal models"
            )
        if not pairs[run.model] and set(run.sites or ()) - {"decoder"}:
            raise NotImplementedError(f"{run.model} is causal, and has no attention at the sites {run.sites}")
    needed = sorted({run.method for run in runs} & {"peft", "lora"})
    if needed and importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError(f"the methods {needed} need PEFT: pip install peft, or leave them out with --methods")


def wrap(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run) -> Any:
    """Build the model of ``run.method``. The parameters that require a gradient are those to train."""
    base.requires_grad_(run.method == "full")
    if run.method in ("frozen", "full"):
        return base
    if run.method == "top2":
        try:
            layers = find_layers(base)[1]
        except NotImplementedError as error:
            raise NotImplementedError(f"top2: {error}") from None
        for layer in layers[-2:]:
            layer.requires_grad_(True)
        return base
    if run.method in ("peft", "lora"):
        return _peft(base, run)
    model = get_prefix_model(base, _config(tokenizer, run), tokenizer)
    if run.method == "discrete":
        model.requires_grad_(False)
    return model


def _config(tokenizer: PreTrainedTokenizerBase, run: Run) -> PrefixConfig:
    if run.method == "discrete":  # a prefix of the text's keys and values acts like the text in front
        ids = tokenizer(f"{run.init_text}\n", add_special_tokens=False)["input_ids"]
        return PrefixConfig(num_virtual_tokens=len(ids), init="text", init_token_ids=ids)
    assert run.virtual_tokens is not None
    return PrefixConfig(
        num_virtual_tokens=run.virtual_tokens,
        mode=run.method if run.method in ("embedding", "infix") else "kv",
        prefix_projection=run.method == "prefix-mlp",
        encoder_hidden_size=run.mlp_width,
        sites=run.sites,
        init=run.init or "random",
        init_text=run.init_text if run.init == "text" else None,
    )


def _peft(base: PreTrainedModel, run: Run) -> Any:
    from peft import LoraConfig, PrefixTuningConfig, get_peft_model

    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    if run.method == "peft":
        assert run.virtual_tokens is not None
        return get_peft_model(base, PrefixTuningConfig(task_type=task, num_virtual_tokens=run.virtual_tokens))
    assert run.rank is not None
    return get_peft_model(base, LoraConfig(task_type=task, r=run.rank, lora_alpha=2 * run.rank))


def sizes(model: Any, run: Run, base: int) -> dict[str, float]:
    """Count trained and stored parameters, also as shares of ``base``, the number in the base model."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # The output of the MLP is stored, the MLP is not.
    stored = model.prefixes["default"]().numel() if run.method == "prefix-mlp" else trained
    return {
        "trained_parameters": trained,
        "trained_share": trained / base,
        "stored_parameters": stored,
        "stored_share": stored / base,
    }
