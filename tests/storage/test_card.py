"""Model cards: the hub's metadata, numbers that were measured and no others, and a person's edits that stay."""

import json
import shutil
from pathlib import Path

import pytest
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftModel

from bayeslora import BayesLoRA, MonteCLoRAConfig, fit
from bayeslora.models import Tuning
from bayeslora.storage import hub
from bayeslora.storage.card import auto_class, card_of, is_generated
from bayeslora.storage.manifest import CARD, FILES, MANIFEST
from tests.conftest import tiny_dataset, tiny_network
from tests.modules import fitted

ABOUT = {
    "model": "somebody/a-model",
    "task": {"name": "sst2", "data_dir": None},
    "training": {"eval_samples": 4},
    "metrics": {"eval_loss": 0.5, "eval_accuracy": 0.7, "eval_predictive_nll": 0.41, "eval_predictive_accuracy": 0.75},
}


def saved(folder, about=None, tuning=None):
    bayes = fitted()
    bayes.about, bayes.tuning = about, tuning
    bayes.save_pretrained(folder)
    return bayes, (folder / CARD).read_text(encoding="utf-8")


def test_the_hubs_metadata(tmp_path):
    _, text = saved(tmp_path / "adapter", ABOUT)
    data = ModelCard(text).data
    assert (data.base_model, data.library_name) == ("somebody/a-model", "peft")
    assert data.datasets == ["nyu-mll/glue"]
    assert {"bayeslora", "lora"} <= set(data.tags)
    results = {result.metric_type: (result.metric_value, result.metric_name) for result in data.eval_results}
    assert results == {"accuracy": (0.75, "accuracy, 4 draws"), "nll": (0.41, "nll, 4 draws")}
    assert "| nll, 4 draws | 0.41 |" in text
    assert is_generated(text)


def test_nothing_is_claimed_that_was_not_measured(tmp_path):
    """Without a record there is no number, no data set and no path of this machine."""
    bayes, text = saved(tmp_path / "adapter")
    assert ModelCard(text).data.eval_results is None
    assert "Measured" not in text
    bayes.about = {**ABOUT, "model": str(tmp_path), "task": {"name": "sst2", "data_dir": str(tmp_path)}, "metrics": {}}
    assert str(tmp_path) not in card_of(bayes)
    assert ModelCard(card_of(bayes)).data.base_model is None
    assert ModelCard(card_of(bayes)).data.datasets is None
    bayes.about = {**ABOUT, "metrics": {"eval_loss": 0.5, "eval_accuracy": 0.7}}
    values = [(r.metric_name, r.metric_value) for r in ModelCard(card_of(bayes)).data.eval_results]
    assert values == [("accuracy, at the mean", 0.7), ("nll, at the mean", 0.5)]


@pytest.mark.parametrize("about", [{"task": [1], "metrics": "none", "training": None}, {"task": {"name": 3}}])
def test_a_damaged_record_is_no_reason_not_to_save(tmp_path, about):
    assert saved(tmp_path / "adapter", about)[1]


def test_a_tuned_width_is_told(tmp_path):
    _, text = saved(tmp_path / "adapter", ABOUT, Tuning(0.5, examples=30))
    assert "width tuned to 0.5, on 30 examples" in text
    assert "before the width was tuned" in text


def test_an_edited_card_stays(tmp_path):
    folder = tmp_path / "adapter"
    bayes, first = saved(folder)
    bayes.about = ABOUT
    bayes.save_pretrained(folder)
    second = (folder / CARD).read_text(encoding="utf-8")
    assert second != first  # as nobody touched it
    for edited in (second.replace("neither", "x") + "by hand\n", "my own card", second.replace("draws", "samples")):
        (folder / CARD).write_text(edited, encoding="utf-8")
        bayes.tuning = Tuning(0.25)
        bayes.save_pretrained(folder)
        assert (folder / CARD).read_text(encoding="utf-8") == edited
    (folder / CARD).write_text(second.replace("\n", "\r\n"), encoding="utf-8", newline="")
    bayes.save_pretrained(folder)
    assert "0.25" in (folder / CARD).read_text(encoding="utf-8")  # other line ends are no edit


