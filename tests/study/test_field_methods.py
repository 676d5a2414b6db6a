"""The methods of the field: each against its formula, and each moves what it says it moves."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from bayeslora.adapters.groups import find_groups
from bayeslora.adapters.inject import make_samplable
from bayeslora.errors import InputError
from bayeslora.study.cell import run_cell
from bayeslora.study.experiment import Experiment
from bayeslora.study.methods.base import Lineup, make_method
from bayeslora.study.methods.blob import BLoB, KLSteps, MeanField, drawing
from bayeslora.study.methods.draws import using_values
from bayeslora.study.methods.recalibration import Dirichlet, Histogram, Isotonic
from bayeslora.study.methods.scalabl import Spectral
from bayeslora.study.methods.swag import SWAG, Iterates
from bayeslora.study.predictions import read_predictions
from bayeslora.study.spec import MethodSpec, cells
from tests.conftest import tiny_batch, tiny_network

DRAWING = ("blob", "scalabl", "swag", "ivon")


def skip_without_library(name: str) -> None:
    if name == "ivon":
        pytest.importorskip("ivon", reason="ivon-opt is not installed")
    if name.startswith("laplace"):
        pytest.importorskip("laplace", reason="laplace-torch is not installed")


def experiment_of(study, folder, *methods, **changes) -> Experiment:
    made = study(*methods, **changes)
    return Experiment(made, next(cells(made, list(Lineup.of(made.methods).trained))), folder)


def adapted(kind: str = "bert") -> PeftModel:
    """A network whose adapters have no zeros."""
    network = get_peft_model(tiny_network(kind), LoraConfig(r=3, task_type="SEQ_CLS", target_modules="all-linear"))
    for name, parameter in network.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.3)
    return network


class Steps:
    """What a Trainer hands to its callbacks."""

    def __init__(self, optimizer: torch.optim.Optimizer, global_step: int):
        self.optimizer, self.global_step = optimizer, global_step


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAWING)
def test_it_learns_and_its_draws_differ(study, tmp_path, name):
    """At more noise than its authors start with, where that is too little to see on a network this small."""
    skip_without_library(name)
    loud = {
        "blob": {"bayes_eps": 0.3},
        "scalabl": {"bayes_eps": 0.5},
        "swag": {"swag_learning_rate_scale": 1.0},
        "ivon": {},
    }[name]
    made = study(
        {"name": name, **loud},
        learning_rates=[0.02],
        batch_sizes=[16],
        ranks=[4],
        lora={},
        training={"max_steps": 30, "warmup": 0.0},
        keep_adapters=True,
    )
    (cell,) = cells(made, list(Lineup.of(made.methods).trained))
    result = run_cell(made, cell, tmp_path)
    assert result["failures"] == []
    rows = [row for row in result["rows"] if row["split"] == "test"]
    assert min(row["accuracy"] for row in rows) > 0.9
    assert rows[0]["method"].endswith(", mean")  # which post-hoc methods build on
    for row in rows:
        assert (row["mutual_information"] is None) == ("draws" not in row["method"])
        assert row["mutual_information"] is None or row["mutual_information"] > 1e-7
    found = read_predictions(tmp_path / cell.folder, "test")
    mean, *others = (probs for name, (probs, _) in found.items() if "temperature" not in name)
    assert all(np.abs(other - mean).max() > 1e-6 for other in others)
    kept = load_file(tmp_path / cell.folder / "adapter" / "adapter_model.safetensors")
    assert all(key.endswith(".weight") or key.endswith(".bias") for key in kept)  # PEFT can open it


@pytest.mark.parametrize("name", ["blob", "scalabl"])
def test_what_a_variational_method_trains_moves(study, tmp_path, name):
    experiment = experiment_of(study, tmp_path, name, training={"max_steps": 6})
    method = make_method(MethodSpec(name))
    before = {k: v.clone() for k, v in method.adapted(experiment).state_dict().items()}
    trained = method.train(experiment)
    after = trained.network.state_dict()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    of_q = {key for key in after if ".variational." in f".{key}" or "lora_" in key or "modules_to_save" in key}
    assert moved == {key for key in of_q if not key.endswith("pooler.dense")}
    first, second = (
        [predictor.predict("test").probs for predictor in method.predictors(trained, experiment)] for _ in range(2)
    )
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))  # draws are kept


def test_blobs_kl_and_its_gradient_are_the_closed_form():
    network = adapted()
    make_samplable(network)
    groups = find_groups(network)
    family = MeanField(groups, eps=0.4, prior_scale=0.2)
    expected = 0.0
    for group in groups:
        mean, deviation = group.mean().detach().flatten(), family.G[group.name].detach().square().flatten()
        prior = MultivariateNormal(torch.zeros_like(mean), 0.2**2 * torch.eye(len(mean)))
        expected += float(kl_divergence(MultivariateNormal(mean, torch.diag(deviation**2)), prior))
    assert float(family.kl().detach()) == pytest.approx(expected, rel=1e-4)
    start = torch.cat([root.flatten() for root in family.G.values()])
    assert start.min() >= 0.4 / math.sqrt(2)
    assert start.max() <= 0.4

    root, adapter = family.G[groups[0].name], groups[0].adapters[0].lora_A
    before_root, before_mean = root.detach().clone(), adapter.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    optimizer.param_groups[0].update(lr=0.5, initial_lr=1.0)  # half way down the schedule
    steps = KLSteps(family, rate=1e-3, weights=[0.1, 0.3])
    steps.on_optimizer_step(None, Steps(optimizer, 3), None, optimizer=optimizer)
    size = 1e-3 * 0.5 * 0.3
    slope = -2 / before_root + 2 * before_root**3 / 0.2**2  # of -2 log|G| + (G⁴ + μ²)/2σ²
    torch.testing.assert_close(before_root - root, size * slope, rtol=2e-3, atol=1e-7)
    torch.testing.assert_close(before_mean - adapter.weight, size * before_mean / 0.2**2, rtol=2e-3, atol=1e-7)


def test_the_cycle_of_the_kl(study, tmp_path):
    experiment = experiment_of(study, tmp_path, "blob")  # 32 examples in batches of 8
    weights = BLoB().weights(experiment)
    assert len(weights) == int(100 * 32 ** (math.pi / 8) / 8)
    assert sum(weights) == pytest.approx(1)
    assert weights[-1] == pytest.approx(0.5)
    assert weights[-3] == pytest.approx(1 / 8)
    assert BLoB(bayes_klreweighting=False).weights(experiment) == [1 / 4] * 4


def test_scalabls_kl_is_of_the_posterior_from_the_prior():
    network = adapted()
    make_samplable(network)
    groups = find_groups(network)
    start = {adapter.name: adapter.lora_A.weight.detach().clone() for group in groups for adapter in group.adapters}
    family = Spectral(groups, eps=0.4).requires_grad_(False)
    forward = backward = 0.0
    for group in groups:
        for index, adapter in enumerate(group.adapters):
            singular = torch.linalg.svdvals(start[adapter.name])
            torch.testing.assert_close(torch.linalg.svdvals(adapter.lora_A.weight), singular)
            q = MultivariateNormal(singular, torch.diag(family.log_sigma[group.name][index].exp() ** 2))
            p = MultivariateNormal(torch.zeros(group.rank), torch.eye(group.rank))
            forward, backward = forward + float(kl_divergence(q, p)), backward + float(kl_divergence(p, q))
    assert float(family.kl().detach()) == pytest.approx(forward, rel=1e-4)
    assert forward != pytest.approx(backward, rel=0.1)

    torch.manual_seed(0)
    draws = torch.stack([family.noise()[groups[0].name][0] for _ in range(4000)])  # (draws, columns, r)
    right = groups[0].adapters[0].lora_A.parametrizations.weight.original1
    scale = family.log_sigma[groups[0].name][0].exp()
    torch.testing.assert_close(draws.std(0).mT, (scale[:, None] * right.abs()).detach(), rtol=0.06, atol=1e-6)
    assert all(torch.linalg.matrix_rank(draw, tol=1e-5) == 3 for draw in draws[:3])


@pytest.mark.parametrize("family", [lambda g: MeanField(g, 1.0, 0.2), lambda g: Spectral(g, 1.0)])
def test_each_example_of_a_batch_mirrors_the_draw(study, tmp_path, family):
    experiment = experiment_of(study, tmp_path, "blob")
    network = adapted()
    make_samplable(network)
    network.variational = family(find_groups(network))
    experiment.network()  # its likelihood is that of the task
    batch = tiny_batch(1)
    batch = {name: value.repeat(6, *(1,) * (value.dim() - 1)) for name, value in batch.items()}
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    draw = drawing(network.eval(), network.variational.groups, experiment)
    with torch.no_grad():
        means = experiment.outputs(network, inputs)
        with draw(batch):
            drawn = experiment.outputs(network, inputs)
    torch.testing.assert_close(means, means[:1].expand_as(means))
    assert len({round(float(row[0]), 5) for row in drawn}) > 1
    torch.testing.assert_close(experiment.outputs(network, inputs), means)  # the draw is gone


def test_swags_covariance_is_that_of_the_paper():
    """Equation 1: ½ (Σ_diag + D̂ D̂ᵀ / (K − 1)), with each deviation from the mean up to its iterate."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(6, 2, 2, generator=generator, dtype=torch.float64)
    iterates = Iterates({"x": nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))}, rank=3)
    for point in points:
        iterates.collect({"x": point})
    flat = points.flatten(1)
    deviations = torch.stack([flat[i] - flat[: i + 1].mean(0) for i in range(6)])[-3:]
    diagonal = flat.var(0, correction=0)
    torch.testing.assert_close(iterates.mean()["x"].flatten(), flat.mean(0))
    torch.testing.assert_close(iterates.variance(), diagonal)
    full = (torch.diag(diagonal) + deviations.T @ deviations / 2) / 2
    torch.manual_seed(0)
    for low_rank, expected in ((True, full), (False, torch.diag(diagonal))):
        draws = torch.stack([iterates.draw(scale=4.0, low_rank=low_rank)["x"].flatten() for _ in range(20000)])
        error = (torch.cov(draws.T) - 4 * expected).abs().max() / (4 * expected.diagonal().max())
        assert float(error) < 5 * math.sqrt(2 / 20000)


