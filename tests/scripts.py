"""The scripts in ``examples/``, ``studies/`` and ``docs/`` as modules, and scripts in several processes."""

import importlib.util
import os
import subprocess
import sys
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


def launch(*command, processes=2, **options):
    """Run a script or module in several processes; a hang fails the test."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*torchrun, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def complaints(done):
    """What the processes themselves said, without the launcher's own traceback."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("[rank") and "Warning" not in line]
    return "\n".join(lines) or done.stderr[-3000:]
