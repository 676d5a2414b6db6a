"""The task ``sentiment``: is a sentence positive? Movie reviews to learn from, three other domains as shift.

Every sentence was rated from -4 to 4 by 15 or more people, so their disagreement is known too.

References:
    Hutto & Gilbert (2014), *VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text*, ICWSM. The sentences come from Pang & Lee (2004), Hu & Liu (2004), editorials and tweets.
"""

import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayeslora.errors import InputError
from bayeslora.tasks.reading import choose_folder, first_line

if TYPE_CHECKING:
    from datasets import Dataset

SHIFTED_DOMAINS = {"amazon": "amazonReviewSnippets", "nytimes": "nytEditorialSnippets", "tweets": "tweets"}

_TEST_ROWS, _VALIDATION_ROWS = 1500, 500
_SHUFFLE_SEED = 2014


def read_sentiment(data_dir: str | Path | None = None) -> "dict[str, Dataset]":
    """Movie sentences as train, validation and test; the other domains whole, as the splits of their names.

    Sentences whose mean rating is exactly 0 have no sign and are left out (37 of movies, 98 of amazon, 244 of
    nytimes, 4 of tweets). The movies are shuffled once and for all into 1500 for test, 500 for validation and
    the rest for train. One sentence of test is in train as well, word for word; it is dropped from test.

    ========== ===== ==== ====== ====== ======= ======
    split      train val. test   amazon nytimes tweets
    ========== ===== ==== ====== ====== ======= ======
    sentences   8568  500   1499   3610    4946   4196
    positive     50%  51%    48%    59%     45%    69%
    ========== ===== ==== ====== ====== ======= ======

    Args:
        data_dir: A folder with the eight ``*_GroundTruth.txt`` and ``*_anonDataRatings.txt``;
            ``None`` fetches them (see :func:`bayeslora.assets.fetch.rated_sentences`).

    Returns:
        Data sets with ``text``, ``label`` (1 if the mean rating is positive), ``rating`` (the published mean),
        ``rating_sd`` (standard deviation over the raters) and ``share_positive`` (share of the raters whose rating
        is above 0, those at 0 counting half). For 199 of the 4200 tweets the published mean
        differs from the mean of the published raters, by up to 1.13 but never in sign.

    Raises:
        InputError: a file is missing or malformed.
    """
    from datasets import Dataset

    folder = _folder(data_dir)
    movies = _read_domain(folder, "movieReviewSnippets")
    splits = _split_movies(movies)
    splits.update({split: _read_domain(folder, stem) for split, stem in SHIFTED_DOMAINS.items()})
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}


def _folder(data_dir: str | Path | None) -> Path:
    if data_dir is None:
        from bayeslora.assets.fetch import rated_sentences

        return rated_sentences()
    return choose_folder("sentiment", Path(data_dir).expanduser())


def _split_movies(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    import numpy as np

    # RandomState, because numpy promises that its numbers never change
    order = np.random.RandomState(_SHUFFLE_SEED).permutation(len(rows))
    shuffled = [rows[index] for index in order]
    held_out = _TEST_ROWS + _VALIDATION_ROWS
    train = shuffled[held_out:]
    known = {row["text"] for row in train}
    test, validation = (
        [row for row in part if row["text"] not in known]
        for part in (shuffled[:_TEST_ROWS], shuffled[_TEST_ROWS:held_out])
    )
    return {"train": train, "validation": validation, "test": test}


def _read_domain(folder: Path, stem: str) -> list[dict[str, Any]]:
    """The sentences with a sign, joined to their raters by id: the order of the files differs."""
    raters = {key: (sd, ratings) for key, _, sd, ratings in _read_rows(folder / f"{stem}_anonDataRatings.txt", 4)}
    rows = []
    for key, mean, text in _read_rows(folder / f"{stem}_GroundTruth.txt", 3):
        try:
            spread, ratings = raters[key]
            numbers = float(mean), float(spread), _share_positive(ratings)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder}: sentence {key!r} of {stem} has no readable ratings ({error})") from error
        rating, deviation, positive = numbers
        if rating != 0:
            row = {"text": _plain(text), "label": int(rating > 0), "rating": rating}
            rows.append(row | {"rating_sd": deviation, "share_positive": positive})
    return rows


def _share_positive(ratings: str) -> float:
    """Of "[2, 0, -1]", the share above 0, with those at 0 as halves."""
    votes = [(value > 0) + (value == 0) / 2 for value in json.loads(ratings)]
    if not votes:
        raise ValueError("nobody rated it")
    return sum(votes) / len(votes)


def _read_rows(path: Path, fields: int) -> list[list[str]]:
    """Tab-separated rows without a header; some of the files begin with a byte order mark."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {path}: {first_line(error)}; expected the rated sentences of Hutto & Gilbert "
            "(2014); leave out data_dir to fetch them"
        ) from error
    rows = [line.split("\t") for line in lines if line]
    for number, row in enumerate(rows, start=1):
        if len(row) != fields:
            raise InputError(f"{path}, line {number}: {len(row)} fields, expected {fields} separated by tabs")
    return rows


def _plain(text: str) -> str:
    """Text without HTML entities, some of which were escaped twice (``&amp;amp;``)."""
    return html.unescape(html.unescape(text)).strip()
