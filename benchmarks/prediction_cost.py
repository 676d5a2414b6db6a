"""What sixteen draws cost beside one pass of the network, and what noise in the last blocks alone does to predictions.

    python benchmarks/prediction_cost.py RUN --output results            # RUN: a folder that bayeslora fit wrote
    python benchmarks/prediction_cost.py RUN --draws 16 --examples 500 --rounds 5 --blocks 6 3 2 1

For each number of last blocks the width of their noise is tuned on the validation split; then the test split is
predicted, all numbers of blocks and the mean in turn in every round. Ratios are to the mean's prediction of the same
round, in processor time; the table has their medians with the smallest and the largest. Writes prediction_cost.json
and prediction_cost.md.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

from bayeslora import open_run
from bayeslora.adapters.blocks import fewer_blocks, repeated_blocks
from bayeslora.analysis import area_under_risk_coverage, expected_calibration_error, predictive_entropy
from bayeslora.models import Tuning
from bayeslora.prediction import Prediction
from bayeslora.storage.manifest import version_info

HEADER = ("blocks with noise", "width", "ratio", "smallest", "largest", "NLL", "ECE (%)", "AURC (%)", "accuracy (%)")


def scores(prediction: Prediction) -> dict[str, float]:
    """Of labelled classes or choices."""
    probs, labels = prediction.probs, prediction.labels
    assert probs is not None
    wrong = probs.argmax(-1) != labels
    return {
        "nll": float(prediction.nll),
        "ece": expected_calibration_error(probs, labels),
        "aurc": area_under_risk_coverage(predictive_entropy(probs), wrong),
        "accuracy": float(1 - wrong.mean()),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rows of the table, and what they were measured on."""
    run = open_run(arguments.run, model=arguments.model, data_dir=arguments.data_dir)
    bayes = run.posterior
    everything = len(repeated_blocks(bayes.network))
    tuned_on = run.data("validation", limit=arguments.validation, labelled=True)
    tested = run.data("test", limit=arguments.examples, labelled=True)
    counts = arguments.blocks or [None, *reversed(fewer_blocks(bayes.network, bayes.model.groups))]
    options = {"batch_size": arguments.batch_size, "progress": False}
    tunings: dict[str, Tuning | None] = {"none": None}
    for count in counts:
        count = None if count == everything else count
        found = bayes.tune(tuned_on, blocks=count, antithetic=True, num_samples=arguments.draws, **options)
        tunings[str(count or "all")] = found
    seconds: dict[str, list[float]] = {name: [] for name in tunings}
    predictions: dict[str, Prediction] = {}
    for _ in range(arguments.rounds):
        for name, tuning in tunings.items():
            bayes.tuning = tuning
            began = time.process_time()
            draws = 0 if tuning is None else arguments.draws
            predictions[name] = bayes.predict(tested, draws, antithetic=draws > 0, **options)
            seconds[name].append(time.process_time() - began)
    rows = []
    for name, tuning in tunings.items():
        ratios = [own / plain for own, plain in zip(seconds[name], seconds["none"], strict=True)]
        ratio = {"ratio": statistics.median(ratios), "smallest": min(ratios), "largest": max(ratios)}
        rows.append({"blocks": name, "width": tuning and tuning.width} | ratio | scores(predictions[name]))
    about = {"blocks": everything, "examples": len(tested), "validation": len(tuned_on), "versions": version_info()}
    return about | {"draws": arguments.draws, "rounds": arguments.rounds, "rows": rows}


def markdown(found: dict[str, Any]) -> str:
    lines = [f"| {' | '.join(HEADER)} |", "|---|" + "---:|" * (len(HEADER) - 1)]
    for row in found["rows"]:
        width = "-" if row["width"] is None else f"{row['width']:.2f}"
        times = [f"{row[name]:.2f}" for name in ("ratio", "smallest", "largest")]
        percents = [f"{100 * row[name]:.1f}" for name in ("ece", "aurc", "accuracy")]
        cells = [row["blocks"], width, *times, f"{row['nll']:.3f}", *percents]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--model", help="where the base model is now, if it moved")
    parser.add_argument("--data-dir", type=Path, help="where the data is now, if it moved")
    parser.add_argument("--blocks", type=int, nargs="+", help="default: all, and 1, 2, 4, ... that leave some out")
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--examples", type=int, default=500, help="of the test split")
    parser.add_argument("--validation", type=int, default=150, help="examples to tune widths on")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/prediction"))
    arguments = parser.parse_args()
    found = measure(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "prediction_cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "prediction_cost.md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    main()
