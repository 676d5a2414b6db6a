"""Posteriors on a finished LoRA in a study: ours with each shape and rule, and TFB by its paper's formula."""

import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from bayeslora import BayesLoRA
from bayeslora.errors import InputError
from bayeslora.inference.tuning import Widths
from bayeslora.models import Tuning
from bayeslora.study.cell import run_cell
from bayeslora.study.methods.base import Lineup, make_method
from bayeslora.study.methods.finished import TFB
from bayeslora.study.predictions import read_predictions
from bayeslora.study.spec import MethodSpec, cells
from tests.conftest import tiny_dataset, tiny_network

DATA = tiny_dataset(30, rule="random")


@pytest.mark.slow
def test_every_shape_and_rule_in_one_cell(study, place, tmp_path):
    """Some labels are wrong, so that noise is of use."""
    reviews = shutil.copytree(place / "reviews", tmp_path / "reviews")
    first, *rows = (reviews / "train.csv").read_text().splitlines()
    wrong = [row if i % 7 else row[:-1] + str(1 - int(row[-1])) for i, row in enumerate(rows)]
    for split in ("train", "validation", "test"):
        (reviews / f"{split}.csv").write_text("\n".join([first, *wrong]) + "\n")
    study = study(
        "lora",
        "bayesianized",
        {"name": "bayesianized", "shape": "curvature"},
        {"name": "bayesianized", "rule": "agreement", "agreement": 0.8, "antithetic": True},
        "tfb",
        {"name": "tfb", "anchors_from": "validation", "label": "TFB, new anchors"},
        tasks=[{"name": "reviews", "data_dir": str(reviews), "text_columns": "text"}],
        learning_rates=[0.02],
        num_samples=4,
        training={"max_steps": 40},
    )
    (cell,) = cells(study, list(Lineup.of(study.methods).trained))
    result = run_cell(study, cell, tmp_path)
    assert result["failures"] == []
    found = read_predictions(tmp_path / cell.folder, "test")
    names = ["bayesianized*", "bayesianized, curvature*", "bayesianized, agreement", "TFB", "TFB, new anchors"]
    assert found.keys() == {"LoRA", *(f"LoRA + {name}" for name in names)}
    rows = {(row["method"], row["split"]): row for row in result["rows"]}
    nll = {name: rows[f"LoRA + {name}", "validation"]["nll"] for name in names}
    lora = rows["LoRA", "validation"]["nll"]
    assert nll["bayesianized*"] <= lora * (1 + 1e-6)
    assert nll["bayesianized, curvature*"] <= lora * (1 + 1e-6)
    assert nll["TFB, new anchors"] <= lora * 1.003 * (1 + 1e-6)
    assert not np.array_equal(found["LoRA"][0], found["LoRA + bayesianized, agreement"][0])
    assert rows["LoRA + bayesianized, agreement", "test"]["mutual_information"] > 0


def trained():
    torch.manual_seed(0)
    lora = LoraConfig(r=3, target_modules=["query", "value"], task_type="SEQ_CLS")
    network = get_peft_model(tiny_network(num_labels=5), lora)
    with torch.no_grad():
        network.base_model.model.classifier.modules_to_save["default"].weight.normal_(std=2.0)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    return network


def test_tfbs_noise_is_the_papers():
    """With B = U diag(d) Vᵀ the rows of VᵀA have independent noise of standard deviation σ/d_i, with one σ."""
    bayes = BayesLoRA.from_adapter(trained(), DATA, shape="output", width=1.0, config=TFB().config())
    draws = bayes.posterior_draws(num_samples=600, adapters=bayes.adapter_names)
    sizes = []
    for group in bayes.model.groups:
        for adapter, mean in zip(group.adapters, group.mean().detach(), strict=True):
            _, d, vt = torch.linalg.svd(adapter.layer.lora_B[adapter.key].weight.detach(), full_matrices=False)
            noise = vt @ (torch.as_tensor(draws.A[adapter.name]) - mean.mT)  # (draws, r, columns)
            covariance = torch.einsum("src,stc->rt", noise, noise) / (noise.shape[0] * noise.shape[2])
            scaled = d.diag() @ covariance @ d.diag()
            sizes.append(scaled.diagonal())
            off = scaled - scaled.diagonal().diag()
            assert off.abs().max() < 0.06 * scaled.diagonal().mean()
    sizes = torch.cat(sizes)
    assert ((sizes / sizes.mean() - 1).abs() < 5 * (2 / (600 * 16)) ** 0.5 + 0.01).all()


def test_tfbs_width_is_the_largest_that_holds():
    bayes = BayesLoRA.from_adapter(trained(), DATA, shape="output", width=1.0, config=TFB().config())
    bayes.tuning = None
    answers = bayes.predict(DATA, num_samples=0, progress=False).probs.argmax(-1)
    anchors = [row | {"labels": int(answer)} for row, answer in zip(DATA, answers, strict=True)]  # known by heart
    widths = Widths(bayes, anchors, num_samples=8)
    found = widths.choose(rise=0.003, progress=False)

    def nll(width):
        bayes.tuning = Tuning(width)
        return bayes.predict(anchors, num_samples=8 if width else 0, progress=False).nll

    assert nll(found.width) == pytest.approx(found.nll)
    assert found.nll <= 1.003 * nll(0.0)
    tried = {width: one.nll for (width, _), one in widths._tried.items()}
    violating = min(width for width in tried if tried[width] > 1.003 * found.nll_at_mean)
    assert violating > found.width
    assert not [w for w in tried if found.width < w < violating]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("bayesianized", {"shape": "round"}, "shape takes isotropic or output or curvature"),
        ("bayesianized", {"rule": "luck"}, "rule takes labels or agreement"),
        ("tfb", {"anchors_from": "test"}, "anchors_from takes train or validation"),
    ],
)
def test_options_that_there_are_not(name, options, says):
    with pytest.raises(InputError, match=says):
        make_method(MethodSpec(name, options))
