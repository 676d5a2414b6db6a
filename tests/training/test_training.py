"""fit(): Trainer's loop, with runs that can be interrupted, repeated and believed."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import Trainer, TrainerCallback, TrainingArguments

from bayeslora import BayesLoRA, InputError, TrainingDivergedError
from bayeslora.analysis import calibration_summary
from bayeslora.inference.predict import Collator
from bayeslora.storage.run_folder import last_checkpoint
from bayeslora.training import predictive
from bayeslora.training.monitor import components_in_use, relative_noise
from bayeslora.training.trainer import BayesTrainer
from tests.conftest import tiny_dataset
from tests.modules import randomize_b
from tests.runs import (
    NO_DROPOUT,
    At,
    _frozen_garbage,  # noqa: F401  (a fixture)
    base,
    equal,
    flipped,
    interrupt,
    new,
    run,
    state,
)


def logged(result, name):
    return {entry["step"]: entry[name] for entry in result.history if name in entry}


class Watch(TrainerCallback):
    """What the optimizer was set to at each step."""

    def __init__(self):
        self.rates, self.decays = [], []

    def on_step_begin(self, args, state, control, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.decays.append([group["weight_decay"] for group in optimizer.param_groups])


class TestRun:
    def test_what_it_writes(self, tmp_path):
        bayes = new()
        bayes.num_examples = 7  # an earlier fit's
        result = run(tmp_path / "run", bayes, evaluate=tiny_dataset(8, seed=1), epochs=3, metadata={"task": "first"})
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert names - {"tensorboard"} == {"run.json", "adapter", "checkpoints"}  # where that is installed
        record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
        assert record["finished"]
        assert record["task"] == "first"
        assert record["train_examples"] == 24
        assert record["config"] == bayes.monteclora_config.to_dict()
        assert record["training"]["learning_rate"] == 1e-2
        assert record["training"]["seed"] == 0
        assert {"torch", "peft", "transformers", "bayeslora"} <= set(record["versions"])
        assert record["metrics"] == result.metrics
        assert record["history"] == result.history
        assert (result.steps, result.output_dir) == (18, tmp_path / "run")
        assert len(list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))) == 2
        assert not bayes.training
        assert bayes.num_examples == 24
        again = BayesLoRA.from_pretrained(tmp_path / "run" / "adapter", base())
        assert equal(again.state_dict(), bayes.state_dict())

    def test_loss_goes_down(self, tmp_path):
        bayes, data = new(r=4, network_options=NO_DROPOUT, lora_dropout=0.0), tiny_dataset(16)
        result = run(tmp_path, bayes, data, data, epochs=60, batch_size=16, learning_rate=2e-2, evaluations=2)
        task = list(logged(result, "elbo/task").values())
        assert task[0] == pytest.approx(math.log(2), abs=0.05)
        assert task[-1] < 0.3
        assert result.metrics["eval_loss"] < 0.3
        assert result.metrics["eval_accuracy"] > 0.9
        assert logged(result, "loss")[60] < logged(result, "loss")[3] - 0.3

    @pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
    def test_stock_trainer(self, tmp_path):
        """Default arguments: columns matched with forward's signature, pinned memory, checkpoints."""
        bayes, table = new(guide="mean_field"), datasets.Dataset.from_list(tiny_dataset(24))
        table = table.add_column("text", ["so be it"] * 24)
        before = state(bayes)
        arguments = TrainingArguments(str(tmp_path), report_to=[], learning_rate=1e-2, disable_tqdm=True)
        trainer = Trainer(bayes, arguments, Collator(), table, table)
        first = trainer.evaluate()["eval_loss"]
        assert trainer.train().global_step == 9
        assert trainer.evaluate()["eval_loss"] < first
        moved = {name for name, value in bayes.state_dict().items() if not torch.equal(value, before[name])}
        assert moved == {name for name, parameter in bayes.named_parameters() if parameter.requires_grad}

    def test_max_steps(self, tmp_path):
        assert run(tmp_path / "few", epochs=100, max_steps=3).steps == 3
        assert run(tmp_path / "many", epochs=1, max_steps=8).steps == 8

    def test_post_hoc_changes_the_posterior_only(self, tmp_path):
        bayes = randomize_b(new(mode="post_hoc"))
        before = state(bayes)
        run(tmp_path, bayes)
        moved = {name for name, value in bayes.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert {name.split(".")[0] for name in moved} == {"guide"}

    def test_regression(self, tmp_path):
        data = [e | {"labels": float(e["input_ids"][0]) / 64} for e in tiny_dataset(24)]
        bayes = new(network_options={"num_labels": 1})
        result = run(tmp_path, bayes, data, data, epochs=4)
        losses = list(logged(result, "eval_loss").values())
        assert losses[-1] < losses[0] - 0.05
        assert bayes.model.likelihood.scale < 0.65  # it began at sqrt(1/2)
        assert "eval_accuracy" not in result.metrics

    def test_normalization_by_the_number_of_examples(self, tmp_path):
        """The same parameters and noise: the logged KL is the sum over adapters and columns, divided by n."""
        kl = [
            logged(run(tmp_path / str(n), new(normalization="elbo"), tiny_dataset(n), max_steps=1), "elbo/kl")[1]
            for n in (24, 48)
        ]
        assert kl[0] == pytest.approx(2 * kl[1], rel=1e-5)

    @pytest.mark.parametrize("components", ["collapsed", "explicit"])
    def test_bfloat16_autocast(self, tmp_path, components):
        result = run(tmp_path, new(components=components), max_steps=2, bf16=True, use_cpu=True)
        assert math.isfinite(logged(result, "loss")[2])


class TestSeed:
    def test_decides_the_run(self, tmp_path):
        """Order, dropout and noise, whatever was drawn before: nothing is fixed when the module is made."""
        ends = []
        for name, seed in (("one", 3), ("again", 3), ("other", 4)):
            bayes = new()
            torch.rand(len(name))
            run(tmp_path / name, bayes, seed=seed)
            ends.append(state(bayes))
        assert equal(ends[0], ends[1])
        assert not equal(ends[0], ends[2])


class TestResume:
    def test_with_another_configuration_is_refused(self, tmp_path):
        run(tmp_path)
        with pytest.raises(InputError, match=r"began with sample_scaler=0.05, not 0.2"):
            run(tmp_path, new(sample_scaler=0.2), resume=True)

    @pytest.mark.parametrize(
        ("options", "signal"),
        [
            ({"save_steps": 2}, KeyboardInterrupt),
            ({"save_steps": 2, "guide": "mean_field", "batch_size": 2, "gradient_accumulation": 2}, RuntimeError),
            ({"evaluate": tiny_dataset(8, seed=1), "evaluations": 6}, KeyboardInterrupt),
        ],
        ids=["amortized", "mean_field, accumulated", "evaluated"],
    )
    def test_interrupted_is_uninterrupted(self, options, signal, tmp_path):
        """With dropout, in the middle of the second epoch, into a module initialised otherwise.

        Noise that is in no saved state would differ after the interruption, and so would the run.
        """
        options = dict(options)
        guide = options.pop("guide", "amortized")
        whole, broken = new(guide=guide), new(guide=guide)
        expected = run(tmp_path / "whole", whole, epochs=2, **options)

        def stop(_):
            raise signal("lights out")

        with pytest.raises(signal):
            run(tmp_path / "broken", broken, epochs=2, callbacks=[At(10, stop)], **options)
        assert not (tmp_path / "broken" / "adapter").exists()
        assert not json.loads((tmp_path / "broken" / "run.json").read_text(encoding="utf-8"))["finished"]
        resumed = new(seed=5, guide=guide)
        assert not equal(resumed.state_dict(), broken.state_dict())
        result = run(tmp_path / "broken", resumed, epochs=2, resume=True, **options)
        assert result.steps == expected.steps == 12
        assert equal(resumed.state_dict(), whole.state_dict())
        assert logged(result, "elbo/task") == logged(expected, "elbo/task")
        assert logged(result, "eval_loss") == logged(expected, "eval_loss")
        for name in ("adapter_model.safetensors", "posterior.safetensors"):  # of the last step, not of the best
            last = [tmp_path / run_ / "checkpoints" / "checkpoint-12" / name for run_ in ("whole", "broken")]
            assert last[0].read_bytes() == last[1].read_bytes()

    def test_before_the_first_checkpoint(self, tmp_path):
        whole, resumed = new(), new()
        run(tmp_path / "whole", whole)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", callbacks=[At(3, interrupt)])
        run(tmp_path / "broken", resumed, resume=True)
        assert equal(resumed.state_dict(), whole.state_dict())

    def test_finished(self, tmp_path):
        whole, again = new(), new(seed=5)
        expected = run(tmp_path, whole, evaluate=tiny_dataset(8, seed=1))
        result = run(tmp_path, again, evaluate=tiny_dataset(8, seed=1), resume=True)
        assert equal(again.state_dict(), whole.state_dict())
        assert result.steps == expected.steps
        assert result.metrics["eval_loss"] == expected.metrics["eval_loss"]

    def test_on_another_base_network(self, tmp_path):
        run(tmp_path)
        other = BayesLoRA(base(seed=1), new().monteclora_config)
        with pytest.raises(InputError, match=r"adapter is for another base model: the frozen weight .* differs"):
            run(tmp_path, other, resume=True)

    def test_torn_checkpoints(self, tmp_path, caplog):
        """A crash or a full disk while saving: the checkpoint before is used, or the run starts over."""
        whole, resumed = new(), new(seed=5)
        run(tmp_path / "whole", whole, save_steps=2)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", save_steps=2, callbacks=[At(6, interrupt)])
        two, four = (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" for step in (2, 4))
        files = sorted(path.name for path in four.iterdir())
        assert len(files) == 9
        for name in files:
            content = (four / name).read_bytes()
            for length in (0, 1, len(content) // 2, len(content) - 2):
                (four / name).write_bytes(content[:length])
                assert last_checkpoint(tmp_path / "run") == two, f"{name} truncated to {length} bytes"
            (four / name).unlink()
            assert last_checkpoint(tmp_path / "run") == two, f"{name} missing"
            (four / name).write_bytes(content)
            assert last_checkpoint(tmp_path / "run") == four
        assert "checkpoint-4 is incomplete or damaged; using the one before" in caplog.text
        (four / "posterior.safetensors").write_bytes(b"")
        run(tmp_path / "run", resumed, save_steps=2, resume=True)
        assert equal(resumed.state_dict(), whole.state_dict())

    def test_no_whole_checkpoint(self, tmp_path, caplog):
        whole, again = new(), new()
        run(tmp_path / "whole", whole)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", save_steps=2, callbacks=[At(6, interrupt)])
        for checkpoint in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
            (checkpoint / "optimizer.pt").unlink()
        run(tmp_path / "run", again, save_steps=2, resume=True)
        assert "holds no whole checkpoint: starting from the beginning" in caplog.text
        assert equal(again.state_dict(), whole.state_dict())


class TestEvaluation:
    """Train on one labelling, evaluate on its opposite: the better the fit, the worse the evaluation."""

    OPTIONS = {"epochs": 4, "evaluations": 12, "learning_rate": 2e-2, "warmup": 0.0}  # noqa: RUF012

    @pytest.mark.parametrize(("metric", "draws"), [("loss", 0), ("predictive_nll", 4)])
    def test_early_stopping_keeps_the_best(self, tmp_path, metric, draws):
        bayes, contrary = new(sample_scaler=0.5), flipped(tiny_dataset(24))
        chosen = {"best_metric": metric} if metric == "loss" else {}  # the other is the default
        result = run(tmp_path, bayes, evaluate=contrary, early_stopping=3, **chosen, **self.OPTIONS)
        losses = logged(result, f"eval_{metric}")
        assert result.steps < 24
        assert [*losses.values()][-4] == min(losses.values()) < min([*losses.values()][-3:])
        assert result.checkpoint == min(losses, key=losses.get)
        assert result.metrics[f"eval_{metric}"] == min(losses.values())
        again = BayesLoRA.from_pretrained(tmp_path / "adapter", base())
        assert again.predict(contrary, num_samples=draws).nll == pytest.approx(min(losses.values()), rel=1e-5)

    def test_an_evaluation_scores_the_draws_that_predict_makes(self, tmp_path):
        bayes, data = new(sample_scaler=0.5), tiny_dataset(20, seed=1)
        metrics = run(tmp_path, bayes, evaluate=data, eval_samples=3).metrics
        prediction = bayes.predict(data, num_samples=3)
        for name, value in calibration_summary(prediction.probs, prediction.labels).items():
            assert metrics[f"eval_predictive_{name}"] == pytest.approx(value, rel=1e-5)
        assert metrics["eval_predictive_nll"] != pytest.approx(metrics["eval_loss"], rel=1e-3)

    def test_many_examples_are_not_all_drawn_for(self, tmp_path, monkeypatch):
        monkeypatch.setattr(predictive, "MOST_EXAMPLES", 5)
        bayes, data = new(sample_scaler=0.5), tiny_dataset(9)
        metrics = run(tmp_path, bayes, evaluate=data).metrics
        scored = bayes.predict([data[row] for row in (0, 2, 4, 6, 8)], num_samples=4).nll
        assert metrics["eval_predictive_nll"] == pytest.approx(scored, rel=1e-5)

    def test_post_hoc_keeps_the_posterior_that_predicts_best(self, tmp_path):
        """The mean never changes, so its score cannot choose."""
        bayes, data = randomize_b(new(mode="post_hoc", sample_scaler=4.0)), tiny_dataset(24)
        order = {"train_sampling_strategy": "random"}  # with which the first evaluation is not the best
        result = run(tmp_path, bayes, evaluate=data, epochs=4, variational_learning_rate=0.3, **order)
        means, drawn = logged(result, "eval_loss"), logged(result, "eval_predictive_nll")
        assert len(means) == 4
        assert len({*means.values()}) == 1
        assert result.checkpoint == min(drawn, key=drawn.get)
        assert result.checkpoint != min(drawn)
        assert bayes.predict(data, num_samples=4).nll == pytest.approx(min(drawn.values()), rel=1e-5)

    def test_plain_lora_has_no_draws_to_score(self, tmp_path):
        result = run(tmp_path, new(sample_scaler=0.0), evaluate=tiny_dataset(20, seed=1))
        assert "eval_predictive_nll" not in result.metrics
        assert json.loads((tmp_path / "run.json").read_text())["training"]["metric_for_best_model"] == "loss"

    def test_the_last_evaluation_is_not_made_again(self, tmp_path):
        result = run(tmp_path, evaluate=tiny_dataset(20, seed=1), epochs=2)
        assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [6, 12]

    def test_early_stopping_counts_on_after_a_resume(self, tmp_path):
        contrary = flipped(tiny_dataset(24))
        whole = run(tmp_path / "whole", evaluate=contrary, early_stopping=3, **self.OPTIONS)
        with pytest.raises(KeyboardInterrupt):
            run(
                tmp_path / "broken",
                evaluate=contrary,
                early_stopping=3,
                callbacks=[At(whole.steps, interrupt)],
                **self.OPTIONS,
            )
        resumed = run(tmp_path / "broken", evaluate=contrary, early_stopping=3, resume=True, **self.OPTIONS)
        assert resumed.steps == whole.steps
        assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")

    def test_best_by_another_metric(self, tmp_path):
        result = run(tmp_path, evaluate=tiny_dataset(20, seed=1), best_metric="accuracy", **self.OPTIONS)
        accuracies = [entry["eval_accuracy"] for entry in result.history if "eval_accuracy" in entry]
        assert result.metrics["eval_accuracy"] == max(accuracies)
        assert min(accuracies) < max(accuracies)


class TestOptimizer:
    def test_rates_schedule_and_decay(self, tmp_path):
        watch = Watch()
        run(
            tmp_path,
            max_steps=4,
            warmup=0.5,
            learning_rate=1e-3,
            variational_learning_rate=3e-2,
            weight_decay=0.1,
            callbacks=[watch],
        )
        for step, share in enumerate([0.0, 0.5, 1.0, 0.5]):
            assert watch.rates[step] == pytest.approx([share * 1e-3, share * 1e-3, share * 3e-2])
        assert watch.decays == [[0.1, 0.0, 0.0]] * 4
        default = Watch()
        run(tmp_path / "default", max_steps=1, warmup=0, learning_rate=1e-3, callbacks=[default])
        assert default.rates == [pytest.approx([1e-3, 1e-3, 1e-2])]

    @pytest.mark.parametrize("frozen", ["network", "guide"])
    def test_each_part_at_its_own_rate(self, frozen, tmp_path):
        rates = {"network": (0.0, 1e-2), "guide": (1e-2, 0.0)}[frozen]
        bayes = randomize_b(new(guide="mean_field"))
        before = state(bayes)
        run(tmp_path, bayes, max_steps=3, warmup=0, learning_rate=rates[0], variational_learning_rate=rates[1])
        after = bayes.state_dict()
        moved = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
        assert moved == {"network", "guide"} - {frozen}

    def test_accumulation_is_a_larger_batch(self, tmp_path):
        """The KL counts once a step, not once a micro-batch. SGD, and noise too small to matter."""
        steps = []
        for size, accumulation in ((12, 1), (4, 3)):
            bayes = randomize_b(
                new(
                    guide="mean_field",
                    sample_scaler=1e-7,
                    kl_weight=0.1,
                    scale_init=0.5,
                    lora_dropout=0.0,
                    network_options=NO_DROPOUT,
                )
            )
            before = state(bayes)
            run(
                tmp_path / str(size),
                bayes,
                tiny_dataset(12),
                batch_size=size,
                gradient_accumulation=accumulation,
                max_steps=1,
                warmup=0,
                learning_rate=1.0,
                optim="sgd",
                max_grad_norm=0,
            )
            steps.append({name: value - before[name] for name, value in bayes.state_dict().items()})
        assert steps[0]["guide.log_v_r2_in16"].abs().max() > 1e-3
        for name, expected in steps[0].items():
            torch.testing.assert_close(steps[1][name], expected, rtol=1e-4, atol=2e-6)

    @pytest.mark.parametrize("bound", [1e-3, 0.0])
    def test_clipping(self, bound, tmp_path):
        bayes = randomize_b(new())
        before = state(bayes)
        result = run(
            tmp_path,
            bayes,
            max_steps=1,
            warmup=0,
            learning_rate=1.0,
            variational_learning_rate=1.0,
            optim="sgd",
            max_grad_norm=bound,
        )
        moved = math.sqrt(sum(float((v - before[n]).square().sum()) for n, v in bayes.state_dict().items()))
        assert logged(result, "grad_norm")[1] > 0.05
        assert moved == pytest.approx(bound or logged(result, "grad_norm")[1], rel=1e-3)


class TestLogs:
    def test_parts_of_the_objective(self, tmp_path):
        result = run(tmp_path, new(kl_weight=0.01, cooperation=0.5, scale_init=0.5), gradient_accumulation=2)
        steps = [entry for entry in result.history if "elbo/task" in entry]
        assert len(steps) == 3
        for entry in steps:
            sites = [value for name, value in entry.items() if name.startswith("elbo/kl_")]
            assert len(sites) == 6
            assert sum(sites) == pytest.approx(entry["elbo/kl"])
            total = entry["elbo/task"] + 0.01 * entry["elbo/kl"] + 0.5 * entry["elbo/cooperation"]
            assert entry["loss"] == pytest.approx(total, rel=1e-5)

    def test_posterior(self, tmp_path):
        """The closed forms against draws of A itself, after some training; and for every adapter by name."""
        bayes = new(guide="mean_field", alpha_init="ones", components="explicit", num_components=4)
        result = run(tmp_path, bayes, max_steps=3)
        entry = next(entry for entry in result.history if entry["step"] == 3)
        ratios = {name.split("/")[1]: r for name, r in entry.items() if name.startswith("noise_to_signal/")}
        assert list(ratios) == bayes.adapter_names
        assert entry["posterior/noise_to_signal_max"] == max(ratios.values())
        assert entry["posterior/noise_to_signal_mean"] == pytest.approx(sum(ratios.values()) / len(ratios))
        draws = 150
        drawn = bayes.posterior_draws(num_samples=draws, seed=0, adapters=bayes.adapter_names)
        columns = np.array([group.columns for group in bayes.model.groups for _ in group.adapters])
        relative = np.sqrt((drawn.noise_scale**2).mean(0) * 3 * columns)  # over PEFT's 1/√(3·n_in)
        assert entry["posterior/relative_noise_mean"] == pytest.approx(relative.mean(), rel=0.1)
        kept = json.loads((tmp_path / "run.json").read_text())["relative_noise"]
        assert list(kept) == bayes.adapter_names
        assert list(kept.values()) == pytest.approx(list(relative), rel=0.3)  # of each adapter, in 150 draws
        for group in bayes.model.groups:
            for adapter, mean in zip(group.adapters, group.mean().detach().mT.numpy(), strict=True):
                squares = ((drawn.A[adapter.name] - mean) ** 2).mean((1, 2)) / (mean**2).mean()
                error = squares.std() / math.sqrt(draws)
                assert abs(squares.mean() - ratios[adapter.name] ** 2) < 4 * error
        squares = (drawn.mixture_weights**2).sum(-1).mean(0)  # E[Σ_k π_k²] of every adapter
        assert entry["posterior/effective_components"] == pytest.approx((1 / squares).mean(), rel=0.05)

    def test_components_in_use(self):
        bayes = new(guide="mean_field", num_components=4)
        with torch.no_grad():
            for name, parameter in bayes.guide.named_parameters():
                if name.startswith("log_alpha"):
                    parameter.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).log().expand_as(parameter))
        assert components_in_use(bayes).tolist() == pytest.approx([2.75] * len(bayes.adapter_names), rel=1e-6)

    def test_no_posterior_to_speak_of(self, tmp_path):
        plain = run(tmp_path / "plain", new(sample_scaler=0.0), max_steps=1)
        assert not [name for name in plain.history[0] if name.startswith(("posterior/", "noise_to_signal/", "elbo/"))]

    @pytest.mark.parametrize("units", ["absolute", "relative"])
    @pytest.mark.parametrize("mixture", ["dense", "sparse"])
    def test_relative_noise_is_there_whatever_the_units(self, units, mixture, tmp_path):
        bayes = new(mixture=mixture, noise_units=units)
        logged = run(tmp_path, bayes, max_steps=1, learning_rate=1e-9).history[0]["posterior/relative_noise_mean"]
        assert logged == pytest.approx(0.05 if units == "relative" else float(relative_noise(bayes).mean()), rel=1e-3)
        assert (logged > 0.051 or logged < 0.049) == (units == "absolute")

    @pytest.mark.parametrize("bound", [1e-3, 0.0])
    def test_gradient_norms(self, bound, tmp_path):
        """Before clipping, of network and posterior; here against the gradients themselves."""
        seen = {}

        def look(state):
            seen["network"] = norm(state["model"].network.parameters())
            seen["posterior"] = norm(state["model"].guide.parameters())

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                look(kwargs)

        def norm(parameters):
            return math.sqrt(sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None))

        entry = run(tmp_path, randomize_b(new()), max_steps=1, max_grad_norm=bound, callbacks=[Look()]).history[0]
        clipped = math.hypot(*seen.values())
        assert clipped == pytest.approx(bound or entry["grad_norm"], rel=1e-2)
        for part, value in seen.items():
            assert value > 0
            assert entry[f"grad_norm/{part}"] == pytest.approx(value * entry["grad_norm"] / clipped, rel=1e-4)

    @pytest.mark.parametrize("schedule", ["constant", "learned"])
    def test_nothing_is_copied_to_the_host_in_a_step(self, schedule, tmp_path, monkeypatch):
        """On a GPU each such copy would wait for the step to be computed."""
        copies = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function is torch.ops.aten._local_scalar_dense.default:
                    copies.append(function)
                return function(*args, **(kwargs or {}))

        stock, ours = Trainer.training_step, BayesTrainer.training_step

        def unwatched(*args, **kwargs):  # transformers looks at its masks
            with _disable_current_modes():
                return stock(*args, **kwargs)

        def watched(*args, **kwargs):
            with Watch():
                return ours(*args, **kwargs)

        monkeypatch.setattr(Trainer, "training_step", unwatched)
        monkeypatch.setattr(BayesTrainer, "training_step", watched)
        run(tmp_path, new(noise_schedule=schedule, noise_units="relative"), max_steps=2, gradient_accumulation=2)
        assert not copies
        with Watch():
            float(torch.ones(()))
        assert copies

    def test_tensorboard(self, tmp_path):
        """Groups of their own, and one curve over an interruption: what came after the checkpoint is replaced."""
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        options = {"evaluate": tiny_dataset(8, seed=1), "epochs": 2, "evaluations": 4}
        bayes = new()
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, bayes, callbacks=[At(6, interrupt)], **options)
        result = run(tmp_path, bayes, resume=True, **options)
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0})
        events.Reload()
        tags = set(events.Tags()["scalars"])
        assert {"train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "eval/accuracy"} <= tags
        assert {"elbo/task", "elbo/kl", "elbo/cooperation", "grad_norm/network", "grad_norm/posterior"} <= tags
        assert {"posterior/effective_components", "posterior/noise_to_signal_mean"} <= tags
        assert {f"noise_to_signal/{name}" for name in bayes.adapter_names} <= tags
        assert {tag.split("/")[0] for tag in tags} == {
            "train",
            "eval",
            "elbo",
            "grad_norm",
            "posterior",
            "noise_to_signal",
        }
        for tag, name in (("train/loss", "loss"), ("elbo/kl", "elbo/kl")):
            shown = {event.step: event.value for event in events.Scalars(tag)}
            assert len(events.Scalars(tag)) == 12
            assert shown == pytest.approx(logged(result, name))

    def test_progress(self, tmp_path, capsys):
        run(tmp_path, evaluate=tiny_dataset(4), progress=True, max_steps=2)
        shown = capsys.readouterr()
        lines = [line for line in (shown.out + shown.err).replace("\r", "\n").splitlines() if "step 2:" in line]
        assert any("task" in line and "KL" in line for line in lines)
        assert any("evaluation NLL" in line and "ECE" in line for line in lines)


class TestDivergence:
    @staticmethod
    def breaking(bayes, step, value):
        def damage(_):
            with torch.no_grad():
                next(p for p in bayes.parameters() if p.requires_grad).fill_(value)

        return [At(step, damage, end=True)]

    @pytest.mark.parametrize(
        ("value", "step", "evaluate", "message"),
        [
            (math.nan, 3, None, "the loss became nan at step 4"),
            (math.inf, 4, None, "a parameter became NaN or infinite at step 4"),  # where a checkpoint was due
            (math.nan, 4, tiny_dataset(4), "the evaluation gave NaN or infinite outputs at step 4"),
        ],
    )
    def test_stops_and_keeps_the_last_good_checkpoint(self, value, step, evaluate, message, tmp_path):
        bayes = randomize_b(new())
        every = {"save_steps": 2} | ({"eval_steps": 2} if evaluate else {})
        with pytest.raises(TrainingDivergedError) as caught:
            run(tmp_path, bayes, evaluate=evaluate, callbacks=self.breaking(bayes, step, value), **every)
        text = str(caught.value)
        assert message in text
        assert "Lower learning_rate (now 0.01) or sample_scaler (now 0.05)" in text
        good = tmp_path / "checkpoints" / "checkpoint-2"
        assert f"the last good checkpoint is {good}" in text
        assert [path.name for path in good.parent.glob("checkpoint-*")] == ["checkpoint-2"]
        again = BayesLoRA.from_pretrained(good, base())
        assert all(torch.isfinite(value).all() for value in again.state_dict().values())
        resumed = run(tmp_path, new(), evaluate=evaluate, resume=True, **every)
        assert resumed.steps == 6

    @pytest.mark.parametrize(
        "options",
        [
            {"bf16": True, "use_cpu": True},
            {"gradient_accumulation": 2},
            {"bf16": True, "use_cpu": True, "gradient_accumulation": 2, "max_grad_norm": 0},
        ],
        ids=["bf16", "accumulated", "both, unclipped"],
    )
    def test_under_autocast_and_accumulation(self, options, tmp_path):
        """Only the last micro-batch of a step is bad; nothing moves, and the checkpoint before it stays."""
        bayes, losses, states = randomize_b(new()), [], []
        last = 2 * options.get("gradient_accumulation", 1)

        def spoil(module, inputs, output):
            losses.append(output.loss)
            output.loss = output.loss * (math.nan if len(losses) == last else 1)

        class Before(TrainerCallback):
            def on_step_begin(self, args, trainer_state, control, **kwargs):
                states.append(state(bayes))

        bayes.register_forward_hook(spoil)
        with pytest.raises(TrainingDivergedError, match=r"the loss became nan at step 2.*checkpoint-1\. Lower"):
            run(tmp_path, bayes, batch_size=2, save_steps=1, warmup=0, callbacks=[Before()], **options)
        assert len(losses) == last
        assert equal(bayes.state_dict(), states[1])
        assert not equal(states[0], states[1])

    @pytest.mark.parametrize("bound", [1.0, 0.0])
    def test_infinite_gradient_moves_nothing(self, bound, tmp_path):
        bayes = new()
        before = state(bayes)
        next(p for p in bayes.parameters() if p.requires_grad).register_hook(lambda gradient: gradient + math.inf)
        with pytest.raises(TrainingDivergedError, match=r"the gradient norm became .* at step 1.* no checkpoint had"):
            run(tmp_path, bayes, max_grad_norm=bound)
        assert equal(bayes.state_dict(), before)

    def test_data_that_overflow(self, tmp_path):
        data = [example | {"labels": 1e38} for example in tiny_dataset(8)]
        bayes = new(network_options={"num_labels": 1})
        before = state(bayes)
        with pytest.raises(TrainingDivergedError, match=r"the loss became inf at step 1, .* check the data"):
            run(tmp_path, bayes, data)
        assert equal(bayes.state_dict(), before)

    @pytest.mark.parametrize("evaluate", [None, tiny_dataset(4)])
    def test_absurd_learning_rate(self, evaluate, tmp_path):
        with pytest.raises(TrainingDivergedError, match=r"Lower learning_rate \(now 1e\+30\)"):
            run(tmp_path, evaluate=evaluate, learning_rate=1e30)


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda data: [], "train_dataset is empty"),
            (lambda data: [{"input_ids": e["input_ids"]} for e in data], r"no column 'labels' \(it has input_ids\)"),
            (lambda data: [e | {"labels": 2} for e in data], r"label 2 is outside the network's 2 classes 0..1"),
            (lambda data: [*data, data[0] | {"labels": -1}], "label -1 is outside"),
            (lambda data: [e | {"labels": -1} for e in data], r"unlabelled split \(every label is -1\)"),
            (lambda data: [*data, data[0] | {"labels": None}], "every label must be a finite number"),
            (lambda data: [*data, data[0] | {"labels": float("nan")}], "every label must be a finite number"),
            (lambda data: [*data, data[0] | {"labels": "yes"}], "every label must be a finite number"),
            (lambda data: [*data, data[0] | {"labels": 0.5}], "a classifier's labels are whole numbers, found 0.5"),
        ],
    )
    def test_data(self, change, message, tmp_path):
        data = change(tiny_dataset(4))
        with pytest.raises(InputError, match=message):
            run(tmp_path / "run", train=data)
        with pytest.raises(InputError, match=message.replace("train", "eval")):
            run(tmp_path / "run", evaluate=data)
        if data and "labels" in data[0] and not isinstance(data[-1]["labels"], str):
            with pytest.raises(InputError, match=message):
                run(tmp_path / "run", train=datasets.Dataset.from_list(data))
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
            ({"gradient_accumulation": 0}, "gradient_accumulation must be at least 1"),
            ({"epochs": 0}, "epochs must be greater than 0, got 0"),
            ({"epochs": -1}, "epochs must be greater than 0"),
            ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
            ({"early_stopping": 2}, "early_stopping and evaluations need an eval_dataset"),
            ({"evaluations": 2}, "early_stopping and evaluations need an eval_dataset"),
            ({"early_stopping": 0, "evaluate": tiny_dataset(4)}, "early_stopping must be at least 1"),
            ({"best_metric": "f1", "evaluate": tiny_dataset(4)}, "no evaluation metric 'f1'; there are loss, accuracy"),
            ({"schedule": "sawtooth"}, "sawtooth is not a valid SchedulerType"),
            ({"lerning_rate": 1.0}, r"has an argument 'lerning_rate': did you mean learning_rate or"),
        ],
    )
    def test_arguments(self, options, message, tmp_path):
        with pytest.raises(InputError, match=message):
            run(tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()


class TestFolder:
    @pytest.mark.parametrize("resume", [False, True])
    def test_something_else_in_the_way(self, resume, tmp_path):
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(InputError, match="holds something else already"):
            run(tmp_path, resume=resume)
        with pytest.raises(InputError, match=r"thesis.tex is a file"):
            run(tmp_path / "thesis.tex", resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
        assert (tmp_path / "thesis.tex").read_text() == "years of work"

    def test_existing_run(self, tmp_path):
        run(tmp_path, max_steps=1)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(InputError, match="holds a run already; continue it with resume=True"):
            run(tmp_path, max_steps=1)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_nothing_to_resume(self, tmp_path):
        with pytest.raises(InputError, match=r"nothing to resume in .*: it holds no run.json"):
            run(tmp_path / "run", resume=True)
        assert not (tmp_path / "run").exists()

    def test_empty_folder_is_fine(self, tmp_path):
        (tmp_path / "run" / "deep").mkdir(parents=True)
        assert run(tmp_path / "run" / "deep", max_steps=1).steps == 1
