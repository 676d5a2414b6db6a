"""What a training step costs in time and memory, and how the cost grows: bayeslora against what people use instead.

    python benchmarks/training_cost.py                            # everything, about half an hour on two cores
    python benchmarks/training_cost.py --only headline N --rounds 10 --output results

Methods: PEFT's LoRA, bayeslora with either guide and with one draw a batch, PEFT's own MonteCLoRA, and full
fine-tuning, on all linear layers of all-MiniLM-L6-v2. Within one process all methods take their steps in turn (A B C A
B C ...), so that a machine whose speed drifts slows them alike; the tables give medians of the ratio to LoRA's step of
the same round, with the middle half of the ratios. Peak memory is that of a fresh process for each method. Writes
cost.json and cost.md.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import MontecloraConfig
from tqdm.auto import tqdm

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.assets.fetch import demo_encoder
from bayeslora.storage.manifest import version_info

LORA = "PEFT LoRA"
METHODS = (
    LORA,
    "bayeslora, amortized",
    "bayeslora, mean field",
    "bayeslora, shared noise",  # one draw for the whole batch, as PEFT's; amortized too
    "PEFT MonteCLoRA",
    "full fine-tuning",
)


@dataclass(frozen=True)
class Setting:
    """One point of the study; ``blocks`` of the six carry adapters."""

    batch: int = 4
    length: int = 32
    rank: int = 8
    components: int = 4
    blocks: int = 6

    def __str__(self) -> str:
        return f"{self.batch} × {self.length} tokens, r = {self.rank}, N = {self.components}, {self.blocks} blocks"


BASE = Setting()
STUDIES: dict[str, tuple[str, list[Setting]]] = {
    "headline": ("batch × tokens", [Setting(32, 64), BASE]),
    "batch": ("batch", [replace(BASE, batch=n) for n in (1, 4, 16, 32)]),
    "length": ("tokens", [replace(BASE, length=n) for n in (16, 32, 64, 128)]),
    "rank": ("r", [replace(BASE, rank=n) for n in (2, 8, 32, 64)]),
    "N": ("N", [replace(BASE, components=n) for n in (4, 16, 64)]),
    "adapters": ("adapted blocks", [replace(BASE, blocks=n) for n in (1, 3, 6)]),
}
FIELDS = {"batch": "batch", "length": "length", "rank": "rank", "N": "components", "adapters": "blocks"}


def build(method: str, setting: Setting) -> Callable[[dict], None]:
    """A function that takes one optimizer step on a batch."""
    torch.manual_seed(0)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(demo_encoder(), num_labels=2)
    blocks = "".join(map(str, range(setting.blocks)))
    targets = {
        "r": setting.rank,
        "lora_alpha": 16,
        "target_modules": rf".*layer\.[{blocks}]\..*(query|key|value|dense)",
    }
    if method.startswith("bayeslora"):
        guide = "mean_field" if "mean field" in method else "amortized"
        noise = "shared" if "shared" in method else "per_example"
        options = {"num_components": setting.components, "guide": guide, "noise": noise}
        model = BayesLoRA(network, MonteCLoRAConfig(**targets, **options))
        return stepper(model, lambda batch: model(**batch).loss)
    if method == "full fine-tuning":
        return stepper(network, lambda batch: network(**batch).loss)
    options = {"monteclora_config": MontecloraConfig(num_samples=setting.components)} if "Monte" in method else {}
    peft_model = get_peft_model(network, LoraConfig(**targets, task_type="SEQ_CLS", **options))

    def loss(batch: dict) -> torch.Tensor:
        task = peft_model(**batch).loss
        return task + peft_model.base_model._get_monteclora_loss() if options else task

    return stepper(peft_model, loss)


def stepper(model: torch.nn.Module, loss: Callable[[dict], torch.Tensor]) -> Callable[[dict], None]:
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def step(batch: dict) -> None:
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()

    return step


def random_batch(setting: Setting) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.length)
    return {
        "input_ids": torch.randint(1000, 30000, shape, generator=generator),
        "attention_mask": torch.ones(shape, dtype=torch.long),
        "labels": torch.randint(2, shape[:1], generator=generator),
    }


def measure(setting: Setting, rounds: int, warm_up: int = 3) -> dict[str, dict[str, float]]:
    """For each method: median seconds a step, and median and quartiles of the ratio to LoRA's step of the round."""
    steps, batch = {method: build(method, setting) for method in METHODS}, random_batch(setting)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for round_number in range(rounds + warm_up):
        for method, step in list(steps.items()):
            started = time.perf_counter()
            try:
                step(batch)
            except torch.linalg.LinAlgError as error:  # PEFT's MonteCLoRA decomposes matrices, and cannot always
                print(f"{method} fails at {setting}: {str(error).splitlines()[0]}", flush=True)
                del steps[method], seconds[method]
                continue
            if round_number >= warm_up:
                seconds[method].append(time.perf_counter() - started)
    result = {}
    for method, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds[LORA], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        result[method] = {"seconds": statistics.median(values), "ratio": middle, "ratio_25": low, "ratio_75": high}
    return result


