"""Every experiment runs, small."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from bayeslora.study import Study
from bayeslora.study.runner import run_study
from tests.demo import tiny_encoder
from tests.modules import module
from tests.scripts import script

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_calibration_of_inference(tmp_path, capsys):
    found = script("studies/calibration_of_inference").main(str(tmp_path), simulations=12, steps=3, chains=0)
    assert all(ranks.shape == (12, 3) for ranks in found.values())
    assert capsys.readouterr().out.count("prediction") == len(found) == 7
    assert (tmp_path / "calibration_of_inference.png").is_file()


def test_against_people(model, tmp_path, capsys):
    small = {"seeds": (0,), "train_examples": 32, "test_examples": 24, "num_samples": 2, "max_steps": 2}
    table = script("studies/against_people").main(str(tmp_path), model=model, **small)
    assert len(table) == 2 * 4 * 2  # splits, uncertainties, kinds of disagreement
    assert all(-1 <= found.lower <= found.estimate <= found.upper <= 1 for found in table.values())
    assert capsys.readouterr().out.count(" to ") == 16
    assert (tmp_path / "against_people.png").is_file()


def test_out_of_scope(model, tmp_path, capsys):
    texts = [f"{word} {number}" for number in range(8) for word in ("pay my bill", "sing a song", "rain tomorrow")]
    files = {
        "clinc_oos": ("intent", ["bills", "music", "oos"]),
        "sst2": ("label", ["0", "1", "1"]),
        "ag_news": ("label", ["0", "1", "2"]),
    }
    for name, (column, labels) in files.items():
        (tmp_path / name).mkdir()
        rows = [f"{text},{labels[index % 3]}" for index, text in enumerate(texts)]
        header = f"{'sentence' if name == 'sst2' else 'text'},{column}"
        for split in ("train", "validation", "test"):
            (tmp_path / name / f"{split}.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    small = {"seeds": (0,), "test_examples": 16, "num_samples": 2, "max_steps": 2}
    table = script("studies/out_of_scope").main(str(tmp_path / "runs"), model=model, data_dir=tmp_path, **small)
    assert len(table) == 3 * 3  # tasks, uncertainties
    for scores in table.values():
        assert scores.shape == (4,)
        assert ((scores >= 0) & (scores <= 1)).all()
    assert capsys.readouterr().out.count("mutual information") == 3


def test_watch_domains(model, tmp_path, capsys):
    small = {"seeds": (0,), "train_examples": 32, "reference_examples": 24, "domain_examples": 40, "set_size": 24}
    found = script("studies/watch_domains").main(
        str(tmp_path), model=model, sets=2, num_samples=2, max_steps=2, **small
    )
    assert [*found] == ["test", "amazon", "nytimes", "tweets"]
    assert all(shares.shape == (1,) and shares[0] in (0, 0.5, 1) for shares in found.values())
    assert "| tweets |" in capsys.readouterr().out


def test_compare_with_nuts(tmp_path, double_precision, capsys):
    path = tmp_path / "figure.png"
    table = script("studies/compare_with_nuts").main(
        str(path), steps=10, num_draws=10, num_warmup=10, max_tree_depth=3, guide_draws=20
    )
    rows = ["exact", "NUTS", "mean_field", "mean_field, weighted", "amortized", "gaussian", "AutoNormal"]
    assert set(rows) < set(table)
    assert table["NUTS"]["sd ratio"] == pytest.approx(1)
    gaps = {name: row["gap (nats)"] for name, row in table.items()}
    assert {name for name, gap in gaps.items() if math.isnan(gap)} == {name for name in gaps if "weighted" in name} | {
        "exact",
        "NUTS",
    }
    assert "R-hat" in capsys.readouterr().out
    assert path.is_file()


def test_finite_mixture_bias(tmp_path, double_precision):
    small = {"sizes": (5,), "components": (1, 4), "particles": (1, 2), "cooperations": (0, 10)}
    module = script("studies/finite_mixture_bias")
    study = module.Study(num_data_sets=2, num_seeds=2, num_draws=40)
    found = module.main(str(tmp_path / "figure.png"), **small, steps=8, fewer_steps=4, study=study)
    assert set(found["table"]) == {(5, N, M) for N in (1, 4) for M in (1, 2)}
    assert found["table"][5, 1, 1]["E c"] == pytest.approx(1)
    assert found["table"][5, 4, 2]["sd"] < found["table"][5, 4, 1]["sd"]
    assert found["variance"][4] == pytest.approx(2 / 5, abs=0.08)  # five standard errors of 2000 draws
    assert (tmp_path / "figure.png").is_file()


@pytest.mark.parametrize("num_particles", [1, 4])
def test_finite_mixture_bias_of_exact_and_of_wrong_draws(double_precision, num_particles):
    """Draws of the posterior itself have no bias, its spread, and its variance over M; others do not."""
    module = script("studies/finite_mixture_bias")
    problems = [module.same_data(10, 4, seed, 0.5) for seed in (0, 0, 1, 1)]
    features = torch.randn(20, module.COLUMNS)
    A = torch.stack(
        [problem.posterior_draws(4000, seed=k)["A_r2_in3"].flatten(1) for k, problem in enumerate(problems)], 1
    )
    found = module.errors(problems, features, A, num_particles, 2)
    assert found["bias"] < 0.05
    assert found["sd"] == pytest.approx(num_particles**-0.5, rel=0.05)
    assert found["spread"] == pytest.approx(1, rel=0.05)
    mean = A.mean(0)
    wrong = module.errors(problems, features, mean + (A - mean) / 2 + 0.5, num_particles, 2)
    assert wrong["spread"] == pytest.approx(0.5, rel=0.05)
    assert wrong["bias"] > 0.5
    assert wrong["rmse"] ** 2 == pytest.approx(wrong["bias"] ** 2 + wrong["sd"] ** 2)


def test_more_draws(model, capsys):
    found = script("studies/more_draws").main(model=model, train_examples=16, test_examples=12, draws=8, epochs=1)
    assert len(found) == capsys.readouterr().out.count("AURC") == 2 * 5
    assert all(math.isfinite(value) for row in found.values() for value in row)


def test_how_long(model, capsys):
    found = script("studies/how_long").main(model=model, test_examples=12, draws=2, steps={("sentiment", 16): (1, 2)})
    assert [*found] == [("sentiment", 1), ("sentiment", 2)]
    assert capsys.readouterr().out.count("sentiment, 16 examples") == 2
    assert all(math.isfinite(value) for row in found.values() for value in row)


def test_findings(model, tmp_path, capsys):
    sizes = {"train_examples": 16, "validation_examples": 12, "test_examples": 12}
    study = Study(
        model=model,
        tasks=("sentiment",),
        methods=("lora", "temperature"),
        seeds=(0, 1),
        **sizes,
        learning_rates=(1e-3, 3e-3),
        max_length=64,
        training={"max_steps": 2},
    )
    rows = run_study(study, tmp_path).results
    capsys.readouterr()
    findings = script("studies/findings")
    findings.compare(study, rows, tmp_path)
    findings.at_one_setting(study, rows[rows["learning_rate"] == 1e-3], tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith("\n2 settings")
    assert printed.count("from LoRA + temperature*, in the ") == 2
    assert printed.count(", from LoRA\n") == 4  # a table of differences for each domain


def test_parts_of_ag_news(tmp_path):
    rows = pd.DataFrame({"text": [f"text {i}" for i in range(7600)], "label": np.arange(7600) % 4, "idx": range(7600)})
    rows.to_parquet(tmp_path / "test.parquet")
    script("studies/ag_news_parts").main(tmp_path / "test.parquet", tmp_path / "parts")
    parts = {
        split: pd.read_parquet(tmp_path / "parts" / f"{split}.parquet") for split in ("train", "validation", "test")
    }
    assert {split: len(part) for split, part in parts.items()} == {"train": 4000, "validation": 1600, "test": 2000}
    assert sorted(pd.concat(parts.values())["text"]) == sorted(rows["text"])
    assert (pd.concat(parts.values()).merge(rows, on="text").eval("label_x == label_y")).all()


def test_growth(model, capsys):
    growth = script("studies/growth")
    rows = growth.main(model=model, train_examples=48, examples=40, epochs=1, draws=2)
    assert [way for way, _ in rows] == list(growth.WAYS)
    rho = {way: row["rho"] for (way, _), row in rows.items() if way != "LoRA"}
    assert rho["constant"] == pytest.approx(8, rel=0.2)
    assert rho["second half"] == pytest.approx(rho["constant"] / 3, rel=0.3)  # the last of three steps begins at 2/3
    assert rho["KL cycle"] < rho["learned"] < rho["cosine"]
    assert capsys.readouterr().out.count("width") == len(rows) - 1


def test_a_cycle_of_the_kl_has_a_mean_weight_of_one():
    bayes = module()
    cycle = script("studies/growth").KLCycle(bayes, 5)
    weights = []
    for step in range(10):
        cycle.on_step_begin(None, SimpleNamespace(global_step=step), None)
        weights.append(bayes.elbo.kl_weight)
    assert weights[:5] == weights[5:]
    assert np.mean(weights) == pytest.approx(1, abs=0.02)  # 2 + 4 + ... + 32 = 62 of 63
    assert weights[1] / weights[0] == pytest.approx(2)
