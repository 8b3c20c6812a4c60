"""Files that nobody meant as data: each reader refuses them at once, in a short sentence, at no cost."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import results as benchmark_results
from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning
from prefix_attn.cli import config
from prefix_attn.experiments import results
from prefix_attn.experiments.plan import Run
from prefix_attn.hf.io import formats
from prefix_attn.quoting import quoted, shortened
from prefix_attn.training import tables
from prefix_attn.training.data import Examples, read_examples
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.resume import checkpoints
from prefix_attn.training.tables import read_text
from tests.hf.models import tiny
from tests.memory import peak_growth

BIG = "x" * 1_000_000
DATA = (".csv", ".tsv", ".jsonl", ".json", ".json.gz", ".parquet", ".xml")


def beside(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Read the folder in which the file has this name."""

    def renamed(path: Path) -> Any:
        path.rename(path.with_name(name))
        return read(path.parent)

    return renamed


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    **{f"data{suffix}": (suffix, read_examples) for suffix in DATA},
    "text": (".txt", read_text),
    "results": (".jsonl", results.read),
    "benchmarks": (".json", benchmark_results.read),
    "configuration": (".yaml", config._entries),
    "safetensors": (".safetensors", formats.read_all),
    "torch.save": (".pt", formats.read_all),
    "index": (".index.json", formats.read_all),
    "adapter": (".json", beside("adapter_config.json", formats.read_all)),
    "prefixes": (".x", beside("model.safetensors", formats.read_all)),
    "a model": (".pt", lambda path: PrefixModel.from_pretrained(tiny("llama"), path)),
    "a table": (".pt", lambda path: PrefixTuning.from_pretrained(tiny("llama"), path)),
}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # its path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(path.name)
    os.chdir(here)


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a FIFO": (fifo, "FIFO|may be read|no such file|what can be read"),
    "a device": (device, "device|no such file|what can be read"),
    "a socket": (a_socket, "socket|no such file|what can be read"),
}


