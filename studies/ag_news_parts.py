"""Parts of AG News: its official test set (7600 examples) as 4000 to train on, 1600 to validate and 2000 to test.

    python studies/ag_news_parts.py DIR/ag_news/test.parquet PARTS/ag_news

for `bayeslora compare studies/news.yaml --data-dir PARTS`, where the test set is all that one has.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

PARTS = {"train": (0, 4000), "validation": (4000, 5600), "test": (5600, 7600)}


def main(source: str | Path, output: str | Path) -> None:
    """Write PARTS of the rows, in an order that does not change, as parquet files."""
    rows = pd.read_parquet(source)[["text", "label"]]
    order = np.random.default_rng(0).permutation(len(rows))
    Path(output).mkdir(parents=True, exist_ok=True)
    for split, (first, last) in PARTS.items():
        rows.iloc[order[first:last]].to_parquet(Path(output) / f"{split}.parquet", index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="the file with all examples")
    parser.add_argument("output", help="the folder to write")
    arguments = parser.parse_args()
    main(arguments.source, arguments.output)
