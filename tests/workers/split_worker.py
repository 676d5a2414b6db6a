"""The objective of a network on two devices, one of which does not exist, for tests/adapters/test_placement.py.

Fake tensors have shapes and devices, and no numbers: an operation on tensors of two devices fails as it would on two
GPUs, and so does whatever asks a device for a number. torch lets a made-up kind of device have one member, so the other
is the CPU; each is first once. This proves that the forward pass of the objective moves every tensor to where it
is used, and so does its backward pass, which goes back the same way; it says nothing of the numbers, nor of speed.

python tests/workers/split_worker.py [broken]
"""

import itertools
import json
import sys
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.adapters.groups import AdapterGroup
from tests.conftest import tiny_batch, tiny_network

GUIDES = ("amortized", "mean_field", "gaussian")
PLACES = {"halves": ("layers.1", "norm", "score"), "all but the embeddings": ("layers", "norm", "score")}


class Devices(_DummyBackendModule):
    """A kind that nothing computes on."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16]

    def is_available(self):
        return True

    def device_count(self):
        return 1

    def current_device(self):
        return 0


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return tuple(moved(part, device) for part in value) if isinstance(value, tuple) else value


def split(bayes, mode, second, devices):
    """Place the parts ``second`` of the network on the second device and all else on the first; inputs follow, as
    accelerate has it."""
    first, other = devices
    base = bayes.network.get_base_model()
    parts = [module for name, module in base.named_modules() if name.removeprefix("model.") in second]
    inside = {module for part in parts for module in part.modules()}
    for module in bayes.modules():
        device = other if module in inside else first
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if value is not None:
                    fake = mode.from_tensor(value.detach())
                    with mode:
                        fake = fake.to(device)
                    own[name] = nn.Parameter(fake, value.requires_grad) if own is module._parameters else fake

    def bring(module, args, kwargs):
        return moved(args, other), {name: moved(value, other) for name, value in kwargs.items()}

    for part in parts:
        for module in part if isinstance(part, nn.ModuleList) else [part]:
            module.register_forward_pre_hook(bring, with_kwargs=True)
    base.score.register_forward_hook(lambda module, args, output: output.to(first))


def step(guide, second, devices, **options):
    bayes = BayesLoRA(tiny_network("llama"), MonteCLoRAConfig(r=4, guide=guide, **options)).train()
    batch = tiny_batch()
    bayes(**batch).loss.backward()  # what is looked up once, at the first batch
    bayes.zero_grad()
    mode = FakeTensorMode()
    split(bayes, mode, second, devices)
    with mode:
        there = {name: torch.empty(value.shape, dtype=value.dtype, device=devices[0]) for name, value in batch.items()}
        assert bayes(**there).loss.shape == ()
    return sorted({str(adapter.lora_A.weight.device) for group in bayes.model.groups for adapter in group.adapters})


def main():
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend("fake", Devices())
    if "broken" in sys.argv:  # without the move: the mistake must be seen

        def weights(group):
            return torch.stack([adapter.lora_A.weight for adapter in group.adapters])

        with patch.object(AdapterGroup, "weights", weights):
            step("mean_field", PLACES["halves"], ("fake:0", "cpu"))
    seen = {}
    for devices in (("fake:0", "cpu"), ("cpu", "fake:0")):
        for (place, second), guide in itertools.product(PLACES.items(), GUIDES):
            seen[f"{place} on {devices}, {guide}"] = step(guide, second, devices)
    for schedule in ("cosine", "entropy", "learned"):
        seen[schedule] = step(
            "mean_field", PLACES["all but the embeddings"], ("fake:0", "cpu"), noise_schedule=schedule
        )
    seen["relative"] = step("mean_field", PLACES["halves"], ("fake:0", "cpu"), noise_units="relative", noise="shared")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
