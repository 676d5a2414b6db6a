"""Draws written in blocks: what is written, how much memory it takes, and what an interruption leaves."""

import tracemalloc
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import xarray

from bayeslora.analysis import load_arviz, stream_arviz, to_arviz
from bayeslora.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:\\s*ArviZ is undergoing a major refactor:FutureWarning")

NAMES = ["layer.0.query", "layer.1.query", "head"]
HISTORY = [{"step": 1, "loss": 2.0, **{f"noise_to_signal/{name}": 0.1 for name in NAMES}}, {"step": 2, "loss": 1.0}]
needs_zarr = pytest.mark.skipif(not find_spec("zarr"), reason="zarr is not installed")
FORMATS = [".nc", pytest.param(".zarr", marks=needs_zarr)]


class FakeBayes:
    """Draws that depend on the seed and on their number alone; A is ``columns`` wide."""

    monteclora_config = SimpleNamespace(to_dict=lambda: {"r": 2})

    def __init__(self, columns=3, *, fails_at=None):
        self.columns, self.fails_at = columns, fails_at
        self.most_draws = 0

    def version_info(self):
        return {"bayeslora": "0.1.0"}

    def posterior_draws(self, *, num_samples, seed, adapters, first_draw, prior=False):
        if self.fails_at in range(first_draw, first_draw + num_samples):
            raise KeyboardInterrupt
        self.most_draws = max(self.most_draws, num_samples)
        random = [np.random.default_rng([seed, prior, first_draw + s]) for s in range(num_samples)]

        def draw(*shape):
            return np.stack([generator.normal(size=shape) for generator in random])

        return SimpleNamespace(
            adapters=NAMES,
            mixture_weights=draw(3, 4),
            covariance=draw(3, 2, 2),
            noise_scale=draw(3),
            mean_scale=np.array([0.5, 2.0, 0.0]),
            A={name: draw(2, self.columns - (name == "head")) for name in adapters},
        )

    def prior_draws(self, **options):
        return self.posterior_draws(**options, prior=True)

    def predict(self, dataset, *, num_samples, seed, batch_size, first_draw, prior):
        logits = np.stack(
            [
                np.random.default_rng([seed, 7, prior, first_draw + s]).normal(size=(len(dataset), 3))
                for s in range(num_samples)
            ]
        )
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        labels = np.arange(len(dataset)) % 3
        return SimpleNamespace(sample_log_probs=log_probs, labels=labels, label_names=("no", "perhaps", "yes"))


def datasets(data):
    """Group name to data set, of either generation of ArviZ."""
    names = data.groups() if callable(data.groups) else data.children
    found = {name: data[name] for name in names}
    return {n: (v if isinstance(v, xarray.Dataset) else v.to_dataset()).drop_attrs() for n, v in found.items()}


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("lazy", [False, True])
def test_blocks_add_up_to_what_is_made_at_once(ending, lazy, tmp_path):
    bayes = FakeBayes()
    options = {"num_samples": 11, "seed": 3, "adapters": NAMES[1:], "history": HISTORY}
    path = stream_arviz(bayes, tmp_path / f"draws{ending}", "abcde", block=4, **options)
    assert bayes.most_draws == 4
    written, whole = load_arviz(path, lazy=lazy), to_arviz(FakeBayes(), "abcde", **options)
    assert type(written) is type(whole)
    assert written.attrs == whole.attrs
    expected, found = datasets(whole), datasets(written)
    assert set(found) == set(expected)
    assert {"posterior", "prior", "sample_stats", "log_likelihood", "observed_data", "prior_predictive"} < set(found)
    for name, group in expected.items():
        xarray.testing.assert_identical(found[name], group)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ending", FORMATS)
def test_memory_does_not_grow_with_the_number_of_draws(ending, tmp_path):
    """A of three adapters takes 0.5 MB a draw here, and 2 MB a block of four."""
    columns, block = 10_000, 4
    size_of_block = 3 * 2 * columns * 8 * block
    stream_arviz(FakeBayes(), tmp_path / f"warm{ending}", num_samples=2, block=1)  # imports are no part of it
    tracemalloc.start()
    try:
        for num_samples in (12, 48):
            tracemalloc.reset_peak()
            path = tmp_path / f"{num_samples}{ending}"
            options = {"block": block, "adapters": NAMES, "prior": False}
            stream_arviz(FakeBayes(columns), path, num_samples=num_samples, **options)
            assert size_of_block < tracemalloc.get_traced_memory()[1] < 2.5 * size_of_block
    finally:
        tracemalloc.stop()
    assert load_arviz(path, lazy=True)["posterior"][f"A[{NAMES[0]}]"].shape == (1, 48, 2, columns)


@pytest.mark.parametrize("ending", FORMATS)
def test_an_interruption_leaves_nothing_under_the_name(ending, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stream_arviz(FakeBayes(fails_at=9), tmp_path / f"draws{ending}", num_samples=12, block=4)
    assert list(tmp_path.iterdir()) == []


def test_destination_is_checked_before_anything_is_drawn(tmp_path):
    (tmp_path / "there.nc").write_text("mine")
    wrong = {
        "there.nc": "exists already: delete it",
        "x.h5": r"must end in \.nc \(netCDF\) or \.zarr",
        "no/x.nc": r"there is no folder .*no; make it first",
    }
    for name, message in wrong.items():
        bayes = FakeBayes()
        with pytest.raises(InputError, match=message):
            stream_arviz(bayes, tmp_path / name, num_samples=4)
        assert bayes.most_draws == 0
    assert (tmp_path / "there.nc").read_text() == "mine"
    with pytest.raises(InputError, match="at least 1, got 0 and 8"):
        stream_arviz(FakeBayes(), tmp_path / "x.nc", num_samples=0)


def test_without_zarr_the_other_format_is_offered(tmp_path, monkeypatch):
    monkeypatch.setattr("bayeslora.analysis.draws.streaming.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install zarr, or give a name that ends in \.nc"):
        stream_arviz(FakeBayes(), tmp_path / "x.zarr", num_samples=4)
