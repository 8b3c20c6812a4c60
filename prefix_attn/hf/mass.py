"""Measure how much attention a prefix gets: its share of the softmax's mass in each layer and head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefix_attn.hf.attach.infix import IGNORED, start_of_targets
from prefix_attn.hf.attach.ranks import heads_mesh, of_all_processes
from prefix_attn.hf.attach.wrapper import device_of, evaluating
from prefix_attn.hf.io.writing import replace_figure
from prefix_attn.hf.model import PrefixModel

BARS = "▁▂▃▄▅▆▇█"  # of shares in eighths


@torch.no_grad()
def prefix_mass(
    model: PrefixModel, batches: Iterable[Mapping[str, Tensor]], progress: Callable[[int], object] | None = None
) -> dict[str, Tensor]:
    """The mean share of the softmax's mass that the active prefix gets, in [0, 1].

    The share is 1 - exp(lse of the sequence - lse of both). A sink counts in both. The mean is over the tokens that see
    the prefix and are not padding.

    Args:
        model: the model. Its active prefix must share the softmax with the sequence.
        batches: arguments of ``model``'s forward, with ``attention_mask`` if there is padding.
        progress: called with the number of rows of each finished batch.

    Returns:
        For each site (layers with a prefix, query heads) float64.

    Raises:
        ValueError: no active prefix, a prefix with a gate (it has its own softmax), or no batches.

    Examples:
        >>> model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
        >>> prefix_mass(model, [{"input_ids": ids}])["decoder"].shape  # (layers, heads)
        torch.Size([3, 4])
    """
    if model.active_prefix is None:
        raise ValueError("there is no active prefix to look at")
    config, attachment = model.prefix_configs[model.active_prefix], model.attachment
    if config.gate is not None:
        raise ValueError(
            f"{model.active_prefix} has a gate: its softmax is its own, and takes no mass of the sequence's"
        )
    slots = attachment.resolver.layout(config).slots
    sums = {slot.module: torch.zeros(slot.query_heads, dtype=torch.float64) for slot in slots}
    counts = dict.fromkeys(sums, 0)
    sites = {slot.module: slot.site for slot in slots}
    device = device_of(model.base_model.get_input_embeddings())
    with evaluating(model):
        for batch in batches:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            starts = start_of_targets(None, batch) if config.mode == "infix" else None

            def add(module: nn.Module, share: Tensor, batch: Any = batch, starts: Tensor | None = starts) -> None:
                B, _, S = share.shape
                tokens = _tokens(batch, sites[module], attachment.probe.has_decoder)
                # A device_map may have this layer elsewhere.
                tokens = torch.ones(B, S, device=share.device) if tokens is None else tokens.to(share.device)
                if starts is not None:
                    columns = torch.arange(S, device=share.device)
                    tokens = tokens * (columns >= starts[:, None].to(share.device))
                if slots[0].ranks > 1:
                    share = of_all_processes(share, 1, heads_mesh(module))
                sums[module] += torch.einsum("bhs,bs->h", share.double(), tokens.double()).cpu()
                counts[module] += int(tokens.sum())

            with attachment.runner.watching(add):
                model(**batch)
            if progress is not None:
                progress(len(next(iter(batch.values()))))
    if not all(counts.values()):
        raise ValueError("no token saw the prefix: there is nothing to take the mean of")
    return {
        site: torch.stack([sums[s.module] / counts[s.module] for s in slots if s.site == site])
        for site in dict.fromkeys(sites.values())
    }


def layers_of(model: PrefixModel) -> dict[str, list[int]]:
    """For each site, the layer numbers of the rows of ``prefix_mass``."""
    assert model.active_prefix is not None
    slots = model.attachment.resolver.layout(model.prefix_configs[model.active_prefix]).slots
    return {site: [s.layer for s in slots if s.site == site] for site in dict.fromkeys(s.site for s in slots)}


def mass_table(mass: Mapping[str, Tensor], layers: Mapping[str, list[int]]) -> list[tuple[str, str, str, str, str]]:
    """Site, layer, mean, range and a bar for each head: a line for each layer, as text."""
    return [
        (site, str(layer), f"{row.mean():.3f}", f"{row.min():.3f} to {row.max():.3f}", _bars(row))
        for site, values in mass.items()
        for layer, row in zip(layers[site], values)
    ]


def _bars(shares: Tensor) -> str:
    return "".join(BARS[min(int(share * len(BARS)), len(BARS) - 1)] for share in shares.tolist())


def plot_mass(mass: Mapping[str, Tensor], layers: Mapping[str, list[int]], path: Path) -> None:
    """A heat map for each site, layers against heads, as a PNG; ``layers`` are the numbers of the rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(mass), figsize=(1 + 4 * len(mass), 5), squeeze=False, layout="constrained")
    top = max(values.max().item() for values in mass.values())
    for (site, values), axis in zip(mass.items(), axes[0]):
        image = axis.imshow(values.tolist(), vmin=0, vmax=top, aspect="auto", origin="lower", interpolation="nearest")
        axis.set(xlabel="query head", ylabel="layer", title=site)
        step = -(-len(values) // 16)
        axis.set_yticks(range(0, len(values), step), layers[site][::step])
    figure.colorbar(image, ax=list(axes[0]), label="share of softmax mass on the prefix")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_figure(path, figure, dpi=120)
    pyplot.close(figure)


def _tokens(batch: Mapping[str, Tensor], site: str, has_decoder: bool) -> Tensor | None:
    """(B, S): 1 for the queries of ``site`` that are no padding; None = all."""
    if site == "encoder" or not has_decoder:
        return batch.get("attention_mask")
    if "decoder_attention_mask" in batch or "labels" not in batch:
        return batch.get("decoder_attention_mask")
    return batch["labels"] != IGNORED
