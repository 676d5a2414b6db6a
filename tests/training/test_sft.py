"""TRL's SFTTrainer trains a posterior: its data, our objective."""

import dataclasses

import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import Dataset

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.models import ChoiceLikelihood, Tuning
from bayeslora.tasks.encoding import encode_text
from bayeslora.training.arguments import REFUSED_BY_SFT
from tests.language import tiny_language_model, tiny_tokenizer

trl = pytest.importorskip("trl")
from bayeslora.training.sft import BayesSFTTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL's own
RULE = {"cat": "north", "dog": "south", "ball": "up"}


def rows(count):
    animals = np.random.default_rng(0).choice(list(RULE), count)
    return Dataset.from_list([{"prompt": f"where is the {a}?", "completion": f" to the {RULE[a]}"} for a in animals])


def arguments(folder, **options):
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True}
    quiet |= {"max_length": 32, "gradient_checkpointing": False}
    return trl.SFTConfig(output_dir=str(folder), **{**quiet, **options})


def trainer(folder, bayes, count=48, **options):
    return BayesSFTTrainer(
        bayes, args=arguments(folder, **options), train_dataset=rows(count), processing_class=tiny_tokenizer()
    )


def test_prompts_and_completions_are_learnt(tmp_path):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4))
    before = [p.detach().clone() for p in bayes.guide.parameters()]
    sft = trainer(
        tmp_path,
        bayes,
        num_train_epochs=6,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        save_strategy="epoch",
        save_total_limit=1,
    )
    sft.train()
    texts = [encode_text(tiny_tokenizer(), f"where is the {a}?", f" to the {place}") for a, place in RULE.items()]
    assert bayes.predict(texts, num_samples=4, progress=False).nats_per_token < 0.5
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(before, bayes.guide.parameters(), strict=True))
    assert bayes.num_examples == 48
    saved = next(tmp_path.glob("checkpoint-*"))
    again = BayesLoRA.from_pretrained(saved, tiny_language_model())
    expected = bayes.predict(texts, num_samples=2, progress=False).sample_log_likelihood
    np.testing.assert_allclose(
        again.predict(texts, num_samples=2, progress=False).sample_log_likelihood, expected, atol=1e-5
    )


def test_a_merged_draw_is_that_draw_afterwards(tmp_path):
    """TRL puts a forward of its own into the network, and a copy of that would run the network that it was made for."""
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4, sample_scaler=0.5))
    trainer(tmp_path, bayes, count=8, max_steps=4, learning_rate=2e-2).train()
    tokens = torch.tensor([[5, 6, 7, 8]])
    merged = bayes.eval().merge(draw=2).eval()
    with torch.no_grad(), bayes.as_draw(2) as network:
        torch.testing.assert_close(merged(tokens).logits, network(tokens).logits, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_the_module_on_the_completion_alone(tmp_path):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4, sample_scaler=0.0))
    sft = trainer(tmp_path, bayes, count=3, per_device_train_batch_size=3)
    batch = next(iter(sft.get_train_dataloader()))
    assert (batch["labels"] == -100).any()
    with torch.no_grad():
        loss = sft.compute_loss(sft.model.train(), batch)
        plain = bayes.network(**batch).loss
    torch.testing.assert_close(loss, plain)