def test_what_it_says_to_do_works(tmp_path, monkeypatch):
    """The code of the card, on the folder that it lies in."""
    tiny_network().save_pretrained(tmp_path / "base")
    _, text = saved(tmp_path / "adapter")
    code = text.split("```python\n")[1].split("```")[0]
    code = code.replace("THE_BASE_MODEL", str(tmp_path / "base")).replace("THIS_FOLDER", str(tmp_path / "adapter"))
    code = code.replace('dict(bayes.tokenizer("A text."))', '{"input_ids": [5, 6]}')
    opening, mean = code.split("from peft")
    names = {}
    exec(opening, names)
    assert isinstance(names["bayes"], BayesLoRA)
    assert len(names["prediction"]) == 1
    names["network"] = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    exec("from peft" + mean, names)
    assert isinstance(names["mean"], PeftModel)


@pytest.mark.parametrize(
    "auto",
    [
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForImageClassification",
        "AutoModelForAudioClassification",
        "AutoModelForCausalLM",
        "AutoModelForSeq2SeqLM",
    ],
)
def test_the_class_that_loads_the_network_is_named(auto):
    """Whatever a class of transformers makes, that class is said to load."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sound = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (2,), "num_feat_extract_layers": 1}
    sound |= {"num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 1}
    configs = {
        "Image": transformers.ViTConfig(**small, image_size=8, patch_size=4),
        "Audio": transformers.Wav2Vec2Config(**small, **sound),
        "Causal": transformers.LlamaConfig(**small, vocab_size=20),
        "Seq2Seq": transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
    }
    config = next((of for name, of in configs.items() if name in auto), transformers.BertConfig(**small, vocab_size=20))
    assert auto_class(getattr(transformers, auto).from_config(config)) == auto


def test_the_card_of_a_network_that_writes_from_what_it_reads():
    network = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )
    card = card_of(BayesLoRA(network, MonteCLoRAConfig(r=2, target_modules=["q"])))
    assert 'AutoModelForSeq2SeqLM.from_pretrained("THE_BASE_MODEL")' in card
    assert ModelCard(card).data.pipeline_tag == "text2text-generation"
    assert "bayes.generate(" in card


def test_a_run_writes_one_with_its_numbers(tmp_path):
    bayes = fitted()
    about = {"model": "somebody/a-model", "task": {"name": "sst2", "data_dir": None}}
    data = tiny_dataset(16)
    fit(bayes, data, data, output_dir=tmp_path / "run", max_steps=1, metadata=about, progress=False)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    text = (tmp_path / "run" / "adapter" / CARD).read_text(encoding="utf-8")
    results = {result.metric_type: result.metric_value for result in ModelCard(text).data.eval_results}
    assert results["nll"] == round(record["metrics"]["eval_predictive_nll"], 4)
    again = BayesLoRA.from_pretrained(tmp_path / "run", tiny_network())
    again.save_pretrained(tmp_path / "run" / "adapter")
    assert (tmp_path / "run" / "adapter" / CARD).read_text(encoding="utf-8") == text
    checkpoints = [*(tmp_path / "run" / "checkpoints").glob("*")]
    assert checkpoints
    assert not any((folder / CARD).exists() for folder in checkpoints)


class Hub:
    """A folder in place of the hub."""

    def __init__(self, folder: Path):
        self.folder, self.calls = folder, []

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, **options):
        self.calls.append(options)
        self.folder.mkdir(exist_ok=True)
        return type("Url", (), {"repo_id": repo_id})

    def hf_hub_download(self, repo_id, name, revision=None):
        if not (self.folder / name).exists():
            raise EntryNotFoundError(name)
        return self.folder / name

    def upload_folder(self, *, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"


def test_pushing(tmp_path, monkeypatch):
    there = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", there)
    bayes = fitted()
    assert bayes.push_to_hub("somebody/an-adapter", private=True) == "https://hub/somebody/an-adapter"
    assert there.calls == [{"private": True, "exist_ok": True}]
    assert {path.name for path in there.folder.iterdir()} == {*FILES, MANIFEST, CARD}
    assert BayesLoRA.from_pretrained(there.folder, tiny_network()).adapter_names == bayes.adapter_names
    (there.folder / CARD).write_text("edited on the hub", encoding="utf-8")
    bayes.push_to_hub("somebody/an-adapter")
    assert (there.folder / CARD).read_text(encoding="utf-8") == "edited on the hub"
