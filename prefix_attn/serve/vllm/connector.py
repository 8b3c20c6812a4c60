"""vLLM's side: ``PrefixConnector``, which vLLM makes once in the scheduler and once in every worker."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from prefix_attn.serve.vllm.limits import check_layer, check_server, shape_of
from prefix_attn.serve.vllm.loads import Load, Planner, Rank, Source, slots
from prefix_attn.serve.vllm.registry import Registry, Settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.forward_context import ForwardContext
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

_log = logging.getLogger(__name__)
COUNTS = {
    "injections": "Requests into whose blocks keys and values of a prefix were written.",
    "tokens": "Virtual tokens that were written.",
    "hits": "Requests that found the whole prefix in vLLM's prefix cache.",
    "reads": "Prefixes that a worker read from disk.",
    "bytes": "Bytes of keys and values that workers wrote into the cache.",
    "refused": "Requests with a salt of a prefix that could not be answered.",
    "failures": "Loads that failed, with their requests.",
}


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the workers in a step."""

    loads: list[Load] = field(default_factory=list)
    failing: list[str] = field(default_factory=list)  # requests that are to fail


class PrefixStats(KVConnectorStats):
    """Counts since the last look."""

    def reset(self) -> None:
        """Start from 0."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add those of another process."""
        self.data = dict(Counter(self.data) + Counter(other.data))
        return self

    def reduce(self) -> dict[str, int | float]:
        """As the log shows them."""
        return {f"prefix_attn {name}": self.data.get(name, 0) for name in COUNTS}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not any(self.data.values())


class PrefixMetrics(KVConnectorPromMetrics):
    """The same counts beside vLLM's metrics, as vllm:prefix_attn_injections and so on."""

    def __init__(self, config: VllmConfig, types: Any, labels: list[str], engines: dict[int, list[object]]) -> None:
        """Make a counter of each kind."""
        super().__init__(config, types, labels, engines)
        self.counters = {
            name: self._counter_cls(name=f"vllm:prefix_attn_{name}", documentation=text, labelnames=labels)
            for name, text in COUNTS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what was counted."""
        for name, number in transfer_stats_data.items():
            self.counters[name].labels(*self.per_engine_labelvalues[engine_idx]).inc(number)


class PrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """Gives requests their prefixes: see ``prefix_attn.serve.vllm``."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        """Check the server, and in the scheduler every prefix that it starts with.

        Raises:
            NotImplementedError, ValueError: one of them cannot be served.
        """
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        check_server(vllm_config, kv_cache_config)
        settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config)
        self.registry = Registry(settings, shape_of(vllm_config))
        self.block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._told = Counter[str]()
        if role == KVConnectorRole.SCHEDULER:
            self.registry.check()
            self.planner = Planner(vllm_config.model_config.get_vocab_size(), self.block_size)
            self.counts = self.planner.counts
            _log.info("%d prefixes are served", len(self.registry.names()))
        else:
            rank = Rank(get_tensor_model_parallel_rank(), vllm_config.parallel_config.tensor_parallel_size)
            self.source = Source(self.registry, rank, vllm_config.model_config.dtype)
            self.counts = self.source.counts
            self.layers: list[tuple[int, Any]] = []
            self.failed: set[int] = set()
            self.failing: set[str] = set()

    @property
    def requires_kv_delivery(self) -> bool:
        """Nothing is handed on."""
        return False

    # In the scheduler.

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        """The tokens of the prefix that are not in the cache."""
        return self.planner.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Their blocks are known now."""
        self.planner.plan(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What the workers are to write in this step."""
        return Loads(*self.planner.take())

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed."""
        self.planner.forget(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Its blocks may be freed."""
        return self.request_finished(request, [])

    # In a worker.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find the layers.

        Raises:
            NotImplementedError: a layer is not of the kind that is needed, or one is missing.
        """
        shape, heads = self.registry.shape, self.source.heads
        layers = self._vllm_config.compilation_config.static_forward_context
        for name in kv_caches:
            check_layer(name, layers[name], heads.stop - heads.start)
        self.layers = sorted(
            ((extract_layer_index(name), layers[name]) for name in kv_caches), key=lambda pair: pair[0]
        )
        if (numbers := [number for number, _ in self.layers]) != list(range(shape.layers)):
            raise NotImplementedError(f"the layers with a cache are {numbers}, and 0 to {shape.layers - 1} are needed")

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        """Write what this step needs. Where that fails, the requests fail, and the others go on."""
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, Loads)
        self.failing.update(metadata.failing)
        for load in metadata.loads:
            try:
                self._write(load, self.source.get(load.name, load.choice))
            except (ValueError, OSError) as error:
                _log.error("requests fail: %s", error)
                self.counts["failures"] += 1
                self.failed.update(load.blocks)

    def _write(self, load: Load, kv: torch.Tensor) -> None:
        """``kv`` (layers, 2, P, heads, head size) into every layer's blocks."""
        where = slots(load, kv.shape[2], self.block_size)
        written = kv[:, :, load.first :]
        for number, layer in self.layers:
            cache = layer.kv_cache
            key, value = written[number].to(cache.device).unbind(0)
            layer.impl.do_kv_cache_update(layer, key, value, cache, where.to(cache.device))
        self.counts["bytes"] += written.nbytes

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that nothing was written to."""
        failed, self.failed = self.failed, set()
        return failed

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """The requests that are to fail."""
        failing, self.failing = self.failing, set()
        return KVConnectorTransferResults(finished_recving=failing, failed_recving=failing)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """All is written before the forward."""

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing is saved."""

    # Counters.

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was counted since the last call."""
        new = self.counts - self._told
        self._told = self.counts.copy()
        return PrefixStats(data=dict(new)) if new else None

    @classmethod
    def build_kv_connector_stats(cls, data: Mapping[str, Any] | None = None) -> KVConnectorStats | None:
        """Counts as they came from another process."""
        return PrefixStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics | None:
        """Counters for Prometheus."""
        return PrefixMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)
