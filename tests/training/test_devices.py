"""What holds on any device: each test runs on the CPU, and, marked ``gpu``, on CUDA where there is one."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit
from tests.conftest import tiny_batch, tiny_dataset, tiny_network

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
CONFIG = MonteCLoRAConfig(r=4, sample_scaler=0.05)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])])
def device(request):
    return request.param


def module(device, config=CONFIG, **options):
    torch.manual_seed(0)
    return BayesLoRA(tiny_network("llama", **options), config).to(device)


def on(device, batch):
    return {name: value.to(device) for name, value in batch.items()}


def gradients(bayes, batch):
    bayes.zero_grad()
    torch.manual_seed(3)
    bayes.train()(**batch).loss.backward()
    return {name: p.grad.float().cpu() for name, p in bayes.named_parameters() if p.grad is not None}


def test_a_network_in_bf16_learns(device):
    bayes, batch = module(device).to(torch.bfloat16), on(device, tiny_batch())
    assert {p.dtype for p in bayes.guide.parameters()} == {torch.float32}
    optimizer = torch.optim.AdamW([p for p in bayes.parameters() if p.requires_grad], 5e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = bayes.train()(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(bayes.elbo.parts.task))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_autocast_changes_gradients_by_rounding_alone(device):
    bayes, batch = module(device), on(device, tiny_batch())
    plain = gradients(bayes, batch)
    with torch.autocast(device, torch.bfloat16):
        rounded = gradients(bayes, batch)
    assert plain.keys() == rounded.keys()
    whole = [torch.cat([g.flatten() for g in found.values()]) for found in (plain, rounded)]
    assert torch.cosine_similarity(*whole, dim=0) > 0.99


def test_gradient_checkpointing_gives_equal_gradients(device):
    found, batch = [], on(device, tiny_batch())
    for checkpointing in (False, True):
        bayes = module(device)
        if checkpointing:
            bayes.activation_checkpointing_enable()
        found.append(gradients(bayes, batch))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore")  # torch.compile looks at .grad of whatever it meets
def test_compiled_gradients_are_equal(device):
    batch, found = on(device, tiny_batch()), []
    for compiled in (False, True):
        bayes = module(device)
        if compiled:
            bayes.compile(backend="inductor" if device == "cuda" else "eager")
        found.append(gradients(bayes, batch))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-4, msg=name)


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(device, tmp_path):
    options = {"batch_size": 4, "progress": False, "save_steps": 2, "use_cpu": device == "cpu"}
    ended = []
    for stops in ([6], [3, 6]):
        for part, steps in enumerate(stops):
            bayes = module(device)
            folder = tmp_path / str(len(stops))
            callbacks = [Stop(steps)] if steps < 6 else []
            try:
                fit(
                    bayes,
                    tiny_dataset(24),
                    output_dir=folder,
                    max_steps=6,
                    resume=part > 0,
                    callbacks=callbacks,
                    **options,
                )
            except KeyboardInterrupt:
                continue
        ended.append({name: value.cpu() for name, value in bayes.state_dict().items() if "lora_" in name})
    assert ended[0].keys() == ended[1].keys()
    for name, value in ended[0].items():
        torch.testing.assert_close(ended[1][name], value, rtol=1e-3, atol=1e-5, msg=name)


class Stop(TrainerCallback):
    def __init__(self, at):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def test_a_prediction_is_that_of_the_merged_draw(device):
    bayes = module(device).eval()
    for group in bayes.model.groups:
        for adapter in group.adapters:
            torch.nn.init.normal_(adapter.layer.lora_B["default"].weight, std=0.1)
    data = tiny_dataset(6)
    drawn = bayes.predict(data, num_samples=2, progress=False).sample_probs
    for index in range(2):
        merged = BayesLoRA(bayes.merge(draw=index), MonteCLoRAConfig(r=2, sample_scaler=0.0))
        expected = merged.predict(data, num_samples=0, progress=False).probs
        np.testing.assert_allclose(drawn[index], expected, atol=1e-3)
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4


@pytest.mark.gpu
@NO_CUDA
def test_memory_does_not_grow():
    bayes, batch = module("cuda"), on("cuda", tiny_batch())
    held = []
    for _ in range(30):
        gradients(bayes, batch)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[5]


@pytest.mark.gpu
@NO_CUDA
def test_a_step_does_not_wait_for_the_device():
    bayes, batch = module("cuda"), on("cuda", tiny_batch())
    del batch["attention_mask"]  # transformers looks at its values
    for _ in range(3):
        bayes.train()(**batch).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        bayes(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
