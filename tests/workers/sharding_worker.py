"""What two processes do for tests/training/test_engines.py: each writes what it saw, and the test compares.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/sharding_worker.py FOLDER
"""

import copy
import json
import os
import pickle
from functools import partial
from importlib.util import find_spec
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.data.batches import Collator
from bayeslora.training.engines import shard
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_batch, tiny_dataset
from tests.language import tiny_language_model, tiny_tokenizer
from tests.runs import At, interrupt
from tests.workers.distributed_worker import (
    NOISELESS,
    Gradients,
    Writes,
    error_of,
    new,
    run,
    run_scenarios,
    texts,
    writer,
)

FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}}
NETWORKS = sorted(name for name, kind in ARCHITECTURES.items() if not kind.refused)
BLOCKS = {"albert": ["AlbertLayer"]}  # one layer, which runs twice


def trained(bayes):
    return {name: p.detach().clone() for name, p in bayes.named_parameters() if p.requires_grad}


def untimed(entry):
    return {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}


def numbers(bayes):
    """How many of its parameters a process holds, those of the network and all."""
    own = {n: getattr(p, "to_local", lambda p=p: p)().numel() for n, p in bayes.named_parameters()}
    return sum(n for name, n in own.items() if name.startswith("network.")), sum(own.values())


def step(bayes, batch, seed=3):
    """Loss, gradients and what is trained after one step under DistributedDataParallel."""
    loop = DistributedDataParallel(bayes, find_unused_parameters=True)
    optimizer = torch.optim.SGD([p for p in bayes.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(seed)
    loss = loop(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in bayes.named_parameters() if p.grad is not None}
    optimizer.step()
    return {"loss": loss.detach()[None]} | gradients | {f"after {n}": p for n, p in trained(bayes).items()}


def distance(one, other):
    """The largest difference between two steps."""
    assert one.keys() == other.keys(), one.keys() ^ other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def training(folder, rank):
    """A run of whole copies, the same run in shards, and that one interrupted and resumed."""
    held_out = tiny_dataset(11, seed=1)
    asked = {"evaluate": held_out, "save_steps": 2, "eval_steps": 2}
    ended = {}
    for name, options, stop_at in (
        ("copies", {}, None),
        ("shards", FSDP, None),
        ("again", FSDP, 5),
        ("again", FSDP | {"resume": True}, None),
    ):
        bayes = new(dropout=True, lora_dropout=0.1)
        writes, stop = Writes(folder / name), [At(stop_at, interrupt)] if stop_at else []
        tune = {"tune": tiny_dataset(24, seed=2)}
        before = numbers(bayes)
        results = []
        interrupted = error_of(
            lambda: results.append(run(folder / name, bayes, callbacks=stop, **asked, **options, **tune)),  # noqa: B023
            KeyboardInterrupt,
        )
        distributed.barrier()
        if interrupted is None:
            ended[name] = trained(bayes)
            yield (
                name,
                {
                    "numbers": [before, numbers(bayes)],
                    "written": sorted(writes.names),
                    "metrics": untimed(results[0].metrics),
                    "history": [untimed(e) for e in results[0].history if "train_loss" not in e],
                    "tuning": str(bayes.tuning),
                    "probs": bayes.predict(held_out, num_samples=3, progress=False).probs.tolist(),
                    "merge": error_of(bayes.merge, InputError) if options else None,
                },
            )
    for name in ("shards", "again"):
        yield f"distance of {name}", distance(ended["copies"], ended[name])


def gradients(folder, rank):
    """The first step without noise: two processes, two batches of two each, for labels and for texts."""
    asked = {"batch_size": 2, "gradient_accumulation": 2, "max_steps": 1, "max_grad_norm": 0.0, **FSDP}
    cases = {
        "paper": (new(normalization="paper", **NOISELESS), tiny_dataset(8)),
        "elbo": (new(normalization="elbo", **NOISELESS), tiny_dataset(8)),
        "texts": (writer(), texts()),
    }
    for name, (bayes, data) in cases.items():
        seen = Gradients()
        result = run(folder / name, bayes, data, callbacks=[seen], **asked)
        if rank == 0:
            after = {f"after {n}": p for n, p in trained(bayes).items()}
            save_file(seen.values | after, folder / f"{name}.safetensors")
        yield name, next(entry["loss"] for entry in result.history if "loss" in entry)


def networks(folder, rank):
    """A step in shards is that of whole copies."""
    for name in NETWORKS:
        kind, blocks = ARCHITECTURES[name], BLOCKS.get(name, ())
        found = []
        for prepare in (lambda bayes: None, lambda bayes: shard(bayes, blocks)):  # noqa: B023
            changes = {"layerdrop": 0.0} if name == "wav2vec2" else {}
            bayes = BayesLoRA(kind.network(**changes), MonteCLoRAConfig(r=2, sample_scaler=0.05))
            prepare(bayes)
            batch = Collator.for_network(bayes.network, bayes.model.labelling)(
                kind.examples(8)[4 * rank : 4 * rank + 4]
            )
            found.append(step(bayes, batch))
        yield name, distance(*found)


def ways(folder, rank):
    """Checkpointed layers, several particles, frozen adapters, half precision, another mesh."""
    rows = {name: value[4 * rank : 4 * rank + 4] for name, value in tiny_batch(8).items()}
    cases = {
        "per example": {"noise": "per_example"},
        "particles": {"num_particles": 2},
        "explicit": {"components": "explicit"},
        "post hoc": {"mode": "post_hoc"},
        "gaussian": {"guide": "gaussian", "noise_schedule": "constant"},
        "checkpointed": {},
        "bfloat16": {},
        "two dimensions": {},
    }
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shards"))
    for name, options in cases.items():
        found = []
        sharding = partial(shard, mesh=mesh if name == "two dimensions" else None)
        for prepare in (lambda bayes: None, sharding):
            bayes = new(**options)
            if name == "checkpointed":
                bayes.activation_checkpointing_enable()
            if name == "bfloat16":
                bayes.to(torch.bfloat16)
            prepare(bayes)
            found.append(step(bayes, rows))
        yield name, distance(*found)


def writing(folder, rank):
    """Predicting and generating in shards, before and after a step."""
    written = []
    for prepare in (lambda bayes: None, shard):
        torch.manual_seed(0)
        bayes = BayesLoRA(tiny_language_model(tie_word_embeddings=True), MonteCLoRAConfig(r=4, sample_scaler=0.3))
        prepare(bayes)
        step(bayes, Collator.for_network(bayes.network, bayes.model.labelling)(texts()[4 * rank : 4 * rank + 4]))
        bayes.eval()
        ours = bayes.generate([[5, 6, 7], [8]], num_samples=2, max_new_tokens=4, progress=False)
        theirs = bayes.network.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
        scores = bayes.predict(texts(), num_samples=2, progress=False)
        written.append([ours.tokens, theirs.tolist(), scores.nll])
        with bayes.as_draw(1) as network, torch.no_grad():
            written[-1].append(float(network(torch.tensor([[5, 6, 7]])).logits.sum()))
    yield "written", [json.dumps(each, default=lambda value: value.tolist()) for each in written]


def refusals(folder, rank):
    def fused():
        bayes = new()
        adapter = bayes.model.groups[0].adapters[0]
        layer, a, b = adapter.layer, adapter.lora_A, adapter.layer.lora_B["default"]
        layer.forward = lambda x: layer.base_layer(x) + torch.nn.functional.linear(x, b.weight @ a.weight)
        return bayes

    rows = {name: value[4 * rank : 4 * rank + 4] for name, value in tiny_batch(8).items()}
    yield "fused", error_of(lambda: run(folder / "fused", fused(), **FSDP), InputError)

    def fused_loop():
        bayes = fused()
        shard(bayes)
        step(bayes, rows)

    def fused_prediction():
        bayes = fused()
        shard(bayes)
        bayes.predict(tiny_dataset(4), num_samples=2, progress=False)

    yield "fused in a loop", error_of(fused_loop, InputError)
    yield "fused in predict", error_of(fused_prediction, InputError)
    yield "apart", error_of(lambda: shard(new(base_seed=rank)), InputError)
    yield "unknown blocks", error_of(lambda: shard(new(), ["LlamaDecoderLayer"]), InputError)
    sharded = new()
    shard(sharded)
    yield "again", error_of(lambda: shard(sharded), InputError)
    yield "wrapped", error_of(lambda: BayesLoRA(sharded.network.get_base_model()), InputError)


def together(folder, rank):
    """The same batch twice, where the generators of the processes are not in step."""
    batch = tiny_batch(4)
    for name, group in (("apart", None), ("together", distributed.new_group([0, 1]))):
        bayes = new(dropout=True, lora_dropout=0.1, noise="per_example")
        bayes.draw_together(group)
        bayes = copy.deepcopy(bayes)
        torch.manual_seed(rank)
        losses = [bayes(**batch).loss.item() for _ in range(2)]
        yield name, {"losses": losses, "next": float(torch.rand(()))}
    yield "pickled", pickle.loads(pickle.dumps(bayes.together)).group is None


def launched(folder, rank):
    """What accelerate launch --use_fsdp --fsdp_version 2 says to a process."""
    asked = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }
    with patch.dict(os.environ, asked):
        bayes = new()
        run(folder / "run", bayes, max_steps=2)
        yield "numbers", [numbers(new()), numbers(bayes)]
        yield "kept", os.environ["ACCELERATE_USE_FSDP"]


def trl_trainers(folder, rank):
    """TRL's own trainers, over shards and over whole copies."""
    if find_spec("trl") is None:
        return
    import trl
    from datasets import Dataset

    from bayeslora.training.preference import BayesDPOTrainer
    from bayeslora.training.sft import BayesSFTTrainer

    pair = {"prompt": "where is the cat?", "chosen": " to the north", "rejected": " to the south"}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    asked = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1}
    kinds = {
        "dpo": (BayesDPOTrainer, trl.DPOConfig, [pair] * 16),
        "sft": (BayesSFTTrainer, trl.SFTConfig, [{"text": "the cat goes to the north"}] * 16),
    }
    for name, (kind, config, rows) in kinds.items():
        ended = []
        for options in ({}, FSDP):
            torch.manual_seed(0)
            bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4, sample_scaler=0.3))
            arguments = config(str(folder / name), **asked, **quiet, **options)
            kind(
                bayes, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer()
            ).train()
            ended.append(trained(bayes))
        yield name, {"distance": distance(*ended), "numbers": numbers(bayes)}
    yield "whole", numbers(BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4)))


SCENARIOS = (training, gradients, networks, ways, writing, refusals, together, launched, trl_trainers)


if __name__ == "__main__":
    run_scenarios(SCENARIOS)
