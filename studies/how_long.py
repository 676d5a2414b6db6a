"""How many steps does a training of few examples need, before its draws predict new ones best?

python studies/how_long.py DATA    # DATA: the folder that sst2 lies in; some ten minutes on one free core
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task

STEPS = {("sentiment", 300): (60, 120, 240), ("sst2", 100): (21, 60, 120)}
OPTIONS = {"train_sampling_strategy": "random", "save_strategy": "no", "progress": False}


def main(
    data: Path | None = None, *, model: str = "demo", test_examples: int = 500, draws: int = 8, steps=STEPS
) -> dict[tuple[str, int], list[float]]:
    """Fit for each number of steps, and print accuracy and NLL (nats per example) at the mean and over draws."""
    found = {}
    for (name, examples), counts in steps.items():
        task = load_task(name, None if name == "sentiment" or data is None else data / name)
        split = "test" if "test" in task.splits and task.is_labelled("test") else "validation"
        for count in counts:
            set_seed(0)
            network, tokenizer = task.load_network(model)
            bayes = BayesLoRA(network, MonteCLoRAConfig.preset("learned"), likelihood=task.likelihood())
            train = task.encode(tokenizer, "train", max_length=64, limit=examples, labelled=True)
            test = task.encode(tokenizer, split, max_length=64, limit=test_examples)
            fit(bayes, train, output_dir=tempfile.mkdtemp(), max_steps=count, **OPTIONS)
            row = []
            for number in (0, draws):
                prediction = bayes.predict(test, num_samples=number, progress=False)
                row += [
                    float((prediction.probs.argmax(-1) == prediction.labels).mean()),
                    float(np.mean(prediction.nll)),
                ]
            found[name, count] = row
            numbers = "mean {:.3f} {:.3f}, draws {:.3f} {:.3f}".format(*row)
            print(f"{name}, {examples} examples, {count} steps: {numbers}", flush=True)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
