"""Networks that read a text and write another one: the likelihood of targets, and texts of coherent draws."""

import numpy as np
import pytest
import torch
import transformers

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.models import TargetLikelihood
from tests.modules import randomize_b

VOCABULARY, END = 40, 1
SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": END, "decoder_start_token_id": 0}


def network(kind="t5"):
    configs = {
        "t5": lambda: transformers.T5Config(
            **SMALL, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0
        ),
        "bart": lambda: transformers.BartConfig(
            **SMALL | {"decoder_start_token_id": 2},
            bos_token_id=2,
            forced_eos_token_id=None,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=32,
            dropout=0.0,
            init_std=0.3,
        ),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForSeq2SeqLM.from_config(configs[kind]()).eval()


def bayes_of(kind="t5", *, likelihood=None, **options):
    config = MonteCLoRAConfig(**{"r": 2, "sample_scaler": 0.3, "target_modules": "all-linear", **options})
    return randomize_b(BayesLoRA(network(kind), config, likelihood=likelihood)).eval()


def pairs(size, seed=0):
    """The target is the source turned around, of three words, and its end."""
    random, rows = np.random.default_rng(seed), []
    for number in range(size):
        source = random.integers(5, 12, 2 + number % 3).tolist()
        row = {"input_ids": [*source, END], "labels": [*source[::-1], *[4] * (number % 2), END]}
        rows.append(row | {"attention_mask": [1] * (len(source) + 1)})
    return rows


def padded(rows):
    filling = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    longest = {name: max(len(row[name]) for row in rows) for name in filling}
    return {n: torch.tensor([row[n] + [f] * (longest[n] - len(row[n])) for row in rows]) for n, f in filling.items()}


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_likelihood_is_transformers_own_loss_times_its_tokens(kind):
    bayes, rows = bayes_of(kind, sample_scaler=0.0), pairs(7)
    assert type(bayes.model.likelihood) is TargetLikelihood
    with torch.no_grad():
        theirs = [float(bayes.network(**padded([row])).loss) * len(row["labels"]) for row in rows]
    found = bayes.predict(rows, num_samples=0, batch_size=3, progress=False)
    np.testing.assert_allclose(-found.text_log_predictive, theirs, rtol=1e-4)
    np.testing.assert_array_equal(found.num_tokens, [len(row["labels"]) for row in rows])
    bayes.train()
    batch = padded(rows)
    torch.testing.assert_close(bayes(**batch).loss, bayes.network(**batch).loss)
    tokens = int(bayes.model.count(batch["labels"]))
    parts = [bayes(**padded(rows[i::2]), num_items_in_batch=tokens).loss for i in range(2)]
    torch.testing.assert_close(sum(parts), bayes.network(**batch).loss)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("where", [None, "decoder"])
def test_a_target_depends_on_nothing_else_in_its_batch(kind, where):
    """Also where what lies before the first adapter, run once for all draws, is a part of the decoder."""
    own = r".*decoder.*(q|v|q_proj|v_proj)" if where else "all-linear"
    bayes, rows = bayes_of(kind, target_modules=own), pairs(7)
    options = {"num_samples": 3, "progress": False}
    found = bayes.predict(rows, batch_size=16, **options)
    assert (found.text_log_likelihood.std(0) > 1e-4).all()
    for index, row in enumerate(rows):
        alone = bayes.predict([row], batch_size=1, **options)
        np.testing.assert_allclose(found.text_log_likelihood[:, index], alone.text_log_likelihood[:, 0], atol=2e-4)
    with bayes.as_draw(1) as drawn, torch.no_grad():
        theirs = -float(drawn(**padded(rows[3:4])).loss) * len(rows[3]["labels"])
    assert found.text_log_likelihood[1, 3] == pytest.approx(theirs, abs=1e-3)


def test_fitted_saved_and_opened_again_it_predicts_the_same_bits(tmp_path):
    bayes, held_out = bayes_of(sample_scaler=0.02), pairs(12, 1)
    before = bayes.predict(held_out, num_samples=2, progress=False).nll
    options = {"epochs": 8, "batch_size": 8, "learning_rate": 2e-2, "progress": False}
    result = fit(bayes, pairs(64), held_out, output_dir=tmp_path / "run", **options)
    found = bayes.predict(held_out, num_samples=3, progress=False)
    assert found.nll < before - 0.2
    mean = bayes.predict(held_out, num_samples=0, progress=False)
    assert result.metrics["eval_loss"] == pytest.approx(mean.nll, rel=1e-4)
    opened = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", network())
    again = opened.predict(held_out, num_samples=3, progress=False)
    np.testing.assert_array_equal(again.text_log_likelihood, found.text_log_likelihood)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_each_draw_writes_what_transformers_writes_with_it(kind):
    bayes, rows = bayes_of(kind), pairs(5)
    prompts = [row["input_ids"] for row in rows]
    found = bayes.generate(prompts, num_samples=2, max_new_tokens=6, progress=False)
    for draw in range(2):
        for index, prompt in enumerate(prompts):
            with bayes.as_draw(draw) as drawn, torch.no_grad():
                whole = drawn.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, num_beams=1)[0]
            theirs = whole[1:].tolist()
            theirs = theirs[: theirs.index(END) + 1] if END in theirs else theirs
            assert found.tokens[index][draw] == theirs
    mixture = bayes.generate(prompts, num_samples=3, mode="mixture", max_new_tokens=4, progress=False)
    assert all(information.min() >= 0 for row in mixture.mutual_information for information in row)


