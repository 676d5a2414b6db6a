"""The rows of a file that people should look at, chosen while it streams by."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow

from bayeslora.analysis.decisions.batchbald import select_batchbald
from bayeslora.bulk.choices import MEASURES
from bayeslora.errors import InputError
from bayeslora.prediction import Prediction

logger = logging.getLogger(__name__)

POOL = 1000  # rows of largest mutual information from which BatchBALD takes
_SCORE, _DRAWS = "__score", "__draws"


@dataclass(frozen=True)
class Selection:
    """The ``count`` rows of largest entropy or mutual information; or those that BatchBALD takes.

    What a row adds to a batch is at most its own mutual information: where each that BatchBALD took added more than
    the least of the pool has, none outside would have been taken.
    """

    count: int
    by: str

    @property
    def pool(self) -> int:
        """Rows that have to be kept until all are seen."""
        return max(POOL, self.count) if self.by == "batchbald" else self.count

    @property
    def keeps_draws(self) -> bool:
        return self.by == "batchbald"

    def candidates(self, prediction: Prediction) -> np.ndarray:
        """Of a chunk, the rows that can be among them, in order."""
        return np.sort(np.argsort(-self._score(prediction), kind="stable")[: self.pool])

    def mark(self, table: pyarrow.Table, prediction: Prediction, chosen: np.ndarray) -> pyarrow.Table:
        """The table of the candidates, with what :meth:`choose` looks at."""
        table = table.append_column(_SCORE, pyarrow.array(self._score(prediction)[chosen]))
        if not self.keeps_draws:
            return table
        draws = prediction.sample_probs[:, chosen].transpose(1, 0, 2).astype(np.float32)
        column = pyarrow.array([of_row.tobytes() for of_row in draws], type=pyarrow.large_binary())
        return table.append_column(_DRAWS, column)

    def _score(self, prediction: Prediction) -> np.ndarray:
        """To nine digits: rounding must not decide between rows that are equally uncertain."""
        return np.round(prediction.entropy if self.by == "entropy" else prediction.mutual_information, 9) + 0.0

    def choose(self, tables: Iterable[pyarrow.Table], num_samples: int, seed: int) -> list[tuple[int, int]]:
        """Which rows of which tables, the first first; ties go to the row that comes first."""
        scores, places = np.empty(0), np.empty((0, 2), dtype=int)
        draws: list[bytes] = []
        for number, table in enumerate(tables):
            if table.num_rows == 0:
                continue
            scores = np.concatenate([scores, table[_SCORE].to_numpy()])
            here = np.stack([np.full(table.num_rows, number), np.arange(table.num_rows)], axis=1)
            places = np.concatenate([places, here])
            draws += table[_DRAWS].to_pylist() if self.keeps_draws else []
            best = np.argsort(-scores, kind="stable")[: self.pool]
            scores, places = scores[best], places[best]
            draws = [draws[index] for index in best] if self.keeps_draws else draws
        if self.keeps_draws and len(scores):
            probs = np.stack([np.frombuffer(one, dtype=np.float32) for one in draws]).astype(np.float64)
            probs = probs.reshape(len(draws), num_samples, -1).transpose(1, 0, 2)
            found = select_batchbald(probs / probs.sum(-1, keepdims=True), min(self.count, len(scores)), seed=seed)
            if len(scores) == self.pool and found.gains[-1] < scores[-1]:
                logger.warning(
                    "batchbald took among the %d rows of largest mutual information, and the last that it took add "
                    "less than others may: choose fewer rows at a time, or more draws",
                    self.pool,
                )
            places = places[found.indices]
        return [(int(part), int(index)) for part, index in places]


def check_selection(run: Any, count: int | None, by: str, num_samples: int) -> Selection | None:
    """What is selected, if anything.

    Raises:
        InputError: for a count below 1, another measure, numbers, or draws that cannot disagree.
    """
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"top_uncertain is a number of rows, at least 1, got {count!r}")
    if by not in MEASURES:
        raise InputError(f"by is one of {', '.join(MEASURES)}, got {by!r}")
    if not run.posterior.model.labelling.of_classes:
        raise InputError("--top-uncertain is for classes: of numbers, sort the output by predicted_std")
    if by != "entropy" and (num_samples < 2 or not run.posterior.model.has_noise):
        raise InputError(f"--by {by} is the disagreement of draws, and there is none here: use --by entropy")
    return Selection(count, by)


def picked(tables: Iterable[pyarrow.Table], places: list[tuple[int, int]]) -> pyarrow.Table:
    """These rows, in this order."""
    wanted = {part for part, _ in places}
    found = {number: table for number, table in enumerate(tables) if number in wanted}
    return pyarrow.concat_tables([found[part].slice(index, 1) for part, index in places], promote_options="permissive")
