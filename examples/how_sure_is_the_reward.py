"""How sure is a reward model of each reward?

Fits a posterior over a reward model to pairs of answers with TRL, and prints the mean and the standard deviation over
draws of the reward of each answer that was held out, the least sure first: those are the ones to ask people
about, and not to train a policy on.

    python examples/how_sure_is_the_reward.py --model distilroberta-base --dataset Anthropic/hh-rlhf
"""

import argparse
from typing import Any

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.training.preference import BayesRewardTrainer


def main(
    network: Any, tokenizer: Any, train: Any, held_out: Any, *, num_samples: int = 32, **arguments: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Fit, and return mean and standard deviation of the rewards of all chosen answers, then of all rejected ones.

    ``train`` and ``held_out`` have the columns ``chosen`` and ``rejected``: texts, with whatever they answer.
    """
    bayes = BayesLoRA(network, MonteCLoRAConfig())
    settings = RewardConfig(**arguments)
    BayesRewardTrainer(bayes, settings, train_dataset=train, processing_class=tokenizer).train()
    texts = [text + tokenizer.eos_token for kind in ("chosen", "rejected") for text in held_out[kind]]  # as TRL's are
    answers = [tokenizer(text, truncation=True) for text in texts]
    examples = [{name: answer[name] for name in ("input_ids", "attention_mask")} for answer in answers]
    rewards = bayes.predict(examples, num_samples=num_samples).sample_means  # (draws, answers)
    mean, std = rewards.mean(0), rewards.std(0)
    for index in np.argsort(-std)[:10]:
        print(f"reward {mean[index]:+.2f} ± {std[index]:.2f}  {texts[index][-100:]!r}")
    chosen, rejected = np.split(rewards, 2, axis=1)
    print(f"the draws agree about {np.mean((chosen > rejected).std(0) == 0):.0%} of {len(held_out)} pairs")
    return mean, std


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    asked = parser.parse_args()
    data = load_dataset(asked.dataset)
    main(
        AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=1),
        AutoTokenizer.from_pretrained(asked.model),
        data["train"],
        data["test"].select(range(200)),
        output_dir="runs/reward",
    )
