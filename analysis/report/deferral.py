"""What errors cost, and what a person would take over: the columns and the words of a page's section on deferral."""

from collections.abc import Iterator, Sequence

import numpy as np

from bayeslora.analysis.decisions.costs import curve_of_costs, realized_costs
from bayeslora.analysis.report.columns import Column
from bayeslora.analysis.report.results import RunResults

BUDGETS = (0.0, 0.1, 0.2, 0.3)  # shares of the examples that a person has time for


def cost_columns(costs: np.ndarray, person: float | None) -> list[Column]:
    """Mean cost of an example at each budget, and where a person's price is the threshold."""
    price = 0.0 if person is None else person

    def at(budget: float) -> Column:
        def cost(probs: np.ndarray, labels: np.ndarray) -> float:
            curve = curve_of_costs(*realized_costs(probs, labels, costs), price)
            return float(np.interp(budget, curve.share, curve.cost))

        return Column(f"{100 * budget:g} % handed over", "lower is better", cost)

    def by_price(probs: np.ndarray, labels: np.ndarray) -> float:
        expected, realized = realized_costs(probs, labels, costs)
        return float(np.where(expected > price, price, realized).mean())

    columns = [at(budget) for budget in BUDGETS]
    if person is not None:
        columns.append(Column(f"what is expected to cost more than {person:g}", "lower is better", by_price))
    return columns


def thresholds(runs: Sequence[RunResults], costs: np.ndarray, person: float | None) -> Iterator[str]:
    """For each run a sentence: the threshold to use, on the split that it is judged by."""
    for run in runs:
        split, found = next(iter(run.splits.items()))
        if found.probs is None or found.labels is None:
            continue
        curve = curve_of_costs(*realized_costs(found.probs, found.labels, costs), 0.0)
        if person is not None:
            share = (curve.threshold[1:] > person).mean()
            yield (
                f"{run.name}: hand over what is expected to cost more than {person:g}, a person's price. That is "
                f"{100 * share:.0f} % of {split}."
            )
        else:
            ends = [curve.threshold[round(budget * (len(curve.share) - 1))] for budget in BUDGETS[1:]]
            at = ", ".join(f"{end:.3f} for {100 * budget:g} %" for budget, end in zip(BUDGETS[1:], ends, strict=True))
            yield f"{run.name}: hand over what is expected to cost as much or more: {at} of {split}."
