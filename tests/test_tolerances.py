"""Tolerances are in ``tests/numerics.py``, each with its reason, and in no other test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def literal_bounds(tree: ast.AST) -> list[int]:
    """Lines that bound an error by a number of their own: a tolerance as an argument, or less than a small number."""
    words = {"atol", "rtol", "abs", "rel"}

    def small(node: ast.AST) -> bool:
        if isinstance(node, ast.BinOp):
            if isinstance(node.op, ast.Pow) and isinstance(node.left, ast.Constant):  # 2**-9
                return isinstance(node.right, ast.UnaryOp)
            if isinstance(node.op, ast.Sub):  # the rest is a margin: less by so much, at least
                return small(node.left)
        if isinstance(node, ast.Constant):
            return isinstance(node.value, float) and 0 < node.value < 0.1
        return any(map(small, ast.iter_child_nodes(node)))

    # A module's constant is a number of its own too, where it bounds something.
    assigned = [node for node in getattr(tree, "body", []) if isinstance(node, ast.Assign) and small(node.value)]
    names = {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)}

    def bounds(node: ast.AST) -> bool:
        return small(node) or any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))

    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in words:
            found.append(node.value.lineno)
        elif isinstance(node, ast.Dict):
            found += [key.lineno for key in node.keys if isinstance(key, ast.Constant) and key.value in words]
        elif isinstance(node, ast.Compare):
            for left, sign, right in zip([node.left, *node.comparators], node.ops, node.comparators):
                bound = right if isinstance(sign, ast.Lt | ast.LtE) else left
                if isinstance(sign, ast.Lt | ast.LtE | ast.Gt | ast.GtE) and bounds(bound):
                    found.append(node.lineno)
    return found


def test_tolerances_live_in_one_place() -> None:
    """In tests/numerics.py, each with its reason."""
    sources = [path for path in (ROOT / "tests").rglob("*.py") if path.name != "numerics.py"]
    found = {path.relative_to(ROOT).as_posix(): literal_bounds(ast.parse(path.read_text())) for path in sources}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert len(found) > 50


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("assert_close(a, b, rtol=1e-5, atol=2e-5)", True),
        ("assert a == approx(b, abs=tolerance)", True),
        ("CLOSE = {'rtol': 1e-5}", True),
        ("assert error <= 1e-5 * size", True),
        ("assert error < (1e-5 if exact else 5e-5)", True),
        ("assert 0 <= error < 0.05", True),
        ("assert 0.05 > error", True),
        ("CLOSE = 1e-5\nassert error < CLOSE", True),
        ("assert error < 2**-9", True),
        ("assert_close(a, b)", False),
        ("close(a, b, MODEL)", False),
        ("assert error < ROUNDED.rtol * size", False),
        ("assert change > 1e-3", False),
        ("assert loss < before - 0.05", False),
        ("assert share < 0.3", False),
        ("assert error < 4 * count**-0.5", False),
        ("train(model, learning_rate=1e-3)", False),
    ],
)
def test_what_a_literal_bound_is(line: str, bad: bool) -> None:
    assert bool(literal_bounds(ast.parse(line))) is bad
