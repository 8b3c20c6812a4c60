"""What a generation config may ask of ``generate`` that batches which rows join and leave cannot do."""

from __future__ import annotations

from typing import Any

# The values that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({},),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "stop_strings": ([],),
    "max_time": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "prompt_lookup_num_tokens": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}


def check_rules(config: Any, where: str) -> None:
    """Refuse a GenerationConfig whose outputs ``where`` would not be those of ``generate``.

    Raises:
        NotImplementedError: it asks for beams, forced tokens or other rules that a row cannot have for itself.
    """
    for name, nothing in NOTHING.items():
        value = getattr(config, name, None)
        if value is not None and value not in nothing:
            raise NotImplementedError(f"the generation config has {name}={value!r}, which {where} does not do")
