"""Texts stay as the file has them; what cannot be read is refused in one line that says what to do."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import pytest

from prefix_attn.training.data import Examples, hold_out, is_held_out, read_examples
from prefix_attn.training.examples import Example
from prefix_attn.training.tables import read_text

SOURCE, TARGET = "Ticket 7,\nthe code fails:\n\n    x = 1", "  def f():\r\n\treturn  1\n\n# \u2028ﬁn é\u0301 </s>\n"


def save(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the form that the name asks for."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        cells = [[f'"{value}"' for value in values] for values in (rows[0], *(row.values() for row in rows))]
        path.write_bytes("".join(mark.join(some) + "\n" for some in cells).encode())
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl", "x.json", "x.parquet"])
def test_texts_stay_as_they_are(name: str, tmp_path: Path) -> None:
    """Lines of a cell were joined, and inner spaces. Indentation at the start of a target is part of it too."""
    path = save(tmp_path / name, [{"source": SOURCE, "target": TARGET}, {"source": "007", "target": "NA"}])
    assert read_examples(path) == [Example(SOURCE, (TARGET,)), Example("007", ("NA",))]


def test_e2e_alone_is_folded(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('mr,ref\n"name[a  b],\n area[c]","one,\n two  three"\n')
    assert read_examples(path) == [Example("name : a b | area : c", ("one, two three",))]
    assert Examples(path).one_line
    assert read_examples(path, source_column="mr", target_column="ref")[0].references == ("one,\n two  three",)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_the_delimiter_is_found_in_the_header(delimiter: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    rows = [["id", " source ", '"target"'], ["1", '"a;|\t, b"', "c"]]
    path.write_text("".join(delimiter.join(cells) + "\n" for cells in rows))
    assert read_examples(path) == [Example("a;|\t, b", ("c",))]
    assert read_examples(path, delimiter=delimiter) == [Example("a;|\t, b", ("c",))]


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [("utf-8", b""), ("utf-8", codecs.BOM_UTF8), ("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE),
     ("utf-32-le", codecs.BOM_UTF32_LE), ("cp1252", b"")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
def test_the_encoding_is_found(encoding: str, mark: bytes, name: str, tmp_path: Path) -> None:
    text = {"x.csv": "source,target\nmüde,“né”\n", "x.jsonl": '{"source": "müde", "target": "“né”"}\n'}[name]
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    assert read_examples(tmp_path / name) == [Example("müde", ("“né”",))]


def test_the_encoding_may_be_given(tmp_path: Path) -> None:
    for encoding in ("utf-16-le", "cp1251", "latin-1", "utf-8"):
        text = "да" if encoding == "cp1251" else "é"
        (tmp_path / "x.csv").write_bytes(f"source,target\na,{text}\n".encode(encoding))
        assert read_examples(tmp_path / "x.csv", encoding=encoding) == [Example("a", (text,))]
    (tmp_path / "x.txt").write_bytes("\ufeffa\r\n b\né".encode())
    assert read_text(tmp_path / "x.txt") == "a\r\n b\né"


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    """The csv module refuses more than 131,072 characters by default."""
    path = save(tmp_path / "x.csv", [{"source": "a" * 200_000, "target": "b"}])
    assert len(read_examples(path)[0].source) == 200_000


MESSY = """source,target
good,"row
of two lines"
,no source
no target,
short
good,row
too,many,cells
good,"bad "quotes"
blank,"  "
"""


def test_all_bad_rows_are_reported_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Reading stopped at the first of them. Lines are those where a row begins."""
    path = tmp_path / "x.csv"
    path.write_text(MESSY)
    with pytest.raises(ValueError, match="rows cannot be used") as caught:
        read_examples(path)
    assert str(caught.value) == (
        f"{path}: 6 of 8 rows cannot be used: 3 x 'target' is empty (lines 5, 6, 10), 1 x 'source' is empty "
        "(line 4), 1 x more cells than columns; text with ',' needs quotes (line 8), 1 x not CSV: ',' expected "
        "after '\"' (line 9); mend them, or leave them out with --skip-bad-rows"
    )
    assert read_examples(path, skip_bad_rows=True) == [Example("good", ("row\nof two lines", "row"))]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: 6 of 8 rows are left out: 3 x 'target' is empty (lines 5, 6, 10)")


def test_three_lines_stand_for_many(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"source": "a", "target": ""}\n{"source": "b", "target": "c"}\n' * 40)
    with pytest.raises(ValueError, match=r"40 of 80 rows .* 40 x 'target' is empty \(lines 1, 3, 5, \.\.\.\)"):
        read_examples(tmp_path / "x.jsonl")
    assert Examples(tmp_path / "x.jsonl", skip_bad_rows=True).check() == 40


