"""Two processes that keep shards of a network, as torchrun launches them; gloo on the CPU."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from transformers import TrainingArguments

from bayeslora import BayesLoRA, InputError
from bayeslora.adapters.sharding import check_shardable
from bayeslora.training.engines import Sharding, shard
from tests.architectures import ARCHITECTURES
from tests.conftest import tiny_dataset, tiny_network
from tests.scripts import ROOT, complaints, launch
from tests.workers.distributed_worker import NO_DROPOUT, NOISELESS, Gradients, new, run, texts, writer

WORKER = ROOT / "tests" / "workers" / "sharding_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything the two processes wrote."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    folder = tmp_path_factory.mktemp("shards")
    done = launch(WORKER, folder)
    assert done.returncode == 0, complaints(done)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    """``ranks(scenario, what)``: what rank 0 and rank 1 saw."""

    def read(scenario, what=None):
        seen = [json.loads((folder / f"{scenario}-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
        return seen if what is None else [one[what] for one in seen]

    return read


@pytest.mark.slow
class TestFit:
    def test_reaches_what_whole_copies_reach(self, ranks):
        """Parameters, metrics, log and predictions; so does a run that is interrupted and resumed."""
        for rank in (0, 1):
            copies = ranks("training", "copies")[rank]
            for name in ("shards", "again"):
                seen = ranks("training", name)[rank]
                assert ranks("training", f"distance of {name}")[rank] == 0.0
                assert seen["metrics"] == copies["metrics"]
                assert seen["history"] == copies["history"]
                assert seen["tuning"] == copies["tuning"]
                assert seen["probs"] == copies["probs"]

    def test_each_holds_half_of_what_is_frozen(self, ranks):
        """The rest, which is trained, stays whole."""
        trained = sum(p.numel() for p in new().network.parameters() if p.requires_grad)
        whole, posterior = ranks("training", "copies")[0]["numbers"][0]
        posterior -= whole
        for (_, before), (own, after) in (seen["numbers"] for seen in ranks("training", "shards")):
            assert before == whole + posterior
            assert after == own + posterior
            assert own - trained == pytest.approx((whole - trained) / 2, rel=0.02)

    def test_one_process_writes_everything(self, ranks):
        first, second = ranks("training", "shards")
        assert first["written"] == ranks("training", "copies")[0]["written"]
        assert second["written"] == ["rng_state_1.pth"]

    def test_what_it_wrote_opens_in_one_process(self, ranks, folder):
        network = tiny_network(layers=1, **NO_DROPOUT)
        bayes = BayesLoRA.from_pretrained(folder / "training" / "shards" / "adapter", network)
        found = bayes.predict(tiny_dataset(11, seed=1), num_samples=3, progress=False).probs
        assert found == pytest.approx(torch.tensor(ranks("training", "shards")[0]["probs"]).numpy(), abs=1e-6)

    @pytest.mark.parametrize("name", ["paper", "elbo", "texts"])
    def test_a_step_is_that_of_one_process(self, name, ranks, folder, tmp_path):
        """Loss, gradients and parameters after it: 2 processes × 2 batches × 2 examples against 8 at once.

        Equal but for the order in which four gradients are added; Adam's first step has the size of its rate whatever
        the gradient, so that entries of nearly no gradient may go elsewhere.
        """
        seen = Gradients()
        bayes, data = (
            (writer(), texts()) if name == "texts" else (new(normalization=name, **NOISELESS), tiny_dataset(8))
        )
        result = run(tmp_path / "run", bayes, data, batch_size=8, max_steps=1, max_grad_norm=0.0, callbacks=[seen])
        found = load_file(folder / "gradients" / f"{name}.safetensors")
        loss = next(entry["loss"] for entry in result.history if "loss" in entry)
        assert ranks("gradients", name) == [pytest.approx(loss, rel=1e-5)] * 2
        assert any(n.startswith("guide.log_v") and value.abs().max() > 1e-3 for n, value in found.items())
        for parameter, value in seen.values.items():
            torch.testing.assert_close(found[parameter], value, rtol=1e-4, atol=1e-6)
            after = dict(bayes.named_parameters())[parameter].detach()
            clear = value.abs() > 1e-4
            torch.testing.assert_close(found[f"after {parameter}"][clear], after[clear], rtol=1e-4, atol=1e-5)

    def test_under_accelerate_launch(self, ranks):
        """By the variables that it sets."""
        for (whole, _), (own, _) in ranks("launched", "numbers"):
            assert own < 0.6 * whole
        assert ranks("launched", "kept") == ["true", "true"]


@pytest.mark.slow
class TestShard:
    def test_a_step_is_that_of_whole_copies(self, ranks):
        """On every architecture but those that no posterior is made for, also where one layer runs twice."""
        for seen in ranks("networks"):
            assert len(seen) > 25
            assert {name: value for name, value in seen.items() if value > 1e-6} == {}

    def test_in_every_way(self, ranks):
        for seen in ranks("ways"):
            assert {name: value for name, value in seen.items() if value > 1e-6} == {}

    def test_predicting_and_generating(self, ranks):
        for copies, shards in ranks("writing", "written"):
            assert copies == shards

    def test_trl(self, ranks):
        pytest.importorskip("trl")
        for seen in ranks("trl_trainers"):
            for name in ("dpo", "sft"):
                assert seen[name]["distance"] == 0.0
                assert seen[name]["numbers"][0] < 0.6 * seen["whole"][0]


@pytest.mark.slow
class TestRefusals:
    @pytest.mark.parametrize("name", ["fused", "fused in a loop", "fused in predict"])
    def test_a_draw_that_does_not_arrive(self, name, ranks):
        for said in ranks("refusals", name):
            assert "the draw did not arrive in bert.encoder.layer.0.attention.self.query (of 7" in said

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("apart", "the processes hold different networks"),
            ("unknown blocks", "has no modules of the class 'LlamaDecoderLayer'"),
            ("again", "in shards already"),
            ("wrapped", "load the network whole in every process"),
        ],
    )
    def test_others(self, name, message, ranks):
        for said in ranks("refusals", name):
            assert message in said

    def test_merging(self, ranks):
        for seen in ranks("training", "shards"):
            assert "merging needs all of them" in seen["merge"]


@pytest.mark.slow
def test_processes_that_run_one_network_together_share_a_draw(ranks):
    """By the first one's seed, and each one's own generator goes on as it would."""
    first, second = ranks("together", "together")
    assert first["losses"] == second["losses"]
    assert first["losses"][0] != first["losses"][1]
    one, other = ranks("together", "apart")
    assert one["losses"] != other["losses"]
    assert (first["next"], second["next"]) == (one["next"], other["next"])
    assert ranks("together", "pickled") == [True, True]


@pytest.fixture(scope="module")
def deepspeed_folder(tmp_path_factory):
    """What two processes wrote under DeepSpeed's engine."""
    if find_spec("deepspeed") is None:
        pytest.skip("needs bayeslora[deepspeed]")
    folder = tmp_path_factory.mktemp("deepspeed")
    done = launch(WORKER.with_name("deepspeed_worker.py"), folder)
    assert done.returncode == 0, complaints(done)
    return folder


