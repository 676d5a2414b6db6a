"""Posterior draws as ArviZ data, on either generation of ArviZ, with a stand-in for the fitted model."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xarray

import bayeslora.analysis
from bayeslora.analysis import (
    build_inference_data,
    held_out_elpd,
    leave_one_out,
    load_arviz,
    save_arviz,
    to_arviz,
)
from bayeslora.errors import InputError

# ArviZ before 1.0 announces its successor once a day, at import.
pytestmark = pytest.mark.filterwarnings("ignore:\\s*ArviZ is undergoing a major refactor:FutureWarning")

NAMES = ["encoder.layer.0.attention.self.query", "encoder.layer.0.output.dense", "head/up"]
RANKS = [2, 3, 3]
WIDTHS = [4, 6, 5]
LABEL_NAMES = ("no", "perhaps", "yes")
CLASS_PROBS = np.array([0.7, 0.3, 0.0])


class FakeBayes:
    """Draws from known distributions: flat Dirichlet weights, Wishart covariances, log-normal noise.

    Predicts ``CLASS_PROBS`` for every example, with labels drawn once. Ranks and widths differ by adapter.
    """

    monteclora_config = SimpleNamespace(to_dict=lambda: {"num_components": 4, "sample_scaler": 0.005})

    def __init__(self, *, labels=(0, 1, 0, 0, 1), label_names=LABEL_NAMES):
        self.labels = None if labels is None else np.array(labels)
        self.label_names = label_names
        self.calls = []

    def version_info(self):
        return {"bayeslora": "0.1.0", "torch": "2.9.0"}

    def posterior_draws(self, *, num_samples, seed, adapters, first_draw=0):
        self.calls.append(("posterior_draws", num_samples, seed, tuple(adapters), first_draw))
        return self._draws(num_samples, seed, adapters)

    def prior_draws(self, *, num_samples, seed, adapters, first_draw=0):
        """Other draws, with ten times the noise."""
        self.calls.append(("prior_draws", num_samples, seed, tuple(adapters), first_draw))
        draws = self._draws(num_samples, seed + 1000, adapters)
        draws.noise_scale *= 10
        return draws

    def _draws(self, num_samples, seed, adapters):
        rng = np.random.default_rng(seed)
        covariance = np.full((num_samples, 3, 3, 3), np.nan)
        for k, rank in enumerate(RANKS):
            factor = rng.normal(size=(num_samples, rank, rank))
            covariance[:, k, :rank, :rank] = factor @ factor.swapaxes(1, 2)
        return SimpleNamespace(
            adapters=list(NAMES),
            mixture_weights=rng.dirichlet(np.ones(4), size=(num_samples, 3)),
            covariance=covariance,
            noise_scale=np.exp(rng.normal(size=(num_samples, 3))),
            mean_scale=np.array([0.5, 2.0, 0.0]),
            A={
                name: rng.normal(size=(num_samples, rank, width))
                for name, rank, width in zip(NAMES, RANKS, WIDTHS, strict=True)
                if name in adapters
            },
        )

    def predict(self, dataset, *, num_samples, seed, batch_size, first_draw=0, prior=False):
        self.calls.append(("predict", len(dataset), num_samples, seed, batch_size, first_draw, prior))
        with np.errstate(divide="ignore"):
            log_probs = np.log(np.broadcast_to(CLASS_PROBS, (num_samples, len(dataset), 3)))
        return SimpleNamespace(
            sample_log_probs=log_probs, labels=self.labels, label_names=self.label_names, sample_means=None
        )


class FakeCoin(FakeBayes):
    """Coins of one kind, ``P(1) = theta`` with a flat prior: draws from the exact posterior of theta."""

    def predict(self, dataset, *, num_samples, seed, batch_size, first_draw=0, prior=False):
        ones = sum(dataset)
        theta = np.random.default_rng(seed).beta(1 + ones, 1 + len(dataset) - ones, size=(num_samples, 1))
        log_probs = np.log(np.stack([1 - theta, theta], axis=-1))
        return SimpleNamespace(
            sample_log_probs=np.broadcast_to(log_probs, (num_samples, len(dataset), 2)),
            labels=np.array(dataset),
            label_names=("tails", "heads"),
        )


class FakeRegression(FakeBayes):
    """``y_i ~ N(theta, 1)`` with ``theta ~ N(0, 100)``: draws from the exact posterior of theta."""

    def predict(self, dataset, *, num_samples, seed, batch_size, first_draw=0, prior=False):
        targets = np.asarray(dataset)
        mean, variance = normal_posterior(targets)
        theta = np.random.default_rng(seed).normal(mean, np.sqrt(variance), size=(num_samples, 1))
        return SimpleNamespace(
            sample_log_probs=None,
            sample_means=np.broadcast_to(theta, (num_samples, len(targets))),
            sample_log_likelihood=normal_log_density(targets, theta, 1.0),
            noise_scale=1.0,
            labels=targets,
            label_names=None,
        )


def normal_posterior(targets):
    variance = 1 / (1 / 100 + len(targets))
    return variance * targets.sum(), variance


def normal_log_density(x, mean, variance):
    return -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)


def group_names(data) -> set[str]:
    """Group names of an InferenceData or a DataTree."""
    return set(data.groups()) if callable(data.groups) else set(data.children)


def dataset_of(data, group) -> xarray.Dataset:
    values = data[group]
    return values if isinstance(values, xarray.Dataset) else values.to_dataset()


@pytest.fixture
def data():
    return to_arviz(FakeBayes(), "abcde", num_samples=50, seed=3, adapters=NAMES[:2])


def test_arguments_reach_the_model():
    bayes = FakeBayes()
    to_arviz(bayes, "abcde", num_samples=7, seed=11, adapters=NAMES[1:], batch_size=2)
    assert bayes.calls == [
        ("posterior_draws", 7, 11, tuple(NAMES[1:]), 0),
        ("prior_draws", 7, 11, tuple(NAMES[1:]), 0),
        ("predict", 5, 7, 11, 2, 0, False),
        ("predict", 5, 7, 11, 2, 0, True),
    ]


def test_groups_variables_and_dimensions(data):
    sampled = ("chain", "draw")
    drawn = {
        "mixture_weights": (*sampled, "adapter", "component"),
        "covariance": (*sampled, "adapter", "rank", "rank_other"),
        "noise_scale": (*sampled, "adapter"),
        "noise_to_signal": (*sampled, "adapter"),
        "noise_to_signal_map": (*sampled, "layer", "projection"),
        f"A[{NAMES[0]}]": (*sampled, "rank", "column"),
        f"A[{NAMES[1]}]": (*sampled, "rank", "column"),
    }
    predicted = {"class_probs": (*sampled, "example", "class"), "labels": (*sampled, "example")}
    expected = {
        "posterior": drawn,
        "prior": drawn,
        "constant_data": dict.fromkeys(("mean_scale", "layer_of", "projection_of"), ("adapter",)),
        "posterior_predictive": predicted,
        "prior_predictive": predicted,
        "log_likelihood": {"labels": (*sampled, "example")},
        "observed_data": {"labels": ("example",)},
    }
    assert group_names(data) == set(expected)
    found = {g: {n: v.dims for n, v in dataset_of(data, g).data_vars.items()} for g in expected}
    assert found == expected
    assert dict(dataset_of(data, "posterior").sizes) == {
        **{"chain": 1, "draw": 50, "adapter": 3, "component": 4},
        **{"rank": 3, "rank_other": 3, "column": 6, "layer": 2, "projection": 3},
    }


def test_every_dimension_is_named(data):
    posterior, predictive = data["posterior"], data["posterior_predictive"]
    assert list(posterior["adapter"].values) == NAMES
    assert list(data["constant_data"]["adapter"].values) == NAMES
    for name, size in {"component": 4, "rank": 3, "rank_other": 3, "column": 6, "draw": 50}.items():
        np.testing.assert_array_equal(posterior[name], np.arange(size))
    assert list(predictive["class"].values) == list(LABEL_NAMES)
    np.testing.assert_array_equal(predictive["example"], np.arange(5))


def test_adapters_are_found_by_layer_and_projection(data):
    posterior, constant = data["posterior"], data["constant_data"]
    np.testing.assert_array_equal(constant["layer_of"], [0, 0, -1])
    assert list(constant["projection_of"].values) == ["query", "dense", "head/up"]
    grid = posterior["noise_to_signal_map"]
    for name, layer, projection in zip(NAMES, [0, 0, -1], ["query", "dense", "head/up"], strict=True):
        np.testing.assert_array_equal(
            grid.sel(layer=layer, projection=projection), posterior["noise_to_signal"].sel(adapter=name)
        )
    assert np.isnan(grid.sel(layer=-1, projection="query")).all()


def test_prior_holds_the_priors_draws(data):
    draws = FakeBayes().prior_draws(num_samples=50, seed=3, adapters=NAMES[:2])
    np.testing.assert_array_equal(data["prior"]["noise_scale"][0], draws.noise_scale)
    np.testing.assert_array_equal(data["prior"][f"A[{NAMES[1]}]"][0], draws.A[NAMES[1]])
    drawn = [data[group]["labels"].values for group in ("posterior_predictive", "prior_predictive")]
    assert (drawn[0] != drawn[1]).any()  # the same probabilities, other labels


def test_prior_can_be_left_out():
    bayes = FakeBayes()
    found = group_names(to_arviz(bayes, "abcde", num_samples=3, prior=False))
    assert found == {"posterior", "constant_data", "posterior_predictive", "log_likelihood", "observed_data"}
    assert [call[0] for call in bayes.calls] == ["posterior_draws", "predict"]


def test_posterior_holds_the_draws(data):
    draws = FakeBayes().posterior_draws(num_samples=50, seed=3, adapters=NAMES[:2])
    posterior = data["posterior"]
    for name in ("mixture_weights", "covariance", "noise_scale"):
        np.testing.assert_array_equal(posterior[name][0], getattr(draws, name))
    by_name = posterior["noise_to_signal"].sel(chain=0, adapter=NAMES[1])
    np.testing.assert_allclose(by_name, draws.noise_scale[:, 1] / 2.0)
    np.testing.assert_array_equal(data["constant_data"]["mean_scale"], [0.5, 2.0, 0.0])


def test_mean_of_zero_has_no_ratio(data):
    ratio = data["posterior"]["noise_to_signal"]
    np.testing.assert_array_equal(np.isnan(ratio).any("draw")[0], [False, False, True])


def test_smaller_adapters_are_filled_with_nan(data):
    draws = FakeBayes().posterior_draws(num_samples=50, seed=3, adapters=NAMES[:2])
    small = data["posterior"][f"A[{NAMES[0]}]"].values[0]
    np.testing.assert_array_equal(small[:, :2, :4], draws.A[NAMES[0]])
    assert np.isnan(small[:, 2:]).all()
    assert np.isnan(small[:, :, 4:]).all()
    np.testing.assert_array_equal(data["posterior"][f"A[{NAMES[1]}]"][0], draws.A[NAMES[1]])


def test_no_matrix_unless_asked_for_and_no_slash_in_its_name():
    assert "column" not in to_arviz(FakeBayes(), num_samples=3)["posterior"].sizes
    assert "A[head.up]" in to_arviz(FakeBayes(), num_samples=3, adapters=["head/up"])["posterior"]


def test_attributes_say_how_it_was_made(data):
    assert json.loads(data.attrs["config"]) == {"num_components": 4, "sample_scaler": 0.005}
    assert json.loads(data.attrs["versions"]) == {"bayeslora": "0.1.0", "torch": "2.9.0"}
    assert (data.attrs["seed"], data.attrs["num_samples"]) == (3, 50)
    assert (data.attrs["inference_library"], data.attrs["inference_library_version"]) == ("bayeslora", "0.1.0")


def test_log_likelihood_is_the_log_probability_of_the_label(data):
    expected = np.log(CLASS_PROBS[[0, 1, 0, 0, 1]])
    np.testing.assert_allclose(data["log_likelihood"]["labels"][0], np.broadcast_to(expected, (50, 5)))
    np.testing.assert_array_equal(data["observed_data"]["labels"], [0, 1, 0, 0, 1])
    np.testing.assert_allclose(data["posterior_predictive"]["class_probs"][0, 7, 2], CLASS_PROBS)


def test_drawn_labels_follow_the_class_probabilities():
    drawn = to_arviz(FakeBayes(), "abcde", num_samples=2000)["posterior_predictive"]["labels"].values
    share = np.bincount(drawn.ravel(), minlength=3) / drawn.size
    error = np.sqrt(0.7 * 0.3 / drawn.size)
    assert share[2] == 0  # its probability is zero
    assert abs(share[0] - 0.7) < 4 * error


def test_seed_decides_everything():
    first, again, other = (to_arviz(FakeBayes(), "abcde", num_samples=40, seed=s) for s in (0, 0, 1))
    for group in group_names(first):
        xarray.testing.assert_equal(dataset_of(first, group), dataset_of(again, group))
    labels = "posterior_predictive", "labels"
    assert (first[labels[0]][labels[1]].values != other[labels[0]][labels[1]].values).any()


def test_without_data_set_only_the_posterior():
    bayes = FakeBayes()
    assert group_names(to_arviz(bayes, num_samples=3)) == {"posterior", "prior", "constant_data"}
    assert [call[0] for call in bayes.calls] == ["posterior_draws", "prior_draws"]


def test_without_labels_nothing_observed_and_classes_are_numbered():
    data = to_arviz(FakeBayes(labels=None, label_names=None), "abcde", num_samples=3)
    assert group_names(data) == {"posterior", "prior", "constant_data", "posterior_predictive", "prior_predictive"}
    np.testing.assert_array_equal(data["posterior_predictive"]["class"], [0, 1, 2])


def test_regression_has_means_and_real_labels():
    targets = np.array([0.5, -1.0, 2.0])
    data = to_arviz(FakeRegression(), targets, num_samples=2000, seed=5)
    predictive = data["posterior_predictive"]
    assert predictive["mean"].dims == predictive["labels"].dims == ("chain", "draw", "example")
    np.testing.assert_array_equal(data["observed_data"]["labels"], targets)
    theta = predictive["mean"].values[0]
    np.testing.assert_allclose(data["log_likelihood"]["labels"][0], normal_log_density(targets, theta, 1.0))
    noise = predictive["labels"].values[0] - theta  # standard normal: the variance of s^2 is 2 / count
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)


def test_regression_without_a_noise_scale_draws_no_labels():
    bayes = FakeRegression()
    bayes.predict = lambda *_, **__: SimpleNamespace(sample_means=np.zeros((3, 5)), labels=None)
    data = to_arviz(bayes, "abcde", num_samples=3, prior=False)
    assert group_names(data) == {"posterior", "constant_data", "posterior_predictive"}
    assert set(dataset_of(data, "posterior_predictive").data_vars) == {"mean"}


HISTORY = [
    {"step": 5, "loss": 1.5, "elbo/task": 0.7, "elbo/kl_pi_r8": 2.0, "elbo/kl_A_r8": 30.0, "epoch": 0.5}
    | {f"noise_to_signal/{name}": 0.1 * k for k, name in enumerate(NAMES)},
    {"step": 10, "loss": 1.25, "elbo/task": 0.5, "elbo/kl_pi_r8": 2.5, "elbo/kl_A_r8": 20.0, "epoch": 1.0},
    {"step": 10, "eval_loss": 0.6, "eval_runtime": 3.2, "epoch": 1.0},
    {"step": 10, "eval_loss": 0.4},  # of the best checkpoint, at the end
    {"train_runtime": 9.0, "step": 10, "total_flos": 7.0, "train_loss": 1.4},
    {"note": "no step"},
]


def test_sample_stats_hold_what_the_run_logged_at_each_step():
    data = to_arviz(FakeBayes(), num_samples=3, history=HISTORY)
    stats = dataset_of(data, "sample_stats")
    assert set(stats.data_vars) == {"loss", "elbo_task", "elbo_kl_site", "eval_loss", "noise_to_signal_trace"}
    np.testing.assert_array_equal(stats["step"], [5, 10])
    np.testing.assert_array_equal(stats["loss"], [1.5, 1.25])
    np.testing.assert_array_equal(stats["eval_loss"], [np.nan, 0.6])
    assert stats["elbo_kl_site"].dims == ("step", "site")
    np.testing.assert_array_equal(stats["elbo_kl_site"].sel(site="A_r8"), [30, 20])
    np.testing.assert_array_equal(stats["noise_to_signal_trace"].sel(step=5), [0, 0.1, 0.2])
    assert list(stats["adapter"].values) == NAMES


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([{"step": 1, "loss": "low"}, {"loss": 2.0}], "holds no number of any step"),
        ([{"step": 1, "noise_to_signal/other": 0.1}], "a network with other adapters"),
    ],
)
def test_a_history_of_something_else_is_refused(history, message):
    with pytest.raises(InputError, match=message):
        to_arviz(FakeBayes(), num_samples=3, history=history)


def test_run_and_history_exclude_each_other():
    with pytest.raises(InputError, match=r"run= or history=, not both"):
        to_arviz(FakeBayes(), num_samples=3, run="runs/x", history=HISTORY)


def test_posterior_and_predictions_must_share_a_seed():
    with pytest.raises(InputError, match="seed=None would draw other networks"):
        to_arviz(FakeBayes(), "abcde", num_samples=3, seed=None)


def test_labels_of_an_unlabelled_split_are_refused():
    with pytest.raises(InputError, match=r"labels must lie in 0 \.\. 2 .* \(the first is -1\)"):
        to_arviz(FakeBayes(labels=[-1] * 5), "abcde", num_samples=3)


def test_other_tasks_are_refused():
    bayes = FakeBayes()
    bayes.predict = lambda *_, **__: SimpleNamespace(labels=None)
    with pytest.raises(InputError, match=r"neither sample_log_probs .* nor sample_means"):
        to_arviz(bayes, "abcde", num_samples=3)


def test_build_from_plain_arrays():
    values = np.arange(6.0).reshape(1, 2, 3)
    data = build_inference_data(
        {"posterior": {"x": values}, "observed_data": {"y": np.arange(3)}},
        coords={"city": ["a", "b", "c"]},
        dims={"x": ("city",), "y": ("city",)},
        attrs={"note": "hand-made"},
    )
    assert data.attrs["note"] == "hand-made"
    np.testing.assert_array_equal(data["posterior"]["x"].sel(city="b"), [[1, 4]])
    assert data["observed_data"]["y"].sel(city="c") == 2


def test_netcdf_round_trip_keeps_everything(data, tmp_path):
    path = save_arviz(data, tmp_path / "draws.nc")
    loaded = load_arviz(path)
    assert type(loaded) is type(data)
    assert group_names(loaded) == group_names(data)
    for group in group_names(data):
        xarray.testing.assert_equal(dataset_of(loaded, group), dataset_of(data, group))
    for name in ("config", "versions", "seed", "num_samples"):
        assert loaded.attrs[name] == data.attrs[name]


def test_loaded_data_outlive_their_file_and_can_be_saved_over_it(data, tmp_path):
    path = save_arviz(data, tmp_path / "draws.nc")
    loaded = load_arviz(str(path))
    save_arviz(loaded, path)
    again = load_arviz(path)
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"overwritten")
    xarray.testing.assert_equal(dataset_of(again, "posterior"), dataset_of(data, "posterior"))


def test_interrupted_save_leaves_the_old_file(data, tmp_path):
    def write_half(name, **_):
        with open(name, "w") as file:
            file.write("half")
        raise OSError("disk full")

    path = save_arviz(data, tmp_path / "draws.nc")
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        save_arviz(SimpleNamespace(to_netcdf=write_half), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_missing_file_and_missing_folder_are_named(data, tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*draws\.nc; write one with save_arviz"):
        load_arviz(tmp_path / "draws.nc")
    with pytest.raises(InputError, match=r"there is no folder .*runs; make it first"):
        save_arviz(data, tmp_path / "runs" / "draws.nc")


def test_arviz_summary_names_rows_and_agrees_with_numpy(data):
    import arviz

    table = arviz.summary(data, var_names=["noise_scale", "mixture_weights"], kind="stats", round_to="none")
    draws = FakeBayes().posterior_draws(num_samples=50, seed=3, adapters=())
    assert table.loc[f"noise_scale[{NAMES[1]}]", "mean"] == pytest.approx(draws.noise_scale[:, 1].mean())
    row = table.loc[f"mixture_weights[{NAMES[0]}, 2]"]
    assert row["sd"] == pytest.approx(draws.mixture_weights[:, 0, 2].std(ddof=1), rel=0.02)
    assert len(table) == 3 + 3 * 4


def test_arviz_summary_of_everything_runs(data):
    import arviz

    table = arviz.summary(data)
    assert len(table) == 3 * 4 + 3 * 9 + 3 + 3 + 2 * 3 + 2 * 18


def normal_leave_one_out(targets) -> float:
    """Sum over i of ``log p(y_i | all the others)``, in closed form."""
    total = 0.0
    for i, target in enumerate(targets):
        mean, variance = normal_posterior(np.delete(targets, i))
        total += normal_log_density(target, mean, 1 + variance)
    return total


def coin_leave_one_out(coins) -> float:
    """The same for a flat prior on the coin: ``p(y_i = 1 | the others) = (1 + their ones) / (2 + n - 1)``."""
    ones, count = sum(coins), len(coins)
    return ones * np.log(ones / (count + 1)) + (count - ones) * np.log((count - ones) / (count + 1))


NORMAL_DATA = np.random.default_rng(6).normal(1.5, 1.0, size=30)
COIN_DATA = [1] * 14 + [0] * 26


@pytest.mark.parametrize(
    ("bayes", "targets", "exact"),
    [
        (FakeRegression(), NORMAL_DATA, normal_leave_one_out(NORMAL_DATA)),
        (FakeCoin(), COIN_DATA, coin_leave_one_out(COIN_DATA)),
    ],
)
def test_arviz_leave_one_out_finds_the_exact_value(bayes, targets, exact):
    import arviz

    data = to_arviz(bayes, targets, num_samples=4000, prior=False)
    result = leave_one_out(data)
    assert type(result) is type(arviz.loo(data))
    estimate = result.elpd if hasattr(result, "elpd") else result.elpd_loo
    pointwise = data["log_likelihood"]["labels"].values[0]
    weights = np.exp(-pointwise)
    errors = weights.std(axis=0) / weights.mean(axis=0) / np.sqrt(4000)
    in_sample = np.log(np.exp(pointwise).mean(axis=0)).sum()
    bound = 3 * errors.sum()  # all the errors have one cause, theta, and may add up
    assert abs(estimate - exact) < bound
    assert in_sample - exact > bound  # so the check tells the two apart
    held_out = held_out_elpd(data)  # as if the draws had not seen these data
    assert (held_out.elpd if hasattr(held_out, "elpd") else held_out.elpd_loo) == pytest.approx(in_sample)


class FakePoint(FakeBayes):
    """A point estimate, such as plain LoRA: every draw is the same network."""

    def predict(self, dataset, *, num_samples, seed, batch_size, first_draw=0, prior=False):
        log_probs = np.log(np.random.default_rng(1).dirichlet(np.ones(3), size=len(dataset)))
        return SimpleNamespace(
            sample_log_probs=np.broadcast_to(log_probs, (num_samples, *log_probs.shape)),
            labels=np.arange(len(dataset)) % 3,
            label_names=LABEL_NAMES,
        )


class FakeDraws(FakePoint):
    """The same with noise: every draw is another network."""

    def predict(self, dataset, *, num_samples, seed, batch_size, first_draw=0, prior=False):
        point = super().predict(dataset, num_samples=num_samples, seed=seed, batch_size=batch_size)
        logits = point.sample_log_probs + 0.3 * np.random.default_rng(2).normal(size=point.sample_log_probs.shape)
        point.sample_log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return point


def test_identical_draws_have_no_leave_one_out():
    point = to_arviz(FakePoint(), "x" * 40, num_samples=64, prior=False)
    with pytest.raises(InputError, match=r"all draws have the same log-likelihood.* use held_out_elpd"):
        leave_one_out(point)


def test_one_saturated_example_is_named():
    values = np.random.default_rng(0).normal(size=(1, 64, 9))
    values[:, :, 4] = 0.0
    groups = {"posterior": {"x": np.zeros((1, 64))}, "log_likelihood": {"labels": values}}
    with pytest.raises(InputError, match="give example 4 the same log-likelihood"):
        leave_one_out(build_inference_data(groups, {}, {"labels": ["example"]}, {}))


def test_leave_one_out_needs_draws_and_labels():
    with pytest.raises(InputError, match="at least 25 draws, and there are 24"):
        leave_one_out(to_arviz(FakeDraws(), "x" * 9, num_samples=24, prior=False))
    for function in (leave_one_out, held_out_elpd):
        with pytest.raises(InputError, match="no log-likelihood"):
            function(to_arviz(FakeBayes(labels=None), "abc", num_samples=30, prior=False))


@pytest.mark.filterwarnings("ignore:The inplace keyword")  # ArviZ 0.23 under pandas 3.1
def test_arviz_compares_a_point_with_draws():
    """By the mean over draws of the probability of the label, with the paired standard error."""
    import arviz

    fakes = {"LoRA": FakePoint(), "MonteCLoRA": FakeDraws()}
    data = {name: to_arviz(fake, "x" * 200, num_samples=64, prior=False) for name, fake in fakes.items()}
    table = arviz.compare({name: held_out_elpd(values) for name, values in data.items()})
    pointwise = {
        name: np.log(np.exp(values["log_likelihood"]["labels"].values[0]).mean(axis=0)) for name, values in data.items()
    }
    difference = pointwise["LoRA"] - pointwise["MonteCLoRA"]
    column = "elpd" if "elpd" in table else "elpd_loo"
    for name, values in pointwise.items():
        assert table.loc[name, column] == pytest.approx(values.sum(), rel=0.02)  # 1.x rounds
    worse = table.index[1]
    assert abs(table.loc[worse, "elpd_diff"]) == pytest.approx(abs(difference.sum()), rel=0.05)
    assert table.loc[worse, "dse"] == pytest.approx(np.sqrt(200 * difference.var()), rel=0.05)
    assert "elpd" in str(held_out_elpd(data["LoRA"]))


def test_arviz_plots_a_forest_of_what_we_write(data):
    import arviz
    from matplotlib import pyplot

    try:
        arviz.plot_forest(data, var_names=["noise_to_signal"])
        drawn = {text.get_text() for ax in pyplot.gcf().axes for text in (*ax.texts, *ax.get_yticklabels())}
        assert any(NAMES[1] in label for label in drawn)
    finally:
        pyplot.close("all")


def modules_loaded_by(code: str) -> set[str]:
    """Names in ``sys.modules`` after a fresh interpreter ran ``code`` where this package can be imported."""
    code = f"import warnings; warnings.simplefilter('ignore'); {code}; import sys; print(*sys.modules)"
    root = Path(bayeslora.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_is_cheap():
    loaded = modules_loaded_by("import bayeslora.analysis")
    assert "bayeslora.analysis" in loaded
    assert not loaded & {
        "torch",
        "transformers",
        "pyro",
        "datasets",
        "arviz",
        "matplotlib",
        "sklearn",
        "pandas",
    }


def test_no_part_of_the_package_needs_torch():
    code = "import numpy; from bayeslora.analysis import *; import bayeslora.analysis.tagging.words; "
    code += "build_inference_data({'posterior': {'x': numpy.zeros((1, 2))}}, {}, {}, {})"
    loaded = modules_loaded_by(code)
    root = Path(bayeslora.analysis.__path__[0])
    files = [file.relative_to(root).with_suffix("") for file in root.rglob("[!_]*.py")]
    assert {".".join(("bayeslora.analysis", *file.parts)) for file in files} | {"arviz"} <= loaded
    assert not loaded & {"torch", "transformers", "pyro", "datasets"}


def test_public_names_resolve_and_others_do_not():
    assert {"to_arviz", "plot_calibration", "comparison_table"} <= set(dir(bayeslora.analysis))
    for name in bayeslora.analysis.__all__:
        assert callable(getattr(bayeslora.analysis, name))
    with pytest.raises(AttributeError, match=r"bayeslora\.analysis attribute wrong"):
        _ = bayeslora.analysis.wrong


def test_arvizs_own_calibration_plot_takes_the_predictions():
    """PAVA of two classes: never falling, and near the diagonal, as the labels are drawn from the probabilities."""
    import arviz
    from matplotlib import pyplot as plt

    if not hasattr(arviz, "plot_ppc_pava"):
        pytest.skip("ArviZ 0.23 has no plot_ppc_pava")
    random = np.random.default_rng(0)
    probs = random.random(400)
    draws, labels = (random.random((1, 200, 400)) < probs).astype(int), (random.random(400) < probs).astype(int)
    groups = {"posterior_predictive": {"labels": draws}, "observed_data": {"labels": labels}}
    data = build_inference_data(groups, {"example": np.arange(400)}, {"labels": ["example"]}, {})
    arviz.plot_ppc_pava(data, data_type="binary")
    figure = plt.gcf()
    curve = next(line for axes in figure.axes for line in axes.lines if line.get_linestyle() == "-")
    x, y = (np.asarray(values, dtype=float) for values in curve.get_data())
    plt.close(figure)
    assert (np.diff(y) >= 0).all()
    assert np.abs(y - x).mean() < 0.1
