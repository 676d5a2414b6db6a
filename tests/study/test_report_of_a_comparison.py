"""The report of a comparison has all its methods, those without a run of their own too."""

import re

import pytest

from bayeslora import InputError, report
from bayeslora.study.runner import run_study


def test_every_method_and_the_command_are_on_the_page(study, tmp_path):
    made = study("lora", "temperature", "dora", {"name": "monteclora", "predictions": ["draws"]}, keep_adapters=True)
    run_study(made, tmp_path / "out", command="bayeslora compare a study", progress=False)
    options = {"num_samples": 2, "diagnostics": False, "progress": False}
    text = report([tmp_path / "out"], tmp_path / "page.html", **options).read_text(encoding="utf-8")
    table = text[text.index("compared, on the examples") :]
    for method in ("LoRA", "LoRA + temperature*", "DoRA", "MonteCLoRA, 3 draws"):
        row = rf'<tr><td>test</td><th scope="row" class="wrap">{re.escape(method)}</th><td class="number">1</td>'
        assert re.search(row, table)
    assert "<pre>bayeslora compare a study</pre>" in table
    one = report([tmp_path / "out" / "reviews-lr0.01-batch8-rank2" / "lora-seed0"], tmp_path / "one.html", **options)
    assert "compared, on the examples" not in one.read_text(encoding="utf-8")
    costs = tmp_path / "costs.csv"
    costs.write_text("truth,1,0,person\n1,0,1,0.2\n0,5,0,0.2\n", encoding="utf-8")
    priced = report([tmp_path / "out"], tmp_path / "priced.html", costs=costs, **options).read_text(encoding="utf-8")
    assert "Less the cost of" in priced[priced.index('id="deferral"') :]
    assert "Conformal sets" in priced  # validation is labelled, and is not judged by
    costs.write_text("truth,1\n1,0\n", encoding="utf-8")
    with pytest.raises(InputError, match="must have a header 'truth,0,1'"):
        report([tmp_path / "out"], tmp_path / "none.html", costs=costs, **options)
    assert not (tmp_path / "none.html").exists()


def test_a_comparison_that_kept_nothing_says_where_its_tables_are(study, tmp_path):
    run_study(study("lora"), tmp_path / "out", progress=False)
    with pytest.raises(InputError, match=r"without runs: .* summary\.md"):
        report([tmp_path / "out"], tmp_path / "page.html")
