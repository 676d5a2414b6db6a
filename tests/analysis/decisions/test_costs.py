"""Answers with costs: against every alternative, by simulation, and as a user would ask for them."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest

from bayeslora.analysis import decide, deferral_curve, plot_deferral, risk_coverage
from bayeslora.analysis.report.page import RunResults, SplitResults, report_html
from bayeslora.errors import InputError
from bayeslora.files.costs import read_costs

COSTS = np.array([[0.0, 1.0, 4.0], [2.0, 0.0, 1.0], [6.0, 3.0, 0.0]])


def calibrated(size, seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet([0.7, 0.7, 0.7], size)
    return probs, (probs.cumsum(1) < rng.random((size, 1))).sum(1)


def test_no_other_answer_is_expected_to_cost_less():
    probs, _ = calibrated(50)
    found = decide(probs, COSTS, person=0.8)
    for row, answer, cost, over in zip(probs, *found, strict=True):
        every = [sum(p * COSTS[truth, given] for truth, p in enumerate(row)) for given in range(3)]
        assert cost == pytest.approx(min(every))
        assert every[answer] == pytest.approx(min(every))
        assert over == (min(every) > 0.8)


def test_calibrated_probabilities_promise_what_answers_cost():
    """The mean of n costs in [0, 6] is within four standard errors of what was expected."""
    probs, labels = calibrated(20_000)
    found = decide(probs, COSTS)
    realized = COSTS[labels, found.answer]
    assert abs(realized.mean() - found.expected_cost.mean()) < 4 * realized.std() / np.sqrt(20_000)


def test_the_price_is_the_best_threshold_of_calibrated_probabilities():
    """Over shares, the curve is lowest where the price is; the cost there is within noise of the lowest."""
    probs, labels = calibrated(20_000, seed=1)
    curve = deferral_curve(probs, labels, COSTS, person=0.5)
    over = decide(probs, COSTS, person=0.5).hand_over
    assert curve.cost[over.sum()] - curve.cost.min() < 4 * 0.5 / np.sqrt(20_000)
    assert curve.threshold[over.sum()] > 0.5 >= curve.threshold[over.sum() + 1]


def test_with_errors_of_one_cost_it_is_risk_times_coverage():
    probs, labels = calibrated(60)
    curve = deferral_curve(probs, labels, 1 - np.eye(3))
    known = risk_coverage(1 - probs.max(1), probs.argmax(1) != labels)
    np.testing.assert_allclose(curve.cost[:-1][::-1], known.risk * known.coverage, atol=1e-12)
    assert curve.cost[-1] == 0


def test_ties_are_the_mean_over_their_orders():
    probs = np.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5], [0.5, 0.5]])
    labels = np.array([0, 0, 1, 1])
    wrong = np.array([0.0, 0.0, 1.0, 1.0])
    orders = [[*order, 1] for order in itertools.permutations([0, 2, 3])]
    left = [[wrong[order[k:]].sum() + 0.3 * k for k in range(5)] for order in orders]
    np.testing.assert_allclose(deferral_curve(probs, labels, 1 - np.eye(2), person=0.3).cost, np.mean(left, 0) / 4)


def test_the_page_has_costs_differences_and_thresholds():
    def run(name, power):
        probs, labels = calibrated(200)
        sharper = probs**power / (probs**power).sum(1, keepdims=True)
        split = SplitResults(labels, (), sharper, np.zeros(200), np.zeros(200))
        return RunResults(name, {}, {"test": split}, ("a", "b", "c"))

    runs = [run("first", 4.0), run("second", 1.0)]
    without = report_html(runs)
    assert 'id="deferral"' not in without
    page = report_html(runs, costs=(COSTS, 0.8))
    probs, labels = calibrated(200)
    realized = COSTS[labels, decide(probs, COSTS).answer]
    assert f">{realized.mean():.3f}<" in page
    share = decide(probs, COSTS, person=0.8).hand_over.mean()
    assert (
        f"second: hand over what is expected to cost more than 0.8, a person&#39;s price. That is {100 * share:.0f} %"
        in page
    )
    assert "Less the cost of first" in page
    assert "what is expected to cost as much or more" in report_html(runs, costs=(COSTS, None))


def test_the_picture_marks_where_the_price_is():
    probs, labels = calibrated(300)
    ax = plot_deferral({"calibrated": (probs, labels)}, COSTS, person=0.8)
    share = decide(probs, COSTS, person=0.8).hand_over.mean()
    assert ax.lines[1].get_xdata()[0] == pytest.approx(100 * share)
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("truth,good\ngood,0\n", "must have a header"),
        ("truth,good,bad\ngood,0,1\nbad,5\n", "must have a header"),
        ("truth,good,bad\ngood,0,1\ngood,5,0\n", "must have a header"),
        ("truth,good,bad\ngood,0,x\nbad,5,0\n", "no table of numbers"),
        ("truth,good,bad,person\ngood,0,1,0.1\nbad,5,0,0.2\n", "several prices"),
        ("truth,good,bad\ngood,0,nan\nbad,5,0\n", "finite"),
        ("", "no table of numbers"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path, text, said):
    file = tmp_path / "costs.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        read_costs(file, ("bad", "good"))


def test_a_file_is_read_in_the_order_of_the_classes(tmp_path):
    file = tmp_path / "costs.csv"
    file.write_text("truth,good,bad\ngood,0,1\nbad,5,0\n")
    costs, person = read_costs(file, ("bad", "good"))
    assert costs.tolist() == [[0, 5], [1, 0]]
    assert person is None
    with pytest.raises(InputError, match="for one class an example"):
        read_costs(file, ())
    with pytest.raises(InputError, match="cannot read"):
        read_costs(tmp_path / "none.csv", ("bad", "good"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: decide([[0.5, 0.5]], [[0, 1]]), "shape"),
        (lambda: decide([[0.5, 0.5]], 1 - np.eye(2), person=np.nan), "NaN"),
        (lambda: deferral_curve([[0.5, 0.5]], [0], 1 - np.eye(2), person=np.inf), "finite"),
    ],
)
def test_what_does_not_fit_is_refused(call, said):
    with pytest.raises(InputError, match=said):
        call()
