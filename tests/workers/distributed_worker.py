"""What two processes do for tests/training/test_distributed.py: each writes what it saw, and the test compares.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/workers/distributed_worker.py FOLDER
"""

import gc
import hashlib
import json
import math
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainingArguments

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, TrainingDivergedError, fit
from bayeslora.inference.predict import Collator
from bayeslora.storage.manifest import read_manifest
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.language import tiny_language_model

CPU = {"use_cpu": True}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
NOISELESS = {
    "sample_scaler": 1e-9,
    "lora_dropout": 0.0,
    "kl_weight": 0.5,
    "guide": "mean_field",
    "alpha_init": "ones",
    "scale_init": 2.0,
    "prior_concentration": 2.0,
}
BROKEN_TOKEN = 5


def new(seed=0, *, base_seed=0, num_labels=2, dropout=False, **options):
    network = tiny_network(layers=1, num_labels=num_labels, seed=base_seed, **({} if dropout else NO_DROPOUT))
    torch.manual_seed(seed)
    options = {"r": 2, "num_components": 3, "sample_scaler": 0.05, "noise": "shared"} | options
    return BayesLoRA(network, MonteCLoRAConfig(**options))


def run(folder, bayes, train=None, evaluate=None, **options):
    """24 examples, 4 on each process: 3 steps to an epoch on two processes."""
    options = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "progress": False} | options
    return fit(bayes, tiny_dataset(24) if train is None else train, evaluate, output_dir=folder, **options)


def digest(module):
    """Of every parameter and buffer, also those that are never saved."""
    everything = hashlib.sha256()
    for name, value in sorted([*module.named_parameters(), *module.named_buffers()]):
        everything.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return everything.hexdigest()


def tokens(batch):
    """The examples of a batch, without their padding."""
    return [[token for token in row if token] for row in batch["input_ids"].tolist()]


class Diary(TrainerCallback):
    """The examples and the noise of every step, and the state in which training began."""

    def __init__(self, bayes, stop_at=None):
        self.examples, self.noise, self.missing, self.digest, self.stop_at = [], [], [], None, stop_at
        self.handles = [
            bayes.register_forward_pre_hook(self._see_batch, with_kwargs=True),
            bayes.model.groups[0].adapters[0].lora_A.register_forward_hook(self._see_noise),
        ]

    def _see_batch(self, bayes, args, batch):
        if bayes.training:
            self.examples.append(tokens(batch))

    def _see_noise(self, layer, args, output):
        """The drawn A from what the layer made of its inputs, less the mean, whatever way the draw came in."""
        if layer.training:
            inputs = args[0].detach().flatten(0, -2)
            drawn = torch.linalg.lstsq(inputs, output.detach().flatten(0, -2), driver="gelsd").solution
            self.noise.append((drawn.mT - layer.weight.detach()).flatten().tolist())

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.model = model

    def on_step_begin(self, args, state, control, **kwargs):
        if self.digest is None:
            self.digest = digest(self.model)
        if state.global_step + 1 == self.stop_at:
            raise KeyboardInterrupt

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.missing += [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]

    def seen(self):
        for handle in self.handles:
            handle.remove()
        return {"examples": self.examples, "noise": self.noise, "missing": self.missing, "began": self.digest}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class Writes:
    """Names of what this process makes below a folder: by open, by rename and by torch.save, which needs neither."""

    def __init__(self, folder):
        self.folder, self.names, self.save = str(folder), set(), torch.save
        torch.save = self._save
        sys.addaudithook(self._see)

    def _save(self, value, path, *args, **kwargs):
        self._add(path)
        return self.save(value, path, *args, **kwargs)

    def _see(self, event, args):
        if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            self._add(args[0])
        elif event == "os.rename":
            self._add(args[1])

    def _add(self, path):
        if str(path).startswith(self.folder):
            self.names.add(Path(str(path)).name)


def error_of(action, kind):
    try:
        action()
    except kind as error:
        return str(error)
    return None


