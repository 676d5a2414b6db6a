"""What is said about a grid, against numbers worked out by hand and planted differences."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from bayeslora.analysis import (
    accuracy,
    area_under_generalized_risk_coverage,
    area_under_risk_coverage,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    negative_log_likelihood,
    overconfidence,
    predictive_entropy,
    smooth_calibration_error,
)
from bayeslora.analysis.metrics.bootstrap import Interval
from bayeslora.analysis.plots.study import (
    plot_accuracy_calibration,
    plot_cost,
    plot_grid_spread,
    plot_learning_rates,
    plot_pareto,
)
from bayeslora.analysis.tables.cost import cost_table, steps_to_reach
from bayeslora.analysis.tables.rates import spread_around_best
from bayeslora.analysis.tables.study import (
    BETTER,
    HIGHER,
    LOWER,
    METRICS,
    NO_DIFFERENCE,
    WORSE,
    at_best_settings,
    best_settings,
    paired_difference,
    paired_robustness,
    robustness_table,
    verdict,
)
from bayeslora.errors import InputError
from bayeslora.study.table import _workers


def table() -> pd.DataFrame:
    """Two methods, three learning rates, two seeds; NLL on test runs against that on validation."""
    rows = []
    for method, shift, seconds in (("LoRA", 0.0, 10.0), ("DoRA", 0.1, 30.0)):
        for rate, acc in ((1e-4, 0.6), (1e-3, 0.8), (1e-2, 0.7)):
            for seed in (0, 1):
                for split in ("validation", "test"):
                    nll = {"validation": 1 - acc, "test": acc}[split] + shift + 0.02 * seed
                    rows.append(
                        {
                            "task": "t",
                            "method": method,
                            "split": split,
                            "learning_rate": rate,
                            "batch_size": 8,
                            "rank": 8,
                            "seed": seed,
                            "accuracy": acc - shift + 0.04 * seed,
                            "nll": nll,
                            "ece": 0.1,
                            "brier": 0.3,
                            "examples": 200,
                            "train_seconds": seconds,
                            "predict_seconds": 4.0,
                            "peak_memory_mb": None,
                        }
                    )
    return pd.DataFrame(rows)


def test_robustness_is_over_settings_after_seeds():
    found = robustness_table(table(), metrics=["accuracy", "nll"])
    assert list(found.index) == [("t", "LoRA"), ("t", "DoRA")]
    lora = found.loc[("t", "LoRA")]
    parts = ("best", "median", "worst", "spread")
    assert [lora["accuracy", part] for part in parts] == pytest.approx([0.82, 0.72, 0.62, 0.20])
    assert [lora["nll", part] for part in parts] == pytest.approx([0.61, 0.71, 0.81, 0.20])  # lower is better
    assert lora["settings", "count"] == 3
    assert found.loc[("t", "DoRA")]["accuracy", "best"] == pytest.approx(0.72)


def test_a_number_with_a_sign_has_no_best_setting():
    rows = table().assign(overconfidence=lambda t: t["accuracy"] - 0.7)
    found = robustness_table(rows).loc[("t", "LoRA")]["overconfidence"]
    assert found.to_dict() == pytest.approx({"median": 0.02, "spread": 0.20})


def test_spread_around_each_methods_own_best_rate():
    """LoRA is best in the middle of the grid, DoRA at its end: three rates and two, which are chosen on validation."""
    rows = table()
    ends = (rows["method"] == "DoRA") & (rows["split"] == "validation") & (rows["learning_rate"] == 1e-4)
    rows.loc[ends, "nll"] = 0.0
    found = spread_around_best(rows, metrics=["accuracy", "nll"])
    assert list(found.index) == [("t", "LoRA"), ("t", "DoRA")]
    assert found.loc[("t", "LoRA")].to_dict() == pytest.approx(
        {"learning_rate": 1e-3, "rates": 3, "accuracy": 0.2, "nll": 0.2}
    )
    wide = pd.concat(
        [
            rows,
            rows.assign(learning_rate=lambda t: 100 * t["learning_rate"], accuracy=0.0)[rows["learning_rate"] == 1e-2],
        ]
    )
    assert spread_around_best(wide, metrics=["accuracy"]).loc[("t", "LoRA")]["accuracy"] == pytest.approx(
        0.2
    )  # not 0.82
    assert found.loc[("t", "DoRA")].to_dict() == pytest.approx(
        {"learning_rate": 1e-4, "rates": 2, "accuracy": 0.2, "nll": 0.2}
    )
    with pytest.raises(InputError, match="no rows of split 'dev'"):
        spread_around_best(rows, split="dev")


def test_settings_are_chosen_on_validation_alone():
    chosen = best_settings(table())
    assert list(chosen["learning_rate"]) == [1e-3, 1e-3]  # the worst on test
    rows = at_best_settings(table())
    assert set(rows["learning_rate"]) == {1e-3}
    assert len(rows) == 8
    assert list(best_settings(table(), metric="accuracy")["learning_rate"]) == [1e-3, 1e-3]
    with pytest.raises(InputError, match="no rows of split 'dev'"):
        best_settings(table(), split="dev")


def test_methods_keep_their_order_at_their_best_settings():
    """The first is the reference of the differences, also where its best setting comes late in the grid."""
    rows = table()
    rows.loc[(rows["method"] == "LoRA") & (rows["learning_rate"] == 1e-2), "nll"] = 0.0
    by_rate = rows.sort_values("learning_rate", kind="stable")
    assert list(best_settings(by_rate)["learning_rate"]) == [1e-2, 1e-3]
    assert list(at_best_settings(by_rate)["method"].unique()) == ["LoRA", "DoRA"]


def test_one_setting_needs_no_validation():
    only = table()[lambda t: (t["split"] == "test") & (t["learning_rate"] == 1e-2)]
    pd.testing.assert_frame_equal(at_best_settings(only), only)


def random_probs(rng, *shape, skill=0.0, labels=None):
    logits = rng.normal(size=(*shape, 3))
    if labels is not None:
        logits[..., np.arange(len(labels)), labels] += skill
    odds = np.exp(logits)
    return odds / odds.sum(-1, keepdims=True)


def area(probs, labels):
    return area_under_risk_coverage(predictive_entropy(probs), probs.argmax(-1) != labels)


def generalized_area(probs, labels):
    return area_under_generalized_risk_coverage(predictive_entropy(probs), probs.argmax(-1) != labels)


def test_the_estimate_is_the_difference_of_the_metric():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    ours, theirs = (random_probs(rng, 2, 60) for _ in range(2))
    scores = {
        "accuracy": accuracy,
        "nll": negative_log_likelihood,
        "ece": expected_calibration_error,
        "brier": brier_score,
        "aurc": area,
        "overconfidence": overconfidence,
        "smooth_ece": smooth_calibration_error,
        "classwise_ece": lambda probs, labels: classwise_calibration_error(probs, labels).mean(),
        "augrc": generalized_area,
    }
    assert scores.keys() == METRICS.keys()
    for metric, score in scores.items():
        expected = np.mean([score(a, labels) - score(b, labels) for a, b in zip(ours, theirs, strict=True)])
        found = paired_difference(ours, theirs, labels, metric=metric, num_resamples=50)
        assert found.estimate == pytest.approx(expected, abs=1e-12)
        mixed = paired_difference(ours[:1], theirs, labels, metric=metric, num_resamples=50)  # one against two seeds
        assert mixed.estimate == pytest.approx(
            score(ours[0], labels) - np.mean([score(b, labels) for b in theirs]), abs=1e-12
        )


def test_the_interval_is_the_standard_error_of_the_mean():
    """One seed: for a mean over examples, the bootstrap's deviation is s/√n up to its own error."""
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=400)
    ours, theirs = random_probs(rng, 1, 400), random_probs(rng, 1, 400)
    found = paired_difference(ours, theirs, labels, metric="nll", num_resamples=4000)
    losses = [-np.log(p[0][np.arange(400), labels]) for p in (ours, theirs)]
    expected = 2 * 1.96 * np.std(losses[0] - losses[1]) / np.sqrt(400)
    assert found.upper - found.lower == pytest.approx(expected, rel=0.08)


