"""The run folder: what is torn does not count, and only one process works in it."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from bayeslora import InputError
from bayeslora.errors import FolderInUseError, StorageError
from bayeslora.files.writing import write_json
from bayeslora.storage.lock import LOCK_FILE, lock_folder
from bayeslora.storage.run_folder import (
    SEAL_FILE,
    delete,
    foreign_entry,
    is_whole,
    last_checkpoint,
    reporting_full_disk,
    rotate,
    seal,
)
from tests.folders import FullAfter


def checkpoint(run, step, *, best=None):
    """A sealed checkpoint of a few files, which names ``best`` (a step) as the best so far."""
    folder = run / "checkpoints" / f"checkpoint-{step}"
    (folder / "deep").mkdir(parents=True)
    recorded = f"elsewhere/checkpoint-{best}" if best else None
    (folder / "trainer_state.json").write_text(json.dumps({"best_model_checkpoint": recorded}))
    (folder / "optimizer.pt").write_bytes(bytes(range(256)))
    (folder / "deep" / "empty").write_bytes(b"")
    seal(folder)
    return folder


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


class TestSeal:
    def test_any_change_breaks_it(self, tmp_path):
        whole = checkpoint(tmp_path, 1)
        assert is_whole(whole)
        for path in [path for path in whole.rglob("*") if path.is_file()]:
            content = path.read_bytes()
            for length in range(len(content) - 1):  # the seal ends in a newline that it does not need
                path.write_bytes(content[:length])
                assert not is_whole(whole), (path.name, length)
            if content:
                path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
                assert not is_whole(whole), path.name
            path.unlink()
            assert not is_whole(whole), path.name
            path.mkdir()
            assert not is_whole(whole), path.name
            path.rmdir()
            path.write_bytes(content)
        assert is_whole(whole)

    def test_comes_last(self, tmp_path):
        """A checkpoint that is being written, or deleted, in any order of its other files."""
        whole = checkpoint(tmp_path, 1)
        files = [path for path in whole.rglob("*") if path.is_file() and path.name != SEAL_FILE]
        for count in range(len(files) + 1):
            torn = tmp_path / f"torn-{count}"
            for path in files[:count]:
                target = torn / path.relative_to(whole)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
            assert not is_whole(torn)

    def test_deleted_by_halves(self, tmp_path, monkeypatch):
        whole = checkpoint(tmp_path, 1)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # killed before it
        delete(whole)
        assert (whole / "optimizer.pt").is_file()
        assert last_checkpoint(tmp_path) is None

    @pytest.mark.parametrize("content", ["{}", "[]", "null", '{"trainer_state.json": 1}', '["trainer_state.json"]', ""])
    def test_nonsense(self, content, tmp_path):
        whole = checkpoint(tmp_path, 1)
        (whole / SEAL_FILE).write_text(content)
        assert not is_whole(whole)


class TestLastCheckpoint:
    def test_newest_by_number(self, tmp_path):
        assert last_checkpoint(tmp_path) is None
        newest = [checkpoint(tmp_path, step) for step in (9, 100, 20)][1]
        (tmp_path / "checkpoints" / "checkpoint-last").mkdir()
        (tmp_path / "checkpoints" / "checkpoint-200").write_text("a file")
        assert last_checkpoint(tmp_path) == newest

    def test_needs_the_best(self, tmp_path, caplog):
        """The run's end loads the best one: without it, what follows could not be what would have been."""
        first, second, last = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2, best=2), checkpoint(tmp_path, 3, best=2)
        assert last_checkpoint(tmp_path) == last
        (second / "optimizer.pt").write_bytes(b"")
        assert last_checkpoint(tmp_path) == first
        assert f"{last} needs {second}, which is incomplete or damaged; using the one before" in caplog.text
        assert f"{second} is incomplete or damaged; using the one before" in caplog.text


