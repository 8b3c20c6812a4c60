"""Prefixes for vLLM's paged cache: which can be served, what names them, and which slots they are written to."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.embedding import PrefixTuning
from prefix_attn.hf.model import PrefixModel, get_prefix_model
from prefix_attn.serve.vllm.choice import Choice, Refused, choice_of, placeholders
from prefix_attn.serve.vllm.launch import shape_of_base
from prefix_attn.serve.vllm.loads import Load, Planner, Rank, Source, slots
from prefix_attn.serve.vllm.registry import Held, Registry, Settings, Unknown, is_plain
from prefix_attn.serve.vllm.stored import digest_of, read
from tests.hf.by_hand import relative
from tests.hf.models import spread, tiny, tokens
from tests.numerics import MODEL, close_in_norm
from tests.tokens import END

SIZES = {"vocab_size": 257, "max_position_embeddings": 128, "eos_token_id": END, "pad_token_id": END}
BLOCK = 8
A = Choice("a" * 40, 10)


def saved(folder: Path, base: Any = None, *, seed: int = 0, **options: Any) -> Path:
    """A prefix in a folder."""
    config = PrefixConfig(**{"num_virtual_tokens": 4} | options)
    model = get_prefix_model(base or spread(tiny("llama", **SIZES)), config)
    for parameter in model.prefixes["default"].parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(seed))
    model.save_pretrained(folder)
    return folder


def shape(**sizes: Any) -> Any:
    return shape_of_base(tiny("llama", **SIZES | sizes).config)


@dataclass
class Request:
    """What the scheduler knows of one."""

    request_id: str
    prompt_token_ids: list[int] | None
    cache_salt: str | None = None
    kv_transfer_params: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool = False


def asked(choice: Choice, text: int = 5, number: str = "1", name: str = "a") -> Request:
    ids = [*choice.placeholders(257), *range(text)]
    return Request(number, ids, choice.salt(), {"prefix": name})


def test_keys_and_values_are_those_of_the_prefix(tmp_path: Path) -> None:
    base = spread(tiny("llama", **SIZES))
    prefix = read(saved(tmp_path, base), shape())
    model = PrefixModel.from_pretrained(base, tmp_path)
    kv = model.prefixes["default"]()  # (2 * layers, H, P, D)
    assert prefix.kv.shape == (4, 3, 2, 2, 8)
    assert torch.equal(prefix.kv, kv.view(3, 2, 2, 4, 8).permute(3, 0, 1, 2, 4))
    assert prefix.length == 4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gate": "zero"}, "it has a gate"),
        ({"mode": "infix"}, "it is an infix"),
        ({"layers": (0, 2)}, "not all layers have it"),
        ({"layers": {0: 4, 1: 2, 2: 4}}, "its layers see different lengths"),
        ({"num_virtual_tokens": 128}, "its 128 tokens leave no room"),
    ],
)
def test_what_a_paged_cache_cannot_hold_is_refused(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        read(saved(tmp_path, **options), shape())


def test_a_prefix_whose_texts_start_at_0_is_moved(tmp_path: Path) -> None:
    """What is served has other keys, and the same answers. The file has another digest than one of the same numbers."""
    base, ids = spread(tiny("llama", **SIZES)), tokens() % 257
    still, plain = saved(tmp_path / "still", base, position_mode="none"), saved(tmp_path / "plain", base)
    moved = read(still, shape())
    assert moved.digest != read(plain, shape()).digest
    assert torch.equal(moved.kv[:, :, 1], read(plain, shape()).kv[:, :, 1])
    model = PrefixModel.from_pretrained(base, still).eval()
    wanted = model(ids).logits
    model.load_prefix(plain, "shift")
    assert relative(model(ids).logits, wanted) > 1e-3
    encoder, _ = model.find_prefix("shift")
    encoder.set_kv(moved.kv.permute(1, 2, 3, 0, 4).flatten(0, 1))
    close_in_norm(model(ids).logits, wanted, MODEL)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_cannot_be_moved(kind: str, tmp_path: Path) -> None:
    base = tiny(kind)
    still = saved(tmp_path, base, position_mode="none")
    with pytest.raises(ValueError, match=r"start at position 0.*positions of .* cannot be moved"):
        read(still, shape_of_base(base.config))


def test_input_embeddings_alone_are_refused(tmp_path: Path) -> None:
    """In a folder of prefixes, and where clients load them: nobody there has the base model."""
    PrefixTuning(tiny("llama", **SIZES), 4, 32).save_pretrained(tmp_path / "table")
    registry = Registry(Settings(folder=str(tmp_path), loading=True), shape())
    for refused in (lambda: registry.choice("table"), lambda: registry.load("new", str(tmp_path / "table"))):
        with pytest.raises(ValueError, match=r"it has input embeddings alone, .* serve --prefix' has it make them"):
            refused()


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_hidden_layers": 2}, "num_layers is 3, and the base model needs 2"),
        ({"num_key_value_heads": 4}, "num_attention_heads is 2, and the base model needs 4"),
        ({"head_dim": 16}, "token_dim is 16, and the base model needs 32"),
        ({"hidden_size": 64}, "trained for a base model .*hidden_size.*32.*this one is .*64"),
    ],
)
def test_another_base_model_is_refused(sizes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        read(saved(tmp_path), shape(**sizes))


def test_encoder_decoders_heads_and_trained_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="encoder-decoder"):
        read(saved(tmp_path / "bart", tiny("bart")), shape()._replace(base=tiny("bart").config))
    classifier = saved(tmp_path / "head")
    tensors = load_file(classifier / "adapter_model.safetensors")
    save_file(tensors | {"base_model.score.weight": torch.ones(2)}, classifier / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="weights of the base model were trained with it"):
        read(classifier, shape())


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["prompt_embeddings"][0, 0] = torch.nan
    save_file(tensors, file)
    with pytest.raises(ValueError, match="finite"):
        read(tmp_path, shape())


def test_a_digest_tells_contents_apart(tmp_path: Path) -> None:
    """And nothing else: not the file's own word, which anybody could write."""
    first, again = read(saved(tmp_path / "a"), shape()), read(saved(tmp_path / "b"), shape())
    assert first.digest == again.digest
    assert first.digest != read(saved(tmp_path / "c", seed=1), shape()).digest
    kv = torch.arange(24.0)
    digests = {digest_of(kv.view(sizes)) for sizes in ((24,), (4, 6), (6, 4), (2, 3, 4))}
    assert len(digests) == 4
    changed = kv.clone()
    changed[23] = torch.nextafter(changed[23], torch.tensor(100.0))
    assert digest_of(changed) != digest_of(kv)


