"""A model card: what an adapter folder is, how it is opened, and the numbers that were measured of it."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from bayeslora.adapters.provenance import CLASSIFIERS
from bayeslora.data.batches import main_input
from bayeslora.models.network import is_causal, is_seq2seq
from bayeslora.posterior import Posterior
from bayeslora.storage.manifest import CARD
from bayeslora.tasks.load import NAMED_TASKS

_SEAL = "<!-- written by bayeslora, and anew whenever the adapter is saved, until somebody edits it: {} -->\n"
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_METRICS = ("accuracy", "nll", "ece", "brier")
_TAGS = ["bayeslora", "lora", "bayesian", "uncertainty", "calibration"]


def write_card(bayes: Posterior, folder: Path, before: Path | None = None) -> None:
    """Write ``README.md`` into an adapter's folder; what a person wrote or edited stays.

    Args:
        bayes: What is saved, with :attr:`~bayeslora.posterior.Posterior.about`, the record of its run, if any.
        folder: Where to.
        before: The folder that it takes the place of, where that is another.
    """
    path, old = folder / CARD, (folder if before is None else before) / CARD
    if old.is_file() and not is_generated(text := old.read_text(encoding="utf-8")):
        path.write_text(text, encoding="utf-8")
    else:
        path.write_text(card_of(bayes), encoding="utf-8")


def is_generated(text: str) -> bool:
    """Whether a card is as :func:`card_of` made it."""
    body, _, seal = text.replace("\r\n", "\n").rpartition("<!-- ")
    return "<!-- " + seal == _seal(body)


def _seal(body: str) -> str:
    return _SEAL.format(hashlib.sha256(body.encode()).hexdigest())


def card_of(bayes: Posterior) -> str:
    """The card, with the hub's metadata at its top."""
    about = bayes.about or {}
    base = _base_name(bayes, about)
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=_PIPELINES[auto_class(bayes.network.get_base_model())],
        tags=_TAGS,
        datasets=_dataset(about),
        model_name="adapter" if base is None else f"{base.split('/')[-1]} with a posterior over its LoRA adapter",
        eval_results=_results(bayes, about) or None,
    )
    body = f"---\n{data.to_yaml()}\n---\n\n" + "\n".join([*_text(bayes, about, base), ""])
    return body + _seal(body)


# what model hubs call the task of what a class of transformers loads
_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
}


def _base_name(bayes: Posterior, about: Mapping[str, Any]) -> str | None:
    """The base model as the hub calls it; None for a folder, whose path is nobody's business."""
    asked = (about.get("model"), getattr(bayes.config, "name_or_path", None))
    names = [name for name in asked if isinstance(name, str) and _HUB_NAME.fullmatch(name)]
    return next((name for name in names if "/" in name and not Path(name).exists()), None)


def _dataset(about: Mapping[str, Any]) -> list[str] | None:
    task = _part(about, "task")
    known = NAMED_TASKS.get(str(task.get("name")))
    return [known.repository] if known and known.repository and not task.get("data_dir") else None


