"""Read files of torch.save without unpickling: tensors, and plain containers of them.

``torch.load(weights_only=True)`` runs no code of a file, and still makes objects of any size that the file asks for:
``bytearray(1 << 40)``, or a storage of so many numbers. Here the instructions of a pickle are followed one by one. They
make numbers, texts, containers, and tensors that are views of the mapped file, so what is made is never larger than the
file. Whatever else they ask for is refused by its name.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from prefix_attn.quoting import quoted, shortened

_MAGIC = 0x1950A86A20F9469CFC6C  # of files before torch 1.6: pickles and storages, one after another
_LONGEST = 1 << 20  # instructions of a pickle; each makes at most an empty dict
_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_DTYPES = {f"torch.{n}": t for n in dir(torch) if isinstance(t := getattr(torch, n), torch.dtype)}
_DTYPES |= {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
_DTYPES["torch.storage.UntypedStorage"] = torch.uint8
_PARAMETERS = "torch.nn.modules.container.ParameterList"
_TENSORS = {f"torch._utils._rebuild_tensor{end}" for end in ("", "_v2", "_v3")}
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
_NAMES = {*_TENSORS, _PARAMETERS, _OF_TYPE, "torch.Tensor", "torch._tensor.Tensor"}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class Refused(Exception):
    """The file asks for more than tensors and plain containers, by the name in the message."""


class _Named(NamedTuple):
    """A function or class that the file names."""

    name: str


class _Storage(NamedTuple):
    """Numbers in the file, from the byte ``begin`` on."""

    dtype: torch.dtype
    begin: int
    numel: int


def read(file: BinaryIO) -> Any:
    """The content of a file of torch.save. Its tensors are views of the file, which stays mapped as long as they live.

    Raises:
        Refused: it holds something else. Any other exception: it is damaged.
    """
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return _read_zip(file, mapped) if zipfile.is_zipfile(file) else _read_old(mapped)


def _read_zip(file: BinaryIO, mapped: mmap.mmap) -> Any:
    with zipfile.ZipFile(file) as records:
        infos = {info.filename: info for info in records.infolist()}
    sizes = [info.file_size for info in infos.values()]
    if sizes != [info.compress_size for info in infos.values()] or sum(sizes) > len(mapped):
        raise ValueError("compressed records, or some within others")
    main = next(name for name in infos if name.partition("/")[2] == "data.pkl")
    folder = main.removesuffix("data.pkl")
    if order := infos.get(f"{folder}byteorder"):
        begin = _begin(order, mapped)
        if mapped[begin : begin + order.file_size] != b"little":
            raise ValueError("numbers of a big-endian machine")

    def find(dtype: torch.dtype, key: Any, numel: int) -> _Storage:
        record = infos[f"{folder}data/{key}"]
        if numel * dtype.itemsize != record.file_size:
            raise ValueError(f"a storage of {quoted(numel)} numbers in {record.file_size} bytes")
        return _Storage(dtype, _begin(record, mapped), numel)

    mapped.seek(_begin(infos[main], mapped))
    return _Machine(mapped, find).run()


def _begin(record: zipfile.ZipInfo, mapped: mmap.mmap) -> int:
    """Where the content of a record begins: behind its own header, which says how long it is."""
    header = record.header_offset
    if mapped[header : header + 4] != b"PK\3\4":
        raise ValueError("no record")
    begin = header + 30 + sum(struct.unpack("<HH", mapped[header + 26 : header + 30]))
    if begin + record.file_size > len(mapped):
        raise ValueError("cut off")
    return begin


def _read_old(mapped: mmap.mmap) -> Any:
    """Three pickles about the file, one of its content, one of the order of the storages, and the storages."""
    storages: dict[Any, _Storage] = {}

    def note(dtype: torch.dtype, key: Any, numel: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, 0, numel))

    magic, _, machine = (_Machine(mapped, note).run() for _ in range(3))
    if magic != _MAGIC or not machine["little_endian"]:
        raise ValueError("not of torch.save, or of a big-endian machine")
    begin = mapped.tell()
    _Machine(mapped, note, tensors=False).run()
    for key in _Machine(mapped, note).run():
        storage = storages[key]
        if mapped.read(8) != struct.pack("<q", storage.numel):
            raise ValueError("storages of other sizes")
        storages[key] = storage._replace(begin=mapped.tell())
        mapped.seek(storage.numel * storage.dtype.itemsize, 1)  # raises beyond the end
    if not all(storage.begin for storage in storages.values()):
        raise ValueError("storages are missing")
    mapped.seek(begin)
    return _Machine(mapped, lambda dtype, key, numel: storages[key]).run()


class _Machine:
    """Follows the instructions of one pickle, from where the file stands."""

    def __init__(
        self, mapped: mmap.mmap, find: Callable[[torch.dtype, Any, int], _Storage], *, tensors: bool = True
    ) -> None:
        """``find`` gives a storage by its key; without ``tensors``, None stands for each of them."""
        self.mapped, self.find, self.tensors = mapped, find, tensors
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copies: dict[int, Tensor] = {}
        self.left = len(mapped)  # entries and bytes that may be copied: a file has each of them once

    def run(self) -> Any:
        instructions = pickletools.genops(cast(IO[bytes], self.mapped))
        for number, (code, value, _) in enumerate(instructions):
            if number > _LONGEST:
                raise ValueError("too many instructions")
            if code.name in _VALUES:
                self.stack.append(value)
            elif code.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[code.name])
            elif code.name == "STOP":
                break
            elif code.name not in ("PROTO", "FRAME"):
                step = getattr(self, f"do_{code.name.lower()}", None)
                if step is None:
                    raise Refused(code.name)
                step(value)
        return self.stack.pop()

    def popped(self) -> list[Any]:
        """What lies above the last mark."""
        begin = self.marks.pop()
        found, self.stack[begin:] = self.stack[begin:], []
        return found

    def do_mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def do_empty_dict(self, _: None) -> None:
        self.stack.append({})

    def do_empty_list(self, _: None) -> None:
        self.stack.append([])

    do_empty_set = do_empty_list

    def do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.popped()))

    def do_tuple1(self, _: None) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def do_tuple2(self, _: None) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def do_tuple3(self, _: None) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def do_append(self, _: None) -> None:
        item = self.stack.pop()
        _as(list, self.stack[-1]).append(item)

    def do_appends(self, _: None) -> None:
        items = self.popped()
        _as(list, self.stack[-1]).extend(items)

    do_additems = do_appends

    def do_setitem(self, _: None) -> None:
        value, name = self.stack.pop(), self.stack.pop()
        _as(dict, self.stack[-1]).update(_entries([name, value]))

    def do_setitems(self, _: None) -> None:
        items = self.popped()
        _as(dict, self.stack[-1]).update(_entries(items))

    def do_binput(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    do_long_binput = do_binput

    def do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_binget(self, number: int) -> None:
        self.stack.append(self.memo[number])

    do_long_binget = do_binget

    def do_global(self, name: str) -> None:
        name = name.replace(" ", ".", 1).replace("__builtin__.", "builtins.", 1)
        if name not in _DTYPES and name not in _CALLS and name not in _NAMES:
            raise Refused(shortened(name, 100))
        self.stack.append(_DTYPES.get(name, _Named(name)))

    def do_stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.do_global(f"{module} {name}")

    def do_reduce(self, _: None) -> None:
        args, named = _as(tuple, self.stack.pop()), _as(_Named, self.stack.pop())
        self.stack.append(self.call(named.name, args))

    def do_newobj(self, _: None) -> None:
        args, named = _as(tuple, self.stack.pop()), _as(_Named, self.stack.pop())
        self.stack.append([] if named.name == _PARAMETERS else self.call(named.name, args))

    def do_build(self, _: None) -> None:
        """Fill a list of parameters. What an OrderedDict has besides its entries is dropped."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], list):
            state = _as(dict, state)
            parameters = _as(dict, state.get("_parameters", {}))
            self.pay(state)
            self.pay(parameters)
            found = {**parameters, **state}
            numbers = sorted(int(name) for name in found if isinstance(name, str) and name.isdecimal())
            self.stack[-1].extend(found[str(number)] for number in numbers)
        else:
            _as(dict, self.stack[-1])

    def do_binpersid(self, _: None) -> None:
        kind, dtype, *rest = _as(tuple, self.stack.pop())
        if kind == "module":  # a class, and its source
            self.stack.append(_as(_Named, dtype))
            return
        key, _, numel, *view = rest
        if kind != "storage" or any(part is not None for part in view) or not isinstance(key, str | int):
            raise ValueError("no storage, or a part of one")
        self.stack.append(self.find(_as(torch.dtype, dtype), key, _size(numel)))

    def pay(self, value: Any) -> None:
        """Note that ``value`` is copied, which instructions may ask for again and again."""
        self.left -= len(value) if isinstance(value, str | dict | list) else 0
        if self.left < 0:
            raise ValueError("copies of more than the file holds")

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """What a function gives that a file may name."""
        if name in _TENSORS:
            return self.tensor(*args[:4], dtype=_as(torch.dtype, args[6]) if name.endswith("_v3") else None)
        if name == _OF_TYPE and _as(_Named, args[0]).name in _TENSORS:
            return self.call(args[0].name, _as(tuple, args[2]))
        if name not in _CALLS:
            raise Refused(name)
        for value in args:
            self.pay(value)
        return _CALLS[name](*args)

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None = None) -> Any:
        """A view of the file, checked to lie within its storage."""
        storage, size, stride = _as(_Storage, storage), _as(tuple, size), _as(tuple, stride)
        dtype = dtype or storage.dtype
        numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
        last = _size(offset) + sum((_size(n) - 1) * _size(step) for n, step in zip(size, stride, strict=True)) + 1
        if 0 not in size and last > numel:
            raise ValueError("a tensor beyond its storage")
        if not self.tensors:
            return None
        if 0 in size:
            return torch.empty(size, dtype=dtype)
        return self.numbers(storage, dtype).as_strided(size, stride, offset)

    def numbers(self, storage: _Storage, dtype: torch.dtype) -> Tensor:
        """All numbers of a storage. They are copied, once, where they do not lie at multiples of their size."""
        length, begin = storage.numel * storage.dtype.itemsize, storage.begin
        if begin % dtype.itemsize == 0:
            return torch.frombuffer(self.mapped, dtype=dtype, count=length // dtype.itemsize, offset=begin)
        if begin not in self.copies:
            self.copies[begin] = torch.frombuffer(bytearray(self.mapped[begin : begin + length]), dtype=torch.uint8)
        return self.copies[begin].view(dtype)


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{quoted(value)} is no {kind.__name__}")
    return value


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 60:
        raise ValueError(f"{quoted(value)} is no size")
    return value


def _entries(items: list[Any]) -> dict[Any, Any]:
    """Names and values in turns. Tuples of tuples, and many huge numbers of one hash, would take forever to hash."""
    names = items[::2]
    for name in names:
        if not isinstance(name, str | int | float | bytes | None) or (type(name) is int and abs(name) >= 1 << 60):
            raise TypeError("names must be texts or numbers")
    return dict(zip(names, items[1::2], strict=True))


def _pairs(pairs: Any = ()) -> dict[Any, Any]:
    return dict(pairs) if isinstance(pairs, dict) else _entries([part for pair in pairs for part in _as(tuple, pair)])


def _bytes(text: Any = b"", _: Any = None) -> bytes:
    """Bytes, as older pickles write them. A number would be a count."""
    return text if isinstance(text, bytes) else _as(str, text).encode("latin1")


# What a file may name, besides dtypes, storages and tensors. None of it makes more than what it is given.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "builtins.dict": _pairs,
    "builtins.set": lambda items=[]: _as(list, items),
    "builtins.bytearray": _bytes,
    "_codecs.encode": _bytes,
    "torch.Size": lambda items: _as(tuple, items),
    "torch.device": lambda *parts: quoted(parts),
    "torch.serialization._get_layout": lambda name: name,
    "torch.nn.parameter.Parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
}
