"""Configuration is checked at the door, and survives JSON."""

import json

import pytest

from bayeslora import InputError, MonteCLoRAConfig
from bayeslora.config import default_preset


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"r": 0}, "r (the rank"),
        ({"r": 2.0}, "r (the rank"),
        ({"num_components": 0}, "num_components"),
        ({"num_particles": 0}, "num_particles"),
        ({"sample_scaler": -1e-3}, "sample_scaler"),
        ({"sample_scaler": float("nan")}, "sample_scaler"),
        ({"kl_weight": -1}, "kl_weight"),
        ({"cooperation": float("inf")}, "cooperation"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"prior_concentration": 0}, "prior_concentration"),
        ({"scale_init": 0.0}, "scale_init"),
        ({"r": 8, "degrees_of_freedom": 7}, "degrees_of_freedom"),
        ({"rank_pattern": {"key": 0}}, "rank_pattern"),
        ({"normalization": "mean"}, "normalization"),
        ({"mixture": "soft"}, "mixture"),
        ({"mode": "post-hoc"}, "mode"),
        ({"mode": "post_hoc", "sample_scaler": 0}, "post_hoc"),
        ({"lora_options": {"use_dora": True}}, "use_dora"),
        ({"lora_options": {"r": 4}}, "lora_options['r']"),
    ],
)
def test_bad_values_are_named(changes, named):
    with pytest.raises(InputError) as caught:
        MonteCLoRAConfig(**changes)
    assert named in str(caught.value)


def test_json_round_trip():
    config = MonteCLoRAConfig(
        r=4,
        target_modules=["query", "value"],
        layers_to_transform=[0, 1],
        rank_pattern={"key": 2},
        lora_options={"bias": "none"},
        mixture="sparse",
    )
    assert MonteCLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_field_of_a_newer_version_is_named():
    with pytest.raises(InputError, match="schedule_of_tomorrow"):
        MonteCLoRAConfig.from_dict({"schedule_of_tomorrow": 1})


def test_kl_weight_follows_the_normalization():
    assert MonteCLoRAConfig().kl_weight == 1e-2
    assert MonteCLoRAConfig(normalization="elbo").kl_weight == 1.0
    assert MonteCLoRAConfig(normalization="elbo", kl_weight=0.1).kl_weight == 0.1


def test_presets():
    paper = MonteCLoRAConfig.preset("paper", r=4)
    assert (paper.sample_scaler, paper.kl_weight, paper.num_components, paper.cooperation) == (
        5e-3,
        1e-5,
        4,
        1.0,
    )
    assert paper.r == 4
    assert MonteCLoRAConfig.preset("constant") == MonteCLoRAConfig()
    calibrated = MonteCLoRAConfig(sample_scaler=0.25, noise_schedule="entropy")
    assert MonteCLoRAConfig.preset("calibrated") == calibrated
    learned = MonteCLoRAConfig(sample_scaler=8.0, noise_units="relative", noise_schedule="learned")
    assert MonteCLoRAConfig.preset("learned") == learned
    assert {default_preset(kind) for kind in ("classification", "regression", "choice", "text")} == {"learned"}
    assert [default_preset(kind, "post_hoc") for kind in ("choice", "text")] == ["calibrated", "constant"]
    with pytest.raises(InputError, match="learned, calibrated, constant"):
        MonteCLoRAConfig.preset("sharp")
