"""Flags that several commands take."""

import argparse
import dataclasses
from typing import Any

from bayeslora.bulk.choices import FORMATS, MEASURES
from bayeslora.command.flags import add_options, number, number_or, path, sentence, word
from bayeslora.config import PRESETS, MonteCLoRAConfig
from bayeslora.options import COUNT, FROM_ZERO, LENGTH, POSITIVE, SEED, Range, flags
from bayeslora.tasks.load import LOADERS, NAMED_TASKS
from bayeslora.training.budget import FitOptions


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    group = add_loading_options(parser)
    group.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    group.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    group.add_argument(
        "--report-to",
        type=word,
        nargs="+",
        metavar="NAME",
        help="where logs go: tensorboard (default where it is installed), wandb, ..., none",
    )


def add_loading_options(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("precision, memory and logs")
    bits = group.add_mutually_exclusive_group()
    for count in (4, 8):
        extra = "pip install 'bayeslora[quantized]'"
        help = f"the base network in {count} bits, by bitsandbytes ({extra}); the run remembers it"
        bits.add_argument(f"--load-in-{count}bit", action="store_const", const=count, dest="bits", help=help)
    group.add_argument(
        "--device-map", type=word, metavar="MAP", help="where transformers loads the base: auto, cpu, ..."
    )
    return group


def add_data_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """``several``: options of compare, which takes several values for some and needs none beside a study file."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        type=word,
        required=not several,
        metavar="PATH_OR_HUB_NAME",
        help='or "demo", the demo\'s encoder, or "demo-lm", a small language model',
    )
    group.add_argument(
        "--task",
        type=word,
        required=not several,
        nargs="+" if several else None,
        metavar="NAME",
        help=f"any name for your own data, or one of {', '.join((*NAMED_TASKS, *LOADERS))}",
    )
    group.add_argument("--data-dir", type=path, metavar="DIR", help="local files instead of the hub")
    group.add_argument("--text-columns", type=word, nargs="+", metavar="COLUMN", help="one column, or two for pairs")
    group.add_argument(
        "--prompting",
        type=word,
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="how a language model is asked: style=letters, chat=true, ...",
    )
    group.add_argument(
        "--label-column",
        type=word,
        nargs="+",
        metavar="COLUMN",
        help="of labels, or lists of them; several of 0 and 1, where each label applies or not",
    )
    group.add_argument(
        "--shift-splits", type=word, nargs="+", metavar="SPLIT", help="labelled splits from elsewhere, to score too"
    )
    group.add_argument(
        "--max-train-examples",
        type=number("max_train_examples"),
        metavar="N",
        help="a random subset of this size",
    )
    group.add_argument(
        "--max-length", type=number("max_length", LENGTH), default=128, metavar="TOKENS", help="longer texts are cut"
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    add_options(parser.add_argument_group("training"), FitOptions, flags(FitOptions))


def add_shared_training_options(parser: argparse.ArgumentParser) -> None:
    """What compare takes for all methods. What a study's folder remembers of it does not grow: folders stay valid."""
    left_out = ("seed", "weight_decay", "evaluations", "eval_samples", "best_metric")
    fields = [field for field in flags(FitOptions) if field.name not in left_out]
    group = parser.add_argument_group("training")
    add_options(group, FitOptions, fields, several=("batch_size", "learning_rate"))


def add_method_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="learned: noise that grows as the loss falls, the default; calibrated: noise that follows certainty, for "
        "classes and choices; constant: even noise; paper: the paper's small noise",
    )
    lists = ("target_modules", "modules_to_save", *(("r",) if several else ()))
    add_options(
        group, MonteCLoRAConfig, flags(MonteCLoRAConfig), several=lists, default=lambda field: None, told=_usual
    )


def _usual(field: dataclasses.Field[Any]) -> str:
    """The default of a field that a preset decides."""
    usual = getattr(MonteCLoRAConfig.preset("learned"), field.name)
    if usual is None or usual == () or "default" in field.metadata["help"]:
        return ""
    decided = {getattr(MonteCLoRAConfig.preset(name), field.name) for name in PRESETS} != {usual}
    return f"; default {usual}" + (", or as --preset says" if decided else "")