class TestRotate:
    @pytest.mark.parametrize(
        ("limit", "left"),
        [(1, [2, 9]), (2, [2, 9]), (3, [2, 8, 9]), (4, [2, 7, 8, 9]), (None, [1, 2, 7, 8, 9])],
    )
    def test_keeps_current_best_and_newest(self, limit, left, tmp_path):
        _, best, _, _, current = [checkpoint(tmp_path, step) for step in (1, 2, 7, 8, 9)]
        (checkpoint(tmp_path, 10) / SEAL_FILE).unlink()
        rotate(tmp_path, current, best, limit)
        assert names(tmp_path) == [f"checkpoint-{step}" for step in left]

    def test_without_a_best(self, tmp_path):
        *_, current = [checkpoint(tmp_path, step) for step in (1, 2, 3)]
        rotate(tmp_path, current, None, 2)
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def python_writes(folder):
    (folder / "file").write_bytes(bytes(5000))


def torch_writes(folder):
    torch.save(torch.zeros(5000), folder / "file")


def safetensors_writes(folder):
    safetensors.torch.save_file({"weight": torch.zeros(5000)}, folder / "file")


class TestFullDisk:
    @pytest.mark.parametrize("write", [python_writes, torch_writes, safetensors_writes])
    def test_one_clear_error(self, write, tmp_path):
        good = checkpoint(tmp_path, 1)
        torn = tmp_path / "checkpoints" / "checkpoint-2"
        torn.mkdir()
        with pytest.raises(StorageError) as caught, FullAfter(1000), reporting_full_disk(tmp_path):
            write(torn)
        text = str(caught.value)
        assert f"writing to {tmp_path} failed (" in text
        assert "MiB free); " in text
        assert f"the last good checkpoint is {good}. Free some space, then resume the run" in text
        assert names(tmp_path) == ["checkpoint-1"]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
    def test_no_space(self, tmp_path):
        with (
            pytest.raises(StorageError, match=r"No space left .* no checkpoint had been saved yet"),
            reporting_full_disk(tmp_path),
            open("/dev/full", "wb", buffering=0) as full,
        ):
            full.write(b"x")

    @pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "no data"), RuntimeError("shapes differ")])
    def test_other_errors_pass(self, error, tmp_path):
        with pytest.raises(type(error)) as caught, reporting_full_disk(tmp_path):
            raise error
        assert caught.value is error

    def test_json_stays_as_it_was(self, tmp_path):
        write_json(tmp_path / "run.json", {"finished": False})
        with pytest.raises(OSError, match="File too large"), FullAfter(1000):
            write_json(tmp_path / "run.json", {"history": ["x"] * 1000})
        assert json.loads((tmp_path / "run.json").read_text()) == {"finished": False}
        assert foreign_entry(tmp_path, "run.json") is None


HOLD = """
import sys
from pathlib import Path
from bayeslora import InputError
from bayeslora.storage.lock import lock_folder
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock_folder(Path(sys.argv[1])):
        print("holds", flush=True)
        sys.stdin.readline()
except InputError as error:
    print(error, flush=True)
"""


@pytest.fixture
def spawn(tmp_path):
    """Starts processes that take the lock of ``tmp_path`` when they are sent a line, and hold it until the next."""
    started = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def send(process):
    process.stdin.write("\n")
    process.stdin.flush()


def say(process):
    send(process)
    return process.stdout.readline().strip()


