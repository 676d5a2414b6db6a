"""The layout is installed as one package, and the wheel holds all of it."""

import subprocess
import sys
import tomllib
import zipfile
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
                    for file in (ROOT / folder).glob("*.py")}  # fmt: skip
        assert expected <= names
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
