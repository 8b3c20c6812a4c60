"""Files of torch.save are read without unpickling: what torch reads, and nothing that costs more than the file."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from prefix_attn import PrefixConfig, PrefixModel, get_prefix_model
from prefix_attn.hf.io import checkpoint, files, formats, pickles
from tests.hf import foreign
from tests.hf.models import tiny
from tests.memory import peak_growth

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
DTYPES += (torch.complex64, torch.float8_e4m3fn, torch.uint16)


def same(one: Any, other: Any) -> bool:
    """Whether two contents are equal, a list of parameters being a list and a set too."""
    if isinstance(other, torch.Tensor):
        one, other = one.detach(), other.detach()
        return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[n], v) for n, v in other.items())
    if isinstance(other, list | tuple | nn.ParameterList):
        return len(one) == len(other) and all(map(same, one, other))
    return one == (list(other) if isinstance(other, set) else other)


def contents() -> dict[str, Any]:
    base = torch.randn(6, 8)
    shared = {"whole": base, "row": base[2], "columns": base.T[3:5], "every second": base[::2, 1::3]}
    tensors = {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES}
    plain = {
        "a": [1, -1, 1 << 40, -(1 << 70), 2.5, True, None, "text", "\x80", b"bytes"],
        1: (),
        "b": ((1,), (1, 2, 3)),
    }
    plain |= {
        "b": ((1,), (1, 2, 3)),
        "c": Counter("aab"),
        "d": {"x"},
        "e": torch.Size([2, 3]),
        "f": torch.float16,
        "g": (1, 2, 3, 4),
    }
    nested = OrderedDict(state_dict=OrderedDict(nn.Linear(3, 4).state_dict()), epoch=1)
    parameters = {"l": nn.ParameterList([nn.Parameter(torch.randn(2)) for _ in range(12)]), "e": nn.ParameterList()}
    empty = {"none": torch.empty(0, 5), "number": torch.tensor(3.0), "one": nn.Parameter(torch.ones(1, 1, 1))}
    return {"shared": shared, "dtypes": tensors, "plain": plain, "nested": nested, "lists": parameters, "empty": empty}


@pytest.mark.parametrize("name", contents())
@pytest.mark.parametrize("way", ["zip", "old", "protocol 4"])
def test_what_torch_saves_is_read(name: str, way: str, tmp_path: Path) -> None:
    content = contents()[name]
    options: dict[str, Any] = {"zip": {}, "old": {"_use_new_zipfile_serialization": False}}.get(
        way, {"pickle_protocol": 4}
    )
    torch.save(content, tmp_path / "a.pt", **options)
    found = files.read_pickle(tmp_path / "a.pt")
    assert same(found, content)
    if name == "shared":  # in the file once, and in memory once
        ends = {found[part].untyped_storage().data_ptr() for part in content}
        assert len(ends) == 1


class Call:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def saved(content: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def with_pickle(data: bytes) -> bytes:
    """A file of torch.save whose pickle is ``data``."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"x": torch.ones(2)}))) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            new.writestr(name, data if name.endswith("data.pkl") else old.read(name))
    return file.getvalue()


def with_size(old: bool) -> bytes:
    """A storage that says it has 2**31 - 1 numbers, and a tensor of them."""
    data = saved({"x": torch.ones(77777)}, _use_new_zipfile_serialization=not old)
    return data.replace(b"J" + struct.pack("<i", 77777), b"J" + struct.pack("<i", 2**31 - 1))


def overlapping() -> bytes:
    """A thousand names of one record of a megabyte, and a tensor of each."""
    tensors = {str(i): torch.zeros(1 << 18) + i for i in range(3)}
    file = io.BytesIO(saved(tensors))
    with zipfile.ZipFile(file, "a") as records:
        one = next(info for info in records.infolist() if info.filename.endswith("data/0"))
        for number in range(1000):
            info = zipfile.ZipInfo(f"{one.filename}{number}")
            info.header_offset, info.file_size, info.compress_size = one.header_offset, one.file_size, one.file_size
            info.CRC = one.CRC
            records.filelist.append(info)
        records._didModify = True
    return file.getvalue()


