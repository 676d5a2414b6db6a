"""Two processes that fit one posterior, as torchrun launches them; gloo on the CPU."""

import json

import numpy as np
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from transformers import BertTokenizerFast, TrainingArguments

from bayeslora import BayesLoRA, InputError
from bayeslora.analysis import calibration_summary
from bayeslora.distributed import check_parallelism
from tests.conftest import VOCABULARY, tiny_batch, tiny_dataset, tiny_network
from tests.scripts import ROOT, complaints, launch
from tests.workers.distributed_worker import (
    NO_DROPOUT,
    NOISELESS,
    Gradients,
    new,
    run,
    train_texts,
    train_texts_in_a_stock_trainer,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without distributed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything the two processes wrote."""
    folder = tmp_path_factory.mktemp("two_processes")
    done = launch(ROOT / "tests" / "workers" / "distributed_worker.py", folder)
    assert done.returncode == 0, complaints(done)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """``ranks(scenario, what)``: what rank 0 and rank 1 saw."""

    def read(scenario, what):
        return [json.loads((folder / f"{scenario}-{rank}.json").read_text(encoding="utf-8"))[what] for rank in (0, 1)]

    return read


def both(pair):
    """What both ranks agree on."""
    assert pair[0] == pair[1]
    return pair[0]


def assert_unrelated(one, other):
    """Two draws of noise: independent normals would agree to a tenth of their size with probability 1e-30."""
    one, other = np.array(one), np.array(other)
    assert one.shape == other.shape == (len(one), 32)  # steps, entries of A
    assert (np.abs(one).std(1) > 1e-3).all()
    assert (np.linalg.norm(one - other, axis=1) > 0.1 * np.linalg.norm(one, axis=1)).all()


class TestFit:
    def test_parameters_are_equal_at_the_end(self, ranks):
        for name in ("whole", "resumed", "apart"):
            first, second = ranks("training", name)
            assert first["ended"] == second["ended"]
            assert first["ended"] != first["began"]

    def test_parameters_and_buffers_are_equal_at_the_start(self, ranks):
        """Even where each rank made its own network and guide, also in buffers that no checkpoint holds."""
        first, second = ranks("training", "apart")
        assert first["before"] != second["before"]
        assert first["began"] == second["began"] == first["before"]

    def test_every_example_is_seen_once_an_epoch(self, ranks):
        first, second = (rank["examples"] for rank in ranks("training", "whole"))
        assert len(first) == len(second) == 6
        everything = sorted(example["input_ids"] for example in tiny_dataset(24))
        for epoch in (slice(0, 3), slice(3, 6)):
            assert sorted(example for batch in (*first[epoch], *second[epoch]) for example in batch) == everything
        assert first[:3] != first[3:]

    def test_noise_differs_between_ranks_and_steps(self, ranks):
        first, second = (rank["noise"] for rank in ranks("training", "whole"))
        assert len(first) == 6
        assert_unrelated(first, second)
        assert_unrelated(first[1:], first[:-1])
        assert_unrelated(first[1:], second[:-1])

    def test_resumed_is_uninterrupted(self, ranks):
        """On the same examples with the same noise on each rank, to equal parameters and metrics."""
        assert ranks("training", "interrupted") == ["", ""]
        for whole, resumed in zip(ranks("training", "whole"), ranks("training", "resumed"), strict=True):
            assert resumed["examples"] == whole["examples"][4:]
            assert resumed["noise"] == whole["noise"][4:]
            assert resumed["ended"] == whole["ended"]
            assert resumed["metrics"]["eval_loss"] == whole["metrics"]["eval_loss"]
            assert [e.get("elbo/task") for e in resumed["history"]] == [e.get("elbo/task") for e in whole["history"]]

    def test_noise_follows_what_both_have_learned(self, ranks):
        """L₀ is the mean over the batches of both, and a run that was interrupted ends like one that was not."""
        first, second = ranks("training", "learned")
        (whole, _, resumed), (other, _, other_resumed) = first, second
        assert whole["ended"] == other["ended"] == resumed["ended"] == other_resumed["ended"]
        assert whole["losses"] != other["losses"]
        assert whole["tuning"] == other["tuning"] == resumed["tuning"] == other_resumed["tuning"]
        assert "on 24 examples" in whole["tuning"]
        seen, start, _ = whole["kept"]
        assert seen == len(whole["losses"]) == 6
        assert start == pytest.approx(np.mean([*whole["losses"], *other["losses"]]), rel=1e-5)

    def test_number_of_examples_is_the_whole_training_set(self, ranks):
        assert both(ranks("training", "num_examples")) == 24

    def test_metrics_are_those_of_one_process(self, ranks, folder):
        """11 examples, which neither the processes nor their batches divide."""
        network = tiny_network(layers=1, **NO_DROPOUT)
        bayes = BayesLoRA.from_pretrained(folder / "training" / "whole" / "adapter", network)
        prediction = bayes.predict(tiny_dataset(11, seed=1), num_samples=0)
        expected = calibration_summary(prediction.probs, prediction.labels)
        for seen in ranks("training", "whole"):
            assert seen["metrics"]["eval_loss"] == pytest.approx(-prediction.sample_log_likelihood.mean(), rel=1e-5)
            for name, value in expected.items():
                assert seen["metrics"][f"eval_{name}"] == pytest.approx(value, rel=1e-5)

    def test_logged_parts_of_the_objective_are_means_over_ranks(self, ranks):
        first, second = (
            [{name: value for name, value in entry.items() if name.startswith(("loss", "elbo/"))} for entry in history]
            for history in (rank["history"] for rank in ranks("training", "whole"))
        )
        assert first == second
        for entry in (entry for entry in first if "loss" in entry):
            parts = entry["elbo/task"] + 1e-2 * entry["elbo/kl"] + entry["elbo/cooperation"]
            assert entry["loss"] == pytest.approx(parts, rel=1e-5)

    @pytest.mark.parametrize("name", ["per example", "post_hoc", "plain LoRA", "explicit", "regression"])
    def test_every_trained_parameter_gets_a_gradient(self, name, ranks):
        seen = both(ranks("coverage", name))
        assert seen["missing"] == []


class TestFiles:
    def test_one_process_writes_them(self, ranks, folder):
        first, second = ranks("training", "written")
        assert {"run.json", "run.lock", "adapter", "sealed.json", "bayeslora.json", "optimizer.pt"} <= set(first)
        assert second == ["rng_state_1.pth"]

    def test_nothing_is_torn_or_left_over(self, folder):
        whole = folder / "training" / "whole"
        assert {path.name for path in whole.iterdir()} - {"tensorboard"} == {"run.json", "adapter", "checkpoints"}
        record = json.loads((whole / "run.json").read_text(encoding="utf-8"))
        assert record["finished"]
        assert record["training"]["processes"] == 2
        for checkpoint in (whole / "checkpoints").iterdir():
            names = {path.name for path in checkpoint.iterdir()}
            assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "bayeslora.json"} <= names
            assert not [name for name in names if name.startswith(".") or name.endswith(".tmp")]

    def test_resume_on_another_number_of_processes_is_refused(self, folder):
        with pytest.raises(InputError, match="began with processes=2, not 1"):
            run(
                folder / "training" / "whole",
                new(lora_dropout=0.1),
                evaluate=tiny_dataset(11, seed=1),
                save_steps=2,
                eval_steps=2,
                resume=True,
            )


class TestObjective:
    @pytest.mark.parametrize("normalization", ["paper", "elbo"])
    def test_gradient_is_that_of_one_process(self, normalization, folder, tmp_path):
        """2 processes × 2 batches × 2 examples, with a KL of weight ½, against 8 examples at once.

        The weight of the KL must depend neither on accumulation nor on the number of devices.
        """
        seen = Gradients()
        run(
            tmp_path / "run",
            new(normalization=normalization, **NOISELESS),
            tiny_dataset(8),
            batch_size=8,
            max_steps=1,
            max_grad_norm=0.0,
            callbacks=[seen],
        )
        found = load_file(folder / "gradients" / f"{normalization}.safetensors")
        assert found.keys() == seen.values.keys()
        assert any(name.startswith("guide.log_v") and value.abs().max() > 1e-3 for name, value in found.items())
        for name, value in seen.values.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize(
        ("name", "train"),
        [("texts", train_texts), ("texts, stock", train_texts_in_a_stock_trainer)],
        ids=["ours", "stock"],
    )
    def test_texts_weigh_by_their_tokens(self, name, train, folder, tmp_path):
        """The same for texts of 1 to 40 tokens."""
        seen = Gradients()
        train(tmp_path / "run", [seen], steps=1, size=8)
        found = load_file(folder / "gradients" / f"{name}.safetensors")
        assert any(name.startswith("guide.log_v") and value.abs().max() > 1e-3 for name, value in found.items())
        for parameter, value in seen.values.items():
            torch.testing.assert_close(found[parameter], value, rtol=1e-4, atol=1e-6)

    def test_examples_that_fill_up_a_batch_do_not_count(self, ranks, tmp_path):
        """3 examples on 2 processes: a batch of 4 holds one of them twice, and the KL is still divided by 3."""
        seen = Gradients()
        run(
            tmp_path / "run",
            new(normalization="elbo", **NOISELESS),
            tiny_dataset(3),
            max_steps=1,
            max_grad_norm=0.0,
            callbacks=[seen],
        )
        expected = float(seen.values["guide.log_v_r2_in16"].flatten()[0])
        assert both(ranks("gradients", "small")) == pytest.approx(expected, rel=1e-4)


class TestOtherLoops:
    def test_stock_trainer(self, ranks):
        first, second = ranks("other_loops", "stock")
        assert first["began"] == second["began"] != first["ended"]
        assert first["ended"] == second["ended"]
        assert_unrelated(first["noise"], second["noise"])
        assert not {str(e) for b in first["examples"] for e in b} & {str(e) for b in second["examples"] for e in b}

    def test_plain_distributed_data_parallel(self, ranks):
        """From other networks and one seed: broadcast parameters, noise of each rank's own, common generators."""
        first, second = ranks("other_loops", "own loop")
        assert first["ended"] == second["ended"]
        assert first["generator"] == second["generator"]
        one, other = np.array(first["outputs"]), np.array(second["outputs"])
        assert np.abs(one[:2] - other[:2]).max(axis=(1, 2)).min() > 1e-5
        assert np.array_equal(one[2], other[2])  # without sampling


class TestErrors:
    """Every process raises the same error; none is left waiting."""

    def test_folder(self, ranks):
        assert "holds a run already" in both(ranks("refusals", "taken"))
        assert "nothing to resume" in both(ranks("refusals", "nothing"))
        assert "'group_by_length' is for one process" in both(ranks("refusals", "grouped"))

    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_divergence_on_one_rank(self, accumulation, ranks):
        assert "the loss became inf at step 1" in both(ranks("refusals", f"overflow, accumulation {accumulation}"))
        assert both(ranks("refusals", f"unchanged, accumulation {accumulation}"))

    def test_broken_evaluation_on_one_rank(self, ranks):
        assert "the evaluation gave NaN or infinite outputs at step 3" in both(ranks("refusals", "evaluation"))


def test_preferences_are_learnt_to_equal_parameters(ranks):
    pytest.importorskip("trl")
    assert both(ranks("preferences", "wrapped")) == "DistributedDataParallel"
    both(ranks("preferences", "ended"))


class TestSharding:
    def test_around_the_whole_module(self, ranks):
        for rank in (0, 1):
            assert ranks("sharding", "fsdp2")[rank] == pytest.approx(ranks("sharding", "ddp")[rank], rel=1e-5)

    def test_a_draw_that_does_not_arrive_is_an_error_on_each(self, ranks):
        """Under DistributedDataParallel and fully_shard."""
        ddp, fsdp = both(ranks("sharding", "fused"))
        assert ddp == fsdp
        assert "the draw did not arrive in bert.encoder.layer.0" in ddp

    def test_what_cannot_work_says_so(self, ranks, monkeypatch, tmp_path):
        assert "is sharded, and a draw is made of whole matrices" in both(ranks("sharding", "fsdp2, layer by layer"))
        arguments = TrainingArguments(str(tmp_path), use_cpu=True)
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        with pytest.raises(InputError, match="DeepSpeed is not supported"):
            check_parallelism(arguments)

    def test_one_process_with_several_devices_uses_one(self, tmp_path, caplog):
        arguments = TrainingArguments(str(tmp_path), use_cpu=True)
        arguments._n_gpu = 2
        check_parallelism(arguments)
        assert arguments.n_gpu == 1
        assert "using one of 2 GPUs: torchrun --nproc-per-node 2 uses all" in caplog.text

    def test_data_parallel_is_refused(self):
        """Its replicas are shallow copies, whose layers would share one draw."""
        with pytest.raises(InputError, match="DataParallel"):
            new()._replicate_for_data_parallel()(**tiny_batch())


class TestCommandLine:
    @pytest.fixture
    def options(self, tmp_path):
        """A tiny BERT and a few labelled sentences, as files."""
        folder = tmp_path / "files"
        (folder / "data").mkdir(parents=True)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
        words += [f"w{i}" for i in range(VOCABULARY - len(words))]
        (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
        tiny_network(layers=1).save_pretrained(folder / "model")
        for split in ("train", "validation"):
            rows = [f"{word} film {split[0]}{i},{int(word == 'good')}" for i in range(8) for word in ("good", "bad")]
            (folder / "data" / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n", encoding="utf-8")
        return [
            "--model",
            folder / "model",
            "--task",
            "films",
            "--data-dir",
            folder / "data",
            "--text-columns",
            "text",
            "--rank",
            "2",
            "--batch-size",
            "4",
            "--epochs",
            "1",
        ]

    def test_under_torchrun(self, options, tmp_path):
        """One run, one report and one progress bar; the second launch is refused, and ends."""
        logs = ["--redirects", "3", "--log-dir", tmp_path / "logs"]
        command = [*logs, "-m", "bayeslora", "fit", *options, "--output", tmp_path / "run"]
        done = launch(*command)
        assert done.returncode == 0, complaints(done)
        output = {
            (rank, stream): next((tmp_path / "logs").glob(f"*/attempt_0/{rank}/{stream}.log")).read_text()
            for rank in (0, 1)
            for stream in ("stdout", "stderr")
        }
        assert "fitted in 2 steps" in output[0, "stdout"]
        assert "2/2" in output[0, "stderr"]
        assert output[1, "stdout"] == ""
        assert "%|" not in output[1, "stderr"]
        assert json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["finished"]
