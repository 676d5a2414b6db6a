"""Whether bayeslora works on this machine's GPU, and what it costs there: one page, and the same as JSON.

    python benchmarks/gpu_check.py --output results                # on a machine with CUDA, within 8 minutes
    python benchmarks/gpu_check.py --device cpu --tiny             # its whole path where there is none

Needs no download: networks have random weights. Three parts, each of which is skipped with its reason where it cannot
be done, or where the time is up:

tests            those marked ``gpu``, with pytest
synchronisation  a training step in which nothing may wait for the device; for texts, how often it does
cost             PEFT's LoRA, bayeslora and PEFT's own MonteCLoRA on Llama's shapes, bf16, r = 16, all linear layers

Ends with status 1 where a test failed or a step waited.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import MontecloraConfig

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.storage.manifest import version_info

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("LoRA", "bayeslora", "PEFT MonteCLoRA")
SHAPES = {
    "1B": {
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "7B": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
TINY = {
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
}
WARM_UP, TIMED = 3, 8


class Clock:
    """Seconds that are left."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()


def network(shape: dict[str, int], device: str, *, classes: int | None = None, dtype=torch.bfloat16) -> Any:
    """A Llama of this shape with random weights, made where it is used."""
    config = transformers.LlamaConfig(vocab_size=32000 if shape["hidden_size"] > 100 else 96, pad_token_id=0, **shape)
    config.num_labels = classes or 2
    kind = transformers.AutoModelForSequenceClassification if classes else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    with torch.device(device):
        return kind.from_config(config, dtype=dtype)


def batch_of(size: int, length: int, device: str, *, classes: int | None = None) -> dict[str, torch.Tensor]:
    tokens = torch.randint(1, 96, (size, length), generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(size, device=device) % classes if classes else tokens
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def stepper(method: str, base: Any, rank: int = 16) -> Callable[[dict], None]:
    """A function that takes one optimizer step."""
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
    if method == "bayeslora":
        model = BayesLoRA(base, MonteCLoRAConfig(**lora))
    else:
        options = {"monteclora_config": MontecloraConfig()} if "Monte" in method else {}
        model = get_peft_model(base, LoraConfig(**lora, task_type="CAUSAL_LM", **options))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    model.train()

    def step(batch: dict) -> None:
        optimizer.zero_grad()
        loss = model(**batch).loss
        if "Monte" in method:
            loss = loss + model.base_model._get_monteclora_loss()
        loss.backward()
        optimizer.step()

    return step


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(method: str, shape: dict[str, int], size: int, length: int, device: str) -> dict[str, float]:
    """Median milliseconds of a step, peak memory in GiB, and MiB that memory grew over the timed steps."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, batch = stepper(method, network(shape, device)), batch_of(size, length, device)
    milliseconds, held = [], []
    for number in range(WARM_UP + TIMED):
        synchronize(device)
        started = time.perf_counter()
        step(batch)
        synchronize(device)
        if number >= WARM_UP:
            milliseconds.append(1e3 * (time.perf_counter() - started))
            held.append(torch.cuda.memory_allocated() if device == "cuda" else 0)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {
        "milliseconds": statistics.median(milliseconds),
        "peak_gib": peak / 2**30,
        "growth_mib": (held[-1] - held[0]) / 2**20,
    }


def cost(device: str, tiny: bool, clock: Clock) -> dict[str, Any]:
    """Network, batch and method to what was measured, or why it was not."""
    length, sizes = (16, (1, 2)) if tiny else (512, (1, 4, 16))
    found: dict[str, Any] = {}
    for name, shape in (TINY if tiny else SHAPES).items():
        for size in sizes:
            for method in METHODS:
                entry = f"{name}, {size} × {length} tokens, {method}"
                if clock.left() < (5 if tiny else 40):
                    found[entry] = {"skipped": "the time is up"}
                    continue
                try:
                    found[entry] = measure(method, shape, size, length, device)
                except torch.OutOfMemoryError:
                    found[entry] = {"skipped": "out of memory"}
                except Exception as error:  # PEFT's MonteCLoRA raises many kinds
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0]:.80}"
                    if method == "bayeslora":
                        raise
                    found[entry] = {"skipped": reason}
            reference = found[f"{name}, {size} × {length} tokens, LoRA"].get("milliseconds")
            for method in METHODS:
                own = found[f"{name}, {size} × {length} tokens, {method}"]
                if reference and "milliseconds" in own:
                    own["ratio"] = own["milliseconds"] / reference
    return found


def waits_of(run: Callable[[], Any]) -> int:
    """How often ``run`` waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run()
        return sum("synchroniz" in str(one.message) for one in said)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisation(device: str) -> dict[str, Any]:
    """How often forward and backward pass wait for the device, beside LoRA's; of classes, where waiting is an error.

    Texts wait once or more: the scored positions are counted. No mask goes in: transformers looks at its values.
    """
    if device != "cuda":
        return {"skipped": "torch.cuda.set_sync_debug_mode needs CUDA"}
    found: dict[str, Any] = {}
    for what, classes in (("classes", 2), ("texts", None)):
        base = network(TINY["tiny"], device, classes=classes, dtype=torch.float32)
        lora = {"r": 4, "target_modules": "all-linear", "task_type": "SEQ_CLS" if classes else "CAUSAL_LM"}
        peft_model = get_peft_model(base, LoraConfig(**lora)).train()
        batch = batch_of(4, 16, device, classes=classes)
        del batch["attention_mask"]
        found[f"{what}, LoRA"] = waits_of(lambda: peft_model(**batch).loss.backward())  # noqa: B023
        bayes = BayesLoRA(peft_model, MonteCLoRAConfig()).train()
        for _ in range(3):
            bayes(**batch).loss.backward()  # what is looked up once
        torch.cuda.synchronize()
        found[f"{what}, bayeslora"] = waits_of(lambda: bayes(**batch).loss.backward())  # noqa: B023
        if classes:
            torch.cuda.set_sync_debug_mode("error")
            try:
                bayes(**batch).loss.backward()
            except RuntimeError as error:
                found[what] = {"failed": str(error).splitlines()[0]}
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return found


def tests(device: str, clock: Clock, limit: float) -> dict[str, Any]:
    """pytest's last line."""
    if not (ROOT / "tests").is_dir():
        return {"skipped": "there is no tests/ beside this script: run it in a checkout"}
    chosen = "gpu" if device == "cuda" else "not gpu"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen]
    where = "tests" if device == "cuda" else "tests/training/test_devices.py"
    try:
        done = subprocess.run(
            [*command, where], cwd=ROOT, capture_output=True, text=True, timeout=min(limit, max(clock.left(), 1))
        )
    except subprocess.TimeoutExpired:
        return {"skipped": "the time is up"}
    if "No module named pytest" in done.stderr:
        return {"skipped": "pytest is not installed"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1], "failed": failed} | ({} if done.returncode in (0, 5) else {"status": done.returncode})


