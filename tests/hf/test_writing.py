"""Saving: nothing bad, nothing half, nothing twice over, and the same bytes every time, whatever else goes on there."""

from __future__ import annotations

import errno
import fcntl
import importlib.util
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from prefix_attn.hf.io import checkpoint, files, writing
from prefix_attn.hf.io.convert import convert
from prefix_attn.training import record
from tests.hf.models import tiny

P = 4
KINDS: dict[str, dict[str, Any]] = {
    "flat": {},
    "mlp": {"prefix_projection": True, "encoder_hidden_size": 16},
    "gate": {"gate": "zero"},
    "embedding": {"mode": "embedding"},
    "frozen": {"num_frozen_tokens": 1},
}


def new(kind: str = "flat", length: int = P) -> PrefixModel:
    return get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=length, **KINDS[kind]))


def content(folder: Path) -> dict[str, bytes]:
    """All files in ``folder``, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is written ------------------------------------------------------------------------------------------------------


def test_equal_saves_are_equal_bytes(tmp_path: Path) -> None:
    """Metadata came in the order of a hash that is drawn anew for each file."""
    models = {kind: new(kind) for kind in KINDS}
    table = PrefixTuning(tiny("llama"), prefix_length=P, hidden_size=32)
    for number in range(4):
        folder = tmp_path / str(number)
        for kind, model in models.items():
            model.save_pretrained(folder / kind, training_state=True)
        table.save_pretrained(folder / "table")
        for to in ("peft", "prefix-attn"):
            convert(folder / "flat", folder / to, to=to)
        for path in sorted(folder.rglob("*.*")):
            first = tmp_path / "0" / path.relative_to(folder)
            assert path.read_bytes() == first.read_bytes(), path.name
    assert len(list((tmp_path / "0").rglob("*.*"))) == 3 * 8 + 2  # and the MLP, and the embeddings


def test_another_process_writes_the_same_bytes_and_a_dead_one_leaves_nothing(tmp_path: Path) -> None:
    """With another seed of hashes. Then it is killed between its last write and the first rename."""
    code = """
import os, signal, sys, torch
from pathlib import Path
from prefix_attn.hf.io import writing
tensors = {n: torch.arange(6.0).view(2, 3) for n in ("b", "a", "c")}
metadata = {n: n for n in {"x", "y", "z", "format"}}
here = writing.serialised(tensors, metadata)
writing.replace(Path(sys.argv[1]) / "whole", here)
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
writing.replace(Path(sys.argv[1]) / "whole", b"half")
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": "7"}, cwd=Path(__file__).parents[2])
    assert done.returncode == -9
    tensors = {name: torch.arange(6.0).view(2, 3) for name in ("c", "a", "b")}
    metadata = {name: name for name in ("z", "format", "y", "x")}
    assert (tmp_path / "whole").read_bytes() == writing.serialised(tensors, metadata)
    assert len(list(tmp_path.iterdir())) == 2
    writing.replace(tmp_path / "other", b"")
    assert sorted(content(tmp_path)) == ["other", "whole"]


def test_sets_have_an_order() -> None:
    """That of a set of texts is another in each process."""
    names = [f"name {number}" for number in range(9)]
    config = PrefixConfig(sites={"encoder", "decoder", "cross"}, modules_to_save=set(names), layers={2, 0})
    assert (config.sites, config.layers) == (("cross", "decoder", "encoder"), (0, 2))
    assert config.modules_to_save == names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(kind: str, value: float, tmp_path: Path) -> None:
    """By its name; nothing is written over what was there, and of several prefixes none is."""
    model = new(kind)
    model.save_pretrained(tmp_path, training_state=True)
    before = content(tmp_path)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    for options in ({}, {"training_state": True}, {"is_main_process": False}):
        with pytest.raises(ValueError, match=rf"{name} holds 1 of \d+ numbers that are not finite"):
            model.save_pretrained(tmp_path, **options)
    assert content(tmp_path) == before
    model.add_prefix("other", PrefixConfig(num_virtual_tokens=2))
    with pytest.raises(ValueError, match="not finite"):
        model.save_pretrained(tmp_path / "several", selected_adapters=["other", "default"])
    assert not (tmp_path / "several").exists()


def test_weights_that_were_trained_too_and_tables_are_finite(tmp_path: Path) -> None:
    """Weights of the base model, task heads, and the table of a PrefixTuning."""
    model = new()
    state = model.state_dict() | {"base_model.model.norm.weight": torch.full((32,), torch.nan)}
    with pytest.raises(ValueError, match=r"base_model.model.norm.weight holds 32 of 32"):
        model.save_pretrained(tmp_path / "a", state_dict=state)
    classifier = get_prefix_model(tiny("bert"), PrefixConfig(num_virtual_tokens=P))
    name = next(n for n, p in classifier.named_parameters() if "heads" in n and p.requires_grad)
    state = classifier.state_dict() | {name: torch.full_like(classifier.state_dict()[name], torch.inf)}
    with pytest.raises(ValueError, match=r"classifier.* holds"):
        classifier.save_pretrained(tmp_path / "a", state_dict=state)
    table = PrefixTuning(tiny("llama"), prefix_length=P, hidden_size=32)
    with torch.no_grad():
        table.prefix[0, 0] = torch.nan
    with pytest.raises(ValueError, match="holds 1 of 128"):
        table.save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()


