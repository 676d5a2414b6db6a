"""The end of a run: its adapter, and the record that says that it is whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayeslora.files.writing import write_json
from bayeslora.inference.draws import as_tuned
from bayeslora.posterior import Posterior
from bayeslora.storage.checkpoint import save_pretrained
from bayeslora.storage.run_folder import ADAPTER_FOLDER, RUN_FILE
from bayeslora.training.monitor import relative_noise_by_adapter


def close_run(bayes: Posterior, record: dict[str, Any], output_dir: Path, outcome: Mapping[str, Any]) -> None:
    """Write the adapter, then the record, with the ``outcome``, that says that it is whole."""
    bayes.about = {**record, **outcome}
    save_pretrained(bayes, output_dir / ADAPTER_FOLDER)
    with as_tuned(bayes, None):
        record["relative_noise"] = relative_noise_by_adapter(bayes)
    write_json(output_dir / RUN_FILE, {**record, "finished": True, **outcome})
