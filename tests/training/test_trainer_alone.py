"""BayesTrainer used by itself: the trainer that fit() has, without the run folder."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from bayeslora import BayesTrainer, InputError
from bayeslora.data.batches import Collator
from bayeslora.noise_schedules import NoiseScheduleCallback
from bayeslora.storage.run_folder import is_whole
from tests.conftest import tiny_dataset
from tests.runs import (
    _frozen_garbage,  # noqa: F401  (a fixture)
    base,
    equal,
    new,
    run,
    state,
)


def arguments(folder, **options):
    """What fit() asks of transformers in :func:`tests.runs.run`."""
    options = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0.06,
        "seed": 0,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | options
    return TrainingArguments(str(folder), **options)


@pytest.mark.parametrize("schedule", ["constant", "entropy", "learned"])
def test_it_ends_where_fit_ends(tmp_path, schedule):
    """Rate of the posterior, number of examples, collator, noise schedule: forgotten, each would change a number."""
    one, other = (new(normalization="elbo", noise_schedule=schedule) for _ in range(2))
    run(tmp_path / "run", one)
    asked = arguments(tmp_path / "alone", train_sampling_strategy="group_by_length")
    trainer = BayesTrainer(model=other, args=asked, train_dataset=tiny_dataset(24))
    before = state(other)
    trainer.train()
    assert other.num_examples == 24
    assert not equal(before, state(other))
    assert equal(state(one), state(other))


def test_a_stock_trainer_with_the_parameter_groups_ends_there_too(tmp_path):
    """With one rate for all it does not."""
    ended = []
    for trained in ("fit", "groups", "one rate"):
        bayes = new()
        asked = arguments(tmp_path / trained, weight_decay=0.1, optim="adamw_torch", remove_unused_columns=False)
        if trained == "fit":
            BayesTrainer(bayes, asked, train_dataset=tiny_dataset(24)).train()
        else:
            groups = bayes.parameter_groups(1e-2, weight_decay=0.1)
            if trained == "one rate":
                groups = [group | {"lr": 1e-2} for group in groups]
            optimizers = (torch.optim.AdamW(groups, eps=1e-8), None)
            Trainer(bayes, asked, Collator(), tiny_dataset(24), optimizers=optimizers).train()
        ended.append(state(bayes))
    names = [name for name, value in ended[0].items() if value.is_floating_point()]
    assert all(torch.allclose(ended[0][name], ended[1][name], atol=1e-6) for name in names)
    assert not all(torch.allclose(ended[0][name], ended[2][name], atol=1e-4) for name in names)


@pytest.mark.parametrize("mode", ["joint", "post_hoc"])
def test_parameter_groups_hold_all_that_is_trained(mode):
    bayes = new(mode=mode)
    held = [parameter for group in bayes.parameter_groups(1e-3, 5e-3) for parameter in group["params"]]
    trained = [parameter for parameter in bayes.parameters() if parameter.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trained))
    rates = {group["lr"] for group in bayes.parameter_groups(1e-3, 5e-3)}
    assert rates == ({1e-3, 5e-3} if mode == "joint" else {5e-3})


def test_defaults_are_what_fit_has(tmp_path):
    trainer = BayesTrainer(new(), arguments(tmp_path), train_dataset=tiny_dataset(24))
    assert trainer.variational_learning_rate == pytest.approx(0.1)
    assert isinstance(trainer.data_collator, Collator)
    assert sum(isinstance(found, NoiseScheduleCallback) for found in trainer.callback_handler.callbacks) == 1
    given = BayesTrainer(new(), arguments(tmp_path), len, tiny_dataset(24), variational_learning_rate=0.0)
    assert given.variational_learning_rate == 0
    assert given.data_collator is len


def test_the_checkpoints_it_keeps_are_whole(tmp_path):
    """As many as save_total_limit says, in the folder that transformers was given, with the caller's arguments as they
    were."""
    asked = arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=2)
    BayesTrainer(new(), asked, train_dataset=tiny_dataset(24)).train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-5", "checkpoint-6"]
    assert all(is_whole(tmp_path / name) for name in kept)
    assert asked.save_total_limit == 2
    again = new(seed=1)
    trainer = BayesTrainer(again, asked, train_dataset=tiny_dataset(24))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_divergence_names_the_checkpoint(tmp_path):
    bayes = new()
    trainer = BayesTrainer(
        bayes, arguments(tmp_path, save_strategy="steps", save_steps=1), train_dataset=tiny_dataset(24)
    )
    trainer.train()
    assert str(tmp_path / "checkpoint-6") in str(trainer._diverged("the loss became nan", 7))


def test_it_evaluates_several_sets(tmp_path):
    sets = {"near": tiny_dataset(8, seed=1), "far": tiny_dataset(8, rule="flipped", seed=1)}
    trainer = BayesTrainer(new(), arguments(tmp_path), eval_dataset=sets)
    found = trainer.evaluate()
    assert found["eval_near_loss"] != found["eval_far_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"torch_compile": True}, r"bayes.compile\(\)"),
        ({"push_to_hub": True}, "push_to_hub"),
    ],
)
def test_arguments_are_refused_as_by_fit(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        BayesTrainer(new(), arguments(tmp_path, **options), train_dataset=tiny_dataset(24))


def test_other_models_and_bad_data_are_refused(tmp_path):
    with pytest.raises(InputError, match="model is a BertForSequenceClassification"):
        BayesTrainer(base(), arguments(tmp_path), train_dataset=tiny_dataset(24))
    broken = [*tiny_dataset(3), {"input_ids": [1, 999], "attention_mask": [1, 1], "labels": 0}]
    with pytest.raises(InputError, match=r"train_dataset, row 3: token 999"):
        BayesTrainer(new(), arguments(tmp_path), train_dataset=broken)
    with pytest.raises(InputError, match=r"far, row 3: token 999"):
        BayesTrainer(new(), arguments(tmp_path), eval_dataset={"near": tiny_dataset(3), "far": broken})
