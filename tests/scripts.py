"""The scripts in ``examples/``, ``studies/`` and ``docs/``, as modules."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def script(path):
    """The module at ``path``, such as ``"examples/vision"``."""
    spec = importlib.util.spec_from_file_location(Path(path).name, ROOT / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names_of(folder):
    """Those of a folder, as :func:`script` takes them."""
    return {f"{folder}/{path.stem}" for path in (ROOT / folder).glob("*.py")}