class TestLock:
    def test_makes_and_removes(self, tmp_path):
        with lock_folder(tmp_path / "new" / "run"):
            holder = json.loads((tmp_path / "new" / "run" / LOCK_FILE).read_text())
            assert (holder["pid"], holder["host"]) == (os.getpid(), socket.gethostname())
        assert list((tmp_path / "new" / "run").iterdir()) == []
        with pytest.raises(KeyboardInterrupt), lock_folder(tmp_path):
            raise KeyboardInterrupt
        assert not (tmp_path / LOCK_FILE).exists()

    def test_twice_in_one_process(self, tmp_path):
        with lock_folder(tmp_path):
            with pytest.raises(FolderInUseError, match=f"by process {os.getpid()} on"), lock_folder(tmp_path):
                pass
            assert (tmp_path / LOCK_FILE).exists()

    def test_held_by_another_process(self, spawn, tmp_path):
        first = spawn()
        assert say(first) == "holds"
        started = json.loads((tmp_path / LOCK_FILE).read_text())["started"]
        assert abs(time.mktime(time.strptime(started, "%Y-%m-%d %H:%M:%S")) - time.time()) < 60
        with pytest.raises(InputError) as caught, lock_folder(tmp_path):
            pass
        assert str(caught.value) == (
            f"{tmp_path} is in use by process {first.pid} on {socket.gethostname()}, started {started} "
            f"(lock file {tmp_path / LOCK_FILE}): wait for it, stop it, or give another folder"
        )
        send(first)
        assert first.wait(10) == 0
        with lock_folder(tmp_path):
            pass

    @pytest.mark.parametrize("reaped", [True, False])
    def test_killed_process(self, reaped, spawn, tmp_path, caplog):
        first = spawn()
        assert say(first) == "holds"
        first.send_signal(signal.SIGKILL)
        if reaped:
            first.wait(10)
        else:  # a zombie: its number is still taken
            os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
        with lock_folder(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert f"taking over {tmp_path / LOCK_FILE}: process {first.pid} on" in caplog.text
        assert not (tmp_path / LOCK_FILE).exists()

    def test_number_used_again(self, tmp_path, caplog):
        """A live process with the lock's number, but not the one that took the lock."""
        with lock_folder(tmp_path):
            holder = json.loads((tmp_path / LOCK_FILE).read_text())
        write_json(tmp_path / LOCK_FILE, holder | {"identity": "an earlier start"})
        with lock_folder(tmp_path):
            assert "taking over" in caplog.text

    def test_never_signed(self, tmp_path, caplog):
        (tmp_path / LOCK_FILE).write_text("")
        with lock_folder(tmp_path):
            assert "a process that did not live to sign it is no longer running" in caplog.text

    def test_another_host(self, tmp_path):
        record = {"pid": 7, "host": "node-42", "started": "yesterday", "identity": "x"}
        write_json(tmp_path / LOCK_FILE, record)
        with (
            pytest.raises(
                FolderInUseError, match=r"process 7 on node-42, started yesterday .* if it does not, delete the lock"
            ),
            lock_folder(tmp_path),
        ):
            pass
        assert json.loads((tmp_path / LOCK_FILE).read_text()) == record

    def test_one_of_many_takes_over(self, spawn, tmp_path):
        processes = [spawn() for _ in range(4)]
        write_json(tmp_path / LOCK_FILE, {"pid": 2**22 + 1, "host": socket.gethostname(), "identity": "gone"})
        for process in processes:
            send(process)
        said = [process.stdout.readline().strip() for process in processes]
        assert said.count("holds") == 1
        winner = processes[said.index("holds")].pid
        assert sum(f"is in use by process {winner} on" in line for line in said) == 3

    def test_a_lock_that_is_not_ours_stays(self, tmp_path):
        with lock_folder(tmp_path):
            write_json(tmp_path / LOCK_FILE, {"pid": 7, "host": "node-42"})  # deleted, and another run began
        assert (tmp_path / LOCK_FILE).exists()

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with (
            pytest.raises(InputError, match=r"cannot write in .*file/run: .*Not a directory"),
            lock_folder(tmp_path / "file" / "run"),
        ):
            pass


def test_foreign_entry(tmp_path):
    for name in ("run.json", ".run.json.17.tmp", LOCK_FILE):
        (tmp_path / name).touch()
    assert foreign_entry(tmp_path, "run.json") is None
    assert foreign_entry(tmp_path).name == ".run.json.17.tmp"
    (tmp_path / "thesis.tex").touch()
    assert foreign_entry(tmp_path, "run.json").name == "thesis.tex"


def _write_often(path):
    for number in range(200):
        write_json(path, {"number": number}, shared=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_write_one_file(tmp_path):
    writers = [
        multiprocessing.get_context("fork").Process(target=_write_often, args=(tmp_path / "one.json",))
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]
    assert json.loads((tmp_path / "one.json").read_text()) == {"number": 199}
