"""A file of rows in, the same rows with what is predicted of them out."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
import torch
from tqdm.auto import tqdm

from bayeslora.adapters.groups import adapter_state
from bayeslora.bulk.columns import added_columns, coverage_of, rows_of
from bayeslora.bulk.encoding import Encoder, encoder_of
from bayeslora.bulk.parts import Done, Parts, opened_parts
from bayeslora.bulk.reading import BROKEN, Row, Source, format_of, open_source
from bayeslora.bulk.selection import Selection, check_selection, picked
from bayeslora.bulk.writing import Csv, Format, JsonLines, format_for
from bayeslora.data.batches import length_of
from bayeslora.errors import InputError
from bayeslora.files.writing import replacing
from bayeslora.runs import FittedRun

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileResult:
    """How many ``rows`` were read, how many of them are ``written`` to the output and how many were ``skipped``, and
    how many rows an interrupted call before had done: they were ``resumed`` from."""

    rows: int
    written: int
    skipped: int
    resumed: int


def predict_file(
    run: FittedRun,
    input: str | Path,
    output: str | Path,
    *,
    input_format: str | None = None,
    text_columns: Sequence[str] | None = None,
    num_samples: int = 16,
    batch_size: int = 32,
    seed: int = 0,
    antithetic: bool = False,
    coverage: float | None = None,
    top_uncertain: int | None = None,
    by: str = "mutual_information",
    skip_errors: bool = False,
    prefix: str = "",
    rows_at_once: int = 1024,
    progress: bool = True,
) -> FileResult:
    """Predict every row of a file, and write it with what is predicted beside its own columns.

    The rows stay in order. Added are ``predicted_label``, its ``probability``, ``P(name)`` of each class,
    ``entropy`` and ``mutual_information`` in nats, and ``conformal_set``, the labels that hold the truth with
    ``coverage``, where the width was tuned by labels; for numbers ``predicted_mean`` and ``predicted_std``.

    Memory does not grow with the file. What is done lies in ``OUTPUT.parts`` until the output is whole: the same call
    again goes on after an interruption, and the output is the one that an uninterrupted call writes, bit for bit.

    Args:
        run: What :func:`bayeslora.open_run` opened.
        input: CSV, TSV, JSONL, text lines (each also as ``.gz``, ``.bz2`` or ``.xz``) or parquet, by its name; a
            ``.json`` or ``.arrow`` file or a folder of ``save_to_disk``, through ``datasets``; ``"-"`` for standard
            input.
        output: A new file: ``.csv``, ``.jsonl`` or ``.parquet``.
        input_format: Where the name does not say it: ``csv``, ``tsv``, ``jsonl``, ``text``, ``parquet`` or
            ``datasets``.
        text_columns: What the file calls the columns that the run reads, where it is not what the data of the fit
            called them. The column of text lines is ``text``.
        num_samples, batch_size, seed, antithetic: As in :meth:`bayeslora.BayesLoRA.predict`; one set of draws for all
            rows.
        coverage: Of the conformal sets: 0.8, 0.9 (where it can be told, if None), 0.95 or 0.99.
        top_uncertain: Write only so many rows, those that people should look at, the first first, with a column ``row``
            for their number in the input, from 0.
        by: How those are chosen: ``"entropy"``, ``"mutual_information"``, or ``"batchbald"``, which avoids rows that
            tell the same (:func:`bayeslora.analysis.select_batchbald`, among the rows of largest mutual information).
        skip_errors: Leave rows out that cannot be read, and say which, instead of stopping at the first.
        prefix: Before the name of each added column.
        rows_at_once: Rows of a chunk, of which a part is kept; within it they are sorted by length.
        progress: Show a progress bar.

    Raises:
        InputError: for a file or a row that cannot be read, an output that exists, parts of a call with other options,
            or an option that this run cannot honour.

    Example:
        >>> result = predict_file(open_run("runs/reviews"), "reviews/test.csv", "said.jsonl", progress=False)
        >>> result.rows, open("said.jsonl").readline().split(", ")[:2]
        (4, ['{"text": "a bad film word0"', '"label": "bad"'])
    """
    input, output = Path(input), Path(output)
    if isinstance(num_samples, str):
        raise InputError("num_samples='auto' looks at all rows at once, and a file is read in chunks: give a number")
    if rows_at_once < 1:
        raise InputError(f"rows_at_once must be at least 1, got {rows_at_once}")
    encoder = encoder_of(run, text_columns)
    coverage = coverage_of(run.posterior.tuning, coverage)
    selection = check_selection(run, top_uncertain, by, num_samples)
    drawing = {"num_samples": num_samples, "batch_size": batch_size, "seed": seed, "antithetic": antithetic}
    settings = {
        **drawing,
        "posterior": _digest_of(run),
        "columns": list(encoder.columns),
        "coverage": coverage,
        "selection": None if selection is None else asdict(selection),
        "prefix": prefix,
        "rows_at_once": rows_at_once,
    }
    with open_source(input, format_of(input, input_format)) as source, opened_parts(output, settings) as parts:
        if isinstance(parts, dict):
            return FileResult(**parts)
        job = _Job(run, encoder, drawing, coverage, selection, prefix, skip_errors, str(input), output, rows_at_once)
        return job.work(source, parts, progress)


def _digest_of(run: FittedRun) -> str:
    """SHA-256 of all that was trained and tuned."""
    bayes = run.posterior
    digest = hashlib.sha256(json.dumps(None if bayes.tuning is None else bayes.tuning.to_dict()).encode())
    for state in (adapter_state(bayes.network), bayes.guide.state_dict(), bayes.model.state_dict()):
        for name, value in state.items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Job:
    """One call of :func:`predict_file`."""

    run: FittedRun
    encoder: Encoder
    drawing: Mapping[str, Any]
    coverage: float | None
    selection: Selection | None
    prefix: str
    skip_errors: bool
    name: str
    output: Path
    rows_at_once: int

    def work(self, source: Source, parts: Parts, progress: bool) -> FileResult:
        rows = _whole(source.rows, self.name)
        columns, rows = self._columns(source, rows)
        written = [*columns, *self.added]
        format = format_for(self.output, written, source.schema)
        may_differ = isinstance(format, JsonLines) and not isinstance(format, Csv)
        read = skipped = resumed = count = 0
        bar = tqdm(total=source.size, desc="predict", unit="B", unit_scale=True, disable=None if progress else True)
        with bar:
            for count, chunk in enumerate(_chunks(rows, self.rows_at_once), 1):
                digest = hashlib.sha256(repr(chunk).encode("utf-8", "surrogatepass")).hexdigest()
                done = parts.find(count - 1)
                if done is None:
                    table, skips = self._predicted(chunk, None if may_differ else columns, format)
                    done = Done(digest, skips)
                    parts.write(count - 1, table, done)
                elif done.digest != digest:
                    raise InputError(
                        f"rows {chunk[0].number} to {chunk[-1].number} of {self.name} are not those that were "
                        f"predicted before: remove {parts.folder} to begin anew"
                    )
                else:
                    resumed += len(chunk)
                    format.add(parts.schema(count - 1))
                read, skipped = read + len(chunk), skipped + done.skipped
                bar.set_postfix(rows=read, refresh=False)
                bar.update(source.read() - bar.n)
        if not read - skipped:
            raise InputError(f"{self.name} has no row that can be read: nothing to predict")
        return self._join(parts, format, count, read, skipped, resumed)

    @property
    def added(self) -> list[str]:
        row = [] if self.selection is None else ["row"]
        return [self.prefix + name for name in (*row, *added_columns(self.run, self.coverage))]

    def _columns(self, source: Source, rows: Iterator[Row]) -> tuple[list[str], Iterator[Row]]:
        """The input's columns: those that it says, or its first row has."""
        columns, seen = source.columns, []
        if columns is None:
            for row in rows:
                seen.append(row)
                if not row.problem:
                    columns = [*row.values]
                    break
        clash = sorted(set(columns or ()) & set(self.added))
        if clash:
            raise InputError(f"{self.name} has a column {clash[0]!r} itself: give the new ones a --prefix")
        missing = [column for column in self.encoder.columns if column not in (columns or ())]
        if missing and columns:
            raise InputError(
                f"{self.name} has no column {missing[0]!r}; the columns are {', '.join(columns)}: rename one, or "
                "choose with --text-columns"
            )
        return columns or [], chain(seen, rows)

    def _predicted(
        self, chunk: Sequence[Row], columns: Sequence[str] | None, format: Format
    ) -> tuple[pyarrow.Table, int]:
        """The rows of a chunk as they are written, and how many were skipped."""
        readable = [row for row in chunk if self._accept(row, columns)]
        examples = self.encoder([row.values for row in readable])
        empty = [not length_of(example) for example in examples]
        for row, is_empty in zip(readable, empty, strict=True):
            if is_empty:
                self._skip(row, "its text has no tokens")
        readable = [row for row, is_empty in zip(readable, empty, strict=True) if not is_empty]
        examples = [example for example in examples if length_of(example)]
        if not readable:
            return pyarrow.table({}), len(chunk)
        keeps_draws = self.selection is not None and self.selection.keeps_draws
        prediction = self.run.posterior.predict(examples, keep_draws=keeps_draws, progress=False, **self.drawing)
        said = rows_of(prediction, self.run.posterior.tuning, self.coverage)
        if self.selection is None:
            return format.table([self._row(*pair) for pair in zip(readable, said, strict=True)]), len(chunk) - len(said)
        chosen = self.selection.candidates(prediction)
        table = format.table([self._row(readable[i], {"row": readable[i].number, **said[i]}) for i in chosen])
        return self.selection.mark(table, prediction, chosen), len(chunk) - len(said)

    def _row(self, row: Row, said: Mapping[str, Any]) -> dict[str, Any]:
        return {**row.values, **{self.prefix + name: value for name, value in said.items()}}

    def _accept(self, row: Row, columns: Sequence[str] | None) -> bool:
        problem = row.problem or self.encoder.problem(row.values)
        other = row.values.keys() - (row.values if columns is None else columns)
        clash = row.values.keys() & self.added
        if not problem and (other or clash):
            problem = f"it has a column {min(other or clash)!r}, " + (
                "which the first row lacks: write .jsonl" if other else "which is one of the new ones: give a --prefix"
            )
        if problem:
            self._skip(row, problem)
        return not problem

    def _skip(self, row: Row, problem: str) -> None:
        if not self.skip_errors:
            raise InputError(
                f"{self.name}, row {row.number}: {problem}. Mend it and give the same command again, which goes on "
                "with the rows that are left; or leave such rows out with --skip-errors"
            )
        logger.warning("%s, row %d is skipped: %s", self.name, row.number, problem)

    def _join(self, parts: Parts, format: Format, count: int, read: int, skipped: int, resumed: int) -> FileResult:
        """All parts as the output."""
        tables: Iterable[pyarrow.Table] = parts.tables(count)
        written = read - skipped
        if self.selection is not None:
            places = self.selection.choose(tables, self.drawing["num_samples"], self.drawing["seed"])
            tables, written = [picked(parts.tables(count), places)], len(places)
        result = FileResult(read, written, skipped, resumed)
        parts.finish(asdict(result))
        with replacing(self.output) as file:
            format.join(tables, file)
        return result


def _whole(rows: Iterator[Row], name: str) -> Iterator[Row]:
    """The rows; a file that breaks off is told in one line."""
    try:
        yield from rows
    except BROKEN as error:
        raise InputError(f"{name} breaks off, or is damaged: {error!s:.200}") from error


def _chunks(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, size)):
        yield chunk