def test_placeholders_and_salts_tell_prefixes_apart() -> None:
    a, b = Choice("a" * 40, 10), Choice("b" * 40, 10)
    assert a.placeholders(257) == placeholders("a" * 40, 10, 257)
    assert a.placeholders(257) != b.placeholders(257)
    # All of the middle of the vocabulary, where there are no special tokens.
    assert set(Choice("c" * 40, 4000).placeholders(257)) == set(range(64, 192))
    assert [set(placeholders("c" * 40, 99, few)) for few in (1, 2, 5)] == [{0}, {0}, {1, 2}]
    salts = {a.salt(), b.salt(), Choice("a" * 40, 11).salt(), a.salt("mine"), a.salt("yours")}
    assert len(salts) == 5
    # What vLLM takes: at most 128 characters, and none of these.
    assert all(len(salt) <= 128 and not set("@/\\\0") & set(salt) for salt in salts)
    one = {Choice(f"{i:040x}", 1).placeholders(257) for i in range(400)}
    assert len(one) < 400  # ids alone would not do: the salt does


def test_a_request_chooses_by_its_salt_and_its_tokens() -> None:
    choice = Choice("a" * 40, 10)
    ids = [*choice.placeholders(257), 7]
    assert choice_of(choice.salt(), ids, 257) == choice
    assert choice_of(choice.salt("mine"), ids, 257) == choice
    assert choice_of(None, ids, 257) is None
    assert choice_of("somebody's own", ids, 257) is None


