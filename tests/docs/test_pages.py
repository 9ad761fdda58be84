"""The pages under docs/, CONTRIBUTING and SECURITY name only files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    if page.name != "CHANGELOG.md" and "reference" not in page.parts
)
FOLDERS = "agsm_rl|rewards|recipes|tests|benchmarks|docs|examples"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_files_that_a_page_names_are_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.-]+\.(?:py|md|yaml|json|txt|png))\b", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_relative_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []
