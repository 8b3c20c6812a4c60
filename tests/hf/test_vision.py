"""Models of images and text: masks and positions that are made before the stack of the text is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from prefix_attn import PrefixConfig, PrefixTuning, get_prefix_model
from tests.hf import vision
from tests.hf.models import CACHE
from tests.hf.vision_models import CONFIGS, IMAGE, TEXT, VISION, WIDTH, tiny
from tests.numerics import MODEL, close

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Images and text\n")[2].partition("\n## ")[0]
ROWS = {name: cells for name, *cells in (line[2:-2].split(" | ") for line in SECTION.splitlines() if line[:2] == "| ")}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of a frozen tower that is checkpointed
@pytest.mark.parametrize("title", vision.CHECKS)
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_cell(name: str, title: str) -> None:
    vision.CHECKS[title](name)


def test_the_page_is_whole() -> None:
    expected = {"architecture": list(vision.CHECKS)} | {name: ["yes"] * len(vision.CHECKS) for name in sorted(CONFIGS)}
    assert expected == ROWS


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "qwen2_vl"])
def test_padding_without_a_shift(name: str) -> None:
    config = PrefixConfig(num_virtual_tokens=vision.P, position_mode="none")
    vision.padding(name, get_prefix_model(tiny(name), config).eval())


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_towers_are_left_alone(name: str) -> None:
    """They keep their own attention. The text's is ours, and detaching gives it back."""

    def implementations() -> dict[str, str]:
        models = [m for m in base.modules() if isinstance(m, PreTrainedModel)]
        return {type(m).__name__: m.config._attn_implementation for m in models}

    base = tiny(name)
    before = implementations()
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=vision.P))
    changed = {n for n, value in implementations().items() if value != before[n]}
    assert not any("Vision" in n or "CLIP" in n for n in changed)
    assert len(changed) == 3
    model.attachment.remove()
    assert implementations() == before


def test_positions_within_an_image_are_not_packed_sequences() -> None:
    """They start again with each line of the image; without a mask that looked like several rows in one."""
    model = vision.with_text("qwen2_vl")
    given = vision.inputs("qwen2_vl", [vision.rows("qwen2_vl", True)[0]])
    expected = model(**given).logits
    del given["attention_mask"]
    out = model(**given, use_cache=True)
    close(out.logits, expected, MODEL)
    assert out[CACHE].get_seq_length() == expected.shape[1]


_TILES = {"max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
_EYE = {"attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 96, "intermediate_layers_indices": [0, 1]}
REFUSED: dict[str, dict[str, Any]] = {
    "mllama": {
        "text_config": TEXT | {"cross_attention_layers": [1]},
        "vision_config": VISION | _TILES | _EYE | {"num_hidden_layers": 2},
        "image_token_index": IMAGE,
    },
    "idefics": TEXT
    | {"vision_config": VISION | {"embed_dim": WIDTH}, "cross_layer_interval": 1, "additional_vocab_size": 0},
}


@pytest.mark.parametrize("name", REFUSED)
def test_cross_attention_to_images_is_refused_by_name(name: str) -> None:
    base = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **REFUSED[name]))
    before, trainable = base.config._attn_implementation, [p.requires_grad for p in base.parameters()]
    for attach in (
        lambda: get_prefix_model(base, PrefixConfig(num_virtual_tokens=vision.P)),
        lambda: PrefixTuning(base, vision.P, WIDTH),
    ):
        with pytest.raises(NotImplementedError, match=type(base).__name__):
            attach()
    assert base.config._attn_implementation == before
    assert [p.requires_grad for p in base.parameters()] == trainable