# Where it is written --------------------------------------------------------------------------------------------------


def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a temporary name, were it guessed, a link is refused; at a final name it is replaced; a folder may be one."""
    folder, victim = tmp_path / "adapter", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("secret")
    for name in (checkpoint.ADAPTER, checkpoint.ADAPTER_CONFIG):
        (folder / name).symlink_to(victim)
    (tmp_path / "link").symlink_to(folder)
    new().save_pretrained(tmp_path / "link")
    assert not any(path.is_symlink() for path in folder.iterdir())
    before = content(folder)
    monkeypatch.setattr(writing.secrets, "token_hex", lambda _: "0" * 16)
    (folder / f".prefix_attn-{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError, match=r"README\.md|adapter_config"):
        new().save_pretrained(folder)
    (folder / f".prefix_attn-{'0' * 16}.tmp").unlink()
    assert (content(folder), victim.read_text()) == (before, "secret")


def test_leftovers_are_swept_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    """A temporary file is locked as long as its saver lives. What else looks like one stays."""
    names = [f".prefix_attn-{number:016x}.tmp" for number in range(4)]
    dead, alive, link, folder = (tmp_path / name for name in names)
    dead.write_bytes(b"half")
    link.symlink_to(dead)
    folder.mkdir()
    with alive.open("xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        writing.replace(tmp_path / "a", b"a")
        assert sorted(path.name for path in tmp_path.iterdir()) == [*names[1:], "a"]
    writing.replace(tmp_path / "a", b"b")
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names[2:], "a"]


@contextmanager
def size_limit(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes, as with ulimit -f."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def failing(name: str, number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The second call of a function of ``os`` fails so."""
    calls, real = [], getattr(os, name)

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


