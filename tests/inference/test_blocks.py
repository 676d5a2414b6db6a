"""Noise in the last blocks only: the draws of the whole network there, the mean below, which runs once."""

import numpy as np
import pytest
import torch
from torch import nn

from bayeslora import BayesLoRA, InputError
from bayeslora.adapters.blocks import fewer_blocks, in_last_blocks, repeated_blocks
from bayeslora.adapters.drawing import using_draw
from bayeslora.inference import tuning
from bayeslora.inference.tuning import NEAR
from bayeslora.models import Tuning
from bayeslora.storage.manifest import _is_tuning
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.modules import CONFIGS, adapted, fitted, module, randomize_b

KINDS = ["bert", "roberta", "gpt2", "llama", "deberta", "longformer"]
DATA = tiny_dataset(24, rule="random")
QUICK = {"num_samples": 4, "progress": False}


def lower(name):
    """Whether an adapter lies in the first of two blocks."""
    return ".0." in name


@pytest.fixture(params=KINDS)
def bayes(request):
    return adapted(request.param) if request.param in CONFIGS else noisy(request.param)


def noisy(kind="bert", **options):
    return randomize_b(module(kind, **{"sample_scaler": 0.3} | options)).eval()


@torch.no_grad()
def test_a_draw_is_the_whole_networks_above_and_the_mean_below(bayes):
    data = DATA[:6]
    found = bayes.predict(data, blocks=1, **QUICK).sample_log_probs
    whole, batch = bayes.sample(4, seed=0), bayes.predict(data, **QUICK).sample_log_probs
    for index in range(4):
        drawn = bayes.model.matrices({name: values[index] for name, values in whole.items()})
        for group in bayes.model.groups:
            below = [lower(adapter.name) for adapter in group.adapters]
            drawn[group.name][below] = group.mean()[below]
        for row, example in enumerate(data):
            inputs = {name: torch.tensor([value]) for name, value in example.items() if name != "labels"}
            with using_draw(bayes.model.groups, drawn):
                expected = bayes.network(**inputs).logits.log_softmax(-1)[0]
            np.testing.assert_allclose(found[index, row], expected, atol=1e-5)
    assert np.abs(found - batch).max() > 1e-4
    assert np.abs(found[0] - found[1]).max() > 1e-4
    everything = bayes.predict(data, blocks=2, **QUICK).sample_log_probs
    np.testing.assert_array_equal(everything, batch)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_same_however_it_is_cut(kind, batch_size):
    bayes = noisy(kind)
    expected = bayes.predict(DATA, blocks=1, **QUICK).sample_log_probs
    found = bayes.predict(DATA, blocks=1, batch_size=batch_size, **QUICK).sample_log_probs
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "llama", "deberta"])
def test_blocks_below_run_once(kind):
    bayes = adapted(kind) if kind in CONFIGS else noisy(kind)
    runs = [0, 0]
    for index, block in enumerate(repeated_blocks(bayes.network)):
        inner = next(
            part for part in block.modules() if isinstance(part, nn.LayerNorm) or "Norm" in type(part).__name__
        )
        inner.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    bayes.predict([DATA[0]] * 8, num_samples=6, batch_size=8, blocks=1, progress=False)  # one batch, one draw a pass
    assert runs[0] == 1
    assert runs[1] >= 6


def test_whatever_draws_has_it(tmp_path):
    bayes = fitted(sample_scaler=0.3)
    whole = bayes.posterior_draws(num_samples=3)
    bayes.tuning = Tuning(blocks=1)
    below = np.array([lower(name) for name in bayes.adapter_names])
    assert 0 < below.sum() < len(below)
    scales = bayes.posterior_draws(num_samples=3).noise_scale
    assert (scales[:, below] == 0).all()
    np.testing.assert_array_equal(scales[:, ~below], whole.noise_scale[:, ~below])
    inputs = {name: value for name, value in tiny_batch(4).items() if name != "labels"}
    expected = bayes.predict([{n: v[i].tolist() for n, v in inputs.items()} for i in range(4)], 3, progress=False)
    with torch.no_grad(), bayes.as_draw(2) as network:
        probs = network(**inputs).logits.softmax(-1)
    np.testing.assert_allclose(probs, expected.sample_probs[2], atol=1e-6)

    bayes.save_pretrained(tmp_path / "adapter")
    opened = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network("bert", seed=0))
    assert opened.tuning == bayes.tuning


def test_adapters_that_were_tuned_before_open():
    values = Tuning(0.5).to_dict()
    assert _is_tuning(values)
    assert _is_tuning({name: value for name, value in values.items() if "blocks" not in name})
    assert not _is_tuning(values | {"blocks": 0})
    assert not _is_tuning(values | {"blocks": 1.5})


class TestTune:
    def test_the_fewest_that_predict_as_well(self, monkeypatch):
        """With a tolerance of nothing and of a nat; each with its own width, and never worse than the mean."""
        bayes = noisy(network_options={"layers": 4})
        found = {}
        for near in (-1.0, 1.0):
            monkeypatch.setattr(tuning, "NEAR", near)
            found[near] = bayes.tune(DATA, blocks="auto", **QUICK)
        assert (found[-1.0].blocks, found[1.0].blocks) == (None, 1)
        assert found[1.0].nll_all_blocks == found[-1.0].nll
        assert bayes.predict(DATA, **QUICK).nll == pytest.approx(found[1.0].nll, rel=1e-6)
        alone = bayes.tune(DATA, blocks=1, **QUICK)
        assert (alone.width, alone.nll) == (found[1.0].width, found[1.0].nll)
        assert 0 < NEAR < 0.01

    def test_without_labels_a_number(self):
        bayes = noisy()
        found = bayes.tune(DATA, blocks=1, agreement=0.8, **QUICK)
        assert found.blocks == 1
        assert found.agreement >= 0.8
        with pytest.raises(InputError, match="compares likelihoods of labels"):
            bayes.tune(DATA, blocks="auto", agreement=0.8, **QUICK)


class TestRefused:
    @pytest.mark.parametrize("blocks", [0, -1, 1.5, True, "some"])
    def test_no_number(self, blocks):
        for call in (noisy().predict, noisy().tune):
            with pytest.raises(InputError, match="blocks is how many of the last blocks are drawn"):
                call(DATA, blocks=blocks, **QUICK)

    def test_more_than_there_are(self):
        bayes = noisy()
        with pytest.raises(InputError, match="blocks is 3, and the network has 2 repeated blocks"):
            bayes.predict(DATA, blocks=3, **QUICK)
        with pytest.raises(InputError, match="blocks is 3"):
            bayes.tuning = Tuning(blocks=3)
        assert bayes.tuning is None

    def test_blocks_without_adapters(self):
        bayes = noisy("llama", target_modules=["q_proj"], layers_to_transform=[0])
        assert fewer_blocks(bayes.network, bayes.model.groups) == []
        with pytest.raises(InputError, match="no adapter lies in the last 1"):
            bayes.predict(DATA, blocks=1, **QUICK)


def test_what_lies_behind_the_blocks_is_drawn():
    bayes = noisy("bert", target_modules=["query", "pooler.dense"])
    found = in_last_blocks(bayes.network, bayes.model.groups, 1)
    drawn = {
        adapter.name: drawn
        for group in bayes.model.groups
        for adapter, drawn in zip(group.adapters, found[group.name], strict=True)
    }
    assert [name for name in drawn if not drawn[name]] == [name for name in drawn if lower(name)]
    assert any("pooler" in name for name in drawn)