def test_pairs_take_out_what_methods_share():
    rng = np.random.default_rng(2)
    labels = rng.integers(3, size=300)
    theirs = random_probs(rng, 3, 300)
    ours = 0.98 * theirs + 0.02 / 3  # the same, a little less sure
    found = paired_difference(ours, theirs, labels, metric="nll")
    alone = np.std(-np.log(theirs[0][np.arange(300), labels])) / np.sqrt(300)
    assert found.verdict == BETTER
    assert found.upper - found.lower < alone


def test_noise_is_no_difference_and_skill_is_one():
    """Of 200 comparisons of methods that differ by chance alone, with a 95 % interval: at most 20, which a correct
    one exceeds with probability 1e-3."""
    rng = np.random.default_rng(3)
    verdicts = []
    for number in range(200):
        labels = rng.integers(3, size=100)
        ours, theirs = (random_probs(rng, 3, 100) for _ in range(2))
        verdicts.append(paired_difference(ours, theirs, labels, num_resamples=300, seed=number).verdict)
    assert verdicts.count(NO_DIFFERENCE) >= 180
    labels = rng.integers(3, size=200)
    good, poor = random_probs(rng, 3, 200, skill=2.0, labels=labels), random_probs(rng, 3, 200)
    for metric in ("accuracy", "nll", "brier"):
        assert paired_difference(good, poor, labels, metric=metric).verdict == BETTER
        assert paired_difference(poor, good, labels, metric=metric).verdict == WORSE


