"""BayesLoRA's methods spell out the options of the functions that they call: both must have the same."""

import inspect

import pytest

from bayeslora import BayesLoRA, module
from tests.modules import module as posterior

# method to where the function is looked up, under which name
FACADE = {
    "predict": (module, "predict_examples"),
    "tune": (module, "tune_width"),
    "generate": (module, "generate_texts"),
    "posterior_draws": (module, "draws_per_adapter"),
    "prior_draws": (module, "draws_from_prior"),
    "export_draws": (module, "write_draws"),
    "push_to_hub": (module, "push_adapter"),
    "from_pretrained": (module, "open_pretrained"),
}


def parameters(function, leading):
    """Names and defaults, without what the method fills in itself."""
    found = list(inspect.signature(function).parameters.values())[leading:]
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found)
    return {parameter.name: parameter.default for parameter in found}


@pytest.mark.parametrize("name", FACADE)
def test_same_names_defaults_and_order(name):
    owner, attribute = FACADE[name]
    theirs = parameters(getattr(owner, attribute), 1)
    ours = parameters(getattr(BayesLoRA, name), 0 if name == "from_pretrained" else 1)
    assert list(ours) == list(theirs)
    required = {option for option, default in theirs.items() if default is inspect.Parameter.empty}
    assert {option: ours[option] for option in ours if option not in required} == {
        option: default for option, default in theirs.items() if option not in required
    }


@pytest.mark.parametrize("name", FACADE)
def test_every_option_arrives(name, monkeypatch):
    owner, attribute = FACADE[name]
    names = parameters(getattr(owner, attribute), 1)
    given = {option: f"the {option}" for option in names}
    seen = {}

    def record(_, *args, **options):
        seen.update(dict(zip(names, args, strict=False)) | options)

    monkeypatch.setattr(owner, attribute, record)
    getattr(BayesLoRA if name == "from_pretrained" else posterior(), name)(**given)
    assert seen == given


def test_every_method_that_hands_options_on_is_compared():
    """None takes ``**options`` unseen: help() shows what each of them understands."""
    own = [n for n, v in vars(BayesLoRA).items() if not n.startswith("_") and not isinstance(v, property)]
    signatures = {name: inspect.signature(getattr(BayesLoRA, name)) for name in own}
    hiding = [
        name
        for name, signature in signatures.items()
        if any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    ]
    assert hiding == []
