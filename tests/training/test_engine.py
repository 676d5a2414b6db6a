"""The same step under every engine that drives PyTorch: equal gradients, or one error that says what to do instead."""

import copy
import pickle
import shutil
import threading

import pytest
import torch
import transformers
from peft import LoraConfig
from torch._dynamo.utils import counters
from torch.func import functional_call

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, fit
from bayeslora.adapters.drawing import using_draw
from bayeslora.inference.draws import sample_sites
from tests.conftest import VOCABULARY, tiny_batch, tiny_dataset, tiny_network
from tests.language import tiny_language_model

KINDS = ["bert", "gpt2", "llama"]
GUIDES = ["amortized", "mean_field"]


def module(kind="bert", guide="amortized", *, network=None, layers=1, **options):
    """Without dropout, B away from zero, in training mode."""
    config = MonteCLoRAConfig(**{"r": 2, "num_components": 3, "sample_scaler": 0.3, "guide": guide} | options)
    network = tiny_network(kind, layers=layers) if network is None else network
    torch.manual_seed(1)
    bayes = BayesLoRA(network, config).train()
    for part in bayes.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    with torch.no_grad():
        for name, parameter in bayes.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return bayes


def step(bayes, *, seed=7, run=None, batch=None):
    """Loss and gradients of one training step with the noise of ``seed``."""
    bayes.zero_grad()
    torch.manual_seed(seed)
    loss = (run or bayes)(**(batch or tiny_batch())).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in bayes.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerance):
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def drawn_weights(bayes):
    return [adapter.lora_A.draw.weight for group in bayes.model.groups for adapter in group.adapters]


