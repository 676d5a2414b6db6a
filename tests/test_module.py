"""BayesLoRA on tiny networks of real architectures: what goes silently wrong elsewhere cannot go wrong here."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributions import kl_divergence
from transformers import Trainer, TrainingArguments

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig
from bayeslora.distributions import WishartCholesky, expected_column_kl
from bayeslora.inference.draws import sample_sites
from tests.conftest import tiny_batch, tiny_dataset, tiny_network
from tests.modules import inputs_only, module, randomize_b

KINDS = ["bert", "roberta", "gpt2", "llama"]


@pytest.mark.parametrize("guide", ["amortized", "mean_field"])
@pytest.mark.parametrize("kind", KINDS)
def test_task_gradient_reaches_mean_b_v_and_alpha(kind, guide):
    """With the KL and the cooperative loss switched off only the data speak, and every part must hear them.

    A posterior whose v and α get no gradient from the data learns nothing of them, however long it is trained.
    """
    bayes = randomize_b(module(kind, guide=guide, kl_weight=0.0, cooperation=0.0))
    bayes(**tiny_batch()).loss.backward()
    by_kind = {"lora_A": [], "lora_B": [], "guide": []}
    for name, parameter in bayes.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            for kind_of, found in by_kind.items():
                if kind_of in name:
                    found.append(float(parameter.grad.abs().max()))
    assert min(by_kind["lora_A"]) > 0
    assert min(by_kind["lora_B"]) > 0
    assert max(by_kind["guide"]) > 0
    if guide == "mean_field":
        for group in bayes.model.groups:  # every adapter's v and α, each on its own
            for parameter in bayes.guide.variational_parameters(group):
                assert (parameter.grad.abs().amax(-1) > 0).all()


def test_forward_changes_no_parameter():
    """A must not walk by itself, as it does, even without data, where each forward pass writes its draw into A."""
    bayes = module()
    before = {name: value.clone() for name, value in bayes.state_dict().items()}
    for _ in range(3):
        bayes(**tiny_batch())
    for name, value in bayes.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_optimizer_step_moves_every_trained_parameter():
    """Where a forward pass puts a new tensor in A's place, the optimizer keeps the old one: step() changes A by 0.0."""
    bayes = randomize_b(module(guide="mean_field"))
    before = {n: p.detach().clone() for n, p in bayes.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in bayes.parameters() if p.requires_grad], lr=1e-2)
    bayes(**tiny_batch()).loss.backward()
    optimizer.step()
    still = [n for n, p in bayes.named_parameters() if n in before and torch.equal(p, before[n])]
    assert still == []


@pytest.mark.parametrize("components", ["collapsed", "explicit"])
@pytest.mark.parametrize("mixture", ["dense", "sparse"])
def test_spread_of_the_draws(components, mixture):
    """sd = ε·sqrt(E[Σ_k w_k²]·E[Σ_jj]): ε once, the whole covariance.

    With ε applied twice a draw hardly changes A; without its off-diagonal entries Σ loses a third of its mass.
    """
    draws, epsilon = 400, 0.05
    bayes = module(
        guide="mean_field",
        components=components,
        mixture=mixture,
        alpha_init="ones",
        target_modules=["query"],
        scale_init=0.5,
        degrees_of_freedom=3.0,
    )
    group = bayes.model.groups[0]
    drawn = [bayes.model.matrices(sites)[group.name] for sites in sample_sites(bayes, draws, seed=1)]
    deviations = (torch.stack(drawn) - group.mean()).detach()  # (draws, adapters, columns, r)
    simplex = torch.distributions.Dirichlet(torch.ones(3)).sample((200_000,))
    active = simplex.square().sum(-1).mean() if mixture == "dense" else simplex.amax(-1).square().mean()
    expected = epsilon**2 * active * 3.0 * 0.5  # ε²·E[Σ w²]·ν·v
    per_draw = deviations.square().mean((1, 2, 3))
    assert abs(per_draw.mean() - expected) <= 5 * per_draw.std() / math.sqrt(draws)
    correlation = (deviations[..., 0] * deviations[..., 1]).mean(-1)  # Σ_01 of each draw and adapter
    assert correlation.std() > 0.2 * expected  # full covariance: zero on average, not in each draw
    assert abs(correlation.mean()) <= 5 * correlation.std() / math.sqrt(correlation.numel())


