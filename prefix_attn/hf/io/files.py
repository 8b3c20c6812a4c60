"""Untrusted reads.

Nothing is unpickled: see ``pickles``. A file's claims about its own size are checked before anything is allocated.
Whatever is wrong with a file raises a ValueError that names it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefix_attn.hf.io import pickles
from prefix_attn.quoting import quoted, shortened

Shapes = Mapping[str, tuple[int, ...]]
_OPEN = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


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


def opened(path: Path) -> BinaryIO:
    """A file, open for reading. A FIFO or a device, which could block or never end, is refused before it is read.

    Raises:
        ValueError: there is no such file, or it is none.
        OSError: it may not be read.
    """
    try:
        number = os.open(path, _OPEN)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:  # half a character, or a 0
        raise ValueError(f"{shortened(path)}: no such file ({shortened(error)})") from None
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENAMETOOLONG, errno.ELOOP):
            raise
        kind = "a socket or a device" if error.errno == errno.ENXIO else f"none ({error.strerror})"
        raise ValueError(f"{shortened(path)}: must be a file, and is {kind}") from None
    if not stat.S_ISREG(mode := os.fstat(number).st_mode):
        os.close(number)
        raise ValueError(f"{path}: must be a file, and is {_KINDS.get(stat.S_IFMT(mode), 'none')}")
    return os.fdopen(number, "rb")


def opened_text(path: Path, encoding: str, newline: str | None = None) -> TextIO:
    """The same as text."""
    return io.TextIOWrapper(opened(path), encoding=encoding, newline=newline)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    with opened(path) as file:
        try:
            content = json.loads(file.read().decode())
        except (ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{path}: not JSON ({shortened(error) or type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(content).__name__!r}")
    return content


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Empty for a file of torch.save."""
    if path.suffix != ".safetensors":
        return {}
    with _safetensors(path) as f:
        return f.metadata() or {}


def read_names(path: Path) -> list[str]:
    """The names of the tensors in a safetensors file, or in an index of such; nothing else is read."""
    if path.suffix == ".json":
        listed = read_json(path).get("weight_map")
        return list(listed) if isinstance(listed, dict) else []
    with _safetensors(path) as f:
        return list(f.keys())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whose header is checked first, or of a file of torch.save."""
    return read_both(path)[0]


def read_both(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one and the same file: between two reads it may be replaced."""
    if path.suffix == ".safetensors":
        with _safetensors(path) as f:
            return {name: f.get_tensor(name) for name in f.keys()}, f.metadata() or {}  # noqa: SIM118
    content = read_pickle(path)
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path}: must hold tensors by name, got {type(content).__name__!r}")
    return {name: backed(path, name, tensor) for name, tensor in content.items()}, {}


def read_pickle(path: Path) -> Any:
    """The content of a file of torch.save: tensors and containers. Nothing is unpickled, and no code is run."""
    with opened(path) as file:
        try:
            return pickles.read(file)
        except pickles.Refused as refused:
            raise ValueError(
                f"{path}: damaged, or more than tensors (it wants to run {refused}): not read; "
                "torch.save(model.state_dict(), ...) makes a file that is read"
            ) from None
        except Exception as error:  # the bytes of a stranger raise anything: KeyError, IndexError, struct.error...
            why = f"{type(error).__name__}: {shortened(error, 200)}"
            raise ValueError(f"{path}: damaged, or more than tensors ({why}): not read") from None


def checked(path: Path, tensors: Mapping[str, Tensor], wanted: Shapes) -> dict[str, Tensor]:
    """``tensors``, checked to have the shapes ``wanted`` and finite values. ``path`` is for messages."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != dict(wanted):
        raise ValueError(
            f"{path}: base model and configuration need {quoted(dict(wanted))}, the file has {quoted(shapes)}"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {shortened(name)} must hold finite floating-point numbers")
    return dict(tensors)


def backed(path: Path, name: str, tensor: Any, *, floating: bool = True) -> Tensor:
    """``tensor``, checked to be one no larger than the file that claims to hold it, and unless told of floats."""
    name = shortened(name)
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{path}: {name} must be a tensor, got {type(tensor).__name__!r}")
    if floating and not tensor.is_floating_point():
        raise ValueError(f"{path}: {name} must hold finite floating-point numbers, got {tensor.dtype}")
    if tensor.numel() * tensor.element_size() > path.stat().st_size:  # strides of 0, for one
        raise ValueError(f"{path}: {name} claims the size {quoted(tuple(tensor.shape))}, more than the file holds")
    return tensor.detach()


def check_total(path: Path, tensors: Iterable[Tensor]) -> None:
    """Refuse tensors that share their numbers, where each is to get a copy: a small file could ask for any number."""
    tensors = list(tensors)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > sum(held.values()):
        raise ValueError(f"{path}: its tensors claim more than the file holds")


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    opened(path).close()
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (SafetensorError, OSError, MemoryError) as error:
        raise ValueError(f"{path}: damaged, or not safetensors ({shortened(error)})") from None
