"""What comes before the first adapter runs once a batch, and no output changes for it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bayeslora.adapters.drawing import using_draw
from bayeslora.adapters.groups import find_groups
from bayeslora.adapters.inject import make_samplable
from bayeslora.inference import prefix
from bayeslora.inference.prefix import Prefix
from tests.conftest import VOCABULARY, tiny_batch
from tests.modules import adapted, inputs_only

ROWS = ["bert", "roberta", "gpt2", "llama", "t5"]  # kinds whose rows are their examples everywhere


def batch_of(kind, size=3):
    batch = inputs_only(tiny_batch(size, length=8))
    if kind == "t5":  # classifies at the end-of-sequence token
        batch["input_ids"][:, 3] = 1
    return batch


def draws(bayes, count):
    sites = bayes.sample(count, seed=0)
    each = [bayes.model.matrices({name: values[index] for name, values in sites.items()}) for index in range(count)]
    return each, {name: torch.stack([draw[name] for draw in each]) for name in each[0]}


@pytest.mark.parametrize("last_block", [False, True])
@pytest.mark.parametrize("kind", [*ROWS, "longformer", "deberta"])
@torch.no_grad()
def test_no_output_changes(kind, last_block):
    bayes, inputs = adapted(kind, last_block=last_block), batch_of(kind)
    each, stacked = draws(bayes, 3)
    plain = []
    for weights in each:
        with using_draw(bayes.model.groups, weights):
            plain.append(bayes.network(**inputs).logits)
    assert not torch.allclose(plain[0], plain[1], atol=1e-4)
    before = Prefix(bayes.network, bayes.model.groups)
    before.run(inputs, repeat=kind in ROWS)
    assert before.outputs
    for weights, expected in zip(each, plain, strict=True):
        with using_draw(bayes.model.groups, weights), before.reused():
            assert torch.equal(bayes.network(**inputs).logits, expected)
    if kind in ROWS:
        repeated = {name: torch.cat([value] * 3) for name, value in inputs.items()}
        with using_draw(bayes.model.groups, stacked), before.reused(3):
            torch.testing.assert_close(bayes.network(**repeated).logits, torch.cat(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "longformer", "deberta"])
@torch.no_grad()
def test_frozen_blocks_run_once(kind):
    bayes, inputs = adapted(kind, last_block=True), batch_of(kind)
    bayes.config.use_cache = False  # as predict has it: blocks that fill a cache run
    blocks = [module for module in bayes.network.modules() if isinstance(module, nn.ModuleList) and len(module) == 2]
    runs = [0, 0]
    for index, block in enumerate(blocks[0]):
        inner = next(module for module in block.modules() if "Norm" in type(module).__name__)
        inner.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    before = Prefix(bayes.network, bayes.model.groups)
    before.run(inputs)
    for weights in draws(bayes, 4)[0]:
        with using_draw(bayes.model.groups, weights), before.reused():
            bayes.network(**inputs)
    assert runs[0] == 1
    assert runs[1] >= 4


@torch.no_grad()
def test_with_adapters_switched_off():
    """No adapter is called, so everything is the same for all draws."""
    bayes, inputs = adapted(), batch_of("bert")
    before = Prefix(bayes.network, bayes.model.groups)
    with bayes.disable_adapter():
        expected = bayes.network(**inputs).logits
        before.run(inputs)
        with using_draw(bayes.model.groups, draws(bayes, 1)[0][0]), before.reused():
            assert torch.equal(bayes.network(**inputs).logits, expected)


class Toy(nn.Module):
    """``part``, as many times as ``calls`` says, then an adapter, then ``part`` once more with ``again``."""

    def __init__(self, part, *, calls=1, again=False, box=False):
        super().__init__()
        self.part, self.calls, self.again, self.box = part, calls, again, box
        self.adapted = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(self.calls):
            x = x + self.part(Box(x) if self.box else x)
        x = self.adapted(x)
        return x + self.part(x) if self.again else x


class Box:
    def __init__(self, value):
        self.value = value


class Part(nn.Linear):
    """A layer that is odd in one way."""

    def __init__(self, oddity=None):
        super().__init__(4, 4)
        self.oddity, self.runs = oddity, 0

    def forward(self, x):
        if self.oddity == "takes an object":
            x = x.value
        if self.oddity == "changes itself":
            self.runs += 1
        if self.oddity == "returns its input":
            return x
        return super().forward(x).sin()


def toy(network):
    """The network's PEFT model, its one group, and weights of three draws."""
    lora = LoraConfig(r=2, target_modules=["adapted"], init_lora_weights=False)
    peft_model = get_peft_model(network, lora)
    make_samplable(peft_model)
    return peft_model.eval(), find_groups(peft_model), torch.randn(3, 1, 4, 2)


