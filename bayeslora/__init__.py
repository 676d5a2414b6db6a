"""Posteriors for LoRA adapters: MonteCLoRA as a Pyro model over PEFT, with ArviZ diagnostics.

Importing this package loads neither torch nor transformers; each public name is imported on first use.

Examples in docstrings have at hand: every public name; ``np``, ``torch``, ``pyro`` and its distributions, ``dist``;
a tiny classifier ``network`` and its ``tokenizer``; labelled examples, ``dataset`` as a list and ``batch`` as tensors;
``bayes``, a fitted :class:`bayeslora.BayesLoRA`; ``results``, the tidy table of a study; and, where they name them, the
folders ``base`` with that network and ``reviews`` with a task's data.

Example:
    >>> __version__.count(".")
    2
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora._version import __version__

_here = Path(__file__).parent
if not (_here / "models").is_dir():  # a checkout: models/, guides/ and analysis/ sit beside this folder
    __path__.append(str(_here.parent))

_HOMES = {
    "BayesLoRA": "bayeslora.module",
    "BayesTrainer": "bayeslora.training.trainer",
    "CooperativeELBO": "bayeslora.elbo",
    "InputError": "bayeslora.errors",
    "MonteCLoRAConfig": "bayeslora.config",
    "Study": "bayeslora.study.spec",
    "TrainingDivergedError": "bayeslora.errors",
    "compare": "bayeslora.study.compare",
    "diagnose": "bayeslora.inference.diagnostics",
    "fit": "bayeslora.training.fit",
    "load_task": "bayeslora.tasks.load",
    "report": "bayeslora.command.reporting",
    "run_study": "bayeslora.study.runner",
}

__all__ = [
    "BayesLoRA",
    "BayesTrainer",
    "CooperativeELBO",
    "InputError",
    "MonteCLoRAConfig",
    "Study",
    "TrainingDivergedError",
    "__version__",
    "compare",
    "diagnose",
    "fit",
    "load_task",
    "report",
    "run_study",
]

if TYPE_CHECKING:
    from bayeslora.command.reporting import report
    from bayeslora.config import MonteCLoRAConfig
    from bayeslora.elbo import CooperativeELBO
    from bayeslora.errors import InputError, TrainingDivergedError
    from bayeslora.inference.diagnostics import diagnose
    from bayeslora.module import BayesLoRA
    from bayeslora.study.compare import compare
    from bayeslora.study.runner import run_study
    from bayeslora.study.spec import Study
    from bayeslora.tasks.load import load_task
    from bayeslora.training.fit import fit
    from bayeslora.training.trainer import BayesTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bayeslora' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
