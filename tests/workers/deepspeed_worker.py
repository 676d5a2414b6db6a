"""What two processes do under DeepSpeed's engine for tests/training/test_engines.py, on CPUs over gloo.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/deepspeed_worker.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import deepspeed
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.training.engines import remember_base
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_batch, tiny_dataset
from tests.workers.distributed_worker import error_of

CASES = {
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    # what is trained has fewer numbers than this, and stays whole; a frozen matrix has more
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 1000},
    "stage 3, all in parts": {"stage": 3, "stage3_param_persistence_threshold": 1},
}


def new():
    network = ARCHITECTURES["llama"].network(hidden_size=64, intermediate_size=64, num_labels=2)
    torch.manual_seed(0)
    return BayesLoRA(network, MonteCLoRAConfig(r=2, num_components=3, sample_scaler=0.05))


def optimizer_of(bayes):
    return torch.optim.SGD(bayes.parameter_groups(1e-2), lr=1e-2)


def started(bayes, zero):
    config = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "zero_optimization": zero}
    config |= {"gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=bayes, optimizer=optimizer_of(bayes), config=config)[0]


def batches(rank):
    rows = tiny_batch(16)
    for step in range(2):
        yield [{name: value[8 * step + 4 * rank + 2 * half :][:2] for name, value in rows.items()} for half in range(2)]


def trained(bayes):
    return {name: p.detach().clone() for name, p in bayes.named_parameters() if p.requires_grad}


def under_ddp(bayes, rank):
    loop, optimizer, losses = DistributedDataParallel(bayes), optimizer_of(bayes), []
    torch.manual_seed(3)
    for first, second in batches(rank):
        with loop.no_sync():
            losses.append(loop(**first).loss)
            (losses[-1] / 2).backward()
        losses.append(loop(**second).loss)
        (losses[-1] / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).tolist(), trained(bayes)


def under_deepspeed(bayes, rank, zero):
    remember_base(bayes)
    engine, losses = started(bayes, zero), []
    torch.manual_seed(3)
    for halves in batches(rank):
        for batch in halves:
            losses.append(engine(**batch).loss)
            engine.backward(losses[-1])
            engine.step()
    with deepspeed.zero.GatheredParameters([p for p in bayes.parameters() if p.requires_grad]):
        return torch.stack([loss.detach() for loss in losses]).tolist(), trained(bayes)


def save(bayes, folder, rank):
    """In one process; what it says where the weights have not been gathered."""
    said = error_of(lambda: bayes.save_pretrained(folder), InputError) if rank == 0 else None
    with deepspeed.zero.GatheredParameters([p for p in bayes.parameters() if p.requires_grad]):
        if rank == 0:
            bayes.save_pretrained(folder)
    distributed.barrier()
    return said


def fused(rank, zero):
    bayes = new()
    adapter = bayes.model.groups[0].adapters[0]
    layer, a, b = adapter.layer, adapter.lora_A, adapter.layer.lora_B["default"]
    layer.forward = lambda x: layer.base_layer(x) + torch.nn.functional.linear(x, b.weight @ a.weight)
    return error_of(lambda: under_deepspeed(bayes, rank, zero), InputError)


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    deepspeed.init_distributed("gloo")
    rank = distributed.get_rank()
    before = trained(new())
    reference = new()
    expected_losses, expected = under_ddp(reference, rank)
    probs = reference.predict(tiny_dataset(6), num_samples=3, progress=False).probs.tolist()
    (folder / f"probs-{rank}.json").write_text(json.dumps(probs), encoding="utf-8")
    for name, options in CASES.items():
        bayes = new()
        losses, found = under_deepspeed(bayes, rank, options)
        held = sum(p.numel() for p in bayes.network.parameters())
        unsaved = save(bayes, folder / name, rank)
        seen = {
            "losses": [losses, expected_losses],
            "distance": max(float((found[name] - expected[name]).abs().max()) for name in expected),
            "moved": sum(not torch.equal(value, before[name]) for name, value in found.items()) / len(found),
            "held": held,
            "unsaved": unsaved,
            "fused": fused(rank, options),
        }
        (folder / f"{name}-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
        distributed.barrier()
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
