"""Reading the splits of a task from files or from the hub."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.tasks.conll import ENDINGS, read_columns

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

LAYOUT = "files such as train.parquet, validation.jsonl, test.csv or train.conll in DIR/{name} or in DIR itself"

# "train.csv", or a shard as the hub stores it: "train-00000-of-00002.parquet"
_SPLIT_FILE = re.compile(r"(?P<split>[^.].*?)(?P<shard>-\d+-of-\d+)?\.(parquet|jsonl|json|csv|conll|bio|iob2?)")
_COLUMNS_FILE = re.compile(r"(?P<split>train|dev|valid|validation|test)(?P<shard>)\.txt")  # where there is no other


def read_local(name: str, data_dir: str | Path, text_columns: Sequence[str]) -> "dict[str, Dataset]":
    """Every split found in ``data_dir/name``, in ``data_dir`` itself, or in the single file ``data_dir``.

    A file's name is its split's name, and ``dev`` means ``validation``; a single file becomes ``train``.

    Args:
        name: The task's name.
        data_dir: A folder or a file: parquet, JSON (a list, or one object per line), CSV with a header, or words in
            columns (:mod:`bayeslora.tasks.conll`): ``.conll``, ``.bio``, ``.iob``, ``.iob2``, and ``train.txt``,
            ``valid.txt`` and ``test.txt`` in a folder of nothing else.
        text_columns: Columns that hold text even if they look like numbers or dates (this matters for CSV).

    Returns:
        One data set per split, in memory; nothing is cached on disk.

    Raises:
        InputError: ``data_dir`` does not exist or holds no readable file, or a file is corrupt.
    """
    import pyarrow
    from datasets import Dataset

    splits = {}
    for split, paths in _find_files(name, Path(data_dir).expanduser()).items():
        tables = [_read_file(path, text_columns) for path in paths]
        splits[split] = Dataset(pyarrow.concat_tables(tables, promote_options="default"))
    return splits


def read_hub(name: str, repository: str, config: str | None) -> "dict[str, Dataset]":
    """The splits of ``repository`` on the Hugging Face hub, or in its local cache.

    Raises:
        InputError: they cannot be had, for whatever reason; the remedy is always to pass ``data_dir``.
    """
    import datasets

    try:
        return dict(datasets.load_dataset(repository, config))
    except Exception as error:  # network, proxy, credentials, a moved repository, a broken cache
        raise InputError(
            f"cannot load task {name!r} from the hub ({', '.join(filter(None, (repository, config)))}): "
            f"{first_line(error)}; "
            f"pass data_dir=DIR with {LAYOUT.format(name=name)}"
        ) from error


def check_texts(name: str, splits: "dict[str, Dataset]", text_columns: Sequence[str]) -> None:
    """Raise ``InputError`` unless every split has rows, and a string in each text column of every row."""
    for split, data in splits.items():
        where = f"task {name!r}, split {split!r}"
        if not data.num_rows:
            raise InputError(f"{where}: the data set is empty; expected at least one example")
        for column in text_columns:
            require_column(where, data, column, "text_columns")
            kind = str(getattr(data.features[column], "dtype", data.features[column]))
            if kind not in ("string", "large_string"):
                raise InputError(f"{where}: text column {column!r} holds {kind}, expected strings")
            if data.data.column(column).null_count:
                row = data[column][:].index(None)
                raise InputError(f"{where}: text column {column!r} is null in row {row}; fill or drop that row")


def require_column(where: str, data: "Dataset", column: str, argument: str) -> None:
    """Raise ``InputError`` naming the columns there are, unless ``column`` is one of them."""
    if column not in data.column_names:
        raise InputError(
            f"{where}: no column {column!r}; the columns are {', '.join(data.column_names)}: "
            f"rename one, or choose with {argument}"
        )


def list_of(data: "Dataset", column: str) -> str | None:
    """What the lists of a column hold; None where it holds no lists."""
    inner = getattr(data.features[column], "feature", None)
    return None if inner is None else str(getattr(inner, "dtype", inner))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def choose_folder(name: str, data_dir: Path) -> Path:
    """``data_dir/name`` if there is such a folder, else ``data_dir``."""
    if not data_dir.exists():
        raise InputError(f"task {name!r}: data_dir {data_dir} does not exist; expected a folder or a file")
    return data_dir / name if (data_dir / name).is_dir() else data_dir


def in_columns(path: Path) -> bool:
    """Whether a file is one of words in columns, by its name."""
    return path.suffix.removeprefix(".") in ENDINGS


def holds_columns(name: str, data_dir: str | Path | None) -> bool:
    """Whether what is there are words in columns."""
    if data_dir is None or not Path(data_dir).expanduser().exists():
        return False
    try:
        files = _find_files(name, Path(data_dir).expanduser()).values()
    except InputError:  # nothing that can be read
        return False
    return all(in_columns(path) for paths in files for path in paths)


def _find_files(name: str, data_dir: Path) -> dict[str, list[Path]]:
    """The files of each split; more than one only if they are shards."""
    folder = choose_folder(name, data_dir)
    candidates = [folder] if folder.is_file() else sorted(folder.iterdir())
    files: list[tuple[Path, re.Match[str]]] = []
    for pattern in (_SPLIT_FILE, _COLUMNS_FILE):
        matches = [(path, pattern.fullmatch(path.name)) for path in candidates if path.is_file() and not files]
        files += [(path, match) for path, match in matches if match]
    if not files:
        raise InputError(f"task {name!r}: no readable files in {folder}; expected {LAYOUT.format(name=name)}")
    if folder.is_file():
        return {"train": [folder]}
    found: dict[str, list[Path]] = {}
    for path, match in files:
        short = "dev|valid" if in_columns(path) else "dev"
        split = re.sub(rf"^({short})(?=$|_)", "validation", match["split"])
        others = found.setdefault(split, [])
        if others and not match["shard"]:
            raise InputError(f"{others[0]} and {path} both give the split {split!r}; remove one of them")
        others.append(path)
    return found


def _read_file(path: Path, text_columns: Sequence[str]) -> "pyarrow.Table":
    import pyarrow
    import pyarrow.parquet

    try:
        if in_columns(path):
            return read_columns(path)
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        return _read_csv(path, text_columns) if path.suffix == ".csv" else _read_json(path)
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        kind = path.suffix.removeprefix(".")
        raise InputError(f"cannot read {path}: {first_line(error)}; expected a complete {kind} file") from error


def _read_csv(path: Path, text_columns: Sequence[str]) -> "pyarrow.Table":
    """A table whose column types are inferred from the whole file, not from its beginning alone."""
    import pyarrow
    from pyarrow import csv

    block_size = min(path.stat().st_size + 1, 2**31 - 1)
    return csv.read_csv(
        path,
        read_options=csv.ReadOptions(block_size=block_size),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pyarrow.string())),
    )


def _read_json(path: Path) -> "pyarrow.Table":
    import pyarrow

    text = path.read_text(encoding="utf-8-sig")
    rows = json.loads(text) if text.lstrip().startswith("[") else _json_lines(text)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row is not a JSON object")
    columns = dict.fromkeys(column for row in rows for column in row)
    return pyarrow.table({column: [row.get(column) for row in rows] for column in columns})


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut at U+2028
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows
