"""The layout: small folders, installed as one package whose wheel holds all of it, and tests that stand alone."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

import bayeslora
import bayeslora.analysis

ROOT = Path(__file__).parent.parent
ROOTS = {
    "bayeslora": "bayeslora",
    "bayeslora.models": "models",
    "bayeslora.guides": "guides",
    "bayeslora.analysis": "analysis",
}
FOLDERS = {
    ".".join([package, *file.parent.relative_to(ROOT / root).parts]): file.parent.relative_to(ROOT).as_posix()
    for package, root in ROOTS.items()
    for file in (ROOT / root).rglob("__init__.py")
}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_listed():
    tools = project()["tool"]["setuptools"]
    assert sorted(tools["packages"]) == sorted(FOLDERS)
    assert tools["package-dir"] == ROOTS
    listed = [ROOT / folder for folder in FOLDERS.values()]
    nested = [file for root in ROOTS.values() for file in (ROOT / root).rglob("*.py") if file.parent not in listed]
    assert nested == []  # a sub-folder would be missing from the wheel


def test_no_folder_is_crowded():
    """Whoever looks for something reads a folder's names: sixteen files of Python are as many as one takes in."""
    files = [file for root in (*ROOTS.values(), "tests") for file in (ROOT / root).rglob("*.py")]
    counts = Counter(file.parent.relative_to(ROOT).as_posix() for file in files)
    assert {folder: count for folder, count in counts.items() if count > 16} == {}


def test_no_file_imports_a_test_file():
    """What tests share lies beside ``conftest.py``; imported from each other they could not be moved or run alone."""
    files = list((ROOT / "tests").rglob("*.py"))
    tests = {file.stem for file in files if file.name.startswith("test_")}
    imported = {file.relative_to(ROOT).as_posix(): {*_imports(file)} & tests for file in files}
    assert {file: names for file, names in imported.items() if names} == {}


def _imports(file):
    """Every word of the names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (word for name in names for word in name.split("."))


def test_constraints_pin_every_dependency():
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    meta = project()["project"]
    wanted = [*meta["dependencies"], *(d for extra in meta["optional-dependencies"].values() for d in extra)]
    names = {d.split(">")[0].split("[")[0].strip().lower() for d in wanted} - {"bayeslora"}
    assert names - pinned == set()
    assert all(">=" in d or d.startswith("bayeslora[") for d in wanted)  # lower bounds


def test_versions_agree():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {bayeslora.__version__}" in changelog


def built(tmp_path):
    """The sdist of this folder, and the wheel of what it holds, as an index would have them: files of each, by name."""
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building without network needs setuptools >= 77 in this environment")
    sdist = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", sdist], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(tmp_path / "sdist", filter="data")
    (source,) = (tmp_path / "sdist").iterdir()
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path / "site")
    return [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        for folder in (source, tmp_path / "site")
    ]


@pytest.mark.slow
def test_sdist_and_wheel_hold_every_module_and_work_elsewhere(tmp_path):
    """A module that the sdist lacks is missing from the wheel too, which is built from it, as a release's is."""
    source, site = built(tmp_path)
    modules = {
        f"{package.replace('.', '/')}/{file.name}"
        for package, folder in FOLDERS.items()
        for file in (ROOT / folder).glob("*.py")
    }
    assert modules <= site
    assert {"bayeslora/py.typed", "bayeslora/analysis/report/templates/report.html"} <= site
    assert {name.split("/")[0] for name in site} == {"bayeslora", f"bayeslora-{bayeslora.__version__}.dist-info"}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"} <= source
    assert not any(name.startswith("tests/") for name in source)  # setuptools would add some of them, and not all
    code = (
        "import bayeslora, bayeslora.analysis as a; from bayeslora import *; from bayeslora.analysis import *;"
        "from bayeslora.guides import *; from bayeslora.models import *; from bayeslora.study import *;"
        "print(bayeslora.__file__, a.__file__)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    (tmp_path / "bayeslora").mkdir()  # as a checkout beside a script
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert all(str(tmp_path / "site") in path for path in done.stdout.split())


def test_extras_that_are_named_can_be_installed():
    """Where the package is installed, pip adds an extra of it and asks no index for the package itself."""
    extras = project()["project"]["optional-dependencies"]
    files = [*(file for root in ROOTS.values() for file in (ROOT / root).rglob("*.py")), *(ROOT / "docs").glob("*.md")]
    named = {name for file in files for name in re.findall(r"bayeslora\[(\w+)\]", file.read_text(encoding="utf-8"))}
    assert named >= {"language", "laplace", "ivon"}
    assert named <= {*extras}


@pytest.mark.skipif(
    any(name.startswith("__editable___bayeslora") for name in sys.modules),
    reason="installed by pip install --editable without editable_mode=compat, which the Makefile gives",
)
def test_a_script_beside_a_checkout_imports_the_package(tmp_path):
    (tmp_path / "bayeslora").mkdir()
    (tmp_path / "script.py").write_text("import bayeslora; print(bayeslora.__version__)")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (bayeslora.__version__, "")


def test_importing_peft_after_this_package_says_nothing():
    code = "import bayeslora; bayeslora.BayesLoRA; import peft.tuners.lora.bnb"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert "kernels" not in done.stderr


def test_public_names_resolve():
    for module in (bayeslora, bayeslora.analysis):
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert name in dir(module)
    with pytest.raises(AttributeError, match="nosuch"):
        bayeslora.nosuch  # noqa: B018


TABLES_AND_PICTURES = ["datasets", "matplotlib", "arviz", "pandas", "pyarrow", "sklearn"]


@pytest.mark.parametrize(
    ("use", "stays_out"),
    [
        (
            "import bayeslora, bayeslora.analysis, bayeslora.study;"
            "bayeslora.InputError, bayeslora.MonteCLoRAConfig, bayeslora.Study, dir(bayeslora.analysis)",
            ["torch", "transformers", "peft", "pyro", "scipy", *TABLES_AND_PICTURES],
        ),
        ("from bayeslora import BayesLoRA", TABLES_AND_PICTURES),  # 100 MiB of the process that trains
    ],
)
def test_importing_is_cheap(tmp_path, use, stays_out):
    """What takes seconds and memory to import stays out until it is used."""
    code = f"import sys; {use}; print([name for name in {stays_out} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"
