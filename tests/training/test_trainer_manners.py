"""Whatever drives it, a training loop gets what it gets from a PEFT model: Trainer's arguments mean what they say."""

import dataclasses
import gc
import inspect

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.data.batches import Collator
from bayeslora.models import ChoiceLikelihood, NextTokenLikelihood
from bayeslora.study.trainer import PlainTrainer
from bayeslora.tasks.encoding import pack
from bayeslora.training.arguments import FIT_NAMES, REFUSED_BY_FIT
from bayeslora.training.metrics import Metrics
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.language import tiny_language_model

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the word is still there
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}


@pytest.fixture(autouse=True, scope="module")
def _frozen_garbage():
    """Accelerate collects garbage at the start of each run: 0.3 s over all that is imported, unless it is set aside."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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


def classifier(kind="bert", num_labels=2, **options):
    return BayesLoRA(tiny_network(kind, layers=1, num_labels=num_labels), MonteCLoRAConfig(r=2, **options))


def writer(kind="llama", likelihood=None, **options):
    network = tiny_language_model(kind, layers=1)
    return BayesLoRA(network, MonteCLoRAConfig(r=2, **options), likelihood=likelihood)


def bounded():
    bayes = writer(likelihood=NextTokenLikelihood("sum"), normalization="elbo", **NOISELESS)
    bayes.num_examples = 3
    return bayes


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
        settings = {
            "max_steps": 4,
            "save_steps": 2,
            "eval_steps": 2,
            "eval_strategy": "steps",
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "metric_for_best_model": "loss",
        }
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
        trainer = self.trainer(
            tmp_path, make, data, load_best_model_at_end=True, greater_is_better=True, learning_rate=3e-2
        )
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

    def test_what_push_to_hub_asks_for(self, tmp_path):
        """An empty folder, and a size that no adapter reaches."""
        bayes = classifier()
        bayes.save_pretrained(str(tmp_path), max_shard_size="1GB")
        assert_same_state(state(BayesLoRA.from_pretrained(tmp_path, tiny_network(layers=1))), state(bayes))

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
            **SMALL,
            conv_dim=(8,),
            conv_stride=(5,),
            conv_kernel=(10,),
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        )
    ),
    "bart": lambda: transformers.BartForSequenceClassification(
        transformers.BartConfig(
            vocab_size=64,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=24,
            decoder_ffn_dim=24,
            max_position_embeddings=40,
        )
    ),
}
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
        columns = {name: [0, 1] for name in (*takes, "a text")}
        kept = trainer._remove_unused_columns(datasets.Dataset.from_dict(columns)).column_names
        assert kept == takes
        assert {TAKEN.get(kind, "position_ids"), "labels"} <= set(kept)
        assert trainer.label_names == ["labels"]

    def test_packed_texts_do_not_see_each_other(self, tmp_path):
        rows = pack(texts(3, 9, 4, 7), 16)
        trainer = Trainer(
            writer(sample_scaler=0.0),
            TrainingArguments(str(tmp_path), **QUIET),
            Collator(),
            datasets.Dataset.from_list(rows),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        assert "position_ids" in batch
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model.train(), batch)
            apart = trainer.model(**Collator()(texts(3, 9, 4, 7))).loss
        torch.testing.assert_close(loss, apart)


NOISELESS = {
    "sample_scaler": 1e-9,
    "kl_weight": 0.5,
    "guide": "mean_field",
    "alpha_init": "ones",
    "scale_init": 2.0,
    "prior_concentration": 2.0,
}
UNEQUAL = {
    "texts": (lambda: writer(**NOISELESS), texts(39, 2, 11)),
    "texts of gpt2": (lambda: writer("gpt2", **NOISELESS), texts(39, 2, 11)),
    "texts, the evidence bound": (bounded, texts(39, 2, 11)),
    "classes": (lambda: classifier(**NOISELESS), tiny_dataset(3)),
    "plain LoRA": (lambda: writer(sample_scaler=0.0), texts(39, 2, 11)),
    "numbers": (lambda: classifier(num_labels=1, **NOISELESS), numbers(3)),
    "choices": (lambda: writer(likelihood=ChoiceLikelihood("AB"), **NOISELESS), choices(3)),
}
COUNTED = [kind for kind in UNEQUAL if kind not in ("texts, the evidence bound", "numbers", "choices")]


class Gradients(TrainerCallback):
    """Those of the first step."""

    def __init__(self):
        self.values, self.logs = {}, []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        model.network.eval()
        self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(logs)


def without_dropout(bayes):
    for module in bayes.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return bayes


def assert_one_step(seen):
    """Gradients (of the guide: of the KL, which has next to no noise beside it) and logs of a step, split or not."""
    whole, split = seen
    assert any(gradient.abs().max() > 1e-4 for name, gradient in whole.values.items() if "lora_B" in name)
    for name, gradient in whole.values.items():
        torch.testing.assert_close(split.values[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for name in ("loss", *(name for name in whole.logs[0] if name.startswith("elbo/"))):
        assert split.logs[0][name] == pytest.approx(whole.logs[0][name], rel=1e-4), name


class TestAccumulation:
    """Batches of one step make the step of one batch."""

    @pytest.mark.parametrize("kind", UNEQUAL)
    def test_in_fit(self, kind, tmp_path):
        make, data = UNEQUAL[kind]
        seen = []
        for size, steps in ((3, 1), (2, 2)):
            seen.append(Gradients())
            fit(
                without_dropout(make()),
                data,
                output_dir=tmp_path / str(size),
                batch_size=size,
                max_steps=1,
                gradient_accumulation=steps,
                max_grad_norm=0.0,
                progress=False,
                callbacks=[seen[-1]],
            )
        assert_one_step(seen)

    @pytest.mark.parametrize("kind", UNEQUAL)
    def test_in_a_stock_trainer(self, kind, tmp_path):
        """Where Trainer cannot count what is averaged over, equal batches are still one batch."""
        make, data = UNEQUAL[kind]
        size, steps = (2, 2) if kind in COUNTED else (1, 3)
        seen = []
        for batch, accumulated in ((3, 1), (size, steps)):
            seen.append(Gradients())
            arguments = TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulated,
                max_steps=1,
                max_grad_norm=0.0,
                save_strategy="no",
                logging_steps=1,
                remove_unused_columns=False,
                **QUIET,
            )
            Trainer(without_dropout(make()), arguments, Collator(), data, callbacks=[seen[-1]]).train()
        assert_one_step(seen)

    def test_in_a_study_of_other_networks(self, tmp_path):
        found = []
        for size, steps in ((3, 1), (2, 2)):
            network = tiny_network(layers=1).eval()
            arguments = TrainingArguments(
                str(tmp_path),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=steps,
                max_steps=1,
                max_grad_norm=0.0,
                optim="sgd",
                learning_rate=1.0,
                warmup_steps=0,
                save_strategy="no",
                **QUIET,
            )
            trainer = PlainTrainer(
                without_dropout(network),
                arguments,
                make_optimizer=None,
                penalty=lambda net: net.classifier.bias.sum(),
                train_dataset=tiny_dataset(3),
                data_collator=Collator(),
            )
            trainer.train()
            found.append([p.detach() for p in network.parameters()])
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
        before = dict(tiny_network(layers=1).named_parameters())["classifier.weight"]
        assert (network.classifier.weight - before).abs().max() > 1e-3

    def test_shares_of_a_loop_of_one_s_own(self):
        bayes = without_dropout(writer(**NOISELESS)).train()
        data = texts(39, 2)
        whole = bayes(**Collator()(data)).loss
        parts = [bayes(**Collator()([text]), num_items_in_batch=41).loss for text in data]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)

    def test_a_merged_network_says_nothing_of_our_loss(self):
        merged = writer(likelihood=ChoiceLikelihood("AB")).merge()
        assert "accepts_loss_kwargs" not in vars(merged)


class TestLossesOfOthers:
    """A loss that is made of the mean's logits would train without noise and KL."""

    @pytest.mark.parametrize("way", ["label_smoothing_factor", "compute_loss_func", "a loop"])
    def test_are_refused_before_anything_is_trained(self, way, tmp_path):
        bayes = classifier()
        before = state(bayes)
        options = {"label_smoothing_factor": 0.1} if way == "label_smoothing_factor" else {}
        trainer = Trainer(
            bayes,
            TrainingArguments(str(tmp_path), max_steps=1, **QUIET, **options),
            Collator(),
            tiny_dataset(8),
            compute_loss_func=(lambda outputs, labels, **_: outputs.logits.sum()) if way != "a loop" else None,
        )

        def loop():
            bayes.train()(input_ids=tiny_batch()["input_ids"]).logits.sum().backward()

        with pytest.raises(InputError, match=r"without noise and KL.*label_smoothing_factor"):
            (loop if way == "a loop" else trainer.train)()
        assert_same_state(state(bayes), before)

    def test_gradients_of_the_mean_in_eval_mode_are_none(self):
        bayes = classifier().eval()
        bayes(input_ids=tiny_batch()["input_ids"]).logits.sum().backward()
        assert any(p.grad is not None for p in bayes.network.parameters())


