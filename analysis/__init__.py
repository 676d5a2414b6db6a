"""What was learned: calibration, uncertainty, ArviZ data, pictures and tables. Arrays in, arrays out.

Importing this package loads neither torch, ArviZ nor matplotlib; each public name is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Diagnostic": "bayeslora.analysis.tables.diagnostics",
    "RunResults": "bayeslora.analysis.report.page",
    "SplitResults": "bayeslora.analysis.report.page",
    "accuracy": "bayeslora.analysis.metrics.calibration",
    "adapter_table": "bayeslora.analysis.draws.variance",
    "apply_temperature": "bayeslora.analysis.metrics.temperature",
    "area_under_risk_coverage": "bayeslora.analysis.metrics.selective",
    "at_best_settings": "bayeslora.analysis.tables.study",
    "best_settings": "bayeslora.analysis.tables.study",
    "bootstrap_interval": "bayeslora.analysis.metrics.bootstrap",
    "brier_decomposition": "bayeslora.analysis.metrics.brier",
    "brier_score": "bayeslora.analysis.metrics.calibration",
    "build_inference_data": "bayeslora.analysis.draws.inference_data",
    "calibration_summary": "bayeslora.analysis.metrics.calibration",
    "chi_square_test": "bayeslora.analysis.metrics.simulation_based_calibration",
    "classwise_calibration_error": "bayeslora.analysis.metrics.reliability",
    "comparison_table": "bayeslora.analysis.tables.comparison",
    "contraction": "bayeslora.analysis.draws.variance",
    "cost_table": "bayeslora.analysis.tables.study",
    "detection_curve": "bayeslora.analysis.metrics.detection",
    "detection_scores": "bayeslora.analysis.metrics.detection",
    "draws_needed": "bayeslora.analysis.draws.variance",
    "ecdf_test": "bayeslora.analysis.metrics.simulation_based_calibration",
    "effective_components": "bayeslora.analysis.draws.variance",
    "eigenvalues": "bayeslora.analysis.draws.variance",
    "excess_area_under_risk_coverage": "bayeslora.analysis.metrics.selective",
    "expected_calibration_error": "bayeslora.analysis.metrics.reliability",
    "expected_entropy": "bayeslora.analysis.metrics.uncertainty",
    "fit_temperature": "bayeslora.analysis.metrics.temperature",
    "held_out_elpd": "bayeslora.analysis.draws.elpd",
    "leave_one_out": "bayeslora.analysis.draws.elpd",
    "load_arviz": "bayeslora.analysis.draws.inference_data",
    "maximum_calibration_error": "bayeslora.analysis.metrics.reliability",
    "mixture_entropy": "bayeslora.analysis.draws.variance",
    "mutual_information": "bayeslora.analysis.metrics.uncertainty",
    "negative_log_likelihood": "bayeslora.analysis.metrics.calibration",
    "noise_contraction": "bayeslora.analysis.draws.variance",
    "paired_difference": "bayeslora.analysis.tables.study",
    "paired_robustness": "bayeslora.analysis.tables.study",
    "plot_accuracy_calibration": "bayeslora.analysis.plots.study",
    "plot_adapters": "bayeslora.analysis.plots.posterior",
    "plot_agreement": "bayeslora.analysis.plots.uncertainty",
    "plot_brier_parts": "bayeslora.analysis.plots.calibration",
    "plot_calibration": "bayeslora.analysis.plots.calibration",
    "plot_contraction": "bayeslora.analysis.plots.posterior",
    "plot_cost": "bayeslora.analysis.plots.study",
    "plot_detection": "bayeslora.analysis.plots.uncertainty",
    "plot_draws_needed": "bayeslora.analysis.plots.posterior",
    "plot_eigenvalues": "bayeslora.analysis.plots.posterior",
    "plot_entropy_parts": "bayeslora.analysis.plots.uncertainty",
    "plot_grid_spread": "bayeslora.analysis.plots.study",
    "plot_history": "bayeslora.analysis.plots.training",
    "plot_layer_map": "bayeslora.analysis.plots.posterior",
    "plot_learning_rates": "bayeslora.analysis.plots.study",
    "plot_posterior_spread": "bayeslora.analysis.plots.posterior",
    "plot_rank_ecdf": "bayeslora.analysis.plots.inference",
    "plot_risk_coverage": "bayeslora.analysis.plots.uncertainty",
    "plot_spread_against_mean": "bayeslora.analysis.plots.posterior",
    "plot_variance_shares": "bayeslora.analysis.plots.posterior",
    "predictive_entropy": "bayeslora.analysis.metrics.uncertainty",
    "rank_correlation": "bayeslora.analysis.metrics.agreement",
    "rank_ecdf": "bayeslora.analysis.metrics.simulation_based_calibration",
    "reliability_curve": "bayeslora.analysis.metrics.reliability",
    "report_html": "bayeslora.analysis.report.page",
    "risk_coverage": "bayeslora.analysis.metrics.selective",
    "robustness_table": "bayeslora.analysis.tables.study",
    "save_arviz": "bayeslora.analysis.draws.inference_data",
    "sharpness": "bayeslora.analysis.metrics.calibration",
    "steps_to_reach": "bayeslora.analysis.tables.study",
    "stream_arviz": "bayeslora.analysis.draws.streaming",
    "to_arviz": "bayeslora.analysis.draws.inference_data",
    "to_markdown": "bayeslora.analysis.tables.comparison",
    "variance_shares": "bayeslora.analysis.draws.variance",
    "vote": "bayeslora.analysis.metrics.voting",
    "vote_entropy": "bayeslora.analysis.metrics.agreement",
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
    from bayeslora.analysis.draws.elpd import held_out_elpd, leave_one_out
    from bayeslora.analysis.draws.inference_data import build_inference_data, load_arviz, save_arviz, to_arviz
    from bayeslora.analysis.draws.streaming import stream_arviz
    from bayeslora.analysis.draws.variance import (
        adapter_table,
        contraction,
        draws_needed,
        effective_components,
        eigenvalues,
        mixture_entropy,
        noise_contraction,
        variance_shares,
    )
    from bayeslora.analysis.metrics.agreement import rank_correlation, vote_entropy
    from bayeslora.analysis.metrics.bootstrap import bootstrap_interval
    from bayeslora.analysis.metrics.brier import brier_decomposition
    from bayeslora.analysis.metrics.calibration import (
        accuracy,
        brier_score,
        calibration_summary,
        negative_log_likelihood,
        sharpness,
    )
    from bayeslora.analysis.metrics.detection import detection_curve, detection_scores
    from bayeslora.analysis.metrics.reliability import (
        classwise_calibration_error,
        expected_calibration_error,
        maximum_calibration_error,
        reliability_curve,
    )
    from bayeslora.analysis.metrics.selective import (
        area_under_risk_coverage,
        excess_area_under_risk_coverage,
        risk_coverage,
    )
    from bayeslora.analysis.metrics.simulation_based_calibration import chi_square_test, ecdf_test, rank_ecdf
    from bayeslora.analysis.metrics.temperature import apply_temperature, fit_temperature
    from bayeslora.analysis.metrics.uncertainty import expected_entropy, mutual_information, predictive_entropy
    from bayeslora.analysis.metrics.voting import vote
    from bayeslora.analysis.plots.calibration import plot_brier_parts, plot_calibration
    from bayeslora.analysis.plots.inference import plot_rank_ecdf
    from bayeslora.analysis.plots.posterior import (
        plot_adapters,
        plot_contraction,
        plot_draws_needed,
        plot_eigenvalues,
        plot_layer_map,
        plot_posterior_spread,
        plot_spread_against_mean,
        plot_variance_shares,
    )
    from bayeslora.analysis.plots.study import (
        plot_accuracy_calibration,
        plot_cost,
        plot_grid_spread,
        plot_learning_rates,
    )
    from bayeslora.analysis.plots.training import plot_history
    from bayeslora.analysis.plots.uncertainty import (
        plot_agreement,
        plot_detection,
        plot_entropy_parts,
        plot_risk_coverage,
    )
    from bayeslora.analysis.report.page import RunResults, SplitResults, report_html
    from bayeslora.analysis.tables.comparison import comparison_table, to_markdown
    from bayeslora.analysis.tables.diagnostics import Diagnostic
    from bayeslora.analysis.tables.study import (
        at_best_settings,
        best_settings,
        cost_table,
        paired_difference,
        paired_robustness,
        robustness_table,
        steps_to_reach,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bayeslora.analysis' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
