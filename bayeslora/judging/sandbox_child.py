"""The process in which generated code runs.

Not imported: started by :mod:`bayeslora.judging.code_execution`, with the standard library alone, it confines itself,
for good, before the first line of that code.

The kernel's part (seccomp) is a list of the system calls that are left: to read files, to compute, to allocate memory
and to write to what is open already. Sockets, new processes and threads, signals, and opening anything for writing fail
with EPERM. An audit hook refuses to open files outside Python's own library; unlike the kernel's list it can be got
around by code that is made for it.
"""

import ctypes
import io
import json
import os
import resource
import struct
import sys

ARCHITECTURE = 0xC000003E  # x86-64
SYSTEM_CALLS = {
    "read": 0,
    "write": 1,
    "close": 3,
    "stat": 4,
    "fstat": 5,
    "lstat": 6,
    "poll": 7,
    "lseek": 8,
    "mmap": 9,
    "mprotect": 10,
    "munmap": 11,
    "brk": 12,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "pread64": 17,
    "readv": 19,
    "writev": 20,
    "access": 21,
    "select": 23,
    "sched_yield": 24,
    "mremap": 25,
    "madvise": 28,
    "nanosleep": 35,
    "getpid": 39,
    "exit": 60,
    "uname": 63,
    "fcntl": 72,
    "getcwd": 79,
    "readlink": 89,
    "gettimeofday": 96,
    "getrusage": 98,
    "sysinfo": 99,
    "times": 100,
    "getuid": 102,
    "getgid": 104,
    "geteuid": 107,
    "getegid": 108,
    "sigaltstack": 131,
    "gettid": 186,
    "time": 201,
    "futex": 202,
    "sched_getaffinity": 204,
    "getdents64": 217,
    "restart_syscall": 219,
    "clock_gettime": 228,
    "clock_getres": 229,
    "clock_nanosleep": 230,
    "exit_group": 231,
    "newfstatat": 262,
    "readlinkat": 267,
    "faccessat": 269,
    "getrandom": 318,
    "statx": 332,
    "rseq": 334,
    "faccessat2": 439,
}
OPEN, OPENAT = (2, 1), (257, 2)  # number, and which argument holds the flags
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_TMPFILE
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # REFUSE: EPERM
NO_NEW_PRIVILEGES, SET_SECCOMP, FILTER = 38, 22, 2


def filter_program() -> bytes:
    """A program in the kernel's packet-filter language over (number, architecture, ..., arguments) of a system call."""

    def step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    steps = [step(LOAD, 4), step(EQUAL, ARCHITECTURE, 1, 0), step(RETURN, KILL), step(LOAD, 0)]
    for number in SYSTEM_CALLS.values():
        steps += [step(EQUAL, number, 0, 1), step(RETURN, ALLOW)]
    for number, argument in (OPEN, OPENAT):
        reading = [step(LOAD, 16 + 8 * argument), step(ANY_BIT, WRITING & ~os.O_DIRECTORY, 1, 0), step(RETURN, ALLOW)]
        steps += [step(EQUAL, number, 0, 4), *reading, step(RETURN, REFUSE)]
    steps.append(step(RETURN, REFUSE))
    return b"".join(steps)


def confine() -> None:
    """From here on the kernel refuses everything that is not on the list.

    Raises:
        OSError: the kernel does not do that here.
    """
    program = filter_program()
    buffer = ctypes.create_string_buffer(program, len(program))
    description = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((NO_NEW_PRIVILEGES, 1, 0), (SET_SECCOMP, FILTER, ctypes.addressof(description))):
        option, first, second = arguments
        if libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "the kernel refuses to confine a process")


def limit(seconds: int, megabytes: int) -> None:
    most = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: megabytes * 2**20,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in most.items():
        resource.setrlimit(kind, (value, value))


def watch() -> None:
    """Refuse to open files outside Python's own library."""
    library = tuple(os.path.join(os.path.realpath(path), "") for path in sys.path if path) + tuple(
        os.path.join(path, "") for path in sys.path if path
    )

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not path.startswith(library):
                raise PermissionError(1, "generated code may not open files", path)

    sys.addaudithook(hook)


def main() -> None:
    task = json.loads(sys.stdin.buffer.read())
    answer = io.FileIO(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    limit(task["seconds"], task["megabytes"])
    try:
        confine()
    except OSError:
        answer.write(b"unconfined")
        return
    watch()
    program = task.pop("program")
    try:
        exec(compile(program, "<generated>", "exec"), {"__name__": "generated"})
    except BaseException as error:
        answer.write(f"failed {task['word']} {type(error).__name__}".encode())
    else:
        answer.write(f"passed {task['word']}".encode())


if __name__ == "__main__":
    main()
