"""What a network says of an example does not depend on what else is in its batch."""

import functools

import numpy as np
import pytest
import torch

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.data.checks import read_examples
from bayeslora.models import ChoiceLikelihood, NextTokenLikelihood
from tests.architectures import ARCHITECTURES, ENCODER, EOS, PAD, VOCABULARY, Architecture
from tests.language import questions, tiny_language_model
from tests.modules import randomize_b

DRAWS = 2
ADAPTED = [name for name, kind in ARCHITECTURES.items() if kind.refused is None]
TEXTS = [name for name in ADAPTED if ARCHITECTURES[name].inputs == "text"]
WITHOUT_A_TOKEN = {"roberta", "longformer", "t5", "bart"}  # cannot even be run without a padding token
LAST_TOKEN = ["gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "opt", "falcon"]
OPTIONS = {"distilbert": {"target_modules": ("q_lin", "v_lin")}}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
FURTHER = {
    "fnet": Architecture("FNetConfig", {**ENCODER, "max_position_embeddings": 40}),  # takes no mask
    "convbert": Architecture(
        "ConvBertConfig", {**ENCODER, "embedding_size": 16, "max_position_embeddings": 40, "conv_kernel_size": 3}
    ),
    "bloom": Architecture(
        "BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": PAD}
    ),
    "funnel": Architecture(
        "FunnelConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
            "block_sizes": [1, 1],
            "num_decoder_layers": 1,
            "pad_token_id": PAD,
        },
    ),
}


@functools.cache
def data_of(name, masked=True):
    kind = ARCHITECTURES.get(name) or FURTHER[name]
    rows = kind.examples(7)
    return rows if masked else [{k: v for k, v in row.items() if k != "attention_mask"} for row in rows]


def adapted(name, *, pad_token_id=PAD, **changes):
    """An adapted network with weights so large that one position more or less matters."""
    kind = ARCHITECTURES.get(name) or FURTHER[name]
    if kind.inputs == "text" and "pad_token_id" not in changes:
        changes["pad_token_id"] = pad_token_id
    network = kind.network(**changes)
    scale, generator = 0.3 if kind.inputs == "text" else 0.15, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    options = {"r": 2, "sample_scaler": 0.3, **OPTIONS.get(name, {})}
    return randomize_b(BayesLoRA(network, MonteCLoRAConfig(**options)))


def alone(bayes, data):
    """Probabilities of every draw, (S, n, C), each example by itself and without our collator."""
    bayes.eval()
    found = []
    for index in range(DRAWS):
        with bayes.as_draw(index) as network, torch.no_grad():
            rows = [{k: torch.as_tensor(v)[None] for k, v in row.items() if k != "labels"} for row in data]
            found.append(torch.cat([network(**row).logits for row in rows]).double().softmax(-1))
    return torch.stack(found).numpy()


def check(bayes, data, expected=None):
    """In batches of three, and all together in the opposite order."""
    expected = alone(bayes, data) if expected is None else expected
    assert np.ptp(expected, axis=1).max() > 0.01, "examples do not differ, so nothing is tested"
    for size, order in ((3, 1), (32, -1)):
        found = bayes.predict(data[::order], num_samples=DRAWS, batch_size=size, progress=False).sample_probs
        np.testing.assert_allclose(found[:, ::order], expected, atol=1e-5)


@pytest.mark.parametrize("name", ADAPTED)
def test_with_and_without_a_mask(name):
    bayes = adapted(name)
    for masked in (True, False):
        check(bayes, data_of(name, masked))


@pytest.mark.parametrize("name", TEXTS)
def test_without_a_padding_token(name):
    bayes = adapted(name, pad_token_id=None)
    if name in WITHOUT_A_TOKEN:
        with pytest.raises(InputError, match=r"row \d+: .*no pad_token_id\) cannot read it"):
            bayes.predict(data_of(name))
        return
    for masked in (True, False):
        check(bayes, data_of(name, masked))


KINDS = [
    "bert",
    "roberta",
    "mpnet",
    "deberta_v2",
    "xlnet",
    "longformer",
    "t5",
    "bart",
    "gpt2",
    "gpt_neox",
    "llama",
    "opt",
    "falcon",
]
CHANGED = [*((name, VOCABULARY) for name in KINDS), ("llama", -1), ("gpt2", -1), ("roberta", None)]


@pytest.mark.parametrize(("name", "token"), CHANGED)
def test_padding_token_changed_afterwards(name, token):
    """To one that a tokenizer has and the network has not, or to none."""
    bayes = adapted(name)
    expected = alone(bayes, data_of(name))
    bayes.config.pad_token_id = token
    if name == "longformer":  # pads by itself, with that token
        with pytest.raises(InputError, match=r"row \d+: LongformerForSequenceClassification cannot read it"):
            bayes.predict(data_of(name))
        return
    check(bayes, data_of(name), expected)


