"""How the posterior is approximated: variational families over (π, Σ, A)."""

from bayeslora.guides.amortized import AmortizedGuide
from bayeslora.guides.base import Guide
from bayeslora.guides.mean_field import MeanFieldGuide

GUIDES: dict[str, type[Guide]] = {"mean_field": MeanFieldGuide, "amortized": AmortizedGuide}

__all__ = ["GUIDES", "AmortizedGuide", "Guide", "MeanFieldGuide"]
