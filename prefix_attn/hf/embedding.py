"""``PrefixTuning``: embedding-only prefix tuning, which trains the input embeddings of virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefix_attn.hf.attach.attachment import Attachment
from prefix_attn.hf.attach.insertion import Insertion
from prefix_attn.hf.attach.slots import find_layers
from prefix_attn.hf.attach.trained import freeze, set_trained
from prefix_attn.hf.attach.wrapper import Wrapper
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.hub import download_options
from prefix_attn.hf.initial import initial_embeddings
from prefix_attn.hf.io import checkpoint
from prefix_attn.hf.io.state import plain_name
from prefix_attn.hf.io.stored import update_card


class PrefixTuning(Wrapper):
    """A frozen model with trainable virtual tokens before its input (Li and Liang 2021, section 7.2).

    ``prefix`` is a table of input embeddings, (prefix_length, hidden_size) float32. It starts from the embeddings of
    random tokens. In causal models the positions of the text start after the table and follow the attention mask, so
    padding changes nothing. Logits, losses and labels are those of the text alone.

    In causal models with full attention the virtual tokens do not depend on the samples. They run through the model
    once per forward, without its dropout, and all rows attend to them as one prefix; ``shared`` is then True. In other
    models they run in every row: encoders, encoder-decoders, sliding windows narrower than the context, recurrent
    layers, attention outside transformers' AttentionInterface. In an encoder-decoder they stand before the encoder's
    input.

    ``state_dict`` holds ``prefix`` and the trainable parameters of the model. Other attributes are the model's.

    Examples:
        >>> model = PrefixTuning(base, prefix_length=10, hidden_size=base.config.hidden_size)
        >>> model(ids, labels=ids).loss.backward()
        >>> model.prefix.grad.shape
        torch.Size([10, 32])
    """

    def __init__(self, model: PreTrainedModel, prefix_length: int = 10, hidden_size: int = 768) -> None:
        """Freeze ``model``, in place. What you chose to train stays trainable, as in ``get_prefix_model``.

        Args:
            model: a transformers model that takes ``inputs_embeds``.
            prefix_length: P, the number of virtual tokens.
            hidden_size: of the model's input embeddings.

        Raises:
            TypeError: ``model`` is no bare transformers model.
            ValueError: a size is wrong.
            NotImplementedError: the model cannot be served. It is unchanged then.
        """
        super().__init__()
        if isinstance(prefix_length, bool) or not isinstance(prefix_length, int) or prefix_length < 1:
            raise ValueError(f"prefix_length must be a positive int, got {prefix_length!r}")
        self._insertion = Insertion(model)
        embeddings = self._insertion.embeddings
        if hidden_size != embeddings.weight.shape[1]:
            needed = f"{embeddings.weight.shape[1]}, the size of {type(model).__name__}'s input embeddings"
            raise ValueError(f"hidden_size must be {needed}, got {hidden_size!r}")
        self._config = PrefixConfig(num_virtual_tokens=prefix_length, mode="embedding", position_mode="shift")
        self._attachment = _attach(model)
        if self._attachment is not None:
            self._config = self._attachment.resolver.resolve(self._config)
        freeze(model)
        self.prefix = nn.Parameter(initial_embeddings(model, self._config, None))
        self._wrap(model)

    @property
    def shared(self) -> bool:
        """Whether the virtual tokens run once per forward, for all rows, and not in every row."""
        return self._attachment is not None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward with the virtual tokens. Arguments are the model's.

        If the virtual tokens run in every row, ``attention_mask`` and ``position_ids`` must be 2-D, and
        ``past_key_values`` needs a mask. Caches, ``attentions`` and ``encoder_last_hidden_state`` then hold the virtual
        tokens too, behind a row's left padding.
        """
        with self._own_forward(), self._running():
            return self.base_model(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's generate with the virtual tokens. If they run in every row, caches must be dynamic."""
        with self._own_forward(), self._running():
            return self.base_model.generate(*args, **kwargs)

    def save_pretrained(
        self,
        path: str | Path,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
        save_function: Any = None,
    ) -> None:
        """Write what is trained into a folder, in the format of PEFT's prompt tuning, which is this method.

        Other arguments are as for ``PrefixModel.save_pretrained``.
        """
        checkpoint.check_safe(safe_serialization)
        state = self.state_dict() if state_dict is None else state_dict
        checkpoint.save_table(Path(path), state, self.base_model, is_main_process=is_main_process)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """As of ``PrefixModel``."""
        update_card(Path(output_dir))

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, path: str | Path, *, is_trainable: bool = False, **options: Any
    ) -> PrefixTuning:
        """``model`` with the table in ``path`` (a folder or a Hub id), as ``save_pretrained`` or PEFT wrote it.

        ``options`` are those of ``PrefixModel.load_prefix``.

        Raises:
            ValueError: the files do not fit ``model``, or are damaged.
        """
        table, others = checkpoint.load_table(path, model, **download_options(options))
        tuned = cls(model, *table.shape)
        tuned.prefix.data.copy_(table)
        tuned.prefix.requires_grad_(is_trainable)
        set_trained(model, others, trainable=is_trainable)
        return tuned

    def _stacks(self) -> set[nn.Module]:
        return self._insertion.stacks if self._attachment is None else self._attachment.runner.stacks

    def _on_demand(self, given: dict[str, Any], *, needed: bool) -> AbstractContextManager[None]:
        if self._attachment is None:
            return self._insertion.running(self.prefix, needed=False)
        return self._attachment.runner.on_demand(self._running, needed=needed)

    def check_resumable(self, folder: Path) -> None:
        """Raise a ValueError if ``folder`` was left by the training of another base model or of another table."""
        base = self.base_model
        state = checkpoint.read_resumable(folder, base, base.config._name_or_path)
        table = next((t for n, t in (state or {}).items() if plain_name(n) == "prefix"), self.prefix)
        if table.shape != self.prefix.shape:
            needed, got = (f"(prefix_length, hidden_size) = {tuple(t.shape)}" for t in (self.prefix, table))
            raise ValueError(f"{folder}: the model has {needed}, and the training to resume had {got}")

    def _running(self) -> AbstractContextManager[None]:
        if self._attachment is None:
            return self._insertion.running(self.prefix)
        layout = self._attachment.resolver.layout(self._config)
        kv = self._attachment.probe.kv(layout.slots, self.prefix.to(self._insertion.embeddings.weight.dtype))
        return self._attachment.runner.running(kv, layout)


def _attach(model: PreTrainedModel) -> Attachment | None:
    """For a shared prefix; None where the virtual tokens must run in every row."""
    if model.config.is_encoder_decoder or not _sees_all(model.config.get_text_config()):
        return None
    try:
        layers, _ = find_layers(model)
        if not all(getattr(module, "is_causal", True) for module in layers.modules()):
            return None
        attachment = Attachment(model)
    except NotImplementedError:
        return None
    if not attachment.probe.masks_outside:
        return attachment
    attachment.remove()
    return None


def _sees_all(config: PreTrainedConfig) -> bool:
    """Whether all layers are attention, with no window narrower than the context: virtual tokens would scroll out."""
    window = getattr(config, "sliding_window", None)
    wide = window is None or window >= config.max_position_embeddings
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    return set(kinds) <= ({"full_attention", "sliding_attention"} if wide else {"full_attention"})