def test_swag_collects_at_a_constant_rate(study, tmp_path, monkeypatch):
    experiment = experiment_of(study, tmp_path, "swag", training={"max_steps": 10})
    method = SWAG(swag_start=0.4, swag_models=3, swag_learning_rate_scale=0.5)
    collected: list[tuple[dict, float]] = []
    collect = Iterates.collect
    monkeypatch.setattr(Iterates, "collect", lambda self: collected.append(point(self)) or collect(self))

    def point(iterates) -> dict:
        return {name: value.detach().clone() for name, value in iterates.parameters.items()}

    trained = method.train(experiment)
    assert len(collected) == 3
    last = dict(trained.network.named_parameters())
    assert all(torch.equal(collected[-1][name], last[name]) for name in collected[-1])
    mean = trained.posterior.mean()
    for name, value in mean.items():
        torch.testing.assert_close(value, torch.stack([one[name] for one in collected]).mean(0))
    assert any(not torch.equal(mean[name], last[name]) for name in mean)
    assert float(trained.posterior.variance().max()) > 0
    only = SWAG(modules_to_swag="lora_only").collected(trained.network)
    assert set(only) < set(mean)
    assert all(".lora_" in name for name in only)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"swag_start": 1.0}, "swag_start is a share"),
        ({"swag_models": 1}, "2 or more"),
        ({"modules_to_swag": "all"}, "'grad_only' or 'lora_only'"),
    ],
)
def test_swag_that_cannot_be(options, says):
    with pytest.raises(InputError, match=says):
        make_method(MethodSpec("swag", options))


