"""Studies on a tiny network: what a cell trains and predicts, and how the grid survives failures and interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from transformers import BertTokenizerFast

from bayeslora.adapters.inject import lora_config
from bayeslora.analysis import area_under_risk_coverage, fit_temperature, predictive_entropy, robustness_table
from bayeslora.config import PRESETS, MonteCLoRAConfig
from bayeslora.errors import InputError
from bayeslora.files.records import read_json
from bayeslora.inference.tuning import tune
from bayeslora.module import BayesLoRA
from bayeslora.study import Study
from bayeslora.study.cell import run_cell
from bayeslora.study.compare import compare, two_methods
from bayeslora.study.differences import differences, grid_differences
from bayeslora.study.experiment import Experiment
from bayeslora.study.methods.base import Lineup, all_methods, make_method
from bayeslora.study.methods.monteclora import TUNED, PostHocMonteCLoRA
from bayeslora.study.methods.peft import LoRA
from bayeslora.study.predictions import read_predictions
from bayeslora.study.runner import run_study
from bayeslora.study.spec import Cell, MethodSpec, cells
from bayeslora.tasks.load import load_task
from bayeslora.training.held_out import hold_out
from tests.conftest import tiny_network

PRIOR = "tests.workers.study_methods:Prior"
ROOT = Path(__file__).parents[2]


def only(study: Study, label: str | None = None, **changes) -> Cell:
    found = [cell for cell in cells(study, list(Lineup.of(study.methods).trained)) if label in (None, cell.method)]
    return Cell(**{**found[0].__dict__, **changes})


def scored_on_test(result) -> pd.DataFrame:
    return result.results[result.results["split"] == "test"].reset_index(drop=True)


class TestSpec:
    def test_yaml_and_dict_are_the_same_study(self, study, tmp_path):
        file = tmp_path / "study.yaml"
        file.write_text(
            "model: demo\ntasks: [sentiment]\nlearning_rates: [1e-3, 2.5e-2]\nmethods: [lora, {name: monteclora, "
            "sample_scaler: 1e-2}]\n",
            encoding="utf-8",
        )
        read = Study.from_yaml(file)
        assert read.learning_rates == (1e-3, 2.5e-2)  # PyYAML alone reads text
        assert read.methods[1].options == {"sample_scaler": 0.01}
        again = Study.from_dict(json.loads(json.dumps(read.to_dict())))
        assert again == read
        assert again.digest == read.digest

    def test_a_sweep_is_one_method_for_each_combination(self, study):
        made = study({"name": "monteclora", "sweep": {"num_components": [2, 4], "sample_scaler": [0.01, 0.1]}})
        labels = list(Lineup.of(made.methods).trained)
        assert len(labels) == 4
        assert labels[1] == "MonteCLoRA (num_components=2, sample_scaler=0.1)"

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"learningrates": [1]}, "did you mean 'learning_rates'"),
            ({"seeds": []}, "seeds is empty"),
            ({"learning_rates": ["fast"]}, "learning_rates takes a positive number, got 'fast'"),
            ({"seeds": [1, 1]}, "seeds names 1 twice"),
            ({"training": {"epoch": 2}}, "did you mean 'epochs'"),
            ({"model": ""}, "'model' is missing"),
            ({"tasks": [{"nme": "x"}]}, "did you mean 'name'"),
            ({"curve_examples": 50}, "curve_examples does nothing without curve_points"),
            (
                {"tasks": [{"name": "x", "shift_splits": ["y"]}], "shift_splits": False},
                "of task 'x' does nothing beside shift_splits: false",
            ),
        ],
    )
    def test_mistakes_are_named(self, study, changes, says):
        with pytest.raises(InputError, match=says):
            Study.from_dict({**study("lora").to_dict(), **changes})

    @pytest.mark.parametrize(
        ("methods", "says"),
        [
            (["lorra"], "no method 'lorra'; did you mean 'lora'"),
            ([{"name": "lora", "ratio": 2}], "no option 'ratio'"),
            ([{"name": "monteclora", "sample_scalar": 1}], "did you mean 'sample_scaler'"),
            (["monteclora", "temperature"], "builds on 'lora', which the study does not train"),
            (["lora", {"name": "lora", "label": "LoRA"}], "two methods are called 'LoRA'"),
            (["lora", "temperature", {"name": "temperature", "base": "LoRA"}], "two methods are called 'temperature"),
            (
                ["lora", "dora", *({"name": "monteclora_post_hoc", "base": base} for base in ("lora", "dora"))],
                "two methods are called 'MonteCLoRA post-hoc'",
            ),
            (["lora", {"name": "monteclora_post_hoc", "label": "LoRA"}], "two methods are called 'LoRA'"),
            (["temperature"], "builds on 'lora'"),
            (["lora", {"name": "monteclora_post_hoc", "preset": "learned"}], "and mode='post_hoc' freezes it"),
            (["lora", {"name": "monteclora", "mode": "post_hoc", "noise_schedule": "per_layer"}], "freezes it"),
            (["lora", {"name": "monteclora_post_hoc", "mode": "joint"}], "is mode='post_hoc': leave mode out"),
            (["lora", {"name": "monteclora_post_hoc", "predictions": ["mean"]}], "predicts nothing new"),
            ([{"name": "gaussian", "guide": "mean_field"}], "is guide='gaussian': leave guide out"),
            ([{"name": "monteclora", "guide": "gausian"}], "no guide 'gausian'; did you mean 'gaussian'"),
            ([{"name": "monteclora", "predictions": []}], "predicts nothing new"),
            ([{"name": "monteclora", "predictions": ["mean"], "antithetic": True}], "antithetic does nothing"),
            (["nowhere:Method"], "cannot import nowhere"),
            (["tests.workers.study_methods:Prier"], "did you mean 'Prior'"),
        ],
    )
    def test_methods_that_cannot_be(self, study, methods, says):
        with pytest.raises(InputError, match=says):
            Lineup.of(study(*methods).methods)

    def test_every_method_of_the_package_is_registered(self):
        assert set(all_methods()) == {
            "full",
            "lora",
            "lora_plus",
            "rslora",
            "dora",
            "adalora",
            "frozen_a",
            "peft_monteclora",
            "monteclora",
            "monteclora_post_hoc",
            "gaussian",
            "temperature",
            "mc_dropout",
            "checkpoint_ensemble",
            "deep_ensemble",
            "laplace",
            "bayesianized",
            "tfb",
            "laplace_lora",
            "blob",
            "scalabl",
            "swag",
            "ivon",
            "isotonic",
            "histogram",
            "dirichlet",
        }
        for name, method in all_methods().items():
            assert make_method(MethodSpec(name)).label
            assert method.__doc__


def test_the_studies_of_the_repository_can_be_read():
    files = sorted((ROOT / "studies").glob("*.yaml"))
    assert "nlu_grid.yaml" in [file.name for file in files]
    for file in files:
        read = Study.from_yaml(file)
        assert len(list(cells(read, list(Lineup.of(read.methods).trained)))) >= 1


POINTS = {
    "full": {"learning_rate_scale": 0.3},
    "lora": {},
    "lora_plus": {"ratio": 2},
    "rslora": {},
    "dora": {},
    "adalora": {"learning_rate_scale": 2.0},
    "frozen_a": {},
    "peft_monteclora": {"buffer_size": 4},
}
OURS = (
    {},
    {"preset": "paper"},
    {"preset": "constant"},
    {"mixture": "sparse"},
    {"guide": "mean_field"},
    {"guide": "gaussian"},
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *({"name": name, **options} for name, options in POINTS.items()),
        {"name": "gaussian"},
        *({"name": "monteclora", **options} for options in OURS),
    ],
    ids=lambda method: "-".join(map(str, method.values())),
)
def test_each_method_learns_an_easy_task_and_gives_probabilities(study, tmp_path, method):
    slow = bool({"adalora", "sparse"} & set(method.values()))
    training = {"max_steps": 60 if slow else 30, "warmup": 0.0}
    made = study(method, learning_rates=[0.02], batch_sizes=[16], training=training, ranks=[4], lora={})
    result = run_cell(made, only(made), tmp_path)
    assert result["failures"] == []
    scored = {row["method"]: row["accuracy"] for row in result["rows"] if row["split"] == "test"}
    assert min(scored.values()) > 0.9, scored
    for probs, labels in read_predictions(tmp_path / only(made).folder, "test").values():
        assert probs.shape == (24, 2)
        np.testing.assert_allclose(probs.sum(1), 1, atol=1e-12)
        assert (labels >= 0).all()


def test_lora_is_our_posterior_without_noise(study, tmp_path):
    """PEFT's LoRA through the plain helper, and fit() with ε = 0: same start, same data, same schedule."""
    made = study(
        "lora",
        {"name": "monteclora", "sample_scaler": 0.0, "label": "ours"},
        training={"epochs": 3},
        curve_points=3,
        learning_rates=[0.03],
    )
    for cell in cells(made, ["LoRA", "ours"]):
        run_cell(made, cell, tmp_path)
    ours, lora = (read_predictions(tmp_path / only(made, m).folder, "test")[m][0] for m in ("ours", "LoRA"))
    np.testing.assert_allclose(ours, lora, atol=1e-6)
    assert np.ptp(lora[:, 0]) > 1e-3  # they are not all alike
    curves = [
        json.loads((tmp_path / only(made, m).folder / "scores.json").read_text())["curve"] for m in ("LoRA", "ours")
    ]
    assert [p["step"] for p in curves[0]] == [4, 8, 12]
    np.testing.assert_allclose([p["loss"] for p in curves[0]], [p["loss"] for p in curves[1]], atol=1e-6)


