"""Runs as ``open_run`` gives them, on tiny networks, without a training."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bayeslora import BayesLoRA, MonteCLoRAConfig
from bayeslora.models import ChoiceLikelihood
from bayeslora.runs import FittedRun
from tests import language
from tests.conftest import VOCABULARY
from tests.modules import module, randomize_b

WORDS = ("good", "bad", "film", "plot", "the", "a", "is", "was", "fine", "dull", "very", "not")
LABELS = ("bad", "good", "neither")


def tokenizer():
    """Words, between [CLS] and [SEP]."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    words += [f"w{number}" for number in range(VOCABULARY - len(words))]
    vocabulary = {
        word: number for number, word in enumerate([*words, *(f"w{i}" for i in range(VOCABULARY - len(words)))])
    }
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")


def text_run(columns=("text",), *, labels=LABELS, seed=0, noise=0.3):
    """Of classes, or of numbers where there are no labels; the draws disagree."""
    bayes = randomize_b(module(seed=seed, sample_scaler=noise, network_options={"num_labels": len(labels) or 1})).eval()
    if labels:
        bayes.network.config.id2label = dict(enumerate(labels))
    bayes.tokenizer = tokenizer()
    task = {"name": "reviews", "data_dir": None, "text_columns": list(columns), "label_names": list(labels) or None}
    return FittedRun(bayes, bayes.tokenizer, {"task": task, "max_length": 16, "model": "base"})


def choice_run(name="arc_easy", *, style="options"):
    torch.manual_seed(0)
    config = MonteCLoRAConfig(r=2, sample_scaler=0.3, target_modules=["q_proj", "down_proj"])
    likelihood = ChoiceLikelihood(tuple("ABCD"))
    bayes = randomize_b(BayesLoRA(language.tiny_language_model(), config, likelihood=likelihood)).eval()
    bayes.tokenizer = language.tiny_tokenizer()
    task = {"name": name, "data_dir": None, "prompting": {"style": style}}
    return FittedRun(bayes, bayes.tokenizer, {"task": task, "max_length": 64, "model": "base"})


def sentences(count, seed=0):
    """Of two to nine words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 10, (count,), generator=generator)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (int(n),), generator=generator).tolist()) for n in lengths
    ]
