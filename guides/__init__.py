"""How the posterior is approximated: variational families over (π, Σ, A).

``GUIDES`` has those that a configuration can name.

Example:
    >>> sorted(GUIDES)
    ['amortized', 'gaussian', 'mean_field']
"""

from bayeslora.guides.amortized import AmortizedGuide
from bayeslora.guides.base import Guide
from bayeslora.guides.gaussian import GaussianGuide
from bayeslora.guides.mean_field import MeanFieldGuide
from bayeslora.guides.mixture import MixtureGuide

GUIDES: dict[str, type[Guide]] = {
    "mean_field": MeanFieldGuide,
    "amortized": AmortizedGuide,
    "gaussian": GaussianGuide,
}

__all__ = ["GUIDES", "AmortizedGuide", "GaussianGuide", "Guide", "MeanFieldGuide", "MixtureGuide"]
