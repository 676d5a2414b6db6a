"""``bayeslora predict`` and ``bayeslora evaluate``: what a fitted run says, and how right it is."""

import argparse
import json
import sys
from typing import Any

from bayeslora.analysis.report.opening import direction
from bayeslora.bulk.predicting import predict_file
from bayeslora.command.terminal import shows_unicode
from bayeslora.errors import InputError
from bayeslora.judging.judge import judge
from bayeslora.prediction import Prediction
from bayeslora.runs import FittedRun, open_run

NEXT_TO_NOTHING = 0.001  # of the entropy


def run_predict(arguments: argparse.Namespace) -> None:
    """One JSON object a line; of a file, its rows into another."""
    run = _open(arguments)
    if run.posterior.tuning is not None:
        print(f"{run.posterior.tuning} (--untuned leaves that out)", file=sys.stderr)
    if arguments.input:
        return _predict_file(run, arguments)
    if arguments.text:
        data: Any = run.encode(arguments.text, arguments.text_pair)
        named: Any = [{"text": text} for text in arguments.text]
    else:
        data = run.data(arguments.split, limit=arguments.max_examples)
        named = [{"index": row} for row in run.task.rows(arguments.split, limit=arguments.max_examples)]
    texts = arguments.text or run.task.texts(arguments.split, limit=arguments.max_examples)
    prediction = _predict(run, data, arguments).of_texts(texts)
    if prediction.monte_carlo_error is not None:
        draws = f"{len(prediction.sample_outputs)} draws"
        print(f"{draws}: Monte Carlo error {prediction.monte_carlo_error.mean():.3f} on average", file=sys.stderr)
    _say_what_is_too_small(prediction)
    for index, of in enumerate(named):
        print(json.dumps(of | prediction.row(index), ensure_ascii=not shows_unicode(sys.stdout)))


def _predict_file(run: FittedRun, arguments: argparse.Namespace) -> None:
    drawing = ("num_samples", "batch_size", "seed", "antithetic")
    reading = ("input_format", "text_columns", "coverage", "top_uncertain", "by", "skip_errors", "prefix")
    options = {name: getattr(arguments, name) for name in (*drawing, *reading)}
    options["prefix"] = options["prefix"] or ""
    result = predict_file(run, arguments.input, arguments.output, **options)
    again = f", {result.resumed} of them by a call before" if result.resumed else ""
    without = f", {result.skipped} skipped" if result.skipped else ""
    print(
        f"{result.rows} rows read{again}{without}; {result.written} written to {arguments.output}",
        file=sys.stderr,
    )


def run_evaluate(arguments: argparse.Namespace) -> None:
    run = _open(arguments)
    split = arguments.split or run.labelled_split()
    data = run.data(split, limit=arguments.max_examples, labelled=True)
    prediction = _predict(run, data, arguments, progress=not arguments.json)
    drawn = prediction.sample_outputs
    count = arguments.num_samples if drawn is None or not arguments.num_samples else len(drawn)
    scores: dict[str, Any] = {"split": split, "examples": len(data), "num_samples": count}
    tuning = run.posterior.tuning
    scores |= {} if tuning is None else {"tuned_width": tuning.width, "tuned_temperature": tuning.temperature}
    scores |= prediction.scores(run.task)
    asked = {"max_length": run.record["max_length"], "limit": arguments.max_examples}
    scores |= run.task.left_out(run.tokenizer, split, **asked)
    if prediction.monte_carlo_error is not None:
        scores["monte_carlo_error"] = float(prediction.monte_carlo_error.mean())
    if arguments.generate:
        scores |= _judge(run, split, arguments)
    if arguments.json:
        print(json.dumps(scores))
        return
    for name, value in scores.items():
        print(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}")
    if prediction.probs is not None:
        right, confidence = prediction.probs.argmax(1) == prediction.labels, prediction.probs.max(1)
        print(f"{'confidence':24} {confidence.mean():.4f}, {direction(right, confidence, prediction.groups)}")
    _say_what_is_too_small(prediction)


def _say_what_is_too_small(prediction: Prediction) -> None:
    information, entropy = prediction.mutual_information, prediction.entropy
    draws = prediction.sample_outputs
    if information is None or draws is None or len(draws) < 2:
        return
    if information.mean() < NEXT_TO_NOTHING * entropy.mean():
        print(
            f"the draws agree (mutual information {information.mean():.1g} of {entropy.mean():.2g} nats): what is "
            "uncertain here is the label, and the posterior says next to nothing about it",
            file=sys.stderr,
        )


def _open(arguments: argparse.Namespace) -> FittedRun:
    run = open_run(arguments.run_dir, model=arguments.model, data_dir=arguments.data_dir)
    if arguments.untuned:
        run.posterior.tuning = None
    return run


def _predict(run: FittedRun, data: Any, arguments: argparse.Namespace, *, progress: bool = True) -> Prediction:
    return run.posterior.predict(
        data,
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        antithetic=arguments.antithetic,
        tolerance=arguments.tolerance,
        blocks=arguments.blocks,
        progress=progress,
    )


def _judge(run: FittedRun, split: str, arguments: argparse.Namespace) -> dict[str, float]:
    task: Any = run.task  # one that writes has what is needed to judge it
    if not task.writes:
        raise InputError(f"--generate is for texts, and task {task.name!r} is one of kind {task.kind}")
    names = ("num_samples", "max_new_tokens", "temperature", "top_p", "execute_generated_code", "seed", "batch_size")
    return judge(
        run.posterior,
        task,
        run.tokenizer,
        split,
        limit=arguments.max_examples,
        progress=not arguments.json,
        **{name: getattr(arguments, name) for name in names},
    )
