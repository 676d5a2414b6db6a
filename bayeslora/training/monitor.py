"""What training tells while it runs: the state of the posterior, a brief progress bar, and TensorBoard's curves."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ProgressCallback
from transformers.integrations import TensorBoardCallback

from bayeslora.guides import Guide, MixtureGuide
from bayeslora.posterior import Posterior

TENSORBOARD_FOLDER = "tensorboard"


@torch.no_grad()
def components_in_use(bayes: Posterior) -> Tensor:
    """1 / E[Σ_k π_k²] of every adapter, between 1 and N: how many components share the mixture.

    Returns:
        Shape ``(adapters,)``, in the order of ``bayes.adapter_names``.
    """
    return torch.cat([1 / bayes.guide.expected_squares(group) for group in bayes.model.groups])


@torch.no_grad()
def noise_to_signal(bayes: Posterior) -> Tensor | None:
    """Standard deviation of an entry of A around μ, over the root mean square of μ, for every adapter.

    Returns:
        Shape ``(adapters,)``, in the order of ``bayes.adapter_names``; None where the guide has no formula for it.
    """
    deviations = noise_deviations(bayes)
    if deviations is None:
        return None
    return deviations / torch.cat([group.mean_scale() for group in bayes.model.groups])


@torch.no_grad()
def relative_noise(bayes: Posterior) -> Tensor | None:
    """ρ: the same over the standard deviation with which PEFT starts A, 1/√(3·n_in), whatever the noise's units."""
    deviations = noise_deviations(bayes)
    if deviations is None:
        return None
    columns = [group.columns for group in bayes.model.groups for _ in group.adapters]
    return deviations * (3 * torch.tensor(columns, device=deviations.device)).sqrt()


def relative_noise_by_adapter(bayes: Posterior) -> dict[str, float]:
    """:func:`relative_noise` by the adapters' names; empty for plain LoRA, and where the guide has no formula."""
    found = relative_noise(bayes) if bayes.sampling and isinstance(bayes.guide, Guide) else None
    return {} if found is None else dict(zip(bayes.adapter_names, found.tolist(), strict=True))


def noise_deviations(bayes: Posterior) -> Tensor | None:
    """Standard deviation of an entry of A around μ, for every adapter; None where the guide has no formula for it."""
    variances = [bayes.guide.noise_variance(group) for group in bayes.model.groups]
    if any(variance is None for variance in variances):
        return None
    return torch.cat(variances).sqrt()


def posterior_logs(bayes: Posterior) -> dict[str, float]:
    """The posterior in numbers, by the names they are logged under, where the guide has them."""
    logs: dict[str, float] = {}
    if not bayes.sampling or not isinstance(bayes.guide, Guide):
        return logs
    if isinstance(bayes.guide, MixtureGuide):
        logs["posterior/effective_components"] = float(components_in_use(bayes).mean())
    noise, relative = noise_to_signal(bayes), relative_noise(bayes)
    if noise is not None and relative is not None:
        ratios = noise.tolist()
        logs |= {
            "posterior/noise_to_signal_mean": sum(ratios) / len(ratios),
            "posterior/noise_to_signal_max": max(ratios),
            "posterior/relative_noise_mean": float(relative.mean()),
        }
        logs |= {f"noise_to_signal/{name}": r for name, r in zip(bayes.adapter_names, ratios, strict=True)}
    return logs


class BriefProgress(ProgressCallback):
    """Trainer's progress bar, with one short line per log instead of every term of the ELBO."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any):
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {name: value for name, value in logs.items() if name in _SHOWN}
        if shown:
            numbers = "  ".join(f"{_SHOWN[name]} {value:.4g}" for name, value in shown.items())
            self.training_bar.write(f"step {state.global_step}: {numbers}")


_SHOWN = {
    "loss": "loss",
    "elbo/task": "task",
    "elbo/kl": "KL",
    "elbo/cooperation": "cooperation",
    "posterior/noise_to_signal_mean": "noise/signal",
    "grad_norm": "gradient norm",
    "eval_loss": "evaluation NLL",
    "eval_accuracy": "accuracy",
    "eval_ece": "ECE",
    "eval_predictive_nll": "over draws: NLL",
    "eval_predictive_ece": "ECE over draws",
}


class GroupedTensorBoard(TensorBoardCallback):
    """Curves in groups of their own (``elbo/``, ``noise_to_signal/``, ...) rather than all under ``train/``.

    They lie in the run's ``tensorboard/`` folder; a resumed run continues its curves where its checkpoint was.
    """

    logging_dir: str | None
    _next_step = 0

    def _init_summary_writer(self, args: Any) -> None:
        self.tb_writer = self._SummaryWriter(log_dir=self.logging_dir, purge_step=self._next_step)

    def close(self) -> None:
        """Write what is pending and end the writer's thread; an interrupted run does not get to ``on_train_end``."""
        if self.tb_writer is not None:
            self.tb_writer.close()
            self.tb_writer = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._next_step = state.global_step + 1
        self.logging_dir = self.logging_dir or str(Path(args.output_dir).parent / TENSORBOARD_FOLDER)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        self._next_step = state.global_step + 1
        grouped = {name: value for name, value in (logs or {}).items() if "/" in name}
        rest = {name: value for name, value in (logs or {}).items() if "/" not in name}
        super().on_log(args, state, control, rest, **kwargs)
        if self.tb_writer is not None:
            for name, value in grouped.items():
                self.tb_writer.add_scalar(name, value, state.global_step)
