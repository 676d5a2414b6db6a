"""PEFT's LoRA layers, made samplable without renaming anything."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayeslora import InputError, MonteCLoRAConfig
from bayeslora.adapters.drawing import clear_draw, using_draw
from bayeslora.adapters.groups import find_groups
from bayeslora.adapters.inject import adapt
from bayeslora.adapters.sampled import SampledLinear
from tests.conftest import tiny_batch, tiny_network

TARGETS = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "gpt2": ("c_attn", "c_proj"),
    "llama": ("q_proj", "v_proj", "down_proj"),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("targets", ["named", "all-linear"])
def test_state_dict_is_pefts_own(kind, targets):
    targets = TARGETS[kind] if targets == "named" else "all-linear"
    ours = adapt(tiny_network(kind), MonteCLoRAConfig(r=2, target_modules=targets))
    options = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    lora = LoraConfig(
        r=2, task_type="SEQ_CLS", target_modules=list(targets) if isinstance(targets, tuple) else targets, **options
    )
    theirs = get_peft_model(tiny_network(kind), lora)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    sampled = sum(isinstance(module, SampledLinear) for module in ours.modules())
    assert sampled == sum(len(group) for group in find_groups(ours)) > 0


@pytest.mark.parametrize("kind", TARGETS)
def test_a_draw_changes_the_output_exactly_as_its_weight_would(kind):
    network = adapt(tiny_network(kind), MonteCLoRAConfig(r=2)).eval()
    groups, batch = find_groups(network), tiny_batch()
    batch.pop("labels")
    with torch.no_grad():
        for group in groups:
            for adapter in group.adapters:
                next(iter(adapter.layer.lora_B.values())).weight.normal_()
        draw = {group.name: torch.randn(len(group), group.columns, group.rank) for group in groups}
        plain = network(**batch).logits
        with using_draw(groups, draw):
            drawn = network(**batch).logits
        assert torch.equal(network(**batch).logits, plain)
        for group in groups:
            for adapter, weight in zip(group.adapters, draw[group.name], strict=True):
                adapter.lora_A.weight.copy_(weight.mT)
        torch.testing.assert_close(network(**batch).logits, drawn)
        assert not torch.allclose(plain, drawn)


def test_equal_shapes_form_one_group_in_network_order():
    groups = find_groups(adapt(tiny_network("bert", layers=3), MonteCLoRAConfig(r=2)))
    by_shape = {(group.rank, group.columns): len(group) for group in groups}
    assert by_shape == {
        (2, 16): 3 * 5 + 1,
        (2, 24): 3,
    }  # query, key, value, two dense, and the pooler; one dense
    wide = next(group for group in groups if group.columns == 24)
    assert [adapter.name for adapter in wide.adapters] == [f"bert.encoder.layer.{i}.output.dense" for i in range(3)]
    assert [adapter.block for adapter in wide.adapters] == [0, 1, 2]
    assert {adapter.kind for adapter in wide.adapters} == {"bert.encoder.layer.output.dense"}


def test_group_mean_holds_the_columns():
    network = adapt(tiny_network(), MonteCLoRAConfig(r=2, target_modules="all-linear"))
    for group in find_groups(network):
        for index, adapter in enumerate(group.adapters):
            assert torch.equal(group.mean()[index, 3], adapter.lora_A.weight[:, 3])


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"layers_to_transform": [1]}, {"layer.1"}),
        ({"layers_to_transform": 0}, {"layer.0"}),
        ({}, {"layer.0", "layer.1"}),
    ],
)
def test_peft_words_are_passed_through(options, layers):
    config = MonteCLoRAConfig(
        r=3,
        lora_alpha=6,
        lora_dropout=0.1,
        use_rslora=True,
        target_modules=["query"],
        modules_to_save=["pooler"],
        **options,
    )
    network = adapt(tiny_network(), config)
    adapters = [adapter for group in find_groups(network) for adapter in group.adapters]
    assert {".".join(adapter.name.split(".")[2:4]) for adapter in adapters} == layers
    layer = adapters[0].layer
    assert layer.scaling["default"] == pytest.approx(6 / 3**0.5)
    assert layer.lora_dropout["default"].p == 0.1
    assert any("pooler" in name and "modules_to_save" in name for name, _ in network.named_parameters())


def test_rank_pattern_makes_groups_of_different_rank():
    groups = find_groups(
        adapt(tiny_network(), MonteCLoRAConfig(r=2, target_modules=["query", "key"], rank_pattern={"key": 4}))
    )
    assert {group.rank: len(group) for group in groups} == {2: 2, 4: 2}


def test_deepcopy_leaves_the_draw_behind():
    """A draw is part of an autograd graph, which deepcopy refuses."""
    network = adapt(tiny_network(), MonteCLoRAConfig(r=2))
    groups = find_groups(network)
    leaf = torch.zeros((), requires_grad=True)
    with using_draw(groups, {g.name: leaf + torch.randn(len(g), g.columns, g.rank) for g in groups}):
        twin = copy.deepcopy(network)
        assert all(a.lora_A.draw.weight is None for g in find_groups(twin) for a in g.adapters)
        assert all(a.lora_A.draw.weight is not None for g in groups for a in g.adapters)
    clear_draw(groups)
    assert all(a.lora_A.draw.weight is None for g in groups for a in g.adapters)


class TestRefusals:
    def refuse(self, network=None, **options):
        with pytest.raises(InputError) as caught:
            adapt(network or tiny_network(), MonteCLoRAConfig(r=2, **options))
        return str(caught.value)

    def test_target_that_matches_nothing_names_the_closest(self):
        message = self.refuse(target_modules=["query", "valu"])
        assert "'valu'" in message
        assert "closest names: value" in message

    def test_target_far_from_everything_lists_the_layers(self):
        assert "query" in self.refuse(target_modules=["zzzz"])

    def test_embedding_target(self):
        assert "embedding" in self.refuse(target_modules=["word_embeddings"])

    def test_embedding_adapter_of_a_peft_model(self):
        lora = LoraConfig(r=2, target_modules=["word_embeddings"], task_type="SEQ_CLS")
        assert "embedding" in self.refuse(get_peft_model(tiny_network(), lora))

    def test_dora_as_an_option(self):
        assert "DoRA" in self.refuse(lora_options={"use_dora": True})

    def test_dora_in_a_peft_model(self):
        lora = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", use_dora=True)
        assert "DoRA reads lora_A.weight" in self.refuse(get_peft_model(tiny_network(), lora))

    def test_pefts_own_monteclora(self):
        lora = LoraConfig(
            r=2,
            target_modules=["query"],
            task_type="SEQ_CLS",
            monteclora_config=peft.tuners.lora.MontecloraConfig(buffer_size=2),
        )
        assert "PEFT's own MonteCLoRA" in self.refuse(get_peft_model(tiny_network(), lora))

    def test_convolution(self):
        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

        network = get_peft_model(Network(), LoraConfig(r=2, target_modules=["conv"]))
        assert "convolutions" in self.refuse(network)

    def test_unknown_lora_option(self):
        assert "rankk" in self.refuse(lora_options={"rankk": 4})

    def test_two_active_adapters(self):
        network = get_peft_model(tiny_network(), LoraConfig(r=2, target_modules=["query"]))
        network.add_adapter("second", LoraConfig(r=2, target_modules=["query"]))
        network.base_model.set_adapter(["default", "second"])
        assert "exactly one active adapter" in self.refuse(network)
