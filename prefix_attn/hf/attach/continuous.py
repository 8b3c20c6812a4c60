"""Prefixes in transformers' continuous batching, whose batches are packed sequences with paged keys and values.

The prefix takes no pages: it is read from a bank by ``prefix_attention_varlen``. The engine runs the model in a thread
of its own, so a hook on the stack hands the bank over, not the context of the caller.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, ContinuousBatchingConfig, PreTrainedModel

from prefix_attn.functional import prefix_attention_varlen
from prefix_attn.hf.attach.attention import NAME
from prefix_attn.hf.attach.banks import make_bank
from prefix_attn.hf.attach.layout import Layout
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.encoder import PrefixEncoder
from prefix_attn.hf.rules import check_rules

PAGED_NAME = f"paged|{NAME}"
PAGED = "prefix_paged"  # the keyword argument that brings the prefixes
NEW_TOKENS = 20  # where nobody says how many: as generate
BY_PYTHON = ("use_cuda_graph", "use_async_batching", "varlen_compile_config", "decode_compile_config")


class Bank(NamedTuple):
    """The prefixes of one engine."""

    stack: PreTrainedModel
    names: list[str]
    layers: dict[nn.Module, tuple[Tensor, Tensor]]  # (N, H, P, D) of each attention module
    lengths: Tensor  # (N,)
    shifts: Tensor  # (N + 1,); the last is that of rows without a prefix
    gates: dict[nn.Module, Tensor] | None  # (N, Hq) of each attention module
    backend: str


class Paged(NamedTuple):
    """The prefixes of one batch. ``served`` are the modules that took theirs."""

    bank: Bank
    ids: Tensor  # (sequences,)
    served: set[nn.Module]


def bank_of(prefixes: Mapping[str, tuple[PrefixEncoder, PrefixConfig]], layout: Layout, device: torch.device) -> Bank:
    """The bank of ``prefixes``, which all have the ``layout`` of one of them.

    Raises:
        NotImplementedError: for prefixes that see only some columns, or that have another length in each layer.
    """
    for name, (_, config) in prefixes.items():
        if config.mode == "infix" or config.has_lengths:
            kind = "an infix" if config.mode == "infix" else "a prefix with lengths of its own in each layer"
            raise NotImplementedError(f"{name} is {kind}, which generate_batch does not take; generate does")
    with torch.no_grad():
        kvs = [encoder() for encoder, _ in prefixes.values()]
    shifts = torch.tensor([*(config.shift for _, config in prefixes.values()), 0], device=device)
    lengths = torch.tensor([kv.shape[2] for kv in kvs], device=device)
    parts = make_bank(kvs).unbind(1)
    modules = [slot.module for slot in layout.slots]
    layers = dict(zip(modules, zip(parts[::2], parts[1::2], strict=True), strict=True))
    gates = [encoder.gate.detach() for encoder, _ in prefixes.values() if encoder.gate is not None]
    by_module = dict(zip(modules, torch.stack(gates).unbind(1), strict=True)) if gates else None
    (stack,) = layout.shifted
    return Bank(stack, list(prefixes), layers, lengths, shifts, by_module, layout.config.backend)


def generate_batch(
    base: PreTrainedModel,
    bank: Bank | None,
    inputs: Sequence[Sequence[int]],
    names: Sequence[str | None],
    *,
    generation_config: Any = None,
    continuous_batching_config: ContinuousBatchingConfig | None = None,
    max_new_tokens: int | None = None,
    record_timestamps: bool = False,
    progress: Callable[[int], object] | None = None,
    rooms: Sequence[int] = (),
) -> dict[str, Any]:
    """Outputs of ``base`` for ``inputs``, each with its prefix: by request, in the order of ``inputs``.

    ``rooms`` are the positions that a model with a table of them has for each prompt and its output.

    Raises:
        NotImplementedError: the installed transformers, the model or an option does not let
            prefixes in.
        RuntimeError: the engine failed.
        ValueError: an input is empty, or has what is no token, or leaves too few positions for its
            output.
    """
    if bank is not None and "position_ids" not in inspect.signature(bank.stack.forward).parameters:
        raise NotImplementedError(f"{type(base).__name__} takes no position_ids, which continuous batching needs")
    chosen = base.generation_config if generation_config is None else generation_config
    check_rules(chosen, "generate_batch")
    if (chosen.repetition_penalty or 1) != 1:  # transformers would leave it out
        raise NotImplementedError("generate_batch takes no repetition_penalty; generate does")
    prompts = _prompts(inputs, base.get_input_embeddings().weight.shape[0])
    ends = next((e for e in (chosen.eos_token_id, base.config.get_text_config().eos_token_id) if e is not None), -1)
    chosen = copy.copy(chosen)
    chosen.eos_token_id = ends
    most = next((n for n in (max_new_tokens, chosen.max_new_tokens) if n is not None), NEW_TOKENS)
    for place, (prompt, room) in enumerate(zip(prompts, rooms)):
        if len(prompt) + most > room:
            raise ValueError(
                f"max_new_tokens={most}: input {place} has {len(prompt)} tokens, and the model {room} positions "
                "for both"
            )
    requests = {f"request_{i}": name for i, name in enumerate(names)}
    results: dict[str, Any] = {}
    if not requests:
        return results
    with _selected(base):
        base.destroy_cached_continuous_batching_manager()  # its blocks have no prefix, or another one
        manager = base.init_continuous_batching(chosen, _config(continuous_batching_config, names))
        injection = None if bank is None else _Injection(manager, bank, requests)
        try:
            manager.start()
            for request, prompt in zip(requests, prompts, strict=True):
                options = {"max_new_tokens": most, "eos_token_id": ends, "record_timestamps": record_timestamps}
                manager.add_request(prompt, request_id=request, **options)
            while len(results) < len(requests):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(f"{result.request_id}: {result.error}")
                    results[result.request_id] = result
                    if progress is not None:
                        progress(1)
                elif result is None and not manager.is_running():
                    raise RuntimeError("transformers' continuous batching stopped; its log says why")
        finally:
            manager.stop(block=True)
            manager.destroy()
            if injection is not None:
                injection.remove()
    if injection is not None and (left := injection.left()):
        raise RuntimeError(f"{type(base).__name__} did not hand the prefix to {left} of its layers")
    return {request: results[request] for request in requests}


def _prompts(inputs: Sequence[Sequence[int]], vocabulary: int) -> list[list[int]]:
    """Tokens as Python's integers.

    Raises:
        ValueError: a prompt has none, or what is no token.
    """
    found = []
    for place, prompt in enumerate(inputs):
        tokens = prompt.tolist() if isinstance(prompt, Tensor) else prompt
        if not isinstance(tokens, list | tuple) or not tokens:
            raise ValueError(f"input {place} must be the tokens of a prompt, at least one, got {prompt!r:.60}")
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise ValueError(f"input {place} has {token!r:.60}, which is no token: 0 to {vocabulary - 1} are")
        found.append(list(tokens))
    return found


class _Injection:
    """Before the stack runs: add the prefixes of the batch, and move the positions of its tokens behind them."""

    def __init__(self, manager: Any, bank: Bank, requests: dict[str, str | None]) -> None:
        self.manager, self.bank = manager, bank
        places = {name: place for place, name in enumerate(bank.names)}
        self.places = {request: -1 if name is None else places[name] for request, name in requests.items()}
        self._served: set[nn.Module] = set()
        self.remove = bank.stack.register_forward_pre_hook(self._inject, with_kwargs=True).remove

    def left(self) -> int:
        """How many layers never took their prefix."""
        return len(set(self.bank.layers) - self._served)

    def _inject(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cu_seqlens = kwargs["cu_seq_lens_q"]
        batch = self.manager.batch_processor.inputs_and_outputs.requests_in_batch
        if len(batch) != len(cu_seqlens) - 1:
            raise RuntimeError(f"a batch of {len(cu_seqlens) - 1} sequences has {len(batch)} requests")
        places = [self.places[request.state.request_id] for request in batch]
        ids = torch.tensor(places, device=self.bank.shifts.device)
        positions = kwargs["position_ids"]
        shifts = self.bank.shifts[ids].repeat_interleave(cu_seqlens.diff().long().to(ids.device))
        kwargs = kwargs | {PAGED: Paged(self.bank, ids, self._served)}
        return args, kwargs | {"position_ids": positions + shifts.to(positions.device)}


def _config(config: ContinuousBatchingConfig | None, names: Sequence[str | None]) -> ContinuousBatchingConfig:
    config = ContinuousBatchingConfig() if config is None else config
    given = [field for field in BY_PYTHON if getattr(config, field)]
    if given:
        raise NotImplementedError(f"{given[0]}: which prefixes a batch has is found out by Python; leave it out")
    return replace(
        config,
        use_cuda_graph=False,
        use_async_batching=False,
        default_compile_level=0,
        max_blocks_per_request=0,  # a path for flash attention's own kernel
        # Blocks are found again by their tokens alone, and their keys depend on the prefix too.
        allow_block_sharing=config.allow_block_sharing and len(set(names)) == 1,
    )


@contextmanager
def _selected(base: PreTrainedModel) -> Iterator[None]:
    """``base`` with our paged attention.

    Raises:
        RuntimeError: another attention function was selected since the prefix was attached.
        NotImplementedError: the installed transformers runs continuous batching with its own
            functions alone.
    """
    before = base.config.get_text_config()._attn_implementation
    if before != NAME:
        raise RuntimeError(f"the attention function is {before!r}, and the prefix needs {NAME!r}: it was replaced")
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    if "paged|sdpa" not in inspect.getsource(ContinuousBatchingManager.switch_to_cb_friendly_attn):
        raise NotImplementedError(
            f"transformers {transformers.__version__} runs continuous batching with its own attention functions alone, "
            "so that no prefix reaches it there; 5.17 takes others. generate takes batches of prompts padded on the "
            "left, and prefix-attn serve joins requests to running batches"
        )
    base.set_attn_implementation(PAGED_NAME)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def paged_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: Any,
    read_index: Any,
    write_index: Any,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    prefix_paged: Paged | None = None,
    **others: Any,  # transformers hands every attention function what any of them might want
) -> tuple[Tensor, None]:
    """transformers' attention interface for packed queries (1, Hq, Nq, D) and a paged cache: (1, Nq, Hq, D) out."""
    indices = {"read_index": read_index, "write_index": write_index}
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, **indices)
    if others.get("position_bias") is not None:
        raise NotImplementedError(
            f"{type(module).__name__} adds a bias to its logits, which packed sequences do not have"
        )
    window = getattr(module, "sliding_window", None) if sliding_window is None else sliding_window
    kind = "full_attention" if window is None else "sliding_attention"
    cu_seqlens_k, longest = (x[kind] if isinstance(x, dict) else x for x in (cu_seq_lens_k, max_seqlen_k))
    prefix: dict[str, Any] = {}
    prefix_key = prefix_value = None
    if prefix_paged is not None and module in prefix_paged.bank.layers:
        bank, ids, served = prefix_paged
        served.add(module)
        prefix_key, prefix_value = bank.layers[module]
        prefix = {"prefix_ids": ids, "prefix_lengths": bank.lengths, "backend": bank.backend}
        if bank.gates is not None:
            prefix["prefix_gate"] = bank.gates[module][ids.clamp(min=0)]
    out = prefix_attention_varlen(
        query[0].transpose(0, 1),
        key,
        value,
        prefix_key,
        prefix_value,
        cu_seqlens_q=cu_seq_lens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=longest,
        is_causal=True,
        window=window,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        **prefix,
    )
    return out[None], None


def _no_mask(**_: Any) -> None:
    """Lengths say which keys a query sees."""


AttentionInterface.register(PAGED_NAME, paged_attention_forward)
AttentionMaskInterface.register(PAGED_NAME, _no_mask)