def page(report: dict[str, Any]) -> str:
    """What was found, to be read."""
    lines = [f"# {report['device']}", "", ", ".join(f"{n} {v}" for n, v in report["versions"].items()), ""]
    for part in ("tests", "synchronisation"):
        lines += [f"{part}: {json.dumps(report[part], ensure_ascii=False)}", ""]
    if "skipped" in report["cost"]:
        return "\n".join([*lines, f"cost: {report['cost']['skipped']}", ""])
    lines += ["| network, batch, method | ms a step | over LoRA | peak, GiB | growth, MiB |", "|---|---|---|---|---|"]
    for name, own in report["cost"].items():
        if "skipped" in own:
            lines.append(f"| {name} | skipped: {own['skipped']} | | | |")
        else:
            ratio = f"{own['ratio']:.2f}" if "ratio" in own else ""
            lines.append(
                f"| {name} | {own['milliseconds']:.1f} | {ratio} | {own['peak_gib']:.2f} | {own['growth_mib']:.1f} |"
            )
    return "\n".join([*lines, ""])


def main(
    device: str = "cuda",
    *,
    tiny: bool = False,
    minutes: float = 8.0,
    output: Path | None = None,
    run_tests: bool = True,
) -> dict[str, Any]:
    """Check, print the page, and return the report."""
    clock = Clock(minutes)
    here = device == "cpu" or torch.cuda.is_available()
    card = torch.cuda.get_device_name() if device == "cuda" and here else platform.processor() or "CPU"
    report: dict[str, Any] = {"device": card if here else "no CUDA", "versions": version_info()}
    absent = {"skipped": "torch sees no CUDA device: nothing was run on a GPU"}
    asked = {"skipped": "not asked for"}
    report["synchronisation"] = synchronisation(device) if here else absent
    report["cost"] = cost(device, tiny, Clock(min(minutes * 0.7, clock.left() / 60))) if here else absent
    report["tests"] = absent if not here else tests(device, clock, 60 * minutes) if run_tests else asked
    waited = [value for value in report["synchronisation"].values() if isinstance(value, dict)]
    report["passed"] = here and not waited and "status" not in report["tests"]
    print(page(report))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "gpu.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (output / "gpu.md").write_text(page(report), encoding="utf-8")
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a network of two small blocks in place of 1B and 7B")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--output", type=Path, help="folder for gpu.json and gpu.md")
    parser.add_argument("--no-tests", action="store_true")
    options = parser.parse_args()
    result = main(
        options.device,
        tiny=options.tiny,
        minutes=options.minutes,
        output=options.output,
        run_tests=not options.no_tests,
    )
    sys.exit(0 if result["passed"] or result["device"] == "no CUDA" else 1)
