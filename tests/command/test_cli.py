"""The command line as a user meets it: exit codes, one-line errors, and a whole run on a tiny network."""

import csv
import inspect
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest

from bayeslora import open_run
from bayeslora.adapters.quantized import is_quantized
from bayeslora.command.fit import still_falls
from bayeslora.command.main import main
from bayeslora.command.options.idle import RULES, refuse_idle
from bayeslora.command.parser import build_parser
from bayeslora.training.fit import FitResult
from tests.conftest import tiny_network

COMMANDS = ("demo", "fit", "bayesianize", "evaluate", "predict", "tune", "diagnose", "compare", "report")


def data_options(model, data):
    return ["--model", str(model), "--task", "reviews", "--data-dir", str(data), "--text-columns", "text"]


SMALL = ["--rank", "2", "--target-modules", "query", "value", "--max-length", "16", "--batch-size", "8"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"bayeslora {command}" in text
    undocumented = [a.option_strings for a in _options(command) if a.help is None and a.option_strings]
    assert len(undocumented) <= 8  # plain words such as --epochs explain themselves


def _options(command):
    commands = next(a for a in build_parser()._actions if a.choices and command in a.choices)
    return commands.choices[command]._actions


def test_top_level_help_has_examples_of_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"bayeslora {command}" in text


def test_help_and_analysis_do_not_import_torch():
    code = (
        "import sys, bayeslora.analysis; from bayeslora.command.parser import build_parser; build_parser(); "
        "import bayeslora.command.main; print({'torch', 'transformers', 'datasets'} & {*sys.modules})"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_what_runs_it(command):
    commands = next(a for a in build_parser()._actions if a.choices and command in a.choices)
    for default in ("check", "run"):
        name = commands.choices[command].get_default(default)
        if name or default == "run":
            module, function = name.split(":")
            assert next(iter(inspect.signature(getattr(import_module(module), function)).parameters)) == "arguments"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("fit --model m --task mrcp --output o", "unknown task 'mrcp': did you mean mrpc?"),
        (
            "fit --model m --task x --data-dir . --text-columns text --output o --mode post_hoc --sample-scaler 0",
            "leaves none to train",
        ),
        ("compare --model m --task mrcp --output o", "unknown task 'mrcp': did you mean mrpc?"),
        ("compare study.yaml --output o", "'model' is missing"),
        ("predict run --split test --text-pair b", "--text-pair does nothing without --text"),
        ("predict run --text a --max-examples 3", "--max-examples does nothing beside --text"),
        ("predict run --text a --tolerance 0.1", "--tolerance does nothing without --num-samples auto"),
        ("evaluate run --num-samples 4 --tolerance 0.1", "--tolerance does nothing without --num-samples auto"),
        ("evaluate run --num-samples 0 --antithetic", "--antithetic does nothing with --num-samples 0"),
        ("predict run --text a --num-samples 0 --seed 3", "--seed does nothing with --num-samples 0"),
        ("evaluate run --max-new-tokens 3", "--max-new-tokens does nothing without --generate"),
        ("evaluate run --execute-generated-code", "--execute-generated-code does nothing without --generate"),
        ("evaluate run --generate --top-p 0.5", "--top-p does nothing at --temperature 0"),
        ("fit --model m --task sst2 --output o --epochs 2 --max-steps 9", "--epochs does nothing beside --max-steps"),
        ("fit --model m --task sst2 --output o --adapter a --rank 4", "--rank does nothing beside --adapter"),
        (
            "fit --model m --task sst2 --output o --warmup 0.3 --schedule constant",
            "--warmup does nothing with --schedule constant",
        ),
        (
            "fit --model m --task x --data-dir . --text-columns text --output o --best-metric ece",
            "--best-metric does nothing for task 'x', which has no labelled validation split",
        ),
        (
            "fit --model m --task x --data-dir . --text-columns text --output o --mode post_hoc --preset learned",
            "--noise-schedule learned follows what the adapter learns, and --mode post_hoc freezes it",
        ),
        (
            "compare --model m --task sst2 --output o --methods lora dora --sample-scaler 0.2",
            "--sample-scaler does nothing without monteclora in --methods",
        ),
        (
            "compare --model m --task sst2 --output o --early-stopping 2",
            "--early-stopping does nothing in compare, which trains every method on the same budget",
        ),
        (
            "fit --model m --task sst2 --output o --sample-scaler 0 --guide gaussian",
            "--guide does nothing with --sample",
        ),
        ("tune run --agreement 0.9 --with-temperature", "--with-temperature does nothing beside --agreement"),
        ("report run --num-samples 0 --seed 1", "--seed does nothing with --num-samples 0"),
        ("compare study.yaml --output o --seeds 1", "--seeds does nothing beside a study file: change study.yaml"),
    ],
)
def test_mistakes_are_found_without_torch(arguments, says, tmp_path):
    (tmp_path / "study.yaml").write_text("tasks: [sst2]\n", encoding="utf-8")
    (tmp_path / "train.csv").write_text("text,label\ngood,1\nbad,0\n", encoding="utf-8")
    code = (
        "import sys; from bayeslora.command.main import main; "
        "print(main(sys.argv[1:]), {'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "2 set()"
    assert says in done.stderr


@pytest.mark.parametrize("command", RULES)
def test_every_flag_of_a_rule_exists_and_works_somewhere(command):
    """A rule that named no flag of its command would never be broken, nor tested."""
    least = {
        "fit": "--model m --task t --output o",
        "bayesianize": "adapter --model m --task t --output o --steps 1",
        "predict": "run --text a",
        "evaluate": "run --generate --temperature 1",
        "tune": "run",
        "report": "run",
        "compare": "--output o",
    }
    arguments = build_parser().parse_args([command, *least[command].split()])
    for rule in RULES[command]:
        assert all(hasattr(arguments, name) for name in rule.names)
    refuse_idle(arguments)


def test_fit_writes_a_run(run):
    record = json.loads((run / "run.json").read_text())
    assert record["finished"] is True
    assert record["task"]["name"] == "reviews"
    assert (run / "adapter" / "posterior.safetensors").is_file()


@pytest.mark.parametrize(
    ("labels", "words", "schedule", "scale"),
    [
        (("0", "1"), [], "learned", 8.0),
        (("0", "1"), ["--preset", "constant"], "constant", 0.1),
        (("0", "1"), ["--sample-scaler", "0.5"], "learned", 0.5),
        (("0.25", "1.75"), [], "learned", 8.0),
    ],
    ids=["classes", "classes_constant", "classes_scaled", "numbers"],
)
def test_the_default_preset_is_for_every_kind_of_label(model, tmp_path, labels, words, schedule, scale):
    if "." in labels[0]:
        model = shutil.copytree(model, tmp_path / "one_output")
        tiny_network(num_labels=1).save_pretrained(model)
    rows = "".join(f"the film is {word},{label}\n" for word, label in zip(("good", "bad"), labels, strict=True))
    (tmp_path / "train.csv").write_text("text,label\n" + rows * 4)
    options = data_options(model, tmp_path)
    assert main(["fit", *options, "--output", str(tmp_path / "run"), "--max-steps", "1", *SMALL, *words]) == 0
    config = json.loads((tmp_path / "run" / "adapter" / "bayeslora.json").read_text())["config"]
    assert (config["noise_schedule"], config["sample_scaler"]) == (schedule, scale)


def test_relative_noise_that_follows_what_was_learned(model, data, tmp_path):
    folder, page = tmp_path / "run", tmp_path / "report.html"
    words = ["--noise-units", "relative", "--noise-schedule", "learned", "--sample-scaler", "0.5"]
    assert main(["fit", *data_options(model, data), "--output", str(folder), "--epochs", "4", *SMALL, *words]) == 0
    record = json.loads((folder / "run.json").read_text())
    assert [record["config"][name] for name in ("noise_units", "noise_schedule", "sample_scaler")] == [
        "relative",
        "learned",
        0.5,
    ]
    logged = [entry["posterior/relative_noise_mean"] for entry in record["history"] if "elbo/task" in entry]
    assert logged[0] == pytest.approx(0.5e-3, rel=0.05)  # next to none, of 0.5
    assert max(logged) <= 0.55
    words = ["report", str(folder), "--output", str(page), "--num-samples", "2", "--max-examples", "4"]
    assert main([*words, "--no-diagnostics"]) == 0
    text = re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))
    assert re.search(r"noise_units\s+relative", text)
    assert re.search(r"noise_schedule\s+learned", text)


