"""Grade-school mathematics as text: fit, measure nats a token, write answers with several draws, and vote.

SmolLM2-135M-Instruct reads 200 worked solutions of GSM8K with plain LoRA and with MonteCLoRA. The likelihood is that of
60 test solutions; the written answers are to 10 test questions. A model of this size solves next to none of them: what
is compared is likelihood, and how sure the model is of what it writes. Needs the extra `language`.

    python examples/gsm8k.py                        # data from the hub
    python examples/gsm8k.py --data-dir DIR         # DIR/gsm8k/train.parquet, DIR/gsm8k/test.parquet

It prints, in some 25 minutes of one core's time (one seed, 4 draws):

    LoRA        nats a token 0.919   entropy 0.939   mutual information 0.000   confidence in what it writes 0.753
    MonteCLoRA  nats a token 0.971   entropy 0.994   mutual information 0.005   confidence in what it writes 0.730

LoRA solves none of ten; of MonteCLoRA's forty drafts two are right, and its weighted vote is right once. After 50
steps from the same start MonteCLoRA is behind in likelihood, and its draws hardly disagree. It is the noise that slows
it: with ``--sample-scaler 0.03`` instead of 0.1 the likelihood is 0.934 nats a token. There are 210 adapters here and
37 in the demo's encoder, and at the start the noise is four times the means of A in most of them, six times in the
widest.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.inference.generation import token_uncertainty
from bayeslora.judging.judge import judge_gsm8k


def main(
    data_dir: str | None = None,
    output: str | None = None,
    *,
    model: str = "demo-lm",
    training: int = 200,
    testing: int = 60,
    questions: int = 10,
    epochs: int = 1,
    num_samples: int = 4,
    seed: int = 0,
    sample_scaler: float = 0.1,
) -> dict[str, dict[str, float]]:
    """Fit both, print a line of numbers for each, and return them by method."""
    place, task, scores = Path(output or tempfile.mkdtemp()), load_task("gsm8k", data_dir), {}
    for name, scale in (("LoRA", 0.0), ("MonteCLoRA", sample_scaler)):
        set_seed(seed)  # the same start for all: A is drawn when the adapters are made
        network, tokenizer = task.load_network(model)
        train = task.encode(tokenizer, "train", limit=training, max_length=256)
        test = task.encode(tokenizer, "test", limit=testing, max_length=256)
        bayes = BayesLoRA(network, MonteCLoRAConfig(sample_scaler=scale), likelihood=task.likelihood())
        fit(
            bayes,
            train,
            output_dir=place / name,
            epochs=epochs,
            batch_size=4,
            learning_rate=5e-4,
            seed=seed,
            save_strategy="no",
        )
        draws = num_samples if scale else 0
        tokens = token_uncertainty(bayes, test, num_samples=draws)
        written = bayes.generate(
            task.prompts(tokenizer, "test", limit=questions),
            tokenizer=tokenizer,
            num_samples=draws,
            max_new_tokens=160,
            stops=task.stops,
        )
        scores[name] = {
            "nats a token": -float(np.concatenate(tokens.log_prob).mean()),
            "entropy": float(np.concatenate(tokens.entropy).mean()),
            "mutual information": float(np.concatenate(tokens.mutual_information).mean()),
            "confidence in what it writes": float(written.confidence.mean()),
            **judge_gsm8k(written, task.split("test", limit=questions)["answer"][:]),
        }
        print(f"{name:11s}", "   ".join(f"{key} {value:.3f}" for key, value in scores[name].items()), flush=True)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="a folder with gsm8k's files; the hub if not given")
    parser.add_argument("--output", help="a new folder for both runs")
    parser.add_argument("--sample-scaler", type=float, default=0.1, help="MonteCLoRA's ε")
    arguments = parser.parse_args()
    main(arguments.data_dir, arguments.output, sample_scaler=arguments.sample_scaler)