def inputs_only(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def add_other_adapter(bayes):
    lora = LoraConfig(r=3, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    bayes.network.add_adapter("other", lora)


def through_an_error(bayes):
    """A step that fails in the middle of the network, with half of the layers done."""
    layers = [adapter.lora_A for group in bayes.model.groups for adapter in group.adapters]

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = layers[-1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        bayes(**tiny_batch())
    hook.remove()
    return bayes


def copied_inside_the_network(bayes):
    copies = []
    hook = bayes.network.get_base_model().register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(bayes)))
    bayes(**tiny_batch())
    hook.remove()
    copies[0].network.get_base_model()._forward_pre_hooks.clear()
    return copies[0]


def after_disabling(bayes):
    with bayes.disable_adapter():
        bayes.network(**inputs_only(tiny_batch()))
    return bayes


def layers_off_and_on(bayes):
    bayes.network.base_model.disable_adapter_layers()
    bayes.network(**inputs_only(tiny_batch()))
    bayes.network.base_model.enable_adapter_layers()
    return bayes


def other_adapter_and_back(bayes):
    add_other_adapter(bayes)
    bayes.network.set_adapter("other")
    bayes.network(**inputs_only(tiny_batch()))
    bayes.network.set_adapter("default")
    bayes.network.delete_adapter("other")
    return bayes


def merged_and_unmerged(bayes):
    bayes.network.merge_adapter()
    bayes.network.unmerge_adapter()
    return bayes


def without_gradients(bayes):
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            torch.manual_seed(7)
            loss = bayes(**tiny_batch()).loss
        assert not loss.requires_grad
        torch.manual_seed(7)
        torch.testing.assert_close(loss.clone(), bayes(**tiny_batch()).loss.detach())
    return bayes


def other_modes(bayes):
    """Sampling follows BayesLoRA's own mode; its parts' modes are dropout's business, and there is none here."""
    bayes.network.eval()
    bayes.guide.eval()
    return bayes


DETOURS = {
    "deepcopy": copy.deepcopy,
    "deepcopy inside the network": copied_inside_the_network,
    "pickle": lambda bayes: pickle.loads(pickle.dumps(bayes)),
    "after an error": through_an_error,
    "after disable_adapter": after_disabling,
    "after disable_adapter_layers": layers_off_and_on,
    "after another adapter": other_adapter_and_back,
    "after merge_adapter": merged_and_unmerged,
    "after steps without gradients": without_gradients,
    "after float64": lambda bayes: bayes.double().float(),
    "parts in eval mode": other_modes,
}
TOLERANCE = {"after merge_adapter": {"rtol": 1e-4, "atol": 1e-5}}  # PEFT adds to W and subtracts again


@pytest.mark.parametrize("guide", GUIDES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detour", DETOURS)
def test_the_step_stays_the_same(detour, kind, guide):
    bayes = module(kind, guide)
    plain = step(bayes)
    assert_same(step(DETOURS[detour](bayes)), plain, **TOLERANCE.get(detour, {"rtol": 0, "atol": 0}))
    assert all(weight is None for weight in drawn_weights(bayes))


@pytest.mark.parametrize("guide", GUIDES)
def test_functional_call(guide):
    bayes = module(guide=guide)
    plain = step(bayes)
    values = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in bayes.named_parameters()}
    names = [name for name, value in values.items() if value.requires_grad]
    with torch.no_grad():
        for parameter in bayes.parameters():
            parameter.zero_()  # the values given count, not the module's own
    torch.manual_seed(7)
    loss = functional_call(bayes, values, kwargs=tiny_batch()).loss
    gradients = torch.autograd.grad(loss, [values[name] for name in names], allow_unused=True)
    found = {n: g for n, g in zip(names, gradients, strict=True) if g is not None}
    assert_same((loss.detach(), found), plain, rtol=0, atol=0)


class TestPrecision:
    """Noise and factors are the float32 run's own; the rest differs by the rounding of bfloat16 (ε = 2⁻⁸)."""

    BOUND = 0.15

    def assert_near(self, found, expected):
        """At most of seven draws (a tiny network is ill-conditioned at some); other draws are farther away."""
        exact = [self.gradients(expected(seed)) for seed in range(7)]
        near = [self.gradients(found(seed)) for seed in range(7)]
        assert all(torch.isfinite(gradient).all() for gradient in near)
        assert not any(map(torch.equal, near, exact))
        assert self.distance(near, exact) < self.BOUND
        assert self.distance(exact[1:] + exact[:1], exact) > 2 * self.BOUND

    def gradients(self, result):
        return torch.cat([gradient.double().flatten() for gradient in result[1].values()])

    def distance(self, found, expected):
        """The median relative distance."""
        return torch.stack([(f - e).norm() / e.norm() for f, e in zip(found, expected, strict=True)]).median()

    @pytest.mark.parametrize("guide", GUIDES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_autocast(self, kind, guide):
        bayes = module(kind, guide)

        def run(**batch):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return bayes(**batch)

        self.assert_near(lambda seed: step(bayes, seed=seed, run=run), lambda seed: step(bayes, seed=seed))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_network_loaded_in_low_precision(self, kind, dtype):
        bayes = module(kind)
        low = module(kind, network=tiny_network(kind, layers=1).to(dtype))
        with torch.no_grad():
            for name, parameter in low.network.named_parameters():
                parameter.copy_(bayes.network.get_parameter(name))
        low.guide.load_state_dict(bayes.guide.state_dict())
        self.assert_near(lambda seed: step(low, seed=seed), lambda seed: step(bayes, seed=seed))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("guide", GUIDES)
    def test_cast_afterwards_the_posterior_stays_in_float32(self, guide, dtype):
        bayes = module(guide=guide, scale_init=1 / 3, alpha_init="random")
        draws = bayes.sample(2, seed=0)
        means = [group.mean().detach() for group in bayes.model.groups]
        low = copy.deepcopy(bayes).to(dtype)
        assert {p.dtype for p in low.network.parameters()} == {dtype}
        found = low.sample(2, seed=0)
        for group, mean in zip(low.model.groups, means, strict=True):
            ours, theirs = found[f"A_{group.name}"] - group.mean(), draws[f"A_{group.name}"] - mean
            torch.testing.assert_close(ours, theirs, rtol=1e-2 if guide == "amortized" else 1e-4, atol=1e-5)
            if guide == "mean_field":  # the amortized guide sees the rounded μ
                assert torch.equal(found[f"pi_{group.name}"], draws[f"pi_{group.name}"])
        self.assert_near(lambda seed: step(low, seed=seed), lambda seed: step(bayes, seed=seed))

    def test_half_is_to_float16(self):
        bayes = module().half()
        assert {p.dtype for p in bayes.network.parameters()} == {torch.float16}
        assert {p.dtype for p in bayes.guide.parameters()} == {torch.float32}
        assert {b.dtype for b in bayes.guide.buffers() if b.is_floating_point()} == {torch.float32}


class TestSharedWeights:
    def assert_one_draw(self, bayes):
        """The logits are those of plain PEFT with that draw as its lora_A."""
        batch = inputs_only(tiny_batch())
        weights = bayes.model.matrices(next(sample_sites(bayes, 1, seed=0)))
        with using_draw(bayes.model.groups, weights):
            logits = bayes.network(**batch).logits
        assert not torch.allclose(logits, bayes.network(**batch).logits)
        for group in bayes.model.groups:
            for adapter, drawn in zip(group.adapters, weights[group.name], strict=True):
                adapter.lora_A.weight.data.copy_(drawn.mT)
        torch.testing.assert_close(logits, bayes.network(**batch).logits)

    def test_one_block_run_many_times(self):
        """ALBERT: every pass through the shared block sees the same draw."""
        config = transformers.AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=8,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
            pad_token_id=0,
            num_labels=2,
        )
        bayes = module(network=transformers.AutoModelForSequenceClassification.from_config(config))
        assert all(gradient.abs().max() > 0 for name, gradient in step(bayes)[1].items() if "lora" in name)
        self.assert_one_draw(bayes)

    def test_tied_frozen_weights(self):
        network = tiny_network(layers=2)
        first, second = network.bert.encoder.layer
        first.attention.self.query.weight = second.attention.self.query.weight
        bayes = module(network=network, target_modules=["query"])
        assert len(bayes.adapter_names) == 2
        self.assert_one_draw(bayes)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # Dynamo looks there
class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()

    def graphs(self):
        return counters["stats"]["unique_graphs"]

    @pytest.mark.parametrize(
        ("kind", "guide", "backend"),
        [("bert", "amortized", "aot_eager"), ("gpt2", "mean_field", "eager"), ("llama", "amortized", "eager")],
    )
    def test_one_graph_whose_input_is_the_draw(self, kind, guide, backend):
        bayes = module(kind, guide)
        plain = [step(bayes, seed=seed) for seed in range(3)]
        bayes.compile(backend=backend)
        assert_same(step(bayes, seed=0), plain[0], rtol=1e-5, atol=1e-6)
        assert self.graphs() == 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in (1, 2):
                assert_same(step(bayes, seed=seed), plain[seed], rtol=1e-5, atol=1e-6)
        assert sum(counters["graph_break"].values()) == 0
        assert plain[1][0] != plain[2][0]
        assert_same(step(copy.deepcopy(bayes), seed=2), plain[2], rtol=1e-5, atol=1e-6)
        assert self.graphs() == 1  # copies are not compiled

    def test_mean_and_draws_and_base_model(self):
        """A graph each for the mean, a draw and the base model, and no more when they take turns."""
        bayes, data = module(), tiny_dataset(4)
        plain, batch = copy.deepcopy(bayes), inputs_only(tiny_batch(4))
        bayes.compile(backend="eager")

        def outputs(of):
            rows = [of.eval()(**batch).logits.detach()]
            rows.append(torch.as_tensor(of.predict(data, 2, batch_size=4, progress=False).sample_probs))
            with of.disable_adapter():
                rows.append(of(**batch).logits.detach())
            rows.append(step(of.train())[0])
            return rows

        expected = outputs(plain)
        torch.testing.assert_close(outputs(bayes), expected)
        before = self.graphs()
        assert 3 <= before <= 5
        with torch._dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(outputs(bayes), expected)
        assert self.graphs() == before

    def test_lengths_that_differ(self):
        """The second length makes a graph for all lengths."""
        bayes = module()
        plain = {length: step(bayes, batch=tiny_batch(length=length)) for length in (5, 7, 9)}
        bayes.compile(backend="eager")
        for length, expected in plain.items():
            assert_same(step(bayes, batch=tiny_batch(length=length)), expected, rtol=1e-5, atol=1e-6)
        assert self.graphs() == 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_blocks_share_one_graph(self, kind):
        bayes = module(kind, layers=4)
        plain, predicted = step(bayes), bayes.predict(tiny_dataset(3), 2, progress=False).sample_probs
        bayes.train().compile(backend="eager")
        assert_same(step(bayes), plain, rtol=1e-5, atol=1e-6)
        assert self.graphs() == 1
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_same(step(bayes, seed=8), step(copy.deepcopy(bayes), seed=8), rtol=1e-5, atol=1e-6)
        assert self.graphs() == 1
        assert sum(counters["graph_break"].values()) == 0
        found = bayes.predict(tiny_dataset(3), 2, progress=False).sample_probs
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(predicted))

    @pytest.mark.parametrize("layers", [1, 3])
    def test_texts_of_compiled_blocks_have_the_output_layer_where_a_token_is_scored(self, layers):
        """Which is left out of the graph where the blocks have their own."""
        bayes = BayesLoRA(tiny_language_model(layers=layers), MonteCLoRAConfig(r=2, sample_scaler=0.3)).train()
        batch = tiny_batch(4)
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :5] = -100
        seen, plain = [], step(bayes, batch=batch)
        bayes.compile(backend="eager")
        head = bayes.get_output_embeddings()
        head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].shape[:2].numel()))
        assert_same(step(bayes, batch=batch), plain, rtol=1e-5, atol=1e-6)
        assert seen[-1] == (4 * 7 if layers == 1 else 4 * 2)

    def test_compiled_before_it_was_adapted(self):
        network = tiny_network(layers=1)
        network.compile(backend="eager")
        bayes = module(network=network)
        expected = step(module())
        assert_same(step(bayes), expected, rtol=1e-5, atol=1e-6)
        with torch._dynamo.config.patch(error_on_recompile=True):
            step(bayes, seed=8)
        assert self.graphs() == 1

    @pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
    @pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
    def test_inductor(self):
        """One adapted layer, for a whole network takes a minute to compile."""
        bayes = module(target_modules=["query"])
        plain = [step(bayes, seed=seed) for seed in range(2)]
        bayes.model.groups[0].adapters[0].layer.compile()
        for seed in range(2):
            assert_same(step(bayes, seed=seed), plain[seed], rtol=1e-4, atol=1e-5)
        assert self.graphs() == 1

    def test_fit(self, tmp_path):
        losses = []
        for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
            bayes = module(lora_dropout=0.0)
            result = fit(
                bayes,
                tiny_dataset(8),
                output_dir=tmp_path / str(len(losses)),
                max_steps=2,
                batch_size=4,
                progress=False,
                **options,
            )
            losses.append([row["loss"] for row in result.history if "loss" in row])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert 1 <= self.graphs() <= 2

    def test_compiling_pyro_too_is_refused(self):
        with pytest.raises(InputError, match=r"call bayes.compile\(\)"):
            torch.compile(module(), backend="aot_eager")(**tiny_batch())

    def test_stock_trainer_that_would_compile_pyro_too_is_refused(self, tmp_path, monkeypatch):
        for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):  # TrainingArguments sets them
            monkeypatch.setenv(name, "no" if name.endswith("BACKEND") else "default")
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=1,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            torch_compile=True,
            torch_compile_backend="aot_eager",
        )
        data = [{name: value[i] for name, value in tiny_batch().items()} for i in range(6)]
        with pytest.raises(InputError, match="without torch_compile=True"):
            transformers.Trainer(module(), arguments, train_dataset=data).train()

    def test_wrapped_networks_are_refused(self):
        with pytest.raises(InputError, match=r"torch\.compile"):
            BayesLoRA(torch.compile(tiny_network(), backend="aot_eager"), MonteCLoRAConfig(r=2))
        bayes = module()
        with pytest.raises(InputError, match="belong to this network"):
            bayes.network = torch.compile(bayes.network, backend="aot_eager")
        bayes.network = bayes.network


