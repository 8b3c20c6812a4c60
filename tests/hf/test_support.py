"""docs/models.md says what a new trial finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.hf import support

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
INTRODUCTION = PAGE.partition("|")[0]
ROWS = {
    (kind, name): cells
    for kind, section in ((kind, PAGE.partition(f"## {kind}\n")[2].partition("\n## ")[0]) for kind in support.TABLES)
    for name, *cells in (line[2:-2].split(" | ") for line in section.splitlines() if line.startswith("| "))
}
EVERY = [(kind, name) for kind, table in support.TABLES.items() for name in sorted(table.configs | table.more)]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers' own modules, at their import


@pytest.fixture(autouse=True)
def more_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in support.TABLES.values():
        for name, config in table.more.items():
            monkeypatch.setitem(table.configs, name, config)


@pytest.mark.parametrize(("kind", "name"), EVERY, ids=[name for _, name in EVERY])
def test_row(kind: str, name: str) -> None:
    """Every cell tried again. With another transformers a model may do more than the page says, and nothing less."""
    got, page = support.row(kind, name), ROWS[kind, name]
    if transformers.__version__ in INTRODUCTION:
        assert got == page
    elif not page[0].startswith("refused") or not got[0].startswith("refused"):
        assert set(got) <= {"yes", "not in the model"}
        assert all(cell == "yes" for cell, on_page in zip(got, page) if on_page == "yes")


def test_the_page_is_whole() -> None:
    for kind, table in support.TABLES.items():
        assert ROWS[kind, "architecture"] == table.titles
    rows = {place: cells for place, cells in ROWS.items() if place[1] != "architecture"}
    assert list(rows) == EVERY
    quantised = PAGE.partition("## Quantised bases\n")[2].splitlines()
    assert [line[2:].split(" | ")[0] for line in quantised if line.startswith("| ")] == [
        "base",
        *support.quantised.BASES,
    ]
    served = [cells for cells in rows.values() if not cells[0].startswith("refused")]
    assert len(served) >= 50
    assert {cell for cells in served for cell in cells} == {"yes", "not in the model"}
