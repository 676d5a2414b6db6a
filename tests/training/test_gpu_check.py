"""benchmarks/gpu_check.py, where there is no GPU: what it skips, and its whole path on a tiny network."""

import json

import pytest
import torch

from tests.scripts import script

pytestmark = pytest.mark.filterwarnings("ignore")  # the script's own business


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to check")
def test_without_cuda_it_skips_everything_with_the_reason(tmp_path, capsys):
    report = script("benchmarks/gpu_check").main(output=tmp_path)
    assert not report["passed"]
    for part in ("tests", "synchronisation", "cost"):
        assert report[part] == {"skipped": "torch sees no CUDA device: nothing was run on a GPU"}
    assert capsys.readouterr().out.count("nothing was run on a GPU") == 3
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8")) == report


def test_the_whole_path_on_a_cpu(tmp_path):
    report = script("benchmarks/gpu_check").main("cpu", tiny=True, output=tmp_path, run_tests=False)
    assert report["passed"]
    assert len(report["cost"]) == 6
    for name, own in report["cost"].items():
        assert own["milliseconds"] > 0, name
        assert own["ratio"] == 1 or not name.endswith(" LoRA")
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert page.count("| tiny, ") == 6
    assert len(page.splitlines()) < 60  # a page


def test_what_there_is_no_time_for_is_skipped():
    report = script("benchmarks/gpu_check").main("cpu", tiny=True, minutes=0.001, run_tests=False)
    assert {own["skipped"] for own in report["cost"].values()} == {"the time is up"}
