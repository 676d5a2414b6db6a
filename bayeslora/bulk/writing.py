"""Formats of the output: rows as a table of Arrow, and many tables as one file."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow
from pyarrow import parquet

from bayeslora.errors import InputError

_ROW = "row"  # the column of a written row


class Format(Protocol):
    """How rows are written."""

    def table(self, rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
        """One row each.

        Raises:
            InputError: where the format cannot hold a value.
        """
        ...

    def add(self, schema: pyarrow.Schema) -> None:
        """Take account of a table that was made before."""
        ...

    def join(self, tables: Iterable[pyarrow.Table], file: Any) -> None:
        """The rows of all tables into a binary file."""
        ...


def format_for(output: Path, columns: Sequence[str], schema: pyarrow.Schema | None) -> Format:
    """By the output's name.

    Args:
        output: The file to be.
        columns: Of every row, in order.
        schema: Types of the input's columns, where it says them.

    Raises:
        InputError: for a name that says nothing.
    """
    if output.suffix == ".csv":
        return Csv(columns)
    if output.suffix in (".jsonl", ".ndjson"):
        return JsonLines()
    if output.suffix == ".parquet":
        return Parquet(columns, schema)
    raise InputError(f"--output {output}: its name must end in .csv, .jsonl or .parquet")


def _as_table(rows: Iterable[str]) -> pyarrow.Table:
    encoded = [row.encode("utf-8") for row in rows]
    return pyarrow.table({_ROW: pyarrow.array(encoded, type=pyarrow.large_binary())})


class JsonLines:
    """One object a line; values that JSON does not have as text."""

    def table(self, rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
        return _as_table(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)

    def add(self, schema: pyarrow.Schema) -> None:
        """Every line stands for itself."""

    def join(self, tables: Iterable[pyarrow.Table], file: Any) -> None:
        for table in tables:
            file.writelines(table[_ROW].to_pylist())


class Csv(JsonLines):
    """With a header; lists and objects as JSON, and nothing for null."""

    def __init__(self, columns: Sequence[str]):
        self.columns = columns

    def table(self, rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
        return _as_table(_line([_cell(row.get(column)) for column in self.columns]) for row in rows)

    def join(self, tables: Iterable[pyarrow.Table], file: Any) -> None:
        file.write(_line(self.columns).encode("utf-8"))
        super().join(tables, file)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def _line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


class Parquet:
    """With the input's types where it has any, else those of the values, which must agree over the file."""

    def __init__(self, columns: Sequence[str], schema: pyarrow.Schema | None):
        self.columns, self.known = columns, schema
        self.schema: pyarrow.Schema | None = None  # of all tables so far

    def table(self, rows: Sequence[dict[str, Any]]) -> pyarrow.Table:
        known = {} if self.known is None else {field.name: field.type for field in self.known}
        try:
            arrays = {
                name: pyarrow.array([row.get(name) for row in rows], type=known.get(name)) for name in self.columns
            }
            table = pyarrow.table(arrays)
            self.add(table.schema)
        except pyarrow.ArrowException as error:
            raise InputError(
                f"the rows do not have one type for each column, as parquet needs ({error!s:.200}): write .jsonl"
            ) from error
        return table

    def add(self, schema: pyarrow.Schema) -> None:
        """Types that hold this table's values too."""
        own = pyarrow.schema([field for field in schema if field.name in self.columns])
        schemas = [own] if self.schema is None else [self.schema, own]
        self.schema = pyarrow.unify_schemas(schemas, promote_options="permissive")

    def join(self, tables: Iterable[pyarrow.Table], file: Any) -> None:
        assert self.schema is not None
        with parquet.ParquetWriter(file, self.schema) as writer:
            for table in tables:
                if table.num_rows:
                    writer.write_table(table.select(self.schema.names).cast(self.schema))