@pytest.mark.parametrize(("suffix", "read"), READERS.values(), ids=READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused(kind: str, suffix: str, read: Any, tmp_path: Path) -> None:
    """A FIFO without a writer would block forever, and a device never end."""
    make, message = KINDS[kind]
    make(tmp_path / f"a{suffix}")
    errors: list[BaseException] = []

    def run() -> None:
        try:
            read(tmp_path / f"a{suffix}")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(ValueError, match=message):
        raise errors[0]


def test_a_checkpoint_whose_state_is_no_file_is_none(tmp_path: Path) -> None:
    for number, content in enumerate([b"", b"[]", b"{}", b'{"global_step": "3"}', b"[" * 100_000, None]):
        state = tmp_path / f"checkpoint-{number}" / "trainer_state.json"
        state.parent.mkdir()
        os.mkfifo(state) if content is None else state.write_bytes(content)
    assert checkpoints(tmp_path) == {}


# Bombs ----------------------------------------------------------------------------------------------------------------


def test_a_gzip_bomb_is_never_in_memory(tmp_path: Path) -> None:
    """A megabyte of a gigabyte. What texts are packed to is read."""
    path = tmp_path / "bomb.json.gz"
    packed = gzip.compress(b" " * (1 << 26))
    path.write_bytes(packed * 16)
    with peak_growth() as grown, pytest.raises(ValueError, match=r"not JSON \(unpacks to more than"):
        read_examples(path)
    assert grown() < 100 << 20
    path.write_bytes(gzip.compress(json.dumps([{"source": "a " * 500_000, "target": "b"}]).encode()))
    assert read_examples(path)[0].source == "a " * 500_000
    path.write_bytes(packed[:-20] + b"\xff" * 20)
    with pytest.raises(ValueError, match="not JSON"):
        read_examples(path)


@pytest.mark.parametrize("kind", ["rows", "cells", "pages"])
def test_a_parquet_bomb_is_stopped(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few kilobytes: of any number of rows, of one long cell in each row, of pages of zeros."""
    import pyarrow
    from pyarrow import parquet

    path, options = tmp_path / "bomb.parquet", {"compression": "zstd", "use_dictionary": True}
    if kind == "pages":
        column = pyarrow.array([" " * (1 << 25)])
        options |= {"use_dictionary": False, "data_page_size": 1 << 30}
    else:
        word = "x" if kind == "rows" else "x" * 500_000
        indices = pyarrow.nulls(200_000, pyarrow.int32()).fill_null(0) if kind == "rows" else [0] * 3000
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(indices, pyarrow.int32()), [word])
    table = pyarrow.table({"source": column, "target": column})
    parquet.write_table(table, path, store_schema=False, **options)
    assert path.stat().st_size < 40_000
    if kind == "rows":  # it takes a while to count the others
        monkeypatch.setattr(tables, "unpacked_at_most", lambda _: 1 << 18)
    read = Examples(path)
    with peak_growth() as grown, pytest.raises(ValueError, match="unpacks to more than"):
        for _ in read:
            pass
    assert grown() < 200 << 20


LISTS = {  # a footer up to the head of one of its lists
    "columns of a schema": b"\x15\x02\x19",
    "groups of rows": b"\x15\x02\x19\x1c\x48\x01r\x15\x00\x00\x16\x00\x19",
    "columns of a group": b"\x15\x02\x19\x1c\x48\x01r\x15\x00\x00\x16\x00\x19\x1c\x19",
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_that_a_parquet_footer_does_not_hold_takes_no_memory(case: str, tmp_path: Path) -> None:
    """A million entries, in 40 bytes: pyarrow would make 700 MB of columns before it reads the first."""
    footer = LISTS[case] + b"\xfc\xc0\x84\x3d"
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with peak_growth() as grown, pytest.raises(ValueError, match="not Parquet"):
        read_examples(path)
    assert grown() < 50 << 20


def test_many_columns_are_no_lie(tmp_path: Path) -> None:
    """Lists in a footer may be as long as it has room for, with names of one character."""
    import pyarrow
    from pyarrow import parquet

    columns = {chr(n): [n] for n in range(0x100, 0x500)} | {"source": ["a"], "target": ["b"]}
    parquet.write_table(
        pyarrow.table(columns), tmp_path / "a.parquet", store_schema=False, write_statistics=False, compression="none"
    )
    assert [example.source for example in read_examples(tmp_path / "a.parquet")] == ["a"]


def test_no_byte_of_a_parquet_footer_ends_the_process(tmp_path: Path) -> None:
    """pyarrow aborts where it is asked for the sizes of a column whose statistics are damaged."""
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [{"source": word, "target": word} for word in ("a", "b")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, store_schema=False)
    code = """
import sys
from pathlib import Path
from prefix_attn.training.tables import parquet_records

path = Path(sys.argv[1])
data = path.read_bytes()
refused = 0
for at in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data)):
    path.write_bytes(data[:at] + bytes([(data[at] + 1) % 256]) + data[at + 1 :])
    try:
        list(parquet_records(path, {"source", "target"}))
    except ValueError:
        refused += 1
print(refused)
"""
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_a_template_is_no_bomb(tmp_path: Path) -> None:
    """A format may ask for any width."""
    for template in ("{source:>99999999999}", "{source!r}", "{source:{system}}"):
        with pytest.raises(ValueError, match=r"\{source\} and \{system\} take no format"):
            Prompt(template)
    (tmp_path / "prompt.json").write_text(json.dumps({"template": "{source:>99999999999}"}))
    with pytest.raises(ValueError, match=r"prompt.json: template .* take no format"):
        Prompt.load(tmp_path)


def test_entities_of_xml_are_bounded(tmp_path: Path) -> None:
    """The billion laughs: expat stops them. There is nothing like that in WebNLG."""
    lines = [f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12)]
    (tmp_path / "a.xml").write_text(f'<!DOCTYPE a [<!ENTITY l0 "{"ha" * 50}">{"".join(lines)}]><a>&l11;</a>')
    with peak_growth() as grown, pytest.raises(ValueError, match="not XML"):
        read_examples(tmp_path / "a.xml")
    assert grown() < 100 << 20


# Messages -------------------------------------------------------------------------------------------------------------

SURROGATE = "\\ud800"  # in JSON
LONG: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a column of csv": ("a.csv", f"{BIG},b\n1,2\n", {}),
    "a column twice": ("a.csv", f"{BIG},{BIG}\n1,2\n", {}),
    "a cell of csv": ("a.csv", f"source,target\n{BIG},\n", {}),
    "a quoted cell": ("a.csv", f'source,target\n"{BIG}"{BIG},x\n', {}),
    "a key": ("a.jsonl", json.dumps({BIG: 1}), {}),
    "a key twice": ("a.jsonl", f'{{"{BIG}": 1, "{BIG}": 2}}', {}),
    "a number": ("a.jsonl", f'{{"source": {"1" * 1_000_000}}}', {}),
    "no JSON": ("a.jsonl", BIG, {}),
    "messages": ("a.jsonl", json.dumps({"messages": BIG}), {}),
    "a role": ("a.jsonl", json.dumps({"messages": [{"role": BIG, "content": 1}]}), {}),
    "roles": ("a.jsonl", json.dumps({"messages": [{"role": BIG, "content": "a"}]}), {}),
    "triples": ("a.json", json.dumps([{"tripleset": [[BIG]], "annotations": []}]), {}),
    "entries": ("a.json", json.dumps(BIG), {}),
    "an eid": ("a.xml", f'<a><entry eid="{BIG}"/></a>', {}),
    "half a character": ("a.jsonl", f'{{"source": "{SURROGATE}", "target": "x"}}', {}),
    "half a key": ("a.jsonl", f'{{"{SURROGATE}": "x"}}', {}),
    "half a role": ("a.jsonl", f'{{"messages": [{{"role": "{SURROGATE}", "content": "a"}}]}}', {}),
    "half a tool": (
        "a.jsonl",
        f'{{"messages": [{{"role": "u", "content": "a", "tool_calls": ["{SURROGATE}"]}}, '
        '{"role": "assistant", "content": "a"}]}',
        {},
    ),
    "deep": ("a.jsonl", "[" * 1_000_000, {}),
}


@pytest.mark.parametrize(("name", "text", "options"), LONG.values(), ids=LONG)
def test_messages_are_short(name: str, text: str, options: dict[str, Any], tmp_path: Path) -> None:
    """A cell of a megabyte is quoted by a few characters, and half of a character as its number."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        read_examples(tmp_path / name, **options)
    assert len(str(caught.value).encode()) < 1000


