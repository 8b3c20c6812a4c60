"""Untrusted reads, atomic writes.

Only tensors and plain containers of tensors are unpickled. A file's claims about its own size are checked. Whatever is
wrong with a file raises a ValueError that names it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

Shapes = Mapping[str, tuple[int, ...]]


def find(path: str | Path, *names: str, subfolder: str | None = None, **hub: Any) -> Path:
    """An existing file or folder, or the download of a Hub repository, of which only ``names`` are fetched.

    Args:
        path: what to find.
        names: of files.
        subfolder: the folder in it.
        hub: of ``huggingface_hub.snapshot_download``, such as revision, token and cache_dir.

    Raises:
        ValueError: ``path`` is neither.
    """
    if Path(path).exists():
        place = Path(path) / (subfolder or "")
        if not place.exists():
            raise ValueError(f"{path}: has no subfolder {subfolder!r}")
        return place
    if not is_hub_id(str(path)):
        raise ValueError(f"{path}: not a folder with an adapter, nor a file")
    from huggingface_hub import snapshot_download

    patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns, **hub)) / (subfolder or "")
    except Exception as error:  # offline, not there, private, gated: a dozen types, one meaning
        raise ValueError(f"{path}: neither a folder nor a Hub repository within reach ({error})") from error


def is_hub_id(name: str) -> bool:
    """Whether ``name`` is not an existing path and could name a repository on the Hub."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and not Path(name).exists()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; is this the folder of an adapter?") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(content).__name__!r}")
    return content


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Empty for a file of torch.save."""
    if path.suffix != ".safetensors":
        return {}
    with _opened(path) as f:
        return f.metadata() or {}


def read_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file, or in an index of such; nothing else is read."""
    if path.suffix == ".json":
        listed = read_json(path).get("weight_map")
        return list(listed) if isinstance(listed, dict) else []
    with _opened(path) as f:
        return list(f.keys())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose header is checked first, or of a file of torch.save."""
    if path.suffix == ".safetensors":
        with _opened(path) as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: must hold tensors by name, got {type(content).__name__!r}")
    return {name: backed(path, name, tensor) for name, tensor in content.items()}


def checked(path: Path, tensors: Mapping[str, Tensor], wanted: Shapes) -> dict[str, Tensor]:
    """``tensors``, checked to have the shapes ``wanted`` and finite values. ``path`` is for messages."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != dict(wanted):
        raise ValueError(f"{path}: base model and configuration need {dict(wanted)}, the file has {shapes}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} must hold finite floating-point numbers")
    return dict(tensors)


def read_pickle(path: Path) -> Any:
    """The content of a file of torch.save: tensors and containers. Nothing else is unpickled, and no code is run."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([nn.ParameterList]):
            warnings.simplefilter("ignore")  # of pickle protocols: what follows says more
            # Mapped and not compressed, so that a file that lies about its size allocates nothing.
            mapped = zipfile.is_zipfile(path)
            if mapped:
                with zipfile.ZipFile(path) as records:
                    if any(record.file_size != record.compress_size for record in records.infolist()):
                        raise zipfile.BadZipFile
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # the bytes of a stranger raise anything: KeyError, IndexError, struct.error...
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to run {refused[1]}" if refused else type(error).__name__
        advice = "; torch.save(model.state_dict(), ...) makes a file that is read" if refused else ""
        raise ValueError(f"{path}: damaged, or more than tensors ({reason}): not read{advice}") from None


def backed(path: Path, name: str, tensor: Any, *, floating: bool = True) -> Tensor:
    """``tensor``, checked to be one no larger than the file that claims to hold it, and unless told of floats."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{path}: {name} must be a tensor, got {type(tensor).__name__!r}")
    if floating and not tensor.is_floating_point():
        raise ValueError(f"{path}: {name} must hold finite floating-point numbers, got {tensor.dtype}")
    if tensor.numel() * tensor.element_size() > path.stat().st_size:  # strides of 0, for one
        raise ValueError(f"{path}: {name} claims the size {tuple(tensor.shape)}, more than the file holds")
    return tensor.detach()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file."""
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged, or not safetensors ({error})") from None


def replace(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush, rename: a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
