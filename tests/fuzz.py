"""Damaged files for every reader in the repository.

    python -m tests.fuzz --count 100000

Each file begins as a good one that is made here, and is damaged one to four times: bits, lengths, slices, and what
stands for a value in JSON, XML, tables and pickles. A reader may read it, or raise one ValueError that names the file
in a short sentence. Anything else is a fault, and its line says how to make that file again. ``tests/test_fuzz.py``
does a thousand of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import random
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from benchmarks import results as benchmark_results
from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, get_prefix_model
from prefix_attn.cli import config
from prefix_attn.experiments import results
from prefix_attn.experiments.plan import Run
from prefix_attn.hf.io import checkpoint, formats
from prefix_attn.training.data import read_examples
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tables import read_text
from tests.hf import foreign
from tests.hf.models import tiny
from tests.memory import peak_growth

LONGEST, SLOWEST = 2500, 10.0  # characters of a message, and seconds of a reader
Files = dict[str, bytes]


class Target(NamedTuple):
    """A reader: good files, of which one is damaged, and what reads their folder."""

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


# What is read ---------------------------------------------------------------------------------------------------------


@cache
def model(name: str) -> PrefixModel:
    return get_prefix_model(tiny(name), PrefixConfig(num_virtual_tokens=2)).eval()


def prefixes(name: str) -> Callable[[Path], Any]:
    """Load every prefix into a model, for training or not; then the model is what it was."""

    def read(folder: Path) -> None:
        here = model(name)
        try:
            here.load_prefixes(folder, "new", is_trainable=len(folder.name) % 2 == 0)
        finally:
            for made in set(here.prefix_names) - {"default"}:
                here.delete_prefix(made)

    return read


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def table(folder: Path) -> None:
    checkpoint.load_table(folder, model("llama").base_model)


def runs(folder: Path) -> None:
    for result in results.read(only(folder)):
        try:
            Run.from_dict(result["run"])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None


# What is damaged ------------------------------------------------------------------------------------------------------


def ours(folder: Path, **options: Any) -> None:
    made = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=2, **options))
    made.save_pretrained(folder, training_state=True)


def of_peft(folder: Path) -> None:
    """Ours without what only we read, and pickled as PEFT did before safetensors."""
    ours(folder)
    tensors = formats.read(folder).tensors
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / checkpoint.ADAPTER).unlink()


def state(folder: Path, suffix: str, **options: Any) -> None:
    made = get_prefix_model(tiny("llama"), PrefixConfig(num_virtual_tokens=2, **options))
    if suffix == "index":
        save_file(made.state_dict(), folder / "a-00001-of-00001.safetensors")
        listed = {"weight_map": dict.fromkeys(made.state_dict(), "a-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(listed))
    elif suffix == "safetensors":
        save_file(made.state_dict(), folder / "model.safetensors")
    else:
        torch.save({"epoch": 1, "state_dict": made.state_dict(), "x": [1.5, None, True]}, folder / f"last.{suffix}")


def writes(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def of_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [
        {"source": f"a{i % 3}", "target": "b", "n": i, "messages": [{"role": "user", "content": "c"}]} for i in range(9)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", compression="zstd")


ROWS = [{"source": f"name : {i}", "target": ["a\n b", "c"]} for i in range(4)]
TALK = [{"messages": [{"role": r, "content": "a"} for r in ("system", "user", "assistant")]}] * 3
DART = [{"tripleset": [["a", "b", "c"]], "annotations": [{"text": "A b.", "source": "x"}]}] * 3
WEBNLG = '<b><entries><entry category="A" eid="1"><modifiedtripleset><mtriple>a | b | c</mtriple></modifiedtripleset>'
WEBNLG += '<lex comment="good"><text>A b c.</text></lex></entry></entries></b>'
RUN = {"run": {"task": "e2e", "method": "prefix", "train": "a.csv", "virtual_tokens": 5}, "bleu": 1.0}
STATE = {"global_step": 3, "log_history": [{"loss": 1.0}]}
TARGETS: dict[str, Target] = {
    "ours": Target(ours, prefixes("llama")),
    "ours, an MLP": Target(lambda f: ours(f, prefix_projection=True, encoder_hidden_size=4), prefixes("llama")),
    "ours, embeddings": Target(lambda f: ours(f, mode="embedding"), prefixes("llama")),
    "PEFT's": Target(of_peft, prefixes("llama")),
    "a checkpoint": Target(lambda f: state(f, "ckpt", prefix_projection=True, gate="zero"), prefixes("llama")),
    "a state": Target(lambda f: state(f, "safetensors", mode="infix"), prefixes("llama")),
    "shards": Target(lambda f: state(f, "index"), prefixes("llama")),
    "a cartridge": Target(lambda f: foreign.cartridge(f / "a.pt", foreign.table(3), 4, frozen=1), prefixes("gpt2")),
    "adapters'": Target(
        lambda f: foreign.adapters(f, "gpt2", "GPT2LMHeadModel", {"self_prefix": foreign.mlp(3)[0]}), prefixes("gpt2")
    ),
    "the original": Target(lambda f: foreign.original(f, foreign.mlp(3)[0], foreign.GPT2), prefixes("gpt2")),
    "the original, old": Target(
        lambda f: foreign.original(f, foreign.mlp(3)[0], foreign.GPT2, zipped=False), prefixes("gpt2")
    ),
    "a table": Target(lambda f: PrefixTuning(tiny("llama"), prefix_length=2, hidden_size=32).save_pretrained(f), table),
    "csv": Target(writes("a.csv", 'source,target\na,b\n"c ""d"" \n e",f\n'), lambda f: read_examples(only(f))),
    "E2E": Target(writes("a.tsv", "mr\tref\nname[A], x[b]\tText.\n"), lambda f: read_examples(only(f))),
    "jsonl": Target(writes("a.jsonl", "\n".join(map(json.dumps, ROWS))), lambda f: read_examples(only(f))),
    "messages": Target(writes("a.jsonl", "\n".join(map(json.dumps, TALK))), lambda f: read_examples(only(f))),
    "json": Target(writes("a.json", json.dumps(ROWS).encode("utf-16")), lambda f: read_examples(only(f))),
    "DART": Target(writes("a.json.gz", gzip.compress(json.dumps(DART).encode())), lambda f: read_examples(only(f))),
    "WebNLG": Target(writes("a.xml", WEBNLG), lambda f: read_examples(f)),
    "parquet": Target(of_parquet, lambda f: read_examples(only(f))),
    "text": Target(writes("a.txt", "é text\r\n" * 9), lambda f: read_text(only(f))),
    "prompt": Target(
        writes("prompt.json", '{"template": "{system} {source}\\n", "system": "s", "one_line": true}'), Prompt.load
    ),
    "results": Target(writes("a.jsonl", (json.dumps(RUN) + "\n") * 3), runs),
    "configuration": Target(
        writes("a.yaml", "steps: 5\nmodel: &x a\ndata: 'b'\nseed: null\n"), lambda f: config._entries(only(f))
    ),
    "benchmarks": Target(
        writes("a.json", json.dumps({"suite": "a", "records": [{"case": {}, "what": "x", "way": "y"}]})),
        lambda f: benchmark_results.read(only(f)),
    ),
}


@cache
def good(name: str) -> Files:
    """The files of a target, as its library writes them."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        TARGETS[name].make(folder)
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".md"}


