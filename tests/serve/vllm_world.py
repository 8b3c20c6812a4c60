"""A base model, prefixes of several lengths, requests for them, and what ``PrefixModel.generate`` answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.load import base_source, load_base
from prefix_attn.hf.model import PrefixModel
from tests.hf.models import spread, tiny
from tests.tokens import END, byte_tokenizer

LENGTHS = {"a": 10, "b": 32, "c": 64, "d": 20}
EIGHT = LENGTHS | {"e": 16, "f": 7, "g": 40, "h": 96}
NEW = 48
_TINY = {
    "vocab_size": 257,
    "hidden_size": 128,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "eos_token_id": END,
    "pad_token_id": END,
}
_FOODS = ("Italian", "Chinese", "Fast food", "English", "Indian", "French", "Japanese", "Thai")
_PLACES = ("Aromi", "Alimentum", "Zizzi", "Strada", "Blue Spice", "Cotto", "Fitzbillies", "Giraffe")


@dataclass
class Job:
    """A request: its prefix, its text, its tokens, and those that follow them."""

    prefix: str | None
    text: str
    ids: list[int]
    wanted: list[int] = field(default_factory=list)


@dataclass
class World:
    """Where everything is."""

    base: str  # as the command takes it
    source: str  # as vLLM takes it
    model: PrefixModel
    tokenizer: Any
    folders: dict[str, Path]
    jobs: list[Job]


def make_world(base: str, folder: Path, lengths: Mapping[str, int] = LENGTHS) -> World:
    """Of ``base``, or of a model that is made here if that is "tiny". ``lengths``: P of each prefix."""
    torch.manual_seed(0)
    if base == "tiny":
        base = str(folder / "base")
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}a:"
        spread(tiny("llama", **_TINY)).save_pretrained(base)
        tokenizer.save_pretrained(base)
    model, tokenizer = load_base(base)
    prefixed, folders = PrefixModel(model), {}
    for name, length in lengths.items():
        prefixed.add_prefix(name, PrefixConfig(num_virtual_tokens=length))
        with torch.no_grad():
            for parameter in prefixed.prefixes[name].parameters():
                parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
        folders[name] = folder / "prefixes" / name
        prefixed.save_pretrained(folders[name])
    prefixed.eval()
    return World(base, str(base_source(base)), prefixed, tokenizer, folders, _jobs(prefixed, tokenizer))


def _jobs(model: PrefixModel, tokenizer: Any) -> list[Job]:
    """32 requests, of which two have no prefix."""
    jobs, names = [], model.prefix_names
    for i in range(32):
        near = " | near : the old city centre" * (i % 5)
        prefix = names[i % len(names)] if i < 30 else None
        text = f"name : {_PLACES[i % 8]} | food : {_FOODS[(i * 3 + i // 8) % 8]} | area : riverside{near}\n=>"
        jobs.append(Job(prefix, text, tokenizer(text)["input_ids"]))
    longest = max(len(job.ids) for job in jobs)
    ids = torch.tensor([[0] * (longest - len(job.ids)) + job.ids for job in jobs])
    mask = torch.tensor([[0] * (longest - len(job.ids)) + [1] * len(job.ids) for job in jobs])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=mask,
            prefix_names=[job.prefix for job in jobs],
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    for job, row in zip(jobs, found, strict=True):
        job.wanted = row[longest:].tolist()
    return jobs
