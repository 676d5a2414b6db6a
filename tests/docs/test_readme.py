"""The README's Python runs."""

import re

from tests.demo import fetch_or_skip
from tests.scripts import ROOT


def test_readme_code_runs(tmp_path, monkeypatch):
    """Both blocks as written, but for a smaller training set, fewer test sentences and fewer draws for ArviZ."""
    fetch_or_skip(encoder=True)
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