def test_swag_needs_steps_to_collect(study, tmp_path):
    experiment = experiment_of(study, tmp_path, "swag", training={"max_steps": 6})
    with pytest.raises(InputError, match="in the last 3 of 6 steps"):
        SWAG().train(experiment)


def test_ivons_draws_have_the_deviation_of_its_hessian(study, tmp_path):
    skip_without_library("ivon")
    experiment = experiment_of(study, tmp_path, "ivon", training={"max_steps": 6, "weight_decay": 1e-4})
    method = make_method(MethodSpec("ivon", {"ess": 1e4, "beta2": 0.9, "num_samples": 400}))
    trained = method.train(experiment)
    optimizer = trained.posterior
    hessian = optimizer.param_groups[0]["hess"]
    assert float(hessian.std()) > 0  # it was learned
    names = [name for name, p in trained.network.named_parameters() if p.requires_grad]
    parameters = dict(trained.network.named_parameters())
    means = torch.cat([parameters[name].detach().flatten() for name in names])
    torch.manual_seed(0)
    draws = []
    for _ in range(400):
        with optimizer.sampled_params():
            draws.append(torch.cat([parameters[name].detach().flatten() for name in names]))
    expected = 1 / (1e4 * (hessian + 1e-4))
    z_scores = (torch.stack(draws) - means) / expected.sqrt()
    assert float(z_scores.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(2 / z_scores.numel()))
    torch.testing.assert_close(means, torch.cat([parameters[name].detach().flatten() for name in names]))


