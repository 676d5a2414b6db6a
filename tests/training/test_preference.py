"""TRL's trainers on pairs of texts: a reward model and DPO, on a posterior."""

import numpy as np
import peft
import pytest
import torch
import transformers
from datasets import Dataset

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from tests.language import tiny_language_model, tiny_tokenizer

trl = pytest.importorskip("trl")
from bayeslora.training.preference import BayesDPOTrainer, BayesRewardTrainer, drawn_outputs  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # TRL's own
NOISELESS = MonteCLoRAConfig(r=4, sample_scaler=0.0)
QUIET = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "bf16": False, "use_cpu": True}
QUIET |= {"max_length": 32, "gradient_checkpointing": False, "logging_steps": 1}


def pairs(count=24):
    """The cat is to the north, whatever is asked."""
    asked = np.random.default_rng(0).choice(["cat", "dog", "ball"], count)
    return Dataset.from_list(
        [{"prompt": f"where is the {a}?", "chosen": " to the north", "rejected": " to the south"} for a in asked]
    )


def reward_network(seed=0):
    torch.manual_seed(seed)
    config = tiny_language_model(layers=2).config
    config.num_labels = 1
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


KINDS = {
    "reward": (BayesRewardTrainer, trl.RewardTrainer, trl.RewardConfig, reward_network),
    "dpo": (BayesDPOTrainer, trl.DPOTrainer, trl.DPOConfig, tiny_language_model),
}


def build(kind, folder, config, *, network=None, data=None, **options):
    ours, _, arguments, make = KINDS[kind]
    bayes = BayesLoRA(make() if network is None else network, config)
    asked = arguments(str(folder), **{**QUIET, **options})
    return ours(bayes, args=asked, train_dataset=data or pairs(), processing_class=tiny_tokenizer())


