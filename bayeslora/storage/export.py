"""Draws of the posterior as ordinary LoRA adapters, for whatever loads PEFT adapters."""

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from bayeslora.adapters.groups import active_adapter, adapter_state
from bayeslora.adapters.untrusted import PREFIX
from bayeslora.errors import InputError
from bayeslora.files.writing import replacing_folder, write_json
from bayeslora.inference.draws import sample_sites
from bayeslora.posterior import Posterior
from bayeslora.storage.manifest import ADAPTER_WEIGHTS
from bayeslora.storage.peft_files import kept_tensors, write_peft_files

MEAN_FOLDER = "mean"
INDEX_FILE = "draws.json"
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's max_lora_rank, but for 1


def export_draws(
    bayes: Posterior, folder: str | Path, num_draws: int, *, seed: int = 0, for_server: bool = False
) -> list[Path]:
    """Write draws as PEFT adapters, ``folder/draw-000``, ``draw-001``, ..., and the posterior mean, ``folder/mean``.

    Each folder holds PEFT's two files and opens with ``peft.PeftModel.from_pretrained``, or in any server that loads
    PEFT adapters: averaging the draws' probabilities is then the posterior predictive. ``folder/draws.json`` names
    them, with the ``temperature`` to divide logits by where one was tuned. The folder appears complete or not at all.

    Args:
        bayes: The fitted module.
        folder: A new or empty folder.
        num_draws: How many.
        seed: Draw s is that of :meth:`bayeslora.BayesLoRA.predict` with this seed.
        for_server: Write what vLLM and SGLang take, which know one rank and one scale for all layers of an adapter, in
            ``adapter_config.json``: every layer padded with zeros to the next rank that vLLM reserves (8, 16, 32, 64,
            128, 256, 320 or 512; ``max_lora_rank`` in ``draws.json``), layers' own scales multiplied into B, and
            ``target_modules`` as a list of names. What each draw computes is the same.

    Returns:
        The draws' folders.

    Raises:
        InputError: for a folder that holds something, fewer than one draw, plain LoRA (ε = 0), or a tuned width of 0;
            for a server also where more than LoRA was trained (a head), which no server loads, or a rank above 512.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and holds something: choose another folder")
    if bayes.monteclora_config.sample_scaler == 0:
        raise InputError("sample_scaler=0 is plain LoRA: it has no draws; save_pretrained writes its one adapter")
    if not bayes.model.has_noise:
        raise InputError(
            "the width was tuned to 0, where every draw is the mean: save_pretrained writes it, and "
            "bayes.tuning = None goes back to draws as they were fitted"
        )
    tuning = bayes.model.tuning
    names = [f"draw-{index:03}" for index in range(num_draws)]
    served = _check_served(bayes) if for_server else {}
    with replacing_folder(folder) as new:
        for name, matrices in _networks(bayes, names, seed):
            (new / name).mkdir()
            if for_server:
                _write_for_server(bayes, new / name, matrices, served["max_lora_rank"])
            else:
                write_peft_files(bayes.network, bayes.kept_keys, new / name, lora_A=matrices)
        tempered = {} if tuning is None or tuning.temperature == 1 else {"temperature": tuning.temperature}
        write_json(new / INDEX_FILE, {"seed": seed, "mean": MEAN_FOLDER, "draws": names} | tempered | served)
    return [folder / name for name in names]


def _networks(bayes: Posterior, names: list[str], seed: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The mean and the draws by name: A of each adapted layer, ``(r, n_in)``; none is given for the mean."""
    yield MEAN_FOLDER, {}
    for name, sites in zip(names, sample_sites(bayes, len(names), seed), strict=True):
        drawn = bayes.model.matrices(sites)
        yield (
            name,
            {
                adapter.name: matrix.mT
                for group in bayes.model.groups
                for adapter, matrix in zip(group.adapters, drawn[group.name], strict=True)
            },
        )


def _check_served(bayes: Posterior) -> dict[str, int]:
    """The rank to pad to."""
    ours = {f"{PREFIX}{a.name}.lora_{part}.weight" for g in bayes.model.groups for a in g.adapters for part in "AB"}
    others = [*(adapter_state(bayes.network).keys() - ours), *kept_tensors(bayes.network, bayes.kept_keys)]
    if others:
        raise InputError(
            f"{min(others).removeprefix(PREFIX)!r} was trained whole, or comes with the adapter, and servers load LoRA "
            "alone: merge a draw (bayes.merge(draw=0)) and serve that as a model"
        )
    largest = max(group.rank for group in bayes.model.groups)
    fitting = [rank for rank in SERVED_RANKS if rank >= largest]
    if not fitting:
        raise InputError(f"rank {largest} is above {SERVED_RANKS[-1]}, the largest that vLLM reserves")
    return {"max_lora_rank": fitting[0]}


def _write_for_server(bayes: Posterior, folder: Path, matrices: Mapping[str, Tensor], rank: int) -> None:
    """One draw as :func:`export_draws` says."""
    adapters = [adapter for group in bayes.model.groups for adapter in group.adapters]
    scales = {adapter.name: float(adapter.layer.scaling[adapter.key]) for adapter in adapters}
    alike = len(set(scales.values())) == 1
    state, tensors = adapter_state(bayes.network), {}
    for adapter in adapters:
        names = [f"{PREFIX}{adapter.name}.lora_{part}.weight" for part in "AB"]
        mean, last = (state[name].detach().cpu() for name in names)
        first = matrices.get(adapter.name, mean).detach().cpu().to(mean.dtype)
        last = last if alike else (last.double() * scales[adapter.name]).to(last.dtype)
        missing = rank - adapter.rank
        tensors[names[0]] = nn.functional.pad(first, (0, 0, 0, missing)).contiguous()
        tensors[names[1]] = nn.functional.pad(last, (0, missing)).contiguous()
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.copy(bayes.network.peft_config[active_adapter(bayes.network)])
    config.r, config.lora_alpha = rank, _plain(next(iter(scales.values())) * rank) if alike else rank
    config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
    config.target_modules = sorted({name.rpartition(".")[2] for name in scales})
    config.modules_to_save, config.inference_mode, config.init_lora_weights = None, True, True
    config.save_pretrained(str(folder))


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
