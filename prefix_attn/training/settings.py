"""The settings of one training run, and the learning rate of each method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.io.writing import replace

# For ``train`` and the experiments, which run the same loop. The rate with the lowest validation loss on E2E,
# SmolLM2-135M, seed 0: after 100 steps for "prefix" and "prefix-mlp", after 50 for the others. Where two rates were
# level, the smaller one. Measured on 2026-11-27 with an older loop, which did not clip gradients:
# docs/results/rates.jsonl. With gradients clipped, 1e-1 for "prefix" ends the demo at the same loss as 3e-2 and at
# higher scores.
LEARNING_RATES = {
    "prefix": 1e-1,
    "prefix-mlp": 1e-3,
    "embedding": 3e-2,
    "infix": 1e-1,
    "peft": 1e-1,
    "lora": 1e-2,
    "top2": 3e-3,
    "full": 2e-4,
}
STEPS = 200
RUN_FILE = "run.yaml"  # the command's options, for --config
REPORTERS = {"tensorboard": ("tensorboard", "tensorboardX"), "trackio": ("trackio",), "wandb": ("wandb",)}


def default_learning_rate(config: PrefixConfig) -> float:
    """The rate in LEARNING_RATES for a prefix of this kind."""
    if config.prefix_projection:
        return LEARNING_RATES["prefix-mlp"]
    return LEARNING_RATES["prefix" if config.mode == "kv" else config.mode]


@dataclass(frozen=True)
class TrainingSettings:
    """How to train.

    The length is ``steps``, or ``epochs`` passes over the rows; with neither it is ``STEPS`` steps. A step takes
    ``gradient_accumulation_steps`` batches of ``batch_size`` rows. ``learning_rate`` defaults to
    ``default_learning_rate``. Every ``validate_every`` steps the validation loss is measured and a checkpoint is
    written. ``resume`` continues, bit for bit, from the last complete checkpoint in ``output``, or begins from the
    start where there is none. ``packing`` puts the
    rows of a batch one behind the other instead of padding them: the same loss in less time. It takes a causal model
    and ``mode="kv"``.

    ``max_length`` is in tokens: longer sources are cut. By default it is the length of the longest row, if the model
    has positions and memory has room for it.

    With ``load_best_model_at_end`` the prefix that is saved at the end is that of the validation with the lowest loss,
    otherwise that of the last step. ``early_stopping`` implies it, and ends a run after so many validations in a row
    without a lower loss. Both need validation rows. ``report_to`` names what shows the log: one of
    ``REPORTERS``, or several with commas.

    Raises:
        ValueError: a number is out of range, there are ``steps`` and ``epochs``, or the package of ``report_to`` is not
            installed.
    """

    output: Path
    steps: int | None = None
    batch_size: int = 8
    learning_rate: float | None = None
    max_length: int | None = None
    validate_every: int = 50
    seed: int = 0
    resume: bool = False
    gradient_checkpointing: bool = False
    packing: bool = False
    epochs: float | None = None
    gradient_accumulation_steps: int = 1
    early_stopping: int | None = None
    load_best_model_at_end: bool = False
    report_to: str | None = None

    def __post_init__(self) -> None:
        """See the class."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps and epochs exclude one another, got {self.steps} and {self.epochs:g}")
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "steps", STEPS)
        rate = self.learning_rate
        if rate is not None and not 0 <= rate < float("inf"):
            raise ValueError(f"learning_rate must be positive, such as 0.01, got {rate}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0..{2**32 - 1}, got {self.seed}")
        if self.epochs is not None and not 0 < self.epochs < float("inf"):
            raise ValueError(f"epochs must be positive, got {self.epochs}")
        for name in ("steps", "batch_size", "gradient_accumulation_steps", "early_stopping", "validate_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in self.reporters:
            if name not in REPORTERS:
                raise ValueError(f"report_to must be some of {list(REPORTERS)}, got {name!r}")
            if not any(map(find_spec, REPORTERS[name])):
                raise ValueError(f"report_to {name!r} needs a package that is not installed: pip install {name}")

    @property
    def reporters(self) -> list[str]:
        """The names in ``report_to``."""
        return self.report_to.split(",") if self.report_to is not None else []

    @property
    def keeps_best(self) -> bool:
        """Whether the prefix with the lowest validation loss is saved at the end."""
        return self.load_best_model_at_end or self.early_stopping is not None

    def keep(self, options: Mapping[str, Any]) -> None:
        """Write ``options`` into run.yaml in ``output``, with the values that were found for those not given."""
        import yaml

        values = {**options, **{name: value for name, value in asdict(self).items() if name in options}}
        values |= {"resume": False}  # the file is of the whole training
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=2**16)
        self.output.mkdir(parents=True, exist_ok=True)
        replace(self.output / RUN_FILE, text.encode())
