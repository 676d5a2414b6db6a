"""``bayeslora bayesianize``: from a plain PEFT folder to a run like any other."""

import inspect
import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from bayeslora import BayesLoRA, open_run
from bayeslora.analysis import to_arviz
from bayeslora.command.main import main
from bayeslora.command.parser import build_parser
from bayeslora.inference.shapes import SHAPES

ROWS = 24


@pytest.fixture(scope="module")
def reviews(data, tmp_path_factory):
    """The reviews, with enough of them to find a width on."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("more") / "reviews")
    lines = (data / "validation.csv").read_text().splitlines()
    text = "\n".join([lines[0], *lines[1:] * (ROWS // len(lines[1:]))]) + "\n"
    (folder / "validation.csv").write_text(text)
    (folder / "new.csv").write_text(text.replace(",1\n", ",-1\n").replace(",0\n", ",-1\n"))
    return folder


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    """What PEFT saves; nothing of bayeslora has touched it."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=3, target_modules=["query", "value"], task_type="SEQ_CLS")
    adapted = peft.get_peft_model(network, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        words = torch.tensor([[2, 9, noun, 11, word, 3] for noun in (7, 8) for word in (5, 6, 13, 14)])
        logits = adapted.eval()(input_ids=words).logits
        bias = adapted.base_model.model.classifier.modules_to_save["default"].bias
        bias[0] += (logits[:, 1] - logits[:, 0]).median()  # so that not all reviews are answered alike
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture
def command(adapter, model, reviews, tmp_path):
    """Its words; what comes last wins."""
    task = ["--task", "reviews", "--data-dir", str(reviews), "--text-columns", "text", "--max-length", "16"]
    few = ["--num-samples", "2"]
    return [str(adapter), "--model", str(model), *task, *few, "--output", str(tmp_path / "run")]


def made(command):
    assert main(["bayesianize", *command]) == 0
    return command[-1]


def complaint(capsys, *words):
    capsys.readouterr()
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("shape", ["isotropic", "output", "curvature"])
def test_is_a_run_like_any_other(command, adapter, shape, tmp_path, capsys):
    run = made([*command[:-2], "--shape", shape, "--width", "0.5", *command[-2:]])
    said = capsys.readouterr().out
    assert "4 layers, unchanged" in said
    assert f"{ROWS} examples, " in said
    assert f"{'width':24} 0.5000\n" in said
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in (adapter, f"{run}/adapter"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    few = ["--num-samples", "2"]
    assert main(["evaluate", run, *few, "--json"]) == 0
    assert main(["predict", run, "--text", "the film is good", *few]) == 0
    scores, row = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert 0 <= scores["accuracy"] <= 1
    assert sum(row["probs"].values()) == pytest.approx(1)
    assert main(["report", run, "--output", str(tmp_path / "page.html"), "--no-diagnostics", *few]) == 0
    fitted = open_run(run)
    assert fitted.posterior.tuning.width == scores["tuned_width"] == 0.5
    assert fitted.record["bayesianized"]["shape"] == shape
    assert len(fitted.posterior.export_draws(tmp_path / "draws", 2)) == 2
    idata = to_arviz(fitted.posterior, fitted.data("test"), num_samples=2)
    assert idata.posterior.sizes["draw"] == 2


def test_can_be_diagnosed(command, capsys):
    run = made(command)
    capsys.readouterr()
    assert main(["diagnose", run, "--num-samples", "25", "--steps", "2", "--json"]) == 0
    names = [answer["name"] for answer in json.loads(capsys.readouterr().out)]
    assert names == ["pareto_k", "data_drivenness", "amortization_gap"]


def test_without_labels(command, capsys):
    run = made([*command[:-2], "--split", "new", "--agreement", "0.8", *command[-2:]])
    said = capsys.readouterr().out
    assert f"{'split':24} new, {ROWS} examples\n" in said
    assert "\nagreement  " in said
    tuning = open_run(run).posterior.tuning
    assert tuning.nll is None
    assert tuning.agreement >= 0.8


@pytest.mark.parametrize("width", ["0.5", "agreement"])
def test_steps_train_the_guide_alone(command, adapter, width):
    run = made([*command[:-2], "--steps", "3", "--width", width, *command[-2:]])
    fitted = open_run(run)
    assert fitted.record["steps"] == 3
    assert (fitted.posterior.tuning is None) == (width == "0.5")
    before, after = (load_file(f"{folder}/adapter_model.safetensors") for folder in (adapter, f"{run}/adapter"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_need_noise(command, capsys):
    """Where no noise predicts the labels better than some, there is nothing to train."""
    assert "there is no noise to train" in complaint(
        capsys, "bayesianize", *command[:-2], "--steps", "3", "--width", "0", *command[-2:]
    )


def test_flags_say_what_python_says():
    """The parser loads no torch, and so says it again."""
    given = build_parser().parse_args(["bayesianize", "adapter", "--model", "m", "--task", "t", "--output", "o"])
    usual = inspect.signature(BayesLoRA.from_adapter).parameters
    for name in ("shape", "width", "agreement", "with_temperature", "num_samples", "batch_size", "seed"):
        assert getattr(given, name) == usual[name].default
    for shape in SHAPES:
        build_parser().parse_args(f"bayesianize adapter --model m --task t --output o --shape {shape}".split())


def test_a_width_of_ones_own(command):
    tuning = open_run(made([*command[:-2], "--width", "0.25", *command[-2:]])).posterior.tuning
    assert (tuning.width, tuning.nll, tuning.agreement) == (0.25, None, None)


def test_the_mean_is_what_peft_opens(command, model, reviews):
    run = made(command)
    network = transformers.AutoModelForSequenceClassification.from_pretrained(model)
    plain = peft.PeftModel.from_pretrained(network, f"{run}/adapter").eval()
    fitted = open_run(run)
    (tokens,) = fitted.encode(["the film is good"])
    with torch.no_grad():
        logits = plain(**{name: torch.tensor([value]) for name, value in tokens.items()}).logits
    mean = fitted.predict(["the film is good"], num_samples=0).probs
    np.testing.assert_allclose(logits.softmax(-1).numpy(), mean, atol=1e-6)


class TestRefused:
    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--split", "test"], "is what it is judged by"),
            (["--split", "nowhere"], "has no split 'nowhere'"),
            (["--split", "new", "--width", "labels"], "has no labels: use --width agreement"),
            (["--width", "0.5", "--with-temperature"], "leave one of the two out"),
            (["--width", "wide"], "width"),
            (["--shape", "round"], "invalid choice: 'round'"),
            (["--max-examples", "5"], "at least 20 examples"),
            (["--width", "labels", "--agreement", "0.8"], "--agreement does nothing beside another --width"),
            (["--max-train-examples", "8"], "--max-train-examples does nothing without --steps"),
        ],
    )
    def test_words(self, command, words, says, capsys, tmp_path):
        assert says in complaint(capsys, "bayesianize", *command[:-2], *words, *command[-2:])
        assert not (tmp_path / "run" / "adapter").exists()

    def test_a_folder_without_an_adapter(self, command, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        error = complaint(capsys, "bayesianize", tmp_path / "empty", *command[1:])
        assert "it holds no adapter_config.json" in error

    def test_a_folder_of_several_adapters(self, command, adapter, tmp_path, capsys):
        for name in ("first", "second"):
            shutil.copytree(adapter, tmp_path / "both" / name)
        error = complaint(capsys, "bayesianize", tmp_path / "both", *command[1:])
        assert "it holds the adapters first, second" in error

    def test_another_base_network(self, command, adapter, tmp_path, capsys):
        folder = shutil.copytree(adapter, tmp_path / "adapter")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": "somebody/other-model"})
        )
        error = complaint(capsys, "bayesianize", folder, *command[1:])
        assert "names another base network" in error
        assert "--any-base" in error
        made([str(folder), "--any-base", *command[1:]])

    def test_weights_of_another_shape(self, command, adapter, tmp_path, capsys):
        folder = shutil.copytree(adapter, tmp_path / "adapter")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
        assert "does not fit this network" in complaint(capsys, "bayesianize", folder, *command[1:])

    def test_another_run_in_the_way(self, command, capsys):
        made(command)
        assert "holds a run already" in complaint(capsys, "bayesianize", *command)

    def test_examples_it_was_trained_on_are_told(self, command, capsys):
        made([*command[:-2], "--split", "train", *command[-2:]])
        assert "may have been trained on these examples" in capsys.readouterr().err