def old_with(data: bytes) -> bytes:
    """The same in a file of before torch 1.6."""
    parts = saved({}, _use_new_zipfile_serialization=False)
    return parts[: parts.index(b"}q\x00.")] + data + parts[parts.index(b"]q\x00.") - 2 :]


HUGE = (1 << 34) - 1
TUPLES = b"\x80\x02}(" + b")\x85" + b"q\x00h\x00\x86" * 60 + b"K\x01u."  # takes 2**60 steps to hash
SAME_HASH = (
    b"\x80\x02}(" + b"".join(pickle.dumps(n * (2**61 - 1), 2)[2:-1] + b"N" for n in range(1, 4000)) + b"u."
)  # each is compared with all before
MEMOS = b"r\x00\x00\x00\x00", b"r\x01\x00\x00\x00"


def copies(function: bytes, argument: bytes) -> bytes:
    """A pickle that calls ``function`` 3,000 times with one and the same ``argument``."""
    return b"\x80\x02(c" + function + MEMOS[0] + argument + b"\x85" + MEMOS[1] + b"h\x00h\x01R" * 3000 + b"t."


TEXT = b"X" + struct.pack("<I", 1 << 20) + b"x" * (1 << 20)
ENTRIES = b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(3000)) + b"u"
NUMBERS = b"}(" + b"".join(b"U\x04%dN" % n for n in range(1000, 2200)) + b"u"
LISTS = b"ctorch.nn.modules.container\nParameterList\n)\x81" + NUMBERS + MEMOS[0] + b"b" + b"h\x00b" * 2500 + b"."
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "bytearray": (lambda: saved({"a": Call(bytearray, HUGE)}), "1\\d+ is no str"),
    "bytes": (lambda: saved({"a": Call(bytes, HUGE)}), "bytes"),
    "a list": (lambda: saved([Call(list, range(9))]), "builtins.list"),
    "zeros": (lambda: saved([Call(torch.zeros, HUGE)]), "getattr"),
    "a storage": (lambda: saved([Call(torch.UntypedStorage, HUGE)]), "is no _Named"),
    "a legacy tensor": (lambda: saved([Call(torch.FloatTensor, HUGE)]), "torch.FloatTensor"),
    "BYTEARRAY8": (lambda: with_pickle(b"\x80\x05\x96" + struct.pack("<Q", HUGE) + b"."), "bytearray8"),
    "BINBYTES8": (lambda: with_pickle(b"\x80\x05\x8e" + struct.pack("<Q", HUGE) + b"."), "bytes8"),
    "BINUNICODE": (lambda: with_pickle(b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"."), "unicodestring4"),
    "LONG4": (lambda: with_pickle(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"."), "not enough data"),
    "LONG_BINPUT": (lambda: with_pickle(b"\x80\x02]r" + struct.pack("<I", 2**32 - 1) + b"0."), "POP"),
    "many sets": (lambda: with_pickle(b"\x80\x04(" + b"\x8f" * 40_000 + b"t."), "too many instructions"),
    "many lists": (lambda: with_pickle(b"\x80\x04(" + b"]" * 40_000 + b"t."), "too many instructions"),
    "names that are tuples": (lambda: with_pickle(TUPLES), "names must be texts"),
    "numbers of one hash": (lambda: with_pickle(SAME_HASH), "names must be texts"),
    "copies of a text": (lambda: with_pickle(copies(b"_codecs\nencode\n", TEXT)), "copies of more"),
    "copies of a dict": (lambda: with_pickle(copies(b"collections\nOrderedDict\n", ENTRIES)), "copies of more"),
    "copies of a list": (lambda: with_pickle(b"\x80\x02" + LISTS), "copies of more"),
    "a storage larger than its record": (lambda: with_size(False), "2147483647 numbers in 311108 bytes"),
    "an old storage larger than the file": (lambda: with_size(True), "other sizes"),
    "old bytes": (lambda: old_with(b"\x8e" + struct.pack("<Q", HUGE) + b"."), "bytes8"),
    "records within others": (overlapping, "some within others"),
}