@pytest.mark.parametrize("fault", ["size", "full", "quota", "broken"])
def test_a_full_disk_names_the_file_and_leaves_the_old_ones(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: dict[str, tuple[Any, int, str]] = {
        "size": (size_limit(1500), errno.EFBIG, checkpoint.ADAPTER),
        "full": (failing("fsync", errno.ENOSPC, monkeypatch), errno.ENOSPC, checkpoint.ADAPTER),
        "quota": (failing("fsync", errno.EDQUOT, monkeypatch), errno.EDQUOT, checkpoint.ADAPTER),
        "broken": (failing("fsync", errno.EIO, monkeypatch), errno.EIO, checkpoint.ADAPTER),
    }
    new().save_pretrained(tmp_path)
    before = content(tmp_path)
    context, number, name = faults[fault]
    with pytest.raises(OSError, match=rf"{os.strerror(number)}; not saved: '{tmp_path / name}'") as caught, context:
        new().save_pretrained(tmp_path)
    assert caught.value.errno == number
    assert content(tmp_path) == before


def a_file(path: Path) -> Path:
    path.write_text("")
    return path


def a_link(path: Path) -> Path:
    path.symlink_to("nowhere")
    return path


def a_folder_of_a_folder(path: Path) -> Path:
    (path / checkpoint.ADAPTER).mkdir(parents=True)
    return path


PLACES: dict[str, tuple[Callable[[Path], Path], type[Exception], str]] = {
    "a file": (a_file, ValueError, "x: must be a folder, and is a file"),
    "within a file": (lambda p: a_file(p) / "y", NotADirectoryError, "x/y"),
    "a link to nothing": (a_link, ValueError, "x: must be a folder, and is none"),
    "a name with a 0": (lambda p: p / "a\0b", ValueError, r"x/a\\x00b: no folder can have this name"),
    "half a character": (lambda p: p / "a\ud800", ValueError, r"x/a\\ud800: no folder can have this name"),
    "a folder for a file": (a_folder_of_a_folder, IsADirectoryError, "not saved: .*adapter_model.safetensors"),
}


@pytest.mark.parametrize(("make", "kind", "message"), PLACES.values(), ids=PLACES)
def test_places_that_are_none(make: Callable[[Path], Path], kind: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=message) as caught:
        new().save_pretrained(make(tmp_path / "x"))
    assert "\n" not in str(caught.value)


def test_a_folder_that_vanished_or_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"not saved: '.*gone/prompt.json'"):
        writing.replace(tmp_path / "gone" / "prompt.json", b"")

    def refuse(*_: Any, **options: Any) -> None:
        raise PermissionError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)  # tests of root may write anywhere
    with pytest.raises(OSError, match=r"Read-only file system; not saved: '.*prompt.json'"):
        writing.replace(tmp_path / "prompt.json", b"")


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b", "x" * 300])
def test_a_lock_leaves_it_to_others_to_say_what_a_name_lacks(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such file|is none"), writing.locked(tmp_path / name):
        files.read_json(tmp_path / name)


def test_permissions_are_those_of_any_file(tmp_path: Path) -> None:
    """New files have what umask leaves. What was made private, or read-only, stays so."""
    before = os.umask(0o027)
    try:
        writing.replace_all(tmp_path, {"new": b"", "private": b"", "closed": b""})
        for name, mode in {"private": 0o600, "closed": 0o444}.items():
            (tmp_path / name).chmod(mode)
        (tmp_path / "link").symlink_to(tmp_path / "private")
        writing.replace_all(tmp_path, dict.fromkeys(("new", "private", "closed", "link"), b"2"))
    finally:
        os.umask(before)
    modes = {path.name: path.lstat().st_mode & 0o7777 for path in tmp_path.iterdir()}
    assert modes == {"new": 0o640, "private": 0o600, "closed": 0o444, "link": 0o640}


def test_other_names_of_a_file_keep_the_old_content(tmp_path: Path) -> None:
    """As in a backup by hard links."""
    writing.replace(tmp_path / "a", b"1")
    (tmp_path / "backup").hardlink_to(tmp_path / "a")
    writing.replace(tmp_path / "a", b"2")
    assert content(tmp_path) == {"a": b"2", "backup": b"1"}


@pytest.mark.parametrize("number", [errno.EBADF, errno.ENOLCK, errno.ENOTSUP, None])
def test_without_locks_each_file_is_whole(number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS, and systems that do not know fcntl. Whose temporary files lie there nobody knows: they stay."""
    (tmp_path / f".prefix_attn-{'0' * 16}.tmp").write_bytes(b"of another")
    if number is None:
        monkeypatch.setitem(sys.modules, "fcntl", None)
        spec = importlib.util.spec_from_file_location("writing", writing.__file__)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = writing

        def refuse(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(writing, "flock", refuse)
    module.replace(tmp_path / "a", b"a")
    with module.locked(tmp_path):
        assert len(content(tmp_path)) == 2
    assert content(tmp_path)["a"] == b"a"


def test_a_plot_is_whole(tmp_path: Path) -> None:
    """It was written in place, and through links."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "loss.png").symlink_to(tmp_path / "secret")
    metrics = {"train_loss": [[1, 2.0]], "validation_loss": []}
    record.plot(metrics, tmp_path / "loss.png")
    record.plot(metrics, tmp_path / "loss.svg")
    assert (tmp_path / "secret").read_bytes() == b"secret"
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert b"<svg" in (tmp_path / "loss.svg").read_bytes()
    before = content(tmp_path)
    with size_limit(100), pytest.raises(OSError, match=r"not saved: '.*loss\.png'"):
        record.plot(metrics, tmp_path / "loss.png")
    assert content(tmp_path) == before


# Several at once ------------------------------------------------------------------------------------------------------


def test_savers_and_readers_of_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All saves succeed. A reader sees the configuration, the tensors and the MLP of one of them; so does the end."""
    models = [new("mlp", length) for length in (3, 4, 5)]
    for length, model in zip((3, 4, 5), models):
        model.prefix_configs["default"].base_model_name_or_path = f"a/{length}"
        with torch.no_grad():
            model.prefixes["default"].embedding.fill_(length)
        model.save_pretrained(tmp_path, training_state=True)
    errors: list[BaseException] = []
    real = os.replace

    def slow(*args: Any) -> None:
        real(*args)
        threading.Event().wait(0.002)  # others run between two renames

    def save(model: PrefixModel) -> None:
        try:
            for _ in range(8):
                model.save_pretrained(tmp_path, training_state=True)
        except BaseException as error:
            errors.append(error)

    monkeypatch.setattr(os, "replace", slow)
    threads = [threading.Thread(target=save, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    base, seen = tiny("llama"), set()
    while any(thread.is_alive() for thread in threads):
        again = PrefixModel.from_pretrained(base, tmp_path, is_trainable=True)
        again.attachment.remove()
        config, encoder = again.prefix_configs["default"], again.prefixes["default"]
        seen.add(config.num_virtual_tokens)
        assert config.base_model_name_or_path == f"a/{config.num_virtual_tokens}"
        assert encoder.mlp is not None
        assert set(encoder.embedding.flatten().tolist()) == {float(config.num_virtual_tokens)}
    assert not errors
    assert seen <= {3, 4, 5}
    peft = json.loads((tmp_path / checkpoint.ADAPTER_CONFIG).read_text())
    tensors: dict[str, Tensor] = files.read_tensors(tmp_path / checkpoint.ADAPTER)
    assert peft["num_virtual_tokens"] == len(tensors[checkpoint.KEY])
    assert sorted(content(tmp_path)) == [
        "README.md",
        checkpoint.ADAPTER_CONFIG,
        checkpoint.ADAPTER,
        checkpoint.TRAINING,
    ]


def test_nobody_waits_forever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that was stopped while it held the lock stops no training, and no reader."""
    monkeypatch.setattr(writing, "_PATIENCE", 0.01)
    place = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(place, fcntl.LOCK_EX)
    new().save_pretrained(tmp_path)
    PrefixModel.from_pretrained(tiny("llama"), tmp_path)
    os.close(place)
    assert caplog.text.count("goes on without waiting") >= 2
    caplog.clear()
    new().save_pretrained(tmp_path)
    assert "waiting" not in caplog.text
