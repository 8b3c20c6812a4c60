"""Who may import whom, how long a file may be, and what no file may mention."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "prefix_attn"
MODULES = sorted(path.relative_to(ROOT) for path in PACKAGE.rglob("*.py"))
MAX_LINES = 600

# Level of a module: it may import modules of a lower level, and those of its own level where PEERS says so. The longest
# matching prefix decides.
LEVELS = {
    "prefix_attn.call": 0,
    "prefix_attn.backends._native": 1,
    "prefix_attn.backends.sinks": 1,
    "prefix_attn.backends.visibility": 1,
    "prefix_attn.backends": 2,
    "prefix_attn.packing": 3,
    "prefix_attn.dispatch": 3,
    "prefix_attn._ops": 4,
    "prefix_attn.functional": 5,
    "prefix_attn.prefix": 5,
    "prefix_attn.nn": 6,
    "prefix_attn.hf": 7,
    "prefix_attn.data": 8,
    "prefix_attn.rows": 8,
    "prefix_attn.evaluate": 8,
    "prefix_attn.metrics": 8,
    "prefix_attn.train": 8,
    "prefix_attn.distill": 8,
    "prefix_attn.bench": 9,
    "prefix_attn.experiments": 9,
    "prefix_attn.cli": 10,
    "prefix_attn.demo": 11,
}
PEERS = (
    "prefix_attn.hf",
    "prefix_attn.data",
    "prefix_attn.rows",
    "prefix_attn.evaluate",
    "prefix_attn.train",
    "prefix_attn.distill",
    "prefix_attn.demo",
    "prefix_attn.bench",
    "prefix_attn.experiments",
    "prefix_attn.cli",
)
ANYONE = "prefix_attn"  # the package's own names; it re-exports and is not imported from below, see the test

# Which modules may import these at all, at module level or in a function.
HEAVY = {
    "transformers": (
        "prefix_attn.hf",
        "prefix_attn.train",
        "prefix_attn.evaluate",
        "prefix_attn.demo",
        "prefix_attn.bench",
        "prefix_attn.experiments.pretrain",
    ),
    "triton": ("prefix_attn.backends.triton",),
    "typer": ("prefix_attn.cli",),
    "peft": ("prefix_attn.experiments.methods", "prefix_attn.bench.models"),
}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES}


def under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def level(name: str) -> tuple[str, int]:
    key = max((key for key in LEVELS if under(name, key)), key=len, default=None)
    assert key is not None, f"{name} has no place in the import order: give it one in LEVELS"
    return key, LEVELS[key]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST) -> set[str]:
    """Every module imported anywhere in the file, in functions too, but for those that only annotations need."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            submodules = {f"{module}.{alias.name}" for alias in node.names} & NAMES
            plain = {module} if len(submodules) < len(node.names) else set()
            found |= submodules | plain
        else:
            found |= imports(node)
    return found


def misplaced(name: str, imported: set[str]) -> list[str]:
    """The imports of module ``name`` that the order forbids."""
    wrong = [
        f"{name} imports {heavy}"
        for heavy, owners in HEAVY.items()
        if any(under(i, heavy) for i in imported) and not any(under(name, owner) for owner in owners)
    ]
    ours = {i for i in imported if under(i, "prefix_attn") and i != name}
    if name == ANYONE:
        return wrong
    key, height = level(name)
    for target in sorted(ours):
        if target == ANYONE:
            if height < LEVELS["prefix_attn.hf"]:
                wrong.append(f"{name} imports the package that imports it")
            continue
        other, other_height = level(target)
        peers = height == other_height and {key, other} <= set(PEERS)
        if other_height >= height and not peers and not is_part(name, target):
            wrong.append(f"{name} imports {target}")
    return wrong


def is_part(name: str, target: str) -> bool:
    """A backend that is a folder may be imported by its own parts; two backends never import one another."""
    parts = name.split(".")[:3]
    return len(parts) == 3 and parts[1] == "backends" and target.split(".")[:3] == parts


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text())
    assert misplaced(module_name(path), imports(tree)) == []


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("prefix_attn.call", "prefix_attn.backends.visibility"),
        ("prefix_attn.backends.composed", "prefix_attn.backends.eager"),
        ("prefix_attn.backends.eager", "prefix_attn.dispatch"),
        ("prefix_attn.dispatch", "prefix_attn._ops"),
        ("prefix_attn.functional", "prefix_attn.prefix"),
        ("prefix_attn.prefix", "prefix_attn.hf.config"),
        ("prefix_attn.functional", "prefix_attn"),
        ("prefix_attn.hf.model", "prefix_attn.train"),
        ("prefix_attn.train", "prefix_attn.cli"),
        ("prefix_attn.cli", "prefix_attn.demo"),
        ("prefix_attn.prefix", "transformers.cache_utils"),
        ("prefix_attn.train", "typer"),
        ("prefix_attn.backends.composed", "triton"),
    ],
)
def test_the_order_forbids(name: str, imported: str) -> None:
    assert len(misplaced(name, {imported})) == 1


def test_imports_sees_functions_and_skips_annotations() -> None:
    source = """
if TYPE_CHECKING:
    from transformers import PreTrainedModel
import torch
from prefix_attn import _ops, prefix_attention
def f():
    from prefix_attn.call import Call
"""
    assert imports(ast.parse(source)) == {"torch", "prefix_attn", "prefix_attn._ops", "prefix_attn.call"}


def test_base_import_needs_torch_alone() -> None:
    heavy = ["torch", "transformers", "triton", "typer", "matplotlib", "peft"]
    code = f"import sys, json, prefix_attn; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == ["torch"]


def tracked() -> list[Path]:
    """The files that git tracks or would track; without git, the sources by name."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        names = [name for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        names = [
            str(path.relative_to(ROOT))
            for top in ("prefix_attn", "tests", "benchmarks", "csrc")
            for path in (ROOT / top).rglob("*.*")
            if "__pycache__" not in path.parts
        ]
    return sorted(ROOT / name for name in names if (ROOT / name).is_file())


def text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def test_no_file_is_too_long() -> None:
    sources = [path for path in tracked() if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh", ".sh"}]
    lengths = {str(path.relative_to(ROOT)): len((text(path) or "").splitlines()) for path in sources}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}
    assert len(lengths) >= len(MODULES)


# Written in pieces, so that this file does not find itself.
FORBIDDEN = re.compile(
    "|".join(
        (
            r"(?<![\w.$}])/(?:work|home|root|mnt|Users)" + r"/\w",  # a path of somebody's machine
            r"(?<![\w.$}])/tmp" + r"/\w",
            r"--(?:extra-)?index" + r"-url",
            r"(?:pypi\.org/simple|files\.python" + r"hosted|download\.pytorch\.org/whl)",
            r"https?://(?:\d{1,3}(?:\.\d{1,3}){3}|local" + r"host)\b",
        )
    )
)


def test_no_machine_paths_or_index_addresses() -> None:
    found = []
    for path in tracked():
        for number, line in enumerate((text(path) or "").splitlines(), start=1):
            if FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("cd /work" + "/main", True),
        ("open('/tmp" + "/x')", True),
        ("pip install --index" + "-url x", True),
        ("http://" + "10.0.0.1:8080/", True),
        ("$tmp/venv ./work/x https://example.org/work/x a/tmp/x", False),
    ],
)
def test_what_is_forbidden(line: str, bad: bool) -> None:
    assert bool(FORBIDDEN.search(line)) is bad