def test_a_text_is_as_probable_as_it_was_when_it_was_written():
    bayes, rows = bayes_of(), pairs(4)
    prompts = [row["input_ids"] for row in rows]
    written = bayes.generate(prompts, num_samples=2, max_new_tokens=5, progress=False)
    for draw in range(2):
        texts = [row | {"labels": tokens[draw]} for row, tokens in zip(rows, written.tokens, strict=True)]
        found = bayes.predict(texts, num_samples=2, progress=False)
        np.testing.assert_allclose(found.text_log_likelihood[draw], written.log_likelihood[:, draw], atol=1e-3)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([-100, 5, END], "before the end"),
        ([VOCABULARY, END], "tokens, 0 to 39"),
        ([-100, -100], "no token of its target"),
        ([[5], [6]], "one list of tokens"),
    ],
)
def test_targets_that_do_not_fit_are_refused_with_their_row(labels, says):
    rows = pairs(3)
    rows[1]["labels"] = labels
    with pytest.raises(InputError, match=f"row 1.*{says}"):
        bayes_of().predict(rows, progress=False)


def test_sources_without_targets_are_refused():
    rows = [{"input_ids": row["input_ids"]} for row in pairs(2)]
    with pytest.raises(InputError, match="give their tokens as labels"):
        bayes_of().predict(rows, progress=False)


def test_whisper_is_scored_by_its_own_loss_and_writes_through_a_draw():
    torch.manual_seed(0)
    small = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.WhisperConfig(
        **SMALL | {"decoder_start_token_id": 2},
        **small,
        bos_token_id=2,
        d_model=16,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=4,
        max_source_positions=8,
        max_target_positions=16,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    listener = transformers.WhisperForConditionalGeneration(config).eval()
    bayes = BayesLoRA(listener, MonteCLoRAConfig(r=2, sample_scaler=0.3, target_modules=("q_proj", "v_proj")))
    bayes = randomize_b(bayes).eval()
    sounds = np.random.default_rng(0).normal(size=(3, 4, 16)).astype(np.float32)
    rows = [{"input_features": sound, "labels": [5, 6, 7, 8][: 2 + i]} for i, sound in enumerate(sounds)]
    found = bayes.predict(rows, num_samples=2, progress=False)
    for draw in range(2):
        with bayes.as_draw(draw) as drawn, torch.no_grad():
            for index, row in enumerate(rows):
                inputs = torch.tensor(row["input_features"])[None]
                loss = float(drawn(input_features=inputs, labels=torch.tensor([row["labels"]])).loss)
                theirs = -loss * len(row["labels"])
                assert found.text_log_likelihood[draw, index] == pytest.approx(theirs, abs=1e-3)
    with pytest.raises(InputError, match="no causal language model"):
        bayes.generate([[5, 6]], progress=False)
