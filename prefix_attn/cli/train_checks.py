"""The options of ``prefix-attn train``: what they must be, and the prefix that they describe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefix_attn.cli.shared import DATA, check_adapter, check_writable, unescaped
from prefix_attn.hf.config import PrefixConfig
from prefix_attn.hf.load import check_base, check_options
from prefix_attn.training.aws import AWS_TASKS
from prefix_attn.training.data import Examples
from prefix_attn.training.prompts import Prompt
from prefix_attn.training.tables import check_reading

Options = Mapping[str, Any]  # the arguments of ``train`` by name
OPTION_OF = {  # the fields of PrefixConfig whose options have other names
    "num_virtual_tokens": "--virtual-tokens",
    "num_frozen_tokens": "--frozen-tokens",
    "encoder_hidden_size": "--mlp",
    "encoder_activation": "--mlp-activation",
}
TEXTS = ("*.txt", "*.md", "*.rst")  # of a folder for --distill-from
READING = ("source_column", "target_column", "delimiter", "encoding", "skip_bad_rows")  # options of ``Examples``


def check(options: Options) -> None:
    """Refuse options that exclude one another, before anything is read."""
    distill = options["distill_from"] is not None
    if not distill and options["data"] is None:
        raise ValueError(f"nothing to train on: give --data or --distill-from. --data takes {DATA}")
    if distill and options["data"] is not None:
        raise ValueError("--data and --distill-from exclude one another")
    if distill and options["validation_share"] is not None:
        raise ValueError("--validation-share holds out rows of --data, and --distill-from has none: give --validation")
    if options["validation"] is not None and options["validation_share"] is not None:
        raise ValueError("--validation and --validation-share exclude one another")
    if options["dry_run"] and distill:
        raise ValueError("--dry-run shows rows of --data, and --distill-from has none: leave it out")
    share = options["validation_share"]
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--validation-share must be between 0 and 1, such as 0.05, got {share}")
    if share is not None and options["data"] in AWS_TASKS:
        raise ValueError(f"{options['data']!r} has a split of its own to validate on: leave out --validation-share")
    for name in ("top_k", "self_study", "distill_data", "chunk_tokens"):
        if not distill and options[name] is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --distill-from, the text to learn")
    if options["self_study"] is not None and options["distill_data"] is not None:
        raise ValueError("--self-study and --distill-data exclude one another: the model writes conversations, or you")
    if options["packing"] and (distill or options["mode"] != "kv"):
        raise ValueError("--packing takes rows of --data and --mode kv: leave it out")
    if options["mlp"] is None and (options["mlp_depth"], options["mlp_activation"]) != (1, "tanh"):
        raise ValueError("--mlp-depth and --mlp-activation need --mlp, the width of the MLP")
    if options["gate"] is None and options["virtual_tokens"] == options["frozen_tokens"]:
        count = options["frozen_tokens"]
        raise ValueError(f"--frozen-tokens {count} of --virtual-tokens {count} leave nothing to train: take fewer")
    if options["template"] is not None:
        Prompt(unescaped(options["template"]), system=options["system"])
    check_reading(options["delimiter"], options["encoding"])
    check_options(**loading_of(options))
    if options["steps"] is not None and options["epochs"] is not None:
        raise ValueError("--steps and --epochs exclude one another")
    if options["learning_rate"] == 0:
        raise ValueError("--learning-rate must be positive, such as 0.01, got 0")
    best = "--early-stopping" if options["early_stopping"] else "--load-best-model-at-end"
    if (options["early_stopping"] or options["load_best_model_at_end"]) and not _validates(options):
        raise ValueError(f"{best} needs data to validate on: give --validation FILE or --validation-share 0.05")


def _validates(options: Options) -> bool:
    """Whether there are data to validate on."""
    if options["distill_from"] is not None:
        return True
    given = options["validation"] is not None or options["validation_share"] is not None
    return (given or options["data"] in AWS_TASKS) and options["validation_rows"] > 0


def prefix_of(options: Options) -> PrefixConfig:
    """The prefix that the options describe."""
    fields: dict[str, Any] = dict(
        base_model_name_or_path=options["model"],
        num_virtual_tokens=options["virtual_tokens"],
        mode=options["mode"],
        sites=options["sites"].split(",") if options["sites"] else None,
        prefix_projection=options["mlp"] is not None,
        encoder_hidden_size=options["mlp"],
        encoder_depth=options["mlp_depth"],
        encoder_activation=options["mlp_activation"],
        dropout=options["dropout"],
        gate=options["gate"],
        num_frozen_tokens=options["frozen_tokens"],
        position_mode=options["position_mode"],
        **_start(options),
    )
    try:
        return PrefixConfig(**fields)
    except ValueError as error:
        message = str(error)
        for field, option in OPTION_OF.items():
            message = message.replace(field, option)
        raise ValueError(message) from None


def _start(options: Options) -> dict[str, Any]:
    """The fields of PrefixConfig that say where a prefix starts."""
    init, given = options["init"], {name: options[f"init_{name}"] for name in ("text", "document", "path")}
    if {init, *given.values()} == {None}:
        given["document"] = options["distill_from"]
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"a prefix has one start, got {' and '.join(f'--init-{name}' for name in named)}")
    kind = "prefix" if named == ["path"] else named[0] if named else None
    if kind is not None and init not in (None, kind):
        raise ValueError(f"a prefix has one start, got --init {init} and --init-{named[0]}")
    if given["document"] is not None:
        given["text"] = f"the text in {given['document']}"  # read once everything is checked
    return {"init": kind or init or "random", "init_text": given["text"], "init_path": given["path"]}


def converses(options: Options) -> bool:
    """Whether a text is learnt from conversations about it."""
    return options["self_study"] is not None or options["distill_data"] is not None


def check_files(options: Options) -> dict[str, Examples]:
    """Refuse files and folders that are not there or cannot be written. None is read but for the heads of tables.

    Returns:
        The tables of "data", or of "distill_data", and of "validation", so that what their heads show is found and
        said once. A file that is both is one.
    """
    check_writable(options["output"])
    for name in texts_of(options):
        for path in files_of(options, name):
            with open(path, encoding="utf-8"):  # an OSError names it
                pass
    tables = _tables(options) if options["distill_from"] is None or converses(options) else {}
    if options["init_path"] is not None:
        check_adapter(options["init_path"])
    check_base(options["model"], **loading_of(options))
    return tables


def texts_of(options: Options) -> list[str]:
    """The options that name a text."""
    distilled = ["distill_from", "validation"] if options["distill_from"] is not None else []
    if converses(options):
        distilled.remove("validation")
    return [name for name in ("init_document", *distilled) if options[name] is not None]


def files_of(options: Options, name: str) -> list[Path]:
    """The files of the text that an option names: of --distill-from, also those in a folder.

    Raises:
        ValueError: the folder has none.
    """
    path = Path(options[name])
    if name != "distill_from" or not path.is_dir():
        return [path]
    found = sorted({file for pattern in TEXTS for file in path.glob(pattern) if file.is_file()})
    if not found:
        raise ValueError(f"--distill-from {path}: the folder has no texts ({' '.join(TEXTS)})")
    return found


def _tables(options: Options) -> dict[str, Examples]:
    reading = {name: options[name] for name in READING}
    data, validation = options["data"], options["validation"]
    found = {}
    if options["distill_from"] is None:
        found["data"] = Examples(data, **reading)
    elif (data := options["distill_data"]) is not None:
        found["distill_data"] = Examples(data, **reading)
    if validation is not None and validation == data and data not in AWS_TASKS:
        found["validation"] = next(iter(found.values()))
    elif validation is not None or (data in AWS_TASKS and options["validation_share"] is None):
        found["validation"] = Examples(validation or data, split="dev", **reading)
    return found


def loading_of(options: Options) -> dict[str, Any]:
    """The options of ``load_base``."""
    return {name: options[name] for name in ("dtype", "device", "quantize")}
