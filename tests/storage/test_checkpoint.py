"""The folder on disk: opens in plain PEFT, reopens with the same draws, and never half-written or half-read."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.guides import MeanFieldGuide
from bayeslora.storage import checkpoint
from bayeslora.storage.manifest import ADAPTER_WEIGHTS, CARD, FILES, MANIFEST, POSTERIOR
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.folders import reseal
from tests.modules import fitted, head, logits, module

REOPEN = """
import sys
import numpy as np, torch, transformers
from bayeslora import BayesLoRA
torch.set_num_threads(1)
base, *folders = sys.argv[1:]
for folder in folders:
    network = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    bayes = BayesLoRA.from_pretrained(folder, network)
    arrays = {name: value.numpy() for name, value in bayes.sample(3, seed=7).items()}
    data = [{"input_ids": [5, 9, 30], "attention_mask": [1, 1, 1]}]
    np.savez(folder + ".npz", probs=bayes.predict(data, num_samples=3).sample_probs, **arrays)
"""


def same_posterior(one, other):
    a, b = one.sample(3, seed=1), other.sample(3, seed=1)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    fitted().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


class TestRoundTrip:
    @pytest.mark.parametrize("guide", ["amortized", "mean_field"])
    @pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
    def test_mean_in_plain_peft_and_posterior_here(self, kind, guide, tmp_path):
        """Where only the mean is saved the posterior is lost without a word; the head is among what is saved too."""
        bayes = fitted(kind, guide=guide)
        bayes.save_pretrained(tmp_path / "adapter")
        plain = PeftModel.from_pretrained(tiny_network(kind), tmp_path / "adapter").eval()
        again = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network(kind))
        assert torch.equal(logits(plain), logits(bayes))
        assert torch.equal(logits(again), logits(bayes))
        assert same_posterior(bayes, again)
        assert all(map(torch.equal, head(bayes), head(again)))
        assert not torch.equal(logits(bayes), logits(tiny_network(kind).eval()))

    @pytest.mark.slow
    def test_fresh_process(self, tmp_path):
        """Equal draws under equal seeds, both guides: nothing but the base model and the folder crosses over."""
        tiny_network().save_pretrained(tmp_path / "base")
        expected = {}
        for guide in ("amortized", "mean_field"):
            bayes = fitted(guide=guide)
            bayes.save_pretrained(tmp_path / guide)
            data = [{"input_ids": [5, 9, 30], "attention_mask": [1, 1, 1]}]
            arrays = {name: value.numpy() for name, value in bayes.sample(3, seed=7).items()}
            expected[guide] = arrays | {"probs": bayes.predict(data, num_samples=3).sample_probs}
        root = Path(checkpoint.__file__).parents[1]
        subprocess.run(
            [sys.executable, "-c", REOPEN, tmp_path / "base", *(tmp_path / guide for guide in expected)],
            cwd=root,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            check=True,
            capture_output=True,
        )
        for guide, arrays in expected.items():
            with np.load(tmp_path / f"{guide}.npz") as found:
                assert set(found) == set(arrays)
                for name, value in arrays.items():
                    assert np.array_equal(found[name], value), name

    def test_regression_keeps_its_noise(self, tmp_path):
        bayes = module(network_options={"num_labels": 1})
        with torch.no_grad():
            bayes.model.likelihood.scale = torch.tensor(0.17)
        bayes.save_pretrained(tmp_path / "adapter")
        again = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network(num_labels=1))
        assert torch.equal(again.model.likelihood.scale, bayes.model.likelihood.scale)
        assert again.predict(tiny_dataset(2), num_samples=1).noise_scale == pytest.approx(0.17, rel=1e-6)

    def test_training_goes_on(self, saved):
        again = BayesLoRA.from_pretrained(saved, tiny_network()).train()
        before = {name: p.detach().clone() for name, p in again.named_parameters() if p.requires_grad}
        assert {name.split(".")[0] for name in before} == {"network", "guide"}
        assert set(before) == {name for name, p in fitted().named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
        again(**tiny_batch()).loss.backward()
        optimizer.step()
        assert [name for name, p in again.named_parameters() if name in before and torch.equal(p, before[name])] == []

    def test_settings_survive(self, tmp_path):
        bayes = fitted(sample_scaler=0.3, mode="post_hoc", normalization="elbo", rank_pattern={"query": 3})
        bayes.num_examples = 240
        bayes.save_pretrained(tmp_path / "adapter")
        again = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network())
        assert again.num_examples == 240
        for word in ("sample_scaler", "mode", "normalization", "num_components", "kl_weight", "guide", "rank_pattern"):
            assert getattr(again.monteclora_config, word) == getattr(bayes.monteclora_config, word), word
        assert {g.rank for g in again.model.groups} == {2, 3}
        assert {n.split(".")[0] for n, p in again.named_parameters() if p.requires_grad} == {"guide"}

    def test_adapter_of_another_name(self, tmp_path):
        lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        bayes = BayesLoRA(get_peft_model(tiny_network(), lora, adapter_name="mine"), MonteCLoRAConfig()).eval()
        bayes.save_pretrained(tmp_path / "adapter")
        assert names(tmp_path / "adapter") == {*FILES, MANIFEST, CARD}
        plain = PeftModel.from_pretrained(tiny_network(), tmp_path / "adapter").eval()
        again = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network())
        assert torch.equal(logits(plain), logits(bayes))
        assert torch.equal(logits(again), logits(bayes))
        assert same_posterior(bayes, again)

    def test_guide_of_ones_own(self, tmp_path):
        class OwnGuide(MeanFieldGuide):
            pass

        BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2), guide=OwnGuide).save_pretrained(tmp_path / "adapter")
        with pytest.raises(InputError, match="fitted with the guide OwnGuide; pass its class as guide="):
            BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network())
        again = BayesLoRA.from_pretrained(tmp_path / "adapter", tiny_network(), guide=OwnGuide)
        assert isinstance(again.guide, OwnGuide)


class TestFolder:
    def test_tensors_and_json_only(self, saved):
        """Nothing in it can be unpickled into code."""
        assert names(saved) == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "posterior.safetensors",
            "bayeslora.json",
            "README.md",
        }
        for path in saved.iterdir():
            if path.suffix == ".md":
                continue
            if path.suffix == ".json":
                assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
            else:
                assert all(value.numel() for value in load_file(path).values())

    def test_saving_again_replaces(self, folder):
        other = fitted(guide="mean_field", seed=1)
        other.save_pretrained(folder)
        assert names(folder) == {*FILES, MANIFEST, CARD}
        assert same_posterior(BayesLoRA.from_pretrained(folder, tiny_network(seed=1)), other)
        assert names(folder.parent) == {folder.name}

    def test_parents_are_made(self, tmp_path):
        fitted().save_pretrained(str(tmp_path / "runs" / "one" / "adapter"))
        assert names(tmp_path / "runs" / "one" / "adapter") == {*FILES, MANIFEST, CARD}

    @pytest.mark.parametrize("existing", [True, False])
    @pytest.mark.parametrize("moment", ["writing", "syncing", "renaming"])
    def test_failure_while_saving(self, moment, existing, folder, monkeypatch):
        """A full disk leaves what was there, and nothing half-made beside it."""
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        target = folder if existing else folder.parent / "new"
        rename, other = Path.rename, fitted(seed=1)

        def fail(*args, **options):
            raise OSError(28, "No space left on device")

        def fail_for_target(path, destination):
            return fail() if destination == target and path.name == "new" else rename(path, destination)

        patch = {
            "writing": (checkpoint, "save_file", fail),
            "syncing": (os, "fsync", fail),
            "renaming": (Path, "rename", fail_for_target),
        }[moment]
        monkeypatch.setattr(*patch)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(target)
        monkeypatch.undo()
        assert names(folder.parent) == {folder.name}
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        BayesLoRA.from_pretrained(folder, tiny_network())

    def test_something_else_in_the_way(self, folder, tmp_path):
        other, file = tmp_path / "thesis", tmp_path / "notes.txt"
        other.mkdir()
        (other / "chapter.tex").write_text("years of work")
        file.write_text("more")
        (folder / "notes.md").write_text("mine")
        for place in (other, file):
            with pytest.raises(InputError, match=f"{place.name} exists and holds something other than an adapter"):
                fitted().save_pretrained(place)
        with pytest.raises(InputError, match=r"also holds 'notes.md', which saving would delete"):
            fitted().save_pretrained(folder)
        assert (other / "chapter.tex").read_text() == "years of work"
        assert file.read_text() == "more"
        assert (folder / "notes.md").read_text() == "mine"
        BayesLoRA.from_pretrained(folder, tiny_network())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


class TestDamage:
    @pytest.mark.parametrize("name", [*FILES, MANIFEST])
    def test_file_missing_or_truncated(self, name, folder):
        truncate(folder / name)
        with pytest.raises(InputError, match=f"{name} is (truncated|damaged)"):
            BayesLoRA.from_pretrained(folder, tiny_network())
        (folder / name).unlink()
        expected = "plain PEFT adapter without a posterior" if name == MANIFEST else f"{name} is missing"
        with pytest.raises(InputError, match=expected):
            BayesLoRA.from_pretrained(folder, tiny_network())

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b"3", b"null", b'"text"', b"{}", b'{"format": 1}', b"\xff\xfe", b'{"format": 1']
    )
    def test_manifest_damaged(self, content, folder):
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(InputError, match=f"{MANIFEST} is damaged"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    def test_number_in_the_manifest_changed(self, folder):
        """ε is read from there: another one would be another posterior, silently."""
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        assert '"sample_scaler": 0.05' in text
        (folder / MANIFEST).write_text(text.replace('"sample_scaler": 0.05', '"sample_scaler": 0.85'), encoding="utf-8")
        with pytest.raises(InputError, match=f"{MANIFEST} is damaged or was edited"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    def test_format_of_the_future(self, folder):
        reseal(folder, format=2)
        with pytest.raises(InputError, match="has format 2, this bayeslora reads 1"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    def test_posterior_of_another_guide(self, folder, tmp_path):
        fitted(guide="mean_field").save_pretrained(tmp_path / "other")
        shutil.copy(tmp_path / "other" / POSTERIOR, folder / POSTERIOR)
        with pytest.raises(InputError, match=f"{POSTERIOR} is truncated or was changed"):
            BayesLoRA.from_pretrained(folder, tiny_network())
        reseal(folder)
        with pytest.raises(InputError, match=f"{POSTERIOR} does not fit this network: .* another model or guide"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    @pytest.mark.parametrize("name", [ADAPTER_WEIGHTS, POSTERIOR])
    def test_no_tensors_behind_the_right_hash(self, name, folder):
        (folder / name).write_bytes(b"\x10\0\0\0\0\0\0\0 not safetensors")
        reseal(folder)
        with pytest.raises(InputError, match=f"{name} is not a readable safetensors file"):
            BayesLoRA.from_pretrained(folder, tiny_network())

    def test_random_damage(self, saved, tmp_path):
        """Flipped, lost and doubled bytes anywhere: an InputError, or (white space) no harm at all."""
        dice, original, refused = random.Random(0), BayesLoRA.from_pretrained(saved, tiny_network()), 0
        for round_ in range(60):
            folder = Path(shutil.copytree(saved, tmp_path / str(round_)))
            path = folder / dice.choice([*FILES, MANIFEST, MANIFEST])
            content = bytearray(path.read_bytes())
            place = dice.randrange(len(content))
            kind = dice.choice(["flip", "flip", "cut", "double"])
            if kind == "flip":
                content[place] ^= 1 << dice.randrange(8)
            else:
                content[place:] = b"" if kind == "cut" else content[place:] * 2
            path.write_bytes(content)
            try:
                again = BayesLoRA.from_pretrained(folder, tiny_network())
            except InputError:
                refused += 1
            else:
                assert path.name == MANIFEST
                assert same_posterior(again, original)
        assert refused > 50


class TestWrongPlace:
    def test_no_adapter_there(self, tmp_path):
        with pytest.raises(InputError, match=r"no adapter folder at .*nowhere"):
            BayesLoRA.from_pretrained(tmp_path / "nowhere", tiny_network())
        with pytest.raises(InputError, match=f"holds no {MANIFEST}"):
            BayesLoRA.from_pretrained(tmp_path, tiny_network())

    def test_plain_peft_folder(self, tmp_path):
        plain = get_peft_model(tiny_network(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        plain.save_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"open it with peft.PeftModel.from_pretrained and pass .* to BayesLoRA"):
            BayesLoRA.from_pretrained(tmp_path, tiny_network())
        opened = PeftModel.from_pretrained(tiny_network(), tmp_path)  # what the message says to do
        assert BayesLoRA(opened, MonteCLoRAConfig()).sample(1)

    def test_other_base_model(self, saved):
        wide = transformers.BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=2,
        )
        wide = transformers.AutoModelForSequenceClassification.from_config(wide)
        for network, reason in [
            (wide, "has 32 inputs, not 16"),
            (tiny_network(layers=1), "BertForSequenceClassification has no layer 'bert.encoder.layer.1"),
            (tiny_network("gpt2"), "GPT2ForSequenceClassification has no layer 'bert.encoder"),
            (tiny_network(seed=1), "the frozen weight of 'bert.encoder.* differs from the one it was fitted to"),
        ]:
            with pytest.raises(InputError, match=f"is for another base model: .*{reason}"):
                BayesLoRA.from_pretrained(saved, network)

    def test_other_number_of_classes(self, saved):
        network = tiny_network(num_labels=3)
        network.bert.load_state_dict(tiny_network().bert.state_dict())
        with pytest.raises(InputError, match=r"does not fit this network: .*classifier.* has shape \(3"):
            BayesLoRA.from_pretrained(saved, network)

    def test_network_that_carries_an_adapter(self, saved):
        carrier = get_peft_model(tiny_network(), LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
        for network in (carrier, carrier.get_base_model()):
            with pytest.raises(InputError, match="this one carries an adapter already"):
                BayesLoRA.from_pretrained(saved, network)


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize("name", ["default", "other"])
def test_as_peft_writes_it(task_type, name, tmp_path):
    """But for the model card."""
    config = LoraConfig(task_type=task_type, r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    bayes = BayesLoRA(get_peft_model(tiny_network(), config, adapter_name=name))
    bayes.save_pretrained(tmp_path / "ours")
    bayes.network.save_pretrained(tmp_path / "theirs", selected_adapters=[name], save_embedding_layers=False)
    theirs = tmp_path / "theirs" / ("" if name == "default" else name)
    assert (tmp_path / "ours" / ADAPTER_WEIGHTS).read_bytes() == (theirs / ADAPTER_WEIGHTS).read_bytes()
    ours, expected = (json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "ours", theirs))
    assert set(ours.pop("target_modules")) == set(expected.pop("target_modules"))
    assert ours == expected


class TestEarlierAdapters:
    """tests/data/first_format: a base network, a run fitted to it before manifests knew of anything beside the adapter,
    and two of its draws' probabilities."""

    FOLDER = Path(__file__).parents[1] / "data" / "first_format"

    def base(self, **options):
        return transformers.AutoModelForSequenceClassification.from_pretrained(self.FOLDER / "base", **options)

    def test_opens_as_it_was(self):
        bayes = BayesLoRA.from_pretrained(self.FOLDER / "run" / "adapter", self.base())
        epsilon = json.loads((self.FOLDER / "run" / "run.json").read_text())["config"]["sample_scaler"]
        assert [bayes.model.sample_scaler(group) for group in bayes.model.groups] == [epsilon] * len(bayes.model.groups)
        assert bayes.tuning is None
        found = bayes.predict(tiny_dataset(4), num_samples=2, progress=False).sample_probs
        expected = json.loads((self.FOLDER / "probs.json").read_text())
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_a_finished_run_opens_again(self, tmp_path):
        shutil.copytree(self.FOLDER / "run", tmp_path / "run")
        config = MonteCLoRAConfig(r=2, target_modules=["query", "value"], num_components=2)
        bayes = BayesLoRA(self.base(), config)
        options = {"max_steps": 4, "batch_size": 8, "progress": False, "save_strategy": "no", "report_to": []}
        result = fit(
            bayes,
            tiny_dataset(16),
            tiny_dataset(8, seed=1),
            output_dir=tmp_path / "run",
            resume=True,
            load_best_model_at_end=False,
            **options,
        )
        assert result.steps == 4
        found = bayes.predict(tiny_dataset(4), num_samples=2, progress=False).sample_probs
        np.testing.assert_allclose(found, json.loads((self.FOLDER / "probs.json").read_text()), atol=1e-6)

    def test_a_field_that_came_later_had_its_default(self, tmp_path):
        shutil.copytree(self.FOLDER / "run", tmp_path / "run")
        config = MonteCLoRAConfig(r=2, target_modules=["query", "value"], num_components=2, noise_units="relative")
        with pytest.raises(InputError, match="began with noise_units='absolute', not 'relative'"):
            fit(BayesLoRA(self.base(), config), tiny_dataset(16), output_dir=tmp_path / "run", resume=True)

    def test_what_it_did_not_keep_is_refused(self, tmp_path):
        """Its base has a pooler; on one without, a new one would come at random, and nothing would be said."""
        shutil.copytree(self.FOLDER / "base", tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        kept = {name: value for name, value in load_file(file).items() if "pooler" not in name}
        save_file(kept, file, metadata={"format": "pt"})
        network = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        with pytest.raises(InputError, match=r"earlier version, which did not keep 'bert\.pooler\.dense"):
            BayesLoRA.from_pretrained(self.FOLDER / "run" / "adapter", network)


def test_arguments_in_the_order_of_peft_are_named(tmp_path):
    network = tiny_network()
    for swapped in [(network, tmp_path), (tmp_path, str(tmp_path))]:
        with pytest.raises(InputError, match="takes a folder, then the base network, and got a"):
            BayesLoRA.from_pretrained(*swapped)
