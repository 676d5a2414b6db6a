"""The page: one file, the right numbers, hostile text as text; looked at in a real browser where there is one."""

import base64
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import numpy as np
import pytest

from bayeslora.analysis import calibration_summary
from bayeslora.analysis.metrics.registry import METRICS
from bayeslora.analysis.report.columns import REGRESSION
from bayeslora.analysis.report.page import RunResults, SplitResults, report_html
from bayeslora.analysis.tables.diagnostics import Diagnostic
from bayeslora.errors import InputError

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)>&amp;\"'${7*7}{{ 7*7 }}"
CLASSES = ("bad", "good")


def split(seed=0, size=60, *, labelled=True, texts=True, certain=2.0):
    rng = np.random.default_rng(seed)
    logits = certain * rng.normal(size=(size, 2))
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    entropy = -(probs * np.log(probs)).sum(1)
    labels = (rng.random(size) < probs[:, 1]).astype(int) if labelled else None
    return SplitResults(labels, [f"text {i}" for i in range(size)] if texts else (), probs, entropy, entropy / 5)


def run(name="montecarlo", seed=0, **changes):
    adapters = [f"encoder.layer.{i}.attention.self.{kind}" for i in range(2) for kind in ("query", "value")]
    history = [
        {"step": i, "loss": 1 / i, "elbo/task": 0.7 / i, "elbo/cooperation": 0.3, "elbo/kl": 9.0} for i in range(1, 30)
    ]
    verdict = Diagnostic("pareto_k", 0.9, (0.5, 0.7), "bad", "a paper", "trust held-out data")
    given = {
        "facts": {"model": "tiny", "task": "reviews"},
        "splits": {
            "test": split(seed),
            "tweets": split(seed + 1),
            "news": split(seed + 2, labelled=False, certain=0.5),
        },
        "label_names": CLASSES,
        "history": [*history, {"step": 29, "eval_loss": 0.2}],
        "adapters": adapters,
        "noise_to_signal": np.random.default_rng(0).gamma(4.0, 0.1, size=(16, 4)),
        "diagnostics": [verdict],
        "command": f"bayeslora fit --output {name}",
    }
    return RunResults(name, **(given | changes))


