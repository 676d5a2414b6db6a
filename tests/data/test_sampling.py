"""Batches of like length: which, in which order, and the same again when a run is resumed."""

import pytest
import torch
from transformers import TrainingArguments

from bayeslora.data.sampling import LikeLengthSampler, sampling_strategy
from bayeslora.files.writing import write_json
from bayeslora.study.trainer import PlainTrainer
from bayeslora.training.record import read_record
from bayeslora.training.trainer import BayesTrainer
from tests.conftest import tiny_dataset
from tests.runs import At, base, equal, interrupt, new, run, state

LENGTHS = [3 + 7 * i % 11 for i in range(96)]


def unequal(count):
    """Examples of 3 to 7 tokens."""
    rows = tiny_dataset(count)
    return [
        {name: value if name == "labels" else value[: 3 + i % 5] for name, value in row.items()}
        for i, row in enumerate(rows)
    ]


def order(seed=0, epoch=0):
    sampler = LikeLengthSampler(4, LENGTHS, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_the_order_follows_from_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = order(epoch=2)
    torch.manual_seed(2)
    assert order(epoch=2) == first
    assert len({tuple(order(seed, epoch)) for seed in range(2) for epoch in range(2)}) >= 3
    assert order(seed=1) != order(seed=0)


def test_every_example_once_and_batches_of_like_length():
    found = order()
    assert sorted(found) == list(range(len(LENGTHS)))
    spans = [
        max(LENGTHS[i] for i in found[s : s + 4]) - min(LENGTHS[i] for i in found[s : s + 4]) for s in range(0, 96, 4)
    ]
    assert sorted(spans)[len(spans) // 2] <= 2  # at random it is 7


def padded(order, size):
    """Tokens that batches of so many examples have, padding too."""
    batches = [[LENGTHS[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    return sum(max(batch) * len(batch) for batch in batches)


@pytest.mark.parametrize("size", [4, 6, 7, 16, 24, 40, 96, 200])
def test_batches_of_any_size_pad_less_than_at_random(size):
    """transformers' own order pads like a random one, once a batch is an eighth of the data."""
    at_random = [torch.randperm(len(LENGTHS)).tolist() for _ in range(20)]
    usual = sum(padded(order, size) for order in at_random) / len(at_random)
    spared = []
    for epoch in range(5):
        sampler = LikeLengthSampler(size, LENGTHS, 0)
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert sorted(found) == list(range(len(LENGTHS)))
        assert LENGTHS[found[0]] == max(LENGTHS)  # what does not fit into memory fails at once
        spared.append((usual - padded(found, size)) / (usual - sum(LENGTHS)))
    assert min(spared) > (0.4 if size <= 24 else -0.1)  # a third of the data and more cannot be sorted


@pytest.mark.parametrize("data_seed", [None, 5])
def test_both_trainers_have_the_same_order(tmp_path, data_seed):
    arguments = TrainingArguments(
        str(tmp_path), train_sampling_strategy="group_by_length", seed=3, data_seed=data_seed, report_to=[]
    )
    data = unequal(96)
    ours = BayesTrainer(new(), arguments, train_dataset=data)
    theirs = PlainTrainer(base(), arguments, make_optimizer=None, penalty=None, train_dataset=data)
    orders = [list(trainer._get_train_sampler()) for trainer in (ours, theirs)]
    assert orders[0] == orders[1]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path):
    options = {"epochs": 3, "train_sampling_strategy": "group_by_length", "save_steps": 2}
    whole, other = new(), new(5)
    run(tmp_path / "whole", whole, unequal(24), **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", new(), unequal(24), callbacks=[At(10, interrupt)], **options)
    run(tmp_path / "cut", other, unequal(24), resume=True, **options)
    assert equal(state(whole), state(other))


def test_texts_and_choices_of_unequal_length_are_grouped():
    choices = [{"input_ids": [[1, 2], [3] * size], "labels": 0} for size in (2, 5)]
    sounds = [{"input_values": [0.5] * size, "labels": 0} for size in (9, 4)]
    pictures = [{"pixel_values": [[0.0] * size], "labels": 0} for size in (2, 2)]
    strategies = [sampling_strategy(data) for data in (unequal(9), choices, sounds, pictures, choices[:1] * 3)]
    assert strategies == [*["group_by_length"] * 3, "random", "random"]


def test_fit_groups_unless_it_is_told_otherwise(tmp_path):
    run(tmp_path / "usual", train=unequal(24))
    run(tmp_path / "asked", train=unequal(24), train_sampling_strategy="random")
    recorded = [
        read_record(tmp_path / name / "run.json")["training"]["train_sampling_strategy"] for name in ("usual", "asked")
    ]
    assert recorded == ["group_by_length", "random"]


def test_a_run_of_an_earlier_version_goes_on_at_random(tmp_path):
    options = {"epochs": 3, "save_steps": 2}
    whole, other = new(), new(5)
    run(tmp_path / "whole", whole, unequal(24), train_sampling_strategy="random", **options)
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "cut",
            new(),
            unequal(24),
            train_sampling_strategy="random",
            callbacks=[At(10, interrupt)],
            **options,
        )
    record = read_record(tmp_path / "cut" / "run.json")
    del record["training"]["train_sampling_strategy"]  # which it did not know yet
    write_json(tmp_path / "cut" / "run.json", record)
    run(tmp_path / "cut", other, unequal(24), resume=True, **options)
    assert equal(state(whole), state(other))
