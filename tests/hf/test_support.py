"""docs/models.md says what a new trial finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from tests.hf import support
from tests.hf.models import CONFIGS

PAGE = (Path(__file__).resolve().parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
INTRODUCTION = PAGE.partition("|")[0]
ROWS = {
    name: cells for name, *cells in (line[2:-2].split(" | ") for line in PAGE.splitlines() if line.startswith("| "))
}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of transformers' own modules, at their import


@pytest.fixture(autouse=True)
def more_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in support.MORE.items():
        monkeypatch.setitem(CONFIGS, name, config)


@pytest.mark.parametrize("name", sorted(CONFIGS | support.MORE))
def test_row(name: str) -> None:
    """Every cell tried again. With another transformers a model may do more than the page says, and nothing less."""
    got, page = support.row(name), ROWS[name]
    if transformers.__version__ in INTRODUCTION:
        assert got == page
    elif not page[0].startswith("refused") or not got[0].startswith("refused"):
        assert set(got) <= {"yes", "not in the model"}
        assert all(cell == "yes" for cell, on_page in zip(got, page) if on_page == "yes")


def test_the_page_is_whole() -> None:
    assert ROWS.pop("architecture") == [*support.PREFIX, *support.RUNNING]
    assert set(ROWS) == set(CONFIGS | support.MORE)
    served = [cells for cells in ROWS.values() if not cells[0].startswith("refused")]
    assert len(served) >= 25
    assert {cell for cells in served for cell in cells} == {"yes", "not in the model"}
