"""``bayeslora watch``: does a file look like the data that a run was fitted to?"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bayeslora.analysis.decisions.shift import ShiftTest, shift_tests
from bayeslora.bulk.predicting import predict_file
from bayeslora.errors import InputError
from bayeslora.runs import FittedRun, open_run


def run(arguments: argparse.Namespace) -> None:
    fitted = open_run(arguments.run_dir, model=arguments.model, data_dir=arguments.data_dir)
    labelling = fitted.posterior.model.labelling
    if not labelling.of_classes or labelling.several_labels:
        raise InputError(f"watch is for classes, and this run is of kind {fitted.task.kind}")
    if arguments.split not in fitted.task.splits:
        raise InputError(
            f"task {fitted.task.name!r} has no split {arguments.split!r} to compare with, but "
            f"{', '.join(fitted.task.splits)}: name one with --split that was not trained on"
        )
    known = fitted.data(arguments.split, limit=arguments.max_examples)
    drawing = {name: getattr(arguments, name) for name in ("num_samples", "batch_size", "seed")}
    stream, rows = _of_file(fitted, arguments, drawing)
    prediction = fitted.posterior.predict(known, progress=not arguments.json, **drawing)
    information = prediction.mutual_information if arguments.num_samples else None
    tests = shift_tests((prediction.probs, information), stream, seed=arguments.seed)
    differs = [test for test in tests if test.p_value <= arguments.level]
    if arguments.json:
        said = {"split": arguments.split, "examples": len(known), "rows": rows, "level": arguments.level}
        print(json.dumps(said | {"differs": bool(differs), "tests": [test._asdict() for test in tests]}))
        return
    print(f"{rows} rows of {arguments.input}, beside {len(known)} examples of {arguments.split}")
    names = fitted.label_names or tuple(map(str, range(prediction.probs.shape[1])))
    print(f"{'':34} {arguments.split:>12} {'input':>10} {'difference':>12} {'p':>8}")
    for test in tests:
        print(_line(test, names))
    print(_verdict(differs, arguments.level))


def _of_file(
    fitted: FittedRun, arguments: argparse.Namespace, drawing: dict[str, Any]
) -> tuple[tuple[np.ndarray, np.ndarray | None], int]:
    """Probabilities and mutual information of the file's rows, and how many they are."""
    names = fitted.label_names or ()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "predicted.jsonl"
        reading = {name: getattr(arguments, name) for name in ("input_format", "text_columns", "skip_errors")}
        predict_file(
            fitted, arguments.input, output, prefix="watched ", progress=not arguments.json, **drawing, **reading
        )
        with output.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    probs = np.array([[row[f"watched P({name})"] for name in names] for row in rows])
    probs /= probs.sum(1, keepdims=True)  # six digits were written
    information = np.array([row["watched mutual_information"] for row in rows])
    return (probs, information if arguments.num_samples else None), len(rows)


def _line(test: ShiftTest, names: tuple[str, ...]) -> str:
    what = {"entropy": "mean entropy (nats)", "mutual_information": "mean mutual information (nats)"}
    label = what[test.measure] if test.label is None else f"predicted {names[test.label]!r:.24}"
    apart = f"{test.difference:+12.3f}" if test.label is None else f"{test.difference:12.3f}"
    return f"{label:34} {test.reference:12.3f} {test.stream:10.3f} {apart} {test.p_value:8.4f}"


def _verdict(differs: list[ShiftTest], level: float) -> str:
    if not differs:
        return f"no difference seen at level {level:g}; that is no proof that there is none"
    words = []
    for test in differs:
        more = "more" if test.difference > 0 else "less"
        words.append(
            {
                "entropy": f"it is {more} uncertain of these rows",
                "mutual_information": f"its draws disagree {more} about them",
                "labels": "it predicts other labels",
            }[test.measure]
        )
    return (
        f"differs at level {level:g}: {', '.join(words)}. Scores, thresholds and sets of the run may not hold for them"
    )