class Reader(HTMLParser):
    """Tags with their attributes, the text of every table cell, and all text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.cells, self.words, self.open = [], [], [], []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if any(tag in self.open for tag in ("td", "th")):
            self.cells[-1] += data

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


class TestPage:
    def test_is_one_file_without_scripts(self):
        reader = Reader(report_html([run("one"), run("two", 5)]))
        assert not reader.named("script")
        assert not reader.named("link")
        addresses = [image["src"] for image in reader.named("img")]
        assert len(addresses) == 11  # of both: training, two of spread, entropy; together: calibration, detection, risk
        for address in addresses:
            kind, data = address.split(",", 1)
            assert kind == "data:image/svg+xml;base64"
            assert ET.fromstring(base64.b64decode(data)).tag.endswith("svg")
        assert all(len(image["alt"]) > 20 for image in reader.named("img"))
        assert all(link["href"].startswith("#") for link in reader.named("a"))
        targets = {attributes.get("id") for _, attributes in reader.tags}
        assert {link["href"][1:] for link in reader.named("a")} <= targets

    def test_numbers_are_the_metrics(self):
        given = run()
        cells = Reader(report_html([given])).cells
        for part in ("test", "tweets"):
            scores = calibration_summary(given.splits[part].probs, given.splits[part].labels)
            row = cells.index(part)
            assert cells[row + 3].startswith(f"{100 * scores['accuracy']:.1f}")
            assert cells[row + 4].startswith(f"{scores['nll']:.3f}")
            low, high = map(float, cells[row + 4][len("0.000") :].split(" to "))
            assert low < scores["nll"] < high

    @pytest.mark.parametrize(
        ("certain", "says"),
        [(4.0, "overconfident"), (0.3, "underconfident"), (1.0, "as sure as it should be")],
    )
    def test_begins_with_what_to_make_of_it(self, certain, says):
        """Labels are drawn from probabilities that are sharper, or flatter, than those that are shown."""
        rng = np.random.default_rng(1)
        logits = 1.5 * rng.normal(size=(800, 2))
        true = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        shown = np.exp(certain * logits) / np.exp(certain * logits).sum(1, keepdims=True)
        entropy = -(shown * np.log(shown)).sum(1)
        labels = (rng.random(800) < true[:, 1]).astype(int)
        judged = SplitResults(labels, (), shown, entropy, entropy / 5)
        page = report_html([run(splits={"test": judged})])
        accuracy = (shown.argmax(1) == labels).mean()
        assert f"montecarlo answers {100 * accuracy:.0f} % of 800 test examples right" in page
        assert says in page[: page.index("<main>")]

    def test_pictures_come_before_settings_and_importance_sampling_last(self):
        other = Diagnostic("convergence", 0.1, (0.5, 0.7), "good", "a paper", "fine")
        page = report_html([run(diagnostics=[run().diagnostics[0], other])])
        assert page.index('id="training"') < page.index('id="runs"')
        assert page.index(">convergence<") < page.index(">pareto_k<")
        assert 'class="bad"' not in page

    def test_differences_are_paired(self):
        """A run against itself differs by exactly nothing, for every resampled set."""
        cells = Reader(report_html([run("one"), run("same")])).cells
        row = len(cells) - 1 - cells[::-1].index("same")
        differences = [cell for cell in cells if cell.startswith("+0.0")]
        assert row > 0
        assert len(differences) == 2 * len(METRICS)  # on two labelled splits
        assert set(differences) == {"+0.0+0.0 to +0.0", "+0.000+0.000 to +0.000"}

    def test_other_labels_are_not_compared(self):
        assert 'aria-label="Table of differences"' in report_html([run("one"), run("same")])
        assert 'aria-label="Table of differences"' not in report_html([run("one"), run("other", seed=40)])

    def test_hostile_text_stays_text(self):
        places = ("name", "fact", "value", "text", "class", "split", "command", "question", "source", "advice")
        text = {place: f"{place}: {HOSTILE}" for place in places}
        texts = split().__dict__ | {"texts": [text["text"]] * 60}
        hostile = run(
            text["name"],
            facts={text["fact"]: text["value"]},
            splits={text["split"]: SplitResults(**texts), "b" + HOSTILE: split(1)},
            label_names=(text["class"], "good"),
            command=text["command"],
            diagnostics=[Diagnostic(text["question"], 1.0, (0, 1), "bad", text["source"], text["advice"])],
        )
        reader = Reader(report_html([hostile]))
        assert not reader.named("script")
        assert all(image["src"].startswith("data:") for image in reader.named("img"))
        assert not any(name.startswith("on") for _, attributes in reader.tags for name in attributes)
        assert [place for place in places if text[place] not in "".join(reader.words)] == []

    def test_the_least_certain_come_first(self):
        given = run()
        order = np.argsort(-given.splits["test"].entropy)
        cells = Reader(report_html([given])).cells
        shown = [cell for cell in cells if cell.startswith("text ")]
        assert shown == [f"text {i}" for i in order[:10]]

    def test_a_point_estimate_and_no_log(self):
        page = report_html([run(noise_to_signal=None, history=(), diagnostics=(), splits={"test": split(texts=False)})])
        reader = Reader(page)
        assert len(reader.named("img")) == 2
        assert not any(f'id="{section}"' in page for section in ("posterior", "diagnostics", "uncertain"))

    def test_regression(self):
        rng = np.random.default_rng(0)
        mean = rng.normal(size=50)
        labels = mean + 0.5 * rng.normal(size=50)
        part = SplitResults(labels, ["a"] * 50, mean=mean, std=np.full(50, 0.5))
        cells = Reader(report_html([run(splits={"test": part}, label_names=())])).cells
        row = cells.index("test")
        assert cells[row + 3].startswith(f"{np.sqrt(np.mean((mean - labels) ** 2)):.3f}")
        columns = [column.title for column in REGRESSION]
        inside = cells[row + 3 + columns.index("coverage")]
        assert 80 <= float(inside.split(".")[0]) <= 100  # of labels in 90 % intervals of the right width

    def test_refused(self):
        with pytest.raises(InputError, match="at least one run"):
            report_html([])
        with pytest.raises(InputError, match="own name"):
            report_html([run(), run()])
        with pytest.raises(InputError, match="other classes"):
            report_html([run("one"), run("two", label_names=("no", "yes"))])
        with pytest.raises(InputError, match="predicted nothing"):
            report_html([run(splits={})])

    def test_needs_no_torch(self):
        code = "import sys, bayeslora.analysis.report.page; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def chromium():
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if chromium() is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    texts = split().__dict__ | {"texts": [HOSTILE] * 60}
    hostile = run("hostile", splits={"test": SplitResults(**texts), "tweets": split(1)})
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(
        report_html([run("one"), hostile], title="a report", command="bayeslora report one hostile"), encoding="utf-8"
    )
    return file


class TestInABrowser:
    @pytest.fixture
    def opened(self, browser, page_file):
        """The page as opened from disk, with what went wrong on the way."""

        def open_it(**options):
            context = browser.new_context(**options)
            page, problems = context.new_page(), []
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on(
                "request",
                lambda asked: None if asked.url.startswith(("file:", "data:")) else problems.append(asked.url),
            )
            page.goto(page_file.as_uri())
            return page, problems

        return open_it

    def test_nothing_goes_wrong(self, opened):
        page, problems = opened()
        sizes = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth])")
        assert len(sizes) >= 8
        assert all(complete and width > 0 for complete, width in sizes)
        assert page.title() == "a report"  # no hostile script has changed it
        assert HOSTILE in page.locator("#uncertain td.text").first.inner_text() or page.locator("text=onerror").count()
        assert problems == []

    @pytest.mark.parametrize("width", [320, 1200])
    def test_no_part_is_wider_than_the_screen(self, opened, width):
        page, _ = opened(viewport={"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    def test_dark_and_light_are_readable(self, opened):
        """Contrast of text on the page by WCAG's formula, at least 7 to 1."""
        for scheme in ("light", "dark"):
            page, _ = opened(color_scheme=scheme)
            colours = page.evaluate(
                "['color', 'backgroundColor'].map(k => getComputedStyle(document.body)[k].match(/\\d+/g).map(Number))"
            )
            bright = [(0.2126, 0.7152, 0.0722) @ ((np.array(rgb[:3]) / 255 + 0.055) / 1.055) ** 2.4 for rgb in colours]
            assert (max(bright) + 0.05) / (min(bright) + 0.05) >= 7
            assert (bright[0] < bright[1]) == (scheme == "light")

    def test_the_keyboard_reaches_everything(self, opened):
        page, _ = opened()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.getAttribute('href') || document.activeElement.tagName"))
        assert {"#scores", "#diagnostics", "#uncertain", "DIV", "SUMMARY"} <= reached

    def test_print_leaves_navigation_out(self, opened):
        page, _ = opened()
        page.emulate_media(media="print")
        assert not page.locator("nav").is_visible()
        assert page.pdf()[:5] == b"%PDF-"
