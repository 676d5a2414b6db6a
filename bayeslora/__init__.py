"""Posteriors for LoRA adapters: MonteCLoRA as a Pyro model over PEFT, with ArviZ diagnostics.

Importing this package loads neither torch nor transformers; each public name (``__init__.pyi``) on first use.

Examples in docstrings have at hand: every public name; ``np``, ``torch``, ``pyro`` and its distributions, ``dist``;
a tiny classifier ``network`` and its ``tokenizer``; labelled examples, ``dataset`` as a list and ``batch`` as tensors;
``bayes``, a fitted :class:`bayeslora.BayesLoRA`; ``results``, the tidy table of a study; and, where they name them, the
folders ``base`` with that network, ``reviews`` with a task's data, and ``runs/reviews``, a run on these.

Example:
    >>> __version__.count(".")
    2
"""

import logging
from pathlib import Path

import lazy_loader

_here = Path(__file__).parent
if not (_here / "models").is_dir():  # a checkout: models/, guides/ and analysis/ sit beside this folder
    __path__.append(str(_here.parent))

# bitsandbytes misses a package for faster four bits on CPUs, and says so whenever PEFT is imported
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda said: "gemm_4bit_forward" not in str(said.msg))

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