@pytest.mark.parametrize("metric", METRICS)
def test_seeds_that_disagree_widen_the_interval(metric):
    """Of every measure, that of order among them."""
    rng = np.random.default_rng(4)
    labels = rng.integers(3, size=400)
    theirs = np.repeat(random_probs(rng, 1, 400), 3, axis=0)
    steady = np.repeat(random_probs(rng, 1, 400, skill=0.5, labels=labels), 3, axis=0)
    moody = np.stack([random_probs(rng, 400, skill=skill, labels=labels) for skill in (-1.5, 0.5, 2.5)])
    widths = [np.ptp(paired_difference(p, theirs, labels, metric=metric)[1:3]) for p in (steady, moody)]
    assert widths[1] > 3 * widths[0]


def test_over_a_grid_the_estimate_is_that_of_the_robustness_table():
    rng = np.random.default_rng(5)
    labels = rng.integers(3, size=80)
    ours, theirs = (np.stack([random_probs(rng, 2, 80) for _ in range(5)]) for _ in range(2))
    rows = [
        {
            "task": "t",
            "split": "test",
            "method": name,
            "learning_rate": setting,
            "batch_size": 8,
            "rank": 8,
            "seed": seed,
            "accuracy": accuracy(probs[setting, seed], labels),
            "nll": negative_log_likelihood(probs[setting, seed], labels),
        }
        for name, probs in (("ours", ours), ("theirs", theirs))
        for setting in range(5)
        for seed in range(2)
    ]
    table = robustness_table(pd.DataFrame(rows), metrics=("accuracy", "nll")).loc["t"]
    for metric in ("accuracy", "nll"):
        for statistic in ("best", "median", "worst", "spread"):
            found = paired_robustness(ours, theirs, labels, metric=metric, statistic=statistic, num_resamples=20)
            column = table[metric, statistic]
            assert found.estimate == pytest.approx(column["ours"] - column["theirs"], abs=1e-12)


def test_one_setting_is_no_grid():
    rng = np.random.default_rng(6)
    labels = rng.integers(3, size=80)
    ours, theirs = random_probs(rng, 3, 80), random_probs(rng, 3, 80)
    assert paired_robustness(ours[None], theirs[None], labels, num_resamples=99) == paired_difference(
        ours, theirs, labels, num_resamples=99
    )


def test_less_spread_is_better():
    """A method that holds over the grid against one that fails at some settings; and the other way round."""
    rng = np.random.default_rng(7)
    labels = rng.integers(3, size=300)
    robust = np.stack([random_probs(rng, 2, 300, skill=1.0, labels=labels) for _ in range(4)])
    brittle = np.stack([random_probs(rng, 2, 300, skill=skill, labels=labels) for skill in (-2.0, 1.0, 1.0, 1.0)])
    for metric in ("accuracy", "nll"):
        for statistic in ("spread", "worst"):
            options = {"metric": metric, "statistic": statistic, "num_resamples": 300}
            assert paired_robustness(robust, brittle, labels, **options).verdict == BETTER
            assert paired_robustness(brittle, robust, labels, **options).verdict == WORSE
        found = paired_robustness(robust, brittle, labels, metric=metric, statistic="best", num_resamples=300)
        assert found.verdict == NO_DIFFERENCE


