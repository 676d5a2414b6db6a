"""Examples with several labels: each counts once, whatever is padded, batched or left out around it."""

import numpy as np
import pytest
import torch
import transformers
from scipy.special import logit
from sklearn.metrics import average_precision_score, f1_score, log_loss

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, diagnose, fit
from bayeslora.analysis import best_thresholds, mean_average_precision
from bayeslora.models import MultiLabelLikelihood, TokenLikelihood, Tuning
from bayeslora.models.selection import described_likelihood
from tests.conftest import tiny_network

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
KINDS = ("bert", "roberta", "gpt2", "llama")


def network(kind="bert", seed=0):
    config = tiny_network(kind, layers=1, initializer_range=0.3, num_labels=len(TAGS)).config
    config.id2label = dict(enumerate(TAGS))
    torch.manual_seed(seed)
    return transformers.AutoModelForTokenClassification.from_config(config).eval()


def tagger(kind="bert", *, seed=0, likelihood=None, **options):
    config = MonteCLoRAConfig(**{"r": 2, "sample_scaler": 0.3, "target_modules": "all-linear", **options})
    bayes = BayesLoRA(network(kind, seed), config, likelihood=likelihood)
    with torch.no_grad():  # at zero, as PEFT starts it, no draw of A changes anything
        for name, parameter in bayes.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return bayes


def without_dropout(bayes):
    for module in bayes.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return bayes.train()


