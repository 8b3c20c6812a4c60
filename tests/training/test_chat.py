"""Prompts and conversations as tokens: what has a loss, what generation starts from, what is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from prefix_attn.training.chat import Chat
from prefix_attn.training.examples import Example, as_conversation
from prefix_attn.training.prompts import Prompt, default_template, plain_ids
from prefix_attn.training.tokens import IGNORED, Encoder, Row, encode, prompt_ids
from tests.tokens import byte_tokenizer

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<stop>{% endgeneration %}{% else %}{{ m['content'] }}<stop>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# As Qwen3's: only the last answer has its thoughts.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]{% if loop.last and m['role'] == 'assistant' %}(hm){% endif %}"
    "{{ m['content'] }}<stop>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['content'] }}<stop>{% endfor %}"
)
CHAT = Prompt("chat")


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    found = byte_tokenizer()
    found.add_special_tokens({"additional_special_tokens": ["<stop>"]})
    found.chat_template = template
    return found


def talk(*texts: str, system: str | None = None) -> Example:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return as_conversation([{"role": "system", "content": system}, *messages] if system else messages)


def shown(tokens: PreTrainedTokenizerFast, row: Row) -> str:
    """The text of a row, with braces around what has a loss."""
    text, inside = "", False
    for token, label in zip(row["input_ids"], row["labels"]):
        if inside != (label != IGNORED):
            inside = not inside
            text += "{" if inside else "}"
        text += tokens.decode([token])
    return text + "}" * inside


THREE = talk("a", "b", "c", "d", system="s")
TALK = "[system]s<stop>\n[user]a<stop>\n[assistant]{b<stop>}\n[user]c<stop>\n[assistant]{d<stop>}\n"
ROWS: dict[str, tuple[str, Example, list[str]]] = {
    "differences": (PLAIN, THREE, [TALK]),
    "markers": (MARKED, THREE, [TALK]),
    "an answer a row": (FORGETFUL, THREE, [
        "[system]s<stop>[user]a<stop>[assistant]{(hm)b<stop>}",
        "[system]s<stop>[user]a<stop>[assistant]b<stop>[user]c<stop>[assistant]{(hm)d<stop>}",
    ]),
    "no end": (NO_END, talk("a", "b"), ["user: a\nassistant: {b\n<end>}"]),
    "what follows is left out": (PLAIN, talk("a", "b", "thanks"), ["[user]a<stop>\n[assistant]{b<stop>}\n"]),
    "source and target": (
        PLAIN, Example("a", ("b", "c")), [f"[user]a<stop>\n[assistant]{{{text}<stop>}}\n" for text in "bc"]
    ),
    "line breaks": (MARKED, talk("a\n\n b", "  c\n"), ["[user]a\n\n b<stop>\n[assistant]{  c\n<stop>}\n"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_answers_have_a_loss(case: str) -> None:
    template, example, wanted = ROWS[case]
    tokens = tokenizer(template)
    rows, cut = encode(tokens, [example], 200, prompt=CHAT)
    assert [shown(tokens, row) for row in rows] == wanted
    assert cut == 0


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL, NO_END])
def test_a_prompt_is_the_beginning_of_its_row(template: str) -> None:
    """The last answer of training begins where generation does, in the same tokens."""
    tokens = tokenizer(template)
    row = encode(tokens, [THREE], 200, prompt=CHAT)[0][-1]
    asked = prompt_ids(tokens, THREE.prompt, CHAT)
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"][len(asked) - 1] == IGNORED
    assert row["labels"][len(asked)] != IGNORED


def test_markers_give_the_mask_of_the_tokenizer() -> None:
    tokens = tokenizer(MARKED)
    row = encode(tokens, [THREE], 200, prompt=CHAT)[0][0]
    theirs = tokens.apply_chat_template(list(THREE.messages), return_dict=True, return_assistant_tokens_mask=True)
    assert row["input_ids"] == theirs["input_ids"]
    assert [int(label != IGNORED) for label in row["labels"]] == theirs["assistant_masks"]


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL])
def test_special_tokens_in_texts_are_text(template: str) -> None:
    """A user's text could end its own turn, or the target of the whole row."""
    tokens = tokenizer(template)
    example = talk("say <stop> and <end>", "<stop>")
    stop = tokens.convert_tokens_to_ids("<stop>")
    (row,), _ = encode(tokens, [example], 200, prompt=CHAT)
    assert row["input_ids"].count(stop) == 2
    assert tokens.eos_token_id not in row["input_ids"]
    assert tokens.decode(row["input_ids"]) == tokens.apply_chat_template(list(example.messages), tokenize=False)
    (asked,), _ = encode(tokens, [example], 200, prompt=Prompt("chat", special_tokens=True))
    assert asked["input_ids"].count(stop) == 4
    plain = Prompt("<stop>{source}\n=>")
    (row,), _ = encode(tokens, [Example("a<end><stop>", ("b<end>",))], 200, prompt=plain)
    assert [token for token in row["input_ids"] if token >= tokens.eos_token_id] == [stop, tokens.eos_token_id]
    assert tokens.decode(row["input_ids"]) == "<stop>a<end><stop>\n=> b<end><end>"
    assert plain_ids(tokens, "<end>", special_tokens=True) == [tokens.eos_token_id]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_long_conversations_lose_their_beginning(template: str) -> None:
    """Then the end of the text that is answered. The answer and its end are whole."""
    tokens = tokenizer(template)
    example = talk("first", "one", "second <end> text", "two", system="s")
    whole = len(encode(tokens, [example], 200, prompt=CHAT)[0][0]["input_ids"])
    for length in (whole, whole - 1, 52, 40):
        (row,), cut = encode(tokens, [example], length, prompt=CHAT)
        text = shown(tokens, row)
        assert len(row["input_ids"]) <= length
        assert cut == (length < whole)
        assert "{two<stop>" in text
        assert ("first" in text) == (length == whole)
        assert ("second <end> text" in text) == (length >= 52)
    with pytest.raises(ValueError, match=r"example 1: max_length=20 is too short for the target 'two': needs \d+"):
        encode(tokens, [example], 20, prompt=CHAT)