@pytest.mark.slow
def test_one_training_serves_all_that_builds_on_it(study, tmp_path, monkeypatch):
    trained = []
    train = LoRA.train
    monkeypatch.setattr(LoRA, "train", lambda self, given: trained.append(given.cell) or train(self, given))
    made = study(
        "lora",
        "temperature",
        "mc_dropout",
        "checkpoint_ensemble",
        "deep_ensemble",
        {"name": "monteclora", "mode": "post_hoc"},
        seeds=[0, 1],
    )
    result = run_study(made, tmp_path / "out", progress=False)
    assert sorted(cell.seed for cell in trained) == [0, 1]
    assert not len(result.failures)
    rows = scored_on_test(result)
    assert set(rows["method"]) == {
        "LoRA",
        "LoRA + temperature*",
        "LoRA + MC dropout",
        "LoRA + checkpoint ensemble",
        "LoRA deep ensemble of 2",
        "MonteCLoRA post-hoc, 3 draws",
        "MonteCLoRA post-hoc, 3 draws + temperature*",
    }
    members = [read_predictions(tmp_path / "out" / only(made, seed=s).folder, "test")["LoRA"] for s in (0, 1)]
    mean, labels = (members[0][0] + members[1][0]) / 2, members[0][1]
    ensemble = rows[rows["method"] == "LoRA deep ensemble of 2"].iloc[0]
    assert ensemble["nll"] == pytest.approx(-np.log(mean[np.arange(len(labels)), labels]).mean(), abs=1e-9)
    assert ensemble["members"] == 2
    assert "summary.md" in {path.name for path in (tmp_path / "out").iterdir()}
    assert not list((tmp_path / "out").rglob("*.safetensors"))  # networks are not kept


