"""Generated code can do no harm, and does not run unless it is asked for."""

import itertools
import platform
import sys
import time
from pathlib import Path

import pytest

from bayeslora import InputError
from bayeslora.judging import code_execution
from bayeslora.judging.code_execution import humaneval_program, mean_pass_at_k, pass_at_k, run_program

confined = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="confined by Linux on x86-64 only"
)


def run(program, **options):
    return run_program(program, execute_generated_code=True, **options)


def test_nothing_runs_without_the_switch(tmp_path):
    for switch in (False, 1, "yes"):
        with pytest.raises(InputError, match="execute_generated_code=True"):
            run_program("import os", execute_generated_code=switch)
    with pytest.raises(InputError, match="execute_generated_code=True"):
        run_program("import os")


@confined
def test_a_program_passes_or_fails_by_its_own_doing():
    prompt = 'def add(a, b):\n    """Sum of a and b."""\n'
    test = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    assert run(humaneval_program(prompt, "    return a + b", test, "add")).passed
    assert run(humaneval_program(prompt, "    return a - b", test, "add")) == (False, "AssertionError")
    assert run(humaneval_program(prompt, "    return a +", test, "add")) == (False, "SyntaxError")
    whole = "def add(x, y):\n    return x + y\n"
    assert run(humaneval_program(prompt, whole, test, "add")).passed
    assert run(humaneval_program(prompt, f"Here it is:\n\n```python\n{whole}```\nIt adds.", test, "add")).passed
    assert run(humaneval_program(prompt, "```\n    return a + b\n```", test, "add")).passed
    assert not run(humaneval_program(prompt, f"```python\n{whole.replace('+', '-')}```", test, "add")).passed
    assert run("import re, math, collections, heapq, hashlib, datetime, typing, itertools, random, string").passed
    assert run("raise SystemExit(0)") == (False, "SystemExit")
    assert run("import os; os._exit(0)") == (False, "killed")


HARM = {
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "threads": "import threading\nthreading.Thread(target=print).start()",
    "another program": "import subprocess\nsubprocess.run(['/bin/ls'])",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 9), 1)",
    "a socket between processes": "import socket\nsocket.socketpair()",
    "writing outside": "open({target!r}, 'w').write('x')",
    "writing without Python's open": "import os\nos.open({target!r}, os.O_CREAT | os.O_WRONLY)",
    "writing in its own folder": "open('file', 'w')",
    "overwriting": "import os\nos.truncate({victim!r}, 0)",
    "removing": "import os\nos.remove({victim!r})",
    "renaming": "import os\nos.rename({victim!r}, {target!r})",
    "reading outside": "open({victim!r}).read()",
    "killing its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
    "raising its limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**50, 2**50))",
    "much memory": "x = bytearray(2**33)",
    "much memory, slowly": "x = []\nwhile True:\n    x.append(bytearray(2**20))",
    "endless recursion": "def f():\n    f()\nf()",
}


@confined
@pytest.mark.parametrize("kind", HARM)
def test_harm_is_refused(tmp_path, kind):
    target, victim = tmp_path / "target", tmp_path / "victim"
    victim.write_text("untouched", encoding="utf-8")
    outcome = run(HARM[kind].format(target=str(target), victim=str(victim)), seconds=5, megabytes=256)
    assert not outcome.passed
    assert outcome.reason in ("PermissionError", "RuntimeError", "ValueError", "MemoryError", "RecursionError")
    assert not target.exists()
    assert victim.read_text(encoding="utf-8") == "untouched"


@confined
def test_the_kernel_refuses_even_what_goes_around_python(tmp_path):
    target = tmp_path / "target"
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.open({str(target).encode()!r}, 0o101, 0o644) == -1 and ctypes.get_errno() == 1
assert libc.socket(2, 1, 0) == -1 and ctypes.get_errno() == 1
assert libc.fork() == -1 and ctypes.get_errno() == 1
assert libc.syscall(425, 8, 0) == -1 and ctypes.get_errno() == 1  # io_uring_setup
"""
    assert run(program).passed
    assert not target.exists()


@confined
@pytest.mark.parametrize("program", ["while True:\n    pass", "import time\ntime.sleep(1000)"])
def test_what_does_not_end_is_ended(program):
    started = time.monotonic()
    assert run(program, seconds=1) == (False, "timeout")
    assert time.monotonic() - started < 10


@confined
def test_it_starts_in_an_empty_folder_with_an_empty_environment(monkeypatch):
    monkeypatch.setenv("SECRET", "word")
    program = "import os\nassert os.listdir() == [], os.listdir()\nassert 'SECRET' not in os.environ"
    assert run(program).passed
    folders = set(Path("/tmp").glob("bayeslora-code-*"))
    run("pass")
    assert set(Path("/tmp").glob("bayeslora-code-*")) <= folders


@confined
def test_nothing_runs_where_the_kernel_does_not_confine(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    source = code_execution._CHILD.read_text(encoding="utf-8")
    child.write_text(source.replace("SET_SECCOMP, FILTER = 38, 22, 2", "SET_SECCOMP, FILTER = 38, 22, 99"), "utf-8")
    assert child.read_text(encoding="utf-8") != source
    monkeypatch.setattr(code_execution, "_CHILD", child)
    with pytest.raises(InputError, match="is not run"):
        run("pass")


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
    for samples, passed in ((5, 0), (5, 2), (6, 5), (4, 4)):
        outcomes = [True] * passed + [False] * (samples - passed)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(samples, passed, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert mean_pass_at_k([[True, False], [False, False]], 1) == pytest.approx(0.25)
    with pytest.raises(InputError, match="pass@3"):
        pass_at_k(2, 1, 3)
