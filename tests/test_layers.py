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
BENCHMARKS = sorted(path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py"))
MAX_LINES = 600

# The package, from the ground up. A module may import from the rooms below its own, and from its own where that is a
# folder. The longest matching name decides.
ORDER = (
    ("prefix_attn.call", "prefix_attn.quoting", "prefix_attn.backends._native"),
    (
        "prefix_attn.backends._native_cuda",
        "prefix_attn.backends.gpu_attention",
        "prefix_attn.backends.outputs",
        "prefix_attn.backends.visibility",
    ),
    ("prefix_attn.backends",),
    ("prefix_attn.packing", "prefix_attn.dispatch"),
    ("prefix_attn._ops",),
    ("prefix_attn.functional",),
    ("prefix_attn.nn", "prefix_attn.hf.encoder", "prefix_attn.hf.hub", "prefix_attn.hf.rules"),
    ("prefix_attn.hf.config",),
    ("prefix_attn.hf.attach",),
    ("prefix_attn.hf.io",),
    ("prefix_attn.hf.initial", "prefix_attn.hf.accelerate", "prefix_attn.hf.load", "prefix_attn.hf.resting"),
    ("prefix_attn.hf.prefixes",),
    ("prefix_attn.hf.peft_words",),
    ("prefix_attn.hf.batched",),
    ("prefix_attn.hf.model", "prefix_attn.hf.embedding"),
    ("prefix_attn.hf.edit", "prefix_attn.hf.mass", "prefix_attn.hf.check"),
    ("prefix_attn.training",),
    ("prefix_attn.serve",),
    ("prefix_attn.experiments",),
    ("prefix_attn.cli",),
    ("prefix_attn.__main__",),
)
LEVELS = {name: height for height, names in enumerate(ORDER) for name in names}
FOLDERS = ("hf.attach", "hf.io", "training", "serve", "experiments", "cli")
PEERS = tuple(f"prefix_attn.{folder}" for folder in FOLDERS)
# They only hand names on, at their first use: below hf nobody imports them, and there is nothing in them to order.
FACES = ("prefix_attn", "prefix_attn.hf")
OUTSIDE = ("benchmarks", "examples", "tests")  # import the package, which knows none of them

# Which modules may import these at all, at module level or in a function.
HEAVY = {
    "transformers": (
        "prefix_attn.hf",
        "prefix_attn.training.train",
        "prefix_attn.training.generate",
        "prefix_attn.training.conversation",
        "prefix_attn.training.trainer",
        "prefix_attn.training.chat",
        "prefix_attn.serve",
        "prefix_attn.experiments.loop",
        "prefix_attn.experiments.pretrain",
    ),
    "triton": ("prefix_attn.backends.triton",),
    "typer": ("prefix_attn.cli",),
    "peft": ("prefix_attn.experiments.methods",),
    "vllm": ("prefix_attn.serve.vllm.connector",),
}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in (*MODULES, *BENCHMARKS)}


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
    wrong += [f"{name} imports {target}" for target in imported if target.split(".")[0] in OUTSIDE]
    if name in FACES:
        return wrong
    key, height = level(name)
    for target in sorted(ours):
        if target in FACES:
            if height < LEVELS["prefix_attn.hf.model"]:
                wrong.append(f"{name} imports the package that imports it")
            continue
        other, other_height = level(target)
        peers = key == other and key in PEERS
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
        ("prefix_attn.functional", "prefix_attn.hf.encoder"),
        ("prefix_attn.hf.encoder", "prefix_attn.hf.config"),
        ("prefix_attn.hf.config", "prefix_attn.hf.attach.slots"),
        ("prefix_attn.hf.attach.slots", "prefix_attn.hf.io.files"),
        ("prefix_attn.hf.io.files", "prefix_attn.hf.initial"),
        ("prefix_attn.hf.io.files", "prefix_attn.hf"),
        ("prefix_attn.functional", "prefix_attn"),
        ("prefix_attn.hf.model", "prefix_attn.training.train"),
        ("prefix_attn.training.train", "prefix_attn.cli"),
        ("prefix_attn.cli", "examples.demo"),
        ("prefix_attn.dispatch", "benchmarks.regret"),
        ("prefix_attn.training.tokens", "transformers.cache_utils"),
        ("prefix_attn.training.train", "typer"),
        ("prefix_attn.backends.composed", "triton"),
        ("prefix_attn.serve.vllm.middleware", "vllm.config"),
    ],
)
def test_the_order_forbids(name: str, imported: str) -> None:
    assert len(misplaced(name, {imported})) == 1


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves through others."""

    def reached(name: str) -> set[str]:
        found, left = set(), list(arrows[name])
        while left:
            if (other := left.pop()) not in found:
                found.add(other)
                left += arrows[other]
        return found

    return [name for name in arrows if name in reached(name)]


def test_no_circle() -> None:
    """Folders count as one level of the order; inside them, and in the benchmarks, no two modules need each other."""
    found = {module_name(path): imports(ast.parse((ROOT / path).read_text())) for path in (*MODULES, *BENCHMARKS)}
    arrows = {name: {target for target in targets if target in found} for name, targets in found.items()}
    assert sum(map(len, arrows.values())) > 150
    assert circles(arrows) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


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
    """The files that git tracks or would track; in an unpacked sdist, all that are neither hidden nor built."""
    command = ["git", "--git-dir=.git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        paths = [Path(name) for name in listing.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        built = re.compile(r"\..*|__pycache__|build|dist|runs|site|.*\.egg-info|.*\.so")
        paths = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        paths = [path for path in paths if not any(built.fullmatch(part) for part in path.parts)]
    return sorted(ROOT / path for path in paths if (ROOT / path).is_file())


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


# Names with an underscore that a module may use of objects that are not its own, and why.
PRIVATE = {
    # The public interface of a NamedTuple, which cannot collide with the names of fields.
    *("_asdict", "_fields", "_replace"),
    # torch offers no other way to dispatch an op below autograd, or to tell what runs it.
    *("_C", "_AutoDispatchBelowAutograd", "_are_functorch_transforms_active", "_current_level"),
    *("_len_torch_dispatch_stack", "_len_torch_function_stack", "_get_tracing_state", "_is_zerotensor"),
    "_profiler_enabled",
    # torch's own attention with a log-sum-exp, and the folder of a build: none has a public name.
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"),
    *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"),
    *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_efficient_attention_backward"),
    "_get_build_directory",
    # Which units the processor has: torch.cpu says it under these names alone.
    *("_is_avx512_bf16_supported", "_is_amx_tile_supported"),
    # Triton's interpreter is repaired in place, and marked as repaired.
    *("_patch_lang", "_patch_lang_tensor", "_prefix_attn_repaired"),
    # transformers has setters, but nothing public that reads these back.
    *("_attn_implementation", "_can_set_attn_implementation", "_name_or_path"),
    # Whose queue_callback calls something at the end of a backward, as torch's own FSDP has it called.
    "_execution_engine",
    # What nn.Module calls to move parameters and buffers.
    "_apply",
    # Resuming and saving as a Trainer does, what our Trainer does around it, and the tokenizer that transformers wraps.
    *("_load_from_checkpoint", "_save", "_save_checkpoint", "_clip_grad_norm", "_tokenizer"),
}


def private_uses(tree: ast.AST) -> list[str]:
    """Attributes that start with one underscore, of anything else than self and cls."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and node.attr not in PRIVATE
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_module_uses_private_members_of_others(path: Path) -> None:
    assert private_uses(ast.parse((ROOT / path).read_text())) == []


def test_private_uses_sees_other_objects_alone() -> None:
    source = "self._a\ncls._b\nx.__len__\nx._replace()\nmodel._find(1)\nself.model._c\nx._d._e\n"
    found = sorted(private_uses(ast.parse(source)))
    assert found == ["5: model._find", "6: self.model._c", "7: x._d", "7: x._d._e"]


def test_the_oracle_is_independent() -> None:
    """It imports neither the package nor other tests, which do."""
    found = imports(ast.parse((ROOT / "tests/oracle.py").read_text()))
    assert {name.split(".")[0] for name in found} <= {"math", "torch", "typing", "__future__"}