def test_accumulation_divides_the_loss(tmp_path):
    found = []
    for size, steps in ((4, 1), (1, 4)):
        bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4, sample_scaler=0.0))
        sft = trainer(
            tmp_path,
            bayes,
            count=4,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=1e-2,
            optim="sgd",
            max_grad_norm=0.0,
        )
        sft.train()
        found.append(torch.cat([p.detach().flatten() for p in bayes.network.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


class Gradients(transformers.TrainerCallback):
    """Those of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.values = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


NOISELESS = {
    "sample_scaler": 1e-9,
    "kl_weight": 0.5,
    "guide": "mean_field",
    "alpha_init": "ones",
    "scale_init": 2.0,
    "prior_concentration": 2.0,
}


def unequal():
    """Texts that score 39, 2 and 11 tokens."""
    tokens = [[7 + index, *range(3, 3 + length)] for index, length in enumerate((39, 2, 11))]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in tokens])


@pytest.mark.parametrize("options", [NOISELESS, {"sample_scaler": 0.0}], ids=["KL", "plain LoRA"])
def test_accumulated_texts_weigh_by_their_tokens(options, tmp_path):
    found = []
    for size, steps in ((3, 1), (2, 2), (1, 3)):
        bayes, seen = BayesLoRA(tiny_language_model(layers=1), MonteCLoRAConfig(r=4, **options)), Gradients()
        settings = arguments(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            max_grad_norm=0.0,
            max_length=64,
        )
        BayesSFTTrainer(
            bayes, settings, train_dataset=unequal(), processing_class=tiny_tokenizer(), callbacks=[seen]
        ).train()
        found.append(seen.values)
    assert any(gradient.abs().max() > 1e-3 for gradient in found[0].values())
    for split in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(split[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_best_checkpoint_comes_back_with_the_tokenizer_beside_it(tmp_path):
    bayes = BayesLoRA(tiny_language_model(layers=1), MonteCLoRAConfig(r=4))
    settings = arguments(
        tmp_path,
        max_steps=4,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        learning_rate=3e-2,
    )
    sft = BayesSFTTrainer(
        bayes, settings, train_dataset=rows(8), eval_dataset=rows(4), processing_class=tiny_tokenizer()
    )
    sft.train()
    best = tmp_path / "checkpoint-2"  # of the larger loss
    assert sft.state.best_model_checkpoint == str(best)
    again = BayesLoRA.from_pretrained(best, tiny_language_model(layers=1)).state_dict()
    assert [n for n, value in bayes.state_dict().items() if not torch.equal(value, again[n])] == []
    assert transformers.AutoTokenizer.from_pretrained(best).vocab_size == tiny_tokenizer().vocab_size
    sft.save_model(str(tmp_path / "saved"))
    peft.PeftModel.from_pretrained(tiny_language_model(layers=1), tmp_path / "saved")


def test_with_gradient_checkpointing_which_is_trl_s_default(tmp_path):
    found = []
    for checkpointing in (False, True):
        bayes, seen = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4)), Gradients()
        settings = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, gradient_checkpointing=checkpointing)
        BayesSFTTrainer(
            bayes, settings, train_dataset=rows(4), processing_class=tiny_tokenizer(), callbacks=[seen]
        ).train()
        found.append(seen.values)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_trl_s_own_trainer_is_refused_before_anything_is_trained(tmp_path):
    bayes = BayesLoRA(tiny_language_model(layers=1), MonteCLoRAConfig(r=4))
    before = {name: value.clone() for name, value in bayes.state_dict().items()}
    stock = trl.SFTTrainer(
        bayes, arguments(tmp_path, max_steps=1), train_dataset=rows(4), processing_class=tiny_tokenizer()
    )
    with pytest.raises(InputError, match=r"use bayeslora\.training\.sft\.BayesSFTTrainer"):
        stock.train()
    assert all(torch.equal(value, before[name]) for name, value in bayes.state_dict().items())


@pytest.mark.parametrize("options", [{"packing": True}, {"packing": True, "packing_strategy": "wrapped"}], ids=str)
@pytest.mark.filterwarnings("ignore")  # TRL's advice on attention kernels, which are not for a CPU
def test_packed_rows_train(options, tmp_path):
    bayes = BayesLoRA(tiny_language_model(layers=1), MonteCLoRAConfig(r=4))
    sft = trainer(
        tmp_path,
        bayes,
        num_train_epochs=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        logging_steps=1,
        **options,
    )
    sft.train()
    losses = [entry["loss"] for entry in sft.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 1


def test_plain_training_arguments_are_taken(tmp_path):
    bayes = BayesLoRA(tiny_language_model(layers=1), MonteCLoRAConfig(r=4))
    settings = transformers.TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True)
    sft = BayesSFTTrainer(bayes, settings, train_dataset=rows(4), processing_class=tiny_tokenizer())
    assert sft.train().global_step == 1


def test_a_tuned_width_ends_with_a_warning(tmp_path, caplog):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4))
    bayes.tuning = Tuning(width=0.5)
    trainer(tmp_path, bayes, count=4, max_steps=1).train()
    assert bayes.tuning is None
    assert "width tuned to 0.5: that is for the adapter as it was" in caplog.text


class TestRefused:
    """Before anything is made, with what to pass instead."""

    def refuse(self, message, model=None, settings=None, **options):
        bayes = model or BayesLoRA(tiny_language_model(layers=1), MonteCLoRAConfig(r=4))
        with pytest.raises(InputError, match=message):
            BayesSFTTrainer(bayes, settings, train_dataset=rows(4), processing_class=tiny_tokenizer(), **options)

    def test_other_models(self):
        network = tiny_language_model(layers=1)
        message = r"model is a LlamaForCausalLM: pass model=BayesLoRA\(network, MonteCLoRAConfig"
        self.refuse(message, network)
        self.refuse(message, network, peft_config=peft.LoraConfig(r=2))
        chooses = BayesLoRA(network, MonteCLoRAConfig(r=4), likelihood=ChoiceLikelihood("AB"))
        self.refuse("the likelihood is a ChoiceLikelihood", chooses)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("peft_config", peft.LoraConfig(r=2)),
            ("compute_loss_func", print),
            ("quantization_config", transformers.BitsAndBytesConfig()),
        ],
    )
    def test_options(self, name, value):
        self.refuse(f"{name} cannot be combined", **{name: value})

    @pytest.mark.parametrize("field", sorted(REFUSED_BY_SFT))
    def test_fields(self, field, tmp_path):
        value = {
            "label_smoothing_factor": 0.1,
            "loss_type": "dft",
            "debug": "underflow_overflow",
            "label_names": ["x"],
            "router_aux_loss_coef": 0.1,
        }.get(field, True)
        settings = arguments(tmp_path)
        setattr(settings, field, value)
        self.refuse(f"{field}=.* cannot be combined", settings=settings)

    def test_what_would_change_the_network(self, tmp_path):
        self.refuse("is a model, whose tokens", settings=arguments(tmp_path, chat_template_path="some/model"))
        selective = {"gradient_checkpointing_kwargs": {"selective": True}}
        self.refuse("leave 'selective' out", settings=arguments(tmp_path, **selective))

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="there is somewhere to offload from")
    def test_offloading_from_nowhere(self, tmp_path):
        self.refuse("there is no accelerator", settings=arguments(tmp_path, activation_offloading=True))

    def test_an_integration_that_is_not_installed(self, tmp_path):
        self.refuse("needs the package wandb", settings=arguments(tmp_path, report_to="wandb"))


# Every field of SFTConfig that TrainingArguments does not have: a value to try, or None where other tests do.
FIELDS = {
    "model_init_kwargs": None,
    "trust_remote_code": None,
    "chat_template_path": None,
    "dataset_text_field": "words",
    "dataset_kwargs": {},
    "dataset_num_proc": 1,
    "eos_token": "[end]",
    "pad_token": "[end]",
    "max_length": 16,
    "truncation_mode": "keep_end",
    "shuffle_dataset": True,
    "packing": None,
    "packing_strategy": "bfd_split",
    "padding_free": None,
    "pad_to_multiple_of": 8,
    "eval_packing": None,
    "completion_only_loss": False,
    "assistant_only_loss": None,
    "activation_offloading": None,
    "loss_type": None,
    "router_aux_loss_coef": None,
}


def test_every_field_of_trl_is_decided():
    ours = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    new = sorted(ours - {field.name for field in dataclasses.fields(transformers.TrainingArguments)} - set(FIELDS))
    assert not new, (
        f"SFTConfig has new fields, {new}: try each with BayesSFTTrainer, then enter it into FIELDS here, and into "
        "bayeslora.training.arguments if it cannot be honoured"
    )


@pytest.mark.filterwarnings("ignore:.* deprecated and will be removed:FutureWarning")  # by TRL
@pytest.mark.parametrize("name", [name for name, value in FIELDS.items() if value is not None])
def test_fields_that_prepare_the_data(name, tmp_path):
    bayes = BayesLoRA(tiny_language_model(layers=1), MonteCLoRAConfig(r=4))
    sft = trainer(tmp_path, bayes, 4, max_steps=1, **{name: FIELDS[name]})
    assert sft.train().global_step == 1


@pytest.mark.filterwarnings("ignore")  # TRL's advice on attention kernels, which are not for a CPU
def test_texts_without_padding_have_the_same_loss(tmp_path):
    losses = []
    for padding_free in (False, True):
        bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4, sample_scaler=0.0))
        sft = trainer(
            tmp_path,
            bayes,
            4,
            max_steps=1,
            per_device_train_batch_size=4,
            padding_free=padding_free,
            max_length=None,
            logging_steps=1,
        )
        sft.train()
        losses.append(sft.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
