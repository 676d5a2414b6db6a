"""The pictures, by what is drawn: intervals, markers, labels, and what is left alone."""

from itertools import pairwise

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import xarray
from matplotlib import pyplot
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from bayeslora.analysis import (
    expected_calibration_error,
    plot_calibration,
    plot_posterior_spread,
    reliability_curve,
)
from bayeslora.analysis.draws.adapter_names import network_order, short_names
from bayeslora.errors import InputError

UNTOUCHED = dict(matplotlib.rcParams)
ROBERTA = [
    f"encoder.layer.{layer}.{kind}"
    for layer in range(12)
    for kind in ("attention.self.query", "attention.self.value", "attention.output.dense")
]


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    pyplot.close("all")


@pytest.fixture
def axes():
    """An Axes that pyplot does not know."""
    return Figure(figsize=(3.3, 4.0)).subplots()


def posterior(names, *, num_draws: int = 40, num_chains: int = 1) -> dict[str, xarray.Dataset]:
    """Draws whose scale grows with the adapter's place, as the group an ArviZ object would hand out."""
    noise = np.random.default_rng(0).lognormal(sigma=0.3, size=(num_chains, num_draws, len(names)))
    per_adapter = ("chain", "draw", "adapter"), noise * np.linspace(0.2, 0.8, len(names))
    covariance = ("chain", "draw", "adapter", "rank"), np.zeros((*noise.shape, 2))
    variables = {"noise_to_signal": per_adapter, "noise_scale": per_adapter, "covariance": covariance}
    return {"posterior": xarray.Dataset(variables, coords={"adapter": list(names)})}


def forecast(num_examples: int, num_classes: int, *, temperature: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(num_examples, num_classes))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # a draw from the softmax
    powers = np.exp(logits / temperature)
    return powers / powers.sum(axis=1, keepdims=True), labels


def segments(ax) -> np.ndarray:
    """Ends of all interval lines, ``(intervals, 2 ends, 2 coordinates)``."""
    return np.concatenate([part for lines in ax.collections if len(part := np.array(lines.get_segments()))])


def row_labels(ax) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (
            ["encoder.layer.0.attention.self.query", "encoder.layer.11.attention.self.query"],
            ["0 query", "11 query"],
        ),
        (["model.layers.3.mlp.down_proj"], ["3 down_proj"]),
        (
            ["h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_proj"],
            ["0 c_attn", "0 attn.c_proj", "0 mlp.c_proj"],
        ),
        (
            ["encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense", "classifier.dense"],
            ["0 attention.output.dense", "0 output.dense", "classifier.dense"],
        ),
        (["encoder.block.1.q", "decoder.block.1.q"], ["1 encoder.block.q", "1 decoder.block.q"]),
        (["score"], ["score"]),
    ],
)
def test_short_names(names, labels):
    assert [name.label for name in short_names(names)] == labels


def test_network_order_undoes_grouping_by_shape():
    grouped = ["enc.0.q", "enc.1.q", "dec.0.q", "enc.0.up", "enc.1.up", "dec.0.up", "score"]
    ordered = ["enc.0.q", "enc.0.up", "enc.1.q", "enc.1.up", "dec.0.q", "dec.0.up", "score"]
    assert [grouped[i] for i in network_order(grouped)] == ordered


# --- posterior spread -----------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_intervals_and_medians_are_those_of_the_draws(axes, level):
    data = posterior(ROBERTA, num_chains=2)
    assert plot_posterior_spread(data, axes, level=level) is axes
    drawn = segments(axes)
    drawn = drawn[drawn[:, 0, 1].argsort()]
    draws = data["posterior"]["noise_to_signal"].values.reshape(80, 36)
    expected = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0).T
    np.testing.assert_allclose(drawn[:, :, 0], expected)
    np.testing.assert_array_equal(drawn[:, 0, 1], np.arange(36))
    markers = np.concatenate([line.get_xydata() for line in axes.lines])
    markers = markers[markers[:, 1].argsort()]
    np.testing.assert_allclose(markers[:, 0], np.median(draws, axis=0))


def test_rows_run_down_the_network_whatever_the_order_of_the_data(axes):
    shuffled = [name for kind in ("query", "value", "dense") for name in ROBERTA if name.endswith(kind)]
    data = posterior(shuffled)
    plot_posterior_spread(data, axes)
    assert row_labels(axes)[:4] == ["0 query", "0 value", "0 dense", "1 query"]
    assert row_labels(axes)[-1] == "11 dense"
    assert axes.get_ylim() == (35.5, -0.5)
    second = next(line.get_xydata() for line in axes.lines if line.get_label() == "value")
    median = data["posterior"]["noise_to_signal"].sel(adapter=ROBERTA[1]).median()
    np.testing.assert_allclose(second[0], [median, 1])


