"""What is said of a row beside its own columns."""

from collections.abc import Mapping
from typing import Any

from bayeslora.analysis.decisions.conformal import conformal_sets
from bayeslora.errors import InputError
from bayeslora.models.tuning import Tuning
from bayeslora.prediction import ClassPrediction, NumberPrediction, Prediction


def added_columns(run: Any, coverage: float | None) -> list[str]:
    """Names of what :func:`rows_of` adds."""
    if not run.posterior.model.labelling.of_classes:
        return ["predicted_mean", "predicted_std"]
    names = [f"P({name})" for name in run.label_names]
    sets = [] if coverage is None else ["conformal_set"]
    return ["predicted_label", "probability", *names, "entropy", "mutual_information", *sets]


def coverage_of(tuning: Tuning | None, asked: float | None) -> float | None:
    """The coverage of the sets that can be told: the one asked for; 0.9, or none where nothing was tuned by labels.

    Raises:
        InputError: where the one asked for cannot be told.
    """
    known = {} if tuning is None or tuning.conformal is None else tuning.conformal
    if asked is None:
        return 0.9 if "0.9" in known else None
    if f"{asked:g}" not in known:
        raise InputError(
            f"--coverage {asked:g}: this run knows no such sets"
            + (f", but {', '.join(known)}" if known else ": tune it by labels first (bayeslora tune RUN)")
        )
    if known[f"{asked:g}"] == 0:
        raise InputError(
            f"--coverage {asked:g}: {tuning and tuning.examples} tuning examples are too few, every set would hold "
            "every label: tune on more, or ask for less"
        )
    return asked


def rows_of(prediction: Prediction, tuning: Tuning | None, coverage: float | None) -> list[dict[str, Any]]:
    """What is added to each row, by the names of :func:`added_columns`; probabilities and nats to six digits.

    What lies beyond is rounding, which changes with where the numbers happen to lie in memory, and so is a zero's sign.
    """
    if isinstance(prediction, NumberPrediction):
        said = zip(prediction.mean, prediction.std, strict=True)
        return [{"predicted_mean": float(f"{mean:.9g}"), "predicted_std": float(f"{std:.9g}")} for mean, std in said]
    assert isinstance(prediction, ClassPrediction)
    rows = [_row(prediction.row(index)) for index in range(len(prediction))]
    if coverage is not None and tuning is not None and tuning.conformal is not None:
        names = prediction.label_names or tuple(map(str, range(prediction.probs.shape[1])))
        held = conformal_sets(prediction.probs, tuning.conformal[f"{coverage:g}"])
        for row, inside in zip(rows, held, strict=True):
            row["conformal_set"] = [name for name, is_in in zip(names, inside, strict=True) if is_in]
    return rows


def _row(said: Mapping[str, Any]) -> dict[str, Any]:
    probs = said["probs"]
    return {
        "predicted_label": said["label"],
        "probability": probs[said["label"]],
        **{f"P({name})": value for name, value in probs.items()},
        "entropy": said["entropy"] + 0.0,
        "mutual_information": said["mutual_information"] + 0.0,
    }
