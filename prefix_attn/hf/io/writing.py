"""Write files so that a kill, a full disk and other savers leave each one whole: as it was, or as it is to be.

What is written lies under a temporary name of its own until all of it is on the disk. Savers of one folder take turns,
by a lock on the folder itself that leaves no file behind, and readers wait for a saver to finish. So a configuration
and the tensors beside it are always of one save. The lock ends with its process. Where a file system has no locks, each
file is still whole.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from prefix_attn.quoting import shortened

try:
    from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN, flock
except ImportError:  # not Unix: as on a file system without locks
    LOCK_EX = LOCK_NB = LOCK_SH = LOCK_UN = 0

    def flock(fd: Any, operation: int, /) -> None:
        """Nothing can be locked."""
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


_log = logging.getLogger(__name__)
_BEGIN, _END = ".prefix_attn-", ".tmp"  # of temporary names
_PATIENCE = 10.0  # seconds to wait for a lock: whoever is stopped while holding one must not stop a training
_OPEN = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_OPEN_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)  # a FIFO at its place would wait for a writer
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)  # of folders, on some file systems


def replace(path: Path, content: bytes) -> None:
    """Write one file: see ``replace_all``."""
    replace_all(path.parent, {path.name: content})


def replace_figure(path: Path, figure: Any, *, dpi: int) -> None:
    """Write a figure of matplotlib, in the format that the name says: see ``replace_all``."""
    image = BytesIO()
    figure.savefig(image, format=path.suffix[1:] or None, dpi=dpi)
    replace(path, image.getvalue())


def replace_all(folder: Path, contents: Mapping[str, bytes | None]) -> None:
    """Write files of these names into ``folder``, or remove those without a content.

    Nothing is renamed before everything is on the disk. A symbolic link at one of the names is replaced, not followed:
    it may lead into a cache that others read. A file that is replaced keeps its permissions.

    Raises:
        OSError: a file cannot be written; the message names it. Files that were there stay as they were.
    """
    with locked(folder, exclusive=True), ExitStack() as stack:
        _sweep(folder)
        path = folder
        try:
            temporaries: dict[str, Path] = {}
            for name, content in contents.items():
                path = folder / name
                if path.is_dir() and not path.is_symlink():
                    raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
                if content is not None:
                    file, temporaries[name] = _temporary(folder, stack)
                    _keep_mode(file, path)
                    left = memoryview(content)
                    while left:
                        left = left[file.write(left) :]
                    os.fsync(file.fileno())
            for name, temporary in temporaries.items():
                path = folder / name
                os.replace(temporary, path)
            for name in contents.keys() - temporaries.keys():
                path = folder / name
                path.unlink(missing_ok=True)
            _sync(folder)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror or error}; not saved", str(path)) from error


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it, where they are not there.

    Raises:
        ValueError: something else has its name, or nothing can have it.
    """
    if folder.is_dir():
        return
    if folder.is_symlink() or folder.exists():
        raise ValueError(f"{folder}: must be a folder, and is {'a file' if folder.is_file() else 'none'}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:  # half a character, or a 0
        raise ValueError(f"{shortened(folder)}: no folder can have this name ({shortened(error)})") from None
    _sync(folder.parent)


@contextmanager
def locked(folder: Path, *, exclusive: bool = False) -> Iterator[None]:
    """A context that no other saver shares; readers do, unless it is ``exclusive``. Not for reading and then saving."""
    try:
        place = os.open(folder, _OPEN_FOLDER)
    except (OSError, ValueError):  # whatever is wrong with it, reading or writing it says so
        yield
        return
    try:
        _wait(place, folder, exclusive=exclusive)
        yield
    finally:
        _try_lock(place, LOCK_UN)  # closing is not enough where a forked process has the same file
        os.close(place)


def _wait(place: int, folder: Path, *, exclusive: bool) -> None:
    end, pause = time.monotonic() + _PATIENCE, 0.001
    while not _try_lock(place, LOCK_EX if exclusive else LOCK_SH):
        if time.monotonic() > end:
            _log.warning("%s: locked by another process for %g s; this one goes on without waiting", folder, _PATIENCE)
            return
        time.sleep(pause)
        pause = min(2 * pause, 0.05)


def _try_lock(file: int, kind: int) -> bool:
    """Whether nobody else has it locked. Where there are no locks, nobody has."""
    try:
        flock(file, kind | LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _temporary(folder: Path, stack: ExitStack) -> tuple[FileIO, Path]:
    """A new file, locked for as long as ``stack`` lives, and gone with it if it keeps its name."""
    while True:
        path = folder / f"{_BEGIN}{secrets.token_hex(8)}{_END}"
        # Follows no link, takes no file that is there, and has no buffer that closing it would have to write.
        file = stack.enter_context(path.open("xb", buffering=0))
        stack.callback(path.unlink, missing_ok=True)
        # A saver that sweeps may have been faster than the lock.
        if _try_lock(file.fileno(), LOCK_EX) and os.fstat(file.fileno()).st_nlink:
            return file, path


def _keep_mode(file: FileIO, old: Path) -> None:
    """Give ``file`` the permissions of ``old``, if that is a file: what its user made private stays so."""
    with suppress(OSError):  # there is none, or a file system without permissions
        mode = os.lstat(old).st_mode
        if stat.S_ISREG(mode):
            os.fchmod(file.fileno(), mode & 0o777)


def _sweep(folder: Path) -> None:
    """Remove temporary files whose process is dead: those of a living one are locked."""
    for path in folder.glob(f"{_BEGIN}*{_END}"):
        try:
            file = os.open(path, _OPEN)
        except OSError:
            continue
        try:
            flock(file, LOCK_EX | LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError as error:
            _log.debug("%s stays: %s", path, error)
        finally:
            os.close(file)


def _sync(folder: Path) -> None:
    """Put the names of the files in ``folder`` on the disk."""
    try:
        place = os.open(folder, _OPEN_FOLDER)
    except PermissionError:  # one that may be written and not read
        return
    try:
        os.fsync(place)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(place)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to save what cannot be loaded again.

    Raises:
        ValueError: a tensor holds NaN or infinite numbers; the message names it.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        good = int((tensor.float() if tensor.element_size() == 1 else tensor).isfinite().sum())
        if good < tensor.numel():
            raise ValueError(
                f"{name} holds {tensor.numel() - good} of {tensor.numel()} numbers that are not finite: nothing is "
                "saved, and files that are there stay as they are"
            )


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file, the same bytes for the same content. safetensors itself writes metadata in any order."""
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    head = json.loads(content[8:end])
    head["__metadata__"] = dict(sorted(metadata.items()))
    header = json.dumps(head, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # what follows stays aligned
    return len(header).to_bytes(8, "little") + header + content[end:]