def test_post_hoc_starts_from_a_trained_lora(run, model, data, tmp_path, capsys):
    from safetensors.torch import load_file

    shape, rest = SMALL[:5], SMALL[5:]
    post_hoc = ["fit", *data_options(model, data), "--mode", "post_hoc", "--max-steps", "2", *rest]
    assert main([*post_hoc, "--output", str(tmp_path / "without"), *shape]) == 2
    assert "say which with --adapter" in capsys.readouterr().err
    assert main([*post_hoc, "--output", str(tmp_path / "o"), "--adapter", str(run / "adapter")]) == 0
    before, after = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (run, tmp_path / "o"))
    assert all((after[name] == before[name]).all() for name in before)
    before, after = (load_file(f / "adapter" / "posterior.safetensors") for f in (run, tmp_path / "o"))
    assert any((after[name] != before[name]).any() for name in before)


def test_evaluate_prints_one_json_object(run, capsys):
    assert main(["evaluate", str(run), "--num-samples", "3", "--json"]) == 0
    out = capsys.readouterr().out
    scores = json.loads(out)
    assert out.count("\n") == 1
    assert scores["split"] == "test"
    assert scores["examples"] == 16
    assert 0 <= scores["accuracy"] <= 1
    assert {"nll", "ece", "brier"} <= set(scores)
    assert main(["evaluate", str(run), "--num-samples", "3", "--json", "--batch-size", "3"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nll"] == pytest.approx(scores["nll"], rel=1e-5)
    assert main(["evaluate", str(run), "--num-samples", "3", "--json", "--antithetic"]) == 0
    pairs = json.loads(capsys.readouterr().out)
    assert pairs["nll"] != scores["nll"]


def test_evaluate_for_people(run, capsys):
    assert main(["evaluate", str(run), "--split", "validation", "--num-samples", "0"]) == 0
    said = capsys.readouterr()
    assert re.search(r"^nll +\d\.\d{4}$", said.out, re.MULTILINE)
    assert re.search(r"^confidence +0\.\d{4}, (surer|less sure|as sure)", said.out, re.MULTILINE)
    assert "the draws agree" not in said.err  # there are none
    assert main(["evaluate", str(run), "--split", "validation", "--num-samples", "4"]) == 0
    assert (
        "the draws agree (mutual information" in capsys.readouterr().err
    )  # after two epochs there is next to no noise


def test_predict_texts(run, capsys):
    assert main(["predict", str(run), "--text", "the film is good", "a dull plot", "--num-samples", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["the film is good", "a dull plot"]
    for line in lines:
        assert sum(line["probs"].values()) == pytest.approx(1, abs=1e-5)
        assert line["label"] == max(line["probs"], key=line["probs"].get)
        assert line["mutual_information"] <= line["entropy"] + 1e-6


def test_predict_an_unlabelled_split(run, capsys):
    assert main(["predict", str(run), "--split", "unlabelled", "--num-samples", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_index_of_a_prediction_is_the_row_of_the_file(run, data, capsys):
    texts = [row["text"] for row in csv.DictReader((data / "test.csv").read_text().splitlines())]
    words = ["predict", str(run), "--num-samples", "0"]
    assert main([*words, "--split", "test", "--max-examples", "5"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] != [0, 1, 2, 3, 4]
    assert main([*words, "--text", *(texts[line["index"]] for line in lines)]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["probs"] for line in lines] == [pytest.approx(line["probs"], abs=1e-5) for line in again]


def test_fit_says_what_it_kept_at_the_mean_and_over_draws(run, model, data, tmp_path, capsys):
    """After the fact it is before and after; the mean's score stays, and the better posterior is kept."""
    words = ["fit", *data_options(model, data), *SMALL[5:], "--adapter", str(run), "--epochs", "3"]
    words += ["--sample-scaler", "1"]
    assert main([*words, "--mode", "post_hoc", "--output", str(tmp_path / "post_hoc")]) == 0
    said = capsys.readouterr()
    record = json.loads((tmp_path / "post_hoc" / "run.json").read_text())
    assert "trained on" not in said.err
    assert f"kept: step {record['checkpoint']}, the best of 3 evaluations, on 8 validation examples" in said.out
    assert "the LoRA alone  with its posterior, 4 draws" in said.out
    nll = next(line.split() for line in said.out.splitlines() if line.split()[:1] == ["nll"])
    scores = [record["metrics"][name] for name in ("eval_loss", "eval_predictive_nll")]
    assert [float(word) for word in nll[1:]] == pytest.approx(scores, abs=1e-4)
    assert scores[1] == min(entry["eval_predictive_nll"] for entry in record["history"] if "eval_loss" in entry)
    assert main([*words, "--output", str(tmp_path / "joint")]) == 0
    assert "is trained on, together with its posterior; --mode post_hoc leaves it" in capsys.readouterr().err


def test_an_evaluation_does_not_outlast_training(model, data, tmp_path, capsys):
    words = ["fit", *data_options(model, data), *SMALL, "--max-steps", "1", "--max-train-examples", "4"]
    assert main([*words, "--output", str(tmp_path / "few")]) == 0
    said = capsys.readouterr()
    assert "evaluating on 4 of 8 validation examples (--max-eval-examples)" in said.err
    assert "the only evaluation, on 4 validation examples" in said.out
    assert "the draws say what the mean says" in said.out
    assert main([*words, "--output", str(tmp_path / "asked"), "--max-eval-examples", "6"]) == 0
    assert "evaluating on 6 of 8" in capsys.readouterr().err


@pytest.mark.parametrize(("course", "falls"), [(0.03, True), (0.001, False), (-0.03, False)])
def test_fit_says_whether_the_loss_still_falls(course, falls, tmp_path):
    noise = np.random.default_rng(0).normal(size=40) * 0.01
    history = [{"step": i, "elbo/task": 0.8 * np.exp(-course * i) + noise[i], "loss": 1.0} for i in range(40)]
    assert still_falls(FitResult({}, history, 40, tmp_path)) == falls


def test_precision_and_memory_reach_training(model, data, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr("bayeslora.command.fit.fit", lambda *_, **options: given.update(options) or pytest.exit)
    words = ["fit", *data_options(model, data), *SMALL, "--output", str(tmp_path / "run"), "--bf16"]
    with pytest.raises(AttributeError):  # what fit would have returned
        main([*words, "--gradient-checkpointing", "--report-to", "none", "--device-map", "cpu"])
    assert [given[name] for name in ("bf16", "gradient_checkpointing", "report_to")] == [True, True, ["none"]]
    assert given["metadata"]["bits"] is None


def test_four_bits_are_remembered(model, data, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path / "run"
    words = ["fit", *data_options(model, data), *SMALL, "--output", str(folder), "--max-steps", "1", "--load-in-4bit"]
    assert main(words) == 0
    assert is_quantized(open_run(folder).network)


@pytest.mark.parametrize(("command", "says"), [("report", "report interrupted"), ("fit", "fit interrupted; the same")])
def test_an_interrupt_names_its_command(command, says, monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bayeslora.command.main._resolve", lambda _: interrupted)
    words = {"report": ["run"], "fit": ["--model", "m", "--task", "t", "--output", "o"]}
    assert main([command, *words[command]]) == 130
    assert f"bayeslora: {says}" in capsys.readouterr().err


def test_help_shows_defaults_and_tasks(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "default 3, or for",
        "(default: 0.001)",
        "mrpc, cola",
        "gsm8k",
        "(default: 128)",
        "(default: 0)",
        "adapters; default 8",
        "as --preset",
    ):
        assert words in text


def test_diagnose_for_people_and_programs(run, capsys):
    command = ["diagnose", str(run), "--restarts", str(run), "--num-samples", "25", "--steps", "3"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found = {one["name"]: one for one in json.loads(out)}
    assert {"pareto_k", "restart_r_hat", "data_drivenness", "amortization_gap"} <= set(found)
    assert found["restart_r_hat"]["value"] == pytest.approx(1, abs=0.05)  # a run agrees with itself
    for name, one in found.items():
        assert re.search(rf"^{name} +\S+ +{one['verdict']} +{re.escape(one['advice'])}$", text, re.MULTILINE)


@pytest.mark.slow
def test_compare_continues_and_refuses_other_settings(model, data, tmp_path, capsys):
    command = [
        "compare",
        *data_options(model, data),
        "--output",
        str(tmp_path / "c"),
        "--in-process",
        "--num-samples",
        "2",
        "--max-steps",
        "3",
        *SMALL,
    ]
    assert main([*command, "--seeds", "0"]) == 0
    capsys.readouterr()
    runs = tmp_path / "c" / "reviews-lr0.001-batch8-rank2"
    scores = runs / "lora-seed0" / "scores.json"
    before = scores.stat().st_mtime_ns
    assert main([*command, "--seeds", "0", "1"]) == 0
    table = capsys.readouterr().out
    assert scores.stat().st_mtime_ns == before
    assert re.search(r"^\| test +\| LoRA \+ temperature\* +\| +2 \|", table, re.MULTILINE)
    assert re.search(r"^\| test +\| MonteCLoRA, 2 draws +\| +2 \|", table, re.MULTILINE)
    assert "validation" not in table
    assert main([*command, "--max-length", "12"]) == 2
    assert "another --max-length (16)" in capsys.readouterr().err
    page = tmp_path / "report.html"
    report = ["report", str(tmp_path / "c"), "--output", str(page), "--num-samples", "2", "--no-diagnostics"]
    assert main(report) == 0  # compare with flags keeps what was trained
    text = page.read_text(encoding="utf-8")
    assert all(f"{method}-seed{seed}" in text for method in ("lora", "monteclora") for seed in (0, 1))


def test_compare_from_a_study_file(model, data, tmp_path, capsys):
    study = tmp_path / "study.yaml"
    study.write_text(
        f"model: {model}\ntasks: [{{name: reviews, text_columns: text}}]\n"
        "methods: [lora, temperature]\n"
        "learning_rates: [1e-3, 1e-2]\nranks: [2]\nbatch_sizes: [8]\nmax_length: 16\ntraining: {max_steps: 2}\n",
        encoding="utf-8",
    )
    command = ["compare", str(study), "--in-process", "--data-dir", str(data), "--output", str(tmp_path / "c")]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "each at the setting with its lowest mean NLL on validation" in out
    assert "accuracy (%) spread" in out
    assert main([*command, "--learning-rate", "1e-2"]) == 2
    assert "--learning-rate does nothing beside a study file: change" in capsys.readouterr().err
    study.write_text(study.read_text() + "learning_rate: [1]\n", encoding="utf-8")
    assert main(command) == 2
    assert "did you mean 'learning_rates'" in capsys.readouterr().err
    assert main(["compare", "--output", str(tmp_path / "d")]) == 2
    assert "needs a study file, or --model and --task" in capsys.readouterr().err


def test_both_methods_start_from_the_same_initialisation(model, data):
    import torch
    from transformers import set_seed

    from bayeslora import BayesLoRA, MonteCLoRAConfig, load_task

    task = load_task("reviews", data, text_columns="text")
    states = []
    for scaler in (0.0, 0.05):
        set_seed(3)
        network, _ = task.load_network(model)
        bayes = BayesLoRA(network, MonteCLoRAConfig(r=2, sample_scaler=scaler))
        states.append(bayes.network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


class TestMistakes:
    """Exit code 2, one line on standard error, no traceback, and a word about what to do."""

    def fails(self, capsys, *arguments):
        assert main(list(map(str, arguments))) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("bayeslora: ")]
        assert len(lines) == 1
        return lines[0]

    def fit(self, model, data, output, *more):
        return ["fit", *data_options(model, data), "--output", output, "--max-steps", "1", *SMALL, *more]

    def test_target_module(self, capsys, model, data, tmp_path):
        message = self.fails(capsys, *self.fit(model, data, tmp_path / "o", "--target-modules", "querry"))
        assert "closest names: query" in message
        assert not (tmp_path / "o").exists()

    @pytest.mark.parametrize(
        ("option", "value", "named"),
        [
            ("--rank", 0, "r (the rank"),
            ("--num-components", 0, "num_components"),
            ("--sample-scaler", -1, "sample_scaler"),
            ("--kl-weight", -1, "kl_weight"),
            ("--guide", "x", "guide"),
            ("--batch-size", 0, "batch_size"),
            ("--label-column", "stars", "stars"),
        ],
    )
    def test_values(self, capsys, model, data, tmp_path, option, value, named):
        assert named in self.fails(capsys, *self.fit(model, data, tmp_path / "o", option, value))

    def test_unknown_task(self, capsys, model):
        message = self.fails(capsys, "fit", "--model", model, "--task", "mrcp", "--output", "o")
        assert "mrpc" in message

    def test_compare_cannot_start_post_hoc(self, capsys, model, data, tmp_path):
        command = ["compare", *data_options(model, data), "--output", tmp_path / "o", "--mode", "post_hoc", *SMALL]
        assert "trained LoRA" in self.fails(capsys, *command)

    def test_missing_model(self, capsys, data, tmp_path):
        assert "nowhere" in self.fails(capsys, *self.fit(tmp_path / "nowhere", data, tmp_path / "o"))

    def test_existing_run(self, capsys, model, data, run):
        assert "--resume" in self.fails(capsys, *self.fit(model, data, run))

    def test_folder_with_something_else(self, capsys, model, data, tmp_path):
        (tmp_path / "thesis.tex").write_text("precious")
        assert "something else" in self.fails(capsys, *self.fit(model, data, tmp_path))
        assert (tmp_path / "thesis.tex").read_text() == "precious"

    def test_not_a_run(self, capsys, tmp_path):
        assert "run.json" in self.fails(capsys, "evaluate", tmp_path)

    def test_unlabelled_split(self, capsys, run):
        assert "no labels" in self.fails(capsys, "evaluate", run, "--split", "unlabelled")

    def test_missing_split(self, capsys, run):
        assert "'nosuch'" in self.fails(capsys, "evaluate", run, "--split", "nosuch")

    def test_negative_draws(self, capsys, run):
        assert "num_samples" in self.fails(capsys, "predict", run, "--text", "a film", "--num-samples", -1)

    def test_pair_for_a_single_text_task(self, capsys, run):
        message = self.fails(capsys, "predict", run, "--text", "a film", "--text-pair", "a plot")
        assert "single texts" in message

    def test_damaged_adapter(self, capsys, run, tmp_path):
        import shutil

        copy = tmp_path / "run"
        shutil.copytree(run, copy)
        weights = copy / "adapter" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-10])
        assert "truncated" in self.fails(capsys, "evaluate", copy)


def test_report_of_a_run_beside_a_point_estimate(run, model, data, tmp_path, capsys):
    lora = tmp_path / "lora"
    options = ["--output", str(lora), "--epochs", "1", "--sample-scaler", "0", *SMALL]
    assert main(["fit", *data_options(model, data), *options]) == 0
    page = tmp_path / "pages" / "report.html"
    words = ["report", str(lora), str(run), "--output", str(page), "--num-samples", "3", "--max-examples", "8"]
    assert main(words) == 0
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "the film is" in text
    assert f"bayeslora fit --model {model}" in text
    assert f"bayeslora {' '.join(words)}" in text
    assert "LoRA (sample_scaler 0)" in text
    assert "MonteCLoRA, 3 draws" in text
    assert "data_drivenness" in text
    assert not list(page.parent.glob(".*"))
    assert main(words) == 0
    said = capsys.readouterr()
    assert "diagnostics as an earlier report found them" in said.out + said.err
    pages = (text, page.read_text(encoding="utf-8"))
    diagnostics = [one[one.index('id="diagnostics"') :] for one in pages]
    assert diagnostics[0] == diagnostics[1]


def test_report_names_what_is_wrong_and_keeps_the_page_there_was(run, tmp_path, capsys):
    page = tmp_path / "report.html"
    page.write_text("before", encoding="utf-8")
    assert main(["report", str(tmp_path / "missing"), "--output", str(page)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert main(["report", str(run), str(run), "--output", str(page)]) == 2
    assert "given twice" in capsys.readouterr().err
    assert main(["report", str(run), "--split", "nowhere", "--output", str(page)]) == 2
    assert "no split 'nowhere'" in capsys.readouterr().err
    assert page.read_text(encoding="utf-8") == "before"