@pytest.mark.parametrize(("method", "moves"), [("lora", True), ("frozen_a", False)])
def test_frozen_a_learns_with_b_alone(study, tmp_path, method, moves):
    made = study(method)
    experiment = Experiment(made, only(made), tmp_path)
    started = experiment.network()
    before = get_peft_model(started, lora_config(started, LoRA().configuration(experiment))).state_dict()
    after = make_method(MethodSpec(method)).train(experiment).network.state_dict()
    of_a, of_b = ([name for name in after if f"lora_{letter}" in name] for letter in "AB")
    assert len(of_a) == len(of_b) > 0
    assert all(after[name].any() for name in of_b)  # B starts at zero
    assert {torch.equal(before[name], after[name]) for name in of_a} == {not moves}


@pytest.mark.slow
def test_a_width_is_tuned_where_there_are_enough_validation_examples(study, tmp_path, place):
    """Twenty say something about a width: the predictor has the lowest NLL on them, and its width is not kept."""
    ours = {"name": "monteclora", "label": "ours", "predictions": ["mean", "draws", *TUNED]}
    long = tmp_path / "long"
    shutil.copytree(place / "reviews", long / "reviews")
    (long / "reviews" / "validation.csv").write_text((long / "reviews" / "train.csv").read_text())
    tasks = [{"name": "reviews", "data_dir": str(long / "reviews"), "text_columns": "text"}]
    made = study(ours, tasks=tasks, learning_rates=[0.03], training={"max_steps": 80})
    result = run_cell(made, only(made), tmp_path / "out")
    on_validation = {row["method"]: row["nll"] for row in result["rows"] if row["split"] == "validation"}
    tuned, both = (on_validation.pop(f"ours, 3 draws, {name}*") for name in ("tuned", "tuned + temperature"))
    assert set(on_validation) == {"ours, mean", "ours, 3 draws", "ours, 3 draws, agreement"}
    del on_validation["ours, 3 draws, agreement"]
    assert both <= tuned <= min(on_validation.values()) + 1e-9
    numbers = {row["method"]: {"width", "temperature"} & row.keys() for row in result["rows"]}
    assert [columns for columns in numbers.values() if columns] == [{"width"}, {"width"}, {"width", "temperature"}]
    assert all(row["width"] >= 0 for row in result["rows"] if "width" in row)
    made = study(ours, tasks=tasks)  # too short a training: all reviews are answered alike, which says nothing
    alike = {row["method"] for row in run_cell(made, only(made), tmp_path / "alike")["rows"]}
    assert "ours, 3 draws, agreement" not in alike
    assert "ours, 3 draws, tuned*" in alike
    few = run_cell(study(ours), only(study(ours)), tmp_path / "few")
    assert not [row for row in few["rows"] if "tuned" in row["method"]]
    assert few["failures"] == []


