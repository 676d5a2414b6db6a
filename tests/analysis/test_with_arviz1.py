"""One ArviZ reads what the other wrote; `make test-arviz1` makes the other environment, and runs the analysis in it."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def arviz1_python() -> Path:
    """An interpreter with ArviZ 1.x: the one the environment names, or that of ``.venv-arviz1``."""
    python = Path(os.environ.get("BAYESLORA_ARVIZ1_PYTHON", ROOT / ".venv-arviz1" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"there is no {python}: run make test-arviz1, or set BAYESLORA_ARVIZ1_PYTHON")
    return python


def test_a_file_of_one_arviz_opens_in_the_other(tmp_path):
    """Written here, read there."""
    import numpy as np

    from bayeslora.analysis import build_inference_data, save_arviz

    values = np.arange(6.0).reshape(1, 2, 3)
    data = build_inference_data({"posterior": {"x": values}}, {"city": ["a", "b", "c"]}, {"x": ["city"]}, {"seed": 1})
    path = save_arviz(data, tmp_path / "draws.nc")
    code = (
        "import arviz, importlib.util\n"
        "from bayeslora.analysis import load_arviz\n"
        "assert int(arviz.__version__.split('.')[0]) >= 1 and not importlib.util.find_spec('torch')\n"
        f"data = load_arviz({str(path)!r})\n"
        "print(type(data).__name__, data['posterior']['x'].sel(city='b').values.tolist(), data.attrs['seed'])"
    )
    found = subprocess.run([arviz1_python(), "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split(maxsplit=1) == ["DataTree", "[[1.0, 4.0]] 1\n"]