@pytest.mark.parametrize("name", LAST_TOKEN)
def test_the_end_of_a_text_is_its_padding(name):
    """Then the token before the end is read, in every batch."""
    check(adapted(name, pad_token_id=EOS), data_of(name))


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, {}) for name in FURTHER), ("falcon", {"alibi": True}), ("wav2vec2", LAYER_NORM)]
)
def test_networks_that_pool_mix_or_normalise(name, changes):
    check(adapted(name, **changes), data_of(name, masked=name != "fnet"))


@pytest.mark.parametrize(
    ("name", "expected"), [("bert", "right"), ("xlnet", "left"), ("wav2vec2", "none"), ("fnet", "none")]
)
def test_padding_only_where_it_changes_nothing(name, expected):
    assert read_examples(adapted(name).model, data_of(name, masked=False)).collate.padding == expected
    assert read_examples(adapted(name).model, data_of(name, masked=False)[:1]).collate.padding == "right"


def test_found_anew_for_longer_texts():
    """FNet's answer to texts of one length says nothing of others."""
    bayes, data = adapted("fnet"), data_of("fnet", masked=False)
    same = [row for row in data if len(row["input_ids"]) == len(data[0]["input_ids"])]
    assert read_examples(bayes.model, same).collate.padding == "right"
    assert read_examples(bayes.model, data).collate.padding == "none"


class TestLanguageModels:
    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("token", [0, None, 96])
    def test_texts(self, kind, token):
        network = tiny_language_model(kind)
        network.config.pad_token_id = token
        bayes = randomize_b(BayesLoRA(network, MonteCLoRAConfig(r=2), likelihood=NextTokenLikelihood()))
        texts = [{"input_ids": list(range(3, 6 + n)), "labels": list(range(3, 6 + n))} for n in (1, 7, 3)]
        whole = bayes.predict(texts, num_samples=2, progress=False).text_log_likelihood
        for index, text in enumerate(texts):
            single = bayes.predict([text], num_samples=2, progress=False).text_log_likelihood
            np.testing.assert_allclose(whole[:, [index]], single, rtol=1e-5)

    def test_choices_without_a_mask(self):
        likelihood = ChoiceLikelihood("ABCD")
        bayes = randomize_b(BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=2), likelihood=likelihood))
        data = questions()
        bare = [{k: v for k, v in row.items() if k != "attention_mask"} for row in data]
        expected = bayes.predict(data, num_samples=2, progress=False).sample_probs
        np.testing.assert_allclose(bayes.predict(bare, num_samples=2).sample_probs, expected, atol=1e-6)


class TestTraining:
    """A batch of examples has the mean of the losses that they have alone."""

    @pytest.mark.parametrize("name", ["bert", "llama", "xlnet", "t5"])
    def test_evaluation_while_training(self, name, tmp_path):
        bayes, data = adapted(name), data_of(name, masked=False)
        result = fit(
            bayes, data, data, output_dir=tmp_path, max_steps=1, batch_size=4, learning_rate=1e-12, progress=False
        )
        probs = np.concatenate([bayes.predict([row], num_samples=0).probs for row in data])
        labels = [row["labels"] for row in data]
        expected = -np.log(probs[np.arange(len(data)), labels]).mean()
        assert result.metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize(
        ("name", "token", "message"),
        [
            ("llama", None, "set network.config.pad_token_id"),
            ("gpt2", VOCABULARY, "its padding token 64 is outside its 64 tokens.*resize_token_embeddings"),
            ("fnet", PAD, "pad all examples to one length"),
            ("wav2vec2", PAD, "pad all examples to one length"),
        ],
    )
    def test_refused_where_examples_cannot_share_a_batch(self, name, token, message, tmp_path):
        bayes, data = adapted(name), data_of(name, masked=False)
        bayes.config.pad_token_id = token
        with pytest.raises(InputError, match=f"says of an example depends on .* batch is padded: {message}"):
            fit(bayes, data, output_dir=tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()
        fit(bayes, data, data, output_dir=tmp_path / "run", batch_size=1, max_steps=1, progress=False)

    def test_of_one_length_they_can(self, tmp_path):
        bayes, data = adapted("fnet"), data_of("fnet", masked=False)
        same = [row | {"input_ids": row["input_ids"][:5]} for row in data]
        fit(bayes, same, output_dir=tmp_path / "run", max_steps=1, progress=False)
