"""Tiny random models that read images and text: one per family, and batches for them with and without images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from tests.hf.models import spread

VOCABULARY, IMAGE, WIDTH = 97, 90, 32
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
_LLAMA = TEXT | {"model_type": "llama"}
_GEMMA = TEXT | {"head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": WIDTH}
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
_PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN = {"image_token_id": IMAGE, "video_token_id": 91, "vision_start_token_id": 88, "vision_end_token_id": 89}
_QWEN2 = TEXT | {"rope_parameters": _ROPE}
_TILES = {"image_token_id": IMAGE, "scale_factor": 2, "pixel_shuffle_factor": 2, "tie_word_embeddings": False}
# Configuration, and how many tokens stand for an image.
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "llava": ({"text_config": _LLAMA, "vision_config": _CLIP, "image_token_id": IMAGE}, 4),
    "mistral3": (
        {
            "text_config": TEXT | {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
            "vision_config": VISION | {"model_type": "pixtral", "image_size": 32, "head_dim": 8},
            "image_token_id": IMAGE,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        4,
    ),
    "qwen2_vl": (
        {
            "text_config": _QWEN2 | {"model_type": "qwen2_vl_text"},
            "vision_config": _PATCHES
            | {"depth": 3, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 4, "mlp_ratio": 2},
            **_QWEN,
        },
        4,
    ),
    "qwen2_5_vl": (
        {
            "text_config": _QWEN2 | {"model_type": "qwen2_5_vl_text"},
            "vision_config": _PATCHES
            | {"depth": 3, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 4}
            | {"window_size": 16, "fullatt_block_indexes": [1]},
            **_QWEN,
        },
        4,
    ),
    "qwen3_vl": (
        {
            "text_config": _QWEN2 | {"head_dim": 8},
            "vision_config": _PATCHES
            | {"depth": 3, "hidden_size": WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 48, "num_heads": 4}
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            **_QWEN,
        },
        4,
    ),
    "idefics3": ({"text_config": _LLAMA, "vision_config": VISION | {"image_size": 32}, **_TILES}, 4),
    "smolvlm": ({"text_config": _LLAMA, "vision_config": VISION | {"image_size": 32}, **_TILES}, 4),
    "internvl": (
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
            "image_token_id": IMAGE,
        },
        4,
    ),
    "gemma3": (
        {
            "text_config": _GEMMA
            | {"num_hidden_layers": 3, "query_pre_attn_scalar": 8, "sliding_window": 6}
            | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "image_token_id": IMAGE,
        },
        4,
    ),
    "paligemma": (
        {
            "text_config": _GEMMA | {"model_type": "gemma"},
            "vision_config": VISION | {"model_type": "siglip_vision_model", "projection_dim": WIDTH},
            "image_token_id": IMAGE,
            "projection_dim": WIDTH,
            "hidden_size": WIDTH,
        },
        4,
    ),
    "llava_next": (
        {"text_config": _LLAMA, "vision_config": _CLIP, "image_token_id": IMAGE, "image_grid_pinpoints": [[16, 16]]},
        10,  # the image once as a whole, once as a grid with an end of each line
    ),
    "llava_onevision": (
        {
            "text_config": TEXT | {"model_type": "qwen2"},
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "image_token_id": IMAGE,
            "video_token_id": 91,
            "image_grid_pinpoints": [[16, 16]],
        },
        10,
    ),
}

# A text in front of a row scrolls out of a window, and a prefix does not.
WIDE = {"gemma3": {"text_config": CONFIGS["gemma3"][0]["text_config"] | {"sliding_window": 64}}}


def tiny(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of the family ``name``, in eval mode; ``changes`` are to its configuration."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **CONFIGS[name][0] | changes)
    return spread(AutoModelForImageTextToText.from_config(config).eval())


def row(name: str, length: int, *, image: bool = True) -> Tensor:
    """Token ids: some text, an image if there shall be one, and ``length`` tokens of text."""
    text = torch.randint(5, 80, (length + 2,), generator=torch.Generator().manual_seed(length))
    marks = [88] if "vision_start_token_id" in CONFIGS[name][0] else []
    placeholders = torch.tensor([*marks, *[IMAGE] * CONFIGS[name][1]] if image else [], dtype=torch.int64)
    return torch.cat([text[:2], placeholders, text[2:]])


def batch(name: str, rows: Sequence[Tensor], left: Sequence[int] | None = None, length: int = 0) -> dict[str, Tensor]:
    """Inputs for ``rows``; row i has ``left[i]`` tokens of padding before it, and the rest behind it.

    All padding is on the left by default. ``labels`` are the tokens of text but the first.
    """
    length = max(length, *map(len, rows))
    left = [length - len(ids) for ids in rows] if left is None else left
    sides = [(n, length - len(ids) - n) for ids, n in zip(rows, left)]
    inputs = {
        "input_ids": rows,
        "attention_mask": [torch.ones_like(ids) for ids in rows],
        "labels": [F.pad(ids.where(ids < 80, -100)[1:], (1, 0), value=-100) for ids in rows],
        **_types(name, rows),
    }
    padding = {"labels": -100}
    padded = {
        key: torch.stack([F.pad(row, side, value=padding.get(key, 0)) for row, side in zip(values, sides)])
        for key, values in inputs.items()
    }
    return padded | _pixels(name, [bool((ids == IMAGE).any()) for ids in rows])


def _types(name: str, rows: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
    """Which tokens are an image; PaliGemma is told instead which come after image and prompt."""
    images = [(ids == IMAGE).long() for ids in rows]
    if name == "paligemma":
        return {
            "token_type_ids": [(torch.arange(len(ids)) > 4 + image.sum()).long() for ids, image in zip(rows, images)]
        }
    key = "mm_token_type_ids" if "qwen" in name else "token_type_ids"
    return {key: images} if name == "gemma3" or "qwen" in name else {}


def _pixels(name: str, images: Sequence[bool]) -> dict[str, Tensor]:
    """Noise for each row that has an image. A row's noise is always the same."""
    if not any(images):
        return {}
    n = sum(images)
    size = 32 if name in ("mistral3", "internvl", "idefics3", "smolvlm") else 16
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(7)).repeat(n, 1, 1, 1)
    sizes = {"image_sizes": torch.tensor([[size, size]] * n)}
    if "qwen" in name:
        return {"pixel_values": noise.reshape(n * 16, 48).repeat(1, 2), "image_grid_thw": torch.tensor([[1, 4, 4]] * n)}
    if name in ("idefics3", "smolvlm"):  # each row has as many, of which those of zeros count for nothing
        full = torch.zeros(len(images), 1, 3, size, size)
        full[torch.tensor(images)] = noise[:, None]
        return {"pixel_values": full}
    if name in ("llava_next", "llava_onevision"):
        return {"pixel_values": noise[:, None].repeat(1, 2, 1, 1, 1), **sizes}
    return {"pixel_values": noise} | (sizes if name == "mistral3" else {})
