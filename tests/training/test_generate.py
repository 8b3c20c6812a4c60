"""Generation in batches: what a batch, its order and the memory change, draws, and where outputs end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.model import get_prefix_model
from prefix_attn.serve.prompts import Prompts
from prefix_attn.serve.request import Generation, Piece, Sampling
from prefix_attn.training.conversation import Conversation
from prefix_attn.training.decoding import Decoding
from prefix_attn.training.generate import Generator, default_new_tokens, drawing, generate_text
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tokens import prompt_ids
from tests.hf.models import spread, tiny
from tests.tokens import END, byte_tokenizer

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}
SOURCES = ["a", "a much longer source", "medium one", "b", "a much longer one too"]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_batches_and_order_do_not_change_the_texts(name: str, num_beams: int) -> None:
    """BART has learned positions, so padding on the left would change what it reads."""
    model, tokenizer = spread(tiny(name, **SIZES)), byte_tokenizer()
    sources = SOURCES
    done: list[int] = []
    options = {"num_beams": num_beams, "max_new_tokens": 6}
    together = generate_text(model, tokenizer, sources, batch_size=3, progress=done.append, **options)
    alone = [generate_text(model, tokenizer, [source], **options)[0] for source in sources]
    assert together == alone
    assert done == [3, 2]
    assert len(set(together)) > 1


def test_outputs_are_whole_or_their_first_line_and_the_mode_is_restored() -> None:
    class Parrot(torch.nn.Module):
        """Continues every prompt with the same text."""

        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(is_encoder_decoder=False)
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def generate(self, input_ids: torch.Tensor, **options: object) -> torch.Tensor:
            assert not self.training
            assert options["do_sample"] is False
            text = tokenizer("\n  The first. \nThe second.")["input_ids"] + [END]
            return torch.cat([input_ids, torch.tensor([text] * len(input_ids))], 1)

    tokenizer, model = byte_tokenizer(), Parrot().train()
    one_line = Prompt(one_line=True)
    assert generate_text(model, tokenizer, ["a", "bcd"], prompt=one_line) == ["The first."] * 2
    assert generate_text(model, tokenizer, ["a", "bcd"]) == ["\n  The first. \nThe second."] * 2
    assert model.training
    assert generate_text(model, tokenizer, []) == []


def test_sources_are_cut_to_the_places_of_the_encoder(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny("bart", **SIZES | {"max_position_embeddings": 8}), byte_tokenizer()
    long, short = generate_text(model, tokenizer, ["abcdefghijkl", "abcdefgl"], max_new_tokens=4)
    assert long == short
    assert "1 of 2 sources are longer than 8 of the encoder's positions: cut" in caplog.text


def test_prompts_are_cut_to_the_places_of_the_model(caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2 has no embedding beyond its last position. Long prompts raised an IndexError."""
    base, tokenizer = tiny("gpt2", **SIZES | {"max_position_embeddings": 20}), byte_tokenizer()
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=3))
    long, short = generate_text(model, tokenizer, ["abcdefghijkl" * 2, "abcdefghij"], max_new_tokens=4)
    assert long == short
    assert "1 of 2 sources are longer than 13 of the model's positions: cut" in caplog.text
    with pytest.raises(ValueError, match="20 positions, of which outputs and prefix take 18"):
        generate_text(model, tokenizer, ["a"], max_new_tokens=15)


def test_prompt_ids_are_those_of_the_frame() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(prompt_ids(tokenizer, "a b")) == "a b\n=>"


def test_the_head_reads_contiguous_states() -> None:
    """For other states torch copies the weights of the head once per row. Beams give one state each."""
    model, contiguous, widths = tiny("llama", **SIZES).eval(), [], []
    model.lm_head.register_forward_hook(lambda module, args, out: contiguous.append(args[0].is_contiguous()))
    model.lm_head.register_forward_hook(lambda module, args, out: widths.append(out.shape[1]))
    for beams in (1, 3):
        generate_text(model, byte_tokenizer(), ["a", "bc"], max_new_tokens=3, num_beams=beams)
    assert all(contiguous)
    assert len(widths) >= 4
    assert set(widths) == {1}


def test_long_beams_are_preferred_by_a_length_penalty() -> None:
    """Log-likelihoods are negative. Divided by a high power of the length, that of a long text is larger."""
    model, tokenizer = tiny("llama", **SIZES).eval(), byte_tokenizer()
    texts = [
        generate_text(model, tokenizer, ["a", "bc", "d e"], max_new_tokens=8, num_beams=4, length_penalty=power)
        for power in (-20.0, 20.0)
    ]
    short, long = (sum(map(len, found)) for found in texts)
    assert short < long