USES = {
    "train": lambda bayes, folder: bayes.train()(**tiny_batch()),
    "evaluate": lambda bayes, folder: bayes.eval()(**inputs_only(tiny_batch())),
    "predict": lambda bayes, folder: bayes.predict(tiny_dataset(2), 2, progress=False),
    "predict at the mean": lambda bayes, folder: bayes.predict(tiny_dataset(2), 0, progress=False),
    "the Pyro model": lambda bayes, folder: bayes.model.joint(**tiny_batch()),
    "save": lambda bayes, folder: bayes.save_pretrained(folder / "adapter"),
    "merge": lambda bayes, folder: bayes.merge(),
}


class TestSeveralAdapters:
    def pair(self):
        """Two posteriors over two adapters of one network, of different rank; the second is in use."""
        first = module(layers=2)
        first.network.add_adapter(
            "other", LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
        )
        first.network.set_adapter("other")
        return first, module(network=first.network)

    def test_each_draws_its_own(self):
        first, second = self.pair()
        assert {group.rank for group in first.model.groups} == {2}
        assert {group.rank for group in second.model.groups} == {3}
        losses = {}
        for bayes, name in ((first, "default"), (second, "other"), (first, "default")):
            bayes.network.set_adapter(name)
            loss, gradients = step(bayes)
            lora = [parameter for parameter in gradients if "lora" in parameter]
            assert lora
            assert all(f".{name}." in parameter for parameter in lora)
            assert torch.equal(losses.setdefault(name, loss), loss)

    def test_the_mean_is_that_of_the_adapter_in_use(self):
        first, second = self.pair()
        batch = inputs_only(tiny_batch())
        expected = second.network.eval()(**batch).logits
        assert torch.equal(second.eval()(**batch).logits, expected)
        second.network.set_adapter("default")
        assert not torch.allclose(first.eval()(**batch).logits, expected)

    @pytest.mark.parametrize("use", USES)
    def test_switched_behind_our_back(self, use, tmp_path):
        first, second = self.pair()
        with pytest.raises(InputError, match=r"uses the adapter other, .* over 'default': call .*set_adapter"):
            USES[use](first, tmp_path)
        USES[use](second, tmp_path)

    @pytest.mark.parametrize("use", USES)
    def test_merged_behind_our_back(self, use, tmp_path):
        bayes = module()
        bayes.network.merge_adapter()
        with pytest.raises(InputError, match="unmerge_adapter"):
            USES[use](bayes, tmp_path)
        bayes.network.unmerge_adapter()
        USES[use](bayes, tmp_path)

    def test_disabling_leaves_post_hoc_frozen(self):
        bayes = module(mode="post_hoc")
        with bayes.disable_adapter():
            pass
        assert {name.split(".")[0] for name, p in bayes.named_parameters() if p.requires_grad} == {"guide"}

    def test_disabled_layers_are_the_base_model_in_training_too(self):
        bayes = module()
        base = tiny_network(layers=1)
        base.classifier.load_state_dict(bayes.network.get_base_model().classifier.original_module.state_dict())
        expected = base.eval()(**inputs_only(tiny_batch())).logits
        with bayes.disable_adapter():
            torch.testing.assert_close(bayes(**tiny_batch()).logits, expected.detach())
        assert not torch.allclose(bayes(**tiny_batch()).logits, expected)


