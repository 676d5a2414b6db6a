"""``bayeslora tune``: one width for all noise of a finished run, kept with its adapter."""

import argparse
import json

from bayeslora.command.checks import warn_of_judging
from bayeslora.errors import InputError
from bayeslora.models.tuning import Tuning
from bayeslora.runs import FittedRun, check_is_run, open_run
from bayeslora.storage.lock import lock_folder
from bayeslora.storage.run_folder import ADAPTER_FOLDER


def run(arguments: argparse.Namespace) -> None:
    folder, split = arguments.run_dir, arguments.split
    check_is_run(folder)
    with lock_folder(folder):
        fitted = open_run(folder, model=arguments.model, data_dir=arguments.data_dir)
        _check_split(fitted, split, judges=arguments.agreement is None)
        tuning = fitted.posterior.tune(
            fitted.data(split, limit=arguments.max_examples, labelled=arguments.agreement is None),
            num_samples=arguments.num_samples,
            with_temperature=arguments.with_temperature,
            agreement=arguments.agreement,
            antithetic=arguments.antithetic,
            blocks=arguments.blocks,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            progress=not arguments.json,
        )
        fitted.posterior.save_pretrained(folder / ADAPTER_FOLDER)
    if arguments.json:
        print(json.dumps({"split": split} | tuning.to_dict()))
        return
    say_tuning(tuning, split)
    print(f"kept in {folder / ADAPTER_FOLDER}; next: bayeslora evaluate {folder}")


def _check_split(run: FittedRun, split: str, *, judges: bool) -> None:
    """Refuse what it was fitted to, and what it is to be judged by; ``judges``: its labels are looked at."""
    judged_by = ("test", *run.task.shift_splits, *run.task.out_of_scope_splits)
    judged = "is what it is judged by: tuned on it, its scores would no longer be those of new examples"
    reasons = dict.fromkeys(judged_by, judged) | {"train": "is what it was fitted to, where less noise looks better"}
    if split in reasons:
        raise InputError(f"--split {split} {reasons[split]}; tune on validation, or another labelled split")
    if judges:
        warn_of_judging(run.task, split)


def say_tuning(tuning: Tuning, split: str) -> None:
    """What was found on a split, for people."""
    tempered = tuning.temperature != 1
    if tuning.examples:
        print(f"{'split':24} {split}, {tuning.examples} examples")
    print(f"{'width':24} {tuning.width:.4f}")
    if tuning.blocks is not None or tuning.nll_all_blocks is not None:
        print(f"{'blocks with noise':24} {'all' if tuning.blocks is None else f'the last {tuning.blocks}'}")
    if tuning.agreement is not None:
        print(f"{'agreement':24} {tuning.agreement:.4f}")
    if tuning.nll is None:
        return
    print(f"{'temperature':24} {tuning.temperature:.4f}" if tempered else f"{'temperature':24} none")
    for name, nll in (
        ("nll, tuned", tuning.nll),
        ("nll, as fitted", tuning.nll_untuned),
        ("nll at the mean", tuning.nll_at_mean),
        ("nll, noise everywhere", tuning.nll_all_blocks),
    ):
        if nll is not None:
            print(f"{name:24} {nll:.4f}")