# How ------------------------------------------------------------------------------------------------------------------

VALUES = (
    *(
        b"0",
        b"-1",
        b"1e999",
        b"NaN",
        b"null",
        b"true",
        b"[]",
        b"{}",
        b'""',
        b"1.5",
        b'"\\ud800"',
        b'"\\u0000"',
        b"[[]]",
    ),
    *(b"9" * 5000, b'"' + b"x" * 100_000 + b'"', b"[" * 10_000, str(2**63).encode(), str(2**31).encode(), b"1" * 30),
)
CODES = b".()]}0N\x85\x86\x87\x88\x89K\x01J\xff\xff\xff\x7fh\x00q\x00RbQcos\nsystem\n\x8e\x96\x8bX\x80\x02tuse\x93\x94"
NUMBERS = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**40)
VALUE = re.compile(rb'"[^"\n]{0,200}"|-?\d+\.?\d*|true|false|null|\[\]')


def damage(data: bytes, rng: random.Random) -> bytes:
    """``data``, damaged once."""
    kind, size = rng.randrange(10), len(data)
    at = rng.randrange(size + 1)
    length = min(size - at, rng.choice((1, 2, 8, 64, size)))
    if kind == 0 and size:
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 8))):
            flipped[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
    if kind == 4:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if kind == 5:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(NUMBERS) % 256**width
        return data[:at] + number.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]
    if kind == 6:
        code = rng.randrange(len(CODES))
        return data[:at] + CODES[code : code + rng.randrange(1, 9)] + data[at + rng.randrange(9) :]
    found = list(VALUE.finditer(data[: 1 << 16]))
    if not found:
        return damage(data, rng)
    match, other = rng.choice(found), rng.choice(found)
    value = rng.choice((*VALUES, other[0], match[0] * 2))
    return data[: match.start()] + value + data[match.end() :]


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The same once or more, within gzip too, and with a right length before the header of safetensors."""
    packed = data[:2] == b"\x1f\x8b" and rng.random() < 0.7
    data = gzip.decompress(data) if packed else data
    length = int.from_bytes(data[:8], "little")
    header = 0 < length < len(data) and data[8:9] == b"{" and rng.random() < 0.7
    part = data[8 : 8 + length] if header else data
    for _ in range(rng.randrange(1, 5)):
        part = damage(part, rng)
    part = len(part).to_bytes(8, "little") + part + data[8 + length :] if header else part
    return gzip.compress(part, 1) if packed else part


def case(number: int, names: list[str]) -> tuple[str, Files]:
    """Target and files of a number."""
    rng = random.Random(number)
    name = names[number % len(names)]
    content = dict(good(name))
    broken = rng.choice(list(content))
    content[broken] = damaged(content[broken], rng)
    return name, content


def fault(name: str, content: Files, place: Path) -> tuple[str, str]:
    """What a reader does with files: "read", "refused" or "fault", and why."""
    for path in place.iterdir():
        path.unlink()
    for file, data in content.items():
        (place / file).write_bytes(data)
    start = time.process_time()
    try:
        TARGETS[name].read(place)
        verdict = "read", ""
    except ValueError as error:
        text = str(error)
        verdict = "refused", ""
        if len(text) > LONGEST or str(place) not in text or not text.isprintable():
            verdict = "fault", f"a message of {len(text)} characters: {text[:300]!r}"
    except Exception:
        verdict = "fault", traceback.format_exc(limit=-4)
    seconds = time.process_time() - start
    return ("fault", f"{seconds:.1f} s") if seconds > SLOWEST else verdict


def fuzz(numbers: range, names: list[str]) -> Iterator[tuple[int, str, str, str]]:
    """Number, target, verdict and reason of each file."""
    with tempfile.TemporaryDirectory() as folders:
        places = [Path(folders, name) for name in ("a", "bc")]
        for place in places:
            place.mkdir()
        for number in numbers:
            name, content = case(number, names)
            yield number, name, *fault(name, content, places[number // len(names) % 2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="how many files")
    parser.add_argument("--first", type=int, default=0, help="the number of the first; files depend on it alone")
    parser.add_argument("--only", choices=TARGETS, help="one reader")
    given = parser.parse_args()
    logging.disable()
    torch.set_num_threads(1)
    names = [given.only] if given.only else list(TARGETS)
    counts, faults, start = Counter[tuple[str, str]](), 0, time.monotonic()
    for name in names:
        good(name)
    with peak_growth() as grown:
        for number, name, verdict, why in fuzz(range(given.first, given.first + given.count), names):
            counts[name, verdict] += 1
            if verdict == "fault":
                faults += 1
                print(f"{name}, file {number}: {why}", flush=True)
    for name in names:
        print(f"{name:20}", *(f"{counts[name, verdict]:6} {verdict}" for verdict in ("read", "refused", "fault")))
    seconds, memory = time.monotonic() - start, grown() >> 20
    print(f"{given.count} files in {seconds:.0f} s, {faults} faults, memory grew by {memory} MB at its peak")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