def peak_mib(method: str, setting: Setting, threads: int) -> float:
    """Peak resident memory of this process after three steps."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    step, batch = build(method, setting), random_batch(setting)
    for _ in range(3):
        step(batch)
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def machine(threads: int) -> dict[str, object]:
    """What the numbers depend on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **version_info(),
    }


def headline_table(points: list[dict]) -> list[str]:
    lines = [
        "| batch × tokens | method | ms a step | ratio to LoRA | middle half | peak MiB | memory to LoRA |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for point in points:
        name = f"{point['setting']['batch']} × {point['setting']['length']}"
        base = point["methods"][LORA]["peak_mib"]
        for method, row in point["methods"].items():
            lines.append(
                f"| {name} | {method} | {1e3 * row['seconds']:.0f} | {row['ratio']:.3f} | "
                f"{row['ratio_25']:.3f} to {row['ratio_75']:.3f} | {row['peak_mib']:.0f} | "
                f"{row['peak_mib'] / base:.3f} |"
            )
            name = ""
    return lines


def growth_tables(study: str, points: list[dict]) -> list[str]:
    """Ratio of a step's time, then extra memory, along one dimension; and how time grows from first to last."""
    word, field = STUDIES[study][0], FIELDS[study]
    values = [point["setting"][field] for point in points]
    lines = [
        f"| time to LoRA, {word} = | " + " | ".join(map(str, values)) + " | own step, last to first |",
        "|---|" + "---:|" * (len(values) + 1),
    ]
    for method in METHODS:
        rows = [point["methods"].get(method) for point in points]
        cells = [f"{row['ratio']:.3f}" if row else "fails" for row in rows]
        growth = f"{rows[-1]['seconds'] / rows[0]['seconds']:.2f}" if rows[0] and rows[-1] else ""
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {growth} |")
    lines += [
        "",
        f"| peak MiB beyond LoRA's, {word} = | " + " | ".join(map(str, values)) + " |",
        "|---|" + "---:|" * len(values),
    ]
    for method in METHODS[1:]:
        pairs = [(point["methods"].get(method), point["methods"][LORA]) for point in points]
        cells = [f"{row['peak_mib'] - base['peak_mib']:+.0f}" if row else "" for row, base in pairs]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def report(results: dict) -> str:
    """The Markdown of cost.md."""
    lines = [
        "# What a training step costs",
        "",
        f"`python benchmarks/training_cost.py`; all linear layers of all-MiniLM-L6-v2; unless a column says "
        f"otherwise {BASE}. Medians over {results['rounds']} rounds.",
        "",
    ]
    lines += [", ".join(f"{name} {value}" for name, value in results["machine"].items()), ""]
    for study, points in results["studies"].items():
        lines += [f"## {study}", ""]
        lines += headline_table(points) if study == "headline" else growth_tables(study, points)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES), help="studies to run")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each method and setting")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for both files")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["torch", "transformers", "peft", "bayeslora.module"])
    results: dict = {"machine": machine(arguments.threads), "rounds": arguments.rounds, "studies": {}}
    known: dict[Setting, dict] = {}
    settings = [setting for study in arguments.only for setting in STUDIES[study][1]]
    for setting in tqdm(dict.fromkeys(settings), unit="setting"):
        methods = measure(setting, arguments.rounds)
        for method in methods:
            with fresh.Pool(1) as pool:
                methods[method]["peak_mib"] = pool.apply(peak_mib, (method, setting, arguments.threads))
        known[setting] = {"setting": asdict(setting), "methods": methods}
    for study in arguments.only:
        results["studies"][study] = [known[setting] for setting in STUDIES[study][1]]
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "cost.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "cost.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