# Draws ----------------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_its_own_input_alone() -> None:
    """The same seed gives the same text in any batch and order; another seed, or the same input again, another."""
    model, tokenizer = spread(tiny("llama", **SIZES)).eval(), byte_tokenizer()
    options: dict[str, Any] = {"temperature": 3.0, "max_new_tokens": 12}
    state = torch.random.get_rng_state()
    together = generate_text(model, tokenizer, SOURCES, batch_size=3, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    alone = [generate_text(model, tokenizer, [source], **options)[0] for source in reversed(SOURCES)]
    assert together == alone[::-1]
    assert together != generate_text(model, tokenizer, SOURCES, seed=1, **options)
    assert together != generate_text(model, tokenizer, SOURCES, max_new_tokens=12)
    assert len(set(generate_text(model, tokenizer, ["a"] * 4, **options))) == 4
    rest = Generator(model, tokenizer, **options)
    rest.seed_of("a")
    assert rest.texts(["a"]) == generate_text(model, tokenizer, ["a"] * 2, **options)[1:]


def test_draws_have_the_model_s_probabilities() -> None:
    """Shares of 4000 first tokens against softmax(logits / temperature), among the tokens that top_k leaves."""
    model, tokenizer = spread(tiny("llama", **SIZES)).eval(), byte_tokenizer()
    options: dict[str, Any] = {"temperature": 2.0, "top_k": 4}
    decoding = Decoding(**options, max_new_tokens=1)
    ids = torch.tensor([prompt_ids(tokenizer, "a")])
    logits = model(ids).logits[0, -1].detach()
    kept = logits.topk(4)
    wanted = (kept.values / 2).softmax(-1)
    drawn = drawing(decoding, range(4000))(ids, logits.expand(4000, -1)).argmax(-1)
    shares = (drawn[:, None] == kept.indices).float().mean(0)
    assert shares.sum() == 1
    deviation = (wanted * (1 - wanted) / 4000).sqrt()
    assert ((shares - wanted).abs() < 4 * deviation).all()
    nucleus = float(wanted[:2].sum()) - float(wanted[1]) / 2  # reached within the second token
    narrow = drawing(Decoding(**options, top_p=nucleus), range(200))
    assert set(narrow(ids, logits.expand(200, -1)).argmax(-1).tolist()) == set(kept.indices[:2].tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"temperature": 1e-40}, "temperature must be 0 or at least 1e-05, got 1e-40"),
        ({"top_p": 0.0}, "top_p must be between 0 and 1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"temperature": 0.0, "top_p": 0.9}, "temperature 0 draws nothing"),
        ({"top_p": 0.9, "num_beams": 2}, "need num_beams 1, got 2"),
        ({"stop": ("",)}, "stop must be a text"),
    ],
)
def test_what_cannot_be_decoded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding(**options)


# Ends -----------------------------------------------------------------------------------------------------------------


def test_an_output_ends_at_each_end_of_the_model() -> None:
    """A list in the generation config. None of its tokens needs to be special for the tokenizer."""
    model, tokenizer = get_prefix_model(spread(tiny("llama", **SIZES)), PrefixConfig(3)), byte_tokenizer()
    ids = tokenizer("a\n=>", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids), "do_sample": False}
    written = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    at = next(n for n, token in enumerate(written) if n > 2 and token not in written[:n])
    whole = tokenizer.decode(written)
    model.generation_config.eos_token_id = [END, 255, written[at]]
    expected = tokenizer.decode(written[:at])
    generator = Generator(model, tokenizer, max_new_tokens=12)
    assert generator.texts(["a"]) == [expected] != [whole]
    assert generator.unfinished == 0
    shown: list[str] = []
    talk = Conversation(model, tokenizer, prompt=Prompt(), max_new_tokens=12)
    assert talk.answer("a", shown.append) == "".join(shown) == expected
    pieces: list[Piece] = []
    chosen = Sampling(12, temperature=0, stop_ids=Prompts(model, tokenizer).stop_ids((), chat=False))
    generation = Generation(ids[0].tolist(), "default", chosen, tokenizer, pieces.append)
    for token in written[: at + 1]:
        assert not generation.is_over
        generation.add(token)
    assert ("".join(piece.text for piece in pieces), pieces[-1].finish_reason) == (expected, "stop")


