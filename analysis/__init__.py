"""What was learned: calibration, uncertainty, ArviZ data, pictures and tables. Arrays in, arrays out.

Importing this package loads neither torch, ArviZ nor matplotlib; each public name is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "apply_temperature": "bayeslora.analysis.temperature",
    "fit_temperature": "bayeslora.analysis.temperature",
    "accuracy": "bayeslora.analysis.calibration",
    "brier_score": "bayeslora.analysis.calibration",
    "build_inference_data": "bayeslora.analysis.inference_data",
    "calibration_summary": "bayeslora.analysis.calibration",
    "comparison_table": "bayeslora.analysis.comparison",
    "expected_calibration_error": "bayeslora.analysis.calibration",
    "load_arviz": "bayeslora.analysis.inference_data",
    "mutual_information": "bayeslora.analysis.uncertainty",
    "negative_log_likelihood": "bayeslora.analysis.calibration",
    "plot_calibration": "bayeslora.analysis.plots",
    "plot_posterior_spread": "bayeslora.analysis.plots",
    "predictive_entropy": "bayeslora.analysis.uncertainty",
    "reliability_curve": "bayeslora.analysis.calibration",
    "save_arviz": "bayeslora.analysis.inference_data",
    "to_arviz": "bayeslora.analysis.inference_data",
    "to_markdown": "bayeslora.analysis.comparison",
}

__all__ = [
    "accuracy",
    "apply_temperature",
    "brier_score",
    "build_inference_data",
    "calibration_summary",
    "comparison_table",
    "expected_calibration_error",
    "fit_temperature",
    "load_arviz",
    "mutual_information",
    "negative_log_likelihood",
    "plot_calibration",
    "plot_posterior_spread",
    "predictive_entropy",
    "reliability_curve",
    "save_arviz",
    "to_arviz",
    "to_markdown",
]

if TYPE_CHECKING:
    from bayeslora.analysis.calibration import (
        accuracy,
        brier_score,
        calibration_summary,
        expected_calibration_error,
        negative_log_likelihood,
        reliability_curve,
    )
    from bayeslora.analysis.comparison import comparison_table, to_markdown
    from bayeslora.analysis.inference_data import build_inference_data, load_arviz, save_arviz, to_arviz
    from bayeslora.analysis.plots import plot_calibration, plot_posterior_spread
    from bayeslora.analysis.temperature import apply_temperature, fit_temperature
    from bayeslora.analysis.uncertainty import mutual_information, predictive_entropy


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bayeslora.analysis' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
