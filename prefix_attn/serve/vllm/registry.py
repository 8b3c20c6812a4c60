"""Prefixes by name, where they are and what is in them: the same in the server, the scheduler and every worker."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from prefix_attn.quoting import shortened
from prefix_attn.serve.vllm.choice import Choice
from prefix_attn.serve.vllm.stored import Prefix, Shape, read

HOST_BYTES = 2 << 30  # of keys and values that a worker keeps in host memory


class Unknown(LookupError):
    """There is no prefix of this name."""


class Settings(NamedTuple):
    """``kv_connector_extra_config``.

    Attributes:
        prefixes: folder of each name, read when the server starts.
        folder: every folder, or file, in it is a prefix of that name, read when a request first names it. What is put
            there or taken away later is noticed.
        loading: whether clients may load prefixes from any path that the server reads, and unload them. Needs
            ``folder``, where links to them are kept.
        host_bytes: of prefixes that a worker keeps in host memory. What was used longest ago leaves first.
        chat_stop_ids: tokens that end the answers of chats, besides those of the model's generation_config.
    """

    prefixes: Mapping[str, str] = {}
    folder: str | None = None
    loading: bool = False
    host_bytes: int = HOST_BYTES
    chat_stop_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """Check them.

        Raises:
            ValueError: one is unknown, or has another type.
        """
        types = {"prefixes": dict, "folder": str, "loading": bool, "host_bytes": int, "chat_stop_ids": list}
        for name, value in given.items():
            if name not in types:
                raise ValueError(f"kv_connector_extra_config: {name!r:.100} is unknown; known are {list(types)}")
            if type(value) is not types[name]:
                kind = types[name].__name__
                raise ValueError(f"kv_connector_extra_config: {name} must be a {kind}, got {value!r:.100}")
        found = cls(**given)
        if found.loading and found.folder is None:
            raise ValueError("kv_connector_extra_config: loading keeps links to prefixes in a folder: name one")
        if found.folder is not None and not Path(found.folder).is_dir():
            raise ValueError(f"kv_connector_extra_config: folder: there is no folder {found.folder}")
        return found


class Registry:
    """Finds and reads prefixes."""

    def __init__(self, settings: Settings, shape: Shape) -> None:
        """Nothing is read yet."""
        self.settings, self.shape = settings, shape
        self._seen: dict[str, tuple[Any, Choice]] = {}

    def names(self) -> list[str]:
        """Of all prefixes that there are now."""
        return [*self.settings.prefixes, *(name for name in self._in_folder() if name not in self.settings.prefixes)]

    def _in_folder(self) -> Iterator[str]:
        if self.settings.folder is not None:
            yield from sorted(name for name in os.listdir(self.settings.folder) if not name.startswith("."))

    def path(self, name: str) -> Path:
        """Where a prefix is.

        Raises:
            Unknown: nowhere.
        """
        if name in self.settings.prefixes:
            return Path(self.settings.prefixes[name])
        if self.settings.folder is not None and is_plain(name):
            path = Path(self.settings.folder, name)
            if path.exists():
                return path
        raise Unknown(name)

    def choice(self, name: str) -> Choice:
        """What a request for a prefix says. The files are read again where they have changed.

        Raises:
            Unknown: there is no such prefix. ValueError: it cannot be served.
        """
        state = state_of(self.path(name))
        seen = self._seen.get(name)
        if seen is None or seen[0] != state:
            prefix = self.read(name)
            seen = self._seen[name] = (state, Choice(prefix.digest, prefix.length))
        return seen[1]

    def read(self, name: str) -> Prefix:
        """Keys and values of a prefix.

        Raises:
            Unknown: there is no such prefix. ValueError: it cannot be served.
        """
        return read(self.path(name), self.shape)

    def check(self) -> None:
        """Read the prefixes that are to be there from the start.

        Raises:
            ValueError: one of them cannot be served.
        """
        for name in self.settings.prefixes:
            self.choice(name)

    def load(self, name: str, path: str, *, replace: bool = False) -> Choice:
        """Take the prefix at ``path`` from now on, in every process: a link to it goes into the folder.

        Raises:
            ValueError: the name is taken or cannot be one, or the prefix cannot be served.
        """
        folder = self._link_folder()
        if not is_plain(name):
            raise ValueError(f"{shortened(name)!r} cannot be the name of a prefix: it must be one of a file")
        if name in self.settings.prefixes or (os.path.lexists(folder / name) and not (folder / name).is_symlink()):
            raise ValueError(f"{name!r} is there from the start: take another name")
        if os.path.lexists(folder / name) and not replace:
            raise ValueError(f"{name!r} is loaded already: unload it, or send load_inplace")
        place = Path(path).resolve()
        prefix = read(place, self.shape)
        link = folder / f".{name[:200]}.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(place)
        os.replace(link, folder / name)
        return Choice(prefix.digest, prefix.length)

    def unload(self, name: str) -> None:
        """Take away what ``load`` has taken. Requests that run keep their blocks and end as they would have.

        Raises:
            Unknown: there is no such prefix. ValueError: it was there from the start.
        """
        self.path(name)
        link = self._link_folder() / name
        if not link.is_symlink():
            raise ValueError(f"{name!r} is there from the start and was not loaded: it stays")
        link.unlink(missing_ok=True)
        self._seen.pop(name, None)

    def _link_folder(self) -> Path:
        if not self.settings.loading or self.settings.folder is None:
            raise ValueError("prefixes cannot be loaded or unloaded: the server was started without it")
        return Path(self.settings.folder)


def is_plain(name: str) -> bool:
    """Whether a name is that of a visible file or folder, and not a way to another place."""
    return bool(name) and not name.startswith(".") and not set("/\\\0") & set(name) and len(os.fsencode(name)) <= 255


def state_of(path: Path) -> tuple[Any, ...]:
    """What changes when files of a prefix do."""
    files = [path] if path.is_file() else [path, *(path / name for name in sorted(os.listdir(path)))]
    found = (file.stat() for file in files if file.exists())
    return str(path.resolve()), *((s.st_ino, s.st_size, s.st_mtime_ns) for s in found)


class Held:
    """Keys and values in host memory, up to a number of bytes: what was used longest ago leaves first."""

    def __init__(self, most: int) -> None:
        """``most`` bytes are kept. A prefix that is larger is read for each use."""
        self.most, self.bytes = most, 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()

    def __len__(self) -> int:
        """How many are held."""
        return len(self._held)

    def get(self, digest: str) -> Tensor | None:
        """The keys and values of a digest, where they are held."""
        if digest in self._held:
            self._held.move_to_end(digest)
        return self._held.get(digest)

    def put(self, digest: str, kv: Tensor) -> None:
        """Hold them."""
        if kv.nbytes > self.most or digest in self._held:
            return
        self._held[digest] = kv
        self.bytes += kv.nbytes
        while self.bytes > self.most:
            self.bytes -= self._held.popitem(last=False)[1].nbytes
