"""Standard output and error as terminals and pipes have them: any encoding, and readers that leave early."""

import codecs
import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

READER_LEFT = 141  # what a shell reports of a program that SIGPIPE ended: 128 + 13
_SIGNS = {"×": "x", "±": "+-", "−": "-", "–": "-", "—": "-", "≥": ">=", "≤": "<=", "·": "*", "→": "->"}


@contextmanager
def any_encoding() -> Iterator[None]:
    """Inside, what standard output and error cannot encode is spelled out in ASCII: no character ends a command."""
    codecs.register_error("bayeslora", _spelled)
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    before = [stream.errors for stream in streams]
    for stream in streams:
        stream.reconfigure(errors="bayeslora")
    try:
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            with suppress(BrokenPipeError, ValueError):  # it flushes first; a closed one stays as it is
                stream.reconfigure(errors=errors)


def shows_unicode(stream: TextIO) -> bool:
    """Whether the stream's encoding has every character."""
    return (getattr(stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")


def discard_output() -> None:
    """Drop what a stream cannot write, a broken pipe or a full disk, so that the interpreter's last flush finds nothing
    to complain about."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_ascii, error.object[error.start : error.end])), error.end


def _ascii(character: str) -> str:
    """é as e, ε as epsilon, × as x; a question mark for what has no such spelling."""
    if character in _SIGNS:
        return _SIGNS[character]
    name = unicodedata.name(character, "")
    if name.startswith("GREEK "):
        letter = name.split(" WITH ")[0].split()[-1]
        return letter.capitalize() if " CAPITAL " in name else letter.lower()
    return unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode() or "?"