def add_run_options(
    parser: argparse.ArgumentParser, *, num_samples: int = 16, takes: Range = FROM_ZERO, auto: bool = False
) -> None:
    parser.add_argument("run_dir", type=path, metavar="RUN_DIR", help="what fit wrote")
    add_prediction_options(parser, num_samples=num_samples, takes=takes, auto=auto)


def add_antithetic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--antithetic", action="store_true", help="mirrored pairs of draws: less Monte Carlo error")


def add_blocks(parser: argparse.ArgumentParser, *, auto: bool = False) -> None:
    """``--blocks``, which tune looks for where it is ``auto``."""
    what = "noise in the last K blocks of the network only: all before them is computed once for all draws"
    parse = number_or(("auto",), "blocks", COUNT) if auto else number("blocks", COUNT)
    found = "; auto looks for the fewest that predict as well" if auto else "; default what tune chose"
    parser.add_argument("--blocks", type=parse, metavar="K", help=what + found)


def add_untuned(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--untuned", action="store_true", help="draws as they were fitted, without what tune chose")


def add_prediction_options(
    parser: argparse.ArgumentParser, *, num_samples: int = 16, takes: Range = FROM_ZERO, auto: bool = False
) -> None:
    parser.add_argument(
        "--model", type=word, metavar="PATH_OR_HUB_NAME", help="where the base model is now, if it moved"
    )
    parser.add_argument("--data-dir", type=path, metavar="DIR", help="where the data is now, if it moved")
    what = "draws of the posterior" + ("; 0 is its mean" if takes == FROM_ZERO else "")
    if auto:
        parse = number_or(("auto",), "num_samples", takes)
        parser.add_argument(
            "--num-samples", type=parse, default=num_samples, help=f"{what}; auto is as many as --tolerance takes"
        )
        parser.add_argument(
            "--tolerance",
            type=number("tolerance", POSITIVE),
            default=0.02,
            help="with --num-samples auto: the Monte Carlo error to reach, of a probability on average",
        )
    else:
        parser.add_argument("--num-samples", type=number("num_samples", takes), default=num_samples, help=what)
    parser.add_argument("--batch-size", type=number("batch_size"), default=32)
    parser.add_argument("--seed", type=number("seed", SEED), default=0, help="decides the draws")


def add_input_columns(parser: Any) -> None:
    """How the rows of ``--input`` are read."""
    parser.add_argument(
        "--input-format",
        choices=FORMATS,
        help="where the name of --input does not say it; text: one a line; datasets: whatever that library streams",
    )
    parser.add_argument(
        "--text-columns",
        type=word,
        nargs="+",
        metavar="COLUMN",
        help="the file's, if called otherwise than the run's",
    )


def add_predicted_options(parser: argparse.ArgumentParser) -> None:
    """What is predicted: texts, a split, or the rows of a file."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=sentence, nargs="+", help="one or more texts")
    source.add_argument("--split", type=word, help="a split of the run's task, labelled or not")
    source.add_argument("--input", type=path, metavar="FILE", help="rows to predict, for --output; - is standard input")
    parser.add_argument("--text-pair", type=sentence, nargs="+", help="the second texts, for tasks on pairs")
    parser.add_argument("--max-examples", type=number("max_examples"), help="a random subset of this size of the split")
    group = parser.add_argument_group("files", "The same command again goes on where an interrupted one stopped.")
    group.add_argument("--output", type=path, metavar="FILE", help="a new file: .csv, .jsonl or .parquet")
    add_input_columns(group)
    group.add_argument(
        "--coverage",
        type=number("coverage", Range(float, 0, 1, above=True, below=True)),
        metavar="SHARE",
        help="of conformal_set, for a run tuned by labels: 0.8, 0.9, 0.95 or 0.99; default: 0.9",
    )
    group.add_argument(
        "--top-uncertain", type=number("top_uncertain"), metavar="K", help="write the K rows that people should look at"
    )
    group.add_argument("--by", choices=MEASURES, default="mutual_information", help="what those rows are chosen by")
    group.add_argument("--skip-errors", action="store_true", help="leave out rows that cannot be read, and name them")
    group.add_argument("--prefix", type=word, metavar="TEXT", help="before the names of the new columns")