class TestPlainLoRA:
    """ε = 0, or sampling off: PEFT's plain LoRA bit for bit, and after one optimizer step to 1e-6."""

    def pair(self, kind, **options):
        bayes = module(kind, lora_alpha=4, **options)
        lora = LoraConfig(
            r=2, lora_alpha=4, target_modules="all-linear", task_type="SEQ_CLS", fan_in_fan_out=kind == "gpt2"
        )
        plain = get_peft_model(tiny_network(kind), lora).train()
        plain.load_state_dict(randomize_b(bayes).network.state_dict())
        return bayes, plain

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("how", ["epsilon_zero", "switched_off", "eval"])
    def test_outputs_are_bit_equal(self, kind, how):
        bayes, plain = self.pair(kind, sample_scaler=0.0 if how == "epsilon_zero" else 0.05)
        bayes.network.eval(), plain.eval()  # no dropout
        batch = tiny_batch()
        if how == "switched_off":
            bayes.training = True
            with bayes.without_sampling():
                logits = bayes(**batch).logits
        else:
            bayes.training = how == "epsilon_zero"
            logits = bayes(**batch).logits
        assert torch.equal(logits, plain(**inputs_only(batch)).logits)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_optimizer_step(self, kind):
        bayes, plain = self.pair(kind, sample_scaler=0.0)
        bayes.network.eval(), plain.eval()
        batch = tiny_batch()
        for network, run in ((plain, plain), (bayes.network, bayes)):
            optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
            run(**batch).loss.backward()
            optimizer.step()
        ours = dict(bayes.network.named_parameters())
        moved = 0
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(ours[name], parameter, rtol=1e-6, atol=1e-6)
                moved += int(parameter.grad.abs().max() > 0)
        assert moved > 4

    def test_guide_is_not_trained_at_epsilon_zero(self):
        bayes = module(sample_scaler=0.0)
        bayes(**tiny_batch()).loss.backward()
        assert all(p.grad is None and not p.requires_grad for p in bayes.guide.parameters())


class TestOneDrawOneFunction:
    """One draw is one network, for every token of every sequence; without the adapters no noise stays behind."""

    def test_every_token_and_example_sees_the_same_weight(self):
        bayes = randomize_b(module(noise="shared")).eval()
        bayes.training = True  # sampling without dropout
        one = inputs_only(tiny_batch(1))
        twice = {name: value.repeat(4, 1) for name, value in one.items()} | {"labels": torch.zeros(4).long()}
        logits = bayes(**twice).logits
        torch.testing.assert_close(logits, logits[:1].expand(4, -1))
        other = bayes(**twice).logits
        assert not torch.allclose(other, logits)

    def test_disabled_adapter_is_the_base_model(self):
        bayes, batch = randomize_b(module()), tiny_batch()
        base = tiny_network().eval()
        base.classifier.load_state_dict(bayes.network.get_base_model().classifier.original_module.state_dict())
        bayes.eval()
        with bayes.disable_adapter():
            disabled = bayes(**inputs_only(batch)).logits
            bayes.training = True
            sampled = bayes(**batch).logits
        expected = base(**inputs_only(batch)).logits
        assert torch.equal(disabled, expected)
        torch.testing.assert_close(sampled, expected)

    def test_no_draw_is_left_behind(self):
        bayes, batch = randomize_b(module()), tiny_batch()
        bayes(**batch)
        bayes.network.eval()
        after = bayes.network(**inputs_only(batch)).logits
        assert torch.equal(after, bayes.eval()(**inputs_only(batch)).logits)


@pytest.mark.slow
def test_data_driven_posterior():
    """Labels decide v, far more than seeds do; without data it stays at the prior.

    Where the KL drowns the task's gradient, v is the same whatever the labels are: the data never reach the posterior.
    The mean network is fitted to one labelling and then held fixed. Noise harms those labels and softens the
    errors on the flipped ones, so the two posteriors must part.
    """
    batch = tiny_batch(12)
    fitted = randomize_b(
        module(guide="mean_field", alpha_init="ones", sample_scaler=0.3, kl_weight=1e-5, target_modules=["query"])
    )
    fitted.network.eval()
    optimizer = torch.optim.Adam([p for p in fitted.network.parameters() if p.requires_grad], lr=0.02)
    with fitted.without_sampling():
        for _ in range(60):
            optimizer.zero_grad()
            fitted(**batch).loss.backward()
            optimizer.step()

    def learned(labels, seed):
        bayes = copy.deepcopy(fitted)
        parameters = list(bayes.guide.parameters())
        optimizer = torch.optim.Adam(parameters, lr=0.02)
        torch.manual_seed(seed)
        for _ in range(120):
            optimizer.zero_grad()
            loss = bayes(**batch | {"labels": labels}).loss if labels is not None else _kl_only(bayes)
            loss.backward()
            optimizer.step()
        return bayes.guide.log_v_r2_in16.detach().flatten()

    def _kl_only(bayes):
        posterior = WishartCholesky(2, bayes.guide.log_v_r2_in16.exp())
        prior = WishartCholesky(2, torch.ones_like(posterior.scale))
        return (kl_divergence(posterior, prior) + 3 * expected_column_kl(posterior)).mean()

    labels = batch["labels"]
    runs = {
        name: torch.stack([learned(y, seed) for seed in (0, 1, 2)])
        for name, y in (("fitted", labels), ("flipped", 1 - labels), ("none", None))
    }
    spread = max(float((run - run.mean(0)).norm(dim=-1).max()) for run in runs.values())
    means = {name: run.mean(0) for name, run in runs.items()}
    assert (means["fitted"] - means["flipped"]).norm() > 3 * spread
    assert (means["fitted"] - means["none"]).norm() > 3 * spread
    assert means["fitted"].mean() < means["none"].mean() < means["flipped"].mean()
    start = fitted.guide.log_v_r2_in16.detach().flatten()
    assert (means["none"] - start).abs().max() < 0.01  # v starts where the KL is smallest