@pytest.mark.parametrize(("make", "message"), BOMBS.values(), ids=BOMBS)
def test_bombs_cost_nothing(
    make: Callable[[], bytes], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused for what they ask, not because memory ran out."""
    assert pickles._LONGEST * (64 + 8) < 100 << 20  # an empty dict, and where it lies
    monkeypatch.setattr(pickles, "_LONGEST", 10_000)
    path = tmp_path / "cache_last.pt"
    path.write_bytes(make())
    with peak_growth() as grown, pytest.raises(ValueError, match=message) as caught:
        formats.read_all(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600
    assert grown() < 100 << 20


def test_one_tensor_many_times(tmp_path: Path) -> None:
    """Each layer of a cartridge or of an MLP would get a copy. And an MLP with a huge product."""
    part, layer = torch.zeros(1, 1, 1 << 12, 4), torch.zeros(64, 64)
    torch.save({"trainable_keys": [part] * 10_000, "trainable_values": [part] * 10_000}, tmp_path / "cache_last.pt")
    state: dict[str, Any] = {"prefixes.default.embedding": torch.zeros(4, 64)}
    for number in range(300):
        state |= {
            f"prefixes.default.mlp.{2 * number}.weight": layer,
            f"prefixes.default.mlp.{2 * number}.bias": layer[0],
        }
    torch.save(state, tmp_path / "state.pt")
    tall = {"wte.weight": torch.zeros(2**14, 1), "control_trans.0.weight": torch.zeros(2**14, 1)}
    foreign.original(tmp_path / "tall", tall | {"control_trans.0.bias": torch.zeros(2**14)}, foreign.GPT2)
    for name, message in {"cache_last.pt": "claim more", "state.pt": "claim more", "tall": "16384 x 16384"}.items():
        with peak_growth() as grown, pytest.raises(ValueError, match=message):
            formats.read_all(tmp_path / name)
        assert grown() < 100 << 20


def test_tensors_of_many_dimensions(tmp_path: Path) -> None:
    """They may have as many as the file names, and messages do not list them."""
    base, dims = tiny("llama"), 20_000
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
    state: dict[str, Any] = model.state_dict()
    model.attachment.remove()
    one = torch.ones(1).as_strided((1,) * dims, (0,) * dims)
    large = torch.ones(1).as_strided((2,) * 40 + (1,) * dims, (0,) * (dims + 40))
    path = tmp_path / "state.pt"
    for tensor, message in {one: "was trained with", large: "claims the size"}.items():
        torch.save(state | {"base_model.lm_head.weight": tensor}, path)
        with pytest.raises(ValueError, match=message) as caught:
            PrefixModel.from_pretrained(base, path)
        assert len(str(caught.value)) < 600
    torch.save(state | {"base_model.lm_head.weight": one}, path)
    assert max(len(str(value)) for value in checkpoint.describe(path).values()) < 1000


def test_pickled_code_is_named_and_not_run(tmp_path: Path) -> None:
    for function in (os.system, eval, pickle.loads, torch.load, getattr):
        (tmp_path / "a.pt").write_bytes(saved({"a": Call(function, "print()")}))
        with pytest.raises(ValueError, match=rf"it wants to run \w*.*{function.__name__}\): not read; torch.save"):
            files.read_pickle(tmp_path / "a.pt")
    long = b"\x80\x02c" + b"x" * 1_000_000 + b"\ny\n."
    (tmp_path / "a.pt").write_bytes(with_pickle(long))
    with pytest.raises(ValueError, match=r"it wants to run xxx") as caught:
        files.read_pickle(tmp_path / "a.pt")
    assert len(str(caught.value)) < 500
