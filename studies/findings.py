"""Makes the tables of docs/findings.md from folders that ``bayeslora compare`` wrote.

    python studies/findings.py runs/grid            # nlu_grid.yaml: tables over the grid, differences in pairs
    python studies/findings.py runs/shift runs/glue # shift.yaml, glue.yaml: one setting, every split and task

A folder's own ``summary.md`` has all settings that it holds; this keeps to the rates that every method has with all
seeds, once with all settings and once with those at which LoRA learned something, and compares with LoRA's temperature
too.
"""

import sys
from pathlib import Path

import pandas as pd

from bayeslora.analysis import to_markdown
from bayeslora.analysis.tables.study import SETTING, robustness_table
from bayeslora.study import Study
from bayeslora.study.differences import differences, grid_differences
from bayeslora.study.summary import headline

HERE = Path(__file__).parent
RATES = [3e-4, 1e-3, 3e-3]
LEARNED = 0.65  # an accuracy; 0.573 of the test sentences are of one class
REFERENCES = ("LoRA", "LoRA + temperature*")
STUDIES = {"grid": "nlu_grid.yaml", "shift": "shift.yaml", "glue": "glue.yaml"}


def over_the_grid(study: Study, results: pd.DataFrame, folder: Path) -> None:
    """Median, worst and spread over the settings of :data:`RATES`, and over those where LoRA learned."""
    rows = results[results["learning_rate"].isin(RATES)]
    lora = rows[(rows["split"] == "test") & (rows["method"] == "LoRA")]
    learned = lora.groupby(SETTING)["accuracy"].transform("mean") > LEARNED
    these = lora[learned].drop_duplicates(SETTING)[SETTING]
    compare(study, rows, folder)
    compare(study, rows.merge(these), folder)


def compare(study: Study, rows: pd.DataFrame, folder: Path) -> None:
    """Table and differences over the settings of ``rows``."""
    print(f"\n{len(rows.drop_duplicates(SETTING))} settings; runs of each method:")
    tested = rows[rows["split"] == "test"]
    learned = tested[tested["accuracy"] > LEARNED].groupby("method")
    counts = {"runs": tested.groupby("method", sort=False).size(), "learned": learned.size()}
    print(pd.DataFrame(counts | {"ece where learned": learned["ece"].mean().round(4)}).to_string())
    table = robustness_table(rows)
    columns = [(metric, part) for metric in ("accuracy", "nll", "ece") for part in ("median", "worst", "spread")]
    print(table[columns].round(4).to_string())
    for reference in REFERENCES:
        for statistic in ("median", "spread"):
            print(f"\nfrom {reference}, in the {statistic}\n")
            print(grid_differences(study, rows, folder, "test", statistic, reference).round(4).T.to_string())


def at_one_setting(study: Study, results: pd.DataFrame, folder: Path) -> None:
    """Means over seeds of every task and split, and differences from LoRA and from LoRA with a temperature."""
    for task, rows in results.groupby("task", sort=False):
        print(f"\n{task}\n\n{to_markdown(headline(rows))}")
        for split in [split for split in rows["split"].unique() if split != "validation"]:
            for reference in REFERENCES:
                print(f"\n{split}, from {reference}\n")
                print(differences(study, rows, folder, split, reference).round(4).T.to_string())


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[1:]:
        place = Path(name)
        found = pd.read_csv(place / "results.csv")
        kind = "grid" if len(found.drop_duplicates(SETTING)) > 1 else "glue" if found["task"].nunique() > 1 else "shift"
        described = Study.from_yaml(HERE / STUDIES[kind])
        if kind == "grid":
            over_the_grid(described, found, place)
        else:
            at_one_setting(described, found, place)