@pytest.mark.slow
def test_a_width_from_a_held_out_part_of_the_training_set(study, tmp_path, place):
    """Trained without that part; the draws have the width that ``tune`` finds on it, and validation is not asked."""
    long = tmp_path / "long"
    shutil.copytree(place / "reviews", long / "reviews")
    header, *rows = (place / "reviews" / "train.csv").read_text().splitlines()
    (long / "reviews" / "train.csv").write_text("\n".join([header, *rows, *rows, *rows]))
    tasks = [{"name": "reviews", "data_dir": str(long / "reviews"), "text_columns": "text"}]
    ours = {"name": "monteclora", "tune": 0.4, "predictions": ["mean", "draws"]}
    made = study(ours, tasks=tasks, learning_rates=[0.03], training={"max_steps": 60}, keep_adapters=True)
    result = run_cell(made, only(made), tmp_path / "out")
    label = "MonteCLoRA, tuned on 40% of its training set"
    widths = {row["method"]: row.get("width") for row in result["rows"]}
    assert list(widths) == [f"{label}, mean", f"{label}, 3 draws"]
    width = widths[f"{label}, 3 draws"]

    experiment = Experiment(made, only(made), tmp_path)
    rest, held_out = hold_out(experiment.train_data, 0.4, made.seeds[0])
    folder = tmp_path / "out" / only(made).folder
    bayes = BayesLoRA.from_pretrained(folder / "adapter", experiment.network())
    assert read_json(folder / "run.json")["train_examples"] == len(rest)
    assert bayes.tuning is not None
    assert bayes.tuning.width == width
    again = tune(bayes, held_out, num_samples=3, progress=False)
    assert again.width == pytest.approx(width)

    with pytest.raises(InputError, match="tune is for the width of draws"):
        Lineup.of(study({**ours, "predictions": ["mean"]}).methods)
    few = study({**ours, "tune": 0.1}, tasks=tasks)
    with pytest.raises(InputError, match="a width needs at least 20"):
        run_cell(few, only(few), tmp_path / "few")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_comparison_trains_the_configuration_it_was_given(place, preset):
    config = MonteCLoRAConfig.preset(preset, sample_scaler=0.07)
    task = load_task("reviews", place / "reviews", text_columns="text")
    *_, ours = two_methods(config, task, "test")["methods"]
    method = make_method(MethodSpec(ours.pop("name"), ours))
    assert MonteCLoRAConfig.preset(method.preset, **method.config) == config


def test_draws_in_mirrored_pairs(study, tmp_path):
    """One training, two ways to average: the first draw is common, and the second is its image or another draw."""
    found = []
    for antithetic in (False, True):
        made = study(
            {
                "name": "monteclora",
                "preset": "constant",
                "sample_scaler": 0.5,
                "antithetic": antithetic,
                "num_samples": 2,
                "predictions": ["mean", "draws"],
            }
        )
        folder = tmp_path / str(antithetic)
        run_cell(made, only(made), folder)
        found.append(read_predictions(folder / only(made).folder, "test"))
    (plain_mean, plain), (pairs_mean, pairs) = (list(one.items()) for one in found)
    assert plain_mean[0] == pairs_mean[0]
    assert np.array_equal(plain_mean[1][0], pairs_mean[1][0])
    assert (plain[0].split(", ")[-1], pairs[0].split(", ")[-1]) == ("2 draws", "2 antithetic draws")
    assert np.abs(plain[1][0] - pairs[1][0]).max() > 1e-4


def test_the_temperature_sees_validation_only(study, tmp_path):
    made = study("lora", "temperature")
    rows = run_cell(made, only(made), tmp_path)["rows"]
    folder = tmp_path / only(made).folder
    validation, test = (read_predictions(folder, split) for split in ("validation", "test"))
    log_odds = {name: np.log(test[name][0][:, 1] / test[name][0][:, 0]) for name in test}
    used = log_odds["LoRA"] / log_odds["LoRA + temperature*"]
    assert np.allclose(used, fit_temperature(*validation["LoRA"]), rtol=1e-3)
    said = [row["temperature"] for row in rows if row["method"] == "LoRA + temperature*"]
    assert said == pytest.approx([fit_temperature(*validation["LoRA"])] * 2, rel=1e-5)
    assert not [row for row in rows if row["method"] == "LoRA" and "temperature" in row]
    assert abs(used.mean() / fit_temperature(*test["LoRA"]) - 1) > 1e-2


