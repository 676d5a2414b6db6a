"""Multiple choice with a small Llama: does a posterior know better when it does not know?

SmolLM2-135M-Instruct learns a part of ARC-easy and of OpenBookQA, with plain LoRA and with MonteCLoRA at the same
budget. An option's score is the log-likelihood of its text after the question, over its length. Needs the extra
`language`.

    python examples/llama_commonsense.py                        # data from the hub
    python examples/llama_commonsense.py --data-dir DIR         # DIR/arc_easy/train.parquet, DIR/openbookqa/...
"""

import argparse
import tempfile
from pathlib import Path

from bayeslora.analysis import to_markdown
from bayeslora.study import Study
from bayeslora.study.runner import run_study
from bayeslora.study.summary import headline

TASKS = ("arc_easy", "openbookqa")


def main(
    data_dir: str | None = None, output: str | None = None, *, model: str = "demo-lm", seeds=(0, 1), **sizes
) -> None:
    """Train, score, and print a table for each task; ``sizes`` are words of :class:`bayeslora.study.Study`."""
    study = Study(
        model=model,
        tasks=tuple({"name": task, "data_dir": data_dir} for task in TASKS),
        methods=("lora", "temperature", {"name": "monteclora", "predictions": ["mean", "draws", "draws_temperature"]}),
        learning_rates=(5e-4,), batch_sizes=(4,), seeds=seeds, max_length=160, training={"epochs": 1},
        **{"train_examples": 200, "test_examples": 100, "validation_examples": 50, "num_samples": 4, **sizes},
    )  # fmt: skip
    result = run_study(study, Path(output or tempfile.mkdtemp()) / "commonsense")
    for task, rows in result.results.groupby("task", sort=False):
        print(f"\n{task}\n\n{to_markdown(headline(rows))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="a folder with the tasks' files; the hub if not given")
    parser.add_argument("--output", help="a folder to keep, from which an interrupted run goes on")
    arguments = parser.parse_args()
    main(arguments.data_dir, arguments.output)
