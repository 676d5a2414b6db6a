"""How long a training lasts that says neither epochs nor steps."""

import pytest

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.tasks.encoding import encode_text
from bayeslora.training.budget import FEWEST_EPOCHS, LEAST_STEPS, TrainingBudget
from bayeslora.training.record import read_record
from tests.conftest import tiny_dataset
from tests.language import tiny_language_model, tiny_tokenizer
from tests.runs import At, interrupt, new, run

QUICK = {"batch_size": 4, "learning_rate": 1e-2}


def began(folder):
    return read_record(folder / "run.json")["training"]


@pytest.mark.parametrize("size", [1, 7, 16, 100, 300, 639, 640, 641, 5000])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
@pytest.mark.parametrize("processes", [1, 3])
def test_steps_enough_and_no_more_than_an_epoch_beyond(size, batch_size, processes):
    budget = TrainingBudget(batch_size=batch_size)
    epochs, steps = budget.settled(size, processes).epochs, budget.total_steps(size, processes)
    an_epoch = budget.steps_per_epoch(size, processes)
    assert steps == epochs * an_epoch
    assert epochs >= FEWEST_EPOCHS
    assert steps >= LEAST_STEPS
    assert epochs == FEWEST_EPOCHS or steps - an_epoch < LEAST_STEPS


def test_what_is_given_wins():
    assert TrainingBudget(epochs=0.5).settled(20).epochs == 0.5
    assert TrainingBudget(max_steps=7).settled(20).epochs == FEWEST_EPOCHS
    assert TrainingBudget(max_steps=7).total_steps(20) == 7
    assert TrainingBudget().settled(20, few_passes=True).epochs == FEWEST_EPOCHS


def test_is_told_recorded_and_kept(tmp_path, capsys, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        fit(new(), tiny_dataset(24), output_dir=tmp_path, callbacks=[At(14, interrupt)], **QUICK)
    assert "20 epochs = 120 steps (the default for 24 examples)" in capsys.readouterr().err
    assert began(tmp_path)["num_train_epochs"] == 20
    monkeypatch.setattr("bayeslora.training.budget.LEAST_STEPS", 6)  # as if another version went on with it
    assert fit(new(), tiny_dataset(24), output_dir=tmp_path, resume=True, progress=False, **QUICK).steps == 120


@pytest.mark.parametrize("given", [{"epochs": 2}, {"max_steps": 12}])
def test_nothing_is_told_of_what_was_given(given, tmp_path, capsys):
    assert fit(new(), tiny_dataset(24), output_dir=tmp_path, **QUICK, **given).steps == 12
    assert "the default for" not in capsys.readouterr().err


def test_a_run_of_three_epochs_goes_on_for_three(tmp_path):
    """As earlier versions began all."""
    options = {"epochs": 3.0}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, callbacks=[At(14, interrupt)], **options)
    assert run(tmp_path, resume=True, **{**options, "epochs": None}).steps == 18


def test_a_run_of_so_many_steps_is_not_taken_for_one_of_epochs(tmp_path):
    run(tmp_path, epochs=None, max_steps=2)
    with pytest.raises(InputError, match="began with max_steps=2, not"):
        run(tmp_path, resume=True, epochs=None)


def test_texts_are_read_three_times(tmp_path):
    texts = [encode_text(tiny_tokenizer(), "where is the cat?", " to the north") for _ in range(8)]
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=2))
    assert fit(bayes, texts, output_dir=tmp_path, batch_size=4, progress=False).steps == 6


def test_nothing_is_told_before_a_refusal(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        fit(new(), tiny_dataset(24), output_dir=tmp_path / "run", **QUICK)
    assert "the default for" not in capsys.readouterr().err
