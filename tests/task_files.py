"""Files of classification tasks, in the layouts that the benchmarks publish."""

import csv
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

# text columns, and label names in the order of the integers, as the benchmarks publish them
OFFICIAL = {
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "wic": (["word", "sentence1", "sentence2"], ["False", "True"]),
    "boolq": (["question", "passage"], ["False", "True"]),
    "ag_news": (["text"], ["World", "Sports", "Business", "Sci/Tech"]),
}


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as parquet, CSV, JSON lines or a JSON list, by the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def official_rows(name: str, labels: list[int] | None = None) -> list[dict]:
    """Six examples with the columns of a named task."""
    columns, label_names = OFFICIAL[name]
    labels = labels or [index % len(label_names) for index in range(6)]
    return [
        {**{column: f"{column} number {index}" for column in columns}, "label": label, "idx": index}
        for index, label in enumerate(labels)
    ]
