"""What training would take for decoders of 7, 13 and 70 billion parameters: memory, and arithmetic for each step.

    python benchmarks/scale.py                        # counted, then checked where a network fits; some ten minutes
    python benchmarks/scale.py --no-check             # counted only

The real code runs on PyTorch's *meta* device, where tensors have shapes but no data: the network in bfloat16 with
PEFT's LoRA on all linear layers of its blocks, r = 16, and one batch. Counted are the bytes of parameters and buffers,
the bytes that the forward pass keeps for the backward pass, and floating point operations of matrix products (PyTorch's
FlopCounterMode). AdamW keeps two float32 moments for each trained parameter. What this leaves out: an allocator's
fragmentation, communication, and the time of everything that is not a matrix product.

The check runs the same code on real tensors at sizes that fit. Beside the counted ratios stand measured ones: peak
memory of a fresh process for each method, and time a step with the methods in turn.

PEFT's MonteCLoRA cannot run without data; it is counted as LoRA, its buffers (noise drawn ahead 150 times for each
layer, N·n_in·r floats each), and the products that turn one of them into noise.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore")

import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import MontecloraConfig
from torch.utils.flop_counter import FlopCounterMode

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.models import MonteCLoRA

LORA, BAYES, SHARED, PEFT = "PEFT LoRA", "bayeslora", "bayeslora, shared noise", "PEFT MonteCLoRA"
METHODS = (LORA, BAYES, SHARED, PEFT)
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GIB = 2**30
RANK, COMPONENTS = 16, 4


@dataclass(frozen=True)
class Decoder:
    """A Llama by its sizes, and the batch it is trained on."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    tokens: int

    def build(self, device: str) -> torch.nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=4096,
            num_labels=2,
            pad_token_id=0,
        )
        kind = torch.bfloat16 if device == "meta" else torch.float32
        with torch.device(device):
            return transformers.AutoModelForSequenceClassification.from_config(
                config, dtype=kind, attn_implementation="fused"
            )


# sizes: Touvron et al. (2023), Llama 2, table 1 and the released configurations
LARGE = [
    Decoder("7B", 4096, 32, 11008, 32, 32, 32000, 2, 1024),
    Decoder("13B", 5120, 40, 13824, 40, 40, 32000, 2, 1024),
    Decoder("70B", 8192, 80, 28672, 64, 8, 32000, 2, 1024),
]
SMALL = [
    Decoder("135M, 30 layers of 576", 576, 30, 1536, 9, 3, 49152, 2, 128),
    Decoder("6 layers of 1024", 1024, 6, 2816, 16, 16, 32000, 2, 256),
    Decoder("2 layers of 2048", 2048, 2, 5504, 16, 16, 32000, 2, 256),
]


