"""What a training step costs: bayeslora against plain PEFT LoRA and PEFT's own MonteCLoRA.

    python benchmarks/step_time.py                    # both shapes, a few minutes on two cores
    python benchmarks/step_time.py --steps 10 --json results.json

All methods adapt every linear layer of the same encoder at the same rank and take their steps in turn within one
process (A B C A B C ...), so that a machine whose speed drifts slows them alike; the table gives medians of the
ratio to LoRA's step of the same round. Peak memory comes from one fresh process for each method.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import MontecloraConfig

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.assets import demo_encoder
from bayeslora.checkpoint import version_info

SHAPES = ((32, 64), (4, 32))
RANK, COMPONENTS = 8, 4
METHODS = ("PEFT LoRA", "bayeslora, amortized", "bayeslora, mean field", "PEFT MonteCLoRA")


def build(method: str) -> Callable[[dict], torch.Tensor]:
    """A function that takes one optimizer step on a batch."""
    torch.manual_seed(0)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(demo_encoder(), num_labels=2)
    if method.startswith("bayeslora"):
        guide = "mean_field" if "mean field" in method else "amortized"
        model = BayesLoRA(network, MonteCLoRAConfig(r=RANK, num_components=COMPONENTS, guide=guide))
        return stepper(model, lambda batch: model(**batch).loss)
    options = {"monteclora_config": MontecloraConfig(num_samples=COMPONENTS)} if "Monte" in method else {}
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS", **options)
    peft_model = get_peft_model(network, lora)

    def loss(batch: dict) -> torch.Tensor:
        task = peft_model(**batch).loss
        return task + peft_model.base_model._get_monteclora_loss() if options else task

    return stepper(peft_model, loss)


def stepper(model: torch.nn.Module, loss: Callable[[dict], torch.Tensor]) -> Callable[[dict], torch.Tensor]:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(batch: dict) -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(batch)
        value.backward()
        optimizer.step()
        return value

    return step


def random_batch(size: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(1000, 30000, (size, length), generator=generator),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
        "labels": torch.randint(2, (size,), generator=generator),
    }


def step_ratios(shape: tuple[int, int], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds a step, and the median over rounds of the ratio to LoRA's step of that round."""
    steps, batch = {method: build(method) for method in METHODS}, random_batch(*shape)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for round_number in range(rounds + 3):  # the first three warm up
        for method, step in steps.items():
            started = time.perf_counter()
            step(batch)
            if round_number >= 3:
                seconds[method].append(time.perf_counter() - started)
    base = seconds[METHODS[0]]
    return {
        method: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, base, strict=True)),
        }
        for method, values in seconds.items()
    }


def peak_mib() -> float:
    """This process's peak resident memory; getrusage would count its parent's too, from before the exec."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def peak_memory(method: str, shape: tuple[int, int]) -> float:
    """MiB at the peak of a fresh process that takes three steps."""
    command = [sys.executable, __file__, "--peak", method, "--shape", *map(str, shape)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each method and shape")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="also write the results there")
    parser.add_argument("--peak", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if arguments.peak:
        step, batch = build(arguments.peak), random_batch(*arguments.shape)
        for _ in range(3):
            step(batch)
        print(peak_mib())
        return
    results: dict = {"versions": version_info(), "machine": platform.machine(), "threads": arguments.threads}
    print(f"all-MiniLM-L6-v2, all linear layers, r = {RANK}, N = {COMPONENTS}, {arguments.threads} threads")
    for shape in SHAPES:
        measured = step_ratios(shape, arguments.steps)
        print(f"\n| {shape[0]} x {shape[1]} tokens | ms a step | ratio to LoRA | peak MiB |")
        print("|---|---:|---:|---:|")
        for method, row in measured.items():
            row["peak_mib"] = peak_memory(method, shape)
            print(f"| {method} | {1e3 * row['seconds']:.0f} | {row['ratio']:.3f} | {row['peak_mib']:.0f} |", flush=True)
        results["x".join(map(str, shape))] = measured
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
