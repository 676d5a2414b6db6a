"""What was learned: calibration, uncertainty, ArviZ data, pictures and tables. Arrays in, arrays out.

Importing this package loads neither torch, ArviZ nor matplotlib; names of ``__init__.pyi`` are imported on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
