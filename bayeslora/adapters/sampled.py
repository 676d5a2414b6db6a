"""A ``lora_A`` that uses a drawn weight while one is set."""

import torch
from torch import Tensor, nn


class Draw:
    """What is drawn for one layer; empty in every copy, so a network can be deep-copied at any time.

    ``weight`` is the drawn A: ``(r, n_in)``, or ``(groups, r, n_in)`` for as many equal, consecutive groups of rows of
    the input. With ``signs``, ±1 of shape ``(examples, 1, r)``, it is μ and below it the deviation from μ,
    ``(2r, n_in)``, and every example turns rows of the deviation by its own signs.
    ``is_reached`` says whether the layer has run since it was set.
    """

    __slots__ = ("is_reached", "signs", "weight")

    def __init__(self) -> None:
        self.weight: Tensor | None = None
        self.signs: Tensor | None = None
        self.is_reached = False

    def set(self, weight: Tensor, signs: Tensor | None = None) -> None:
        self.weight, self.signs, self.is_reached = weight, signs, False

    def __deepcopy__(self, memo: dict) -> "Draw":
        return Draw()

    def __reduce__(self):
        return Draw, ()


class SampledLinear(nn.Linear):
    """``lora_A``: uses the drawn weight while one is set, and its own weight, the mean μ (r × n_in), otherwise."""

    draw: Draw

    @classmethod
    def wrap(cls, linear: nn.Linear) -> "SampledLinear":
        """A sampled layer that shares ``linear``'s parameter."""
        new = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        new.weight = linear.weight
        new.draw = Draw()
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        weight, signs = self.draw.weight, self.draw.signs
        if weight is None:
            return nn.functional.linear(input, self.weight)
        self.draw.is_reached = True
        if signs is not None:
            mean, deviation = _in_groups(nn.functional.linear(input, weight), len(signs)).chunk(2, dim=-1)
            output = torch.addcmul(mean, deviation, signs.to(mean.dtype))
        elif weight.dim() == 3:
            output = torch.bmm(_in_groups(_as_computed(input), len(weight)), weight.mT)
        else:
            return nn.functional.linear(input, weight)
        return output.reshape(*input.shape[:-1], -1)


def _in_groups(rows: Tensor, groups: int) -> Tensor:
    """Equal, consecutive groups of rows: ``(groups, rows, columns)``."""
    if rows.shape[0] % groups:
        raise RowsError(f"the input of an adapted layer has {rows.shape[0]} rows, not a multiple of {groups}")
    return rows.reshape(groups, -1, rows.shape[-1])


def _as_computed(input: Tensor) -> Tensor:
    """In the type that autocast computes in."""
    device = input.device.type
    return input.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else input


class RowsError(RuntimeError):
    """Examples do not lie along the first dimension of a layer's input, so they cannot each have a weight."""
