"""``--config``: the options of a command in a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import typer

from prefix_attn.quoting import quoted, shortened


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let the options in the file ``path`` be the command's defaults. The command line wins.

    Keys are the names of options, with - or _. A value is read as on the command line, and null
    means that the option is not given.

    Raises:
        typer.BadParameter: not YAML, a key that is no option, or a value that its option refuses.
    """
    if path is None or context.resilient_parsing:
        return path
    try:
        values = _values(context, path)
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    context.default_map = {**(context.default_map or {}), **values}
    return path


def command_line_first(
    context: typer.Context, options: dict[str, Any], exclusive: Sequence[Sequence[str]]
) -> dict[str, Any]:
    """``options`` without those of the file that exclude what the command line gives: as in --steps and --epochs."""
    for names in exclusive:
        sources = {name: str(context.get_parameter_source(name)) for name in names}
        if any("COMMANDLINE" in source for source in sources.values()):
            options |= {name: None for name in names if "DEFAULT_MAP" in sources[name]}
    return options


def _values(context: typer.Context, path: Path) -> dict[str, Any]:
    """The values in ``path`` by the names of the command's parameters."""
    parameters: dict[str, Any] = {
        option.lstrip("-").replace("-", "_"): parameter
        for parameter in context.command.params
        for option in parameter.opts
        if parameter.name not in ("config", "help")
    }
    values: dict[str, Any] = {}
    for line, key, node in _entries(path):
        place = f"{path}, line {line}"
        parameter = parameters.get(key.replace("-", "_"))
        if parameter is None:
            (nearest,) = get_close_matches(key.replace("-", "_")[:100], parameters, n=1, cutoff=0)
            raise ValueError(f"{place}: no option is called {quoted(key)}; the nearest is {nearest!r}")
        if parameter.name in values:
            raise ValueError(f"{place}: {key!r} is there twice")
        if not isinstance(node.value, str):
            raise ValueError(f"{place}: {key!r} takes one value, not a list or a mapping")
        if node.tag == "tag:yaml.org,2002:null":
            if parameter.required or parameter.default is not None:
                raise ValueError(f"{place}: {key!r} needs a value; leave it out for the default")
            values[parameter.name] = lambda: None  # not the default, should that become another one
            continue
        try:
            parameter.process_value(context, node.value)
        except typer.BadParameter as error:
            message = f"{place}: {key!r} cannot be {quoted(node.value)}: {shortened(error.message)}"
            raise ValueError(message) from None
        values[parameter.name] = node.value
    return values


def _entries(path: Path) -> list[tuple[int, str, Any]]:
    """Line, key and node of each option. Nodes hold texts as they stand there: 1e-3 is what it is in a shell."""
    import yaml

    from prefix_attn.hf.io.files import opened

    try:
        with opened(path) as file:
            text = file.read().decode()
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # before anything is made of it
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > 2:
                raise ValueError(f"{path}, line {event.start_mark.line + 1}: a list or a mapping within another")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise ValueError(f"{place}: not YAML ({shortened(getattr(error, 'problem', None) or error)})") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: must be lines of 'option: value', such as 'steps: 500'")
    return [(key.start_mark.line + 1, str(key.value), node) for key, node in root.value]
