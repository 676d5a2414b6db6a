r"""How ε changes while training: the paper's open question on its sample scaler.

A schedule multiplies ε by a factor of each adapter, in the prior and in the posterior alike, so no KL depends on it.
The factors are buffers of the model: what they are at the end is the posterior that is saved, and that predicts.

===============  ======================================================================================================
``"constant"``   1.
``"cosine"``     Rises from 0 to 1 over the first half of training, :math:`(1 - \cos 2\pi t)/2` for :math:`t < 1/2`, so
                 that the means are found before the noise is large.
``"entropy"``    1 − H/log C, with H the predictive entropy of training examples, averaged over some 20 batches, from 0
                 on: little noise while the network is unsure, and more the more certain it becomes.
``"learned"``    s²(3 − 2s), with s = 1 − U/U₀ the share that has been learned: U = 1 − exp(−L) is the probability that
                 the labels of training batches lack (L is their running negative log-likelihood; of texts a token's;
                 of numbers U is the squared error), and U₀ that of the first ten batches. No noise before the adapter
                 has learned something, little while it is unsure of its own training examples, and all of it when it
                 knows them by heart.
``"per_layer"``  As the posterior's standard deviation in a Laplace approximation with one variance for each adapter:
                 :math:`F_k^{-1/2}`, with :math:`F_k` the mean squared gradient of the entries of μ (an empirical
                 Fisher information), averaged over some 20 steps; divided by the adapters' geometric mean.
===============  ======================================================================================================
"""

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from bayeslora.distributed import average
from bayeslora.errors import InputError
from bayeslora.models.prior import Prior

if TYPE_CHECKING:
    from bayeslora.models.joint import JointModel

RATE = 0.05  # weight of the newest batch in an average
RISING_SHARE = 0.5  # of training, over which the cosine rises
LEAST = 1e-3  # factor of a schedule that starts without noise: at none there would be no density
FIRST_BATCHES = 10  # whose loss is that of a network that has learned nothing
WIDEST = 10.0  # a factor per layer lies between this and its inverse


class NoiseSchedule:
    """ε stays as it is.

    Args:
        model: Whose factors it sets.

    Raises:
        InputError: where what it measures does not exist.
    """

    needs_classes = False
    """Whether it follows probabilities of classes, which not every likelihood has."""

    follows_loss = False
    """Whether :meth:`see_loss` does anything."""

    def __init__(self, model: Prior):
        self.model = model

    def begin_step(self, progress: float) -> None:
        """Before an optimizer step; ``progress`` is the share of training behind it, in [0, 1)."""

    def see_logits(self, logits: Tensor) -> None:
        """After each forward pass of a training batch."""

    def see_loss(self, loss: Tensor) -> None:
        """After each forward pass of a training batch: how far it is from known by heart, at least 0."""

    def see_gradients(self) -> None:
        """After the backward passes of an optimizer step, before the gradients are used."""

    def measured(self) -> list[Tensor]:
        """The buffers that it has measured on this process's batches."""
        return []

    def agree(self) -> None:
        """Take the mean over all processes of what each has measured; every rank calls it."""
        average(self.measured())

    def set(self, factors: Tensor | float) -> None:
        """Multiply ε by ``factors``, of shape ``(adapters,)`` in network order or a number, from now on."""
        sizes = [len(group) for group in self.model.groups]
        every = torch.as_tensor(factors).expand(sum(sizes))
        for group, values in zip(self.model.groups, every.split(sizes), strict=True):
            self._buffer(group).copy_(values)

    def get(self) -> Tensor:
        """The factors, shape ``(adapters,)``."""
        return torch.cat([self._buffer(group) for group in self.model.groups])

    def _buffer(self, group: Any) -> Tensor:
        factors = self.model.noise_factors(group)
        assert factors is not None  # a schedule other than the constant one has them
        return factors


class CosineSchedule(NoiseSchedule):
    """Rises over the first half of training."""

    def begin_step(self, progress: float) -> None:
        risen = min(progress / RISING_SHARE, 1.0)
        self.set(max((1 - math.cos(math.pi * risen)) / 2, LEAST))


class EntropySchedule(NoiseSchedule):
    """Follows the certainty of the predictions on training batches."""

    needs_classes = True

    def __init__(self, model: Prior):
        super().__init__(model)
        self.set(LEAST)

    def measured(self) -> list[Tensor]:
        return [self._buffer(group) for group in self.model.groups]

    def see_logits(self, logits: Tensor) -> None:
        log_probs = logits.detach().float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).nanmean()  # NaN where nothing is said
        certainty = 1 - entropy / math.log(logits.shape[-1])
        self.set(torch.lerp(self.get(), certainty.clamp(min=LEAST), RATE))


