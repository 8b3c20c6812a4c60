"""TRL's trainers, with their defaults: the losses are those of PEFT's prefix tuning, from the same start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from prefix_attn import PrefixConfig, PrefixModel, PrefixTuning, accelerate, get_prefix_model
from tests.hf.models import tiny
from tests.numerics import FLOAT, MODEL, close
from tests.tokens import byte_tokenizer

pytestmark = [pytest.mark.peft, pytest.mark.trl]
P = 4
CHAT = """{% for message in messages %}{% if message['role'] == 'assistant' %}>{% generation %}\
{{ message['content'] + eos_token }}{% endgeneration %}{% else %}?{{ message['content'] }}{% endif %}{% endfor %}"""
STEPS = {
    "max_steps": 10,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


def small(name: str = "llama") -> PreTrainedModel:
    model = tiny(name, vocab_size=257, **({"n_positions": 128} if name == "gpt2" else {"max_position_embeddings": 128}))
    model.config.pad_token_id = model.generation_config.pad_token_id = 256
    model.config.eos_token_id = model.generation_config.eos_token_id = 256
    return model


def tokenizer() -> Any:
    made = byte_tokenizer()
    made.chat_template = CHAT
    return made


def pair(name: str = "llama", **options: Any) -> tuple[Any, PrefixModel]:
    """PEFT's model, accelerated, and ours, with one prefix on two models that are equal."""
    from peft import PrefixTuningConfig, get_peft_model
    from trl import DPOTrainer  # before the model is made: that is when its trainers are told of us

    assert DPOTrainer.__name__ == "DPOTrainer"  # TRL imports its trainers at first use

    theirs = get_peft_model(small(name), PrefixTuningConfig(num_virtual_tokens=P, task_type="CAUSAL_LM", **options))
    accelerate(theirs)
    ours = get_prefix_model(small(name), PrefixConfig(num_virtual_tokens=P, **options))
    (start,) = theirs.prompt_encoder["default"].parameters()
    start.data.normal_()
    ours.prefixes["default"].embedding.data.copy_(start)
    return theirs, ours


def chats(count: int = 24) -> Any:
    from datasets import Dataset

    turns = [(f"{i} and {i + 1}", f"make {2 * i + 1}" + "!" * (i % 5)) for i in range(count)]
    roles = ("user", "assistant")
    return Dataset.from_list(
        [{"messages": [{"role": r, "content": text} for r, text in zip(roles, turn)]} for turn in turns]
    )


def preferences(count: int = 24) -> Any:
    from datasets import Dataset

    rows = [{"prompt": f"{i} and", "chosen": f" {i + 1}", "rejected": " no" * (i % 3 + 1)} for i in range(count)]
    return Dataset.from_list(rows)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal(ours: list[float], theirs: list[float]) -> None:
    assert len(ours) == len(theirs) == 10
    assert ours[0] != ours[-1]
    close(ours[0], theirs[0], FLOAT)
    close(ours, theirs, MODEL)


def sft(model: Any, folder: Path, **options: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(str(folder), **(STEPS | {"learning_rate": 1e-2} | options))
    data = chats()
    return SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gpt2", {"bf16": False}),
        ("llama", {"packing": True, "max_length": 64}),
        ("llama", {"assistant_only_loss": True, "bf16": False}),
    ],
    ids=["plain", "gpt2", "packing", "assistant"],
)
def test_sft_is_that_of_peft(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Chat data; checkpointing of activations and autocast are TRL's defaults."""
    theirs, ours = (sft(model, tmp_path, **options) for model in pair(name))
    assert_equal(losses(ours), losses(theirs))
    close(ours.evaluate()["eval_loss"], theirs.evaluate()["eval_loss"], MODEL)
    assert ours.model.is_gradient_checkpointing


def dpo(model: Any, folder: Path, reference: Any, **options: Any) -> Any:
    from trl import DPOConfig, DPOTrainer

    # Where its adapter is disabled, PEFT's model runs outside of the autocast that is TRL's default.
    arguments = DPOConfig(str(folder), bf16=False, **(STEPS | {"learning_rate": 1e-2} | options))
    data = preferences()
    return DPOTrainer(model, reference, arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


@pytest.mark.filterwarnings("ignore:Adapter name 'ref':UserWarning")  # TRL adds one, PEFT warns of its name
@pytest.mark.parametrize("precompute", [False, True], ids=["each step", "precomputed"])
def test_dpo_is_that_of_peft(tmp_path: Path, precompute: bool) -> None:
    """The reference is the model without the prefix: PEFT's adapter disabled, and our ``base_model``, by default."""
    theirs, ours = pair()
    trainer = dpo(theirs, tmp_path, None)
    trainer.model.delete_adapter("ref")  # TRL's copy of the start, which it would take as the reference
    expected = losses(trainer)
    trainer = dpo(ours, tmp_path, None, precompute_ref_log_probs=precompute)
    assert_equal(losses(trainer), expected)
    assert trainer.ref_model is ours.base_model
    assert all(p.grad is None for p in ours.base_model.parameters())


def test_sft_of_virtual_tokens_in_every_row(tmp_path: Path) -> None:
    model = PrefixTuning(small("mistral"), P, 32)
    trainer = sft(
        model, tmp_path, max_steps=1, per_device_train_batch_size=24, bf16=False, gradient_checkpointing=False
    )
    batch = next(iter(trainer.get_train_dataloader()))
    expected = model(**batch).loss.item()
    close(losses(trainer)[0], expected, MODEL)


def test_grpo_and_rewards(tmp_path: Path) -> None:
    """Samples have the prefix, and so do the log probabilities: the first policy is the one that was sampled from."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    _, model = pair()
    options = STEPS | {"max_steps": 2, "num_generations": 2, "max_completion_length": 4, "bf16": False}
    seen: list[str] = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        seen.extend(completions)
        return [float(i % 2) for i in range(len(completions))]

    data = Dataset.from_list([{"prompt": f"{i} and"} for i in range(4)])
    before = model.prefixes["default"].embedding.clone()
    trainer = GRPOTrainer(model, reward, GRPOConfig(str(tmp_path), **options), data, processing_class=tokenizer())
    trainer.train()
    assert len(seen) == 8
    assert (model.prefixes["default"].embedding - before).abs().max() > 0
