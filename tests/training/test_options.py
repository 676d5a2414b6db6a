"""Every option of a training and of the method is in one place, and arrives everywhere from there."""

import dataclasses
import inspect
import json
import re

import pytest
from transformers import TrainingArguments

from bayeslora import InputError, MonteCLoRAConfig, fit
from bayeslora.command.checks import configuration
from bayeslora.command.flags import flag_of
from bayeslora.command.parser import build_parser
from bayeslora.options import choices, flags, ranges
from bayeslora.study.experiment import Experiment
from bayeslora.study.spec import Study, cells
from bayeslora.training.budget import RECORDED, TRAINER_NAMES, FitOptions, TrainingBudget
from bayeslora.training.trainer import variational_rate
from tests.conftest import tiny_dataset
from tests.runs import new

FIELDS = {field.name: field for field in dataclasses.fields(FitOptions)}
BUDGET = [field.name for field in dataclasses.fields(TrainingBudget)]
# other values than the defaults, all different
OTHER = {
    "epochs": 2.5,
    "max_steps": 3,
    "batch_size": 4,
    "learning_rate": 2e-3,
    "variational_learning_rate": 7e-3,
    "gradient_accumulation": 5,
    "warmup": 0.25,
    "schedule": "cosine",
    "weight_decay": 0.125,
    "max_grad_norm": 0.75,
    "seed": 11,
    "evaluations": 1,
    "early_stopping": 6,
    "eval_samples": 3,
    "best_metric": "accuracy",
}
FIT = ["fit", "--model", "m", "--task", "t", "--output", "o"]


def test_every_option_has_another_value_here():
    assert OTHER.keys() == FIELDS.keys()
    assert all(OTHER[name] != field.default for name, field in FIELDS.items())


def test_fit_has_every_option_with_its_default():
    parameters = inspect.signature(fit).parameters
    assert {name: parameters[name].default for name in FIELDS} == {name: f.default for name, f in FIELDS.items()}
    assert {name: parameters[name].annotation for name in FIELDS} == {name: f.type for name, f in FIELDS.items()}
    for name in FIELDS:
        assert name in fit.__doc__


def test_the_parser_has_every_option_with_its_default():
    parsed = vars(build_parser().parse_args(FIT))
    assert {name: parsed[name] for name in FIELDS} == {name: field.default for name, field in FIELDS.items()}
    words = [word for name, value in OTHER.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    parsed = vars(build_parser().parse_args([*FIT, *words]))
    assert {name: parsed[name] for name in FIELDS} == OTHER


def test_a_study_has_every_option_of_a_budget(tmp_path):
    grid = {"batch_size": "batch_sizes", "learning_rate": "learning_rates", "seed": "seeds"}
    file = tmp_path / "study.yaml"
    training = {name: OTHER[name] for name in BUDGET if name not in grid}
    axes = {axis: [OTHER[name]] for name, axis in grid.items()}
    file.write_text(json.dumps({"model": "m", "tasks": ["sst2"], "methods": ["lora"], "training": training, **axes}))
    study = Study.from_yaml(file)
    (cell,) = cells(study, ["LoRA"])
    assert dataclasses.asdict(Experiment(study, cell, tmp_path).budget()) == {name: OTHER[name] for name in BUDGET}


def test_a_study_refuses_what_is_out_of_range():
    for name, takes in ranges(TrainingBudget).items():
        if name not in ("batch_size", "learning_rate", "seed"):
            with pytest.raises(InputError, match=re.escape(f"study: {name} takes {takes}, got -1")):
                Study.from_dict({"model": "m", "tasks": ["sst2"], "methods": ["lora"], "training": {name: -1}})


def test_a_run_records_every_option(tmp_path):
    data = tiny_dataset(24)
    fit(new(), data, data[:8], output_dir=tmp_path / "run", progress=False, **OTHER)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["training"]
    assert recorded.keys() == {*RECORDED, "train_examples", "tuning_examples", "processes"}
    for name, value in OTHER.items():
        if name in TRAINER_NAMES:
            assert recorded[TRAINER_NAMES[name]] == value
    assert recorded["variational_learning_rate"] == OTHER["variational_learning_rate"]
    assert recorded["eval_samples"] == OTHER["eval_samples"]
    assert recorded["eval_steps"] == OTHER["max_steps"] // OTHER["evaluations"]
    # all of them but early_stopping, with which a resumed run may go on otherwise
    assert FIELDS.keys() - TRAINER_NAMES == {
        "variational_learning_rate",
        "evaluations",
        "early_stopping",
        "eval_samples",
    }


def test_fit_takes_ten_times_the_rate_for_the_posterior():
    args = TrainingArguments("out", learning_rate=0.5)
    assert variational_rate(args, None) == 5
    assert variational_rate(args, 0.0) == 0


@pytest.mark.parametrize(
    ("budget", "examples", "processes", "steps"),
    [
        ({"epochs": 3, "batch_size": 4}, 10, 1, 9),
        ({"epochs": 0.5, "batch_size": 4}, 10, 1, 2),
        ({"max_steps": 7}, 10, 1, 7),
        ({"epochs": 2, "batch_size": 4, "gradient_accumulation": 2}, 33, 2, 6),
        ({"epochs": 0.01}, 10, 1, 1),
    ],
)
def test_steps_of_a_budget(budget, examples, processes, steps):
    assert TrainingBudget(**budget).total_steps(examples, processes) == steps


METHOD = {
    "r": 3,
    "lora_alpha": 5.0,
    "target_modules": ("query", "value"),
    "lora_dropout": 0.125,
    "modules_to_save": ("pooler",),
    "num_components": 7,
    "sample_scaler": 0.5,
    "noise_units": "relative",
    "kl_weight": 0.25,
    "cooperation": 2.0,
    "normalization": "elbo",
    "mixture": "sparse",
    "noise": "shared",
    "noise_schedule": "cosine",
    "guide": "gaussian",
    "mode": "post_hoc",
}


def test_every_flag_of_the_method_reaches_the_configuration():
    fields = {field.name: field for field in flags(MonteCLoRAConfig)}
    assert METHOD.keys() == fields.keys()
    words = []
    for name, value in METHOD.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{flag_of(fields[name]).replace('_', '-')}", *map(str, values)]
    config = configuration(build_parser().parse_args([*FIT, *words]), "classification")
    assert {name: getattr(config, name) for name in METHOD} == METHOD
    assert configuration(build_parser().parse_args(FIT), "regression") == MonteCLoRAConfig.preset("learned")


def test_choices_are_those_that_the_configuration_takes():
    for name, allowed in choices(MonteCLoRAConfig).items():
        for value in allowed:
            assert getattr(MonteCLoRAConfig(**{name: value}), name) == value
        with pytest.raises(InputError, match=f"{name} must be one of {', '.join(allowed)}; got 'x'"):
            MonteCLoRAConfig(**{name: "x"})
