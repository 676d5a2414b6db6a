"""EleutherAI's evaluation harness takes merged models unchanged, and scores them as we do (extra ``harness``)."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from bayeslora import BayesLoRA, MonteCLoRAConfig, load_task
from tests.language import PLACES, tiny_language_model, tiny_tokenizer, write

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def questions(count):
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        places = random.choice(PLACES, random.integers(2, 5), replace=False)
        texts = [" ".join(["to the"] * random.integers(0, 3) + [place]) for place in places]
        answer = "ABCD"[random.integers(len(texts))]
        choices = {"text": texts, "label": list("ABCD"[: len(texts)])}
        animal = ["cat", "dog", "ball"][number % 3]
        rows.append(
            {
                "id": str(number),
                "question": f"where is the {animal} {number % 10}?",
                "choices": choices,
                "answerKey": answer,
            }
        )
    return rows


def harness(network, tokenizer, file):
    """What its own arc_easy says of each question: which option is best, as it is and over its characters."""
    from lm_eval.models.huggingface import HFLM

    files = {split: str(file) for split in ("train", "validation", "test")}
    own = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "arc" / "arc_easy.yaml").read_text())
    task = {**own, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, "tag": None}
    model = HFLM(pretrained=network, tokenizer=tokenizer, backend="causal", batch_size=4, device="cpu")
    found = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0, log_samples=True, verbosity="ERROR")
    samples = sorted(found["samples"]["arc_easy"], key=lambda sample: sample["doc_id"])
    log_likelihoods = [[response[0] for response in sample["filtered_resps"]] for sample in samples]
    return found["results"]["arc_easy"], log_likelihoods


@pytest.mark.parametrize("draw", [None, 1])
def test_the_harness_gives_merged_networks_our_scores(tmp_path, draw):
    write(tmp_path, "arc_easy", "test", questions(24))
    tokenizer = tiny_tokenizer()
    bayes = BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=4, sample_scaler=0.5)).eval()
    for group in bayes.model.groups:
        for adapter in group.adapters:
            torch.nn.init.normal_(adapter.layer.lora_B[adapter.key].weight, std=0.3)
    theirs, log_likelihoods = harness(bayes.merge(draw), tokenizer, tmp_path / "arc_easy" / "test.jsonl")
    for normalization, metric in (("none", "acc,none"), ("characters", "acc_norm,none")):
        task = load_task("arc_easy", tmp_path, prompting={"normalization": normalization})
        bayes.model.likelihood = task.likelihood()
        data = task.encode(tokenizer, "test")
        options = {"num_samples": 0} if draw is None else {"num_samples": 1, "first_draw": draw}
        prediction = bayes.predict(data, **options, progress=False)
        assert task.score(prediction.probs, prediction.labels)["accuracy"] == pytest.approx(theirs[metric])
        if normalization == "none":
            for log_probs, theirs_of_one in zip(prediction.sample_log_probs[0], log_likelihoods, strict=True):
                expected = np.array(theirs_of_one) - np.logaddexp.reduce(theirs_of_one)
                np.testing.assert_allclose(log_probs[: len(expected)], expected, atol=1e-3)
