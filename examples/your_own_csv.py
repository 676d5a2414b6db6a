"""How do I fit a posterior to my own file?

Writes a small CSV with text labels, fits to it, and saves an adapter that plain PEFT opens too.

    python examples/your_own_csv.py
"""

import csv
import tempfile
from pathlib import Path

from peft import PeftModel
from transformers import set_seed

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit, load_task

ROWS = [
    ("the parcel arrived two weeks late", "complaint"),
    ("thank you, the new lamp is lovely", "praise"),
    ("where can I find the manual?", "question"),
    ("the screen was cracked when I opened the box", "complaint"),
    ("does it work with a longer cable?", "question"),
    ("best headphones I have had", "praise"),
]


def main(folder: str | None = None, *, model: str = "demo") -> Path:
    """Fit to the file, reopen the adapter with plain PEFT, and return its folder."""
    place = Path(folder or tempfile.mkdtemp())
    with (place / "messages.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("message", "kind"), *ROWS])

    set_seed(0)
    task = load_task("messages", place / "messages.csv", text_columns="message", label_column="kind")
    network, tokenizer = task.load_network(model)
    bayes = BayesLoRA(network, MonteCLoRAConfig(r=4))
    fit(bayes, task.encode(tokenizer, "train"), output_dir=place / "run", max_steps=4, batch_size=6)

    plain, _ = task.load_network(model)
    PeftModel.from_pretrained(plain, str(place / "run" / "adapter"))
    print(f"classes: {', '.join(task.label_names)}; adapter, also for plain PEFT: {place / 'run' / 'adapter'}")
    return place / "run" / "adapter"


if __name__ == "__main__":
    main()
