"""What a fresh process does for tests/adapters/test_architectures.py: each network reopens on its base and predicts.

python tests/workers/reopen_worker.py FOLDER: every FOLDER/NAME holds ``base`` and ``adapter``; writes FOLDER/NAME.npz.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from bayeslora import BayesLoRA
from tests.architectures import ARCHITECTURES


def main(folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        architecture = ARCHITECTURES[place.name]
        bayes = BayesLoRA.from_pretrained(place / "adapter", architecture.load(place / "base", seed=99))
        prediction = bayes.predict(architecture.examples(), num_samples=2, progress=False)
        np.savez(folder / f"{place.name}.npz", probs=prediction.sample_probs)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
