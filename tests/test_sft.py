"""TRL's SFTTrainer trains a posterior: its data, our objective."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.language_data import encode_text
from tests.language import tiny_language_model, tiny_tokenizer

trl = pytest.importorskip("trl")
from bayeslora.sft import BayesSFTTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")  # TRL's own
RULE = {"cat": "north", "dog": "south", "ball": "up"}


def rows(count):
    animals = np.random.default_rng(0).choice(list(RULE), count)
    return Dataset.from_list([{"prompt": f"where is the {a}?", "completion": f" to the {RULE[a]}"} for a in animals])


def arguments(folder, **options):
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True}
    return trl.SFTConfig(output_dir=str(folder), max_length=32, gradient_checkpointing=False, **{**quiet, **options})


def trainer(folder, bayes, count=48, **options):
    return BayesSFTTrainer(bayes, args=arguments(folder, **options), train_dataset=rows(count),
                           processing_class=tiny_tokenizer())  # fmt: skip


def test_prompts_and_completions_are_learnt(tmp_path):
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4))
    before = [p.detach().clone() for p in bayes.guide.parameters()]
    sft = trainer(tmp_path, bayes, num_train_epochs=6, per_device_train_batch_size=8, learning_rate=2e-2,
                  save_strategy="epoch", save_total_limit=1)  # fmt: skip
    sft.train()
    texts = [encode_text(tiny_tokenizer(), f"where is the {a}?", f" to the {place}") for a, place in RULE.items()]
    assert bayes.predict(texts, num_samples=4, progress=False).nats_per_token < 0.5
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(before, bayes.guide.parameters(), strict=True))
    assert bayes.num_examples == 48
    saved = next(tmp_path.glob("checkpoint-*"))
    again = BayesLoRA.from_pretrained(saved, tiny_language_model())
    expected = bayes.predict(texts, num_samples=2, progress=False).sample_log_likelihood
    np.testing.assert_allclose(again.predict(texts, num_samples=2, progress=False).sample_log_likelihood, expected,
                               atol=1e-5)  # fmt: skip


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
        sft = trainer(tmp_path, bayes, count=4, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                      max_steps=1, learning_rate=1e-2, optim="sgd", max_grad_norm=0.0)  # fmt: skip
        sft.train()
        found.append(torch.cat([p.detach().flatten() for p in bayes.network.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)
