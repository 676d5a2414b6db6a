"""Posteriors for LoRA adapters: MonteCLoRA as a Pyro model over PEFT, with ArviZ diagnostics.

Importing this package loads neither torch nor transformers; names of ``__init__.pyi`` are imported on first use.
"""

from pathlib import Path

import lazy_loader

_here = Path(__file__).parent
if not (_here / "models").is_dir():  # a checkout: models/, guides/ and analysis/ sit beside this folder
    __path__.append(str(_here.parent))

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
