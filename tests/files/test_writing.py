"""What is written is there whole or not at all, and what was there before stays until then."""

import hashlib
import json

import pytest

from bayeslora.files.writing import replacing, replacing_folder, replacing_path, sha256_of, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def put(write, path, data, interrupt=False):
    with write(path) as unfinished:
        unfinished.write_bytes(data) if write is replacing_path else unfinished.write(data)
        if interrupt:
            raise KeyboardInterrupt


@pytest.mark.parametrize("write", [replacing, replacing_path])
def test_a_file_stays_until_the_new_one_is_whole(tmp_path, write):
    path = tmp_path / "numbers.json"
    write_json(path, {"old": 1})
    with pytest.raises(KeyboardInterrupt):
        put(write, path, b"half", interrupt=True)
    assert json.loads(path.read_text()) == {"old": 1}
    put(write, path, b"[2]")
    assert json.loads(path.read_text()) == [2]


class TestFolders:
    def test_is_replaced_whole(self, tmp_path):
        folder = tmp_path / "adapters" / "mine"
        for name in ("first", "second"):
            with replacing_folder(folder) as new:
                (new / name).write_text("x")
                assert not (folder / name).exists()
            assert names(folder) == [name]
        assert names(folder.parent) == ["mine"]

    def test_stays_when_writing_fails(self, tmp_path):
        with replacing_folder(tmp_path / "mine") as new:
            (new / "kept").write_text("x")
        with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "mine") as new:
            (new / "missing" / "half").write_text("x")
        assert names(tmp_path) == ["mine"]
        assert names(tmp_path / "mine") == ["kept"]

    def test_comes_back_when_it_cannot_be_replaced(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "kept").write_text("x")
        with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "mine") as new:
            new.rmdir()  # nothing is left to move
        assert names(tmp_path / "mine") == ["kept"]


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