FIT_OPTIONS = {"max_steps": 2, "batch_size": 4, "progress": False}
# Every field of TrainingArguments: fit's own argument (OWN), fit's argument of another name (WORD), fixed by fit (SET),
# or a value to try, refused or honoured as in transformers.
OWN, WORD, SET = object(), object(), object()
DECISIONS = {
    "output_dir": OWN,
    "max_steps": OWN,
    "learning_rate": OWN,
    "weight_decay": OWN,
    "max_grad_norm": OWN,
    "seed": OWN,
    "per_device_train_batch_size": WORD,
    "num_train_epochs": WORD,
    "lr_scheduler_type": WORD,
    "warmup_steps": WORD,
    "gradient_accumulation_steps": WORD,
    "metric_for_best_model": WORD,
    "disable_tqdm": WORD,
    "resume_from_checkpoint": WORD,
    "save_only_model": SET,
    "ignore_data_skip": SET,
    "restore_callback_states_from_checkpoint": SET,
    "fsdp": True,
    "deepspeed": SET,
    "parallelism_config": SET,
    "label_smoothing_factor": 0.1,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "optim_target_modules": "all-linear",
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "label_names": ["label"],
    "debug": "underflow_overflow",
    "auto_find_batch_size": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "batch_eval_metrics": True,
    "enable_jit_checkpoint": True,
    "save_on_each_node": True,
    "push_to_hub": True,
    "lr_scheduler_kwargs": {},
    "optim": "adafactor",
    "optim_args": "unknown=1",
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "average_tokens_across_devices": False,
    "bf16": True,
    "fp16": True,
    "tf32": False,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile": False,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "use_cache": True,
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 1,
    "logging_strategy": "epoch",
    "logging_steps": 1,
    "logging_first_step": True,
    "log_on_each_node": False,
    "logging_nan_inf_filter": True,
    "include_num_input_tokens_seen": "non_padding",
    "log_level": "error",
    "log_level_replica": "error",
    "report_to": "none",
    "run_name": "x",
    "project": "x",
    "trackio_space_id": "x",
    "trackio_bucket_id": "x",
    "trackio_static_space_id": "x",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_delay": 1,
    "per_device_eval_batch_size": 2,
    "prediction_loss_only": True,
    "eval_on_start": True,
    "eval_accumulation_steps": 1,
    "include_for_metrics": ["inputs"],
    "save_strategy": "best",
    "save_steps": 4,
    "save_total_limit": 1,
    "hub_token": "x",
    "hub_private_repo": True,
    "hub_model_id": "x",
    "hub_strategy": "end",
    "hub_always_push": True,
    "hub_revision": "x",
    "load_best_model_at_end": False,
    "greater_is_better": True,
    "full_determinism": False,
    "data_seed": 3,
    "use_cpu": True,
    "accelerator_config": {"split_batches": True},
    "dataloader_drop_last": True,
    "dataloader_num_workers": 0,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": False,
    "dataloader_prefetch_factor": None,
    "dataloader_multiprocessing_context": None,
    "dataloader_in_order": False,
    "remove_unused_columns": True,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "x",
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_backend": None,
    "ddp_timeout": 5,
    "fsdp_config": None,
    "skip_memory_metrics": False,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "local_rank": 0,
}
HONOURED = [n for n, v in DECISIONS.items() if v not in (OWN, WORD, SET) and n not in REFUSED_BY_FIT]
TOGETHER = ("hub_", "trackio_", "ddp_", "do_", "log_", "torch_compile")  # without effect on one process, or off
ALONE = [n for n in HONOURED if not n.startswith(TOGETHER) and DECISIONS[n] not in (False, None, 0, "x")]


