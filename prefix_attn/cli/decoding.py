"""Options that say how outputs are written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefix_attn.cli.shared import ERR, unescaped

if TYPE_CHECKING:
    from prefix_attn.training.generate import Generator

decoding_option: Callable[..., Any] = partial(typer.Option, rich_help_panel="How outputs are written")

MaxNewTokens = Annotated[
    int | None,
    decoding_option(min=1, help="Maximum length of each output. Default: 256, or half of the model's positions."),
]
NumBeams = Annotated[int, decoding_option(min=1, help="Number of beams. 1 takes the likeliest token each time.")]
Temperature = Annotated[
    float | None,
    decoding_option(help="Draw tokens: below 1 rather likely ones, above 1 also unlikely ones. 0 draws none."),
]
TopP = Annotated[
    float | None, decoding_option(help="Draw from the likeliest tokens whose probabilities add up to this, as 0.9.")
]
TopK = Annotated[int | None, decoding_option(help="Draw from this many of the likeliest tokens.")]
Seed = Annotated[
    int, decoding_option(help="Of what is drawn. An output depends on it and on its input, not on the other inputs.")
]
Stop = Annotated[
    list[str] | None,
    decoding_option(help="An output ends before this text. Give it several times for several; \\n is a line break."),
]
RowsPerBatch = Annotated[
    int | None, typer.Option("--batch-size", min=1, help="Inputs per batch. Default: what memory has room for.")
]


def decoding_of(
    num_beams: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    stop: list[str] | None,
) -> dict[str, Any]:
    """The checked fields of ``Decoding``, without ``max_new_tokens``."""
    from prefix_attn.training.decoding import Decoding

    found: dict[str, Any] = {"num_beams": num_beams, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    found |= {"seed": seed, "stop": tuple(map(unescaped, stop or ()))}
    Decoding(**found)
    return found


def limited(model: Any, max_new_tokens: int | None) -> int:
    """The limit that was given, or the default."""
    from prefix_attn.training.generate import default_new_tokens

    return max_new_tokens or default_new_tokens(model)


def notes(generator: Generator) -> None:
    """Say which inputs and outputs were cut."""
    generator.warn_of_cuts()
    if generator.unfinished:
        limit = generator.decoding.max_new_tokens
        ERR.print(
            f"note: {generator.unfinished} of {generator.count} outputs were cut at {limit} tokens; --max-new-tokens "
            "says otherwise",
            highlight=False,
            soft_wrap=True,
        )
