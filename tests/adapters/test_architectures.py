"""What holds for every kind of network: what is saved comes back, and what is drawn reaches it."""

import copy
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.adapters.drawing import using_draw, using_noise
from bayeslora.distributions import random_signs
from bayeslora.inference.predict import Collator
from tests.architectures import ARCHITECTURES, Architecture

ROOT = Path(__file__).parents[2]
SUPPORTED = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is None]
SHARING = {"deberta_v2", "longformer", "xlnet"}  # a training batch of these shares one draw of the noise
CONFIG = MonteCLoRAConfig(r=2, sample_scaler=0.3)


def batch_of(bayes: BayesLoRA, architecture: Architecture, **options):
    return Collator.for_network(bayes.network)(architecture.examples(**options))


def train(bayes: BayesLoRA, architecture: Architecture, steps: int = 3) -> BayesLoRA:
    optimizer = torch.optim.Adam([p for p in bayes.parameters() if p.requires_grad], 0.02)
    bayes.train()
    for _ in range(steps):
        optimizer.zero_grad()
        bayes(**batch_of(bayes, architecture)).loss.backward()
        optimizer.step()
    return bayes.eval()


@cache
def base_of(name: str, tmp: Path) -> Path:
    folder = tmp / name / "base"
    if not folder.exists():
        ARCHITECTURES[name].save_base(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Name of an architecture to its network, fitted a few steps with the default configuration, and its base."""
    tmp = tmp_path_factory.mktemp("architectures")

    @cache
    def fit(name: str) -> tuple[BayesLoRA, Path]:
        torch.manual_seed(1)
        base = base_of(name, tmp)
        return train(BayesLoRA(ARCHITECTURES[name].load(base, seed=1), CONFIG), ARCHITECTURES[name]), base

    return fit


def logits(network: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return network(**{name: value for name, value in inputs.items() if name != "labels"}).logits


def probs(bayes: BayesLoRA, examples: list, num_samples: int = 2) -> np.ndarray:
    return bayes.predict(examples, num_samples=num_samples, progress=False).sample_probs


class TestWhatIsSavedComesBack:
    @pytest.mark.slow
    def test_in_a_fresh_process(self, fitted, tmp_path):
        expected = {}
        for name in SUPPORTED:
            bayes, base = fitted(name)
            (tmp_path / name).mkdir()
            (tmp_path / name / "base").symlink_to(base)
            bayes.save_pretrained(tmp_path / name / "adapter")
            expected[name] = probs(bayes, ARCHITECTURES[name].examples())
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "workers" / "reopen_worker.py"), str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        found = {name: np.load(tmp_path / f"{name}.npz")["probs"] for name in SUPPORTED}
        worst = {name: np.abs(found[name] - expected[name]).max() for name in SUPPORTED}
        assert {name: gap for name, gap in worst.items() if gap > 1e-5} == {}

    @pytest.mark.parametrize("name", SUPPORTED)
    def test_as_the_mean_in_plain_peft(self, fitted, tmp_path, name):
        bayes, base = fitted(name)
        bayes.save_pretrained(tmp_path / "adapter")
        plain = PeftModel.from_pretrained(ARCHITECTURES[name].load(base, seed=5), tmp_path / "adapter").eval()
        inputs = batch_of(bayes, ARCHITECTURES[name])
        torch.testing.assert_close(logits(plain, inputs), logits(bayes.network, inputs), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("name", SUPPORTED)
    def test_everything_that_is_new_is_trained(self, fitted, name):
        bayes, _ = fitted(name)
        before = ARCHITECTURES[name].load(fitted(name)[1], seed=1)
        assert bayes.kept_keys == frozenset()
        lacking = [key for key, _ in before.named_parameters() if key.startswith(ARCHITECTURES[name].lacking)]
        merged = dict(bayes.merge().named_parameters())
        assert lacking
        for key in lacking:
            assert not torch.equal(merged[key], before.get_parameter(key)), key

    @pytest.mark.parametrize("name", ["bert_without_pooler", "t5", "llama", "whisper"])
    def test_of_a_copy_and_of_a_network_without_a_checkpoint(self, fitted, tmp_path, name):
        architecture = ARCHITECTURES[name]
        base = fitted(name)[1]
        for index, network in enumerate([copy.deepcopy(architecture.load(base, seed=1)), architecture.network(seed=4)]):
            bayes = train(BayesLoRA(network, CONFIG), architecture)
            bayes.save_pretrained(tmp_path / str(index))
            again = architecture.network(seed=4)
            if index == 0:
                again = architecture.load(base, seed=7)
            else:  # another head than that of the network that was fitted
                for key, parameter in again.named_parameters():
                    if key.startswith(tuple(part for part in architecture.lacking if part != "bert.pooler")):
                        nn.init.normal_(parameter)
            reopened = BayesLoRA.from_pretrained(tmp_path / str(index), again)
            examples = architecture.examples()
            np.testing.assert_allclose(probs(reopened, examples), probs(bayes, examples), atol=1e-6)

    @pytest.mark.parametrize("name", ["bert_without_pooler", "llama", "vit"])
    def test_any_other_tensor_of_the_base_is_noticed(self, fitted, tmp_path, name):
        """Every parameter and buffer that the adapter does not bring, changed one at a time in one entry in fifty."""
        bayes, base = fitted(name)
        bayes.save_pretrained(tmp_path / "adapter")
        brought = tuple(bayes.network.peft_config["default"].modules_to_save)
        names = [
            key
            for key, value in ARCHITECTURES[name].load(base, seed=1).named_parameters()
            if not key.startswith(brought)
        ]
        assert len(names) > 10
        for key in names:
            network = ARCHITECTURES[name].load(base, seed=3)
            with torch.no_grad():
                network.get_parameter(key).view(-1)[:: max(network.get_parameter(key).numel() // 50, 1)] += 0.02
            with pytest.raises(InputError, match="is for another base model"):
                BayesLoRA.from_pretrained(tmp_path / "adapter", network)

    def test_roundings_of_the_base_pass(self, fitted, tmp_path):
        bayes, base = fitted("llama")
        bayes.save_pretrained(tmp_path / "adapter")
        network = ARCHITECTURES["llama"].load(base, seed=3, dtype=torch.bfloat16)
        reopened = BayesLoRA.from_pretrained(tmp_path / "adapter", network)
        examples = ARCHITECTURES["llama"].examples()
        np.testing.assert_allclose(probs(reopened, examples), probs(bayes, examples), atol=0.05)


class TestWhatIsNewAndNotTrained:
    """Kept with the adapter as it is: rows added to the embeddings, bare parameters, running statistics."""

    def saved_and_reopened(self, network, again, architecture, folder, **options):
        bayes = train(BayesLoRA(network, CONFIG.replace(**options)), architecture)
        bayes.save_pretrained(folder)
        return bayes, BayesLoRA.from_pretrained(folder, again)

    @pytest.mark.parametrize("name", ["bert", "llama", "t5"])
    def test_added_rows_of_the_embeddings(self, fitted, tmp_path, name, caplog):
        architecture, base = ARCHITECTURES[name], fitted(name)[1]
        networks = [architecture.load(base, seed=seed) for seed in range(3)]
        for seed, network in enumerate(networks):
            torch.manual_seed(seed)
            network.resize_token_embeddings(80, mean_resizing=False)
        bayes, reopened = self.saved_and_reopened(networks[0], networks[1], architecture, tmp_path / "a")
        assert "not in its checkpoint" in caplog.text
        example = {"input_ids": [70, 75, 79, 2], "attention_mask": [1] * 4}
        np.testing.assert_allclose(probs(reopened, [example]), probs(bayes, [example]), atol=1e-6)
        plain = PeftModel.from_pretrained(networks[2], tmp_path / "a").eval()
        inputs = Collator.for_network(bayes.network)([example])
        torch.testing.assert_close(logits(plain, inputs), logits(bayes.network, inputs), rtol=1e-5, atol=1e-6)
        with pytest.raises(InputError, match="shape"):  # not resized
            BayesLoRA.from_pretrained(tmp_path / "a", architecture.load(base, seed=1))

    def test_pefts_own_folder_with_embeddings(self, fitted, tmp_path):
        """As PEFT writes it where rows were added: it goes on from there, and saves them again."""
        from bayeslora.storage.peft_files import open_peft_adapter

        architecture, base = ARCHITECTURES["llama"], fitted("llama")[1]
        networks = [architecture.load(base, seed=seed) for seed in range(3)]
        for seed, network in enumerate(networks):
            torch.manual_seed(seed)
            network.resize_token_embeddings(80, mean_resizing=False)
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")
        peft = get_peft_model(networks[0], lora)
        peft.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
        bayes = BayesLoRA(open_peft_adapter(tmp_path / "peft", networks[1]), CONFIG)
        example = {"input_ids": [70, 75, 79, 2], "attention_mask": [1] * 4}
        inputs = Collator.for_network(bayes.network)([example])
        torch.testing.assert_close(logits(bayes.network.eval(), inputs), logits(peft.eval(), inputs))
        bayes.save_pretrained(tmp_path / "ours")
        reopened = BayesLoRA.from_pretrained(tmp_path / "ours", networks[2])
        torch.testing.assert_close(logits(reopened.network, inputs), logits(peft, inputs))

    def test_a_bare_parameter(self, tmp_path):
        architecture = ARCHITECTURES["wav2vec2"]
        architecture.save_base(tmp_path / "base")
        options = {"use_weighted_layer_sum": True, "layerdrop": 0.0}
        networks = [architecture.load(tmp_path / "base", seed=seed, **options) for seed in range(2)]
        for network in networks:
            nn.init.normal_(network.layer_weights)
        bayes, reopened = self.saved_and_reopened(*networks, architecture, tmp_path / "a")
        assert "layer_weights" in bayes.kept_keys
        np.testing.assert_allclose(
            probs(reopened, architecture.examples()), probs(bayes, architecture.examples()), atol=1e-6
        )

    def test_running_statistics(self, tmp_path):
        config = transformers.LevitConfig(
            image_size=32,
            hidden_sizes=[16, 16, 16],
            num_attention_heads=[2, 2, 2],
            key_dim=[8, 8, 8],
            depths=[1, 1, 1],
            num_labels=3,
        )
        transformers.LevitForImageClassification(config).save_pretrained(tmp_path / "base")
        networks = [transformers.LevitForImageClassification.from_pretrained(tmp_path / "base") for _ in range(2)]
        architecture = Architecture("LevitConfig", inputs="image", picture_size=32, task="ImageClassification")
        before = {key: value.clone() for key, value in networks[0].state_dict().items() if "running" in key}
        bayes, reopened = self.saved_and_reopened(*networks, architecture, tmp_path / "a")
        now = bayes.network.get_base_model().state_dict()
        moved = [key for key, value in before.items() if not torch.equal(value, now.get(key, value))]
        assert len(moved) > 5
        np.testing.assert_allclose(
            probs(reopened, architecture.examples()), probs(bayes, architecture.examples()), atol=1e-6
        )

    def test_what_was_unfrozen_by_hand(self, fitted, tmp_path):
        architecture, base = ARCHITECTURES["bert"], fitted("bert")[1]
        network = architecture.load(base, seed=0)
        bayes = BayesLoRA(network, CONFIG)
        network.bert.encoder.layer[0].output.LayerNorm.requires_grad_(True)
        train(bayes, architecture).save_pretrained(tmp_path / "a")
        reopened = BayesLoRA.from_pretrained(tmp_path / "a", architecture.load(base, seed=1))
        np.testing.assert_allclose(
            probs(reopened, architecture.examples()), probs(bayes, architecture.examples()), atol=1e-6
        )


class TestWhatIsDrawnArrives:
    @pytest.mark.parametrize("name", SUPPORTED)
    def test_a_draw_is_the_network_with_those_weights(self, fitted, name):
        """Also where a layer runs more than once (ALBERT's blocks are one block)."""
        bayes, _ = fitted(name)
        examples = ARCHITECTURES[name].examples()
        predicted = probs(bayes, examples, num_samples=3)
        alone = [Collator.for_network(bayes.network)([example]) for example in examples]
        for draw in range(3):
            merged = bayes.merge(draw=draw).eval()
            expected = torch.cat([logits(merged, example) for example in alone]).softmax(-1).numpy()
            np.testing.assert_allclose(predicted[draw], expected, atol=2e-5)
        assert name == "convnext" or np.abs(predicted - predicted[:1]).max() > 1e-5  # scaled by 1e-6 in ConvNeXt

    @pytest.mark.parametrize("name", SUPPORTED)
    def test_the_noise_of_an_example_is_its_own(self, fitted, name):
        """Where examples have their own noise in training, each sees exactly its mirror image."""
        bayes, _ = fitted(name)
        groups, inputs = bayes.model.groups, batch_of(bayes, ARCHITECTURES[name])
        inputs.pop("labels")
        assert bayes.rows_are_examples(inputs) == (name not in SHARING)
        if name in SHARING:
            return
        generator = torch.Generator().manual_seed(3)
        noise = {g.name: torch.randn(len(g), g.columns, g.rank, generator=generator) for g in groups}
        signs = {g.name: random_signs(len(g), 6, g.rank) for g in groups}
        with using_noise(groups, noise, signs):
            together = logits(bayes.network, inputs)
        for index in (0, 4):
            own = {g.name: g.mean().detach() + noise[g.name] * signs[g.name][:, index, None] for g in groups}
            with using_draw(groups, own):
                alone = logits(bayes.network, inputs)
            torch.testing.assert_close(together[index], alone[index], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # PEFT speaks first
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in SUPPORTED])
def test_refused_before_training(name, tmp_path):
    architecture = ARCHITECTURES[name]
    architecture.save_base(tmp_path / "base")
    for guide in ("amortized", "mean_field"):
        with pytest.raises(InputError, match=architecture.refused):
            BayesLoRA(architecture.load(tmp_path / "base", seed=0), CONFIG.replace(guide=guide))