def checkpointed_gradients(checkpointed, *, by_hand=False, pyro_svi=False, **options):
    """Gradients of one seeded step."""
    bayes = randomize_b(module("bert", **options)).eval()
    network = bayes.network.get_base_model() if by_hand else bayes
    if checkpointed:
        network.activation_checkpointing_enable()
    for part in bayes.modules():
        part.training = not isinstance(part, torch.nn.Dropout)  # checkpointing needs training mode
    torch.manual_seed(7)
    if pyro_svi:
        bayes.elbo.differentiable_loss(bayes.model.joint, bayes.guide.forward, **tiny_batch()).backward()
    else:
        bayes(**tiny_batch()).loss.backward()
    return {n: p.grad.clone() for n, p in bayes.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options",
    [{"noise": "shared"}, {"noise": "per_example"}, {"components": "explicit"}, {"pyro_svi": True}, {"by_hand": True}],
    ids=str,
)
def test_checkpointed_layers_recompute_the_same_draw(options):
    """Layers recomputed with noise of their own would give gradients of another function, and no error.

    ``by_hand`` switches checkpointing on in the network, behind our back.
    """
    expected, found = checkpointed_gradients(False, **options), checkpointed_gradients(True, **options)
    for name, gradient in expected.items():
        assert gradient.any() or "lora_A" not in name
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


def test_checkpointing_with_several_particles_is_refused():
    """Recomputed layers could only see the last particle's draw."""
    bayes = module(num_particles=2)
    bayes.activation_checkpointing_enable()
    with pytest.raises(InputError, match="accumulat"):
        bayes(**tiny_batch())


def switch_on(module, options):
    module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)


class TestReentrantCheckpointing:
    """Its first backward pass would free the graph that all blocks share."""

    refused = staticmethod(lambda: pytest.raises(InputError, match="pass use_reentrant=False"))

    def test_switched_on_in_the_module(self):
        bayes = module()
        with self.refused():
            switch_on(bayes, {"use_reentrant": True})
        assert not bayes.model.recomputes()
        switch_on(bayes, {"preserve_rng_state": False})  # torch's own default would be reentrant
        bayes(**tiny_batch()).loss.backward()

    @pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=str)
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("by", ["call", "svi"])
    def test_switched_on_in_the_network(self, when, options, by):
        network = tiny_network()
        if when == "before":
            switch_on(network, options)
        bayes = BayesLoRA(network, MonteCLoRAConfig(r=2)).train()
        if when == "after":
            switch_on(network, options)
        with self.refused():
            if by == "call":
                bayes(**tiny_batch())
            else:
                bayes.elbo.differentiable_loss(bayes.model.joint, bayes.guide.forward, **tiny_batch())
        assert bayes.predict(tiny_dataset(4), num_samples=2).probs.shape == (4, 2)

    def test_in_a_stock_trainer(self, tmp_path):
        options = {"use_reentrant": True}
        arguments = TrainingArguments(
            str(tmp_path), activation_checkpointing=True, activation_checkpointing_kwargs=options, report_to="none"
        )
        with self.refused():
            Trainer(module(), arguments, train_dataset=tiny_dataset(4)).train()


