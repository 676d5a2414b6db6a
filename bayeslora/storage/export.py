"""Draws of the posterior as ordinary LoRA adapters, for whatever loads PEFT adapters."""

from pathlib import Path

from bayeslora.errors import InputError
from bayeslora.files.writing import replacing_folder, write_json
from bayeslora.inference.draws import sample_sites
from bayeslora.posterior import Posterior
from bayeslora.storage.peft_files import write_peft_files

MEAN_FOLDER = "mean"
INDEX_FILE = "draws.json"


def export_draws(bayes: Posterior, folder: str | Path, num_draws: int, *, seed: int = 0) -> list[Path]:
    """Write draws as PEFT adapters, ``folder/draw-000``, ``draw-001``, ..., and the posterior mean, ``folder/mean``.

    Each folder holds PEFT's two files and opens with ``peft.PeftModel.from_pretrained``, or in any server that loads
    PEFT adapters: averaging the draws' probabilities is then the posterior predictive. ``folder/draws.json`` names
    them, with the ``temperature`` to divide logits by where one was tuned. The folder appears complete or not at all.

    Args:
        bayes: The fitted module.
        folder: A new or empty folder.
        num_draws: How many.
        seed: Draw s is that of :meth:`bayeslora.BayesLoRA.predict` with this seed.

    Returns:
        The draws' folders.

    Raises:
        InputError: for a folder that holds something, fewer than one draw, plain LoRA (ε = 0), or a tuned width of 0.
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
    with replacing_folder(folder) as new:
        (new / MEAN_FOLDER).mkdir()
        write_peft_files(bayes.network, bayes.kept_keys, new / MEAN_FOLDER)
        for name, sites in zip(names, sample_sites(bayes, num_draws, seed), strict=True):
            drawn = bayes.model.matrices(sites)
            matrices = {
                adapter.name: matrix.mT
                for group in bayes.model.groups
                for adapter, matrix in zip(group.adapters, drawn[group.name], strict=True)
            }
            (new / name).mkdir()
            write_peft_files(bayes.network, bayes.kept_keys, new / name, lora_A=matrices)
        tempered = {} if tuning is None or tuning.temperature == 1 else {"temperature": tuning.temperature}
        write_json(new / INDEX_FILE, {"seed": seed, "mean": MEAN_FOLDER, "draws": names} | tempered)
    return [folder / name for name in names]
