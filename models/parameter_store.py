"""Pyro keeps parameters by name in one store for the whole process: here each name is one module's.

A module whose names are in the store already takes over the values there, and the optimizer goes on with those: a
second model would be fitted by name only.
"""

import weakref
from collections.abc import Iterable

import pyro
from torch import nn

from bayeslora.errors import InputError

_owners: dict[str, weakref.ref] = {}
_store: list[dict] = []  # the store's own dictionary when the owners came; clearing the store makes another


def claim_names(names: Iterable[str], module: nn.Module) -> None:
    """Make these names in the store a module's, or see that they are.

    Args:
        names: Of the parameters that are about to be registered.
        module: Whose they are.

    Raises:
        InputError: if one of them is another module's.
    """
    held = pyro.get_param_store()._params
    if not held or not _store or _store[0] is not held:
        _store[:] = [held]
        _owners.clear()
    for name in names:
        if _owners.setdefault(name, weakref.ref(module))() is not module:
            raise InputError(
                f"Pyro's parameter store holds {name!r} of another {type(module).__name__}, and this one would take it "
                "over: call pyro.clear_param_store() before fitting a second one, and build it again"
            )