def written(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else None


class TestArguments:
    """Each field of TrainingArguments means what it means in transformers, or is refused before a folder is made."""

    def test_every_field_is_decided(self):
        fields = {field.name for field in dataclasses.fields(TrainingArguments)}
        new = sorted(fields - set(DECISIONS))
        assert not new, (
            f"TrainingArguments has new fields, {new}: try each with fit, then enter it into DECISIONS here, and into "
            "bayeslora.training.arguments if it cannot be honoured"
        )
        refused = {name for name, value in DECISIONS.items() if value not in (OWN, WORD, SET)} - set(HONOURED)
        assert set(REFUSED_BY_FIT) == refused
        assert {name for name, value in DECISIONS.items() if value is WORD} == set(FIT_NAMES)
        own = set(inspect.signature(fit).parameters)
        assert {name for name, value in DECISIONS.items() if value is OWN} == own & fields
        assert set(FIT_NAMES.values()) <= own

    @pytest.mark.parametrize("names", [*([n] for n in ALONE), [n for n in HONOURED if n not in ALONE]], ids=str)
    def test_honoured(self, names, tmp_path):
        there = {field.name for field in dataclasses.fields(TrainingArguments)}
        options = FIT_OPTIONS | {name: DECISIONS[name] for name in names if name in there}
        result = fit(classifier(), tiny_dataset(8), tiny_dataset(8), output_dir=tmp_path, **options)
        assert result.steps == 2
        assert np.isfinite(result.metrics["eval_loss"])
        assert (tmp_path / "adapter").is_dir()

    @pytest.mark.parametrize("name", [*REFUSED_BY_FIT])
    def test_refused(self, name, tmp_path):
        with pytest.raises(InputError, match=rf"{name}=.* cannot be combined with bayeslora: \w"):
            fit(
                classifier(),
                tiny_dataset(8),
                tiny_dataset(8),
                output_dir=tmp_path / "run",
                **FIT_OPTIONS,
                **{name: DECISIONS[name]},
            )
        assert written(tmp_path / "run") is None

    @pytest.mark.parametrize("name", FIT_NAMES)
    def test_said_in_another_word(self, name, tmp_path):
        with pytest.raises(InputError, match=f"fit calls {name} {FIT_NAMES[name]}: "):
            fit(classifier(), tiny_dataset(8), output_dir=tmp_path / "run", **FIT_OPTIONS, **{name: 1})
        assert written(tmp_path / "run") is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"report_to": "wandb"}, "needs the package wandb: install it"),
            ({"report_to": ["tensorbored"]}, "tensorbored is not supported"),
            ({"optim": "galore_adamw"}, "optim='galore_adamw'"),
            ({"optim": "lomo"}, "optim='lomo'"),
            ({"optim": "no such"}, "no such"),
            ({"schedule": "polynomial", "lr_scheduler_kwargs": {"powers": 2}}, "'polynomial'.* 'powers'"),
            ({"schedule": "no such"}, "no such"),
            ({"dataloader_persistent_workers": True}, "needs dataloader_num_workers"),
            ({"dataloader_multiprocessing_context": "fork"}, "needs dataloader_num_workers"),
            ({"dataloader_prefetch_factor": 2}, "prefetch_factor"),
            ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}, "num_steps"),
            ({"accelerator_config": {"no such": 4}}, "no such"),
            ({"eval_strategy": "steps"}, "need an eval_dataset"),
            ({"no_such_argument": 1}, "no_such_argument"),
            ({"activation_checkpointing_kwargs": {"use_reentrant": True}}, "pass use_reentrant=False"),
        ],
    )
    def test_what_cannot_be_had_is_refused_and_the_folder_is_free(self, options, message, tmp_path):
        with pytest.raises(InputError, match=message):
            fit(classifier(), tiny_dataset(8), output_dir=tmp_path / "run", **FIT_OPTIONS | options)
        assert written(tmp_path / "run") in (None, [])
        fit(classifier(), tiny_dataset(8), output_dir=tmp_path / "run", **FIT_OPTIONS)

    def test_a_network_that_recomputes_reentrantly_is_refused_before_a_folder_is_made(self, tmp_path):
        bayes = classifier()
        bayes.network.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
        with pytest.raises(InputError, match="pass use_reentrant=False"):
            fit(bayes, tiny_dataset(8), output_dir=tmp_path / "run", **FIT_OPTIONS)
        assert written(tmp_path / "run") is None

    def test_what_only_trainer_can_find_out_leaves_the_folder_free(self, tmp_path):
        """Lengths of images cannot be told, which Trainer says when it makes its batches."""
        network = NETWORKS["vit"]()
        bayes = BayesLoRA(network, MonteCLoRAConfig(r=2, modules_to_save=["classifier"]))
        images = [{"pixel_values": torch.randn(1, 4, 4), "labels": i % 2} for i in range(8)]
        options = {"output_dir": tmp_path / "run", **FIT_OPTIONS}
        with pytest.raises(InputError, match="infer lengths"):
            fit(bayes, images, train_sampling_strategy="group_by_length", **options)
        with pytest.raises(InputError, match="neftune_noise_alpha is noise on token embeddings"):
            fit(bayes, images, neftune_noise_alpha=5.0, **options)
        assert written(tmp_path / "run") in (None, [])
        assert fit(bayes, images, **options).steps == 2

    def test_metrics_of_an_evaluation_that_computes_none(self, tmp_path):
        with pytest.raises(InputError, match=r"the loss alone, and best_metric is 'accuracy'"):
            fit(
                classifier(),
                tiny_dataset(8),
                tiny_dataset(8),
                output_dir=tmp_path / "run",
                best_metric="accuracy",
                prediction_loss_only=True,
                **FIT_OPTIONS,
            )
        with pytest.raises(InputError, match="drops all 6 examples"):
            fit(
                classifier(),
                tiny_dataset(8),
                tiny_dataset(6),
                output_dir=tmp_path / "run",
                dataloader_drop_last=True,
                **FIT_OPTIONS,
            )
        assert written(tmp_path / "run") is None

    def test_neftune_reaches_the_embeddings(self, tmp_path):
        losses = [
            fit(
                without_dropout(classifier(sample_scaler=0.0)),
                tiny_dataset(8),
                output_dir=tmp_path / str(alpha),
                neftune_noise_alpha=alpha,
                **FIT_OPTIONS,
            ).history[0]["loss"]
            for alpha in (None, 500.0)
        ]
        assert abs(losses[0] - losses[1]) > 1e-3