@pytest.fixture(scope="module")
def stages(deepspeed_folder):
    """``stages(name, rank)``: what a process saw."""
    return lambda name, rank: json.loads((deepspeed_folder / f"{name}-{rank}.json").read_text(encoding="utf-8"))


@pytest.mark.slow
class TestDeepSpeed:
    """Its engine, in a loop of one's own."""

    @pytest.mark.parametrize("stage", [1, 2, 3, "3, all in parts"])
    def test_two_steps_are_those_of_whole_copies(self, stage, stages):
        """Losses and parameters, of two batches a step, under SGD."""
        for rank in (0, 1):
            found = stages(f"stage {stage}", rank)
            assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
            assert found["distance"] < 1e-7
            assert found["moved"] == 1.0
            assert "the draw did not arrive in model.layers.0.self_attn.q_proj (of 14" in found["fused"]

    def test_frozen_weights_are_in_parts(self, stages):
        """Of ZeRO 3."""
        held = {name: stages(f"stage {name}", 0)["held"] for name in (1, 2, 3, "3, all in parts")}
        assert held[1] == held[2] > 10 * held[3] > held["3, all in parts"] == 0

    @pytest.mark.parametrize("stage", [1, 2, 3, "3, all in parts"])
    def test_what_it_saved_opens_in_one_process(self, stage, stages, deepspeed_folder):
        found = stages(f"stage {stage}", 0)
        assert ("as ZeRO 3 leaves it" in (found["unsaved"] or "")) == (stage not in (1, 2))
        network = ARCHITECTURES["llama"].network(hidden_size=64, intermediate_size=64, num_labels=2)
        bayes = BayesLoRA.from_pretrained(deepspeed_folder / f"stage {stage}", network)
        probs = bayes.predict(tiny_dataset(6), num_samples=3, progress=False).probs
        assert probs == pytest.approx(np.array(stages("probs", 0)), abs=1e-6)


class TestConfiguration:
    """What is read of FSDP's configuration, in one process."""

    def asked(self, tmp_path, **config):
        return Sharding.asked(TrainingArguments(str(tmp_path), use_cpu=True, fsdp=True, fsdp_config=config))

    def test_without(self, tmp_path):
        assert Sharding.asked(TrainingArguments(str(tmp_path), use_cpu=True)) is None

    def test_blocks(self, tmp_path):
        assert self.asked(tmp_path).blocks == ()
        assert self.asked(tmp_path, transformer_layer_cls_to_wrap=["BertLayer"]).blocks == ("BertLayer",)

    @pytest.mark.parametrize(
        ("name", "config"),
        [
            ("version 1", {"version": 1}),
            ("reshard_after_forward=False", {"reshard_after_forward": False}),
            ("cpu_offload", {"cpu_offload": True}),
            ("cpu_ram_efficient_loading", {"cpu_ram_efficient_loading": True}),
            ("activation_checkpointing", {"activation_checkpointing": True}),
            ("auto_wrap_policy", {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 5}),
        ],
    )
    @pytest.mark.filterwarnings("ignore:FSDP1:FutureWarning")
    def test_what_is_refused(self, name, config, tmp_path, monkeypatch):
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
        with pytest.raises(InputError, match=f"FSDP's {name} is not supported"):
            self.asked(tmp_path, **config)

    def test_uneven_batches(self, tmp_path):
        arguments = TrainingArguments(
            str(tmp_path), use_cpu=True, fsdp=True, accelerator_config={"even_batches": False}
        )
        with pytest.raises(InputError, match="leave even_batches=False out"):
            Sharding.asked(arguments)

    def test_in_one_process(self, caplog):
        assert shard(new()) == []
        assert "launch several with torchrun" in caplog.text

    def test_layers_left_out_at_random(self):
        bayes = new()
        bayes.network.get_base_model().config.encoder_layerdrop = 0.1
        with pytest.raises(InputError, match=r"encoder_layerdrop=0\.1 leaves out blocks at random"):
            check_shardable(bayes.network)

    def test_compiled(self):
        bayes = new()
        bayes.compile(backend="eager")
        with pytest.raises(InputError, match="compiled network has not been tried in shards"):
            shard(bayes)
