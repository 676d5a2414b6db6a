"""The analysis without torch, under ArviZ 1.x and a newer Python: `make test-arviz1` makes that environment."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("tests/test_inference_data.py", "tests/test_streaming.py")


def arviz1_python() -> Path:
    """An interpreter with ArviZ 1.x: the one the environment names, or that of ``.venv-arviz1``."""
    python = Path(os.environ.get("BAYESLORA_ARVIZ1_PYTHON", ROOT / ".venv-arviz1" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(f"there is no {python}: run make test-arviz1, or set BAYESLORA_ARVIZ1_PYTHON")
    return python


def test_arviz_data_are_the_same_under_arviz_1():
    """The very tests that run here under ArviZ 0.23, in the other interpreter."""
    python = arviz1_python()
    asked = "import arviz, importlib.util as u; print(arviz.__version__, u.find_spec('torch'))"
    version = subprocess.run([python, "-W", "ignore", "-c", asked], capture_output=True, text=True, check=True).stdout
    assert int(version.split(".")[0]) >= 1, f"{python} has ArviZ {version}"
    assert version.split()[1] == "None", f"{python} has torch, so this would not show that none is needed"
    command = [python, "-m", "pytest", "--noconftest", "-q", "-p", "no:cacheprovider", *FILES]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MPLBACKEND": "Agg"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_a_file_of_one_arviz_opens_in_the_other(tmp_path):
    """Written here, read there."""
    import numpy as np

    from bayeslora.analysis import build_inference_data, save_arviz

    values = np.arange(6.0).reshape(1, 2, 3)
    data = build_inference_data({"posterior": {"x": values}}, {"city": ["a", "b", "c"]}, {"x": ["city"]}, {"seed": 1})
    path = save_arviz(data, tmp_path / "draws.nc")
    code = (
        "from bayeslora.analysis import load_arviz\n"
        f"data = load_arviz({str(path)!r})\n"
        "print(type(data).__name__, data['posterior']['x'].sel(city='b').values.tolist(), data.attrs['seed'])"
    )
    found = subprocess.run([arviz1_python(), "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.split(maxsplit=1) == ["DataTree", "[[1.0, 4.0]] 1\n"]
