"""What was learned: calibration, uncertainty, ArviZ data, pictures and tables. Arrays in, arrays out.

Importing this package loads neither torch, ArviZ nor matplotlib; each public name is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Diagnostic": "bayeslora.analysis.diagnostics",
    "RunResults": "bayeslora.analysis.report",
    "SplitResults": "bayeslora.analysis.report",
    "accuracy": "bayeslora.analysis.calibration",
    "adapter_table": "bayeslora.analysis.variance",
    "apply_temperature": "bayeslora.analysis.temperature",
    "area_under_risk_coverage": "bayeslora.analysis.selective",
    "at_best_settings": "bayeslora.analysis.study",
    "best_settings": "bayeslora.analysis.study",
    "bootstrap_interval": "bayeslora.analysis.bootstrap",
    "brier_decomposition": "bayeslora.analysis.brier",
    "brier_score": "bayeslora.analysis.calibration",
    "build_inference_data": "bayeslora.analysis.inference_data",
    "calibration_summary": "bayeslora.analysis.calibration",
    "chi_square_test": "bayeslora.analysis.simulation_based_calibration",
    "classwise_calibration_error": "bayeslora.analysis.reliability",
    "comparison_table": "bayeslora.analysis.comparison",
    "contraction": "bayeslora.analysis.variance",
    "cost_table": "bayeslora.analysis.study",
    "detection_curve": "bayeslora.analysis.detection",
    "detection_scores": "bayeslora.analysis.detection",
    "draws_needed": "bayeslora.analysis.variance",
    "ecdf_test": "bayeslora.analysis.simulation_based_calibration",
    "effective_components": "bayeslora.analysis.variance",
    "eigenvalues": "bayeslora.analysis.variance",
    "excess_area_under_risk_coverage": "bayeslora.analysis.selective",
    "expected_calibration_error": "bayeslora.analysis.reliability",
    "expected_entropy": "bayeslora.analysis.uncertainty",
    "fit_temperature": "bayeslora.analysis.temperature",
    "held_out_elpd": "bayeslora.analysis.elpd",
    "leave_one_out": "bayeslora.analysis.elpd",
    "load_arviz": "bayeslora.analysis.inference_data",
    "maximum_calibration_error": "bayeslora.analysis.reliability",
    "mixture_entropy": "bayeslora.analysis.variance",
    "mutual_information": "bayeslora.analysis.uncertainty",
    "negative_log_likelihood": "bayeslora.analysis.calibration",
    "noise_contraction": "bayeslora.analysis.variance",
    "paired_difference": "bayeslora.analysis.study",
    "paired_robustness": "bayeslora.analysis.study",
    "plot_accuracy_calibration": "bayeslora.analysis.plots_study",
    "plot_adapters": "bayeslora.analysis.plots_posterior",
    "plot_agreement": "bayeslora.analysis.plots_uncertainty",
    "plot_brier_parts": "bayeslora.analysis.plots_calibration",
    "plot_calibration": "bayeslora.analysis.plots_calibration",
    "plot_contraction": "bayeslora.analysis.plots_posterior",
    "plot_cost": "bayeslora.analysis.plots_study",
    "plot_detection": "bayeslora.analysis.plots_uncertainty",
    "plot_draws_needed": "bayeslora.analysis.plots_posterior",
    "plot_eigenvalues": "bayeslora.analysis.plots_posterior",
    "plot_entropy_parts": "bayeslora.analysis.plots_uncertainty",
    "plot_grid_spread": "bayeslora.analysis.plots_study",
    "plot_history": "bayeslora.analysis.plots_training",
    "plot_layer_map": "bayeslora.analysis.plots_posterior",
    "plot_learning_rates": "bayeslora.analysis.plots_study",
    "plot_posterior_spread": "bayeslora.analysis.plots_posterior",
    "plot_rank_ecdf": "bayeslora.analysis.plots_inference",
    "plot_risk_coverage": "bayeslora.analysis.plots_uncertainty",
    "plot_spread_against_mean": "bayeslora.analysis.plots_posterior",
    "plot_variance_shares": "bayeslora.analysis.plots_posterior",
    "predictive_entropy": "bayeslora.analysis.uncertainty",
    "rank_correlation": "bayeslora.analysis.agreement",
    "rank_ecdf": "bayeslora.analysis.simulation_based_calibration",
    "reliability_curve": "bayeslora.analysis.reliability",
    "report_html": "bayeslora.analysis.report",
    "risk_coverage": "bayeslora.analysis.selective",
    "robustness_table": "bayeslora.analysis.study",
    "save_arviz": "bayeslora.analysis.inference_data",
    "sharpness": "bayeslora.analysis.calibration",
    "steps_to_reach": "bayeslora.analysis.study",
    "stream_arviz": "bayeslora.analysis.streaming",
    "to_arviz": "bayeslora.analysis.inference_data",
    "to_markdown": "bayeslora.analysis.comparison",
    "variance_shares": "bayeslora.analysis.variance",
    "vote": "bayeslora.analysis.voting",
    "vote_entropy": "bayeslora.analysis.agreement",
}

__all__ = [
    "Diagnostic",
    "RunResults",
    "SplitResults",
    "accuracy",
    "adapter_table",
    "apply_temperature",
    "area_under_risk_coverage",
    "at_best_settings",
    "best_settings",
    "bootstrap_interval",
    "brier_decomposition",
    "brier_score",
    "build_inference_data",
    "calibration_summary",
    "chi_square_test",
    "classwise_calibration_error",
    "comparison_table",
    "contraction",
    "cost_table",
    "detection_curve",
    "detection_scores",
    "draws_needed",
    "ecdf_test",
    "effective_components",
    "eigenvalues",
    "excess_area_under_risk_coverage",
    "expected_calibration_error",
    "expected_entropy",
    "fit_temperature",
    "held_out_elpd",
    "leave_one_out",
    "load_arviz",
    "maximum_calibration_error",
    "mixture_entropy",
    "mutual_information",
    "negative_log_likelihood",
    "noise_contraction",
    "paired_difference",
    "paired_robustness",
    "plot_accuracy_calibration",
    "plot_adapters",
    "plot_agreement",
    "plot_brier_parts",
    "plot_calibration",
    "plot_contraction",
    "plot_cost",
    "plot_detection",
    "plot_draws_needed",
    "plot_eigenvalues",
    "plot_entropy_parts",
    "plot_grid_spread",
    "plot_history",
    "plot_layer_map",
    "plot_learning_rates",
    "plot_posterior_spread",
    "plot_rank_ecdf",
    "plot_risk_coverage",
    "plot_spread_against_mean",
    "plot_variance_shares",
    "predictive_entropy",
    "rank_correlation",
    "rank_ecdf",
    "reliability_curve",
    "report_html",
    "risk_coverage",
    "robustness_table",
    "save_arviz",
    "sharpness",
    "steps_to_reach",
    "stream_arviz",
    "to_arviz",
    "to_markdown",
    "variance_shares",
    "vote",
    "vote_entropy",
]

if TYPE_CHECKING:
    from bayeslora.analysis.agreement import rank_correlation, vote_entropy
    from bayeslora.analysis.bootstrap import bootstrap_interval
    from bayeslora.analysis.brier import brier_decomposition
    from bayeslora.analysis.calibration import (
        accuracy,
        brier_score,
        calibration_summary,
        negative_log_likelihood,
        sharpness,
    )
    from bayeslora.analysis.comparison import comparison_table, to_markdown
    from bayeslora.analysis.detection import detection_curve, detection_scores
    from bayeslora.analysis.diagnostics import Diagnostic
    from bayeslora.analysis.elpd import held_out_elpd, leave_one_out
    from bayeslora.analysis.inference_data import build_inference_data, load_arviz, save_arviz, to_arviz
    from bayeslora.analysis.plots_calibration import plot_brier_parts, plot_calibration
    from bayeslora.analysis.plots_inference import plot_rank_ecdf
    from bayeslora.analysis.plots_posterior import (
        plot_adapters,
        plot_contraction,
        plot_draws_needed,
        plot_eigenvalues,
        plot_layer_map,
        plot_posterior_spread,
        plot_spread_against_mean,
        plot_variance_shares,
    )
    from bayeslora.analysis.plots_study import (
        plot_accuracy_calibration,
        plot_cost,
        plot_grid_spread,
        plot_learning_rates,
    )
    from bayeslora.analysis.plots_training import plot_history
    from bayeslora.analysis.plots_uncertainty import (
        plot_agreement,
        plot_detection,
        plot_entropy_parts,
        plot_risk_coverage,
    )
    from bayeslora.analysis.reliability import (
        classwise_calibration_error,
        expected_calibration_error,
        maximum_calibration_error,
        reliability_curve,
    )
    from bayeslora.analysis.report import RunResults, SplitResults, report_html
    from bayeslora.analysis.selective import area_under_risk_coverage, excess_area_under_risk_coverage, risk_coverage
    from bayeslora.analysis.simulation_based_calibration import chi_square_test, ecdf_test, rank_ecdf
    from bayeslora.analysis.streaming import stream_arviz
    from bayeslora.analysis.study import (
        at_best_settings,
        best_settings,
        cost_table,
        paired_difference,
        paired_robustness,
        robustness_table,
        steps_to_reach,
    )
    from bayeslora.analysis.temperature import apply_temperature, fit_temperature
    from bayeslora.analysis.uncertainty import expected_entropy, mutual_information, predictive_entropy
    from bayeslora.analysis.variance import (
        adapter_table,
        contraction,
        draws_needed,
        effective_components,
        eigenvalues,
        mixture_entropy,
        noise_contraction,
        variance_shares,
    )
    from bayeslora.analysis.voting import vote


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bayeslora.analysis' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
