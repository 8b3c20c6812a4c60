"""The pages that people read: README and its like, and everything below docs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*map(ROOT.joinpath, NAMES), *sorted((ROOT / "docs").rglob("*.md")))
}


def blocks(text: str, *languages: str) -> list[str]:
    """The code of a page in these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
