"""The results table: what is averaged, in which order, and how it prints."""

import numpy as np
import pandas as pd
import pytest

from bayeslora.analysis import comparison_table, to_markdown
from bayeslora.errors import InputError


def run(method: str, split: str, seed: int, **metrics: float) -> dict:
    return {"method": method, "split": split, "seed": seed, **metrics}


ROWS = [
    run("LoRA", "test", 0, accuracy=0.78, nll=0.52, ece=0.09),
    run("MonteCLoRA", "test", 0, accuracy=0.80, nll=0.45, ece=0.04),
    run("LoRA", "shifted", 0, accuracy=0.61, nll=0.91, ece=0.20),
    run("LoRA", "test", 1, accuracy=0.80, nll=0.50, ece=0.11),
    run("MonteCLoRA", "test", 1, accuracy=0.79, nll=0.44, ece=0.03),
    run("LoRA", "test", 2, accuracy=0.79, nll=0.54, ece=0.07),
]


def test_mean_and_sample_deviation_over_seeds():
    table = comparison_table(ROWS)
    lora = table.loc[("test", "LoRA")]
    assert lora["accuracy", "mean"] == pytest.approx(0.79)
    assert lora["accuracy", "std"] == pytest.approx(0.01)  # 0.0082 if divided by n
    assert lora["nll", "std"] == pytest.approx(np.std([0.52, 0.50, 0.54], ddof=1))
    assert lora["seeds", "count"] == 3
    assert table.loc[("test", "MonteCLoRA")]["ece", "mean"] == pytest.approx(0.035)


def test_rows_and_metrics_keep_the_order_of_first_appearance():
    table = comparison_table(ROWS)
    assert list(table.index) == [("test", "LoRA"), ("test", "MonteCLoRA"), ("shifted", "LoRA")]
    assert list(table.columns.get_level_values(0).unique()) == ["accuracy", "nll", "ece", "seeds"]


def test_methods_have_one_order_in_all_splits():
    rows = [run("b", "x", 0, nll=1.0), run("a", "y", 0, nll=2.0), run("b", "y", 0, nll=3.0)]
    assert list(comparison_table(rows).index) == [("x", "b"), ("y", "b"), ("y", "a")]


def test_one_seed_has_no_deviation():
    row = comparison_table(ROWS).loc[("shifted", "LoRA")]
    assert row["accuracy", "mean"] == 0.61
    assert np.isnan(row["accuracy", "std"])


@pytest.mark.parametrize("diverged", [{"nll": np.nan}, {}])
def test_diverged_run_is_not_averaged_away(diverged):
    rows = [run("a", "x", 0, nll=1.0, ece=0.1), run("a", "x", 1, nll=1.2, ece=0.3)]
    rows.append(run("a", "x", 2, ece=0.2, **diverged))
    row = comparison_table(rows).loc[("x", "a")]
    assert np.isnan(row["nll", "mean"])
    assert np.isnan(row["nll", "std"])
    assert (row["ece", "mean"], row["ece", "std"]) == pytest.approx((0.2, 0.1))


def test_markdown_reads_in_a_terminal_and_on_github():
    assert to_markdown(comparison_table(ROWS)).splitlines() == [
        "| split   | method     | seeds | accuracy (%) |           NLL |   ECE (%) |",
        "| ------- | ---------- | ----: | -----------: | ------------: | --------: |",
        "| test    | LoRA       |     3 |   79.0 ± 1.0 | 0.520 ± 0.020 | 9.0 ± 2.0 |",
        "| test    | MonteCLoRA |     2 |   79.5 ± 0.7 | 0.445 ± 0.007 | 3.5 ± 0.7 |",
        "| shifted | LoRA       |     1 |         61.0 |         0.910 |      20.0 |",
    ]


def test_markdown_of_chosen_metrics_in_the_chosen_order():
    rows = [run("a", "x", 0, accuracy=0.5, nll=1.0, brier=0.25, perplexity=12.3456)]
    header, _, body = to_markdown(comparison_table(rows), metrics=["perplexity", "brier"]).splitlines()
    assert header.split(" | ")[3:] == ["perplexity", "Brier |"]
    assert [cell.strip() for cell in body.strip("|").split("|")] == ["x", "a", "1", "12.346", "0.250"]


def test_missing_number_is_a_dash_and_a_bar_in_a_name_is_escaped():
    rows = [run("a|b", "x", 0, nll=1.0), run("c", "x", 0, ece=0.1)]
    lines = to_markdown(comparison_table(rows)).splitlines()
    assert lines[2] == "| x     | a\\|b   |     1 | 1.000 |       - |"
    assert lines[3] == "| x     | c      |     1 |     - |    10.0 |"


def test_table_is_a_data_frame_that_can_be_indexed_by_metric():
    means = comparison_table(ROWS).xs("mean", axis=1, level=1)
    assert isinstance(means, pd.DataFrame)
    assert means.loc["test"]["nll"].idxmin() == "MonteCLoRA"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "rows is empty"),
        ([{"method": "a", "split": "x", "nll": 1.0}], "every row needs a 'seed'"),
        ([run("a", "x", 0, nll=1.0), {"method": "a", "seed": 1, "nll": 1.0}], "every row needs a 'split'"),
        ([run("a", "x", 0, nll=1.0)] * 2, "split=x, method=a, seed=0 is given twice"),
        ([run("a", "x", 0)], "rows hold no metric"),
        ([run("a", "x", 0, nll="low")], "metric 'nll' must be a number"),
    ],
)
def test_wrong_rows_are_named(rows, message):
    with pytest.raises(InputError, match=message):
        comparison_table(rows)


def test_what_combines_all_seeds_has_none():
    rows = [run("a", "x", 0, nll=1.0), run("a", "x", 1, nll=3.0), run("ensemble", "x", None, nll=0.5)]
    table = comparison_table(rows)
    assert table["nll", "mean"].tolist() == [2.0, 0.5]
    assert table["seeds", "count"].tolist() == [2, 1]
    with pytest.raises(InputError, match=r"method=ensemble, seed=\w+ is given twice"):
        comparison_table([*rows, rows[-1]])


def test_unknown_metric_is_answered_with_the_known_ones():
    with pytest.raises(InputError, match="no metric 'f1'; it has accuracy, nll, ece"):
        to_markdown(comparison_table(ROWS), metrics=["f1"])