def test_post_hoc_methods_leave_the_network_as_it_was(study, tmp_path):
    post_hoc = {"name": "monteclora", "preset": "constant", "mode": "post_hoc"}
    made = study("lora", "mc_dropout", "checkpoint_ensemble", post_hoc)
    lineup = Lineup.of(made.methods)
    experiment = Experiment(made, only(made), tmp_path, checkpoints=5)
    trained = lineup.trained["LoRA"].train(experiment)
    before = {name: value.clone() for name, value in trained.network.state_dict().items()}
    (own,) = lineup.trained["LoRA"].predictors(trained, experiment)
    plain = own.predict("test").probs
    predicted = {}
    for method in lineup.post_hoc["LoRA"]:
        for predictor in method.predictors(trained, experiment, own.predict):
            assert predictor.draws == isinstance(method, PostHocMonteCLoRA)  # at the mean it is the LoRA itself
            predicted[predictor.label] = predictor.predict("test")
        after = trained.network.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert not trained.network.training
    assert all(np.abs(one.probs - plain).max() > 1e-6 for one in predicted.values())
    assert all((one.mutual_information >= -1e-12).all() for one in predicted.values())
    assert len(trained.checkpoints) == 3  # of 6 steps, those after the first half
    last = trained.checkpoints[-1]
    assert all(torch.equal(last[name], p) for name, p in trained.network.named_parameters() if p.requires_grad)


