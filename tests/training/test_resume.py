"""A run interrupted at any moment and resumed is the run that was never interrupted, to the last bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from bayeslora import InputError
from bayeslora.errors import StorageError
from bayeslora.storage.lock import lock_folder
from tests.conftest import tiny_dataset
from tests.folders import FullAfter
from tests.runs import (
    At,
    _frozen_garbage,  # noqa: F401  (a fixture)
    equal,
    flipped,
    interrupt,
    new,
    run,
)

STOPS_EARLY = {"epochs": 4, "evaluations": 12, "learning_rate": 2e-2, "warmup": 0.0, "early_stopping": 3}
TIMES = ("runtime", "per_second", "train_loss")  # of the process, not of the run


def history(result):
    return [
        {name: value for name, value in entry.items() if not any(word in name for word in TIMES)}
        for entry in result.history
    ]


def metrics(result):
    return {name: value for name, value in result.metrics.items() if not any(word in name for word in TIMES)}


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Steps(TrainerCallback):
    count = 0

    def on_step_begin(self, *_, **__):
        self.count += 1


class AtEnd(TrainerCallback):
    def __init__(self, action):
        self.action = action

    def on_train_end(self, *_, **__):
        self.action()


def resumed(folder, seed=5, **options):
    """The module (initialised otherwise), the result, and how many steps it took."""
    bayes, steps = new(seed), Steps()
    result = run(folder, bayes, resume=True, callbacks=[steps], **options)
    return bayes, result, steps.count


class TestKilled:
    """SIGKILL in real processes; see tests/workers/kill_at.py for the moments."""

    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
    def test_at_any_moment(self, tmp_path):
        chance = random.Random(0)
        touches = sorted(chance.sample(range(2, 120), 3))  # a run touches its folder some 125 times
        moments = [1, *touches, chance.uniform(0.2, 1.0)]
        root = Path(__file__).parents[2]
        child = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                str(root / "tests" / "workers" / "kill_at.py"),
                str(tmp_path),
                json.dumps(moments),
            ],
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert child.returncode == 0, child.stderr
        reports = [json.loads(line) for line in child.stdout.splitlines()]
        assert [report["moment"] for report in reports] == moments
        assert sum(report["status"] == signal.SIGKILL for report in reports) >= 3
        assert len({len(report["left"]) for report in reports}) >= 3
        expected = self.outcome(tmp_path / "whole")
        *looks, stopped = [entry["step"] for entry in expected["history"] if "eval_loss" in entry]
        assert looks == list(range(2, stopped, 2))
        assert stopped < 12  # early
        for report in reports:
            assert report["again"] == 0, child.stderr
            assert self.outcome(tmp_path / str(report["moment"])) == expected, report

    @staticmethod
    def outcome(folder):
        """All that a run leaves, but for the times it took."""
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        for entry in [*record["history"], record["metrics"]]:
            for name in [name for name in entry if any(word in name for word in TIMES)]:
                del entry[name]
        tensors = ("adapter_model.safetensors", "posterior.safetensors")
        checkpoints = sorted((folder / "checkpoints").iterdir())
        record["weights"] = [
            (path / name).read_bytes() for path in (folder / "adapter", *checkpoints) for name in tensors
        ]
        record["names"] = sorted(path.name for path in (*folder.iterdir(), *checkpoints))
        return record


class TestEnded:
    """Interrupted when no step was left to take."""

    @pytest.mark.parametrize(
        ("options", "stop"),
        [
            ({"evaluate": flipped(tiny_dataset(24)), **STOPS_EARLY}, "early"),
            ({"max_steps": 8, "epochs": 3, "evaluate": tiny_dataset(8, seed=1), "evaluations": 4}, 8),
            ({"max_steps": 8, "save_steps": 3}, 8),
            ({"epochs": 2}, 12),
        ],
        ids=["early stopping", "in the second epoch", "without evaluation", "at an epoch's end"],
    )
    def test_before_the_adapter_was_written(self, options, stop, tmp_path):
        whole = new()
        expected = run(tmp_path / "whole", whole, **options)
        assert expected.steps < 24 if stop == "early" else expected.steps == stop
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", callbacks=[AtEnd(lambda: interrupt())], **options)
        assert not (tmp_path / "run" / "adapter").exists()
        bayes, result, steps = resumed(tmp_path / "run", **options)
        assert steps == 0
        assert equal(bayes.state_dict(), whole.state_dict())
        assert (metrics(result), history(result), result.steps) == (
            metrics(expected),
            history(expected),
            expected.steps,
        )

    def test_before_the_record_was_written(self, tmp_path):
        whole = new()
        run(tmp_path, whole)
        (tmp_path / ".adapter-left" / "old").mkdir(parents=True)
        last = tmp_path / "checkpoints" / "checkpoint-6"
        for step in (1, 2, 3):  # killed before it deleted the older ones
            shutil.copytree(last, last.with_name(f"checkpoint-{step}"))
        record = json.loads((tmp_path / "run.json").read_text())
        (tmp_path / "run.json").write_text(json.dumps(record | {"finished": False}))
        bayes, _, steps = resumed(tmp_path)
        assert steps == 0
        assert equal(bayes.state_dict(), whole.state_dict())
        assert json.loads((tmp_path / "run.json").read_text())["finished"]
        assert not (tmp_path / ".adapter-left").exists()
        assert {path.name for path in last.parent.iterdir()} == {"checkpoint-3", "checkpoint-6"}

    def test_finished(self, tmp_path):
        """Its result is loaded; nothing is written."""
        whole, options = new(), {"evaluate": tiny_dataset(8, seed=1)}
        expected = run(tmp_path, whole, **options)
        before = files(tmp_path)
        bayes, result, steps = resumed(tmp_path, **options)
        assert steps == 0
        assert equal(bayes.state_dict(), whole.state_dict())
        assert (bayes.training, bayes.num_examples) == (False, 24)
        assert result == expected
        assert files(tmp_path) == before

    def test_finished_but_damaged(self, tmp_path, caplog):
        whole = new()
        run(tmp_path, whole)
        (tmp_path / "adapter" / "posterior.safetensors").write_bytes(b"")
        bayes, _, steps = resumed(tmp_path)
        assert steps == 0
        assert "finishing the run again from its last checkpoint" in caplog.text
        assert equal(bayes.state_dict(), whole.state_dict())
        assert (tmp_path / "adapter" / "posterior.safetensors").stat().st_size > 0


class TestState:
    def test_averages_in_the_log(self, tmp_path):
        """A checkpoint between two logs: what had been summed for the second is not lost."""
        options = {"epochs": 2, "logging_steps": 4, "save_steps": 3}
        expected = run(tmp_path / "whole", **options)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", callbacks=[At(8, interrupt)], **options)
        _, result, steps = resumed(tmp_path / "run", **options)
        assert steps == 6
        assert [entry["step"] for entry in history(expected)] == [3, 4, 6, 8, 9, 12, 12]
        assert history(result) == history(expected)

    def test_in_another_place(self, tmp_path):
        """The best checkpoint is the one beside the others, not the one where the run used to lie."""
        whole, contrary = new(), flipped(tiny_dataset(24))
        expected = run(tmp_path / "whole", whole, evaluate=contrary, **STOPS_EARLY)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", evaluate=contrary, callbacks=[At(expected.steps, interrupt)], **STOPS_EARLY)
        shutil.move(tmp_path / "run", tmp_path / "moved")
        bayes, result, _ = resumed(tmp_path / "moved", evaluate=contrary, **STOPS_EARLY)
        assert equal(bayes.state_dict(), whole.state_dict())
        assert metrics(result) == metrics(expected)
        assert not (tmp_path / "run").exists()

    def test_damaged_best_checkpoint(self, tmp_path):
        """What came after it cannot be completed, so the run goes on from before it: here, from the start."""
        whole, contrary = new(), flipped(tiny_dataset(24))
        expected = run(tmp_path / "whole", whole, evaluate=contrary, **STOPS_EARLY)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", evaluate=contrary, callbacks=[At(expected.steps, interrupt)], **STOPS_EARLY)
        best, _ = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
        (best / "optimizer.pt").unlink()
        bayes, result, steps = resumed(tmp_path / "run", seed=0, evaluate=contrary, **STOPS_EARLY)
        assert steps == expected.steps
        assert equal(bayes.state_dict(), whole.state_dict())
        assert history(result) == history(expected)

    def test_stopped_by_a_callback(self, tmp_path):
        """That is no end: a run stopped for its time limit has run.json finished, one killed after it goes on."""

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                control.should_training_stop = state.global_step == 4

        whole = new()
        run(tmp_path / "whole", whole, save_steps=2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", save_steps=2, callbacks=[Stop(), AtEnd(lambda: interrupt())])
        bayes, _, steps = resumed(tmp_path / "run", save_steps=2)
        assert steps == 2
        assert equal(bayes.state_dict(), whole.state_dict())


class TestRefused:
    def test_other_settings(self, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, callbacks=[At(1, interrupt)])
        before = files(tmp_path)
        for changes, message in [
            ({"batch_size": 8}, "began with batch_size=4, not 8"),
            ({"epochs": 2}, "began with epochs=1, not 2"),
            ({"seed": 1}, "began with seed=0, not 1"),
            ({"learning_rate": 0.5}, "began with learning_rate=0.01, not 0.5"),
            ({"variational_learning_rate": 0.5}, "began with variational_learning_rate=0.1, not 0.5"),
            ({"train": tiny_dataset(23)}, "began with train_examples=24, not 23"),
            ({"evaluate": tiny_dataset(4)}, "began with best_metric=None, not 'predictive_nll'"),
        ]:
            with pytest.raises(InputError, match=message):
                run(tmp_path, resume=True, **changes)
        assert files(tmp_path) == before

    @pytest.mark.parametrize(
        "option",
        [{"save_only_model": True}, {"ignore_data_skip": True}, {"restore_callback_states_from_checkpoint": False}],
        ids=str,
    )
    def test_what_could_not_be_resumed(self, option, tmp_path):
        with pytest.raises(InputError, match=f"{next(iter(option))}=.* cannot be resumed exactly: leave it out"):
            run(tmp_path / "run", **option)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("resume", [False, True])
    def test_a_folder_in_use(self, resume, tmp_path):
        run(tmp_path, max_steps=1)
        with lock_folder(tmp_path):
            before = files(tmp_path)
            with pytest.raises(InputError, match=f"{tmp_path} is in use by process {os.getpid()} on"):
                run(tmp_path, max_steps=1, resume=resume)
            assert files(tmp_path) == before

    def test_the_lock_is_held_while_training(self, tmp_path):
        def other_run(_):
            run(tmp_path, max_steps=1)

        with pytest.raises(InputError, match="is in use by"):
            run(tmp_path, max_steps=2, callbacks=[At(2, other_run)])
        assert not (tmp_path / "run.lock").exists()


class TestFullDisk:
    """RLIMIT_FSIZE: the kernel itself refuses to write more."""

    @pytest.mark.parametrize("moment", ["checkpoint", "adapter"])
    def test_resumes_once_there_is_space(self, moment, tmp_path):
        whole, expected_last, full = new(), {"checkpoint": 4, "adapter": 6}[moment], FullAfter(2000)
        run(tmp_path / "whole", whole, save_steps=2)
        callback = At(6, lambda _: full.__enter__()) if moment == "checkpoint" else AtEnd(full.__enter__)
        try:
            with pytest.raises(StorageError) as caught:
                run(tmp_path / "run", save_steps=2, callbacks=[callback], report_to=[])
        finally:
            full.__exit__()
        last = tmp_path / "run" / "checkpoints" / f"checkpoint-{expected_last}"
        assert f"writing to {tmp_path / 'run'} failed (" in str(caught.value)
        assert f"the last good checkpoint is {last}. Free some space, then resume the run" in str(caught.value)
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints", "run.json"]
        bayes, _, steps = resumed(tmp_path / "run", save_steps=2)
        assert steps == 6 - expected_last
        assert equal(bayes.state_dict(), whole.state_dict())


def test_noise_does_not_depend_on_where_a_log_falls(tmp_path):
    """What is logged about the posterior draws nothing."""
    often, seldom = new(), new()
    run(tmp_path / "often", often, logging_steps=1)
    run(tmp_path / "seldom", seldom, logging_steps=6)
    assert all(torch.equal(value, seldom.state_dict()[name]) for name, value in often.state_dict().items())
