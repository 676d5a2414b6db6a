"""The demo: a real encoder, real text, both methods, one ArviZ file, two pictures and a table."""

import argparse
import time
from pathlib import Path

from bayeslora.analysis import plot_calibration, plot_posterior_spread, save_arviz, to_arviz
from bayeslora.assets.fetch import demo_encoder, rated_sentences
from bayeslora.config import MonteCLoRAConfig, default_preset
from bayeslora.module import BayesLoRA
from bayeslora.storage.run_folder import ADAPTER_FOLDER
from bayeslora.study.compare import Comparison, compare
from bayeslora.tasks.load import load_task
from bayeslora.tasks.network import DEMO_MODEL

MAX_LENGTH = 64
FILES = {
    "posterior_spread.png": "how far each adapter's draws spread around its mean",
    "calibration.png": "confidence against accuracy on the test set, with bands",
    "comparison.md": "the table above",
    "posterior.nc": "draws, predictions and pointwise log-likelihoods: arviz.from_netcdf opens it",
}


def run(arguments: argparse.Namespace) -> None:
    run_demo(
        arguments.output,
        seed=arguments.seed,
        train_examples=arguments.train_examples,
        test_examples=arguments.test_examples,
        epochs=arguments.epochs,
        num_samples=arguments.num_samples,
    )


def run_demo(
    output: str | Path,
    *,
    seed: int = 0,
    train_examples: int = 500,
    test_examples: int = 300,
    epochs: float = 5,
    num_samples: int = 16,
) -> Comparison:
    """Fit LoRA and MonteCLoRA to movie sentences, and see how both do there and on three other domains.

    Args:
        output: Folder for the runs, ``comparison.md``, ``posterior.nc`` and the two pictures.
        seed: Decides everything random.
        train_examples, test_examples: Sentences to train on, and to test on from each domain.
        epochs: Passes over the training sentences.
        num_samples: Draws of the posterior predictive.
    """
    started = time.monotonic()
    output = Path(output)
    _say("1/4  encoder and data (fetched once, checked against pinned hashes)")
    demo_encoder()
    rated_sentences()
    task = load_task("sentiment")
    _say(f"2/4  LoRA and MonteCLoRA on {train_examples} movie sentences, from the same start")
    result = compare(
        DEMO_MODEL,
        task,
        MonteCLoRAConfig.preset(default_preset(task.kind)),
        output_dir=output,
        seeds=[seed],
        train_examples=train_examples,
        test_examples=test_examples,
        num_samples=num_samples,
        max_length=MAX_LENGTH,
        epochs=epochs,
    )
    _say("3/4  draws of the posterior as ArviZ data")
    network, tokenizer = task.load_network(DEMO_MODEL)
    posterior = BayesLoRA.from_pretrained(result.runs["MonteCLoRA", seed] / ADAPTER_FOLDER, network)
    test = task.encode(tokenizer, "test", max_length=MAX_LENGTH, limit=test_examples)
    idata = to_arviz(posterior, test, num_samples=num_samples, seed=seed)
    save_arviz(idata, output / "posterior.nc")
    _say("4/4  pictures")
    plot_posterior_spread(idata).figure.savefig(output / "posterior_spread.png", dpi=200, bbox_inches="tight")
    shown = {name: pair for name, pair in result.predictions("test", seed).items() if name not in result.at_mean}
    plot_calibration(shown).figure.savefig(output / "calibration.png", dpi=200, bbox_inches="tight")
    _report(result, output, started)
    return result


def _report(result: Comparison, output: Path, started: float) -> None:
    print("\nTested on movie sentences, and on three domains that neither method was trained on:\n")
    print(result.to_markdown())
    print("\n* the temperature is fitted to labelled validation sentences; the other rows do without them")
    print(f"\nDone in {time.monotonic() - started:.0f} s. Look at")
    for name, what in FILES.items():
        print(f"  {output / name!s:36} {what}")


def _say(text: str) -> None:
    print(text, flush=True)
