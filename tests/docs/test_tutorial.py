"""What runs the tutorial, on pages of a line; the documentation's build runs the tutorial itself."""

import re

import pytest

from tests.scripts import ROOT, script


@pytest.fixture
def executed(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(b"of an earlier build")
    return lambda page: script("docs/run_tutorial").executed(page, tmp_path / "pictures")


def test_what_is_printed_stands_below_its_block_and_names_are_shared(executed):
    page = "Words.\n\n```python\nx = 3\n```\n\n```python\nprint(x + 1)\n```\n\nMore words.\n"
    assert executed(page) == page.replace("\n\nMore", "\n\n```text\n4\n```\n\nMore")


def test_figures_are_pictures_of_this_build(executed, tmp_path):
    page = "```python\nfrom matplotlib import pyplot\n\npyplot.figure()\n```\n"
    found = executed(page)
    (name,) = re.findall(r"!\[.*\]\((pictures/\w+\.png)\)", found)
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [(tmp_path / name).name]


def test_a_block_that_fails_is_an_error_that_shows_it(executed):
    with pytest.raises(RuntimeError, match=r"this block of the page does not run: division by zero\n\n1 / 0"):
        executed("```python\n1 / 0\n```\n")


def test_its_reviews_are_labelled_as_it_says():
    world = script("docs/tutorial_reviews")
    good = {word for words in world.GOOD.values() for word in words}
    coins = []
    for text, label in world.reviews("restaurants", 400, seed=0):
        judged = [word in good for word in re.findall(r"was (\w+)", text)]
        if judged[0] == judged[1]:
            assert label == judged[0]
        else:
            coins.append(label)
    assert abs(sum(coins) - len(coins) / 2) < 4 * len(coins) ** 0.5 / 2  # four standard deviations
    assert 150 < len(coins) < 250


def test_every_block_of_the_page_is_found():
    runner = script("docs/run_tutorial")
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    assert len(runner.BLOCK.findall(page)) == page.count("```python") > 5