def test_each_kind_has_its_colour_and_marker(axes):
    llama = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    plot_posterior_spread(posterior([f"model.layers.{i}.x.{kind}" for i in range(3) for kind in llama]), axes)
    assert [line.get_label() for line in axes.lines] == list(llama)
    assert len({to_hex(line.get_color()) for line in axes.lines}) == 7
    assert len({line.get_marker() for line in axes.lines}) == 7
    for line, interval in zip(axes.lines, axes.collections, strict=True):
        assert to_hex(line.get_color()) == to_hex(interval.get_color())
        assert len(interval.get_segments()) == 3


@pytest.mark.parametrize("names", [ROBERTA, ROBERTA[:2], [f"{name}.with.a.long.ending" for name in ROBERTA[:6]]])
def test_new_figure_is_high_enough_for_its_rows(names):
    ax = plot_posterior_spread(posterior(names))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert len(boxes) == len(names)
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0
    assert ax.figure.get_size_inches()[0] == pytest.approx(3.3)


def test_axis_says_what_and_how_much(axes):
    plot_posterior_spread(posterior(ROBERTA[:3]), axes, level=0.8)
    assert axes.get_xlabel() == "noise / mean of A  (ratio of RMS)\nmedian and 80 % interval of 40 draws"


def test_another_variable(axes):
    data = posterior(ROBERTA[:3])
    data["posterior"]["noise_scale"] *= 10
    plot_posterior_spread(data, axes, variable="noise_scale")
    medians = np.sort(np.concatenate([line.get_xdata() for line in axes.lines]))
    np.testing.assert_allclose(medians, np.sort(data["posterior"]["noise_scale"].median(("chain", "draw"))))
    assert axes.get_xlabel().startswith("RMS noise on A  (units of A)")


def test_variable_must_have_one_number_per_adapter(axes):
    with pytest.raises(InputError, match=r"no variable 'covariance' .* it has noise_to_signal, noise_scale"):
        plot_posterior_spread(posterior(ROBERTA), axes, variable="covariance")
    with pytest.raises(InputError, match="level must lie between 0 and 1"):
        plot_posterior_spread(posterior(ROBERTA), axes, level=90)


# --- calibration ----------------------------------------------------------------------------------

PREDICTIONS = {"LoRA": forecast(600, 3, temperature=0.4), "MonteCLoRA": forecast(600, 3)}


def method_lines(ax) -> dict:
    """Solid lines by method; hollow markers and the diagonal have other styles."""
    return {line.get_label().split(" (")[0]: line for line in ax.lines if line.get_linestyle() == "-"}


def hollow_points(ax) -> np.ndarray:
    return np.concatenate([line.get_xydata() for line in ax.lines if line.get_linestyle() == "None"])


@pytest.mark.parametrize("num_bins", [10, 15])
def test_lines_and_bars_are_the_reliability_curve(axes, num_bins):
    assert plot_calibration(PREDICTIONS, axes, num_bins=num_bins, level=0.9) is axes
    lines = method_lines(axes)
    assert list(lines) == list(PREDICTIONS)
    bars = []
    for name, (probs, labels) in PREDICTIONS.items():
        curve = reliability_curve(probs, labels, num_bins=num_bins, level=0.9)
        many = curve.count >= 10
        points = np.stack([curve.confidence, curve.accuracy], axis=1)[many]
        np.testing.assert_allclose(lines[name].get_xydata(), points)
        ends = np.stack([curve.lower, curve.upper], axis=1)[many]
        bars.append(np.stack([np.stack([curve.confidence[many]] * 2, axis=1), ends], axis=-1))
    np.testing.assert_allclose(segments(axes), np.concatenate(bars))


def test_diagonal_is_drawn(axes):
    plot_calibration(PREDICTIONS, axes)
    (diagonal,) = (line for line in axes.lines if line.get_linestyle() == "--")
    np.testing.assert_array_equal(diagonal.get_xydata(), [[0, 0], [1, 1]])


def test_legend_tells_the_calibration_error_of_the_tables(axes):
    plot_calibration(PREDICTIONS, axes, num_bins=7)
    shown = [text.get_text() for text in axes.get_legend().get_texts()]
    errors = [100 * expected_calibration_error(*pair) for pair in PREDICTIONS.values()]
    assert shown == [
        "perfect calibration",
        f"LoRA (ECE {errors[0]:.1f} %)",
        f"MonteCLoRA (ECE {errors[1]:.1f} %)",
    ]


