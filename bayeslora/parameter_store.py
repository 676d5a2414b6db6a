"""Pyro keeps parameters by name in one store for the whole process: here it is one model's, and one guide's.

A module whose names are in the store already takes over the values there, and the optimizer goes on with those: a
second model would be fitted by name only.
"""

import weakref

import pyro
from torch import nn

from bayeslora.errors import InputError

_owners: dict[str, weakref.ref] = {}
_store: list[dict] = []  # the store's own dictionary when the owners came; clearing the store makes another


def claim_store(role: str, module: nn.Module) -> None:
    """Make the store this module's, or see that it is.

    Args:
        role: ``"model"`` or ``"guide"``: what its parameters' names begin with.
        module: Whose parameters are about to be registered.

    Raises:
        InputError: if another module of that role has its parameters there.
    """
    held = pyro.get_param_store()._params
    if not held or not _store or _store[0] is not held:
        _store[:] = [held]
        _owners.clear()
    owner = _owners.setdefault(role, weakref.ref(module))
    if owner() is not module:
        raise InputError(
            f"Pyro's parameter store holds the parameters of another {role}, and this one would take them over: call "
            f"pyro.clear_param_store() before fitting a second one, and build the {role} again"
        )