WRONG: dict[str, tuple[str, str | bytes, dict[str, str], str]] = {
    "columns": ("x.csv", "in,out\na,b\n", {}, "no column 'source'; there are ['in', 'out'], with ',' between cells"),
    "twin columns": ("x.csv", "source,target,target\na,b,c\n", {}, "more than one column is named 'target'; rename"),
    "twin columns after spaces": ("x.tsv", "source\ttarget \ttarget\n", {}, "more than one column is named 'target'"),
    "twin keys": ("x.jsonl", '{"source": "a", "target": "b", "target": "c"}', {}, "more than one key is named 'ta"),
    "delimiter": ("x.csv", "source;target\na;b\n", {"delimiter": ","}, "there are ['source;target'], with ',' between"),
    "long delimiter": ("x.csv", "source;target\n", {"delimiter": "tab"}, "delimiter must be one character"),
    "delimiter of json": ("x.jsonl", "{}", {"delimiter": ","}, "a delimiter is for .csv and .tsv files, got ','"),
    "encoding": ("x.csv", b"source,target\na,\xe9\n", {"encoding": "utf-8"}, "not utf-8 text (invalid continuation"),
    "no encoding": ("x.csv", "source,target\n", {"encoding": "utf9"}, "one that Python knows, such as utf-8 or"),
    "unmarked utf-16": ("x.csv", "source,target\na,b\n".encode("utf-16-le"), {}, "--encoding utf-16-le or utf-16-be"),
    "binary": ("x.jsonl", b"\x80\x02\x8d\xff", {}, "not UTF-8 text (invalid start byte, byte 0x80), and not cp1252"),
    "number": ("x.jsonl", '{"source": "a", "target": 7}', {}, "line 1: 'target' must be text, got int; mend it, or"),
    "boolean": ("x.json", '[{"source": true, "target": "a"}]', {}, "entry 0: 'source' must be text, got bool"),
    "half a character": ("x.jsonl", r'{"source": "a", "target": "\ud83d"}', {}, r"holds half of a character, \ud83d"),
    "null": ("x.jsonl", '{"source": "a", "target": null}', {}, "line 1: 'target' is empty"),
    "list": ("x.jsonl", '{"source": "a", "target": ["b", 3]}', {}, "line 1: 'target' must be text, got int"),
    "cut json": ("x.jsonl", '{"source": "a", "targ', {}, "line 1: not JSON (Unterminated string starting at) at"),
    "other keys": ("x.json", '[{"a": "b"}]', {}, "entry 0: no key 'source'; there are ['a']"),
    "parquet": ("x.parquet", b"PAR1", {}, "not Parquet ("),
    "encoding of parquet": ("x.parquet", b"PAR1", {"encoding": "utf-8"}, "an encoding is for .csv, .tsv, .json"),
    "no text": ("x.xlsx", b"PK", {}, "a file that ends in one of ('.jsonl', '.csv', '.tsv', '.parquet'"),
    "no messages": ("x.jsonl", '{"messages": []}', {}, "line 1: 'messages' must be a list of messages, got []"),
    "no roles": ("x.jsonl", '{"messages": [{"from": "human"}]}', {}, "needs messages with 'role' and 'content', got {"),
    "no content": ("x.jsonl", '{"messages": [{"role": "user", "content": 3}]}', {}, "content of 'user' must be text"),
    "no answer": ("x.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', {}, "no message of the role 'assi"),
    "only an answer": ("x.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}', {}, "nothing to answer"),
    "nothing usable": ("x.csv", "source,target\n,\n", {"skip_bad_rows": "yes"}, "no row can be used (1 x 'source' is"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_one_line(case: str, tmp_path: Path) -> None:
    name, content, options, message = WRONG[case]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_examples(tmp_path / name, **options)
    assert "\n" not in str(caught.value)


def test_a_share_is_held_out_whatever_the_order(tmp_path: Path) -> None:
    """Rows of one input stay together. Of those held out the same few validate, in any order."""
    rows = [{"source": f"text {i % 300}", "target": f"{i}"} for i in range(600)]
    train, held = hold_out(Examples(save(tmp_path / "a.jsonl", rows)), 0.2, 20)
    kept = list(train)
    again, same = hold_out(Examples(save(tmp_path / "b.jsonl", rows[::-1])), 0.2, 20)
    assert len(held) == 20
    assert all(len(example.references) == 2 for example in held)
    assert {example.source for example in held} == {example.source for example in same}
    assert {example.source for example in kept} == {example.source for example in again}
    assert not {example.source for example in kept} & {example.source for example in held}
    assert 400 < len(kept) < 560
    few, more = Examples(save(tmp_path / "c.jsonl", rows[:1])), Examples(tmp_path / "a.jsonl")
    for examples, share, message in ((few, 0.5, " of 1 rows; take another"), (more, 1.0, "between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            hold_out(examples, share, 8)


def test_held_out_rows_depend_on_their_text_alone() -> None:
    """On the same texts in any order, whatever is added; the shares are those of the experiments' bytes."""
    texts = [f"text {i}" for i in range(2000)]
    held = {text for text in texts if is_held_out(text, 0.05)}
    assert 60 < len(held) < 140
    assert {text for text in reversed([*texts, "another"]) if is_held_out(text, 0.05)} - {"another"} == held
    assert {text for text in texts if is_held_out(text, 0.2)} > held
    assert not any(is_held_out(text, 0.0) for text in texts)
    assert all(is_held_out(text, 1.0) for text in texts)
