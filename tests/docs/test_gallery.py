"""The gallery is drawn by its command, and the one in the repository is complete."""

import importlib.util
import re
from pathlib import Path

import pytest

from bayeslora import analysis

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gallery")
    spec = importlib.util.spec_from_file_location("make_gallery", DOCS / "make_gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return folder, module.main(folder)


def test_every_picture_is_written_small_and_listed(gallery):
    folder, written = gallery
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 100_000
    listed = re.findall(r"\]\((gallery/\w+\.png)\)", (folder / "gallery.md").read_text(encoding="utf-8"))
    assert listed == [str(path.relative_to(folder)) for path in written]
    assert {path.name for path in (folder / "gallery").iterdir()} == {path.name for path in written}


def test_the_gallery_of_the_repository_shows_what_the_command_draws(gallery):
    folder, written = gallery
    assert (DOCS / "gallery.md").read_text(encoding="utf-8") == (folder / "gallery.md").read_text(encoding="utf-8")
    assert {path.name for path in (DOCS / "gallery").iterdir()} == {path.name for path in written}


def test_no_plot_is_left_out():
    source = (DOCS / "make_gallery.py").read_text(encoding="utf-8")
    drawn = set(re.findall(r"analysis\.(plot_\w+)", source))
    modules = (DOCS.parent / "analysis" / "plots").glob("*.py")
    plots = {name for module in modules for name in re.findall(r"^def (plot_\w+)", module.read_text("utf-8"), re.M)}
    assert plots
    assert plots <= drawn & set(analysis.__all__)