def training(folder, rank):
    """A run, the same run interrupted and resumed, and a run from another start on every rank."""
    held_out = tiny_dataset(11, seed=1)
    every = {"save_steps": 2, "eval_steps": 2}  # of three steps an epoch
    whole, writes = new(dropout=True, lora_dropout=0.1), Writes(folder / "whole")
    diary = Diary(whole)
    result = run(folder / "whole", whole, evaluate=held_out, **every, callbacks=[diary])
    read_manifest(folder / "whole" / "adapter")  # complete on every rank as soon as fit returns
    yield "whole", diary.seen() | {"ended": digest(whole), "metrics": result.metrics, "history": result.history}
    yield "written", sorted(writes.names)
    yield "num_examples", whole.num_examples

    broken = new(dropout=True, lora_dropout=0.1)
    yield (
        "interrupted",
        error_of(
            lambda: run(folder / "broken", broken, evaluate=held_out, **every, callbacks=[Diary(broken, stop_at=5)]),
            KeyboardInterrupt,
        ),
    )
    distributed.barrier()  # a process that is killed has stopped writing
    resumed = new(seed=1, dropout=True, lora_dropout=0.1)
    torch.manual_seed(7)
    diary = Diary(resumed)
    result = run(folder / "broken", resumed, evaluate=held_out, **every, callbacks=[diary], resume=True)
    yield "resumed", diary.seen() | {"ended": digest(resumed), "metrics": result.metrics, "history": result.history}

    yield "learned", learned(folder, rank)

    apart = new(seed=rank, base_seed=rank)
    before = digest(apart)
    diary = Diary(apart)
    run(folder / "apart", apart, max_steps=2, callbacks=[diary])
    yield "apart", diary.seen() | {"before": before, "ended": digest(apart)}


def learned(folder, rank):
    """Noise that follows the loss of both ranks, in a run and in one that is interrupted and resumed."""
    options = {"noise_units": "relative", "sample_scaler": 1.0, "noise_schedule": "learned"}
    ended = []
    for name, stop_at in (("whole", None), ("again", 5), ("again", None)):
        bayes, losses = new(**options), []
        see = bayes.noise_schedule.see_loss
        bayes.noise_schedule.see_loss = lambda loss, see=see, losses=losses: losses.append(float(loss)) or see(loss)
        begun = {
            "callbacks": [Diary(bayes, stop_at=stop_at)],
            "save_steps": 2,
            "tune": tiny_dataset(24, seed=3),
            "resume": name == "again" and not stop_at,
        }
        error_of(partial(run, folder / f"learned-{name}", bayes, **begun), KeyboardInterrupt)
        distributed.barrier()
        ended.append(
            {"ended": digest(bayes), "losses": losses, "kept": bayes.model.losses.tolist(), "tuning": str(bayes.tuning)}
        )
    return ended


def coverage(folder, rank):
    """No trained parameter is left without a gradient, whatever is trained."""
    for name, options in {
        "per example": {"guide": "mean_field", "noise": "per_example"},
        "post_hoc": {"mode": "post_hoc", "normalization": "elbo"},
        "plain LoRA": {"sample_scaler": 0.0},
        "explicit": {"components": "explicit", "mixture": "sparse", "num_particles": 2},
        "regression": {"num_labels": 1},
    }.items():
        bayes = new(**options)
        diary = Diary(bayes)
        run(folder / name, bayes, max_steps=2, callbacks=[diary], gradient_accumulation=2, batch_size=2)
        yield name, {"missing": diary.seen()["missing"], "ended": digest(bayes)}


def texts():
    """Eight texts, of very different lengths."""
    return [
        {"input_ids": [*range(5, 7 + length)], "attention_mask": [1] * (length + 2), "labels": [*range(5, 7 + length)]}
        for length in (39, 0, 11, 3, 1, 27, 5, 2)
    ]


def writer():
    network = tiny_language_model(layers=1)
    torch.manual_seed(0)
    return BayesLoRA(network, MonteCLoRAConfig(r=2, num_components=3, **NOISELESS))