class TestProcessesAndThreads:
    def test_data_loader_workers(self, tmp_path):
        states = []
        for workers in (0, 2):
            bayes = module()
            fit(
                bayes,
                tiny_dataset(8),
                output_dir=tmp_path / str(workers),
                max_steps=3,
                batch_size=4,
                progress=False,
                dataloader_num_workers=workers,
            )
            states.append(bayes.state_dict())
        for name, value in states[0].items():
            assert torch.equal(states[1][name], value), name

    def test_a_second_thread_waits_for_the_step(self):
        """While one thread is inside the network with its draw, the other must not put the mean there."""
        bayes = module()
        expected = step(bayes)
        second_done = threading.Event()

        def second():
            bayes(input_ids=tiny_batch()["input_ids"])  # without labels: the mean network
            second_done.set()

        def let_the_second_try(*_):
            hook.remove()
            thread.start()
            assert not second_done.wait(0.3)

        thread = threading.Thread(target=second)
        hook = bayes.network.get_base_model().register_forward_pre_hook(let_the_second_try)
        assert_same(step(bayes), expected, rtol=0, atol=0)
        thread.join()
        assert second_done.is_set()

    def test_predictions_in_threads(self):
        bayes, data = module().eval(), tiny_dataset(4)
        expected = [bayes.predict(data, 3, seed=seed, progress=False).probs for seed in range(3)]
        found = {}

        def predict(seed):
            found[seed] = bayes.predict(data, 3, seed=seed, progress=False).probs

        threads = [threading.Thread(target=predict, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, probs in enumerate(expected):
            assert (found[seed] == probs).all()
