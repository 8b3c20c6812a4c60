"""What README.md and docs name exists: links, headings, files, commands and their options."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from benchmarks.main import parser
from prefix_attn.cli.app import app
from tests.pages import PAGES, ROOT, blocks

README = PAGES["README.md"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
TREE = PAGES["docs/contributing/index.md"]


def test_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 160
    assert len(README.split()) <= 1200


def test_readme_has_two_commands() -> None:
    assert set(re.findall(r"\bmake ([a-z]+) +#", README)) == {"demo", "test"} <= TARGETS


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as GitHub and mkdocs make them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    """Files, and headings in them; and the files of the repository that a page names without a link."""
    text, here = PAGES[name], (ROOT / name).parent
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if link.startswith("http"):
            continue
        path, _, heading = link.partition("#")
        target = (here / path).resolve() if path else ROOT / name
        page = str(target.relative_to(ROOT))
        if not target.is_file() or (heading and heading not in anchors(PAGES.get(page, ""))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])  # which names what is gone
def test_pages_name_files_that_exist(name: str) -> None:
    ours = re.sub(r"\]\(http[^)]*\)", "]()", PAGES[name])  # other projects have folders of these names too
    named = re.findall(r"\b(?<!\.\./)(?:benchmarks|csrc|docs|examples|prefix_attn|tests)(?:/[\w.-]+)+\.\w+", ours)
    assert [file for file in named if not (ROOT / file).is_file()] == []


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a page: in blocks of a shell, and in prose between backticks."""
    for block in blocks(text, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from (words(part) for part in line.removeprefix("$ ").split(" && "))
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for line in re.findall(r"`((?:make|python|prefix-attn|torchrun) [^`]+)`", prose):
        yield words(line.replace("\n", " "))


def words(line: str) -> list[str]:
    try:
        return shlex.split(line, comments=True)
    except ValueError:  # a quotation that goes on in the next line: no command of ours
        return line.split()


def wrong(command: list[str]) -> str | None:
    """What a command names and this repository does not have."""
    name, *rest = command or [""]
    if name == "make":
        targets = [word for word in rest if not re.search(r"[=. ]|^-", word)]
        return next((f"make {word}" for word in targets if word not in TARGETS), None)
    if "-m" in command and name in ("python", "torchrun", "accelerate"):
        module, *rest = command[command.index("-m") + 1 :]
        if importlib.util.find_spec(module.split()[0]) is None:
            return module
        if module == "benchmarks":
            return of_benchmarks(rest)
        return of_prefix_attn(rest) if module == "prefix_attn" else None
    if name == "python" and rest and rest[0].endswith(".py"):
        return None if (ROOT / rest[0]).is_file() else rest[0]
    return of_prefix_attn(rest) if name == "prefix-attn" else None


def of_benchmarks(arguments: list[str]) -> str | None:
    if not arguments or "..." in arguments or not {"--out", "--suite"} & {*arguments}:
        return None
    try:
        parser().parse_args([word for word in arguments if word != "--help"])
    except SystemExit:
        return f"benchmarks {arguments}"
    return None


GROUP: Any = get_command(app)


def of_prefix_attn(arguments: list[str]) -> str | None:
    flags = [word for word in arguments if word.startswith("-")]
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is None or name.isupper() or "..." in name:
        return None
    if name not in GROUP.commands:
        return f"prefix-attn {name}"
    known = {"--help", "--json"}
    for parameter in (*GROUP.params, *GROUP.commands[name].params):
        known.update(parameter.opts, parameter.secondary_opts)
    own = flags[: flags.index("--")] if "--" in flags else flags  # what comes after is vLLM's
    return next((f"prefix-attn {name} {flag}" for flag in own if flag.split("=")[0] not in known), None)


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CHANGELOG.md"])
def test_commands_and_options_exist(name: str) -> None:
    assert [found for command in commands(PAGES[name]) if (found := wrong(command))] == []


def test_what_is_wrong_with_a_command() -> None:
    lines = "make nothing", "prefix-attn trane", "prefix-attn train --modell x", "python -m benchmarks.nothing"
    lines += "python examples/nothing.py", "python -m benchmarks run --suite none --out x"
    assert all(wrong(line.split()) for line in lines)
    assert sum(len(list(commands(text))) for text in PAGES.values()) > 100


def test_file_tree_is_the_repository() -> None:
    """Every module and room is in the tree, and the tree names no other. A folder stands for the modules in it."""
    (tree,) = (block for block in blocks(TREE, "") if block.startswith("prefix_attn/"))
    listed: set[str] = set()
    above: list[str] = []  # the folders around a line, by its indentation
    for indent, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE):
        above[len(indent) // 2 :] = [name]
        listed.add("".join(above))
    assert {name for name in listed if not (ROOT / name).exists()} == set()
    package = {
        path for path in (ROOT / "prefix_attn").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    expected = {f"prefix_attn/{path.name}" + "/" * path.is_dir() for path in package} - {"prefix_attn/__init__.py"}
    assert expected - listed == set()
    tops = {f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/*") if path.suffix in (".py", ".cpp", ".md")}
    assert tops - listed == set()
