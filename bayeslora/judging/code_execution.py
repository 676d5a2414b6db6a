"""Running generated code to see whether it passes its tests, and the estimator of pass@k.

Generated code runs only where the caller says ``execute_generated_code=True``, and then in a process of its own:

- of the kernel's system calls only those are left (seccomp) that compute, allocate, read files, and write to what is
  open: no network, no further processes or threads, no signals to others, no file opened for writing, none removed;
- its processor time, memory and open files are limited, and a wall clock ends it in any case;
- its folder is empty, its environment too, and of Python there is the standard library only. Reading other files is
  refused by Python itself, which code made for the purpose could get around; it has nobody to tell.

What it runs on is Linux on x86-64; anywhere else, and where the kernel does not confine, nothing is run.

References:
    Chen et al. (2021), *Evaluating Large Language Models Trained on Code*.
"""

import json
import math
import platform
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from bayeslora.errors import InputError

_CHILD = Path(__file__).with_name("sandbox_child.py")


class Outcome(NamedTuple):
    """Whether a program ran to its end without an error, and if not, why: the error's class, ``timeout`` or
    ``killed``."""

    passed: bool
    reason: str = ""


def run_program(
    program: str, *, execute_generated_code: bool = False, seconds: int = 10, megabytes: int = 1024
) -> Outcome:
    """Run a program where it can do no harm, see the top of this file.

    Args:
        program: Python source; what it prints is thrown away.
        execute_generated_code: Must be True: the program was not written by you.
        seconds: Of processor time; of the wall clock one more.
        megabytes: Of memory, Python's own included.

    Raises:
        InputError: without the switch, and where a process cannot be confined.
    """
    if execute_generated_code is not True:
        raise InputError(
            "this runs code that a model has written: say execute_generated_code=True to allow it, "
            "in a confined process"
        )
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise InputError(
            "generated code is confined by Linux on x86-64 only, so it is not run here: "
            f"this is {sys.platform} on {platform.machine()}"
        )
    word = secrets.token_hex(8)
    task = {"program": program, "word": word, "seconds": seconds, "megabytes": megabytes}
    with tempfile.TemporaryDirectory(prefix="bayeslora-code-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_CHILD)],
            cwd=folder,
            env={},
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:
            output, _ = process.communicate(json.dumps(task).encode(), timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timeout")
        finally:
            process.kill()
            process.communicate()
    answer = output.decode(errors="replace").split()
    if answer == ["unconfined"]:
        raise InputError("the kernel does not confine a process here (seccomp), so generated code is not run")
    if answer == ["passed", word]:
        return Outcome(True)
    if answer[:2] == ["failed", word]:
        return Outcome(False, answer[-1])
    return Outcome(False, "timeout" if process.returncode == -9 else "killed")


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """The program that HumanEval runs: signature, completion, tests, and their call.

    A completion that defines the function itself, in a fenced block of Markdown or bare, as chat models answer, takes
    the place of the signature's.
    """
    block = re.search(r"```(?:python|py)?\s*\n(.*?)(?:\n```|\Z)", completion, re.DOTALL)
    code = block[1] if block else completion
    if re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE):
        code = f"    pass\n\n{code}"
    return f"{prompt}{code}\n\n{test}\n\ncheck({entry_point})\n"


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    r"""Unbiased estimate of the probability that at least one of k samples passes, from n samples of which c pass.

    .. math:: 1 - \binom{n - c}{k} \Big/ \binom{n}{k}

    Args:
        num_samples: n.
        num_passed: c.
        k: At most n.

    Raises:
        InputError: for numbers that do not fit together.

    References:
        Chen et al. (2021), equation 1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_passed <= num_samples:
        raise InputError(f"pass@{k} needs at least {k} samples: got {num_samples}, of which {num_passed} pass")
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def mean_pass_at_k(passed: Sequence[Sequence[bool]], k: int) -> float:
    """Mean of :func:`pass_at_k` over problems, each with its samples."""
    return sum(pass_at_k(len(samples), sum(samples), k) for samples in passed) / len(passed)
