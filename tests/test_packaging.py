"""The layout: small folders, installed as one package whose wheel holds all of it, and tests that stand alone."""

import ast
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOTS = {"bayeslora": "bayeslora", "bayeslora.models": "models", "bayeslora.guides": "guides",
         "bayeslora.analysis": "analysis"}  # fmt: skip
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
    import bayeslora

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {bayeslora.__version__}" in changelog


def test_wheel_holds_every_module_and_works_elsewhere(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building the wheel without network needs setuptools >= 77 in this environment")
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        expected = {f"{package.replace('.', '/')}/{file.name}" for package, folder in FOLDERS.items()
                    for file in (ROOT / folder).glob("*.py*")}  # fmt: skip
        assert expected <= names  # the .pyi among them, which says where each public name lies
        assert "bayeslora/py.typed" in names
        assert not any(name.split("/")[0] in ("models", "guides", "analysis", "tests") for name in names)
        archive.extractall(tmp_path / "site")
    code = (
        "import bayeslora, bayeslora.models, bayeslora.guides, bayeslora.analysis as a;"
        "from bayeslora import *; from bayeslora.analysis import to_arviz;"
        "print(bayeslora.__file__, a.__file__)"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert all(str(tmp_path / "site") in path for path in done.stdout.split())


def test_public_names_resolve():
    import bayeslora
    import bayeslora.analysis

    for module in (bayeslora, bayeslora.analysis):
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert name in dir(module)
    with pytest.raises(AttributeError, match="nosuch"):
        bayeslora.nosuch  # noqa: B018
