"""A prefix on a frozen model of images and text.

Run it with ``python examples/vision_language.py``. It needs transformers, and downloads nothing. A tiny Gemma 3 learns
to name the colour of an image in one of two languages. Some questions do not tell which; a prefix learns to answer
them in the second. Questions have different lengths, so that batches have padding on the left.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from prefix_attn import PrefixConfig, get_prefix_model

COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])  # red, green, blue, yellow
PADDING, IMAGE, QUESTION = 0, 4, 5  # 6 and 7 are questions in the first and in the second language
WORDS = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])  # of each language, one for each colour


def batch(rows: int, language: int | None = None) -> dict[str, Tensor]:
    """Rows of an image, a question and its answer, which is the last token. None: any, and half of the rows tell."""
    colour, spoken, question = torch.randint(4, (rows,)), torch.randint(2, (rows,)), torch.full((rows,), QUESTION)
    tells = (1 + spoken) * torch.randint(2, (rows,))
    question, spoken = (question + tells, spoken) if language is None else (question, torch.full_like(spoken, language))
    ids = torch.cat([question[:, None].expand(-1, 8), WORDS[spoken, colour][:, None]], dim=1)
    for row, length in zip(ids, torch.randint(1, 5, (rows,)).tolist()):  # of the question
        row[: 8 - length] = torch.tensor([PADDING] * (4 - length) + [IMAGE] * 4)
    pixels = COLOURS[colour][:, :, None, None] + 0.1 * torch.randn(rows, 3, 16, 16)
    labels = ids.where(torch.arange(9) == 8, -100)
    types = {"attention_mask": (ids != PADDING).long(), "token_type_ids": (ids == IMAGE).long()}
    return {"input_ids": ids, "pixel_values": pixels, "labels": labels, **types}


def train(model: torch.nn.Module, steps: int, rate: float, language: int | None = None) -> float:
    """The last loss of AdamW on what is trainable."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss = model(**batch(32, language)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def answers(model: torch.nn.Module, given: dict[str, Tensor]) -> Tensor:
    """One generated token for each row, the padding and the answer aside."""
    cut = {name: given[name][:, :-1] for name in ("input_ids", "attention_mask", "token_type_ids")}
    return model.generate(**cut, pixel_values=given["pixel_values"], max_new_tokens=1, do_sample=False)[:, -1]


def main() -> None:
    """Train the base, then a prefix; answer with both, and row by row."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the tensors are too small for more
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 32, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
    config = Gemma3Config(
        text_config=size | text, vision_config=size | {"image_size": 16, "patch_size": 8}, mm_tokens_per_image=4,
        image_token_id=IMAGE, boi_token_id=8, eoi_token_id=9, pad_token_id=PADDING, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    base = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(base.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # it starts from zeros
    train(base, 150, 3e-3)
    given = batch(64, language=1)
    right = [(answers(base, given) == given["labels"][:, -1]).float().mean().item()]
    model = get_prefix_model(base, PrefixConfig(num_virtual_tokens=4))
    print("loss of the prefix {:.3f} -> {:.3f}".format(*(train(model, steps, 5e-2, language=1) for steps in (1, 60))))
    made = answers(model, given)
    right.append((made == given["labels"][:, -1]).float().mean().item())
    print(f"right in the second language {100 * right[0]:.0f}% -> {100 * right[1]:.0f}%")
    rows = [{name: value[i : i + 1, ...] for name, value in given.items()} for i in range(8)]
    for row in rows:  # without its padding
        real = row["attention_mask"][0].bool()
        row |= {name: row[name][:, real] for name in row if name != "pixel_values"}
    print(f"{sum(int(answers(model, row) == made[i]) for i, row in enumerate(rows))} of 8 rows are the same alone")


if __name__ == "__main__":
    main()