@pytest.mark.parametrize(
    ("ends", "higher", "word"),
    [
        ((0.1, 0.2), True, BETTER),
        ((0.1, 0.2), False, WORSE),
        ((-0.2, -0.1), True, WORSE),
        ((-0.2, -0.1), False, BETTER),
        ((-0.1, 0.1), True, NO_DIFFERENCE),
        ((0.0, 0.1), True, NO_DIFFERENCE),
        ((np.nan, np.nan), True, NO_DIFFERENCE),
        ((0.1, 0.2), None, HIGHER),
        ((-0.2, -0.1), None, LOWER),
        ((-0.1, 0.1), None, NO_DIFFERENCE),
    ],
)
def test_verdicts(ends, higher, word):
    assert verdict(Interval(0.0, *ends), higher_is_better=higher) == word


def test_differences_of_what_cannot_be_compared():
    probs = np.full((2, 4, 2), 0.5)
    with pytest.raises(InputError, match=r"got \(2, 4, 2\) and \(2, 3, 2\)"):
        paired_difference(probs, probs[:, :3], [0] * 4)
    with pytest.raises(InputError, match="metric must be one of"):
        paired_difference(probs, probs, [0] * 4, metric="auroc")
    with pytest.raises(InputError, match=r"\(settings, seeds, examples, classes\), with the same settings"):
        paired_robustness(probs, probs, [0] * 4)
    with pytest.raises(InputError, match="statistic must be one of best, median"):
        paired_robustness(probs[None], probs[None], [0] * 4, statistic="mean")
    with pytest.raises(InputError, match="no end of overconfidence is the better one"):
        paired_robustness(probs[None], probs[None], [0] * 4, metric="overconfidence", statistic="best")


def test_steps_to_reach():
    curve = [{"step": 20, "loss": 0.4}, {"step": 10, "loss": 0.6}, {"step": 30, "loss": 0.5}]
    assert steps_to_reach(curve, 0.6) == 10
    assert steps_to_reach(curve, 0.5) == 20  # a later rise does not matter
    assert np.isnan(steps_to_reach(curve, 0.3))
    assert np.isnan(steps_to_reach([], 0.3))


def test_cost():
    found = cost_table(timed(table()))
    assert list(found["train_ratio"]) == [1.0, 3.0]
    assert list(found["predict_seconds"]) == [20.0, 20.0]  # per 1000 examples
    assert list(found["predict_cpu_seconds"]) == [10.0, 10.0]
    assert found["peak_memory_mb"].isna().all()
    assert cost_table(timed(table()), reference="none")["train_ratio"].isna().all()


def timed(rows: pd.DataFrame) -> pd.DataFrame:
    """One worker, whose processor time is half of what the clock shows."""
    cpu = {f"{what}_cpu_seconds": rows[f"{what}_seconds"] / 2 for what in ("train", "predict")}
    return rows.assign(host="here", workers=1, **cpu)


def test_ratios_are_of_pairs_that_had_as_much_of_the_machine():
    """One run of LoRA shared the machine: its clock ran on, and a ratio of means would praise the other method."""
    rows = timed(table()[lambda t: t["learning_rate"] == 1e-3])
    shared = (rows["method"] == "LoRA") & (rows["seed"] == 0)
    rows.loc[shared, ["train_seconds", "train_cpu_seconds", "workers"]] = 129.0, 8.0, 3
    found = cost_table(rows).loc["t"]
    assert found["train_seconds"]["LoRA"] == (129 + 10) / 2
    assert found["train_ratio"]["DoRA"] == 3.0  # of seed 1 alone
    rows.loc[rows["method"] == "DoRA", "host"] = "there"
    assert np.isnan(cost_table(rows).loc["t"]["train_ratio"]["DoRA"])