def test_results_and_runs_of_strangers(tmp_path: Path) -> None:
    for line in (b"\xff", b"[" * 100_000, BIG.encode(), b"[1]", b"{}"):
        (tmp_path / "a.jsonl").write_bytes(line + b"\n")
        with pytest.raises(ValueError, match=r"line 1: not") as caught:
            results.read(tmp_path / "a.jsonl")
        assert len(str(caught.value)) < 600
    for values in ([], {BIG: 1}, {"task": "e2e"}, {"method": BIG}, {"task": [1], "method": "frozen", "train": "a"}):
        with pytest.raises(ValueError, match=r"setting|method must be") as caught:
            Run.from_dict(values)  # pyrefly: ignore[bad-argument-type]
        assert len(str(caught.value)) < 600


def test_prompts_of_strangers(tmp_path: Path) -> None:
    bad: list[Any] = [[], {"template": 1}, {"template": BIG}, {"template": "{source}", "system": [BIG]}, {BIG: 1}]
    bad += [{"template": "{source}\ud800"}, {"one_line": "no"}, {"template": "{" + BIG + "}"}]
    for content in bad:
        (tmp_path / "prompt.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"prompt.json: ") as caught:
            Prompt.load(tmp_path)
        assert len(str(caught.value)) < 1000


def test_configurations_of_strangers() -> None:
    """Fields of another type or length, and a backend, which a file does not choose."""
    for name in ("mode", "init", "gate", "task_type", "backend", "layers", "encoder_activation", "encoder_hidden_size"):
        with pytest.raises(ValueError, match=name) as caught:
            PrefixConfig.from_dict({name: BIG})
        assert len(str(caught.value)) < 600
    for size in (1.5, True, "8"):
        with pytest.raises(ValueError, match="encoder_hidden_size must be a positive int"):
            PrefixConfig(encoder_hidden_size=size)  # pyrefly: ignore[bad-argument-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        PrefixConfig(backend="evil")
    assert PrefixConfig.from_dict({"backend": "eager"}).backend == "auto"
    assert "backend" not in PrefixConfig(backend="eager").to_dict()


def test_quoted() -> None:
    assert quoted("a\ud800é") == "'a\\ud800é'"
    assert shortened("a\ud800é") == "a\\ud800é"
    assert quoted({"a": [1, 2], "b": (3,)}) == "{'a': [1, 2], 'b': (3,)}"
    nested: Any = BIG
    for _ in range(5):
        nested = [nested] * 1000
    for value in (BIG, nested, dict.fromkeys(range(10**5)), 10**4000, {BIG: nested}, frozenset(range(10**5))):
        assert len(quoted(value)) <= 410