class LearnedSchedule(NoiseSchedule):
    """Follows the share that has been learned of what there was to learn, along an S.

    ``bayes.model.losses`` holds the number of batches seen (up to ten), U₀ and U; it is saved with the posterior. A
    loss that is not finite is passed over.
    """

    follows_loss = True

    def __init__(self, model: Prior):
        super().__init__(model)
        model.register_buffer("losses", torch.zeros(3, device=model.groups[0].device))
        self.set(LEAST)

    def measured(self) -> list[Tensor]:
        return [self.model.losses, *(self._buffer(group) for group in self.model.groups)]

    def see_loss(self, loss: Tensor) -> None:
        known = self.model.losses
        seen, first, running = known
        loss = loss.detach().to(known)
        at_start = seen < FIRST_BATCHES
        first = torch.where(at_start, first + (loss - first) / (seen + 1), first)
        running = torch.where(at_start, first, torch.lerp(running, loss, RATE))
        learned = torch.stack([(seen + 1).clamp(max=FIRST_BATCHES), first, running])
        known.copy_(torch.where(loss.isfinite(), learned, known))
        _, first, running = known
        learned = (1 - running / first).clamp(0, 1)
        self.set((learned**2 * (3 - 2 * learned)).clamp(min=LEAST).nan_to_num(LEAST))


class PerLayerSchedule(NoiseSchedule):
    """Gives an adapter noise according to how well the data determine it."""

    def see_gradients(self) -> None:
        weights = [adapter.lora_A.weight for group in self.model.groups for adapter in group.adapters]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        if len(gradients) < len(weights):
            return
        device = self.model.groups[0].device
        sizes = torch.tensor([gradient.numel() for gradient in gradients], device=device)
        norms = [norm.to(device) for norm in torch._foreach_norm(gradients)]
        fisher = torch.stack(norms).float().square() / sizes
        if not bool((fisher > 0).all() & torch.isfinite(fisher).all()):  # while B is zero, so is μ's gradient
            return
        log_deviation = -fisher.log() / 2
        measured = (log_deviation - log_deviation.mean()).clamp(-math.log(WIDEST), math.log(WIDEST))
        self.set(torch.lerp(self.get().log(), measured, RATE).exp())


SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "constant": NoiseSchedule,
    "cosine": CosineSchedule,
    "entropy": EntropySchedule,
    "learned": LearnedSchedule,
    "per_layer": PerLayerSchedule,
}


def start_noise(model: "JointModel", guide: Any) -> NoiseSchedule:
    """ε as it is where training starts, in the units that the configuration has, and what changes it from there.

    Args:
        model: Whose ε it is.
        guide: A guide of the model that has not been trained.

    Raises:
        InputError: for units or a schedule that the guide, the likelihood or the mode does not go with.
    """
    config = model.config
    name, schedule = config.noise_schedule, SCHEDULES[config.noise_schedule]
    if config.noise_units != "absolute":
        what = f"noise_units={config.noise_units!r} sets ε layer by layer"
        check_follows_noise(guide, what, ", or noise_units='absolute'")
        model.set_noise_units(getattr(guide, "noise_variance", lambda group: None))
    if name != "constant":
        check_follows_noise(guide, f"noise_schedule={name!r} changes ε", ", or noise_schedule='constant'")
    if schedule.needs_classes and not model.labelling.of_classes:
        raise InputError(
            f"noise_schedule={name!r} follows the entropy of class probabilities, and this network has none: "
            "choose another noise_schedule"
        )
    return schedule(model)


def check_follows_noise(guide: Any, what: str, instead: str = "") -> None:
    """Refuse a change of ε that a guide would not see; ``instead`` is what else can be done."""
    if not getattr(guide, "follows_noise_schedule", False):
        raise InputError(
            f"{what}, and a {type(guide).__name__} does not follow: use one of the guides that are shipped{instead}"
        )


class NoiseScheduleCallback(TrainerCallback):
    """Keeps the schedule of a :class:`bayeslora.BayesLoRA` informed; :func:`bayeslora.fit` adds it, and so must you
    to a ``transformers.Trainer`` of your own where the schedule is not constant."""

    def __init__(self, schedule: NoiseSchedule):
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.begin_step(state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.agree()  # before a checkpoint is saved

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.schedule.see_gradients()