class TestComputeMetrics:
    """The caller's metrics beside ours, as Trainer has them."""

    @pytest.mark.parametrize("kind", ["classes", "numbers", "texts"])
    def test_they_are_in_the_results_and_choose_the_best(self, kind, tmp_path):
        make, data = UNEQUAL[kind]
        data, seen = data * 4, []

        def compute(prediction):
            assert len(prediction.predictions) == len(prediction.label_ids) == len(data)
            seen.append(prediction)
            return {"calls": float(-len(seen)), "eval_own": 0.5}

        bayes = make()
        result = fit(
            bayes,
            data,
            data,
            output_dir=tmp_path,
            epochs=2,
            batch_size=4,
            evaluations=3,
            progress=False,
            learning_rate=1e-2,
            compute_metrics=compute,
            best_metric="calls",
        )
        calls = [entry["eval_calls"] for entry in result.history if "eval_calls" in entry]
        assert calls == [-1.0, -2.0, -3.0]
        assert result.metrics["eval_own"] == 0.5
        assert ("eval_nll" in result.metrics) == (kind == "classes")
        losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
        assert result.metrics["eval_loss"] == losses[0]  # the best is the first, as larger is better
        assert abs(losses[2] - losses[0]) > 1e-4

    def test_smaller_can_be_better(self, tmp_path):
        values = iter([3.0, 1.0, 2.0])
        result = fit(
            classifier(),
            tiny_dataset(12),
            tiny_dataset(4),
            output_dir=tmp_path,
            max_steps=3,
            batch_size=4,
            evaluations=3,
            progress=False,
            compute_metrics=lambda _: {"distance": next(values)},
            best_metric="distance",
            greater_is_better=False,
        )
        losses = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
        assert result.metrics["eval_loss"] == losses[1] != losses[-1]
        assert result.checkpoint == 2

    @pytest.mark.parametrize("prefix", ["", "eval_"])
    def test_which_is_better_of_ours_is_known_under_both_names(self, prefix):
        better = {
            name: Metrics(classifier(), None, prefix + name).selection()["greater_is_better"]
            for name in ("loss", "accuracy", "nll", "ece", "brier", "aurc")
        }
        assert better.pop("accuracy")
        assert set(better.values()) == {False}
        with pytest.raises(InputError, match=r"no evaluation metric .*overconfidence"):  # no end of it is the better
            Metrics(classifier(), None, prefix + "overconfidence")

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("learning_rat", "did you mean learning_rate"),
            ("eval_data", "did you mean eval_dataset"),
            ("gradient_checkpoint", "gradient_checkpointing"),
            ("qqqq", "lists what there is"),
        ],
    )
    def test_an_argument_that_there_is_not(self, tmp_path, name, meant):
        with pytest.raises(InputError, match=f"has an argument '{name}': .*{meant}"):
            fit(classifier(), tiny_dataset(12), output_dir=tmp_path / "run", **{name: 1})
        assert not (tmp_path / "run").exists()

    def test_a_best_metric_that_there_is_not(self, tmp_path):
        with pytest.raises(InputError, match=r"no evaluation metric 'f1'; there are loss, predictive_nll, .*mine"):
            fit(
                classifier(),
                tiny_dataset(8),
                tiny_dataset(8),
                output_dir=tmp_path / "a",
                best_metric="f1",
                compute_metrics=lambda _: {"mine": 1.0},
                **FIT_OPTIONS,
            )
        with pytest.raises(InputError, match="no evaluation metric 'f1'; there are loss, accuracy"):
            fit(
                classifier(),
                tiny_dataset(8),
                tiny_dataset(8),
                output_dir=tmp_path / "b",
                best_metric="f1",
                **FIT_OPTIONS,
            )
        assert written(tmp_path / "b") is None