def batch_of(trainer, size=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(size)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_type", [None, "ipo"])
def test_at_epsilon_0_the_objective_is_trl_s_own(kind, loss_type, tmp_path):
    """The same adapter, on the same batch: loss and gradients."""
    _, theirs, arguments, make = KINDS[kind]
    options = {"loss_type": [loss_type]} if loss_type and kind == "dpo" else {}
    ours = build(kind, tmp_path, NOISELESS, **options)
    for group in ours.bayes.model.groups:
        for adapter in group.adapters:
            torch.nn.init.normal_(adapter.layer.lora_B["default"].weight, std=0.1)
    ours.bayes.save_pretrained(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter", is_trainable=True)
    asked = arguments(str(tmp_path), **QUIET, **options)
    reference = {"ref_model": make()} if kind == "dpo" else {}  # TRL would refer to a copy of the adapter
    stock = theirs(plain, args=asked, train_dataset=pairs(), processing_class=tiny_tokenizer(), **reference)
    losses = []
    for trainer in (ours, stock):
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer)))
        losses[-1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    assert losses[1].item() != pytest.approx(np.log(2), rel=1e-3)
    found = {name.removeprefix("network."): p.grad for name, p in ours.bayes.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert any("lora_A" in name for name in expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_the_pairs_and_trains_the_posterior(kind, checkpointing, tmp_path):
    trainer = build(
        kind,
        tmp_path,
        MonteCLoRAConfig(r=4, sample_scaler=0.05),
        max_steps=12,
        learning_rate=2e-2,
        per_device_train_batch_size=4,
        gradient_checkpointing=checkpointing,
    )
    before = [parameter.detach().clone() for parameter in trainer.bayes.guide.parameters()]
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["elbo/task"] < 0.5 * logs[0]["elbo/task"]
    parts = logs[-1]
    assert parts["loss"] == pytest.approx(
        parts["elbo/task"]
        + trainer.bayes.elbo.kl_weight * parts["elbo/kl"]
        + trainer.bayes.elbo.cooperation * parts["elbo/cooperation"],
        abs=2e-4,
    )
    assert trainer.bayes.num_examples == 24
    after = trainer.bayes.guide.parameters()
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(before, after, strict=True))


def test_rewards_have_a_standard_deviation_and_the_checkpoint_has_it_too(tmp_path):
    options = {"max_steps": 8, "learning_rate": 2e-2, "per_device_train_batch_size": 4, "save_strategy": "steps"}
    trainer = build("reward", tmp_path, MonteCLoRAConfig(r=4, sample_scaler=0.2), save_steps=8, **options)
    trainer.train()
    texts = [{"input_ids": tiny_tokenizer()(f"where is the cat? to the {p}")["input_ids"]} for p in ("north", "south")]
    texts = [text | {"attention_mask": [1] * len(text["input_ids"])} for text in texts]
    rewards = trainer.bayes.predict(texts, num_samples=8, progress=False).sample_means
    assert (rewards.std(0) > 1e-3).all()
    assert rewards.mean(0)[0] > rewards.mean(0)[1]
    again = BayesLoRA.from_pretrained(tmp_path / "checkpoint-8", reward_network())
    found = again.predict(texts, num_samples=8, progress=False).sample_means
    np.testing.assert_allclose(found, rewards, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", ["shared", "per_example"])
def test_both_texts_of_a_pair_see_one_draw(kind, noise, tmp_path):
    """A pair of equal texts is equal in every draw; with noise of their own, two equal pairs are not."""
    config = MonteCLoRAConfig.preset("constant").replace(r=4, sample_scaler=0.5, noise=noise)
    trainer = build(kind, tmp_path, config)
    bayes = trainer.bayes
    for group in bayes.model.groups:
        for adapter in group.adapters:
            torch.nn.init.normal_(adapter.layer.lora_B["default"].weight)
    tokens = torch.tensor([[5, 6, 7, 8]]).expand(4, -1)
    output, penalty = drawn_outputs(bayes.train(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    first, second = output.logits.detach().flatten(1).chunk(2)
    torch.testing.assert_close(first, second)
    assert torch.equal(first[0], first[1]) == (noise == "shared")
    assert penalty.requires_grad


def test_the_reference_is_the_network_without_the_adapter(tmp_path):
    """While the policy is a draw, and layers of its backward pass are still to be run again."""
    trainer = build("dpo", tmp_path, MonteCLoRAConfig(r=4, sample_scaler=0.5), gradient_checkpointing=True)
    assert set(trainer.bayes.peft_config) == {"default"}
    batch = batch_of(trainer)
    trainer.model.train()
    expected = trainer.compute_loss(trainer.model, dict(batch))
    expected.backward()  # with recomputed layers
    assert trainer._metrics["train"]["rewards/chosen"][-1] == pytest.approx(0, abs=1e-5)  # B is zero at the start


def test_a_merged_draw_of_a_trained_policy_is_that_draw(tmp_path):
    """Not the network that TRL has put a forward of its own into."""
    trainer = build("dpo", tmp_path, MonteCLoRAConfig(r=4, sample_scaler=0.5), max_steps=4, learning_rate=2e-2)
    trainer.train()
    bayes, tokens = trainer.bayes.eval(), torch.tensor([[5, 6, 7, 8]])
    merged = bayes.merge(draw=2).eval()
    with torch.no_grad(), bayes.as_draw(2) as network:
        expected = network(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(bayes.network(tokens).logits, expected, atol=1e-3)


def test_evaluation_is_at_the_mean(tmp_path):
    trainer = build("reward", tmp_path, MonteCLoRAConfig(r=4, sample_scaler=0.5))
    losses = [trainer.evaluate(pairs(8))["eval_loss"] for _ in range(2)]
    assert losses[0] == losses[1]
    assert "eval_elbo/kl" not in trainer.state.log_history[-1]


class TestRefused:
    @pytest.mark.parametrize("kind", KINDS)
    def test_other_models(self, kind, tmp_path):
        ours, _, arguments, make = KINDS[kind]
        other = KINDS["dpo" if kind == "reward" else "reward"][3]
        asked = {"args": arguments(str(tmp_path), **QUIET), "train_dataset": pairs(4)}
        asked["processing_class"] = tiny_tokenizer()
        with pytest.raises(InputError, match="fits a BayesLoRA, and model is a Llama"):
            ours(make(), **asked)
        with pytest.raises(InputError, match=r"load (the network|it) with AutoModelFor"):
            ours(BayesLoRA(other(), NOISELESS), **asked)
        with pytest.raises(InputError, match="peft_config cannot be combined"):
            ours(BayesLoRA(make(), NOISELESS), peft_config=peft.LoraConfig(r=2), **asked)
        with pytest.raises(InputError, match="num_particles=1"):
            ours(BayesLoRA(make(), MonteCLoRAConfig(r=2, num_particles=2)), **asked)

    @pytest.mark.parametrize("name", ["precompute_ref_log_probs", "torch_compile"])
    def test_fields(self, name, tmp_path):
        with pytest.raises(InputError, match=f"{name}=True cannot be combined"):
            build("dpo", tmp_path, NOISELESS, **{name: True})

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_fused_kernel(self, kind, tmp_path):
        trainer = build(kind, tmp_path, MonteCLoRAConfig(r=4), max_steps=1)
        adapter = trainer.bayes.model.groups[0].adapters[0]
        layer, a, b = adapter.layer, adapter.lora_A, adapter.layer.lora_B["default"]
        layer.forward = lambda x: layer.base_layer(x) + torch.nn.functional.linear(x, b.weight @ a.weight)
        with pytest.raises(InputError, match="the draw did not arrive in"):
            trainer.train()
