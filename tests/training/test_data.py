"""Reading data, and making rows of tokens from it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from prefix_attn.training import aws
from prefix_attn.training.aws import aws_records
from prefix_attn.training.data import Examples, read_examples
from prefix_attn.training.examples import Example
from prefix_attn.training.prompts import PROMPT
from prefix_attn.training.tasks import linearise
from prefix_attn.training.tokens import IGNORED, Collator, batches, collate, encode
from tests.tokens import END, byte_tokenizer


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_groups_references_in_order_of_first_appearance(tmp_path: Path) -> None:
    rows = [("b", "one"), ("a", "two"), ("b", "three")]
    text = "\n\n".join(json.dumps({"source": s, "target": t}) for s, t in rows)
    assert read_examples(write(tmp_path, "x.jsonl", text)) == [Example("b", ("one", "three")), Example("a", ("two",))]


def test_jsonl_takes_several_references_and_other_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "x.jsonl", json.dumps({"in": " a\n b ", "out": ["one", "two"]}))
    assert read_examples(path, source_column="in", target_column="out") == [Example(" a\n b ", ("one", "two"))]


def test_csv_with_its_own_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "x.csv", '\ufeffid,source,target\n1,a,"one, or\ntwo"\n2,a,three\n')
    assert read_examples(str(path)) == [Example("a", ("one, or\ntwo", "three"))]


@pytest.mark.parametrize("header", ["mr,ref", '"MR","ref"'])
def test_e2e_is_recognised_and_linearised(tmp_path: Path, header: str) -> None:
    mr = '"name[Alimentum], area[city centre], familyFriendly[no]"'
    path = write(tmp_path, "x.csv", f"{header}\r\n{mr},First.\r\n{mr},Second.\r\n")
    source = "name : Alimentum | area : city centre | familyFriendly : no"
    assert read_examples(path) == [Example(source, ("First.", "Second."))]


def test_csv_may_end_its_lines_with_commas(tmp_path: Path) -> None:
    assert read_examples(write(tmp_path, "x.csv", "source,target\na,b,,\n")) == [Example("a", ("b",))]


def test_linearise_keeps_commas_of_values() -> None:
    assert linearise("name[A, B], near[C]") == "name : A, B | near : C"


BAD = [
    ("x.txt", "", "data must be one of ('aws', 'aws-summary') or a file that ends in one of"),
    ("x.jsonl", "", "empty, at least one row is needed"),
    ("x.csv", "", "empty, at least one row is needed"),
    ("x.csv", "source,target\n", "empty, at least one row is needed"),
    ("x.jsonl", '{"source": "a", "target": "b"}\n{"source": ', "line 2: not JSON"),
    ("x.jsonl", "[1]", "line 1: must be a JSON object, got list"),
    ("x.jsonl", '{"source": "a", "text": "b"}', "line 1: no key 'target'; there are ['source', 'text']"),
    ("x.jsonl", '{"source": 3, "target": "b"}', "line 1: 'source' must be text, got int"),
    ("x.jsonl", '{"source": "a", "target": " "}', "line 1: 'target' is empty"),
    ("x.jsonl", '{"source": "a", "target": []}', "line 1: 'target' is empty"),
    ("x.csv", "source,text\na,b\n", "line 1: no column 'target'; there are ['source', 'text']"),
    ("x.csv", "source,target\na,b\nc,\n", "line 3: 'target' is empty"),
    ("x.csv", "source,target\na,b\nc\n", "line 3: 'target' is empty"),
    ("x.csv", "source,target\na,b\nc,d, e\n", "line 3: more cells than columns"),
    ("x.csv", 'source,target\na,"b\n', "not CSV"),
    ("x.json", "[{", "not JSON"),
    ("x.json", "[" * 100_000, "not JSON"),
    ("x.jsonl", "[" * 100_000, "line 1: not JSON (nested too deep)"),
    ("x.json.gz", "[]", "not JSON"),
    ("x.json", "[]", "empty, at least one row is needed"),
    ("x.json", "[1]", "entry 0: must have 'tripleset' and 'annotations'"),
    ("x.json", '[{"tripleset": [["a", "b"]], "annotations": []}]', "entry 0: 'tripleset' must be a list of triples"),
    ("x.json", '[{"tripleset": [["a", "b", 3]], "annotations": []}]', "entry 0: 'tripleset' must be text, got int"),
    ("x.json", '[{"tripleset": [["a", "b", "c"]], "annotations": [{"text": "d"}]}]', "entry 0: must have"),
    ("x.xml", "<benchmark>", "not XML"),
    ("x.xml", "<benchmark/>", "empty, at least one row is needed"),
    ("x.xml", '<entry eid="Id1"><lex>a</lex></entry>', "entry Id1: needs a modifiedtripleset"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_errors_are_one_line_and_name_the_file(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below, without escaping)
        read_examples(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.csv: no such file"):
        read_examples(tmp_path / "nowhere.csv")
    (tmp_path / "x.csv").write_bytes(b"source,target\n\xff\xfe,b\n")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_examples(tmp_path / "x.csv")


# Triples --------------------------------------------------------------------------------------------------------------

DART = [
    {
        "tripleset": [["Aromi", "eatType", "coffee shop"], ["Aromi", "area", "riverside"]],
        "annotations": [{"source": "e2e", "text": "Aromi is\na coffee shop."}, {"source": "e2e", "text": "Aromi."}],
    },
    {"tripleset": [["[TABLECONTEXT]", "[TITLE]", "A_B"]], "annotations": [{"source": "wiki", "text": "It is A B."}]},
    {
        "tripleset": [["Aromi", "eatType", "coffee shop"], ["Aromi", "area", "riverside"]],
        "annotations": [{"source": "e2e", "text": "A third."}],
    },
]


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
def test_dart(tmp_path: Path, name: str) -> None:
    text = json.dumps(DART).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    coffee = "Aromi : eatType : coffee shop | Aromi : area : riverside"
    assert read_examples(tmp_path / name) == [
        Example(coffee, ("Aromi is a coffee shop.", "Aromi.", "A third."), "e2e"),
        Example("[TABLECONTEXT] : [TITLE] : A B", ("It is A B.",), "wiki"),
    ]


def test_webnlg_in_its_two_forms(tmp_path: Path) -> None:
    """The released form, and the enriched one with an element per text. Other languages and bad texts are skipped."""
    triples = "<modifiedtripleset><mtriple>Aarhus_Airport | name | &quot;10L/28R&quot;</mtriple></modifiedtripleset>"
    released = f"""<benchmark><entries><entry category="Airport" eid="Id1">{triples}
        <lex comment="good" lid="Id1">One &amp; only.</lex><lex comment="bad" lid="Id2">Wrong.</lex>
        <lex comment="good" lang="ru" lid="Id3">Da.</lex></entry></entries></benchmark>"""
    enriched = f"""<benchmark><entries><entry category="Food" eid="Id1">{triples.replace("Aarhus_Airport", "A")}
        <lex comment="good"><sortedtripleset/><text>Another.</text></lex></entry></entries></benchmark>"""
    (tmp_path / "1triples").mkdir()
    write(tmp_path / "1triples", "a.xml", released)
    write(tmp_path, "b.xml", enriched)
    first = Example("Aarhus Airport : name : 10L/28R", ("One & only.",), "Airport")
    assert read_examples(tmp_path / "1triples" / "a.xml") == [first]
    assert read_examples(tmp_path) == [first, Example("A : name : 10L/28R", ("Another.",), "Food")]


# AWS ------------------------------------------------------------------------------------------------------------------


def operation(name: str, documentation: str) -> dict[str, object]:
    return {"name": name, "input": {"shape": "In"}, "output": {"shape": "Out"}, "documentation": documentation}


def service(folder: Path, name: str, versions: dict[str, dict[str, object]]) -> None:
    shapes = {"In": {"required": ["Address"], "members": {}}, "Out": {"members": {key: {} for key in "abcdefgh"}}}
    for api, operations in versions.items():
        (folder / name / api).mkdir(parents=True)
        described = {"metadata": {"serviceFullName": "Full"}, "operations": operations, "shapes": shapes}
        with gzip.open(folder / name / api / "service-2.json.gz", "wt") as file:
            json.dump(described, file)


def test_aws_takes_the_first_sentence_of_the_newest_version(tmp_path: Path) -> None:
    text = "<p>Accepts an <i>IP&nbsp;address</i>, e.g. a new one. It is yours.</p>"
    service(tmp_path, "one", {"2014-01-01": {"Old": operation("Old", "<p>This one is gone now.</p>")}})
    (tmp_path / "one" / "2015-01-01").mkdir()
    operations = {
        "AcceptVPCTransfer": operation("AcceptVPCTransfer", text),
        "Short": operation("Short", "<p>Too short.</p>"),
        "Silent": {"name": "Silent"},
        "Twin": operation("Twin", text),
    }
    service(
        tmp_path, "two", {"2016-11-15": operations, "2010-01-01": {"Old": operation("Old", "<p>Not me at all.</p>")}}
    )
    found = [example for examples in aws._aws_splits(tmp_path).values() for example in examples]
    source = "service : Full | operation : accept vpc transfer | inputs : Address | outputs : a, b, c, d, e, f"
    assert Example(source, ("Accepts an IP address, e.g. a new one.",)) in found
    assert {target for example in found for target in example.references} == {
        "Accepts an IP address, e.g. a new one.",
        "This one is gone now.",
    }


def test_aws_summary_leaves_out_what_it_asks_for(tmp_path: Path) -> None:
    rest = "It is needed when the address is to be moved. " * 3
    operations = {
        "Long": operation("Long", f"<p>Accepts an IP address. {rest}</p><p>And a <b>note</b>.</p>"),
        "Short": operation("Short", "<p>Deletes all of it. At once.</p>"),
    }
    service(tmp_path, "one", {"2014-01-01": operations})
    found = [example for examples in aws._aws_splits(tmp_path, "aws-summary").values() for example in examples]
    assert found == [Example(f"{rest}And a note.", ("Accepts an IP address.",))]


def test_aws_of_the_installed_botocore() -> None:
    pytest.importorskip("botocore")
    splits = {split: aws_records(split) for split in ("train", "dev", "test")}
    sizes = {split: len(examples) for split, examples in splits.items()}
    assert sizes["train"] > 10_000
    assert sizes["dev"] > 300
    assert sizes["test"] > 150
    services = {split: {e.source.split(" | ")[0] for e in examples} for split, examples in splits.items()}
    assert len(services["train"] & services["test"]) <= 2  # different folders may share a display name
    targets = [target for examples in splits.values() for e in examples for target in e.references]
    assert len(set(targets)) == len(targets)
    assert all(target.endswith(".") and 4 <= len(target.split()) <= 40 and "<" not in target[:1] for target in targets)
    addresses = [e for examples in splits.values() for e in examples if "accept address transfer" in e.source]
    assert addresses[0].source.startswith(
        "service : Amazon EC2 | operation : accept address transfer | inputs : Address"
    )
    assert addresses[0].references == ("Accepts an Elastic IP address transfer.",)
    assert read_examples("aws", split="dev") == list(splits["dev"])


def test_aws_without_botocore_says_which_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the data 'aws' come from .*: pip install 'prefix-attn\[demo\]'"):
        aws_records("dev")


def test_aws_refuses_other_splits() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        aws_records("validation")
    with pytest.raises(ValueError, match="task must be one of"):
        aws_records("test", "aws-title")


# Rows -----------------------------------------------------------------------------------------------------------------


def test_encode_puts_the_loss_on_target_and_end() -> None:
    tokenizer = byte_tokenizer()
    rows, cut = encode(tokenizer, [Example("ab", ("x", "yz"))])
    assert cut == 0
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["ab\n=> x<end>", "ab\n=> yz<end>"]
    for row, loss in zip(rows, (" x<end>", " yz<end>"), strict=True):
        kept = [label for label in row["labels"] if label != IGNORED]
        assert tokenizer.decode(kept) == loss
        assert row["input_ids"][-len(kept) :] == kept
        assert len(row["labels"]) == len(row["input_ids"])


@pytest.mark.parametrize(
    ("length", "text", "cut"), [(16, "0123456\n=> xyz", 0), (13, "01234\n=> xyz", 1), (8, "\n=> xyz", 1)]
)
def test_encode_cuts_the_source_alone(length: int, text: str, cut: int) -> None:
    tokenizer = byte_tokenizer()
    (row,), found = encode(tokenizer, [Example("0123456", ("xyz",))], max_length=length)
    assert found == cut
    assert tokenizer.decode(row["input_ids"]) == text + "<end>"
    assert len(row["input_ids"]) <= length


def test_encode_refuses_a_target_that_cannot_fit() -> None:
    with pytest.raises(ValueError, match=r"max_length=7 is too short for the target 'xyz': needs 8"):
        encode(byte_tokenizer(), [Example("a", ("xyz",))], max_length=7)


def test_encode_needs_an_end_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        encode(tokenizer, [Example("a", ("b",))])


def test_prompt_ends_where_the_target_begins() -> None:
    assert PROMPT.format(source="a") == "a\n=>"


def test_encode_gives_an_encoder_the_source_and_a_decoder_the_target() -> None:
    tokenizer = byte_tokenizer()
    example = Example("abcdef", ("xy", "z"))
    rows, cut = encode(tokenizer, [example], 6, encoder_decoder=True)
    assert cut == 0
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcdef", "abcdef"]
    assert [tokenizer.decode(row["labels"]) for row in rows] == ["xy<end>", "z<end>"]
    rows, cut = encode(tokenizer, [example], 4, encoder_decoder=True)
    assert cut == 2
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abcf", "abcf"]  # a last token may be special
    with pytest.raises(ValueError, match="max_length=1 is too short for the target 'xy': needs 3"):
        encode(tokenizer, [example], 1, encoder_decoder=True)
    batch = collate(rows, END)
    assert batch["input_ids"].shape == (2, 4)
    assert batch["labels"].tolist() == [rows[0]["labels"], [*rows[1]["labels"], IGNORED]]


def test_encode_refuses_texts_that_name_a_language() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.tgt_lang = None
    with pytest.raises(NotImplementedError, match="begins or ends texts with a language"):
        encode(tokenizer, [Example("a", ("b",))], encoder_decoder=True)


def test_collate_pads_right() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [IGNORED, 2, 3]}, {"input_ids": [4], "labels": [4]}]
    batch = collate(rows, END)
    expected = {
        "input_ids": [[1, 2, 3], [4, END, END]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[IGNORED, 2, 3], [4, IGNORED, IGNORED]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert Collator(END)(rows).keys() == batch.keys()


def test_batches_have_every_row_once_and_labels_where_rows_have_them() -> None:
    rows = [{"input_ids": [i] * (i + 1)} for i in range(5)]
    found = batches(rows, 2, END)
    assert [batch["input_ids"][:, 0].tolist() for batch in found] == [[0, 1], [2, 3], [4]]
    assert [list(batch) for batch in found] == [["input_ids", "attention_mask"]] * 3
    assert "labels" in batches([row | {"labels": row["input_ids"]} for row in rows], 2, END)[0]
    assert batches([], 2, END) == []


def test_rows_without_outputs(tmp_path: Path) -> None:
    """Inputs alone are examples without references, beside the cells of their rows."""
    table, e2e, chat = tmp_path / "t.csv", tmp_path / "e.csv", tmp_path / "c.jsonl"
    table.write_text("id;source\n1;a\n2;\n3;b\n")
    e2e.write_text('MR,id\n"name[Aromi], area[x]",1\n')
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [turns, turns[:1], [*turns, {"role": "user", "content": "c"}], turns[1:]]
    chat.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    found = list(Examples(table, target_column=None).records())
    assert [(row["id"], example.source, example.references) for row, example in found] == [
        ("1", "a", ()),
        ("3", "b", ()),
    ]
    with pytest.raises(ValueError, match="'source' is empty"):
        Examples(table, target_column=None).check()
    ((row, example),) = Examples(e2e, target_column=None).records()
    assert (example.source, row["MR"]) == ("name : Aromi | area : x", "name[Aromi], area[x]")
    with pytest.raises(ValueError, match="no column 'source'"):
        Examples(e2e)
    asked = [example.prompt for example in Examples(chat, target_column=None)]
    assert asked == [(turns[0],), (turns[0],), (*turns, {"role": "user", "content": "c"})]
    with pytest.raises(ValueError, match="'messages' has nothing to answer"):
        Examples(chat, target_column=None).check()