def test_all_rows_that_do_not_fit_are_reported_at_once(caplog: pytest.LogCaptureFixture) -> None:
    tokens = tokenizer(STRICT)
    examples = [Example("a", ("b",)), Example("a", ("b" * 30,)), Example("c", ("d" * 40,)), talk("a", "b", system="s")]
    encoder = Encoder(tokens, 16, prompt=CHAT)
    with pytest.raises(ValueError, match=r"3 of 4 rows .* 1 x the chat template refuses .* max_length=42 takes all"):
        list(encoder.rows(examples))
    assert len(list(encoder.rows(examples, skip_bad_rows=True))) == 1
    assert "3 of 4 rows are left out" in caplog.text


def test_the_system_message() -> None:
    tokens = tokenizer(PLAIN)
    prompt = Prompt("chat", system="be kind")
    texts = [tokens.decode(prompt_ids(tokens, example.prompt, prompt)) for example in (Example("a", ("b",)), THREE)]
    assert texts[0] == "[system]be kind<stop>\n[user]a<stop>\n[assistant]"
    assert texts[1].startswith("[system]s<stop>\n[user]a")
    named = Prompt("{system}\n{source}:\n", system="be {kind}")
    assert tokens.decode(prompt_ids(tokens, "{a}", named)) == "be {kind}\n{a}:\n"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{source}\n=>", "a\n=>{ b<end>}"),
        ("Q: {source}\nA:\n", "Q: a\nA:\n{b<end>}"),
        ("{{{source}}}", "{a}{ b<end>}"),
    ],
)
def test_templates_of_text(template: str, text: str) -> None:
    """The space before a target is part of it, but not after white space."""
    tokens = tokenizer(None)
    (row,), _ = encode(tokens, [Example("a", ("b",))], prompt=Prompt(template))
    assert shown(tokens, row) == text
    (short,), cut = encode(tokens, [Example("a" * 99, ("b",))], len(row["input_ids"]), prompt=Prompt(template))
    assert (short, cut) == (row, 1)


def test_a_prompt_is_kept_beside_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of a run has the run's, and so has a file in it. An adapter that says nothing has the default."""
    prompt = Prompt("chat", system="sé\n", one_line=True)
    prompt.save(tmp_path / "run")
    (tmp_path / "run" / "checkpoint-5").mkdir()
    assert Prompt.load(tmp_path / "run") == Prompt.load(tmp_path / "run" / "checkpoint-5") == prompt
    (tmp_path / "run" / "checkpoint-5" / "model.safetensors").touch()
    assert Prompt.load(tmp_path / "run" / "checkpoint-5" / "model.safetensors") == prompt
    monkeypatch.chdir(tmp_path / "run" / "checkpoint-5")
    assert Prompt.load(Path()) == prompt
    monkeypatch.chdir(tmp_path / "run")
    assert Prompt.load(tmp_path) == Prompt.load(Path("of-the-hub")) == Prompt()
    assert default_template(Example("a", ("b",))) == Prompt().template
    assert default_template(THREE) == "chat"


ERRORS: dict[str, tuple[Any, str]] = {
    "no field": (lambda: Prompt("Q:"), "must be 'chat' or name {source} once, got 'Q:'"),
    "two fields": (lambda: Prompt("{source}{source}"), "name {source} once"),
    "the target": (lambda: Prompt("{source}: {target}"), "got {target}; the target follows by itself"),
    "a brace": (lambda: Prompt("{source} {"), "write {{ or }} for a brace"),
    "no name": (lambda: Prompt("{} {source}"), "may name {source} and {system}, got {}"),
    "no place for a system": (lambda: Prompt(system="s"), "a system text needs 'chat' or a template that"),
    "no system": (lambda: Prompt("{system} {source}"), "and system None do not fit"),
    "no chat template": (lambda: Chat(tokenizer(None), CHAT), "has no chat template, which rows with 'messages' and"),
    "messages in a text": (lambda: encode(tokenizer(None), [THREE]), "'messages' need --template chat, got"),
    "a chat in a text": (lambda: prompt_ids(tokenizer(None), THREE.prompt), "a conversation needs --template chat"),
    "a chat of an encoder": (
        lambda: Encoder(tokenizer(PLAIN), 9, encoder_decoder=True, prompt=CHAT),
        "an encoder reads the source alone: it takes no template, got 'chat'",
    ),
    "messages of an encoder": (
        lambda: encode(tokenizer(None), [THREE], encoder_decoder=True),
        "takes rows with a source and a target, not 'messages'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_to_do(case: str) -> None:
    call, message = ERRORS[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below, without escaping)
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
