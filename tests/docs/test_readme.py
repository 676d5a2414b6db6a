"""The README is short, its Python runs and its links lead somewhere."""

import re

import pytest

from tests.demo import fetch_or_skip
from tests.scripts import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "studies" / "README.md", *(ROOT / "docs").glob("*.md")]
README = PAGES[0].read_text(encoding="utf-8")


def anchors(page):
    """What GitHub and MyST call a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_its_code_runs(tmp_path, monkeypatch, capsys):
    """As written, but for fewer sentences and draws."""
    fetch_or_skip(encoder=True)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert block.count("limit=500") == 2
    small = block.replace("limit=500", "limit=16").replace('"16 draws": 16', '"16 draws": 2')
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(small, "README.md", "exec"), names)
    assert names["prediction"].probs.shape == (16, 2)
    assert (tmp_path / "runs" / "first" / "adapter" / "posterior.safetensors").is_file()
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    numbers = re.compile(r"\d\.\d+|'.*'|\".*\"")
    assert numbers.sub("", capsys.readouterr().out).endswith(numbers.sub("", shown))


def test_it_is_read_in_minutes():
    code = r"```.*?```|^    .*?$"
    assert len(re.sub(code, "", README, flags=re.DOTALL | re.MULTILINE).split()) <= 700


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} is not there"
        assert not anchor or anchor in anchors(linked), f"{target}: no such heading"


def test_every_page_of_the_site_is_on_the_map():
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == set(re.findall(r"\]\(docs/(\w+)\.md", README))


def test_numbers_of_the_readme_are_those_of_its_pages():
    """What is said twice is said alike: every number with decimals stands on some page of the documentation."""
    prose = re.sub(r"```.*?```|^    .*?$", "", README, flags=re.DOTALL | re.MULTILINE)
    pages = " ".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    numbers = set(re.findall(r"\d+\.\d+", re.sub(r"\(.*?\)|Apache-2.0|3\.11|ArviZ 0\.23", "", prose)))
    assert numbers <= set(re.findall(r"\d+\.\d+", pages)), numbers - set(re.findall(r"\d+\.\d+", pages))
