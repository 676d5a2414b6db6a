"""What a study says, in Markdown, with its figures."""

from pathlib import Path

import pandas as pd

from bayeslora.study.spec import Study


def write_summary(
    study: Study, results: pd.DataFrame, curves: pd.DataFrame, failures: pd.DataFrame, output_dir: Path
) -> None:
    """``summary.md`` and ``figures/``."""
