"""Which sentences does the fitted model know least about?

Fits a posterior to 500 movie sentences and prints the test sentences with the largest mutual information: those on
which the draws of the posterior disagree, as opposed to those that are a close call for every one of them.

    python examples/how_sure_is_the_model.py
"""

import numpy as np
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task


def main(
    output_dir: str = "runs/how_sure",
    *,
    model: str = "demo",
    train_examples: int = 500,
    test_examples: int = 200,
    max_steps: int | None = None,
) -> list[str]:
    """Fit, predict, and return the five sentences that the posterior is least sure of."""
    set_seed(0)
    task = load_task("sentiment")
    network, tokenizer = task.load_network(model)
    bayes = BayesLoRA(network, MonteCLoRAConfig())
    train = task.encode(tokenizer, "train", limit=train_examples, max_length=64)
    fit(bayes, train, output_dir=output_dir, epochs=5, max_steps=max_steps)
    test = task.split("test", limit=test_examples)
    prediction = bayes.predict(task.encode(tokenizer, "test", limit=test_examples, max_length=64), num_samples=8)
    least_sure = np.argsort(-prediction.mutual_information)[:5]
    for index in least_sure:
        print(
            f"MI {prediction.mutual_information[index]:.3f}  entropy {prediction.entropy[index]:.3f}  "
            f"P(positive) {prediction.probs[index, 1]:.2f}  rated {test[int(index)]['rating']:+.1f}  "
            f"{test[int(index)]['text'][:90]}"
        )
    return [test[int(index)]["text"] for index in least_sure]


if __name__ == "__main__":
    main()