@pytest.mark.parametrize(
    ("salt", "prompt", "reason"),
    [
        (Choice("a" * 40, 10).salt(), [*Choice("a" * 40, 10).placeholders(257)], "no text behind a prefix of 10"),
        (
            Choice("a" * 40, 10).salt(),
            [*Choice("b" * 40, 10).placeholders(257), 7],
            "does not begin with the placeholders",
        ),
        (Choice("a" * 40, 10).salt(), None, "embeddings"),
        (Choice("a" * 40, 9999999).salt(), [1, 2], "no text behind a prefix of 9999999"),
        ("prefix_attn:", [1, 2], "names no prefix"),
        ("prefix_attn:" + "a" * 40 + ":0:", [1, 2], "names no prefix"),
        ("prefix_attn:" + "a" * 40 + ":10:" + "@", [1, 2], "names no prefix"),
        ("prefix_attn:" + "A" * 40 + ":10:", [1, 2], "names no prefix"),
    ],
)
def test_a_salt_of_ours_that_fits_no_prefix_is_refused(salt: str, prompt: list[int] | None, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        choice_of(salt, prompt, 257)


@pytest.mark.parametrize(
    ("length", "computed", "number"),
    [(10, 0, 10), (10, 8, 2), (10, 16, 0), (8, 0, 8), (8, 8, 0), (1, 0, 1)],
)
def test_only_what_the_cache_lacks_is_written(length: int, computed: int, number: int) -> None:
    planner, choice = Planner(257, BLOCK), Choice("a" * 40, length)
    request = asked(choice, text=12)
    assert planner.matched(request, computed) == (number, False)
    planner.plan(request, [30, 31, 32], number)
    blocks = (30, 31, 32)[computed // BLOCK :]  # those that are wrong if nothing can be written
    assert planner.take() == ([Load("a", choice, computed, blocks)] if number else [], [])
    assert planner.take() == ([], [])
    assert planner.counts == ({"injections": 1, "tokens": number} if number else {"hits": 1})


def test_slots_are_those_of_the_blocks() -> None:
    load = Load("a", Choice("a" * 40, 19), 8, (5, 2, 7))
    assert slots(load, 19, BLOCK).tolist() == [40, 41, 42, 43, 44, 45, 46, 47, 16, 17, 18]


def test_requests_without_a_prefix_are_left_alone() -> None:
    planner = Planner(257, BLOCK)
    for request in (Request("1", [1, 2, 3]), Request("2", [1, 2, 3], "own", {"prefix": "a"}), Request("3", None)):
        assert planner.matched(request, 0) == (0, False)
        planner.plan(request, [1], 0)
    assert planner.take() == ([], []) and not planner.counts


def test_a_preempted_request_gets_its_prefix_again() -> None:
    planner, choice = Planner(257, BLOCK), Choice("a" * 40, 10)
    for blocks in ([1, 2], [7, 4]):
        request = asked(choice)
        assert planner.matched(request, 0) == (10, False)  # asked twice where there was no room at first
        assert planner.matched(request, 0) == (10, False)
        planner.plan(request, blocks, 10)
        assert planner.take() == ([Load("a", choice, 0, tuple(blocks))], [])
    assert planner.counts["injections"] == 2


def test_a_request_that_cannot_be_answered_is_to_fail() -> None:
    """It waits for a token that never comes. If it ran until it fails, others could find its blocks in the cache."""
    planner, choice = Planner(257, BLOCK), Choice("a" * 40, 10)
    forged, scored, alone = asked(choice), asked(choice, number="2"), Request("3", [3], choice.salt())
    forged.prompt_token_ids = [3] * 20
    scored.skip_reading_prefix_cache = True  # as prompt_logprobs has it
    for request in (forged, scored, alone):
        assert planner.matched(request, 8) == (1, True)
        assert not request.skip_reading_prefix_cache  # else vLLM would load nothing, and run placeholders
        planner.plan(request, [4, 5, 6], 1)
        assert planner.take() == ([], [request.request_id])
    assert planner.counts == {"refused": 3}


def test_placeholders_never_run_as_text() -> None:
    planner, choice = Planner(257, BLOCK), Choice("a" * 40, 10)
    request = asked(choice)
    planner.matched(request, 0)
    with pytest.raises(RuntimeError, match="loads 0 tokens"):
        planner.plan(request, [1, 2], 0)
    with pytest.raises(RuntimeError, match="loads 4 tokens"):
        planner.plan(Request("9", [1, 2, 3, 4, 5]), [1], 4)


@pytest.mark.parametrize(
    ("total", "size", "heads"),
    [
        (8, 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (3, 3, [[0], [1], [2]]),
        (2, 8, [[0], [0], [0], [0], [1], [1], [1], [1]]),
    ],
)
def test_each_rank_takes_its_heads(total: int, size: int, heads: list[list[int]]) -> None:
    """As vLLM's layers have them: replicated where there are more ranks than heads."""
    assert [list(range(total))[Rank(number, size).heads(total)] for number in range(size)] == heads
    with pytest.raises(ValueError, match="3 key/value heads cannot be divided among 2"):
        Rank(0, 2).heads(3)


def test_the_heads_of_all_ranks_are_the_prefix(tmp_path: Path) -> None:
    registry = Registry(Settings(prefixes={"a": str(saved(tmp_path))}), shape())
    whole = Source(registry, Rank(), torch.float32).get("a", registry.choice("a"))
    assert torch.equal(whole, read(tmp_path, shape()).kv.permute(1, 2, 0, 3, 4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # the model's; an fp8 cache rounds these itself
        parts = [Source(registry, Rank(i, 2), dtype).get("a", registry.choice("a")) for i in range(2)]
        assert torch.equal(torch.cat(parts, dim=3), whole.to(dtype)) and parts[0].dtype == dtype


def test_host_memory_keeps_what_was_used_last() -> None:
    held = Held(3 * 16)
    for name in "abc":
        held.put(name, torch.zeros(4))
    assert held.get("a") is not None
    held.put("d", torch.zeros(4))
    assert [name for name in "abcd" if held.get(name) is not None] == ["a", "c", "d"]
    assert held.bytes == 48 and len(held) == 3
    held.put("large", torch.zeros(100))
    assert held.get("large") is None and len(held) == 3


def test_a_prefix_is_read_once_until_it_changes(tmp_path: Path) -> None:
    """Its name then means another digest: nothing that was computed with the old files is found again."""
    registry = Registry(Settings(prefixes={"a": str(saved(tmp_path / "a"))}), shape())
    source, old = Source(registry, Rank(), torch.float32), registry.choice("a")
    for _ in range(3):
        source.get("a", old)
    assert source.counts["reads"] == 1
    saved(tmp_path / "a", seed=1)
    new = registry.choice("a")
    assert new.digest != old.digest
    assert source.get("a", old) is not None  # a request that came before still has what it chose
    late = Source(registry, Rank(), torch.float32)
    with pytest.raises(ValueError, match="have changed since the request came"):
        late.get("a", old)
    with pytest.raises(ValueError, match="'a' has 4 tokens, and the request 5"):
        late.get("a", Choice(new.digest, 4)) is not None and late.get("a", Choice(new.digest, 5))
    with pytest.raises(ValueError, match="no prefix 'nobody'"):
        late.get("nobody", Choice("e" * 40, 4))


def test_a_folder_is_read_lazily_and_watched(tmp_path: Path) -> None:
    made = saved(tmp_path / "made")
    (tmp_path / "all").mkdir()
    for name in ("x", "y"):
        shutil.copytree(made, tmp_path / "all" / name)
    (tmp_path / "all" / "broken").mkdir()
    registry = Registry(Settings(prefixes={"a": str(made)}, folder=str(tmp_path / "all")), shape())
    registry.check()  # reads none of them
    assert registry.names() == ["a", "broken", "x", "y"]
    assert registry.choice("x") == registry.choice("a")
    with pytest.raises(ValueError, match="broken"):
        registry.choice("broken")
    shutil.copytree(made, tmp_path / "all" / "z")
    assert registry.choice("z").length == 4
    shutil.rmtree(tmp_path / "all" / "x")
    for name in ("x", "nobody", "", ".", "..", "../made", "x/../y", "y\0", "a" * 300):
        with pytest.raises(Unknown):
            registry.choice(name)


def test_prefixes_are_loaded_and_unloaded(tmp_path: Path) -> None:
    made, other = saved(tmp_path / "made"), saved(tmp_path / "other", seed=1)
    gated = saved(tmp_path / "gated", gate="zero")
    (tmp_path / "all").mkdir()
    settings = Settings(prefixes={"a": str(made)}, folder=str(tmp_path / "all"), loading=True)
    registry, elsewhere = Registry(settings, shape()), Registry(settings, shape())
    choice = registry.load("new", str(made))
    assert choice == elsewhere.choice("new")  # another process sees it
    with pytest.raises(ValueError, match="loaded already"):
        registry.load("new", str(other))
    registry.load("new", str(other), replace=True)
    assert elsewhere.choice("new") != choice
    for name, place, reason in (
        ("a", made, "from the start"),
        ("../x", made, "cannot be the name"),
        ("gated", gated, "it has a gate"),
        ("none", tmp_path / "nowhere", "nowhere"),
    ):
        with pytest.raises(ValueError, match=reason):
            registry.load(name, str(place))
    registry.unload("new")
    with pytest.raises(Unknown):
        elsewhere.choice("new")
    with pytest.raises(Unknown):
        registry.unload("new")
    with pytest.raises(ValueError, match="from the start"):
        registry.unload("a")
    assert os.listdir(tmp_path / "all") == [] and made.is_dir() and other.is_dir()
    with pytest.raises(ValueError, match="started without it"):
        Registry(settings._replace(loading=False), shape()).load("new", str(made))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"prefix": {}}, "'prefix' is unknown; known are .*'prefixes'"),
        ({"prefixes": ["a"]}, "prefixes must be a dict"),
        ({"host_bytes": True}, "host_bytes must be a int"),
        ({"loading": True}, "name one"),
        ({"folder": "nowhere"}, "no folder nowhere"),
    ],
)
def test_wrong_settings_are_refused(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Settings.of(given)


def test_names_that_are_paths_are_no_names() -> None:
    assert [name for name in ("a", "a.b", "é", ".a", "a/b", "a\\b", "", "..") if is_plain(name)] == ["a", "a.b", "é"]
