"""Images and audio go through the same module: nothing of a modality is in the core."""

import numpy as np
import pytest
import torch
import transformers
from transformers import WhisperForAudioClassification

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.models import CategoricalLikelihood
from tests.scripts import script

pytestmark = pytest.mark.slow

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
KINDS = ("vision", "speech")


def network(kind):
    torch.manual_seed(0)
    if kind == "vision":
        config = transformers.ViTConfig(**SMALL, image_size=4, patch_size=2, num_channels=1, num_labels=2)
        return transformers.ViTForImageClassification(config)
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        num_mel_bins=6,
        num_labels=2,
        max_source_positions=5,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        decoder_layers=1,
        decoder_attention_heads=2,
        classifier_proj_size=8,
        init_std=0.3,
    )
    return WhisperForAudioClassification(config)


def examples(kind, count, seed=0):
    """Bright or dark, loud or silent."""
    generator = torch.Generator().manual_seed(seed)
    name, shape = ("pixel_values", (1, 4, 4)) if kind == "vision" else ("input_features", (6, 10))
    labels = torch.randint(2, (count,), generator=generator).tolist()
    return [{name: torch.randn(shape, generator=generator) + 3 * label - 1.5, "labels": label} for label in labels]


def module(kind, **options):
    heads = {"vision": ("classifier",), "speech": ("projector", "classifier")}
    layers = {"vision": "all-linear", "speech": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")}
    options = {"r": 2, "target_modules": layers[kind], "modules_to_save": heads[kind], **options}
    return BayesLoRA(network(kind), MonteCLoRAConfig(**options))


@pytest.mark.parametrize("kind", KINDS)
def test_learnt_saved_and_read(kind, tmp_path):
    bayes = module(kind)
    assert isinstance(bayes.model.likelihood, CategoricalLikelihood)
    fit(
        bayes,
        examples(kind, 32),
        output_dir=tmp_path / "run",
        epochs=6,
        batch_size=8,
        learning_rate=1e-2,
        progress=False,
    )
    test = examples(kind, 40, seed=1)
    found = bayes.predict(test, num_samples=4, progress=False)
    assert (found.probs.argmax(1) == found.labels).mean() > 0.9
    again = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", network(kind))
    assert np.array_equal(again.predict(test, num_samples=4, progress=False).probs, found.probs)


@pytest.mark.parametrize("kind", KINDS)
def test_each_example_has_its_own_noise(kind):
    bayes = module(kind, sample_scaler=1.0)
    for name, parameter in bayes.network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    (name, value), _ = examples(kind, 1)[0].items()
    inputs = {name: value.expand(6, *value.shape)}
    assert bayes.rows_are_examples(inputs)
    bayes.train()
    bayes.network.eval()
    logits = bayes(**inputs, labels=torch.zeros(6, dtype=torch.long)).logits
    assert len(logits.round(decimals=4).unique(dim=0)) == 6


def test_the_vision_example(tmp_path, capsys):
    rows = script("examples/vision").main(str(tmp_path), pretraining=1, epochs=1, testing=60, seeds=(0,))
    assert {(row["method"], row["split"]) for row in rows} == {
        (method, split) for method in ("LoRA", "MonteCLoRA") for split in ("turned", "turned, noisy")
    }
    assert "more of the posterior" in capsys.readouterr().out


def test_the_speech_example(tmp_path):
    pytest.importorskip("espeakng_loader", reason="the extra 'speech' is not installed")
    from bayeslora.assets.fetch import speech_encoder

    try:
        speech_encoder()
    except InputError as error:
        pytest.skip(f"the speech encoder is not here and cannot be fetched: {error}")
    rows = script("examples/speech").main(str(tmp_path), training=20, testing=10, epochs=1, seeds=(0,))
    assert len(rows) == 4
    assert all(np.isfinite(row["nll"]) for row in rows)
