"""Rows of a file, one after the other, in constant memory; what is no row is told apart by its number."""

import bz2
import csv
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from pyarrow import parquet

from bayeslora.bulk.choices import FORMATS, STREAMED
from bayeslora.errors import InputError
from bayeslora.files.records import unique

TEXT_COLUMN = "text"  # of a file of text lines
_SUFFIXES = {".ndjson": "jsonl", ".txt": "text", ".json": "datasets", ".arrow": "datasets"}
_SUFFIXES |= {f".{name}": name for name in FORMATS if name not in ("text", "datasets")}
_COMPRESSED: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_LONGEST_FIELD = 2**24  # characters of a CSV field: an open quotation mark must not swallow the file
_ROWS_AT_ONCE = 1000
BROKEN = (EOFError, OSError, lzma.LZMAError, zlib.error, pyarrow.ArrowException)  # what a damaged file raises


class Row(NamedTuple):
    """One row, from 0, and its values by column; or what is wrong with it."""

    number: int
    values: dict[str, Any]
    problem: str = ""


class Source(NamedTuple):
    """An opened file.

    Attributes:
        rows: Its rows.
        columns: Their columns, where the file says them before its rows.
        schema: The columns' types, where it does.
        read: How much of it has been read, in bytes or rows.
        size: How much there is; None of a pipe.
    """

    rows: Iterator[Row]
    columns: list[str] | None
    schema: pyarrow.Schema | None
    read: Any
    size: int | None


def format_of(path: Path, given: str | None) -> str:
    """How a file is read: as it was said, or as its name says.

    Raises:
        InputError: where neither does.
    """
    if given is not None:
        return given
    if str(path) == "-":
        raise InputError(f"say what standard input carries: --input-format {{{','.join(STREAMED)}}}")
    if path.is_dir():
        return "datasets"
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    known = _SUFFIXES.get(suffixes[-1].lower()) if suffixes else None
    if known is None:
        raise InputError(
            f"{path}: its name does not say how to read it ({', '.join(_SUFFIXES)} do): give --input-format, one of "
            f"{', '.join(FORMATS)}"
        )
    return known


@contextmanager
def open_source(path: Path, format: str) -> Iterator[Source]:
    """A file of one of the formats of :mod:`bayeslora.bulk.choices`; ``-`` is standard input.

    Raises:
        InputError: there is no such file, or it is not of that format.
    """
    piped = str(path) == "-"
    if piped and format not in STREAMED:
        raise InputError(f"--input-format {format} needs a file, not standard input")
    if not piped and not path.exists():
        raise InputError(f"there is no {path}: --input is a file, or - for standard input")
    if format == "parquet":
        with _open_parquet(path) as source:
            yield source
    elif format == "datasets":
        yield _dataset(path)
    else:
        size = None if piped else path.stat().st_size
        before = csv.field_size_limit(_LONGEST_FIELD)
        try:
            with nullcontext(sys.stdin.buffer) if piped else path.open("rb") as raw:
                unpack = _COMPRESSED.get(path.suffix)
                columns, rows = _READERS[format](raw if unpack is None else unpack(raw), str(path))
                yield Source(rows, columns, None, (lambda: 0) if piped else raw.tell, size)
        finally:
            csv.field_size_limit(before)


def _csv(stream: Any, name: str, delimiter: str = ",") -> tuple[list[str], Iterator[Row]]:
    lines = (line.decode("utf-8", "surrogateescape") for line in stream)
    first = (line.removeprefix("\ufeff") for line in islice(lines, 1))
    reader = csv.reader(chain(first, lines), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
    except (csv.Error, *BROKEN) as error:
        raise InputError(f"{name}: its header cannot be read: {error}") from error
    if not header or len(set(header)) < len(header):
        raise InputError(f"{name}: a CSV file begins with the names of its columns, each once, got {header}")
    return header, _csv_rows(reader, header)


def _csv_rows(reader: Any, header: Sequence[str]) -> Iterator[Row]:
    number = 0
    while True:
        first = reader.line_num + 1
        try:
            fields, problem = next(reader, None), ""
        except csv.Error as error:
            fields, problem = [""], str(error)
        if fields is None:
            return
        if not fields:  # an empty line
            continue
        if not problem and len(fields) != len(header):
            problem = f"it has {len(fields)} fields, and the header {len(header)}"
        if not problem and any(_broken(field) for field in fields):
            problem = "it is not UTF-8"
        lines = f"line {first}" if reader.line_num <= first else f"lines {first} to {reader.line_num}"
        yield Row(number, dict(zip(header, fields, strict=False)), problem and f"{lines}: {problem}")
        number += 1


def _broken(text: str) -> bool:
    """Whether bytes were not UTF-8."""
    return not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)


def _jsonl(stream: Any, name: str) -> tuple[None, Iterator[Row]]:
    return None, _jsonl_rows(stream)


def _jsonl_rows(stream: Any) -> Iterator[Row]:
    number = 0
    for line, content in enumerate(stream, 1):
        if not content.strip():
            continue
        try:
            values = json.loads(content.decode("utf-8-sig" if line == 1 else "utf-8"), object_pairs_hook=unique)
            problem = "" if isinstance(values, dict) else f"a {type(values).__name__}, not an object"
        except (ValueError, RecursionError) as error:
            values, problem = {}, f"no JSON: {error}"
        yield Row(number, {} if problem else values, problem and f"line {line}: {problem}")
        number += 1


def _text(stream: Any, name: str) -> tuple[list[str], Iterator[Row]]:
    return [TEXT_COLUMN], _text_rows(stream)


def _text_rows(stream: Any) -> Iterator[Row]:
    for number, content in enumerate(stream):
        try:
            text = content.decode("utf-8-sig" if number == 0 else "utf-8").rstrip("\r\n")
            yield Row(number, {TEXT_COLUMN: text})
        except ValueError as error:
            yield Row(number, {}, f"line {number + 1}: {error}")


_READERS: dict[str, Any] = {
    "csv": _csv,
    "tsv": lambda stream, name: _csv(stream, name, "\t"),
    "jsonl": _jsonl,
    "text": _text,
}


@contextmanager
def _open_parquet(path: Path) -> Iterator[Source]:
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet: {error!s:.200}") from error
    done = 0

    def rows() -> Iterator[Row]:
        nonlocal done
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            for values in batch.to_pylist():
                yield Row(done, values)
                done += 1

    with file:
        yield Source(rows(), file.schema_arrow.names, file.schema_arrow, lambda: done, file.metadata.num_rows)


def _dataset(path: Path) -> Source:
    """A folder that ``save_to_disk`` wrote, or a file that ``datasets`` can stream."""
    import datasets

    try:
        if path.is_dir():
            data = datasets.load_from_disk(str(path))
        else:
            builder = path.suffix.lstrip(".").lower()
            data = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
    except Exception as error:  # each of its builders has its own
        raise InputError(f"{path} cannot be read by datasets: {error!s:.200}") from error
    if isinstance(data, dict):
        raise InputError(f"{path} holds the splits {', '.join(data)}: give the folder of one, {path}/NAME")
    columns = data.column_names
    done = 0

    def rows() -> Iterator[Row]:
        nonlocal done
        for values in data:
            yield Row(done, dict(values))
            done += 1

    return Source(rows(), columns, None, lambda: done, len(data) if path.is_dir() else None)
