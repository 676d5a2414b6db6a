"""Pictures of the draws, by what is drawn: points, intervals, cells, lines and their labels."""

from itertools import pairwise

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from bayeslora.analysis import (
    draws_needed,
    noise_contraction,
    plot_adapters,
    plot_contraction,
    plot_draws_needed,
    plot_eigenvalues,
    plot_layer_map,
    plot_spread_against_mean,
    plot_variance_shares,
    variance_shares,
)
from bayeslora.errors import InputError

NAMES = ["layer.1.q", "layer.0.q", "layer.0.v", "layer.1.v", "head"]


@pytest.fixture
def axes():
    """An Axes that pyplot does not know."""
    return Figure(figsize=(3.3, 3.0)).subplots()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def draws(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(4, 0.25, size=shape)


def intervals(ax) -> np.ndarray:
    """Ends of all interval lines, ``(intervals, 2 ends, 2 coordinates)``."""
    drawn = [lines.get_segments() for lines in ax.collections if hasattr(lines, "get_segments")]
    return np.concatenate([np.array(ends) for ends in drawn if len(ends)])


def row_labels(ax) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def test_any_number_per_adapter(axes):
    values = draws(40, 5)
    assert plot_adapters(NAMES, values, axes, quantity="effective components  (of 4)") is axes
    assert row_labels(axes) == ["0 q", "0 v", "1 q", "1 v", "head"]
    medians = np.concatenate([line.get_xydata() for line in axes.lines])
    np.testing.assert_allclose(medians[medians[:, 1].argsort(), 0], np.median(values, axis=0)[[1, 2, 0, 3, 4]])
    assert axes.get_xlabel() == "effective components  (of 4)\nmedian and 90 % interval of 40 draws"
    with pytest.raises(InputError, match=r"draws must have shape \(draws, 5\), but has shape \(40, 4\)"):
        plot_adapters(NAMES, values[:, :4], axes, quantity="x")


def test_contraction_lies_in_its_interval_and_zero_is_marked(axes):
    after, before = draws(60, 5) * [0.1, 0.5, 1, 1, 2], draws(60, 5, seed=1)
    assert plot_contraction(NAMES, after, before, axes, num_resamples=200) is axes
    expected = noise_contraction(after, before)[[1, 2, 0, 3, 4]]
    drawn = intervals(axes)
    drawn = drawn[drawn[:, 0, 1].argsort()]
    assert ((drawn[:, 0, 0] < expected) & (expected < drawn[:, 1, 0])).all()
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines)


def test_map_has_each_adapter_in_its_cell(axes):
    assert plot_layer_map(NAMES, [10, 0, 1, 11, 99], axes, quantity="noise") is axes
    (image,) = axes.collections
    cells = image.get_array()
    kinds, layers = row_labels(axes), [label.get_text() for label in axes.get_xticklabels()]
    assert (kinds, layers) == (["q", "v", "head"], ["0", "1", "other"])
    expected = np.ma.masked_invalid([[0, 10, np.nan], [1, 11, np.nan], [np.nan, np.nan, 99]])
    np.testing.assert_array_equal(cells.filled(-1), expected.filled(-1))
    assert axes.yaxis_inverted()
    with pytest.raises(InputError, match=r"values must have shape \(5,\), one per adapter, but has shape \(2,\)"):
        plot_layer_map(NAMES, [1, 2], axes, quantity="noise")


def test_map_of_a_deep_network_keeps_its_labels_apart():
    names = [f"layers.{layer}.{kind}_proj" for layer in range(80) for kind in "qkvo"]
    ax = plot_layer_map(names, np.arange(320), quantity="noise")
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert all(right.x0 > left.x1 for left, right in pairwise(boxes))


