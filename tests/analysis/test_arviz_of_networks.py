"""What ArviZ gets from real networks: blocks of draws, the prior's predictions, and a run's log."""

import json

import numpy as np
import pytest
import torch

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit
from bayeslora.adapters.drawing import using_draw
from bayeslora.analysis import held_out_elpd, leave_one_out, load_arviz, stream_arviz, to_arviz
from bayeslora.data.batches import Collator
from bayeslora.errors import InputError
from bayeslora.inference.draws import prior_sites
from tests.conftest import tiny_dataset, tiny_network

pytestmark = pytest.mark.filterwarnings("ignore:\\s*ArviZ is undergoing a major refactor:FutureWarning")


def unfitted(**options) -> BayesLoRA:
    config = {"r": 2, "sample_scaler": 0.5, "target_modules": ("query", "output.dense"), "scale_init": 0.01} | options
    bayes = BayesLoRA(tiny_network(), MonteCLoRAConfig(**config)).eval()
    with torch.no_grad():
        for name, parameter in bayes.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return bayes


@pytest.mark.parametrize("kind", ["posterior_draws", "prior_draws"])
def test_blocks_of_draws_add_up(kind):
    bayes = unfitted()
    draw, names = getattr(bayes, kind), bayes.adapter_names[:1]
    whole = draw(num_samples=5, seed=3, adapters=names)
    blocks = [draw(num_samples=n, seed=3, adapters=names, first_draw=first) for first, n in ((0, 2), (2, 3))]
    for name in ("mixture_weights", "covariance", "noise_scale"):
        np.testing.assert_array_equal(np.concatenate([getattr(b, name) for b in blocks]), getattr(whole, name))
    np.testing.assert_array_equal(np.concatenate([block.A[names[0]] for block in blocks]), whole.A[names[0]])
    assert len(np.unique(whole.noise_scale[:, 0])) == 5


def test_predictions_of_the_prior_are_those_of_networks_drawn_from_it():
    bayes, examples = unfitted(), tiny_dataset(6)
    found = bayes.predict(examples, 3, seed=2, first_draw=4, prior=True)
    inputs = Collator.for_network(bayes.network)(examples)
    inputs.pop("labels")
    for s in range(3):
        drawn = bayes.model.matrices(prior_sites(bayes, 2, 4 + s))
        with torch.no_grad(), using_draw(bayes.model.groups, drawn):
            expected = bayes.network(**inputs).logits.softmax(-1)
        np.testing.assert_allclose(found.sample_probs[s], expected, atol=2e-6)
    posterior = bayes.predict(examples, 3, seed=2, first_draw=4)
    assert np.abs(posterior.sample_probs - found.sample_probs).max() > 1e-3


def test_streamed_draws_of_a_network_are_those_made_at_once(tmp_path):
    bayes, examples = unfitted(), tiny_dataset(6)
    options = {"num_samples": 5, "seed": 1, "adapters": bayes.adapter_names}
    whole = to_arviz(bayes, examples, **options)
    written = load_arviz(stream_arviz(bayes, tmp_path / "draws.nc", examples, block=2, **options))
    for group in ("posterior", "prior", "constant_data", "observed_data"):
        for name, values in whole[group].data_vars.items():
            np.testing.assert_array_equal(written[group][name], values)
    for group in ("posterior_predictive", "prior_predictive", "log_likelihood"):
        for name, values in whole[group].data_vars.items():
            np.testing.assert_allclose(written[group][name], values, atol=2e-6)


def test_sample_stats_are_the_runs_log(tmp_path):
    bayes = unfitted()
    result = fit(bayes, tiny_dataset(), output_dir=tmp_path / "run", max_steps=3, progress=False)
    stats = to_arviz(bayes, num_samples=2, run=tmp_path / "run")["sample_stats"]
    logged = [entry for entry in result.history if "elbo/task" in entry]
    np.testing.assert_array_equal(stats["step"], [entry["step"] for entry in logged])
    for name in ("task", "kl", "cooperation"):
        np.testing.assert_allclose(stats[f"elbo_{name}"], [entry[f"elbo/{name}"] for entry in logged])
    np.testing.assert_allclose(stats["elbo_kl_site"].sum("site"), stats["elbo_kl"], rtol=1e-5)
    last = [logged[-1][f"noise_to_signal/{name}"] for name in bayes.adapter_names]
    np.testing.assert_allclose(stats["noise_to_signal_trace"][-1], last)
    same = to_arviz(bayes, num_samples=2, history=result.history)["sample_stats"]
    np.testing.assert_array_equal(same["loss"], stats["loss"])


def test_an_unfinished_run_has_no_log_yet(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps({"finished": False}))
    with pytest.raises(InputError, match=r"run\.json holds no history"):
        to_arviz(unfitted(), num_samples=2, run=tmp_path)


def test_plain_lora_is_one_point():
    data = to_arviz(unfitted(sample_scaler=0), tiny_dataset(12), num_samples=30)
    assert (data["posterior"]["noise_scale"].values == 0).all()
    pointwise = data["log_likelihood"]["labels"].values[0]
    assert (pointwise == pointwise[0]).all()
    with pytest.raises(InputError, match="plain LoRA"):
        leave_one_out(data)
    assert held_out_elpd(data).elpd_loo == pytest.approx(pointwise[0].sum())