def test_deepcopy_after_a_step_gives_an_independent_equal():
    """A draw left on the module is part of an autograd graph, which deepcopy refuses."""
    bayes = randomize_b(module())
    bayes(**tiny_batch()).loss.backward()
    twin = copy.deepcopy(bayes)
    assert twin.model.network is twin.network
    assert twin.guide.model is twin.model
    torch.manual_seed(3)
    first = bayes(**tiny_batch())
    torch.manual_seed(3)
    second = twin(**tiny_batch())
    assert torch.equal(first.loss, second.loss)
    name, parameter = next((n, p) for n, p in twin.network.named_parameters() if p.requires_grad)
    with torch.no_grad():
        parameter.add_(1.0)
    assert not torch.equal(bayes.network.get_parameter(name), parameter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_adapters_keep_the_factors_in_float32(dtype):
    """A Wishart draw with ν = r is too badly conditioned for bfloat16, where its Cholesky often fails."""
    bayes = module(r=4)
    bayes.network.to(dtype)
    output = bayes(**tiny_batch())
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(v.dtype == torch.float32 for v in bayes.sample(2, seed=0).values())
    assert all(torch.isfinite(p.grad).all() for p in bayes.guide.parameters())


def test_no_buffers_beyond_the_adapters_descriptions():
    """Nothing per layer beside r + N numbers: buffers of noise drawn in advance can outgrow the network itself."""
    bayes, plain = (
        module(guide="mean_field"),
        get_peft_model(tiny_network(), LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS")),
    )
    size = lambda m: sum(t.numel() for t in [*m.parameters(), *m.buffers()])  # noqa: E731
    adapters = len(bayes.adapter_names)
    assert size(bayes) - size(plain) == adapters * (2 + 3)


class TestPostHoc:
    def test_only_the_posterior_is_trained(self):
        bayes = module(mode="post_hoc")
        trained = {n.split(".")[0] for n, p in bayes.named_parameters() if p.requires_grad}
        assert trained == {"guide"}
        bayes(**tiny_batch()).loss.backward()

    def test_on_a_trained_peft_model_with_its_own_words(self):
        lora = LoraConfig(r=4, lora_alpha=3, target_modules=["key"], task_type="SEQ_CLS")
        bayes = BayesLoRA(get_peft_model(tiny_network(), lora), MonteCLoRAConfig(r=2, mode="post_hoc"))
        assert bayes.monteclora_config.r == 4
        assert bayes.monteclora_config.target_modules == ("key",)
        assert bayes.monteclora_config.lora_alpha == 3
        assert {group.rank for group in bayes.model.groups} == {4}


class TestInterface:
    def test_sample_shapes_and_seed(self):
        bayes = module()
        draws = bayes.sample(5, seed=3)
        assert draws["A_r2_in24"].shape == (5, 2, 24, 2)
        assert draws["pi_r2_in16"].shape == (5, len(bayes.adapter_names) - 2, 1, 3)
        again = bayes.sample(2, seed=3)
        for name, values in again.items():
            assert torch.equal(values, draws[name][:2])  # draw s depends on (seed, s) alone
        with pytest.raises(InputError, match="num_samples"):
            bayes.sample(0)

    def test_sampling_leaves_the_callers_generator_alone(self):
        bayes = module()
        torch.manual_seed(9)
        expected = torch.rand(1)
        torch.manual_seed(9)
        bayes.sample(3, seed=0)
        assert torch.equal(torch.rand(1), expected)

    def test_merge_is_the_mean_network(self):
        bayes = randomize_b(module()).eval()
        batch = inputs_only(tiny_batch())
        merged = bayes.merge()
        torch.testing.assert_close(merged(**batch).logits, bayes(**batch).logits)
        assert not any("lora" in name for name, _ in merged.named_modules())
        assert any("lora" in name for name, _ in bayes.named_modules())

    def test_posterior_draws_are_those_of_sample(self):
        bayes = module()
        name = bayes.adapter_names[0]
        arrays = bayes.posterior_draws(num_samples=3, seed=2, adapters=[name])
        sites = bayes.sample(3, seed=2)
        assert arrays.A[name].shape == (3, 2, 16)
        torch.testing.assert_close(torch.as_tensor(arrays.A[name]), sites["A_r2_in16"][:, 0].mT)
        factor = sites["sigma_tril_r2_in16"][:, :, 0]
        covariance = torch.as_tensor(arrays.covariance[:, : factor.shape[1]])
        torch.testing.assert_close(covariance, factor @ factor.mT)
        with pytest.raises(InputError, match="no adapter 'nowhere'"):
            bayes.posterior_draws(adapters=["nowhere"])

    def test_regression(self):
        bayes = module(network_options={"num_labels": 1})
        batch = tiny_batch() | {"labels": torch.randn(6)}
        bayes(**batch).loss.backward()
        assert bayes.model.likelihood.scale_unconstrained.grad.abs() > 0

    def test_guide_argument(self):
        with pytest.raises(InputError, match="no guide 'laplace'"):
            module(guide="laplace")
        other = module()
        with pytest.raises(InputError, match="belongs to the model it was built from"):
            BayesLoRA(tiny_network(), MonteCLoRAConfig(r=2), guide=other.guide)
