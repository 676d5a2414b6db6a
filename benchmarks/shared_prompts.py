"""What a choice costs with one prompt for all its options, beside a prompt for each.

    python benchmarks/shared_prompts.py --model demo-lm --data-dir DATA --tasks openbookqa arc_easy boolq_question_only

Tokens of the training questions as they are read either way; and processor time of the network's pass over the first of
them, either way in turn over some rounds, medians. Prints a table in Markdown.
"""

import argparse
import os
import statistics
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch

from bayeslora import load_task
from bayeslora.data.batches import Collator
from bayeslora.models import shared_prompts

GAIN = shared_prompts.LEAST_GAIN


def row(task_name: str, arguments: argparse.Namespace) -> str:
    task = load_task(task_name, arguments.data_dir)
    network, tokenizer = task.load_network(arguments.model, dtype=getattr(torch, arguments.dtype))
    questions = task.encode(tokenizer, "train", max_length=160, limit=arguments.questions, labelled=True)
    collate, likelihood = Collator.for_network(network), task.likelihood()
    likelihood.prepare(network)
    alone = shared = 0
    for question in questions:
        inputs = collate([question])
        parts = [inputs[name] for name in ("input_ids", "attention_mask")]
        packed = shared_prompts.pack(network, *parts, inputs["answer_mask"].bool())
        there = parts[1] * inputs["answer_mask"].any(-1, keepdim=True)
        alone += int(there.sum())
        shared += int(there.sum()) if packed is None else packed.inputs["input_ids"].numel()
    batch = {name: value for name, value in collate(list(questions)[:16]).items() if name != "labels"}
    seconds: dict[float, list[float]] = {float("inf"): [], GAIN: []}
    with torch.inference_mode():
        for _ in range(arguments.rounds):
            for gain, times in seconds.items():
                shared_prompts.LEAST_GAIN = gain
                began = time.process_time()
                likelihood.outputs(network, batch)
                times.append(time.process_time() - began)
    shared_prompts.LEAST_GAIN = GAIN
    each, one = (statistics.median(times) for times in seconds.values())
    return f"| {task_name} | {alone / shared:.2f} | {each:.2f} | {one:.2f} | {each / one:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo-lm")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["openbookqa"])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print("| task | tokens, each over one | 16 questions, a prompt each (s) | one prompt (s) | ratio |")
    print("|---|---:|---:|---:|---:|")
    for name in arguments.tasks:
        print(row(name, arguments), flush=True)


if __name__ == "__main__":
    main()
