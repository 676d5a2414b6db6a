"""Whatever drives it, a training loop gets what it gets from a PEFT model: Trainer's arguments mean what they say."""

import dataclasses
import inspect

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.language_data import pack
from bayeslora.models import ChoiceLikelihood, NextTokenLikelihood
from bayeslora.predict import Collator
from bayeslora.trainer_arguments import FIT_WORDS, REFUSED, REFUSED_BY_FIT, check_arguments
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.language import tiny_language_model

QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}


def texts(*lengths, seed=0):
    """Texts that score all their tokens but the first."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, 60, (length + 1,), generator=generator).tolist() for length in lengths]
    return [{"input_ids": t, "attention_mask": [1] * len(t), "labels": list(t)} for t in tokens]


def choices(count):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 60, (2, 5), generator=generator).tolist() for _ in range(count)]
    mask, answer = [[1] * 5] * 2, [[0, 0, 0, 1, 1]] * 2
    return [
        {"input_ids": r, "attention_mask": mask, "answer_mask": answer, "labels": i % 2} for i, r in enumerate(rows)
    ]


def numbers(count):
    return [example | {"labels": example["input_ids"][0] / 64} for example in tiny_dataset(count)]


def classifier(kind="bert", **options):
    return BayesLoRA(tiny_network(kind, layers=1), MonteCLoRAConfig(r=2, **options))


def writer(kind="llama", likelihood=None, **options):
    network = tiny_language_model(kind, layers=1)
    return BayesLoRA(network, MonteCLoRAConfig(r=2, **options), likelihood=likelihood)


def state(bayes):
    return {name: value.clone() for name, value in bayes.state_dict().items()}


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class TestWhatStockTrainerSaves:
    """An adapter's folder, beside Trainer's own files, which bayeslora and PEFT open."""

    MAKE = {  # noqa: RUF012
        "classes": (classifier, lambda: tiny_network(layers=1), tiny_dataset(16)),
        "classes, gpt2": (lambda: classifier("gpt2"), lambda: tiny_network("gpt2", layers=1), tiny_dataset(16)),
        "texts": (writer, lambda: tiny_language_model(layers=1), texts(*range(2, 18))),
    }

    def trainer(self, folder, make, data, **options):
        settings = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "learning_rate": 1e-2,
                    "per_device_train_batch_size": 4, "metric_for_best_model": "loss"}  # fmt: skip
        arguments = TrainingArguments(str(folder), **(settings | QUIET | options))
        return Trainer(make(), arguments, Collator(), data, data[:4])

    @pytest.mark.parametrize("kind", MAKE)
    def test_opens_in_bayeslora_and_in_peft(self, kind, tmp_path):
        make, base, data = self.MAKE[kind]
        trainer = self.trainer(tmp_path / "run", make, data)
        trainer.train()
        for _ in range(2):  # what lies there is written over
            trainer.save_model(str(tmp_path / "saved"))
        trainer.save_model()  # into the folder that holds the checkpoints
        bayes = trainer.model.eval()
        batch = {name: value for name, value in Collator()(data[:3]).items() if name != "labels"}
        for folder in (tmp_path / "saved", tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
            assert not (folder / "model.safetensors").exists()
            again = BayesLoRA.from_pretrained(folder, base())
            assert_same_state(state(again), state(bayes))
            plain = peft.PeftModel.from_pretrained(base(), folder).eval()
            torch.testing.assert_close(plain(**batch).logits, bayes.network(**batch).logits)

    @pytest.mark.parametrize("kind", MAKE)
    def test_the_best_checkpoint_is_loaded(self, kind, tmp_path):
        make, base, data = self.MAKE[kind]
        trainer = self.trainer(tmp_path, make, data, load_best_model_at_end=True, greater_is_better=True,
                               learning_rate=3e-2)  # fmt: skip
        trainer.train()  # by the largest loss, which is the first's
        best = BayesLoRA.from_pretrained(tmp_path / "checkpoint-2", base())
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        assert_same_state(state(trainer.model), state(best))

    @pytest.mark.parametrize("kind", MAKE)
    def test_resumed_is_uninterrupted(self, kind, tmp_path):
        make, _, data = self.MAKE[kind]
        whole = self.trainer(tmp_path, make, data)
        whole.train()
        resumed = self.trainer(tmp_path, make, data)
        with torch.no_grad():
            for parameter in resumed.model.guide.parameters():
                parameter.add_(1.0)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same_state(state(resumed.model), state(whole.model))

    def test_another_adapter_is_not_the_posterior_s(self, tmp_path):
        bayes = classifier()
        bayes.save_pretrained(tmp_path / "adapter")
        with pytest.raises(InputError, match=r"over the adapter 'default': .*bayes.network.load_adapter"):
            bayes.load_adapter(tmp_path / "adapter", "other")

    def test_processes_that_do_not_write(self, tmp_path):
        classifier().save_pretrained(tmp_path / "adapter", is_main_process=False)
        assert not (tmp_path / "adapter").exists()


class TestIsAPeftModel:
    def test_what_peft_asks_for(self):
        bayes = classifier()
        assert isinstance(bayes, peft.PeftModel)
        assert bayes.active_adapters == [bayes.active_adapter] == ["default"]
        assert bayes.peft_config is bayes.network.peft_config
        assert bayes.get_base_model() is bayes.network.get_base_model()
        assert bayes.get_model_status().enabled is True
        trained, everything = bayes.get_nb_trainable_parameters()
        assert 0 < trained == sum(p.numel() for p in bayes.parameters() if p.requires_grad) < everything

    def test_no_attribute_of_the_network_is_taken_for_its_own(self):
        bayes = classifier()
        bayes.network.get_base_model().is_loaded_in_4bit = True
        assert not hasattr(bayes, "is_loaded_in_4bit")

    def test_a_second_one_around_the_first_is_refused(self):
        with pytest.raises(InputError, match="a BayesLoRA already"):
            BayesLoRA(classifier(), MonteCLoRAConfig(r=2))


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
NETWORKS = {
    "bert": lambda: tiny_network(layers=1),
    "llama": lambda: tiny_network("llama", layers=1),
    "llama, texts": lambda: tiny_language_model(layers=1),
    "gpt2, texts": lambda: tiny_language_model("gpt2", layers=1),
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=4, patch_size=2, num_channels=1)
    ),
    "wav2vec2": lambda: transformers.Wav2Vec2ForSequenceClassification(
        transformers.Wav2Vec2Config(
            **SMALL, conv_dim=(8,), conv_stride=(5,), conv_kernel=(10,), num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    ),
    "bart": lambda: transformers.BartForSequenceClassification(
        transformers.BartConfig(
            vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
        )
    ),
}  # fmt: skip
TAKEN = {"vit": "pixel_values", "wav2vec2": "input_values", "bart": "decoder_input_ids"}


class TestColumns:
    """A stock Trainer drops columns that the network does not take, and no other."""

    @pytest.mark.parametrize("kind", NETWORKS)
    def test_what_the_network_takes_is_kept(self, kind, tmp_path):
        network = NETWORKS[kind]()
        takes = [name for name in inspect.signature(network.forward).parameters if name != "kwargs"]
        heads = {"vit": ["classifier"], "wav2vec2": ["projector", "classifier"]}.get(kind)
        layers = "all-linear" if kind != "wav2vec2" else ["q_proj", "v_proj"]
        bayes = BayesLoRA(network, MonteCLoRAConfig(r=2, target_modules=layers, modules_to_save=heads))
        trainer = Trainer(bayes, TrainingArguments(str(tmp_path), **QUIET))
        columns = dict.fromkeys([*takes, "a text"], [0, 1])
        kept = trainer._remove_unused_columns(datasets.Dataset.from_dict(columns)).column_names
        assert kept == takes
        assert {TAKEN.get(kind, "position_ids"), "labels"} <= set(kept)
        assert trainer.label_names == ["labels"]

    def test_packed_texts_do_not_see_each_other(self, tmp_path):
        rows = pack(texts(3, 9, 4, 7), 16)
        trainer = Trainer(writer(sample_scaler=0.0), TrainingArguments(str(tmp_path), **QUIET), Collator(),
                          datasets.Dataset.from_list(rows))  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader()))
        assert "position_ids" in batch
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model.train(), batch)
            apart = trainer.model(**Collator()(texts(3, 9, 4, 7))).loss
        torch.testing.assert_close(loss, apart)
