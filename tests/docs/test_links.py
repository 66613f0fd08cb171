"""Every relative link and image of the pages leads to a file, and to a heading of it where it names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REPORTS = [path for five in ROOT.glob("reports/*/five-sentences.md") for path in five.parent.glob("*.md")]
PAGES = sorted(
    [*(path for pattern in ("*.md", "docs/**/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern)), *REPORTS]
)


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"(?ms)^ *```.*?^ *```|`[^`\n]*`", "", page.read_text("utf-8"))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ +(.+?) *$", re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text("utf-8")))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)|(?:src|href)=\"(?!\w+:)([^\"]+)\"", prose(page)):
        name, _, anchor = "".join(link).partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.is_relative_to(ROOT), link
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def test_there_are_links():
    names = {str(page.relative_to(ROOT)) for page in PAGES}
    assert {"README.md", "CHANGELOG.md", "benchmarks/README.md", "docs/reference-studies.md"} <= names
    assert sum(prose(page).count("](") for page in PAGES) > 80
