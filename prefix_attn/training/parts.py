"""Long work in parts. Each part is a file that is written whole: a kill loses one part, and none is made twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from prefix_attn.hf.attach.ranks import is_first
from prefix_attn.hf.io.writing import replace
from prefix_attn.training.ranks import share, sums


def make_parts(
    paths: Sequence[Path],
    make: Callable[[int], bytes],
    sizes: Sequence[int],
    *,
    shown: str,
    unit: str,
    device: torch.device,
) -> None:
    """Write those of ``paths`` that are not there yet.

    Args:
        paths: of the parts, all in one folder. It is made.
        make: gives the content of the part with this number. Processes of ``torch.distributed`` share the parts.
        sizes: how much of the work each part is.
        shown: what the progress bar says.
        unit: what it counts.
        device: of the model.

    Raises:
        OSError: a part cannot be written.
    """
    from tqdm.auto import tqdm

    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    sums(0, device=device)  # no process writes before all have looked
    if not missing:
        return
    if is_first():
        paths[0].parent.mkdir(parents=True, exist_ok=True)
    sums(0, device=device)
    done = sum(sizes) - sum(sizes[number] for number in missing)
    with tqdm(total=sum(sizes), initial=done, desc=shown, unit=unit, disable=not is_first()) as bar:
        for number, counts in share(missing):
            content = make(number)
            if counts:
                replace(paths[number], content)
                bar.update(sizes[number])
    sums(0, device=device)
