"""Which guide a posterior has."""

from collections.abc import Callable
from typing import Any

from torch import nn

from bayeslora.errors import InputError
from bayeslora.guides import GUIDES
from bayeslora.models.joint import JointModel


def guide_for(model: JointModel, guide: Callable[[Any], nn.Module] | None) -> nn.Module:
    """The guide given, or the one that the configuration names, for this model and where its network is."""
    if guide is None:
        if model.config.guide not in GUIDES:
            raise InputError(
                f"no guide {model.config.guide!r}; there are {', '.join(GUIDES)}, or pass a class as guide="
            )
        guide = GUIDES[model.config.guide]
    if isinstance(guide, nn.Module):
        raise InputError(
            f"guide= takes a class or function of the model, not a finished {type(guide).__name__}: "
            "a guide belongs to the model it was built from"
        )
    return guide(model).to(next(model.network.parameters()).device)