def _part(about: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An entry of the record that has entries itself."""
    part = about.get(name)
    return part if isinstance(part, Mapping) else {}


def _results(bayes: Posterior, about: Mapping[str, Any]) -> list[EvalResult]:
    """What the evaluation of a training measured: of the draws where there are any, else of the mean."""
    measured, task = _part(about, "metrics"), _part(about, "task")
    drawn = any(name.startswith("eval_predictive_") for name in measured)
    draws = _part(about, "training").get("eval_samples")
    found = []
    for metric in _METRICS:
        name = f"eval_predictive_{metric}" if drawn else "eval_loss" if metric == "nll" else f"eval_{metric}"
        if isinstance(measured.get(name), int | float):
            found.append(
                EvalResult(
                    task_type=_PIPELINES[auto_class(bayes.network.get_base_model())],
                    dataset_type=(_dataset(about) or ["local"])[0],
                    dataset_name=str(task.get("name", "unnamed")),
                    dataset_split="validation",
                    metric_type=metric,
                    metric_name=f"{metric}, {f'{draws} draws' if drawn else 'at the mean'}",
                    metric_value=round(measured[name], 4),
                )
            )
    return found


def _text(bayes: Posterior, about: Mapping[str, Any], base: str | None) -> list[str]:
    auto = auto_class(bayes.network.get_base_model())
    outputs = f", num_labels={bayes.config.num_labels}" if auto.endswith("Classification") else ""
    if getattr(bayes.config, "problem_type", None) == "multi_label_classification":
        outputs += ', problem_type="multi_label_classification"'
    named = f'"{base}"' if base else '"THE_BASE_MODEL"'
    lines = [
        "# A LoRA adapter with a posterior",
        "",
        f"A LoRA adapter of {f'`{base}`' if base else 'a local base model'} whose matrices A are random variables: its "
        "draws are whole networks, and where they disagree the model does not know. The method is MonteCLoRA "
        "([arXiv:2411.04358](https://arxiv.org/abs/2411.04358)); plain PEFT opens the folder as the mean.",
        "",
        "## Open it",
        "",
        "```python",
        f"from transformers import {auto}",
        "",
        f"network = {auto}.from_pretrained({named}{outputs})",
        "",
        "from bayeslora import BayesLoRA  # with its posterior",
        "",
        'bayes = BayesLoRA.from_pretrained("THIS_FOLDER", network)',
        _call(bayes),
        "",
        "from peft import PeftModel  # or its mean alone, on a network that was loaded anew",
        "",
        'mean = PeftModel.from_pretrained(network, "THIS_FOLDER")',
        "```",
        "",
        "## What the uncertainty means",
        "",
        "`probs` is the mean of the draws' probabilities. `entropy` is how unsure that prediction is, in nats; "
        "`mutual_information` is the part of it that the draws disagree about. It is a statement about this model and "
        "its training data; it is not promised to notice every input that is unlike them.",
        "",
    ]
    return lines + _facts(bayes, about)


def auto_class(network: nn.Module) -> str:
    """The class of transformers that loads such a network with its head."""
    if is_causal(network):
        return "AutoModelForCausalLM"
    if is_seq2seq(network):
        return "AutoModelForSeq2SeqLM"
    if main_input(network) in ("input_values", "input_features"):  # classes of sounds are called as of texts
        return "AutoModelForAudioClassification"
    name = type(network).__name__
    return "AutoModel" + next((kind for kind in CLASSIFIERS if name.endswith(kind)), CLASSIFIERS[0])


def _call(bayes: Posterior) -> str:
    if bayes.model.labelling.evaluates_labels:
        return 'print(bayes.generate("Once", num_samples=8).texts)'
    if bayes.model.labelling.without_labels is not None:
        return 'prediction = open_run("ITS_RUN").predict(["A text."])  # open_run from bayeslora, where its run is too'
    if is_causal(bayes.network.get_base_model()):
        return "prediction = bayes.predict(questions, num_samples=16)  # as encode_options makes them"
    if (read := main_input(bayes.network)) != "input_ids":
        return f"prediction = bayes.predict(examples, num_samples=16)  # each a mapping with {read}"
    return 'prediction = bayes.predict([dict(bayes.tokenizer("A text."))], num_samples=16)'


def _facts(bayes: Posterior, about: Mapping[str, Any]) -> list[str]:
    """What is known of it, as a list."""
    config, tuning, task = bayes.monteclora_config, bayes.model.tuning, _part(about, "task")
    facts = [
        f"rank {config.r}, {len(bayes.adapter_names)} adapted layers, guide `{type(bayes.guide).__name__}`",
        f"trained on {bayes.num_examples} examples" if bayes.num_examples else "",
        f"task `{task['name']}`" if "name" in task else "",
        f"classes: {', '.join(names)}" if (names := bayes.model.labelling.label_names(bayes.network)) else "",
        "" if tuning is None else str(tuning),
    ]
    lines = ["## What is known of it", "", *(f"- {fact}" for fact in facts if fact), ""]
    results = _results(bayes, about)
    if results:
        before = "" if tuning is None else " The draws were as fitted, before the width was tuned."
        lines += [
            f"Measured on the validation examples of the training, which also chose the checkpoint.{before}",
            "",
            "| metric | value |",
            "|---|---|",
            *(f"| {result.metric_name} | {result.metric_value} |" for result in results),
            "",
        ]
    return lines