def test_an_output_ends_before_a_stop_text() -> None:
    """Each row at its own, and generation ends with the last of them."""
    model, tokenizer = spread(tiny("llama", **SIZES)).eval(), byte_tokenizer()
    whole, at_limit = list[str](), list[int]()
    for source in SOURCES:
        alone = Generator(model, tokenizer, max_new_tokens=30)
        whole += alone.texts([source])
        at_limit.append(alone.unfinished)
    stop = (whole[0][2:4], whole[1][3:5])
    steps: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, out: steps.append(len(out)))
    generator = Generator(model, tokenizer, stop=stop, max_new_tokens=30)
    found = generator.texts(SOURCES)
    expected = [text[: min([text.find(s) for s in stop if s in text] or [len(text)])] for text in whole]
    assert found == expected
    assert len(found[0]) < len(whole[0])
    unstopped = [not any(s in text for s in stop) for text in whole]
    assert generator.unfinished == sum(map(min, at_limit, unstopped)) < sum(at_limit)
    steps.clear()
    assert generator.texts(SOURCES[:1]) == found[:1]
    assert len(steps) < 10


def test_outputs_that_reach_the_limit_are_counted() -> None:
    model, tokenizer = spread(tiny("llama", **SIZES)).eval(), byte_tokenizer()
    model.generation_config.suppress_tokens = [END]
    generator = Generator(model, tokenizer, max_new_tokens=3)
    generator.texts(SOURCES)
    assert (generator.count, generator.unfinished) == (5, 5)
    model.generation_config.suppress_tokens = None
    model.generation_config.forced_eos_token_id = END  # the last token that is allowed ends the text
    assert generator.texts(["a"])
    assert (generator.count, generator.unfinished) == (6, 5)


def test_the_default_length_fits_the_model() -> None:
    assert default_new_tokens(tiny("llama", **SIZES)) == 64
    prefixed = get_prefix_model(tiny("llama", **SIZES), PrefixConfig(num_virtual_tokens=8))
    assert default_new_tokens(prefixed) == 60
    assert default_new_tokens(tiny("bart", **SIZES)) == 128  # its outputs have positions of their own
    assert default_new_tokens(tiny("t5", vocab_size=257)) == 256


# Memory ---------------------------------------------------------------------------------------------------------------


def test_batches_are_halved_when_memory_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer, sizes = spread(tiny("llama", **SIZES)).eval(), byte_tokenizer(), []
    expected = generate_text(model, tokenizer, SOURCES, max_new_tokens=3)
    inner = model.generate

    def generate(input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return inner(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "generate", generate)
    room, done = 1, list[int]()
    assert generate_text(model, tokenizer, SOURCES, batch_size=4, max_new_tokens=3, progress=done.append) == expected
    assert sizes == [4, 2, 1, 1, 1, 1, 1]
    assert done == [1] * 5
    assert "out of memory with 4 rows a batch: 2 from now on" in caplog.text
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        generate_text(model, tokenizer, SOURCES, batch_size=4)


def test_a_batch_is_as_large_as_free_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, done = spread(tiny("llama", **SIZES)).eval(), byte_tokenizer(), list[int]()
    generate_text(model, tokenizer, SOURCES, batch_size=None, max_new_tokens=3, progress=done.append)
    assert done == [5]
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1 << 17))
    done.clear()
    generate_text(model, tokenizer, SOURCES, batch_size=None, max_new_tokens=3, progress=done.append)
    assert 1 < len(done) <= 5


@pytest.mark.parametrize("lengths", [[6000, 60, 50, 50], [6000, 5000, 900, 90], [60, 9, 9, 2]])
def test_a_long_source_does_not_pad_short_ones(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt of 6,000 tokens in a batch of 16 made all of them that long."""
    model, tokenizer, shapes = tiny("llama", **SIZES | {"max_position_embeddings": 8192}), byte_tokenizer(), []
    sources = ["x" * length for length in lengths]

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        shapes.append(input_ids.shape)
        return input_ids

    monkeypatch.setattr(model, "generate", generate)
    generate_text(model, tokenizer, sources[::-1], batch_size=4, max_new_tokens=2)
    assert sum(rows for rows, _ in shapes) == 4
    assert len(shapes) == (1 if lengths[0] < 100 else 2)
    assert sum(rows * width for rows, width in shapes) < max(1.5 * sum(lengths), 4096)
