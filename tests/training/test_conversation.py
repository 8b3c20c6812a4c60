"""Conversations turn by turn: what is read again, how answers appear, where they end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import PrefixModel, get_prefix_model
from prefix_attn.training.conversation import Conversation
from prefix_attn.training.generate import generate_text
from prefix_attn.training.prompts import Prompt
from tests.hf.models import spread, tiny
from tests.tokens import END, byte_tokenizer
from tests.training.test_chat import CHAT, FORGETFUL, PLAIN, tokenizer

SIZES = {"vocab_size": 258, "max_position_embeddings": 512, "eos_token_id": END, "pad_token_id": END}
SAID = ["ab", "c d", "e"]


def prefixed(name: str = "llama", **config: Any) -> PrefixModel:
    torch.manual_seed(0)
    model = get_prefix_model(spread(tiny(name, **SIZES)), PrefixConfig(num_virtual_tokens=3, **config))
    return model.eval()


def read_by(model: PrefixModel) -> list[int]:
    """How many tokens each forward reads, from now on."""
    widths: list[int] = []
    model.base_model.get_input_embeddings().register_forward_hook(lambda m, args, out: widths.append(out.shape[1]))
    return widths


def by_hand(model: PrefixModel, template: str, said: list[str], **options: Any) -> list[str]:
    """Answers when the whole conversation is read anew each time."""
    messages: list[dict[str, str]] = []
    for text in said:
        messages.append({"role": "user", "content": text})
        (answer,) = generate_text(model, tokenizer(template), [list(messages)], prompt=CHAT, **options)
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages[1::2]]


@pytest.mark.parametrize("template", [PLAIN, FORGETFUL], ids=["plain", "forgetful"])
@pytest.mark.parametrize(("name", "config"), [("llama", {}), ("gemma2", {}), ("llama", {"mode": "infix"})], ids=str)
def test_answers_are_those_of_the_whole_conversation(name: str, config: dict[str, Any], template: str) -> None:
    model = prefixed(name, **config)
    expected = by_hand(model, template, SAID, max_new_tokens=6)
    talk, shown = Conversation(model, tokenizer(template), prompt=CHAT, max_new_tokens=6), list[str]()
    assert [talk.answer(text, shown.append) for text in SAID] == expected
    assert "".join(shown) == "".join(expected)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 3
    talk.reset()
    assert talk.messages == []
    assert talk.answer(SAID[0]) == expected[0]


def test_what_was_read_is_not_read_again() -> None:
    """The second turn reads what follows the last token that was read. If earlier ones are others now, it reads all."""
    model, tokens = prefixed(), tokenizer(PLAIN)
    letters = [i for i in range(258) if tokens.decode([i]).isalpha()]
    model.generation_config.suppress_tokens = sorted(set(range(258)) - set(letters))
    talk, widths = Conversation(model, tokens, prompt=CHAT, max_new_tokens=4), read_by(model)
    talk.answer("ab")
    first = len("[user]ab.\n[assistant]")
    assert widths == [first, 1, 1, 1]
    before, answer = list(talk.messages), talk.messages[1]["content"]
    talk.answer("c d")
    assert widths[4:] == [len("d.\n[user]c d.\n[assistant]"), 1, 1, 1]
    assert len(answer) == 4
    talk.messages = [before[0], {"role": "assistant", "content": "x" + answer}]
    talk.answer("c d")
    assert widths[8] == first + len("xabcd.\n[user]c d.\n[assistant]")


def test_an_answer_ends_when_it_is_stopped() -> None:
    """What was written stays, and the next turn goes on from it."""
    model = prefixed()
    (whole,) = by_hand(model, PLAIN, ["ab"], max_new_tokens=12)
    talk, asked = Conversation(model, tokenizer(PLAIN), prompt=CHAT, max_new_tokens=12), list[int]()

    def stopped() -> bool:
        asked.append(1)
        return len(asked) == 3

    answer = talk.answer("ab", stopped=stopped)
    assert len(asked) == 3
    assert answer != whole
    assert whole.startswith(answer)
    assert talk.messages[-1]["content"] == answer
    fresh = Conversation(model, tokenizer(PLAIN), prompt=CHAT, max_new_tokens=12)
    fresh.messages = list(talk.messages)
    assert talk.answer("c") == fresh.answer("c")


def test_stop_texts_are_not_shown() -> None:
    """Nor what may become one; a beginning that does not is shown late."""
    model, tokens = prefixed(), byte_tokenizer()
    prompt = Prompt("{source}")
    (whole,) = generate_text(model, tokens, ["ab"], prompt=prompt, max_new_tokens=12)
    for stop in ((whole[3:6],), (whole[2] + "☂", whole[5:7])):
        shown: list[str] = []
        talk = Conversation(model, tokens, prompt=prompt, max_new_tokens=12, stop=stop)
        answer = talk.answer("ab", shown.append)
        assert answer == whole[: min(whole.find(text) for text in stop if text in whole)]
        assert "".join(shown) == answer


def test_a_template_of_text_has_single_turns() -> None:
    for name in ("llama", "bart"):
        model, tokens, shown = prefixed(name), byte_tokenizer(), list[str]()
        for prompt in (Prompt(), Prompt(one_line=True)):
            talk = Conversation(model, tokens, prompt=prompt, max_new_tokens=8)
            expected = generate_text(model, tokens, SAID, prompt=prompt, max_new_tokens=8)
            shown.clear()
            assert [talk.answer(text, shown.append) for text in SAID] == expected
            assert "".join(shown) == "".join(expected)
            assert talk.messages == []


def test_a_conversation_that_is_too_long_loses_its_first_exchanges() -> None:
    model = prefixed()
    model.config.max_position_embeddings = 80
    talk = Conversation(model, tokenizer(PLAIN), prompt=CHAT, max_new_tokens=6)
    for text in SAID:
        assert talk.answer(text * 6)
    assert talk.cut > 0
    assert len(talk.messages) == 6