def sentences(size, seed=0, *, known=True):
    """A special token, words of one piece or two, and a special token; a word's class follows from its piece."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(size):
        tokens, labels = [1], [-100]
        for _ in range(2 + number % 4):
            piece = int(random.integers(5, 20))
            tokens, labels = [*tokens, piece], [*labels, piece % len(TAGS) if known else -1]
            if piece % 3 == 0:
                tokens, labels = [*tokens, 4], [*labels, -100]
        rows.append({"input_ids": [*tokens, 2], "labels": [*labels, -100]})
        rows[-1]["attention_mask"] = [1] * len(rows[-1]["labels"])
    return rows


def padded(rows, *, extra=0):
    """A batch as a collator of transformers makes it."""
    length = max(len(row["labels"]) for row in rows) + extra
    filling = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {n: torch.tensor([row[n] + [f] * (length - len(row[n])) for row in rows]) for n, f in filling.items()}


def words_of(rows):
    return sum(label != -100 for row in rows for label in row["labels"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_of_all_words_is_transformers_own_loss_times_their_number(kind):
    bayes, rows = tagger(kind, sample_scaler=0.0), sentences(9)
    with torch.no_grad():
        theirs = [float(bayes.network(**padded([row])).loss) * words_of([row]) for row in rows]
    found = bayes.predict(rows, num_samples=0, batch_size=4, progress=False)
    assert len(found.probs) == words_of(rows)
    np.testing.assert_allclose(-found.log_predictive.sum(), sum(theirs), rtol=1e-5)
    by_row = [float(-of.sum()) for of in found.by_example(found.log_predictive)]
    np.testing.assert_allclose(by_row, theirs, rtol=1e-4)


@pytest.mark.parametrize("extra", [0, 5])
def test_the_objective_without_noise_is_transformers_own_loss(extra):
    bayes, batch = without_dropout(tagger(sample_scaler=0.0)), padded(sentences(6), extra=extra)
    theirs = bayes.network(**batch).loss
    torch.testing.assert_close(bayes(**batch).loss, theirs)
    trained = [parameter for parameter in bayes.network.parameters() if parameter.requires_grad]
    ours, expected = (torch.autograd.grad(loss, trained) for loss in (bayes(**batch).loss, theirs))
    for mine, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_word_counts_alike_in_every_batch_of_a_step():
    bayes, rows = without_dropout(tagger(sample_scaler=0.0)), sentences(8)
    whole = bayes(**padded(rows), num_items_in_batch=words_of(rows)).loss
    parts = [bayes(**padded(rows[i::3]), num_items_in_batch=words_of(rows)).loss for i in range(3)]
    torch.testing.assert_close(sum(parts), whole)
    assert int(bayes.model.count(padded(rows)["labels"])) == words_of(rows)


def test_the_sum_is_the_density_of_a_sentence():
    outputs, labels = torch.randn(2, 3, 4), torch.tensor([[-100, 1, 0], [2, -100, -100]])
    of = {reduction: tagger(likelihood=TokenLikelihood(reduction)) for reduction in ("sum", "mean")}
    summed = of["sum"].negative_log_likelihood(outputs, labels)
    log_probs = outputs.log_softmax(-1)
    torch.testing.assert_close(summed, -torch.stack([log_probs[0, 1, 1] + log_probs[0, 2, 0], log_probs[1, 0, 2]]))
    torch.testing.assert_close(of["mean"].negative_log_likelihood(outputs, labels), summed / 1.5)
    again = described_likelihood(of["sum"].model.likelihood.describe())
    assert again.reduction == "sum"
    with pytest.raises(InputError, match="reduction"):
        TokenLikelihood("median")


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_depends_on_nothing_else_in_its_batch(kind):
    bayes, rows = tagger(kind), sentences(11)
    found = bayes.predict(rows, num_samples=3, batch_size=5, progress=False)
    other = bayes.predict(rows, num_samples=3, batch_size=1, progress=False)
    np.testing.assert_allclose(found.sample_probs, other.sample_probs, atol=1e-5)
    turned = bayes.predict(rows[::-1], num_samples=3, batch_size=4, progress=False)
    for row in range(len(rows)):
        mirrored = turned.rows == len(rows) - 1 - row
        np.testing.assert_allclose(found.probs[found.rows == row], turned.probs[mirrored], atol=1e-5)
        np.testing.assert_array_equal(found.labels[found.rows == row], turned.labels[mirrored])


def test_draws_reach_the_network_and_unknown_labels_change_nothing():
    bayes, rows = tagger(), sentences(5)
    found = bayes.predict(rows, num_samples=3, progress=False)
    assert (found.sample_probs.std(0).max(1) > 1e-4).all()
    unknown = bayes.predict(sentences(5, known=False), num_samples=3, progress=False)
    assert unknown.labels is None
    assert unknown.nll is None
    assert unknown.entity_counts is None
    np.testing.assert_array_equal(unknown.probs, found.probs)


def test_fitted_saved_and_opened_again_it_predicts_the_same_bits(tmp_path):
    bayes, held_out = tagger(sample_scaler=0.02), sentences(20, 1)
    before = bayes.predict(held_out, num_samples=2, progress=False).nll
    options = {"epochs": 25, "batch_size": 8, "learning_rate": 2e-2, "progress": False}
    result = fit(bayes, sentences(96), held_out, output_dir=tmp_path / "run", **options)
    found = bayes.predict(held_out, num_samples=4, progress=False)
    assert found.nll < before - 0.3
    assert result.metrics["eval_predictive_accuracy"] > 0.5
    mean = bayes.predict(held_out, num_samples=0, progress=False)
    assert result.metrics["eval_loss"] == pytest.approx(mean.nll, rel=1e-5)

    opened = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", network())
    assert type(opened.model.likelihood) is TokenLikelihood
    again = opened.predict(held_out, num_samples=4, progress=False)
    assert again.label_names == TAGS
    np.testing.assert_array_equal(again.sample_probs, found.sample_probs)
    assert again.entities == found.entities


def test_every_schedule_of_the_noise_can_follow_words(tmp_path):
    for schedule in ("entropy", "learned"):
        bayes = tagger(noise_schedule=schedule)
        fit(bayes, sentences(16), output_dir=tmp_path / schedule, max_steps=3, batch_size=8, progress=False)
        assert bayes.noise_schedule.get().isfinite().all()
        assert np.isfinite(bayes.predict(sentences(3), num_samples=2, progress=False).probs).all()


def test_it_is_tuned_and_diagnosed():
    bayes, other, rows = tagger(), tagger(seed=1), sentences(24)
    tuned = bayes.tune(rows, num_samples=2, with_temperature=True, progress=False)
    found = bayes.predict(rows, num_samples=2, progress=False)
    assert found.nll == pytest.approx(tuned.nll, rel=1e-6)
    assert tuned.conformal is None  # the words of a sentence are not exchangeable with those of another
    answers = {answer.name for answer in diagnose(bayes, rows, restarts=[other], num_samples=25, steps=2)}
    assert {"restart_r_hat", "data_drivenness", "amortization_gap"} <= answers


def test_labels_are_permuted_among_words_and_drawn_where_there_are_words():
    likelihood, labels = TokenLikelihood(), padded(sentences(12))["labels"]
    scored = labels != -100
    permuted = likelihood.permute(labels, torch.Generator().manual_seed(0))
    assert (permuted[~scored] == -100).all()
    assert torch.equal(permuted[scored].sort().values, labels[scored].sort().values)
    assert not torch.equal(permuted, labels)
    certain = torch.full((*labels.shape, 5), float("nan"))
    certain[scored] = 100.0 * torch.nn.functional.one_hot(torch.tensor(3), 5)
    drawn = likelihood.simulate(certain, labels, torch.Generator().manual_seed(0))
    assert (drawn[scored] == 3).all()
    assert (drawn[~scored] == -100).all()


class TestEntities:
    def test_an_entity_is_as_probable_as_all_its_tags_at_once(self):
        bayes = tagger()
        found = bayes.predict(sentences(12), num_samples=5, progress=False)
        assert found.entities
        for entity in found.entities:
            of = np.flatnonzero(found.rows == entity.row)[entity.first : entity.last + 1]
            best = found.probs[of].argmax(1)
            joint = found.sample_probs[:, of, best].prod(1).mean()
            assert entity.probability == pytest.approx(joint, rel=1e-9)
            assert entity.entropy == found.entropy[of].max()
            assert entity.mutual_information == found.mutual_information[of].max()
        light = bayes.predict(sentences(12), num_samples=5, keep_draws=False, progress=False)
        assert light.entities == found.entities

    def test_rows_tables_and_scores(self):
        rows = sentences(7)
        found = tagger().predict(rows, num_samples=2, progress=False)
        assert len(found) == 7
        assert found.numbers.tolist() == [number for row in rows for number in range(words_of([row]))]
        table = found.to_pandas()
        assert len(table) == words_of(rows)
        assert table.loc[0, "truth"] == TAGS[rows[0]["labels"][1]]
        texts = [[f"w{i}" for i in range(words_of([row]))] for row in rows]
        named = found.of_texts(texts)
        assert [word["word"] for word in named.row(3)["words"]] == texts[3]
        assert {entity["text"].split()[0] for entity in named.row(0)["entities"]} <= set(texts[0])
        assert found.shown(texts)[0].startswith("[w0] w1")
        scores = found.scores(None)
        assert scores["words"] == words_of(rows)
        assert {"entity_f1", "nll", "ece"} <= scores.keys()
        with pytest.raises(InputError, match="other words"):
            found.of_texts(texts[1:])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda row: row["labels"].pop(), "one is needed for each piece"),
        (lambda row: row["labels"].__setitem__(1, 5), "label 5 is outside the network's classes 0..4"),
        (lambda row: row["labels"].__setitem__(1, -1), "label -1 is outside|its labels are -1"),
        (lambda row: row["labels"].__setitem__(slice(None), [-100] * len(row["labels"])), "no label"),
        (lambda row: row.pop("labels"), "label"),
    ],
)
def test_labels_that_do_not_fit_are_refused_with_their_row(change, says):
    rows = sentences(5)
    change(rows[3])
    with pytest.raises(InputError, match=rf"row 3.*({says})"):
        tagger().predict(rows, progress=False)


def test_words_that_are_not_known_are_refused(tmp_path):
    bayes, rows = tagger(), sentences(3)
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    with pytest.raises(InputError, match="which pieces begin a word is not known"):
        bayes.predict(bare, progress=False)
    with pytest.raises(InputError, match="unlabelled split"):
        fit(bayes, sentences(3, known=False), output_dir=tmp_path / "run", progress=False)


def multi_label_network():
    config = tiny_network(layers=1, initializer_range=0.3, num_labels=3).config
    config.problem_type = "multi_label_classification"
    config.id2label = dict(enumerate(("red", "green", "blue")))
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def multi_label(**options):
    return BayesLoRA(multi_label_network(), MonteCLoRAConfig(**{"r": 2, "sample_scaler": 0.3, **options}))


def coloured(size, seed=0):
    """A label applies where its piece is among the text's."""
    random, rows = np.random.default_rng(seed), []
    for number in range(size):
        tokens = random.choice([5, 6, 7, 8, 9, 10], 3 + number % 3).tolist()
        applies = [float(piece in tokens) for piece in (5, 6, 7)]
        rows.append({"input_ids": [1, *tokens], "attention_mask": [1] * (len(tokens) + 1), "labels": applies})
    return rows


