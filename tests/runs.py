"""Runs of fit() on a tiny network, and callbacks that break into them."""

import gc

import pytest
import torch
from transformers import TrainerCallback

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit
from tests.conftest import tiny_dataset, tiny_network

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(autouse=True, scope="module")
def _frozen_garbage():
    """Accelerate collects garbage at the start of each run: 0.3 s over all that is imported, unless it is set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def base(**options):
    return tiny_network(layers=1, **options)


def new(seed=0, *, network_options=None, **options):
    """Initial values from the seed, on the same base network always."""
    network = base(**(network_options or {}))
    torch.manual_seed(seed)
    options = {"r": 2, "num_components": 3, "sample_scaler": 0.05, "lora_dropout": 0.1} | options
    return BayesLoRA(network, MonteCLoRAConfig(**options))


def run(folder, bayes=None, train=None, evaluate=None, **options):
    """fit() for a few steps: 24 examples, 6 steps to an epoch."""
    bayes = new() if bayes is None else bayes
    train = tiny_dataset(24) if train is None else train
    options = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "progress": False} | options
    return fit(bayes, train, evaluate, output_dir=folder, **options)


def state(bayes):
    return {name: value.clone() for name, value in bayes.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def flipped(dataset):
    return [example | {"labels": 1 - example["labels"]} for example in dataset]


class At(TrainerCallback):
    """Does something when a step begins (or ends)."""

    def __init__(self, step, action, *, end=False):
        self.step, self.action, self.end = step, action, end

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and not self.end:
            self.action(kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.end:
            self.action(kwargs)


def interrupt(*_):
    raise KeyboardInterrupt
