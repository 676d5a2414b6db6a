"""Pictures of calibration's parts and of what uncertainty is good for, by what is drawn."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from matplotlib import pyplot
from matplotlib.figure import Figure

from bayeslora.analysis import (
    area_under_risk_coverage,
    brier_decomposition,
    brier_score,
    detection_scores,
    plot_agreement,
    plot_brier_parts,
    plot_calibration,
    plot_detection,
    plot_entropy_parts,
    plot_risk_coverage,
    rank_correlation,
    reliability_curve,
    risk_coverage,
)
from bayeslora.errors import InputError

FEW = {"num_resamples": 40}
RNG = np.random.default_rng(0)
UNCERTAINTY = RNG.random(300)
WRONG = RNG.random(300) < UNCERTAINTY
OUTSIDE = RNG.random(120) ** 0.5
PEOPLE = RNG.integers(5, size=300) / 4
PROBS = RNG.dirichlet([1, 1, 1], size=300)
LABELS = (PROBS.cumsum(axis=1) < RNG.random((300, 1))).sum(axis=1)


@pytest.fixture
def axes():
    """An Axes that pyplot does not know."""
    return Figure(figsize=(3.3, 3.0)).subplots()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, name: str) -> np.ndarray:
    return next(line.get_xydata() for line in ax.lines if str(line.get_label()).startswith(name))


def band(ax, place: float) -> tuple[float, float]:
    """Lower and upper edge of the first band at one place."""
    points = ax.collections[0].get_paths()[0].vertices
    at = points[np.isclose(points[:, 0], place)][:, 1]
    return at.min(), at.max()


def test_risk_coverage_is_drawn_in_percent_with_its_area(axes):
    assert plot_risk_coverage({"a": (UNCERTAINTY, WRONG), "b": (-UNCERTAINTY, WRONG)}, axes, **FEW) is axes
    curve = risk_coverage(UNCERTAINTY, WRONG)
    np.testing.assert_allclose(line(axes, "a"), 100 * np.stack(curve, axis=1)[19:])
    assert axes.get_xlim() == pytest.approx((100 * 20 / 300, 100))  # where the curves begin
    areas = [100 * area_under_risk_coverage(sign * UNCERTAINTY, WRONG) for sign in (1, -1)]
    assert legend(axes) == [f"a (AURC {areas[0]:.1f} %)", f"b (AURC {areas[1]:.1f} %)"]


def test_band_of_the_risk_is_the_binomials_where_all_is_answered(axes):
    plot_risk_coverage({"a": (UNCERTAINTY, WRONG)}, axes, num_resamples=500)
    rate = WRONG.mean()
    half = 100 * 1.96 * np.sqrt(rate * (1 - rate) / 300)
    assert band(axes, 100) == pytest.approx((100 * rate - half, 100 * rate + half), abs=0.15 * half)


def test_detection_is_drawn_with_its_area(axes):
    assert plot_detection({"a": (UNCERTAINTY, OUTSIDE)}, axes, **FEW) is axes
    points = line(axes, "a")
    assert np.trapezoid(points[:, 1], points[:, 0]) / 1e4 == pytest.approx(detection_scores(UNCERTAINTY, OUTSIDE).auroc)
    assert legend(axes) == [f"a (AUROC {100 * detection_scores(UNCERTAINTY, OUTSIDE).auroc:.1f} %)"]
    inside = np.interp(50, points[:, 0], points[:, 1])
    lower, upper = band(axes, 50)
    assert lower < inside < upper
    # foreign inputs are resampled among themselves: about 1.96 standard errors of a share of 120
    assert 0.5 < (upper - lower) / (2 * 196 * np.sqrt(inside / 100 * (1 - inside / 100) / 120)) < 2


def test_entropy_is_stacked_from_its_parts(axes):
    parts = {"test": (UNCERTAINTY, 0.1 * UNCERTAINTY), "tweets": (OUTSIDE, OUTSIDE)}
    assert plot_entropy_parts(parts, axes, **FEW) is axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches if bar.get_width() > 0]
    means = [UNCERTAINTY.mean(), 0.1 * UNCERTAINTY.mean(), OUTSIDE.mean(), OUTSIDE.mean()]
    np.testing.assert_allclose(bars, [(0, means[0]), (means[0], means[1]), (0, means[2]), (means[2], means[3])])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["test", "tweets"]
    assert legend(axes) == ["expected entropy", "mutual information"]


def test_agreement_is_the_mean_in_bins_of_equal_votes(axes):
    assert plot_agreement({"a": UNCERTAINTY}, PEOPLE, axes, unit="votes", **FEW) is axes
    expected = [(share, UNCERTAINTY[share == PEOPLE].mean()) for share in np.unique(PEOPLE)]
    np.testing.assert_allclose(line(axes, "a"), expected)
    found = rank_correlation(UNCERTAINTY, PEOPLE, **FEW)
    assert legend(axes) == [f"a: ρ = {found.estimate:.2f} ({found.lower:.2f} to {found.upper:.2f})"]
    assert axes.get_xlabel() == "votes"


def test_agreement_of_several_runs_is_their_mean(axes):
    runs = np.stack([UNCERTAINTY, 3 * UNCERTAINTY], axis=1)
    plot_agreement({"a": runs}, PEOPLE, axes, **FEW)
    top = PEOPLE == 1
    assert line(axes, "a")[-1, 1] == pytest.approx(2 * UNCERTAINTY[top].mean())


def test_brier_parts_are_those_of_the_decomposition(axes):
    assert plot_brier_parts({"a": (PROBS, LABELS)}, axes, **FEW) is axes
    parts = brier_decomposition(PROBS, LABELS)
    drawn = next(line for line in axes.lines if len(line.get_xdata()) == 3)
    np.testing.assert_allclose(drawn.get_xdata(), parts[:3])
    assert legend(axes) == [f"a (Brier {brier_score(PROBS, LABELS):.3f})"]
    (bars,) = axes.collections
    lengths = np.ptp(np.array(bars.get_segments())[:, :, 0], axis=1)
    assert (lengths > 0).all()
    assert lengths[0] < parts.brier


def test_calibration_takes_bins_of_equal_mass_and_bootstrap_bars(axes):
    plot_calibration({"a": (PROBS, LABELS)}, axes, binning="mass", interval="bootstrap")
    curve = reliability_curve(PROBS, LABELS, binning="mass", interval="bootstrap")
    np.testing.assert_allclose(line(axes, "a"), np.stack([curve.confidence, curve.accuracy], axis=1))
    ends = np.array(axes.collections[0].get_segments())[:, :, 1]
    np.testing.assert_allclose(ends, np.stack([curve.lower, curve.upper], axis=1))
    (strip,) = axes.child_axes
    np.testing.assert_allclose(strip.patches[0].get_data().edges, np.linspace(0, 1, 11))  # the strip has equal widths


@pytest.mark.parametrize("plot", [plot_risk_coverage, plot_detection, plot_entropy_parts])
def test_nothing_to_draw_is_named(plot, axes):
    with pytest.raises(InputError, match="nothing to draw: give at least one entry"):
        plot({}, axes)
    with pytest.raises(InputError, match="NaN"):
        plot({"a": ([0.1, np.nan], [0, 1])}, axes, **FEW)
    with pytest.raises(InputError, match="predictions is empty"):
        plot_brier_parts({}, axes)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_risk_coverage({"posterior predictive": (UNCERTAINTY, WRONG)}, **FEW),
        lambda: plot_detection({"posterior predictive": (UNCERTAINTY, OUTSIDE)}, **FEW),
        lambda: plot_entropy_parts({"another domain": (UNCERTAINTY, UNCERTAINTY)}, **FEW),
        lambda: plot_agreement({"posterior predictive": UNCERTAINTY}, PEOPLE, **FEW),
        lambda: plot_brier_parts({"posterior predictive": (PROBS, LABELS)}, **FEW),
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