def test_mc_dropout_needs_dropout(study, place, tmp_path):
    tiny_network(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(tmp_path / "model")
    BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(tmp_path / "model")
    made = study("lora", "mc_dropout", model=str(tmp_path / "model"))
    result = run_cell(made, only(made), tmp_path / "out")
    assert [row["method"] for row in result["rows"]] == ["LoRA"] * 2
    assert "no dropout at a positive rate" in result["failures"][0]["error"]


def test_laplace_is_laplace_on_the_head(study, tmp_path):
    pytest.importorskip("laplace", reason="laplace-torch is not installed")
    made = study("lora", "laplace", training={"max_steps": 12})
    result = run_cell(made, only(made), tmp_path)
    assert result["failures"] == []
    found = read_predictions(tmp_path / only(made).folder, "test")
    plain, laplace = (found[name][0] for name in ("LoRA", "LoRA + Laplace (last layer)"))
    assert (plain.argmax(1) == laplace.argmax(1)).all()  # the probit approximation keeps the order of two classes
    assert (laplace.max(1) < plain.max(1)).all()  # and takes confidence away
    assert (laplace.max(1) > 0.5).all()


@pytest.mark.slow
class TestGrid:
    def grid(self, study, tmp_path, **options):
        return study({"name": PRIOR, "label": "prior", "count_in": str(tmp_path / "count"), **options}, seeds=[0, 1, 2])

    def trainings(self, tmp_path) -> list[str]:
        file = tmp_path / "count"
        return sorted(file.read_text().split()) if file.exists() else []

    def test_a_failing_cell_is_reported_and_the_rest_runs(self, study, tmp_path):
        (tmp_path / "flag").touch()
        made = self.grid(study, tmp_path, fail_on_seed=1, fail_while=str(tmp_path / "flag"))
        result = run_study(made, tmp_path / "out", progress=False)
        assert sorted(scored_on_test(result)["seed"]) == [0, 2]
        assert result.failures[["seed", "error"]].to_dict("records") == [
            {"seed": 1, "error": "InputError: this seed brings bad luck"}
        ]
        assert "bad luck" in (tmp_path / "out" / "summary.md").read_text()
        assert "bad luck" in (tmp_path / "out" / "failures.csv").read_text()
        (tmp_path / "flag").unlink()
        again = run_study(made, tmp_path / "out", progress=False)  # repeats the failed cell, and no other
        assert sorted(scored_on_test(again)["seed"]) == [0, 1, 2]
        assert not len(again.failures)
        assert not (tmp_path / "out" / "failures.csv").exists()
        assert self.trainings(tmp_path) == ["0", "1", "2"]

    def test_differences_over_the_grid_are_those_of_its_table(self, study, tmp_path):
        made = study(
            "lora", {"name": PRIOR, "label": "prior"}, "deep_ensemble", seeds=[0, 1], learning_rates=[0.01, 0.03]
        )
        result = run_study(made, tmp_path / "out", progress=False)
        table = robustness_table(result.results).loc["reviews"]
        for statistic in ("median", "spread"):
            found = grid_differences(made, result.results, tmp_path / "out", "test", statistic).set_index("method")
            assert list(found["seeds"]) == [2, 0]  # the ensemble is one for all seeds
            for name, row in found.iterrows():
                expected = table["nll", statistic][name] - table["nll", statistic]["LoRA"]
                assert row["nll"] == pytest.approx(expected, abs=1e-6)
                assert row["nll_lower"] < row["nll"] < row["nll_upper"]
        summary = (tmp_path / "out" / "summary.md").read_text()
        assert "Differences from LoRA in the spread over the settings" in summary

    def test_the_order_of_errors_is_compared_as_all_else_is(self, study, tmp_path):
        """Against numbers by hand, on every split: examples and seeds are drawn for AURC too."""
        made = study("lora", {"name": PRIOR, "label": "prior"}, seeds=[0, 1])
        result = run_study(made, tmp_path / "out", progress=False)
        areas = []
        for cell in cells(made, ["LoRA"]):
            probs, labels = read_predictions(tmp_path / "out" / cell.folder, "test")["LoRA"]
            areas.append(area_under_risk_coverage(predictive_entropy(probs), probs.argmax(-1) != labels))
        rows = scored_on_test(result).set_index("method")
        assert list(rows["aurc"]["LoRA"]) == pytest.approx(areas, abs=1e-6)
        prior = 1 - rows["accuracy"]["prior"].mean()  # all examples are equally sure
        (row,) = differences(made, result.results, tmp_path / "out", "test").to_dict("records")
        assert row["aurc"] == pytest.approx(prior - np.mean(areas), abs=1e-6)
        assert row["aurc_lower"] <= row["aurc"] <= row["aurc_upper"]
        assert row["overconfidence_verdict"] in ("higher", "lower", "no difference seen")
        assert "AURC (%)" in (tmp_path / "out" / "summary.md").read_text()

    def test_processor_time_lies_beside_the_clock(self, study, tmp_path):
        made = study("lora", "temperature", "monteclora", "deep_ensemble", seeds=[0, 1])
        rows = scored_on_test(run_study(made, tmp_path / "out", progress=False)).set_index("method")
        for what in ("train", "predict"):
            wall, cpu = rows[f"{what}_seconds"], rows[f"{what}_cpu_seconds"]
            assert (cpu > 0).all()
            assert cpu["LoRA deep ensemble of 2"] == pytest.approx(cpu["LoRA"].sum())
            assert wall["LoRA deep ensemble of 2"] == pytest.approx(wall["LoRA"].sum())
        assert set(rows["workers"]) == {1}
        summary = (tmp_path / "out" / "summary.md").read_text()
        assert "workers at once: 1 at most" in summary

    def test_the_reference_is_a_choice(self, study, tmp_path):
        """From LoRA, from LoRA with a temperature, or both; another choice trains nothing again."""
        both = ["LoRA", "LoRA + temperature"]
        made = study("lora", "temperature", "deep_ensemble", seeds=[0, 1], reference=both)
        result = run_study(made, tmp_path / "out", progress=False)
        summary = (tmp_path / "out" / "summary.md").read_text()
        found = {}
        for name in ("LoRA", "LoRA + temperature*"):
            assert f"Differences from {name} on test" in summary
            rows = differences(made, result.results, tmp_path / "out", "test", name).set_index("method")
            assert name not in rows.index
            assert len(rows) == 2
            found[name] = rows["nll"]
        assert found["LoRA"]["LoRA + temperature*"] == -found["LoRA + temperature*"]["LoRA"]
        written = [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").rglob("scores.json"))]
        other = Study.from_dict({**made.to_dict(), "reference": "LoRA deep ensemble of 2"})
        run_study(other, tmp_path / "out", progress=False)
        assert written == [file.stat().st_mtime_ns for file in sorted((tmp_path / "out").rglob("scores.json"))]
        assert "Differences from LoRA on" not in (tmp_path / "out" / "summary.md").read_text()

    @pytest.mark.parametrize(
        ("reference", "says"),
        [("LoRA + temprature", "did you mean 'LoRA . temperature"), ("DoRA", "nothing is called as the reference")],
    )
    def test_a_reference_that_there_is_not_is_refused_before_training(self, study, tmp_path, reference, says):
        made = study("lora", "temperature", reference=reference)
        with pytest.raises(InputError, match=says):
            run_study(made, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    def test_an_ensemble_of_one_is_refused_before_training(self, study, tmp_path):
        with pytest.raises(InputError, match="combines the trainings of several seeds"):
            run_study(study("lora", "deep_ensemble"), tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    def test_a_new_measure_needs_no_new_training(self, study, tmp_path):
        """Cells that were scored before there was one are scored by the predictions that they kept."""
        made = self.grid(study, tmp_path)
        first = run_study(made, tmp_path / "out", progress=False)
        for file in (tmp_path / "out").rglob("scores.json"):
            kept = json.loads(file.read_text())
            for row in kept["rows"]:
                del row["aurc"], row["overconfidence"]
            file.write_text(json.dumps(kept))
        (tmp_path / "out" / "optuna.journal").unlink()
        second = run_study(made, tmp_path / "out", progress=False)
        assert self.trainings(tmp_path) == ["0", "1", "2"]
        for name in ("aurc", "overconfidence"):
            np.testing.assert_allclose(second.results[name], first.results[name], atol=1e-6)

    def test_a_study_that_has_grown_counts_what_is_finished(self, study, tmp_path, capsys):
        run_study(self.grid(study, tmp_path), tmp_path / "out", progress=False)
        grown = Study.from_dict({**self.grid(study, tmp_path).to_dict(), "seeds": [0, 1, 2, 3]})
        run_study(grown, tmp_path / "out")
        said = capsys.readouterr().out.splitlines()
        assert said[0] == "[3/4] finished before"
        assert [line.split("]")[0] for line in said if line.startswith("[")] == ["[3/4", "[3/4", "[4/4"]
        assert "seed 3" in said[1]
        assert self.trainings(tmp_path) == ["0", "1", "2", "3"]

    def test_a_finished_study_is_read(self, study, tmp_path):
        made = self.grid(study, tmp_path)
        first = run_study(made, tmp_path / "out", progress=False)
        second = run_study(made, tmp_path / "out", progress=False)
        pd.testing.assert_frame_equal(first.results, second.results)
        assert self.trainings(tmp_path) == ["0", "1", "2"]
        read = pd.read_parquet(tmp_path / "out" / "results.parquet")
        assert len(read) == 6
        pd.testing.assert_frame_equal(read, pd.read_csv(tmp_path / "out" / "results.csv"), check_dtype=False)
        assert {"versions", "seed", "train_seconds", "peak_memory_mb", "steps"} <= set(read)

    def test_a_study_can_grow_but_not_change(self, study, tmp_path):
        made = self.grid(study, tmp_path)
        run_study(made, tmp_path / "out", progress=False)
        more = Study.from_dict({**made.to_dict(), "seeds": [0, 1, 2, 3]})
        assert sorted(scored_on_test(run_study(more, tmp_path / "out", progress=False))["seed"]) == [0, 1, 2, 3]
        assert self.trainings(tmp_path) == ["0", "1", "2", "3"]
        other = Study.from_dict({**made.to_dict(), "max_length": 13})
        with pytest.raises(InputError, match=r"another max_length \(12\)"):
            run_study(other, tmp_path / "out", progress=False)

    def test_a_folder_with_something_else(self, study, tmp_path):
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(InputError, match="something else"):
            run_study(self.grid(study, tmp_path), tmp_path, progress=False)

    @pytest.mark.slow
    def test_killed_at_any_moment_it_goes_on(self, study, tmp_path):
        made = self.grid(study, tmp_path, kill_while=str(tmp_path / "flag"))
        (tmp_path / "flag").touch()
        file = tmp_path / "study.json"  # YAML holds JSON
        file.write_text(json.dumps(made.to_dict()))
        command = [
            sys.executable,
            "-m",
            "bayeslora",
            "compare",
            str(file),
            "--in-process",
            "--output",
            str(tmp_path / "out"),
        ]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        assert killed.returncode == -signal.SIGKILL
        (tmp_path / "flag").unlink()
        before = self.trainings(tmp_path)
        assert "1" not in before
        result = run_study(made, tmp_path / "out", progress=False)
        assert sorted(scored_on_test(result)["seed"]) == [0, 1, 2]
        assert self.trainings(tmp_path) == ["0", "1", "2"]

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX signals")
    def test_terminated_it_takes_the_cells_process_with_it(self, study, tmp_path):
        file, said = tmp_path / "study.json", tmp_path / "pid"
        made = study({"name": PRIOR, "sleep_and_say_in": str(said)})
        file.write_text(json.dumps(made.to_dict()))
        command = [sys.executable, "-m", "bayeslora", "compare", str(file), "--output", str(tmp_path / "out")]
        parent = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while not (said.is_file() and said.read_text()):
            assert parent.poll() is None
            time.sleep(0.1)
        parent.terminate()
        assert b"interrupted" in parent.communicate(timeout=30)[1]
        assert parent.returncode == 130
        with pytest.raises(ProcessLookupError):
            os.kill(int(said.read_text()), 0)

    @pytest.mark.slow
    def test_two_workers_share_a_study(self, study, tmp_path):
        made = self.grid(study, tmp_path)
        made = Study.from_dict({**made.to_dict(), "seeds": [0, 1, 2, 3, 4, 5]})
        file = tmp_path / "study.json"
        file.write_text(json.dumps(made.to_dict()))
        storage = f"sqlite:///{tmp_path}/study.db"
        command = [
            sys.executable,
            "-m",
            "bayeslora",
            "compare",
            str(file),
            "--in-process",
            "--storage",
            storage,
            "--output",
            str(tmp_path / "out"),
        ]
        workers = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        errors = [worker.communicate(timeout=300)[1].decode() for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], errors
        assert self.trainings(tmp_path) == ["0", "1", "2", "3", "4", "5"]
        result = run_study(made, tmp_path / "out", storage=storage, progress=False)
        assert list(scored_on_test(result)["seed"]) == [0, 1, 2, 3, 4, 5]
        assert self.trainings(tmp_path) == ["0", "1", "2", "3", "4", "5"]

    @pytest.mark.slow
    def test_a_process_for_each_cell(self, study, tmp_path):
        (tmp_path / "flag").touch()
        made = self.grid(study, tmp_path, kill_while=str(tmp_path / "flag"), fail_on_seed=2)
        made = Study.from_dict({**made.to_dict(), "retries": 0})
        started = time.monotonic()
        result = run_study(made, tmp_path / "out", isolate=True, progress=False)
        assert list(scored_on_test(result)["seed"]) == [0]
        assert 100 < scored_on_test(result)["peak_memory_mb"][0] < 20_000
        errors = dict(zip(result.failures["seed"], result.failures["error"], strict=True))
        assert errors[2] == "InputError: this seed brings bad luck"
        assert "exit code -9" in errors[1]
        assert time.monotonic() - started < 240


def test_hold_out_makes_a_validation_split(study, place, tmp_path):
    reviews = tmp_path / "reviews"
    reviews.mkdir()
    for split in ("train", "validation"):
        (reviews / f"{split}.csv").write_text((place / "reviews" / f"{split}.csv").read_text())
    task = [{"name": "reviews", "data_dir": str(reviews), "text_columns": "text"}]
    without = study("lora", "temperature", tasks=task)
    result = run_cell(without, only(without), tmp_path / "without")
    assert {row["split"] for row in result["rows"]} == {"validation"}
    assert "hold_out" in result["failures"][0]["error"]
    made = study("lora", "temperature", tasks=task, hold_out=8)
    experiment = Experiment(made, only(made), tmp_path)
    assert (len(experiment.train_data), len(experiment.data("validation")), len(experiment.data("test"))) == (24, 8, 16)
    assert experiment.splits == ("validation", "test")
    result = run_cell(made, only(made), tmp_path / "with")
    assert {row["method"] for row in result["rows"] if row["split"] == "test"} == {"LoRA", "LoRA + temperature*"}


def test_hold_out_where_there_is_no_validation_split(study, place, tmp_path):
    (tmp_path / "reviews").mkdir()
    for split in ("train", "test"):
        (tmp_path / "reviews" / f"{split}.csv").write_text((place / "reviews" / f"{split}.csv").read_text())
    made = study(
        "lora", tasks=[{"name": "reviews", "data_dir": str(tmp_path / "reviews"), "text_columns": "text"}], hold_out=8
    )
    experiment = Experiment(made, only(made), tmp_path)
    assert experiment.splits == ("validation", "test")
    assert len(experiment.train_data) + 8 == experiment.task.data["train"].num_rows + len(experiment.data("validation"))
    assert len(experiment.data("validation")) == 8


def test_a_study_names_shifted_splits_of_its_own_data(study, place, tmp_path):
    """They are scored beside the test split, and a study without them has the digests it had."""
    reviews = tmp_path / "reviews"
    shutil.copytree(place / "reviews", reviews)
    shutil.copy(reviews / "test.csv", reviews / "forum.csv")
    task = {"name": "reviews", "data_dir": str(reviews), "text_columns": "text"}
    made = study({"name": PRIOR}, tasks=[{**task, "shift_splits": ["forum"]}])
    assert Study.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    rows = run_cell(made, only(made), tmp_path / "out")["rows"]
    assert [row["split"] for row in rows] == ["validation", "test", "forum"]
    assert rows[1]["nll"] == rows[2]["nll"]
    without = study({"name": PRIOR}, tasks=[task])
    assert "shift_splits" not in without.to_dict()["tasks"][0]
    assert without.digest != made.digest


def test_compare_in_python(place, tmp_path):
    """The two methods of the demo, with a table and predictions by split and seed; what is wrong is refused."""
    task = load_task("reviews", place / "reviews", text_columns="text")
    config = MonteCLoRAConfig(r=2, target_modules=["query"], sample_scaler=0.2)
    options = {
        "learning_rate": 0.01,
        "batch_size": 8,
        "max_length": 12,
        "num_samples": 3,
        "max_steps": 3,
        "progress": False,
    }
    found = compare(place / "model", task, config, output_dir=tmp_path / "c", seeds=(0, 1), **options)
    names = ["LoRA", "LoRA + temperature*", "MonteCLoRA, mean", "MonteCLoRA, 3 draws"]
    assert list(found.table.index) == [("test", name) for name in names]
    assert len(found.rows) == 2 * len(names)
    assert found.at_mean == {"MonteCLoRA, mean"}
    predictions = found.predictions("test", 1)
    assert set(names) <= set(predictions)
    for row in found.rows:
        probs, labels = found.predictions("test", row["seed"])[row["method"]]
        assert row["nll"] == pytest.approx(-np.log(probs[np.arange(len(labels)), labels]).mean(), rel=1e-5)
    assert (found.runs["MonteCLoRA", 0] / "adapter" / "posterior.safetensors").is_file()
    with pytest.raises(InputError, match="another"):
        compare(place / "model", task, config, output_dir=tmp_path / "c", **{**options, "num_samples": 4})
    with pytest.raises(InputError, match="trained LoRA"):
        compare(place / "model", task, config.replace(mode="post_hoc"), output_dir=tmp_path / "d", **options)
