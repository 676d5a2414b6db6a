"""Fetching through pip: done once, checked, repaired, and explained when it fails.

Most tests let the real pip install a tiny wheel from a folder, so they need no network.
"""

import hashlib
import os
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from bayeslora.assets import fetch as assets
from bayeslora.errors import InputError

FILES = {"one.txt": b"first file\n", "two.txt": b"second file\n"}
WHEEL = "tinyasset-1.0-py3-none-any.whl"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def open_member(archive, name):
    with zipfile.ZipFile(archive) as wheel, wheel.open(f"tinyasset/{name}") as member:
        yield member


def write_wheel(folder: Path) -> Path:
    info = "tinyasset-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        for name, content in FILES.items():
            wheel.writestr(f"tinyasset/{name}", content)
        wheel.writestr("tinyasset/unwanted.py", "raise SystemExit('nobody asked for this file')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinyasset\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder / WHEEL


def make_asset(archive_sha256: str, files: dict[str, str] | None = None) -> assets._Asset:
    return assets._Asset(
        title="tiny",
        size="1 kB",
        requirement="tinyasset==1.0",
        archive=WHEEL,
        sha256=archive_sha256,
        pip_options=("--no-binary", "some-other-package"),
        open_member=open_member,
        files=files or {name: sha256(content) for name, content in FILES.items()},
    )


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A folder which is all that pip can see."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    folder = tmp_path / "shop"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def tiny(shop):
    return make_asset(sha256(write_wheel(shop).read_bytes()))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pip_fetches_and_only_the_named_files_are_kept(tiny, tmp_path, capsys):
    cache = tmp_path / "cache"
    folder = assets._provide(tiny, cache)
    assert contents(folder) == FILES
    assert [path.name for path in cache.iterdir()] == ["tiny"]  # no temporary folder is left behind
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"bayeslora: fetching tinyasset==1.0 (1 kB) with pip into {cache}\n"


def test_nothing_is_fetched_twice(tiny, shop, tmp_path, capsys):
    folder = assets._provide(tiny, tmp_path)
    (shop / WHEEL).unlink()  # a second fetch would fail
    capsys.readouterr()
    assets._provide.cache_clear()  # as in a new process
    assert assets._provide(tiny, tmp_path) == folder
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"first"), lambda path: path.unlink()])
def test_a_truncated_or_lost_file_is_fetched_again(tiny, tmp_path, capsys, damage):
    folder = assets._provide(tiny, tmp_path)
    damage(folder / "one.txt")
    capsys.readouterr()
    assets._provide.cache_clear()
    assert contents(assets._provide(tiny, tmp_path)) == FILES
    assert "fetching tinyasset==1.0" in capsys.readouterr().err


def test_truncation_is_recognised_by_hash_and_not_by_name(tiny, tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes(b"wrong bytes")
    assert not assets._is_complete(tiny, tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    assert assets._is_complete(tiny, tmp_path)


def test_an_archive_put_into_the_cache_by_hand_is_used(tiny, shop, tmp_path, capsys):
    cache = tmp_path / "cache"
    cache.mkdir()
    (shop / WHEEL).rename(cache / WHEEL)
    assert contents(assets._provide(tiny, cache)) == FILES
    assert capsys.readouterr().err == ""


def test_no_network_says_how_to_provide_the_files(tiny, shop, tmp_path):
    (shop / WHEEL).unlink()
    with pytest.raises(InputError) as caught:
        assets._provide(tiny, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("tiny", "Could not find a version", WHEEL, str(tmp_path / "tiny"), "one.txt, two.txt"):
        assert part in message
    assert "python -m pip download --no-deps --no-binary some-other-package tinyasset==1.0" in message


def test_without_pip_the_message_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(assets.sys, "executable", str(tmp_path / "no-python-here"))
    with pytest.raises(InputError, match=r"cannot run .*no-python-here -m pip .* pip download --no-deps"):
        assets._provide(tiny, tmp_path)


def test_another_archive_of_the_same_name_is_refused_by_pip(shop, tmp_path):
    write_wheel(shop)
    with pytest.raises(InputError, match="DO NOT MATCH THE HASHES"):
        assets._provide(make_asset(sha256(b"what was pinned")), tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_we_check_the_archive_even_if_pip_does_not(shop, tmp_path, monkeypatch):
    def careless_pip(options):
        write_wheel(Path(options[options.index("-d") + 1]))
        return ""

    monkeypatch.setattr(assets, "_pip_download", careless_pip)
    with pytest.raises(InputError, match="wrong sha256"):
        assets._provide(make_asset(sha256(b"what was pinned")), tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_a_file_inside_with_another_hash_is_refused(shop, tmp_path):
    archive = sha256(write_wheel(shop).read_bytes())
    with pytest.raises(InputError, match=r"one\.txt in tinyasset-1\.0-py3-none-any\.whl does not have"):
        assets._provide(make_asset(archive, {"one.txt": sha256(b"another file")}), tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []


def test_racing_processes_leave_whole_files(tiny, shop, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    (shop / WHEEL).rename(cache / WHEEL)
    results: list[dict[str, bytes]] = []

    def provide():
        results.append(contents(assets._provide.__wrapped__(tiny, cache)))

    threads = [threading.Thread(target=provide) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [FILES] * 8


def test_a_cache_that_cannot_be_written_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="set BAYESLORA_CACHE"):
        assets._provide(tiny, tmp_path / "file")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("BAYESLORA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert assets.cache_folder() == tmp_path / ".cache" / "bayeslora"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "bayeslora"
    monkeypatch.setenv("BAYESLORA_CACHE", "~/chosen")
    assert assets.cache_folder() == tmp_path / "chosen"


def test_hashes_of_the_weights_are_those_of_the_authors():
    pinned = assets._ENCODER.files["model.safetensors"]
    assert pinned.startswith("53aa5117")
    assert pinned.endswith("28d9db")
    for asset in (assets._ENCODER, assets._LANGUAGE_MODEL, assets._SENTENCES):
        assert all(len(value) == 64 for value in (asset.sha256, *asset.files.values()))


def test_no_address_of_a_registry_is_written_down():
    assert "://" not in Path(assets.__file__).read_text(encoding="utf-8")


def fetch(provide):
    """The real thing, into the ordinary cache; skipped where pip reaches no package index."""
    try:
        return provide()
    except InputError as error:
        if "Could not find a version" in str(error) or "No module named pip" in str(error):
            pytest.skip(f"pip reaches no package index: {error}")
        raise


def test_the_encoder_is_a_complete_checkpoint():
    folder = fetch(assets.demo_encoder)
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"} < names
    assert sha256((folder / "model.safetensors").read_bytes()).startswith("53aa5117")


def test_the_sentences_of_four_domains_with_their_ratings():
    folder = fetch(assets.rated_sentences)
    counts = {}
    for path in folder.glob("*.txt"):
        stem, kind = path.stem.rsplit("_", 1)
        counts.setdefault(stem, {})[kind] = len(path.read_text(encoding="utf-8-sig").strip().split("\n"))
    assert counts == {
        stem: {"GroundTruth": rows, "anonDataRatings": rows}
        for stem, rows in {
            "movieReviewSnippets": 10605,
            "amazonReviewSnippets": 3708,
            "nytEditorialSnippets": 5190,
            "tweets": 4200,
        }.items()
    }
