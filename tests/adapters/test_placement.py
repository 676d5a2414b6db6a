"""Networks that device_map splits over devices, and those that accelerate offloads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from tests.conftest import tiny_batch, tiny_dataset, tiny_network

ROOT = Path(__file__).parents[2]
CONFIG = MonteCLoRAConfig(r=2, sample_scaler=0.3)


def split_worker(*arguments):
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "workers" / "split_worker.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


class TestSplit:
    @pytest.mark.slow
    def test_every_tensor_is_moved_to_where_it_is_used(self):
        """With each guide, schedule and place of the border: see the top of the worker for what this proves."""
        done = split_worker()
        assert done.returncode == 0, done.stderr[-3000:]
        seen = json.loads(done.stdout)
        assert len(seen) == 16
        assert sum(len(devices) == 2 for devices in seen.values()) >= 6, seen  # the rest: all adapters on the other

    @pytest.mark.slow
    def test_the_worker_notices_a_tensor_that_is_not_moved(self):
        done = split_worker("broken")
        assert "Expected all tensors to be on the same device" in done.stderr

    def test_draws_are_made_at_home_and_groups_are_the_same_in_any_split(self):
        """The number of groups, the names of the sites and the shapes in files do not depend on where layers lie."""
        bayes = BayesLoRA(tiny_network(), CONFIG)
        groups = bayes.model.groups
        assert all(group.home is bayes.network.get_base_model() for group in groups)
        names = set(bayes.state_dict())
        with torch.no_grad():
            for part in (
                bayes.network.base_model.model.bert.encoder.layer[1],
                bayes.network.base_model.model.bert.pooler,
            ):
                part._apply(lambda tensor: tensor.to("meta"))
        assert [group.device.type for group in groups] == ["cpu"] * len(groups)
        assert set(bayes.state_dict()) == names

    def test_what_is_split_stays_where_it_is(self):
        """Also under ``to``; the type changes."""
        bayes = BayesLoRA(tiny_network(), CONFIG)
        bayes.network.base_model.model.bert.encoder.layer[1]._apply(lambda tensor: tensor.to("meta"))
        before = {name: parameter.device for name, parameter in bayes.named_parameters()}
        bayes.to("meta")
        assert {name: parameter.device for name, parameter in bayes.named_parameters()} == before
        bayes.to(torch.float64)
        assert {name: parameter.device for name, parameter in bayes.named_parameters()} == before
        assert {parameter.dtype for parameter in bayes.parameters()} == {torch.float64}

    def test_the_posterior_is_made_beside_the_network(self):
        bayes = BayesLoRA(tiny_network(), CONFIG.replace(guide="gaussian"))
        assert {parameter.device for parameter in bayes.parameters()} == {torch.device("cpu")}

    def test_a_device_map_is_handed_on_to_trainer(self, tmp_path):
        """A dispatched network trains and predicts as the same one without hooks, and Trainer does not move it."""
        found = []
        for dispatched in (False, True):
            network = tiny_network()
            if dispatched:
                network = dispatch_model(network, {"": "cpu"}, force_hooks=True)
            torch.manual_seed(0)
            bayes = BayesLoRA(network, CONFIG)
            assert getattr(bayes, "hf_device_map", None) == ({"": "cpu"} if dispatched else None)
            fit(bayes, tiny_dataset(8), output_dir=tmp_path / str(dispatched), max_steps=2, progress=False)
            found.append(bayes.predict(tiny_dataset(4), num_samples=2, progress=False).sample_probs)
        np.testing.assert_allclose(found[1], found[0], atol=1e-6)

    def test_trainer_leaves_a_split_network_alone(self, tmp_path):
        bayes = BayesLoRA(tiny_network(), CONFIG)
        bayes.network.get_base_model().hf_device_map = {"bert.encoder.layer.0": 0, "bert.encoder.layer.1": 1}
        trainer = transformers.Trainer(bayes, transformers.TrainingArguments(str(tmp_path), use_cpu=True))
        assert trainer.is_model_parallel
        assert trainer.args.n_gpu == 1 or trainer.args.n_gpu == 0


class TestOffloaded:
    """On the CPU these hooks are real: weights are on the meta device between two calls."""

    @pytest.mark.parametrize("kind", ["cpu", "disk", "disk of one block"])
    def test_refused_before_anything_is_made(self, kind, tmp_path):
        network = tiny_network().eval()
        if kind == "cpu":
            cpu_offload(network, execution_device="cpu")
        elif kind == "disk":
            disk_offload(network, str(tmp_path), execution_device="cpu")
        else:
            parts = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk"}
            parts |= {"bert.pooler": "cpu", "classifier": "cpu", "dropout": "cpu"}
            dispatch_model(network, parts, main_device="cpu", offload_dir=str(tmp_path))
        batch = {name: value for name, value in tiny_batch().items() if name != "labels"}
        with torch.no_grad():
            assert torch.isfinite(network(**batch).logits).all()  # it works by itself
        before = [name for name, _ in network.named_modules()]
        with pytest.raises(InputError, match=r"accelerate offloads '.*without 'cpu' and 'disk'"):
            BayesLoRA(network, CONFIG)
        assert [name for name, _ in network.named_modules()] == before

    def test_an_adapted_one(self):
        network = get_peft_model(tiny_network(), LoraConfig(r=2, target_modules=["query"]))
        cpu_offload(network, execution_device="cpu")
        with pytest.raises(InputError, match="accelerate offloads"):
            BayesLoRA(network, CONFIG)

    def test_an_adapter_that_was_never_loaded(self):
        lora = LoraConfig(r=2, target_modules=["query"])
        network = get_peft_model(tiny_network(), lora, low_cpu_mem_usage=True)
        with pytest.raises(InputError, match="without low_cpu_mem_usage"):
            BayesLoRA(network, CONFIG)
