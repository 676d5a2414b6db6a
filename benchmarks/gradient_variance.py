"""How much noise the posterior's draws put into a gradient: one draw a batch against one draw an example.

    python benchmarks/gradient_variance.py                  # several minutes on two cores

The encoder is fitted to movie sentences for a while; at points on the way, gradients of the same batches are taken
over many seeded draws, with dropout off, so that their variance is that of the noise alone. The table gives, for each
kind of parameter, the summed variance under per-example noise divided by that under shared noise, and the ratio of a
step's time (measured in turn). Below 1 for the product means less variance at equal cost.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
import transformers

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task
from bayeslora.inference.predict import Collator

KINDS = {"mean of A": "lora_A", "B": "lora_B", "head": "modules_to_save", "posterior": "guide."}
NOISE = ("shared", "per_example")


def without_dropout(bayes: BayesLoRA) -> None:
    for module in bayes.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    bayes.network.config.hidden_dropout_prob = 0.0
    bayes.train()
    for module in bayes.network.modules():  # attention reads its probability off itself
        if hasattr(module, "dropout") and not callable(module.dropout):
            module.dropout = 0.0


def gradients(bayes: BayesLoRA, batch: dict, noise: str, draws: int) -> dict[str, torch.Tensor]:
    """Kind of parameter to gradients, one row a draw."""
    bayes.monteclora_config = bayes.monteclora_config.replace(noise=noise)
    rows: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
    for draw in range(draws):
        bayes.zero_grad()
        torch.manual_seed(draw)
        bayes(**batch).loss.backward()
        named = [(n, p.grad.flatten()) for n, p in bayes.named_parameters() if p.grad is not None]
        for kind, part in KINDS.items():
            rows[kind].append(torch.cat([g for n, g in named if part in n]))
    return {kind: torch.stack(values).double() for kind, values in rows.items()}


def seconds(bayes: BayesLoRA, batch: dict, rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {noise: [] for noise in NOISE}
    for _ in range(rounds):
        for noise in NOISE:
            bayes.monteclora_config = bayes.monteclora_config.replace(noise=noise)
            started = time.perf_counter()
            bayes(**batch).loss.backward()
            taken[noise].append(time.perf_counter() - started)
    return {noise: statistics.median(values) for noise, values in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 60, 160], help="steps after which to look")
    parser.add_argument("--draws", type=int, default=24)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--scale", type=float, default=None, help="sample_scaler, if not the default")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = load_task("sentiment")
    results: list[dict] = []
    print("| steps | parameters | shared: noise / mean | variance ratio |\n|---:|---|---:|---:|")
    for steps in arguments.steps:
        transformers.set_seed(0)
        network, tokenizer = task.load_network("demo")
        options = {} if arguments.scale is None else {"sample_scaler": arguments.scale}
        bayes = BayesLoRA(network, MonteCLoRAConfig(noise="shared", **options))
        data = task.encode(tokenizer, "train", limit=500, max_length=64)
        with tempfile.TemporaryDirectory() as folder:
            fit(bayes, data, output_dir=f"{folder}/run", max_steps=steps, progress=False)
        without_dropout(bayes)
        collate, size = Collator.for_network(bayes.network), arguments.batch_size
        batches = [collate([data[i * size + k] for k in range(size)]) for i in range(arguments.batches)]
        variance = {kind: dict.fromkeys(NOISE, 0.0) for kind in KINDS}
        mean = dict.fromkeys(KINDS, 0.0)
        for batch in batches:
            for noise in NOISE:
                for kind, rows in gradients(bayes, batch, noise, arguments.draws).items():
                    variance[kind][noise] += float(rows.var(0).sum())
                    if noise == "shared":
                        mean[kind] += float(rows.mean(0).square().sum() - rows.var(0).sum() / len(rows))
        times = seconds(bayes, batches[0], 7)
        for kind, values in variance.items():
            ratio = values["per_example"] / values["shared"]
            relative = (values["shared"] / max(mean[kind], 1e-30)) ** 0.5
            print(f"| {steps} | {kind} | {relative:.2f} | {ratio:.2f} |", flush=True)
            results.append({"steps": steps, "kind": kind, "ratio": ratio, "shared_noise_to_mean": relative, **times})
        print(f"| {steps} | time of a step | | {times['per_example'] / times['shared']:.3f} |", flush=True)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