def train_texts(folder, callbacks, *, steps, size=2):
    """The first step of fit(): eight texts on all processes together."""
    run(
        folder,
        writer(),
        texts(),
        batch_size=size,
        gradient_accumulation=steps,
        max_steps=1,
        max_grad_norm=0.0,
        callbacks=callbacks,
    )


def train_texts_in_a_stock_trainer(folder, callbacks, *, steps, size=2):
    arguments = TrainingArguments(
        str(folder),
        report_to=[],
        disable_tqdm=True,
        max_steps=1,
        save_strategy="no",
        max_grad_norm=0.0,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
        **CPU,
    )
    Trainer(writer(), arguments, Collator(), texts(), callbacks=callbacks).train()


def gradients(folder, rank):
    """The first step's gradients, without noise: two processes, two batches of two each."""
    for normalization in ("paper", "elbo"):
        bayes, seen = new(normalization=normalization, **NOISELESS), Gradients()
        run(
            folder / normalization,
            bayes,
            tiny_dataset(8),
            batch_size=2,
            gradient_accumulation=2,
            max_steps=1,
            max_grad_norm=0.0,
            callbacks=[seen],
        )
        if rank == 0:
            save_file(seen.values, folder / f"{normalization}.safetensors")
    for name, train in {"texts": train_texts, "texts, stock": train_texts_in_a_stock_trainer}.items():
        seen = Gradients()
        train(folder / name, [seen], steps=2)
        if rank == 0:
            save_file(seen.values, folder / f"{name}.safetensors")
    small, seen = new(normalization="elbo", **NOISELESS), Gradients()
    run(folder / "small", small, tiny_dataset(3), max_steps=1, max_grad_norm=0.0, callbacks=[seen])
    yield "small", float(seen.values["guide.log_v_r2_in16"].flatten()[0])


def other_loops(folder, rank):
    """A stock Trainer, and DistributedDataParallel in a loop of one's own."""
    bayes = new()
    diary = Diary(bayes)
    arguments = TrainingArguments(
        str(folder / "stock"),
        report_to=[],
        disable_tqdm=True,
        max_steps=3,
        save_strategy="no",
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        remove_unused_columns=False,
        **CPU,
    )
    Trainer(bayes, arguments, Collator(), tiny_dataset(24), callbacks=[diary]).train()
    yield "stock", diary.seen() | {"ended": digest(bayes)}

    torch.manual_seed(0)
    bayes = new(seed=rank, base_seed=rank)
    loop, batch = DistributedDataParallel(bayes), tiny_batch(8)
    optimizer = torch.optim.Adam([p for p in bayes.parameters() if p.requires_grad], lr=1e-2)
    torch.manual_seed(3)
    loop(**{name: value[4 * rank : 4 * rank + 4] for name, value in batch.items()}).loss.backward()
    optimizer.step()
    outputs = [loop(**batch).logits.tolist() for _ in range(2)]
    with bayes.without_sampling():
        outputs.append(loop(**batch).logits.tolist())
    yield "own loop", {"outputs": outputs, "ended": digest(bayes), "generator": int(torch.randint(2**62, ()))}


