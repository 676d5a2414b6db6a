"""A tuned width on disk: there again with its adapter, and refused where it is damaged."""

import json

import numpy as np
import pytest
import transformers

from bayeslora import BayesLoRA, InputError
from bayeslora.models import Tuning
from bayeslora.storage.manifest import ADAPTER_WEIGHTS, MANIFEST, POSTERIOR
from tests.conftest import tiny_dataset, tiny_network
from tests.folders import reseal
from tests.modules import fitted


class TestKept:
    TUNING = Tuning(0.25, 1.5, 0.4, 0.6, 0.5, 30, 16, conformal={"0.9": 0.25})

    def predicted(self, bayes):
        return bayes.predict(tiny_dataset(4), num_samples=2, progress=False).sample_probs

    def tuned(self, tuning=TUNING):
        bayes = fitted()
        bayes.tuning = tuning
        return bayes

    def saved(self, folder, tuning=TUNING):
        self.tuned(tuning).save_pretrained(folder / "adapter")
        return folder / "adapter"

    @pytest.mark.parametrize("tuning", [TUNING, Tuning(width=0), Tuning(width=3.0, nll_untuned=float("inf")), None])
    def test_is_there_again(self, tuning, tmp_path):
        again = BayesLoRA.from_pretrained(self.saved(tmp_path, tuning), tiny_network())
        assert tuning is None or (again.tuning.width, again.tuning.nll) == (tuning.width, tuning.nll)
        assert (again.tuning is None) == (tuning is None)
        np.testing.assert_array_equal(self.predicted(again), self.predicted(self.tuned(tuning)))
        other = self.tuned(Tuning(width=9.0))
        other.load_adapter(tmp_path / "adapter")
        assert other.tuning == again.tuning

    def test_saving_again_changes_no_tensor(self, tmp_path):
        first = self.saved(tmp_path)
        again = BayesLoRA.from_pretrained(first, tiny_network())
        again.tuning = None
        again.save_pretrained(tmp_path / "again")
        for name in (ADAPTER_WEIGHTS, POSTERIOR):
            assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert "tuning" not in json.loads((tmp_path / "again" / MANIFEST).read_text(encoding="utf-8"))

    def test_with_a_stock_trainer(self, tmp_path):
        """Its saving writes the tuned width, its checkpoints are read back with it, and its training refuses it."""
        options = {"max_steps": 1, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}
        arguments = transformers.TrainingArguments(tmp_path / "out", save_strategy="no", **options)
        same_length = tiny_dataset(8)[::4]
        trainer = transformers.Trainer(self.tuned(), arguments, train_dataset=same_length)
        trainer.save_model(tmp_path / "saved")
        assert BayesLoRA.from_pretrained(tmp_path / "saved", tiny_network()).tuning == self.TUNING
        other = transformers.Trainer(fitted(), arguments)
        other._load_from_checkpoint(str(tmp_path / "saved"))
        assert other.model.tuning == self.TUNING
        with pytest.raises(InputError, match=r"set bayes.tuning = None .*to train it further"):
            trainer.train()

    @pytest.mark.parametrize(
        "change",
        [
            {"width": -1.0},
            {"width": "0.5"},
            {"width": None},
            {"width": True},
            {"width": float("nan")},
            {"width": float("inf")},
            {"width": 1e9},
            {"width": 10**400},
            {"temperature": 0},
            {"temperature": -1},
            {"temperature": [1]},
            {"nll": "low"},
            {"nll_at_mean": float("nan")},
            {"examples": 2.5},
            {"num_samples": -1},
            {"more": 1},
        ],
        ids=str,
    )
    def test_damaged(self, change, tmp_path):
        folder = self.saved(tmp_path)
        reseal(folder, tuning=self.TUNING.to_dict() | change)
        with pytest.raises(InputError, match=rf"{MANIFEST} is damaged \(its 'tuning'\)"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    @pytest.mark.parametrize("value", [{}, [], 0.5, "0.5", True, {"width": 0.5}])
    def test_something_else(self, value, tmp_path):
        folder = self.saved(tmp_path)
        reseal(folder, tuning=value)
        with pytest.raises(InputError, match=rf"{MANIFEST} is damaged \(its 'tuning'\)"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    def test_edited(self, tmp_path):
        """Another width would be another posterior, silently."""
        file = self.saved(tmp_path) / MANIFEST
        text = file.read_text(encoding="utf-8")
        file.write_text(text.replace('"width": 0.25', '"width": 0.75'), encoding="utf-8")
        with pytest.raises(InputError, match="damaged or was edited"):
            BayesLoRA.from_pretrained(file.parent, tiny_network())
