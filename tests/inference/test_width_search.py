"""The search for a width: finds the minimum of known functions, with few evaluations."""

import math

import pytest

from bayeslora.inference.tuning import BISECTIONS, GRID, REFINEMENTS, WIDEST, search, widest


class TestSearch:
    @pytest.mark.parametrize("best", [0.0, 0.07, 0.3, 0.8, 1.0, 1.3, 2.7, 5.0, 11.0, 40.0, WIDEST])
    @pytest.mark.parametrize("shape", [lambda w, b: (w - b) ** 2, lambda w, b: abs(w - b) ** 1.5])
    def test_finds_the_minimum(self, best, shape):
        seen = []
        found = search(lambda width: seen.append(width) or shape(width, best))
        assert abs(found - best) <= max(0.12 * best, 0.07)
        doublings = max(math.ceil(math.log2(max(found, 4) / 4)), 0)
        assert len(set(seen)) <= len(GRID) + REFINEMENTS + min(doublings + 1, 4)
        assert shape(found, best) == min(shape(width, best) for width in seen)

    def test_stops_at_the_widest(self):
        seen = set()
        assert search(lambda width: seen.add(width) or -width) == WIDEST
        assert max(seen) == WIDEST

    @pytest.mark.parametrize("flat", [0.0, 3.0])
    def test_nothing_to_gain_is_the_mean(self, flat):
        assert search(lambda width: flat) == 0.0

    def test_overflow_is_avoided(self):
        assert search(lambda width: (width - 0.6) ** 2 if width < 0.7 else math.inf) == pytest.approx(0.6, abs=0.05)


class TestWidest:
    @pytest.mark.parametrize("limit", [0.0, 0.01, 0.4, 1.0, 1.5, 3.1, 20.0, 63.0])
    def test_the_largest_that_holds_and_the_next_step_does_not(self, limit):
        """Both public programs of TFB return the smallest that violates."""
        seen = []
        found = widest(lambda width: seen.append(width) or width <= limit)
        assert found <= limit
        assert found == max([width for width in seen if width <= limit], default=0.0)
        violating = min(width for width in seen if width > limit)
        assert violating - found <= max(found, 1.0) / 2**BISECTIONS * 1.01

    def test_stops_at_the_widest(self):
        seen = []
        assert widest(lambda width: seen.append(width) or True) == WIDEST
        assert max(seen) == WIDEST