def test_ivon_takes_one_draw_a_step(study, tmp_path):
    skip_without_library("ivon")
    experiment = experiment_of(study, tmp_path, "ivon", training={"max_steps": 2, "gradient_accumulation": 2})
    with pytest.raises(InputError, match="gradient_accumulation"):
        make_method(MethodSpec("ivon")).train(experiment)


def logits_and_jacobians(experiment, network, data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits (n, C), Jacobians in A and B (n, C, P), and labels, example by example."""
    parameters = [p for name, p in network.named_parameters() if ".lora_" in name]
    logits, jacobians = [], []
    for example in data:
        inputs = {name: torch.tensor([value]) for name, value in example.items() if name != "labels"}
        output = experiment.outputs(network, inputs)[0]
        rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in output]
        jacobians.append(torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]))
        logits.append(output.detach())
    return torch.stack(logits).double(), torch.stack(jacobians).double(), [example["labels"] for example in data]


def test_laplace_lora_is_the_diagonal_of_gauss_and_newton(study, tmp_path):
    skip_without_library("laplace")
    experiment = experiment_of(study, tmp_path, "lora", training={"max_steps": 12}, num_samples=4)
    network = Lineup.of(experiment.study.methods).trained["LoRA"].train(experiment).network
    method = make_method(MethodSpec("laplace_lora", {"hessian_structure": "diag", "num_logits": 20000}))
    posterior = method.posterior(network, experiment)
    logits, jacobians, labels = logits_and_jacobians(experiment, network, experiment.train_data)
    probs = logits.softmax(-1)
    curvature = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
    diagonal = torch.einsum("ncp,ncd,ndp->p", jacobians, curvature, jacobians)
    precision = float(posterior.prior_precision)
    torch.testing.assert_close(posterior.posterior_precision.double(), diagonal + precision, rtol=1e-3, atol=1e-4)

    means = torch.cat([p.detach().flatten() for name, p in network.named_parameters() if ".lora_" in name]).double()

    def evidence(prior: float) -> float:
        fit = float(probs.log()[range(len(labels)), labels].sum())
        occam = (len(means) * math.log(prior) - (diagonal + prior).log().sum()) / 2
        return fit + float(occam) - prior * float(means.square().sum()) / 2

    assert float(posterior.log_marginal_likelihood()) == pytest.approx(evidence(precision), rel=1e-3)
    assert evidence(precision) >= max(evidence(precision * 1.3), evidence(precision / 1.3))

    (predictor,) = method.predictors(
        type("T", (), {"network": network}),
        experiment,
        lambda split: experiment.predict(network, experiment.data(split)),
    )
    found = predictor.predict("test").probs
    test_logits, test_jacobians, _ = logits_and_jacobians(experiment, network, experiment.data("test"))
    covariance = torch.einsum("ncp,p,ndp->ncd", test_jacobians, 1 / (diagonal + precision), test_jacobians)
    torch.manual_seed(0)
    noise = MultivariateNormal(test_logits, covariance + 1e-9 * torch.eye(2)).sample((20000,))
    np.testing.assert_allclose(found, noise.softmax(-1).mean(0), atol=0.02)
    assert all(p.requires_grad for name, p in network.named_parameters() if "modules_to_save" in name)


@pytest.mark.slow
def test_laplace_lora_takes_confidence_away(study, tmp_path):
    skip_without_library("laplace")
    kinds = ({}, {"hessian_structure": "diag"}, {"prior_structure": "layerwise"})
    made = study(
        "lora",
        *({"name": "laplace_lora", **kind} for kind in kinds),
        learning_rates=[0.02],
        batch_sizes=[16],
        training={"max_steps": 40, "warmup": 0.0},
    )
    (cell,) = cells(made, list(Lineup.of(made.methods).trained))
    assert run_cell(made, cell, tmp_path)["failures"] == []
    plain, *laplace = (probs for probs, _ in read_predictions(tmp_path / cell.folder, "test").values())
    assert len(laplace) == 3
    assert all(probs.max(1).mean() < plain.max(1).mean() - 1e-3 for probs in laplace)
    assert np.abs(laplace[0] - laplace[1]).max() > 1e-4


def test_isotonic_is_the_mean_of_what_violates_the_order():
    scores = np.array([0.1, 0.3, 0.4, 0.6, 0.8])
    labels = np.array([0, 1, 0, 1, 1])  # the second and third are pooled
    mapped = Isotonic().fit(np.stack([1 - scores, scores], -1), labels)
    found = mapped(np.stack([1 - scores, scores], -1))[:, 1]
    np.testing.assert_allclose(found, [1 / 7, 0.5, 0.5, 6 / 7, 6 / 7])  # within 1/(n + 2) of certainty


def test_histogram_is_the_share_in_each_bin():
    scores = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
    labels = np.array([0, 1, 0, 0, 1, 1, 0, 1])
    mapped = Histogram(bins=2).fit(np.stack([1 - scores, scores], -1), labels)
    new = np.array([0.0, 0.35, 0.55, 1.0])
    np.testing.assert_allclose(mapped(np.stack([1 - new, new], -1))[:, 1], [0.25, 0.25, 0.75, 0.75])


@pytest.mark.parametrize("method", [Isotonic(), Histogram(), Dirichlet()], ids=lambda method: method.name)
def test_a_recalibration_finds_what_was_done_to_the_probabilities(method):
    """Labels from p, and probabilities handed over that are p to the third power, with one class favoured."""
    rng = np.random.default_rng(0)
    true = rng.dirichlet(np.ones(3), 6000)
    labels = (true.cumsum(1) > rng.random((6000, 1))).argmax(1)
    wrong = true**3 * [1, 3, 1]
    wrong /= wrong.sum(1, keepdims=True)
    mapped = method.fit(wrong[:3000], labels[:3000])(wrong[3000:])

    def nll(probs) -> float:
        return float(-np.log(probs[np.arange(3000), labels[3000:]]).mean())

    np.testing.assert_allclose(mapped.sum(1), 1)
    optimum = nll(true[3000:])
    assert nll(mapped) < optimum + 0.25 * (nll(wrong[3000:]) - optimum)
    if method.name == "dirichlet":  # the family holds the truth
        np.testing.assert_allclose(mapped, true[3000:], atol=0.08)


def test_dirichlet_needs_examples_of_each_class():
    with pytest.raises(InputError, match="needs 5 validation examples of each of the 3 classes"):
        Dirichlet().fit(np.full((8, 3), 1 / 3), np.array([0, 0, 0, 0, 1, 1, 1, 1]))


def test_values_are_put_back_after_an_error():
    layer = nn.Linear(2, 1)
    before = layer.weight.detach().clone()

    def fail() -> None:
        with using_values(layer, {"weight": torch.ones(1, 2)}):
            raise ZeroDivisionError(float(layer.weight.detach().sum()))

    with pytest.raises(ZeroDivisionError, match=r"2\.0"):
        fail()
    assert torch.equal(layer.weight, before)
