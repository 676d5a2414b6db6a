"""Diagnostics that a report finds are kept with the run, and found anew where it has changed."""

import math

import pytest

from bayeslora.analysis.tables.diagnostics import Diagnostic
from bayeslora.storage.kept_diagnostics import (
    DIAGNOSTICS_FILE,
    diagnosed_once,
    fingerprint,
    keep_diagnostics,
    kept_diagnostics,
)

DATA = [{"input_ids": [1, 2], "labels": 0}, {"input_ids": [3], "labels": 1}]
FOUND = [
    Diagnostic("pareto_k", math.inf, (0.5, 0.7), "bad", "a paper", "do this"),
    Diagnostic("agreement", 0.1 + 0.2, (0.9, 0.5), "good", "another", "do that"),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "posterior.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter" / "README.md").write_text("a card")
    return tmp_path


def test_come_back_bit_for_bit(folder):
    keep_diagnostics(folder, "a run", FOUND)
    assert kept_diagnostics(folder, "a run") == FOUND
    assert kept_diagnostics(folder, "another") is None


@pytest.mark.parametrize("text", ["", "[]", '{"of": "a run"}', '{"of": "a run", "diagnostics": [{"value": "x"}]}'])
def test_a_damaged_file_is_passed_over(folder, text):
    (folder / DIAGNOSTICS_FILE).write_text(text)
    assert kept_diagnostics(folder, "a run") is None


def test_the_fingerprint_follows_weights_data_and_options(folder):
    seen = {fingerprint(folder, DATA, 32), fingerprint(folder, DATA, 16), fingerprint(folder, DATA[:1], 32)}
    (folder / "adapter" / "README.md").write_text("another card")
    seen.add(fingerprint(folder, DATA, 32))
    assert len(seen) == 3
    (folder / "adapter" / "posterior.safetensors").write_bytes(b"weightt")
    assert fingerprint(folder, DATA, 32) not in seen


def test_are_found_once(folder):
    said, calls = [], []

    def diagnose():
        calls.append(1)
        return FOUND

    for _ in range(2):
        assert diagnosed_once(folder, "a run", diagnose, said.append) == FOUND
    assert len(calls) == 1
    assert ["take longest" in said[0], "earlier report" in said[1]] == [True, True]
    diagnosed_once(folder, "the run, trained on", diagnose, said.append)
    assert len(calls) == 2


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path):
    keep_diagnostics(tmp_path / "is not there", "a run", FOUND)
    assert kept_diagnostics(tmp_path / "is not there", "a run") is None
