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
from bayeslora.analysis import build_inference_data, load_arviz, save_arviz, to_arviz
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

    def posterior_draws(self, *, num_samples, seed, adapters):
        self.calls.append(("posterior_draws", num_samples, seed, tuple(adapters)))
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

    def predict(self, dataset, *, num_samples, seed, batch_size):
        self.calls.append(("predict", len(dataset), num_samples, seed, batch_size))
        with np.errstate(divide="ignore"):
            log_probs = np.log(np.broadcast_to(CLASS_PROBS, (num_samples, len(dataset), 3)))
        return SimpleNamespace(
            sample_log_probs=log_probs, labels=self.labels, label_names=self.label_names, sample_means=None
        )


class FakeCoin(FakeBayes):
    """Coins of one kind, ``P(1) = theta`` with a flat prior: draws from the exact posterior of theta."""

    def predict(self, dataset, *, num_samples, seed, batch_size):
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

    def predict(self, dataset, *, num_samples, seed, batch_size):
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
    assert bayes.calls == [("posterior_draws", 7, 11, tuple(NAMES[1:])), ("predict", 5, 7, 11, 2)]


def test_groups_variables_and_dimensions(data):
    sampled = ("chain", "draw")
    expected = {
        "posterior": {
            "mixture_weights": (*sampled, "adapter", "component"),
            "covariance": (*sampled, "adapter", "rank", "rank_other"),
            "noise_scale": (*sampled, "adapter"),
            "noise_to_signal": (*sampled, "adapter"),
            f"A[{NAMES[0]}]": (*sampled, "rank", "column"),
            f"A[{NAMES[1]}]": (*sampled, "rank", "column"),
        },
        "constant_data": {"mean_scale": ("adapter",)},
        "posterior_predictive": {
            "class_probs": (*sampled, "example", "label"),
            "labels": (*sampled, "example"),
        },
        "log_likelihood": {"labels": (*sampled, "example")},
        "observed_data": {"labels": ("example",)},
    }
    assert group_names(data) == set(expected)
    found = {g: {n: v.dims for n, v in dataset_of(data, g).data_vars.items()} for g in expected}
    assert found == expected
    assert dict(dataset_of(data, "posterior").sizes) == {
        **{"chain": 1, "draw": 50, "adapter": 3, "component": 4},
        **{"rank": 3, "rank_other": 3, "column": 6},
    }


def test_every_dimension_is_named(data):
    posterior, predictive = data["posterior"], data["posterior_predictive"]
    assert list(posterior["adapter"].values) == NAMES
    assert list(data["constant_data"]["adapter"].values) == NAMES
    for name, size in {"component": 4, "rank": 3, "rank_other": 3, "column": 6, "draw": 50}.items():
        np.testing.assert_array_equal(posterior[name], np.arange(size))
    assert list(predictive["label"].values) == list(LABEL_NAMES)
    np.testing.assert_array_equal(predictive["example"], np.arange(5))


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
    assert group_names(to_arviz(bayes, num_samples=3)) == {"posterior", "constant_data"}
    assert [call[0] for call in bayes.calls] == ["posterior_draws"]


def test_without_labels_nothing_observed_and_classes_are_numbered():
    data = to_arviz(FakeBayes(labels=None, label_names=None), "abcde", num_samples=3)
    assert group_names(data) == {"posterior", "constant_data", "posterior_predictive"}
    np.testing.assert_array_equal(data["posterior_predictive"]["label"], [0, 1, 2])


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
    data = to_arviz(bayes, "abcde", num_samples=3)
    assert group_names(data) == {"posterior", "constant_data", "posterior_predictive"}
    assert set(dataset_of(data, "posterior_predictive").data_vars) == {"mean"}


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
    assert len(table) == 3 * 4 + 3 * 9 + 3 + 3 + 2 * 18


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

    data = to_arviz(bayes, targets, num_samples=4000)
    result = arviz.loo(data)
    estimate = result.elpd if hasattr(result, "elpd") else result.elpd_loo
    pointwise = data["log_likelihood"]["labels"].values[0]
    weights = np.exp(-pointwise)
    errors = weights.std(axis=0) / weights.mean(axis=0) / np.sqrt(4000)
    in_sample = np.log(np.exp(pointwise).mean(axis=0)).sum()
    bound = 3 * errors.sum()  # all the errors have one cause, theta, and may add up
    assert abs(estimate - exact) < bound
    assert in_sample - exact > bound  # so the check tells the two apart


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
    code = "import numpy; from bayeslora.analysis import *; "
    code += "build_inference_data({'posterior': {'x': numpy.zeros((1, 2))}}, {}, {}, {})"
    loaded = modules_loaded_by(code)
    files = Path(bayeslora.analysis.__path__[0]).glob("[!_]*.py")
    assert {f"bayeslora.analysis.{file.stem}" for file in files} | {"arviz"} <= loaded
    assert not loaded & {"torch", "transformers", "pyro", "datasets"}


def test_public_names_resolve_and_others_do_not():
    assert {"to_arviz", "plot_calibration", "comparison_table"} <= set(dir(bayeslora.analysis))
    for name in bayeslora.analysis.__all__:
        assert callable(getattr(bayeslora.analysis, name))
    with pytest.raises(AttributeError, match=r"module 'bayeslora\.analysis' has no attribute 'wrong'"):
        _ = bayeslora.analysis.wrong