def together(rows):
    batch = padded([{**row, "labels": [0] * len(row["input_ids"])} for row in rows])
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


class TestMultiLabel:
    def test_the_likelihood_is_transformers_own_loss(self):
        bayes, rows = without_dropout(multi_label(sample_scaler=0.0)), coloured(7)
        assert type(bayes.model.likelihood) is MultiLabelLikelihood
        theirs = bayes.network(**together(rows)).loss
        torch.testing.assert_close(bayes(**together(rows)).loss, theirs)
        found = bayes.predict(rows, num_samples=0, batch_size=3, progress=False)
        assert found.nll == pytest.approx(theirs.item(), rel=1e-5)
        logits = bayes.network(**together(rows)).logits.detach()
        np.testing.assert_allclose(found.label_probs, logits.sigmoid().numpy(), atol=1e-6)
        np.testing.assert_array_equal(found.label_truth, [row["labels"] for row in rows])

    def test_fitted_saved_and_opened_again_it_predicts_the_same_bits(self, tmp_path):
        bayes, held_out = multi_label(sample_scaler=0.05), coloured(24, 1)
        options = {"epochs": 12, "batch_size": 8, "learning_rate": 2e-2, "progress": False}
        result = fit(bayes, coloured(96), held_out, output_dir=tmp_path / "run", **options)
        found = bayes.predict(held_out, num_samples=4, progress=False)
        assert result.metrics["eval_predictive_accuracy"] > 0.7
        assert (found.sample_probs.std(0).max(1) > 1e-5).all()
        scores = found.scores(None)
        truth, said = found.label_truth, found.label_probs >= 0.5
        assert scores["f1_micro"] == pytest.approx(f1_score(truth, said, average="micro"))
        assert scores["f1_macro"] == pytest.approx(f1_score(truth, said, average="macro"))
        assert scores["map"] == pytest.approx(average_precision_score(truth, found.label_probs, average="macro"))
        assert scores["nll"] == pytest.approx(log_loss(truth.ravel(), found.label_probs.ravel()))
        opened = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", multi_label_network())
        again = opened.predict(held_out, num_samples=4, progress=False)
        assert again.of == ("red", "green", "blue")
        np.testing.assert_array_equal(again.sample_probs, found.sample_probs)

    def test_rows_labels_and_thresholds(self):
        rows = coloured(6)
        found = multi_label().predict(rows, num_samples=2, progress=False)
        row = found.row(2)
        assert row["labels"] == found.applying()[2]
        assert row["probs"] == pytest.approx(dict(zip(found.of, found.label_probs[2], strict=True)), abs=1e-6)
        assert found.applying(0.0)[0] == ["red", "green", "blue"]
        assert found.applying([0.0, 1.1, 0.0])[0] == ["red", "blue"]
        table = found.to_pandas()
        assert len(table) == 18
        assert table.loc[4, ["row", "of"]].tolist() == [1, "green"]
        by_label = found.by_label()
        assert by_label.index.tolist() == ["red", "green", "blue"]
        assert by_label.loc["blue", "examples"] == found.label_truth[:, 2].sum()
        assert by_label["nll"].mean() == pytest.approx(found.nll)
        assert found.shown([f"text {i}" for i in range(6)])[4] == "green? text 1"

    def test_what_is_not_known_of_a_label_is_left_out_and_nothing_else(self):
        bayes, rows = multi_label(), coloured(5)
        known = bayes.predict(rows, num_samples=2, progress=False)
        rows[2]["labels"][1] = -100.0
        found = bayes.predict(rows, num_samples=2, progress=False)
        assert len(found.probs) == 14
        assert np.isnan(found.label_probs[2, 1])
        np.testing.assert_array_equal(found.probs, np.delete(known.probs, 7, axis=0))
        bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        unlabelled = bayes.predict(bare, num_samples=2, progress=False)
        assert unlabelled.labels is None
        np.testing.assert_array_equal(unlabelled.probs, known.probs)

    @pytest.mark.parametrize(
        ("labels", "says"),
        [([1.0, 0.0], "a 0 or a 1 for each of 3 labels"), ([1.0, 0.0, 2.0], "label 2"), ([0.5, 0.0, 1.0], "whole")],
    )
    def test_labels_that_do_not_fit_are_refused(self, labels, says):
        rows = coloured(4)
        rows[1]["labels"] = labels
        with pytest.raises(InputError, match=f"row 1.*{says}"):
            multi_label().predict(rows, progress=False)

    def test_a_temperature_is_of_the_sigmoids(self):
        bayes, rows = multi_label(), coloured(24)
        logits = bayes.predict(rows, num_samples=0, progress=False)
        bayes.tuning = Tuning(temperature=2.0)
        cooled = bayes.predict(rows, num_samples=0, progress=False)
        np.testing.assert_allclose(logit(cooled.label_probs), logit(logits.label_probs) / 2, atol=1e-5)
        answers = {answer.name for answer in diagnose(bayes, rows, num_samples=25, steps=2)}
        assert "data_drivenness" in answers

    @pytest.mark.parametrize("seed", range(5))
    def test_the_best_threshold_has_the_best_f1_of_all(self, seed):
        random = np.random.default_rng(seed)
        probs, labels = random.random((30, 2)).round(1), random.integers(0, 2, (30, 2))
        labels[:, 1] = 0
        best = best_thresholds(probs, labels)
        tried = [f1_score(labels[:, 0], probs[:, 0] >= threshold) for threshold in np.linspace(0, 1, 201)]
        assert f1_score(labels[:, 0], probs[:, 0] >= best[0]) == pytest.approx(max(tried))
        assert best[1] == 0.5
        assert mean_average_precision(probs, labels) == average_precision_score(labels[:, 0], probs[:, 0])