def test_spread_against_mean_shows_medians_intervals_and_equal_ratios(axes):
    mean, noise = np.array([0.1, 0.2, 0.4, 0.8, 0.0]), draws(50, 5)
    assert plot_spread_against_mean(NAMES, mean, noise, axes, level=0.8) is axes
    points = np.concatenate([line.get_xydata() for line in axes.lines if line.get_linestyle() == "None"])
    np.testing.assert_allclose(points[points[:, 0].argsort()], np.stack([mean, np.median(noise, axis=0)], axis=1)[:4])
    drawn = intervals(axes)
    drawn = drawn[drawn[:, 0, 0].argsort()]
    np.testing.assert_allclose(drawn[:, :, 1], np.quantile(noise, [0.1, 0.9], axis=0).T[:4])  # none for a mean of 0
    ratios = [line.get_ydata() / line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"]
    assert ratios
    np.testing.assert_allclose(ratios, [[float(text.get_text())] * 2 for text in axes.texts])
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    with pytest.raises(InputError, match="the mean of A is zero in every adapter"):
        plot_spread_against_mean(NAMES, np.zeros(5), noise)


def test_eigenvalues_of_each_kind_over_draws_and_adapters(axes):
    spectrum = np.sort(draws(30, 5, 3), axis=-1)[..., ::-1].copy()
    spectrum[:, 4, 2] = np.nan  # the head has rank 2
    assert plot_eigenvalues(NAMES, spectrum, axes) is axes
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines) == ["q", "v", "head"]
    np.testing.assert_allclose(lines["q"], np.median(spectrum[:, [0, 1]].reshape(60, 3), axis=0))
    np.testing.assert_allclose(lines["head"], np.median(spectrum[:, 4, :2], axis=0))
    assert len(intervals(axes)) == 8
    with pytest.raises(InputError, match=r"eigenvalues must have shape \(draws, 5, r\)"):
        plot_eigenvalues(NAMES, spectrum[0], axes)


def test_enough_draws_are_where_the_line_meets_the_tolerance(axes):
    found = draws_needed(draws(64, 20), tolerance=0.05)
    assert plot_draws_needed(found, axes) is axes
    law, measured, tolerance, enough = axes.lines
    assert enough.get_xdata()[0] == found.enough
    assert tolerance.get_ydata()[0] == 0.05
    np.testing.assert_allclose(measured.get_xydata(), np.stack([found.num_draws, found.measured], axis=1))
    crossing = np.interp(found.enough, *law.get_data())
    assert crossing == pytest.approx(0.05, rel=0.02)
    assert enough.get_label() == f"enough: S = {found.enough}"


def shares():
    """Two parts with 1 and 3 of a total of 5."""
    sizes = np.random.default_rng(2).normal(size=(4000, 3)) * np.sqrt([1, 3, 5])
    return variance_shares(["layer 0", "layer 1"], np.square(sizes), num_resamples=300)


def test_shares_of_the_variance_and_what_they_leave():
    found = shares()
    error = 4 * 2 * np.sqrt(2 / 4000)
    np.testing.assert_allclose(found.estimate, [0.2, 0.6, 0.2], atol=error)
    assert found.estimate.sum() == pytest.approx(1)
    assert ((found.lower < found.estimate) & (found.estimate < found.upper)).all()
    # the relative standard error of a ratio of two mean squares of 4000 normals is sqrt(2 * 2 / 4000)
    assert found.upper[1] - found.lower[1] == pytest.approx(2 * 1.645 * 0.6 * np.sqrt(4 / 4000), rel=0.25)


@pytest.mark.parametrize(
    ("deviations", "message"),
    [(np.ones((3, 2)), r"must have shape \(draws, 3\)"), (np.zeros((3, 3)), "the draws do not differ")],
)
def test_wrong_deviations_are_named(deviations, message):
    with pytest.raises(InputError, match=message):
        variance_shares(["a", "b"], deviations)


def test_shares_are_bars_with_the_remainder_last(axes):
    found = shares()
    assert plot_variance_shares(found, axes) is axes
    assert row_labels(axes) == ["layer 0", "layer 1", "remainder"]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], 100 * found.estimate)
    np.testing.assert_allclose(intervals(axes)[:, 1, 0], 100 * found.upper)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_adapters(NAMES, draws(9, 5), quantity="effective components  (of 4)"),
        lambda: plot_contraction(NAMES, draws(9, 5), draws(9, 5, seed=1), num_resamples=20),
        lambda: plot_layer_map(NAMES, np.arange(5), quantity="noise / mean of A  (ratio of RMS)"),
        lambda: plot_spread_against_mean(NAMES, np.full(5, 0.1), draws(9, 5)),
        lambda: plot_eigenvalues(NAMES, draws(9, 5, 3)),
        lambda: plot_draws_needed(draws_needed(draws(9, 5))),
        lambda: plot_variance_shares(shares()),
    ],
)
def test_new_figures_have_the_width_of_a_column_and_hold_all_their_text(draw, monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda *_: pytest.fail("show was called"))
    ax = draw()
    figure = ax.figure
    assert [pyplot.figure(number) for number in pyplot.get_fignums()] == [figure]
    assert figure.get_size_inches()[0] == pytest.approx(3.3)
    figure.canvas.draw()
    frame = figure.get_tightbbox()  # in inches
    assert frame.x0 >= -0.02
    assert frame.x1 <= 3.32
    sizes = [text.get_fontsize() for text in [ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()] if text.get_text()]
    assert min(sizes) >= 7