def test_sparse_bins_are_hollow_and_apart(axes):
    probs = np.repeat([[0.95, 0.05], [0.65, 0.35]], [30, 4], axis=0)
    labels = np.zeros(34, dtype=int)
    plot_calibration({"a": (probs, labels)}, axes)
    np.testing.assert_allclose(method_lines(axes)["a"].get_xydata(), [[0.95, 1.0]])
    np.testing.assert_allclose(hollow_points(axes), [[0.65, 1.0]])
    assert len(segments(axes)) == 1


def test_handful_of_examples_is_all_hollow(axes):
    plot_calibration({"a": ([[0.9, 0.1], [0.6, 0.4]], [0, 1])}, axes)
    np.testing.assert_allclose(hollow_points(axes), [[0.6, 0.0], [0.9, 1.0]])
    assert len(method_lines(axes)["a"].get_xdata()) == 0


def test_strip_shows_the_share_of_examples_per_bin(axes):
    plot_calibration(PREDICTIONS, axes)
    (strip,) = axes.child_axes
    assert len(strip.patches) == 2
    for outline, (probs, labels) in zip(strip.patches, PREDICTIONS.values(), strict=True):
        values, edges, _ = outline.get_data()
        np.testing.assert_allclose(values, reliability_curve(probs, labels).count / 6)  # percent of 600
        np.testing.assert_allclose(edges, np.linspace(0, 1, 11))
    assert strip.get_xlim() == axes.get_xlim()


def test_nothing_drawn_falls_outside_the_frame():
    ax = plot_calibration(PREDICTIONS)
    ax.figure.canvas.draw()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    ends = segments(ax).reshape(-1, 2)
    assert ends[:, 0].min() >= left >= 0.3  # with three classes nobody is less sure than 1/3
    assert ends[:, 0].max() <= right == 1
    assert bottom <= ends[:, 1].min()
    assert ends[:, 1].max() <= top
    legend, strip = ax.get_legend().get_window_extent(), ax.child_axes[0].get_window_extent()
    assert legend.y0 >= strip.y1
    assert strip.y0 >= ax.get_window_extent().y1


def test_axes_end_where_the_intervals_do():
    """Fifty answers of two classes, none surer than 0.6, of which half are right."""
    sure = np.linspace(0.51, 0.59, 50)
    ax = plot_calibration({"a": (np.stack([sure, 1 - sure], 1), np.arange(50) % 2)})
    assert ax.get_xlim() == pytest.approx((0.5, 0.6))
    low, high = segments(ax).reshape(-1, 2)[:, 1].min(), segments(ax).reshape(-1, 2)[:, 1].max()
    assert ax.get_ylim() == pytest.approx((low - 0.02, high + 0.02))


def test_no_predictions_and_wrong_predictions_are_named(axes):
    with pytest.raises(InputError, match="predictions is empty"):
        plot_calibration({}, axes)
    with pytest.raises(InputError, match="probs must sum to one"):
        plot_calibration({"logits": ([[2.0, 1.0]], [0])}, axes)


# --- manners --------------------------------------------------------------------------------------

DRAWINGS = [(plot_posterior_spread, posterior(ROBERTA)), (plot_calibration, PREDICTIONS)]


@pytest.mark.parametrize(("draw", "data"), DRAWINGS)
def test_given_axes_leave_pyplot_alone(axes, draw, data, monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda *_: pytest.fail("show was called"))
    draw(data, axes)
    assert dict(matplotlib.rcParams) == UNTOUCHED
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize(("draw", "data"), DRAWINGS)
def test_without_axes_one_figure_is_made_and_not_shown(draw, data, monkeypatch):
    monkeypatch.setattr(pyplot, "show", lambda *_: pytest.fail("show was called"))
    ax = draw(data)
    assert dict(matplotlib.rcParams) == UNTOUCHED
    assert [pyplot.figure(number) for number in pyplot.get_fignums()] == [ax.figure]


@pytest.mark.filterwarnings("ignore:\\s*ArviZ is undergoing a major refactor:FutureWarning")
def test_spread_takes_what_arviz_holds(axes):
    from bayeslora.analysis import build_inference_data

    plain = posterior(ROBERTA[:4])
    values = plain["posterior"]["noise_to_signal"].values
    data = build_inference_data(
        {"posterior": {"noise_to_signal": values}},
        coords={"adapter": ROBERTA[:4]},
        dims={"noise_to_signal": ["adapter"]},
        attrs={},
    )
    plot_posterior_spread(data, axes)
    medians = np.sort(np.concatenate([line.get_xdata() for line in axes.lines]))
    np.testing.assert_allclose(medians, np.sort(np.median(values[0], axis=0)))
