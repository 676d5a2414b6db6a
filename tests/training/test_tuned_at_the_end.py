"""fit(tune=): a width by examples of their own, or by a share that is held out of training."""

import json
import sys

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from bayeslora import BayesLoRA, InputError
from bayeslora.training.held_out import hold_out
from tests.conftest import tiny_dataset
from tests.runs import At as at_step
from tests.runs import _frozen_garbage, base, equal, interrupt, new, run, state  # noqa: F401  (a fixture)

HELD = tiny_dataset(24, seed=5)


class Seen(TrainerCallback):
    """Which data the loader has."""

    def on_train_begin(self, args, state, control, train_dataloader, **kwargs):
        self.data = list(train_dataloader.dataset)


class TestHoldOut:
    @pytest.mark.parametrize("make", [list, datasets.Dataset.from_list])
    def test_parts_are_the_whole(self, make):
        rows = [{"labels": i} for i in range(90)]
        train, held = hold_out(make(rows), 0.3, seed=1)
        assert type(train) is type(held) is type(make(rows))
        assert len(held) == 27
        assert sorted(row["labels"] for row in [*train, *held]) == list(range(90))
        assert [row["labels"] for row in hold_out(make(rows), 0.3, seed=1)[1]] == [row["labels"] for row in held]
        assert [row["labels"] for row in hold_out(make(rows), 0.3, seed=2)[1]] != [row["labels"] for row in held]

    @pytest.mark.parametrize("share", [0, 1, 1.5, -0.2, float("nan"), 3])
    def test_a_share_is_a_share(self, share):
        with pytest.raises(InputError, match="a share of the training examples"):
            hold_out(tiny_dataset(100), share, seed=0)

    def test_not_the_training_data(self):
        data = tiny_dataset(60)
        with pytest.raises(InputError, match="tune is the training data itself"):
            hold_out(data, data, seed=0)

    def test_rows_that_are_made_anew_go_on_being_so(self):
        class Augmented(torch.utils.data.Dataset):
            def __len__(self):
                return 60

            def __getitem__(self, index):
                return {"labels": float(torch.rand(()))}

        train, _ = hold_out(Augmented(), np.float32(0.5), seed=0)
        assert train[0] != train[0]

    def test_too_few(self):
        with pytest.raises(InputError, match=r"tune=0.1 holds out 5 of 50 training examples, .* at least 20"):
            hold_out(tiny_dataset(50), 0.1, seed=0)


class TestFit:
    def test_by_examples_of_their_own(self, tmp_path):
        bayes = new(sample_scaler=0.3)
        run(tmp_path / "run", bayes, tune=HELD)
        assert bayes.tuning.examples == len(HELD)
        assert bayes.tuning.nll <= min(bayes.tuning.nll_at_mean, bayes.tuning.nll_untuned)
        reopened = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", base())
        assert reopened.tuning == bayes.tuning
        again = new(sample_scaler=0.3)
        run(tmp_path / "other", again)
        assert again.tuning is None
        again.tune(HELD, progress=False)
        assert again.tuning == bayes.tuning  # tuning changed nothing of the training before it

    def test_by_a_share_that_is_not_trained_on(self, tmp_path):
        data, seen = tiny_dataset(60), Seen()
        bayes = new(sample_scaler=0.3)
        run(tmp_path / "run", bayes, train=data, tune=0.4, seed=3, callbacks=[seen])
        train, held = hold_out(data, 0.4, seed=3)
        assert seen.data == train
        assert bayes.num_examples == len(train) == 36
        tuned = bayes.tuning
        bayes.tuning = None
        assert bayes.tune(held, progress=False) == tuned

    def test_a_finished_run_is_loaded_with_it(self, tmp_path):
        bayes, other = new(sample_scaler=0.3), new(seed=1, sample_scaler=0.3)
        run(tmp_path / "run", bayes, tune=HELD)
        run(tmp_path / "run", other, tune=HELD, resume=True)
        assert other.tuning == bayes.tuning

    def test_resumed_it_is_the_same(self, tmp_path):
        whole, first, second = (new(sample_scaler=0.3) for _ in range(3))
        run(tmp_path / "whole", whole, epochs=2, tune=HELD)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", first, epochs=2, tune=HELD, callbacks=[at_step(9, interrupt)])
        run(tmp_path / "run", second, epochs=2, tune=HELD, resume=True)
        assert second.tuning == whole.tuning
        assert equal(state(second), state(whole))

    def test_what_was_trained_is_safe_where_tuning_fails(self, tmp_path, monkeypatch):
        """As for want of memory; its batches are the evaluation's, and the run can be resumed."""
        asked = {}

        def fails(bayes, data, **options):
            asked.update(options)
            raise MemoryError

        with monkeypatch.context() as patched:
            patched.setattr(sys.modules["bayeslora.training.fit"], "tune_width", fails)
            with pytest.raises(MemoryError):
                run(tmp_path / "run", new(sample_scaler=0.3), tune=HELD)
        assert asked["batch_size"] == 4  # the training's
        first = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", base())
        second = new(sample_scaler=0.3)
        run(tmp_path / "run", second, tune=HELD, resume=True)
        assert second.tuning is not None
        assert first.tuning is None
        second.tuning = None
        assert equal(state(first), state(second))

    @pytest.mark.parametrize(("before", "after"), [(HELD, None), (None, HELD)])
    def test_it_is_not_another_run_s(self, tmp_path, before, after):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", epochs=2, tune=before, callbacks=[at_step(9, interrupt)])
        with pytest.raises(InputError, match="began with tuning_examples="):
            run(tmp_path / "run", epochs=2, tune=after, resume=True)

    @pytest.mark.parametrize(
        ("options", "tune", "says"),
        [
            ({"sample_scaler": 0.0}, HELD, "sample_scaler=0 is plain LoRA"),
            ({}, HELD[:19], "at least 20 examples"),
            ({}, 0.5, "holds out 12 of 24"),
            ({}, [{"input_ids": row["input_ids"]} for row in HELD], "label"),
        ],
    )
    def test_refused_before_anything_is_trained(self, tmp_path, options, tune, says):
        with pytest.raises(InputError, match=says):
            run(tmp_path / "run", new(**options), tune=tune)
        assert not (tmp_path / "run").exists()

    def test_the_record_says_so(self, tmp_path):
        run(tmp_path / "run", train=tiny_dataset(60), tune=0.5)
        record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
        assert (record["training"]["train_examples"], record["training"]["tuning_examples"]) == (30, 30)
