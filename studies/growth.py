"""When should the noise grow? Ways to let it, at ρ = 8, on 300 sentences about movies.

    python studies/growth.py                # seed 0; some 25 minutes on one free core
    python studies/growth.py --seeds 0 1 2

"second half" trains the first half of the steps without noise, and lets it grow evenly over the rest. "KL cycle" is
BLoB's (Wang et al., NeurIPS 2024): a standard deviation for each entry that starts next to nothing, and a weight of the
KL that doubles with every step of a cycle, so that the prior pulls the noise up in pulses; its bound is the evidence's.
"""

import argparse
import tempfile
from typing import Any

from transformers import TrainerCallback, set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.noise_schedules import LEAST, CosineSchedule
from bayeslora.training.monitor import relative_noise

RHO = 8.0


class SecondHalf(CosineSchedule):
    """None in the first half of training, then evenly up to all of it."""

    def begin_step(self, progress: float) -> None:
        self.set(max(2 * progress - 1, LEAST))


class KLCycle(TrainerCallback):
    """Step i of a cycle of M has the weight M·2^i / (2^(M+1) − 1): 1 in the mean over a cycle."""

    def __init__(self, bayes: BayesLoRA, length: int):
        self.bayes, self.length = bayes, length

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        place = state.global_step % self.length + 1
        self.bayes.elbo.kl_weight = self.length * 2.0 ** (place - self.length - 1) / (1 - 2.0 ** (-self.length - 1))


SHARED = {"noise_units": "relative", "sample_scaler": RHO}
WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {"sample_scaler": 0.0},
    "learned": SHARED | {"noise_schedule": "learned"},
    "entropy": SHARED | {"noise_schedule": "entropy"},
    "cosine": SHARED | {"noise_schedule": "cosine"},
    "second half": SHARED | {"noise_schedule": "cosine"},
    "constant": SHARED,
    "per layer": SHARED | {"noise_schedule": "per_layer"},
    "KL cycle": {"guide": "gaussian", "normalization": "elbo", "sample_scaler": 0.1, "scale_init": 1e-4},
}


def main(
    *,
    model: str = "demo",
    seeds=(0,),
    train_examples: int = 300,
    examples: int = 200,
    epochs: float = 5,
    draws: int = 8,
) -> dict[tuple[str, int], dict[str, float]]:
    """Print and return the NLL of test sentences, in nats: at the mean, over draws, and over draws of a tuned width."""
    rows = {}
    for seed in seeds:
        for way, options in WAYS.items():
            set_seed(seed)
            task = load_task("sentiment")
            network, tokenizer = task.load_network(model)
            bayes = BayesLoRA(network, MonteCLoRAConfig(**options))
            train, validation, test = (
                task.encode(tokenizer, split, limit=limit, max_length=64)
                for split, limit in (("train", train_examples), ("validation", examples // 2), ("test", examples))
            )
            steps = -(-len(train) // 16)
            if way == "second half":
                bayes.noise_schedule = SecondHalf(bayes.model)
            cycle = [KLCycle(bayes, steps)] if way == "KL cycle" else []
            settings = {"batch_size": 16, "learning_rate": 1e-3, "train_sampling_strategy": "group_by_length"}
            folder = tempfile.mkdtemp()
            fit(
                bayes,
                train,
                output_dir=folder,
                epochs=epochs,
                seed=seed,
                save_strategy="no",
                callbacks=cycle,
                **settings,
            )
            mean = bayes.predict(test, num_samples=0)
            row = {"accuracy": float((mean.probs.argmax(-1) == mean.labels).mean()), "mean": mean.nll}
            if bayes.sampling:
                row["rho"] = float(relative_noise(bayes).mean())
                row["draws"] = bayes.predict(test, draws, antithetic=True).nll
                row["width"] = bayes.tune(validation, num_samples=draws, antithetic=True).width
                row["tuned"] = bayes.predict(test, draws, antithetic=True).nll
            rows[way, seed] = row
            print(f"{way:12s} seed {seed} " + " ".join(f"{name} {v:.3f}" for name, v in row.items()), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    main(seeds=parser.parse_args().seeds)
