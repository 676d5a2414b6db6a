"""The commands on a finished run, and their flags."""

from pathlib import Path
from typing import Any

from bayeslora.command.flags import command, number, path, word
from bayeslora.command.options.groups import (
    add_antithetic,
    add_blocks,
    add_input_columns,
    add_predicted_options,
    add_prediction_options,
    add_run_options,
    add_untuned,
)
from bayeslora.options import COUNT, NOT_NEGATIVE, Range


def add_commands_on_runs(commands: Any) -> None:
    _add_evaluate(commands)
    _add_predict(commands)
    _add_tune(commands)
    _add_diagnose(commands)
    _add_report(commands)
    _add_watch(commands)


def _add_evaluate(commands: Any) -> None:
    parser = command(
        commands, "evaluate", "predict:run_evaluate", "score a fitted run on a labelled split", check="check_evaluate"
    )
    add_run_options(parser, auto=True)
    add_antithetic(parser)
    add_blocks(parser)
    add_untuned(parser)
    parser.add_argument("--split", type=word, help="default: test where it is labelled, else validation")
    parser.add_argument("--max-examples", type=number("max_examples"), help="a random subset of this size")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
    group = parser.add_argument_group("answers written by a language model (gsm8k, humaneval)")
    group.add_argument("--generate", action="store_true", help="let it write, and judge that too")
    group.add_argument("--max-new-tokens", type=number("max_new_tokens"), default=256)
    group.add_argument(
        "--temperature", type=number("temperature", NOT_NEGATIVE), default=0.0, help="0 takes the most probable token"
    )
    group.add_argument("--top-p", type=number("top_p", Range(float, 0, 1, above=True)), default=1.0)
    group.add_argument("--execute-generated-code", action="store_true", help="humaneval: run it, in a confined process")


def _add_predict(commands: Any) -> None:
    parser = command(
        commands,
        "predict",
        "predict:run_predict",
        "predict with a fitted run, and say how certain it is",
        "One JSON object a line on standard output: probabilities, entropy and mutual information (nats), with the\n"
        "text, or as index the row of the split's file, from 0. With --input, a file of rows into another.",
        check="check_predict",
    )
    add_run_options(parser, auto=True)
    add_antithetic(parser)
    add_blocks(parser)
    add_untuned(parser)
    add_predicted_options(parser)


def _add_tune(commands: Any) -> None:
    parser = command(
        commands,
        "tune",
        "tune:run",
        "choose how wide a fitted run's noise is by held-out labels",
        "One width multiplies all noise; 0, the mean network, is tried too. It is kept in RUN_DIR/adapter, and\n"
        "evaluate, predict and report use it, unless --untuned. It costs some ten predictions of the split.\n"
        "Without labels, --agreement takes the widest noise that leaves so many answers as they are.",
    )
    add_run_options(parser, takes=COUNT)
    add_antithetic(parser)
    add_blocks(parser, auto=True)
    parser.add_argument(
        "--split", type=word, default="validation", help="neither train nor test; labelled, without --agreement"
    )
    parser.add_argument("--with-temperature", action="store_true", help="for classes: choose a temperature too")
    parser.add_argument(
        "--agreement",
        type=number("agreement", Range(float, 0, 1, above=True)),
        metavar="SHARE",
        help="for classes, without labels: the share of the mean network's answers to keep, such as 0.95",
    )
    parser.add_argument("--max-examples", type=number("max_examples"), help="a random subset of this size")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")


def _add_diagnose(commands: Any) -> None:
    parser = command(
        commands,
        "diagnose",
        "diagnose:run",
        "ask how far a fitted run's posterior can be trusted",
        "Importance sampling (Pareto k), agreement of runs from other seeds, convergence of the ELBO's parts, whether\n"
        "the labels shape the noise, and the amortization gap: a number, a verdict and a sentence of advice for each.",
    )
    add_run_options(parser, num_samples=50, takes=Range(least=25))
    parser.add_argument(
        "--restarts", type=path, nargs="+", default=[], metavar="RUN_DIR", help="the same fitted from other seeds"
    )
    parser.add_argument("--steps", type=number("steps"), default=50, help="batches behind the last two answers")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output, nothing else")


def _add_report(commands: Any) -> None:
    parser = command(
        commands,
        "report",
        "reporting:run",
        "write one HTML page about one run, or several compared",
        "One file that opens from disk: scores with intervals, training, spread of the posterior, calibration,\n"
        "shifted inputs, selective prediction, diagnostics, and the least certain examples.",
    )
    parser.add_argument("run_dirs", type=path, nargs="+", metavar="RUN", help="what fit or compare wrote")
    parser.add_argument("--output", type=path, default=Path("report.html"), metavar="FILE")
    parser.add_argument("--split", type=word, help="what to judge by; default: test where labelled, else validation")
    parser.add_argument(
        "--max-examples", type=number("max_examples"), default=500, help="a random subset of this size of every split"
    )
    parser.add_argument("--no-diagnostics", action="store_true", help="leave out what takes longest")
    parser.add_argument("--costs", type=path, metavar="FILE", help="CSV of what answers cost: what to hand to a person")
    add_untuned(parser)
    add_prediction_options(parser)


def _add_watch(commands: Any) -> None:
    parser = command(
        commands,
        "watch",
        "watch:run",
        "ask whether a file looks like the data that a run was fitted to",
        "Predicts the rows of the file and examples of a split that was not trained on, and compares mean entropy,\n"
        "mean mutual information and the shares of the predicted labels by permutation. No labels are needed. What\n"
        "differs may be harmless; that nothing is seen to differ does not mean that nothing does.",
        check="check_watch",
    )
    add_run_options(parser)
    parser.add_argument("--input", type=path, required=True, metavar="FILE", help="rows, as predict --input reads them")
    parser.add_argument("--split", type=word, default="validation", help="what to compare with; not train")
    parser.add_argument(
        "--max-examples", type=number("max_examples"), default=500, help="a random subset of the split, of this size"
    )
    parser.add_argument(
        "--level",
        type=number("level", Range(float, 0, 1, above=True, below=True)),
        default=0.01,
        help="how often a file that is like the split may be said to differ",
    )
    parser.add_argument("--skip-errors", action="store_true", help="leave out rows that cannot be read, and say which")
    add_input_columns(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