def build(method: str, decoder: Decoder, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = decoder.build(device)
    options: dict[str, Any] = {"r": RANK, "target_modules": list(TARGETS)}
    if method in (BAYES, SHARED):
        noise = "shared" if method == SHARED else "per_example"
        config = MonteCLoRAConfig(**options, num_components=COMPONENTS, guide="mean_field", noise=noise)
        with torch.device(device):
            bayes = BayesLoRA(network, config)
        bayes._rows = True  # rows of a Llama's layers are tokens of its examples; a probe would need data
        return bayes.train()
    if method == PEFT:
        options["monteclora_config"] = MontecloraConfig(num_samples=COMPONENTS)
    return get_peft_model(network, LoraConfig(**options, task_type="SEQ_CLS")).train()


def batch_of(decoder: Decoder, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 1000, (decoder.batch, decoder.tokens), device=device)
    return {"input_ids": ids, "labels": torch.zeros(decoder.batch, dtype=torch.long, device=device)}


def loss_of(model: torch.nn.Module, method: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    loss = model(**batch).loss
    return loss + model.base_model._get_monteclora_loss() if method == PEFT else loss


@dataclass
class Count:
    """Bytes, and floating point operations a step."""

    weights: int
    adapter: int  # weights, gradients and two moments of what is trained
    buffers: int
    draw: int  # the part of what the forward pass keeps for the backward pass that does not grow with the tokens
    activations: int  # the part that does, all layers
    operations: int

    def total(self, decoder: Decoder) -> float:
        """With activations recomputed layer by layer: one layer's, and each one's input."""
        inputs = 2 * decoder.batch * decoder.tokens * decoder.hidden * decoder.layers
        return self.weights + self.adapter + self.buffers + self.draw + self.activations / decoder.layers + inputs

    @property
    def everything(self) -> int:
        """Without."""
        return self.weights + self.adapter + self.buffers + self.draw + self.activations


def count(method: str, decoder: Decoder, device: str = "meta") -> Count:
    if method == PEFT:  # LoRA, and what its sampler adds, which cannot run without data
        base = count(LORA, decoder, device)
        entries = RANK * sum(size for size, _ in linears(decoder))
        products = 3 * 2 * COMPONENTS * RANK * entries  # N noises times a Cholesky factor, and back
        drawn = 4 * (COMPONENTS + 1) * entries
        return Count(
            base.weights,
            base.adapter,
            4 * 150 * COMPONENTS * entries,
            base.draw + drawn,
            base.activations,
            base.operations + products,
        )
    model = build(method, decoder, device)
    kept, operations = run(model, method, decoder, device)
    half, _ = run(model, method, replace(decoder, tokens=decoder.tokens // 2), device)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    adapter = sum(2 * p.nbytes + 8 * p.numel() for p in trained)
    return Count(frozen, adapter, 0, 2 * half - kept, 2 * (kept - half), operations)


def run(model: torch.nn.Module, method: str, decoder: Decoder, device: str) -> tuple[int, int]:
    """Bytes that one forward pass keeps beside parameters, and operations of both passes."""
    batch = batch_of(decoder, device)
    own = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
    tensors, kept = [], {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            tensors.append(tensor)  # alive, so that no two storages share an address
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(model, method, batch)
        loss.backward()
    model.zero_grad()
    return sum(kept.values()), counter.get_total_flops()


def linears(decoder: Decoder) -> list[tuple[int, int]]:
    """Inputs and outputs of every adapted layer."""
    hidden, wide = decoder.hidden, decoder.intermediate
    narrow = hidden * decoder.kv_heads // decoder.heads
    block = [
        (hidden, hidden),
        (hidden, narrow),
        (hidden, narrow),
        (hidden, hidden),
        (hidden, wide),
        (hidden, wide),
        (wide, hidden),
    ]
    return block * decoder.layers


def step_of(method: str, decoder: Decoder) -> Any:
    model, batch = build(method, decoder, "cpu"), batch_of(decoder, "cpu")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, method, batch).backward()
        optimizer.step()

    return step


def peak(method: str, decoder: Decoder, answers: Any) -> None:
    """Peak resident memory of three steps, over what the imports take, in bytes."""
    prepare()
    before = high_water()
    step = step_of(method, decoder)
    for _ in range(3):
        step()
    answers.put(high_water() - before)


def high_water() -> int:
    """Peak resident memory of this process in bytes; getrusage's number begins with the parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def peak_in_own_process(method: str, decoder: Decoder) -> int:
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    process = context.Process(target=peak, args=(method, decoder, answers))
    process.start()
    found = answers.get()
    process.join()
    return found


def ratios(decoder: Decoder, rounds: int) -> dict[str, list[float]]:
    """Median seconds a step over LoRA's of the same round, with the middle half."""
    steps = {method: step_of(method, decoder) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for number in range(rounds + 2):
        for method, step in steps.items():
            started = time.perf_counter()
            step()
            if number >= 2:
                seconds[method].append(time.perf_counter() - started)
    found = {}
    for method in METHODS[1:]:
        over = [a / b for a, b in zip(seconds[method], seconds[LORA], strict=True)]
        low, _, high = statistics.quantiles(over, n=4)
        found[method] = [statistics.median(over), low, high]
    return found


def check(decoder: Decoder, rounds: int) -> dict[str, Any]:
    counts = {method: count(method, decoder, "cpu") for method in METHODS}
    measured = ratios(decoder, rounds) if rounds else {m: [float("nan")] * 3 for m in METHODS[1:]}
    peaks = {method: peak_in_own_process(method, decoder) for method in METHODS}
    base = counts[LORA]
    return {
        "decoder": asdict(decoder),
        "operations": {m: counts[m].operations / base.operations for m in METHODS[1:]},
        "time": measured,
        "extra_memory_counted": {m: counts[m].everything - base.everything for m in METHODS[1:]},
        "extra_memory_measured": {m: peaks[m] - peaks[LORA] for m in METHODS[1:]},
        "peak": peaks[LORA],
    }


def tables(large: dict[str, dict[str, Count]], checks: list[dict[str, Any]]) -> str:
    lines = [
        f"AdamW, r = {RANK}, N = {COMPONENTS}, all linear layers of the blocks, bfloat16 weights, float32 adapters, "
        "2 × 1024 tokens; GiB. *Draw* is kept from the start of a step to its end; *total* recomputes activations "
        "layer by layer (gradient checkpointing), *without* keeps all of them.",
        "",
        "| | method | weights | adapter and optimizer | buffers | draw | total | over LoRA | without | over LoRA "
        "| operations over LoRA |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for decoder in LARGE:
        counts = large[decoder.name]
        base = counts[LORA]
        for method, one in counts.items():
            total = one.total(decoder)
            cells = [f"{part / GIB:.2f}" for part in (one.weights, one.adapter, one.buffers, one.draw, total)]
            cells += [
                f"{total / base.total(decoder):.3f}",
                f"{one.everything / GIB:.2f}",
                f"{one.everything / base.everything:.3f}",
                f"{one.operations / base.operations:.4f}",
            ]
            lines.append(f"| {decoder.name} | {method} | {' | '.join(cells)} |")
    if checks:
        lines += [
            "",
            "Checked on processor cores in float32, no layer recomputed. Time: median ratio to LoRA's step of the same "
            "round, and the middle half of the ratios. Memory: MiB over LoRA's.",
            "",
            "| | method | operations, counted | time, measured | memory, counted | memory, measured |",
            "|---|---|---:|---:|---:|---:|",
        ]
        for one in checks:
            name = f"{one['decoder']['name']}, {one['decoder']['batch']} × {one['decoder']['tokens']}"
            for method in METHODS[1:]:
                middle, low, high = one["time"][method]
                lines.append(
                    f"| {name} | {method} | {one['operations'][method]:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) | "
                    f"{one['extra_memory_counted'][method] / 2**20:+.0f} | "
                    f"{one['extra_memory_measured'][method] / 2**20:+.0f} of {one['peak'] / 2**20:.0f} |"
                )
    return "\n".join(lines) + "\n"


def fused_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention that keeps no matrix of tokens by tokens, on the meta device too."""
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) if groups > 1 else one for one in (key, value))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True)[0]
    return found.transpose(1, 2).contiguous(), None


def prepare() -> None:
    """Attention for both devices, and two gaps of the meta device: autocast does not know it, and the gamma
    distribution has no gradient there."""
    transformers.AttentionInterface.register("fused", fused_attention)
    transformers.AttentionMaskInterface.register("fused", lambda *_, **__: None)
    on_device = MonteCLoRA.full_precision
    MonteCLoRA.full_precision = lambda self: (
        contextlib.nullcontext() if self.groups[0].adapters[0].lora_A.weight.is_meta else on_device(self)
    )
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("_standard_gamma_grad", lambda value, output: torch.empty_like(value))
    globals()["_library"] = library  # it counts for as long as it lives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-check", action="store_true", help="count only")
    arguments = parser.parse_args()
    prepare()
    large = {}
    for decoder in LARGE:
        large[decoder.name] = {method: count(method, decoder) for method in METHODS}
        print(f"counted {decoder.name}", flush=True)
    checks = []
    if not arguments.no_check:
        for decoder in SMALL:
            checks.append(check(decoder, arguments.rounds))
            print(f"checked {decoder.name}", flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    text = tables(large, checks)
    plain = {name: {m: asdict(one) for m, one in counts.items()} for name, counts in large.items()}
    (arguments.output / "scale.json").write_text(json.dumps({"counted": plain, "checked": checks}, indent=2) + "\n")
    (arguments.output / "scale.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
