"""Every example runs, small, and is tested."""

import json
import math
import re
from pathlib import Path

import pytest

from tests.demo import tiny_encoder
from tests.scripts import ROOT, names_of, script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


def test_how_sure_is_the_model(model, tmp_path, capsys):
    small = {"train_examples": 32, "test_examples": 24, "max_steps": 2}
    sentences = script("examples/how_sure_is_the_model").main(str(tmp_path / "run"), model=model, **small)
    assert len(set(sentences)) == 5
    assert capsys.readouterr().out.count("MI ") == 5


def test_fit_with_pyro_svi(model):
    losses = script("examples/fit_with_pyro_svi").main(model=model, train_examples=32)
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def test_your_own_csv(model, tmp_path):
    adapter = script("examples/your_own_csv").main(str(tmp_path), model=model)
    assert (adapter / "posterior.safetensors").is_file()


def test_your_own_guide(model, tmp_path):
    small = {"train_examples": 32, "test_examples": 24, "max_steps": 2}
    scores = script("examples/your_own_guide").main(str(tmp_path), model=model, **small)
    assert list(scores) == ["AmortizedGuide", "LowRankGuide"]
    assert all(math.isfinite(score["nll"]) for score in scores.values())


def test_the_guide_in_the_documentation_is_the_examples():
    page = (ROOT / "docs" / "write_a_guide.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert block in (ROOT / "examples" / "your_own_guide.py").read_text(encoding="utf-8")
    assert len(block.splitlines()) <= 30


@pytest.mark.filterwarnings("ignore")  # ArviZ's own, about Pareto's k and few draws
def test_arviz_tour(model, tmp_path, capsys):
    small = {"train_examples": 8, "test_examples": 6, "num_samples": 25, "max_steps": 2}
    table = script("examples/arviz_tour").main(str(tmp_path), model=model, **small)
    assert set(table.index) == {"LoRA", "MonteCLoRA", "Gaussian"}
    printed = capsys.readouterr().out
    assert "LoRA: all draws have the same log-likelihood" in printed
    assert "elpd_loo" in printed
    assert {"forest.png", "elbo.png", "draws.nc"} <= {path.name for path in tmp_path.iterdir()}


def test_what_to_label_next(model, tmp_path):
    small = {"pool_size": 40, "test_size": 12, "each": 6, "epochs": 1, "seeds": 1}
    scores = script("examples/what_to_label_next").main(str(tmp_path), model=model, **small)
    assert list(scores) == ["random", "mutual_information", "batchbald"]
    for of_seeds in scores.values():
        assert [row["labels"] for row in of_seeds[0]] == [6, 12, 18, 24]
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000
    chosen = [json.loads(line) for line in (tmp_path / "batchbald-0-0" / "next.jsonl").read_text().splitlines()]
    assert len({row["row"] for row in chosen}) == 6


def test_no_script_is_untested():
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parents[1].rglob("test_*.py"))
    assert names_of("examples") | names_of("studies") <= set(re.findall(r'script\("(\w+/\w+)"\)', tests))
