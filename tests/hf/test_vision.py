"""Models of images and text: masks and positions that are made before the stack of the text is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from prefix_attn import PrefixConfig, get_prefix_model
from tests.hf import vision
from tests.hf.vision_models import CONFIGS, tiny

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