def test_a_table_without_processor_time_has_no_ratios():
    found = cost_table(table())
    assert list(found["train_seconds"]) == [10.0, 30.0]
    assert found["train_ratio"].isna().all()


def test_workers_are_counted_where_their_cells_overlap():
    names = dict(zip("abcde", [("x", 0, 10), ("x", 1, 4), ("x", 5, 9), ("y", 0, 9), ("x", 10, 12)], strict=True))
    done = {name: {"host": host, "between": [*span]} for name, (host, *span) in names.items()}
    assert _workers({**done, "old": {"host": "x"}}) == {"a": 2, "b": 2, "c": 2, "d": 1, "e": 1, "old": None}


class TestPlots:
    @pytest.fixture(autouse=True)
    def _close(self):
        yield
        plt.close("all")

    def test_a_box_for_each_method(self):
        ax = plot_grid_spread(table(), metric="accuracy")
        assert [label.get_text() for label in ax.get_yticklabels()] == ["LoRA", "DoRA"]
        dots = [sorted(line.get_xdata()) for line in ax.lines if line.get_marker() == "."]
        np.testing.assert_allclose(dots[0], [62, 72, 82])
        assert ax.get_xlabel() == "accuracy (%)"

    def test_a_line_for_each_method(self):
        ax = plot_learning_rates(table(), metric="nll")
        assert ax.get_xscale() == "log"
        lines = {line.get_label(): line for line in ax.lines}
        np.testing.assert_allclose(lines["LoRA"].get_xdata(), [1e-4, 1e-3, 1e-2])
        np.testing.assert_allclose(lines["LoRA"].get_ydata(), [0.61, 0.81, 0.71])

    def test_many_methods_can_be_told_apart_and_leave_room(self):
        many = pd.concat([table()[lambda t: t["method"] == "LoRA"].assign(method=f"method {i}") for i in range(16)])
        ax = plot_cost(many)
        assert len({(line.get_color(), line.get_marker()) for line in ax.lines[::2]}) == 16
        ax.figure.canvas.draw()
        assert ax.get_window_extent().height > 1.2 * ax.figure.dpi  # inches, below the legend

    def test_points_are_at_the_best_setting_on_validation(self):
        ax = plot_accuracy_calibration(table(), metric="nll")
        (x, y) = ax.lines[0].get_xydata()[0]
        assert (x, y) == pytest.approx((82, 0.81))

    def test_cost_is_of_training_and_of_prediction(self):
        for rows, scale in ((table(), 1.0), (timed(table()), 0.5)):  # processor time where there is some
            ax = plot_cost(rows)
            points, lines = ax.lines[::2], ax.lines[1::2]
            assert [tuple(line.get_xydata()[0]) for line in points] == [
                pytest.approx((10 * scale, 0.81)),
                pytest.approx((30 * scale, 0.91)),
            ]
            assert [np.ptp(line.get_xdata()) for line in lines] == pytest.approx([20 * scale] * 2)  # 4 s for 200

    def test_the_front_has_names_and_the_rest_is_grey(self):
        """Costs of 1000 predictions 1, 2 and 3 s: the second is dearer and worse than the first, the third better."""
        rows = [
            table()[lambda t: t["method"] == "LoRA"].assign(method=name, predict_seconds=0.2 * cost, nll=nll)
            for name, cost, nll in (("cheap", 1, 0.6), ("beaten", 2, 0.7), ("dear", 3, 0.5))
        ]
        ax = plot_pareto(pd.concat(rows))
        assert ax.get_legend_handles_labels()[1] == ["cheap", "dear"]
        grey, *_ = ax.lines
        np.testing.assert_allclose(grey.get_xydata(), [[2, 0.7]])
        named = {line.get_label(): line.get_xydata()[0] for line in ax.lines[-2:]}
        np.testing.assert_allclose(named["dear"], [3, 0.5])
        with pytest.raises(InputError, match="no better end"):
            plot_pareto(table().assign(overconfidence=0.1), metric="overconfidence")

    def test_one_task_a_picture(self):
        both = pd.concat([table(), table().assign(task="u")])
        with pytest.raises(InputError, match="one task"):
            plot_grid_spread(both)