def refusals(folder, rank):
    """Errors that only one process can see are everybody's."""
    run(folder / "taken", new(), max_steps=1)
    yield "taken", error_of(lambda: run(folder / "taken", new(), max_steps=1), InputError)
    yield "nothing", error_of(lambda: run(folder / "nothing", new(), resume=True), InputError)
    grouped = {"train_sampling_strategy": "group_by_length"}
    yield "grouped", error_of(lambda: run(folder / "grouped", new(), **grouped), InputError)

    huge = [example | {"labels": 1e38 if index == 3 else 1.0} for index, example in enumerate(tiny_dataset(16))]
    for accumulation in (1, 2):
        bayes = new(num_labels=1)
        before = digest(bayes)
        batches = {"gradient_accumulation": accumulation, "batch_size": 8 // accumulation}
        error = error_of(lambda: run(folder / f"huge{accumulation}", bayes, huge, **batches), TrainingDivergedError)  # noqa: B023
        yield f"overflow, accumulation {accumulation}", error
        yield f"unchanged, accumulation {accumulation}", digest(bayes) == before

    bayes = new()
    with torch.no_grad():
        bayes.network.get_input_embeddings().weight[BROKEN_TOKEN] = math.nan
    train = [e for e in tiny_dataset(24) if BROKEN_TOKEN not in e["input_ids"]]
    held_out = [e for e in tiny_dataset(24, seed=1) if BROKEN_TOKEN not in e["input_ids"]][:8]
    held_out[5] = held_out[5] | {"input_ids": [BROKEN_TOKEN] * len(held_out[5]["input_ids"])}
    yield "evaluation", error_of(lambda: run(folder / "nan", bayes, train, held_out), TrainingDivergedError)


def sharding(folder, rank):
    """FSDP around the whole module gives DistributedDataParallel's gradients; other uses are refused."""
    rows = {name: value[4 * rank : 4 * rank + 4] for name, value in tiny_batch(8).items()}

    def step(wrap):
        bayes = new()
        wrapped = wrap(bayes)
        torch.manual_seed(3)
        wrapped(**rows).loss.backward()
        grads = [p.grad for p in bayes.parameters() if p.requires_grad and p.grad is not None]
        return [(g.full_tensor() if isinstance(g, DTensor) else g).double().norm().item() for g in grads]

    def layer_by_layer(bayes):
        for layer in bayes.network.get_base_model().bert.encoder.layer:
            fully_shard(layer, mesh=mesh)
        return fully_shard(bayes, mesh=mesh)

    def fused(wrap):
        """With a kernel that reads lora_A.weight itself, on both processes."""

        def fuse(bayes):
            adapter = bayes.model.groups[0].adapters[0]
            layer, a, b = adapter.layer, adapter.lora_A, adapter.layer.lora_B["default"]
            layer.forward = lambda x: layer.base_layer(x) + torch.nn.functional.linear(x, b.weight @ a.weight)
            return wrap(bayes)

        return error_of(lambda: step(fuse), InputError)

    mesh = init_device_mesh("cpu", (2,))
    yield "fused", [fused(DistributedDataParallel), fused(lambda bayes: fully_shard(bayes, mesh=mesh))]
    yield "ddp", step(DistributedDataParallel)
    yield "fsdp2", step(lambda bayes: fully_shard(bayes, mesh=mesh))
    yield "fsdp2, layer by layer", error_of(lambda: step(layer_by_layer), InputError)


def preferences(folder, rank):
    """TRL's DPO on a posterior, under DistributedDataParallel, which looks for unused parameters there."""
    if find_spec("trl") is None:
        return
    import trl
    from datasets import Dataset

    from bayeslora.training.preference import BayesDPOTrainer
    from tests.language import tiny_tokenizer

    pair = {"prompt": "where is the cat?", "chosen": " to the north", "rejected": " to the south"}
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4, sample_scaler=0.3))
    asked = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1, "bf16": False}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    trainer = BayesDPOTrainer(
        bayes,
        args=trl.DPOConfig(str(folder), **asked, **quiet),
        train_dataset=Dataset.from_list([pair] * 16),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    yield "ended", digest(bayes)
    yield "wrapped", type(trainer.model_wrapped).__name__


def run_scenarios(scenarios):
    """Each writes what its process saw into a file of its name, in the folder that is the first argument. Further
    arguments name some of them."""
    torch.set_num_threads(1)
    folder, chosen = Path(sys.argv[1]), sys.argv[2:]
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    gc.freeze()  # Accelerate collects garbage at the start of each run
    for scenario in scenarios:
        if chosen and scenario.__name__ not in chosen:
            continue
        place = folder / scenario.__name__
        place.mkdir(exist_ok=True)
        seen = dict(scenario(place, rank))
        (folder / f"{scenario.__name__}-{rank}.json").write_text(json.dumps(seen), encoding="utf-8")
        distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    run_scenarios((training, coverage, gradients, other_loops, refusals, sharding, preferences))
