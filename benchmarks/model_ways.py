"""Whole models with a prefix of P tokens: bare, ours, PEFT's, adapters'.

Every way has its own copy of the base model, and every P is one more prefix on that copy.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import Unable

WAYS = ("bare", "ours", "PEFT", "adapters")
MODELS = {
    "smollm2": "SmolLM2-135M, its own weights",
    "gpt2": "GPT-2 small (124M), random weights",
    "tiny": "Llama's layer, 64 wide, 2 of it, random weights: for the logic",
    "llama": "Llama's layer (2048 wide, 32 query heads, 8 key heads), 4 layers of it, random weights",
}


def base(name: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A frozen copy of the base with torch's own attention."""
    import transformers

    if name == "smollm2":
        from prefix_attn.hf.load import load_base

        model, _ = load_base("smollm2", dtype=dtype, device=device)
    else:
        configs = {
            "tiny": lambda: transformers.LlamaConfig(
                hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=32000,
            ),
            "gpt2": lambda: transformers.GPT2Config(n_positions=8192),
            "llama": lambda: transformers.LlamaConfig(
                hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=32,
                num_key_value_heads=8, vocab_size=32000, max_position_embeddings=8192,
            ),
        }  # fmt: skip
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(configs[name](), dtype=dtype).to(device)
    model.set_attn_implementation("sdpa")
    model.generation_config.eos_token_id = None  # every way writes as many tokens as it is told to
    model.generation_config.pad_token_id = 0
    return model.eval().requires_grad_(False)


def cache_bytes(model: Any) -> int:
    """Bytes that one token of one row takes in the model's cache: keys and values of every layer."""
    c = model.config
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return 2 * c.num_hidden_layers * heads * (c.hidden_size // c.num_attention_heads) * model.dtype.itemsize


class Prefixed:
    """One way: ``model`` is what is called, ``use(P)`` makes its prefix of P tokens the one that counts."""

    def __init__(self, way: str, name: str, device: str, prefixes: Sequence[int], mlp: int | None = None) -> None:
        """``prefixes``: their lengths. ``mlp``: the width of the MLP that makes them, if one does."""
        self.device, self.use = device, lambda P: None
        if way == "bare":
            self.model = base(name, device)
        else:
            maker: Callable[..., None] = {"ours": self._ours, "PEFT": self._peft, "adapters": self._adapters}[way]
            maker(name, prefixes, mlp)

    def _ours(self, name: str, prefixes: Sequence[int], mlp: int | None) -> None:
        from prefix_attn import PrefixConfig, get_prefix_model

        configs = {
            P: PrefixConfig(num_virtual_tokens=P, prefix_projection=mlp is not None, encoder_hidden_size=mlp)
            for P in prefixes
        }
        first, *others = prefixes
        self.model = get_prefix_model(base(name, self.device), configs[first])
        for P in others:
            self.model.add_prefix(f"p{P}", configs[P])
        self.use = lambda P: self.model.set_prefix("default" if first == P else f"p{P}")

    def _peft(self, name: str, prefixes: Sequence[int], mlp: int | None) -> None:
        try:
            from peft import PrefixTuningConfig, get_peft_model
        except ImportError:
            raise Unable("peft is not installed") from None
        projection: Any = {"prefix_projection": mlp is not None, "encoder_hidden_size": mlp}
        configs = {P: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P, **projection) for P in prefixes}
        first, *others = prefixes
        self.model = get_peft_model(base(name, self.device), configs[first], adapter_name=f"p{first}")
        for P in others:
            self.model.add_adapter(f"p{P}", configs[P])
        self.use = lambda P: self.model.set_adapter(f"p{P}")

    def _adapters(self, name: str, prefixes: Sequence[int], mlp: int | None) -> None:
        try:
            adapters: Any = importlib.import_module("adapters")
        except ImportError:
            raise Unable("adapters is not installed (1.3 wants transformers 4.57)") from None
        self.model = base(name, self.device)
        adapters.init(self.model)
        for P in prefixes:
            config = adapters.PrefixTuningConfig(prefix_length=P, flat=mlp is None, bottleneck_size=mlp or 512)
            self.model.add_adapter(f"p{P}", config=config)
        self.use = lambda P: self.model.train_adapter(f"p{P}")

    def training(self, P: int, batch: dict[str, Tensor]) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
        """(run, setup) of one step: forward, backward, AdamW. Without a prefix a backward to the input embeddings.

        No prefix tuning can be faster than that, as it must send a gradient through every layer.
        """
        if not P:
            embeddings = self.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            rest = {"attention_mask": batch["attention_mask"], "labels": batch["labels"], "use_cache": False}

            def floor(_: Any) -> None:
                embeddings.grad = None
                self.model(inputs_embeds=embeddings, **rest).loss.backward()

            return floor, lambda: self.model.train()
        self.use(P)
        # fused: what the Hugging Face Trainer uses
        optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def step(_: Any) -> None:
            optimizer.zero_grad(set_to_none=True)
            self.model(**batch, use_cache=False).loss.backward()
            optimizer.step()

        def setup() -> None:
            self.use(P)
            self.model.train()

        return step, setup

    def generating(self, P: int, ids: Tensor, new: int, **options: Any) -> Any:
        """Greedy decoding of ``new`` tokens."""
        self.model.eval()
        if P:
            self.use(P)
        return self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new,
            max_new_tokens=new, **options,
        )  # fmt: skip


def random_batch(B: int, length: int, device: str) -> dict[str, Tensor]:
    """Random tokens: the time does not depend on which they are."""
    ids = torch.randint(1000, 30000, (B, length), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