ODD = {
    "called twice": (Part, {"calls": 2}, False),
    "called again later": (Part, {"again": True}, True),
    "takes an object": (lambda: Part("takes an object"), {"box": True}, False),
    "changes itself": (lambda: Part("changes itself"), {}, False),
    "returns its input": (lambda: Part("returns its input"), {}, False),
    "works in place": (lambda: nn.Sequential(Part(), nn.ReLU(inplace=True)), {}, False),
    "nothing odd": (Part, {}, True),
}


@pytest.mark.parametrize(("make", "options", "taken"), ODD.values(), ids=ODD)
@torch.no_grad()
def test_only_what_nothing_else_can_tell(make, options, taken):
    part = make()
    network, groups, weights = toy(Toy(part, **options))
    x = torch.randn(5, 4)
    before = Prefix(network, groups)
    before.run({"x": x})
    assert (part in before.outputs) == taken
    for drawn in weights:
        with using_draw(groups, {groups[0].name: drawn}):
            expected = network(x=x)
            with before.reused():
                assert torch.equal(network(x=x), expected)
    if getattr(part, "oddity", None) == "changes itself":
        assert part.runs == 1 + 2 * len(weights)


@torch.no_grad()
def test_outputs_are_not_shared():
    """A network may go on in place with what a module returned."""

    class InPlace(Toy):
        def forward(self, x):
            x = self.part(x)
            x += 1
            return self.adapted(x)

    network, groups, _ = toy(InPlace(Part()))
    x = torch.randn(5, 4)
    expected = network(x=x)
    before = Prefix(network, groups)
    before.run({"x": x})
    for _ in range(2):
        with before.reused():
            assert torch.equal(network(x=x), expected)


class Positions(nn.Module):
    """(positions, 4) for an input of shape (examples, positions, 4), or something with neither for its rows."""

    def __init__(self, across=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 4))
        self.across = across

    def forward(self, x):
        return x.transpose(0, 1).cos() if self.across else self.weight[: x.shape[1]].sin()


@pytest.mark.parametrize("examples", [1, 2, 3, 5])
@pytest.mark.parametrize("across", [False, True])
@torch.no_grad()
def test_only_rows_of_examples_are_repeated(examples, across):
    """As many examples as positions do not make positions rows."""

    class Encoder(Toy):
        def forward(self, x):
            positions = self.part(x)
            return self.adapted(x + (positions.transpose(0, 1) if across else positions))

    part = Positions(across)
    network, groups, weights = toy(Encoder(part))
    x = torch.randn(examples, 3, 4)
    expected = []
    for drawn in weights:
        with using_draw(groups, {groups[0].name: drawn}):
            expected.append(network(x=x))
    before = Prefix(network, groups)
    before.run({"x": x}, repeat=True)
    assert part in before.outputs
    with using_draw(groups, {groups[0].name: weights}), before.reused(3):
        torch.testing.assert_close(network(x=torch.cat([x] * 3)), torch.cat(expected))


@torch.no_grad()
def test_kept_memory_has_a_limit(monkeypatch):
    bayes, inputs = adapted(last_block=True), batch_of("bert")
    expected = bayes.network(**inputs).logits
    sizes = []
    for limit in (2**30, 3 * 8 * 16 * 4, 0):  # everything, the embeddings alone, nothing
        monkeypatch.setattr(prefix, "MAX_KEPT_BYTES", limit)
        before = Prefix(bayes.network, bayes.model.groups)
        before.run(inputs)
        sizes.append(len(before.outputs))
        with before.reused():
            assert torch.equal(bayes.network(**inputs).logits, expected)
    assert sizes[0] > sizes[1] == 1 > sizes[2] == 0


@torch.no_grad()
def test_leaves_no_trace():
    """Also not where something else, such as accelerate, has replaced a forward; and not after an error."""
    bayes, inputs = adapted(), batch_of("bert")
    embeddings = bayes.network.get_base_model().bert.embeddings
    own = embeddings.forward
    embeddings.forward = lambda *args, **kwargs: own(*args, **kwargs) + 0.5
    theirs = embeddings.forward
    expected = bayes.network(**inputs).logits
    before = Prefix(bayes.network, bayes.model.groups)
    hooks = sum(len(module._forward_pre_hooks) for module in bayes.modules())
    before.run(inputs)
    with before.reused():
        assert torch.equal(bayes.network(**inputs).logits, expected)
    with pytest.raises(IndexError):
        before.run(inputs | {"input_ids": inputs["input_ids"] + VOCABULARY})
    with pytest.raises(KeyError), before.reused():
        raise KeyError
    assert [module for module in bayes.modules() if "forward" in vars(module)] == [embeddings]
    assert embeddings.forward is theirs
    assert sum(len(module._forward_pre_hooks) for module in bayes.modules()) == hooks
