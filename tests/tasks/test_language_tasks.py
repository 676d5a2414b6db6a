"""Tasks of language models from files in the official layouts: prompts, labels, tokens, and the commands on them."""

import json
from dataclasses import replace

import pytest

from bayeslora import InputError, load_task
from bayeslora.command.main import main
from bayeslora.models import ChoiceLikelihood, NextTokenLikelihood
from bayeslora.tasks.choice import CHOICE_TASKS
from bayeslora.tasks.text import TEXT_TASKS, gsm8k_matches
from tests.language import ARC, OFFICIAL, tiny_language_model, tiny_tokenizer, write


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_columns_become_prompts_options_and_label(tmp_path, name):
    row, prompts, options, label = OFFICIAL[name]
    write(tmp_path, name, "train", [row] * 3)
    task = load_task(name, tmp_path)
    first = task.data["train"][0]
    assert (first["prompts"], first["options"], first["label"]) == (prompts, options, label)
    assert task.kind == "choice"
    assert task.num_labels == len(options)
    assert load_task(**json.loads(json.dumps(task.recipe))).recipe == task.recipe


@pytest.mark.parametrize("name", OFFICIAL)
def test_answers_are_marked_in_the_tokens(tmp_path, name):
    row, _, options, label = OFFICIAL[name]
    write(tmp_path, name, "train", [row])
    tokenizer = tiny_tokenizer()
    encoded = load_task(name, tmp_path).encode(tokenizer, "train")[0]
    assert encoded["labels"] == label
    for tokens, answer, option in zip(encoded["input_ids"], encoded["answer_mask"], options, strict=True):
        marked = [token for token, is_answer in zip(tokens, answer, strict=True) if is_answer]
        assert marked == tokenizer(option, add_special_tokens=False)["input_ids"]
        assert answer[0] == 0


def test_letters_list_the_options_and_score_one_token(tmp_path):
    write(tmp_path, "winogrande", "train", [OFFICIAL["winogrande"][0]])
    task = load_task("winogrande", tmp_path, prompting={"style": "letters"})
    tokenizer = tiny_tokenizer()
    encoded = task.encode(tokenizer, "train")[0]
    text = "Question: the box is big because _ is a cat.\nA. the dog\nB. the ball\nAnswer:"
    assert encoded["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded["letter_ids"] == tokenizer.convert_tokens_to_ids(["A", "B"])


def test_chat_templates_wrap_the_prompt(tmp_path):
    write(tmp_path, "arc_easy", "train", [OFFICIAL["arc_easy"][0]])
    write(tmp_path, "gsm8k", "train", [{"question": "where is the cat?", "answer": "up"}])
    tokenizer = tiny_tokenizer()
    choices = load_task("arc_easy", tmp_path, prompting={"chat": True}).encode(tokenizer, "train")[0]
    decoded = tokenizer.decode(choices["input_ids"][0])
    assert decoded.startswith("[user]")
    assert decoded.endswith("[assistant] ball")
    text = load_task("gsm8k", tmp_path, prompting={"chat": True}).encode(tokenizer, "train")[0]
    scored = [token for token, label in zip(text["input_ids"], text["labels"], strict=True) if label != -100]
    assert tokenizer.decode(scored) == "up [end]"


def test_questions_with_fewer_options_share_a_task(tmp_path):
    four = {**ARC, "choices": {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}, "answerKey": "D"}
    write(tmp_path, "arc_easy", "train", [{**ARC, "answerKey": "A"}, four])
    write(tmp_path, "arc_easy", "test", [{**ARC, "answerKey": ""}])
    task = load_task("arc_easy", tmp_path)
    assert task.label_names == ("A", "B", "C", "D")
    assert task.is_labelled("train")
    assert not task.is_labelled("test")
    assert "labels" not in task.encode(tiny_tokenizer(), "test").column_names


def test_a_mixture_is_trained_together_and_scored_each(tmp_path):
    """Three tasks: with both splits, with a test split alone, and one whose test split has no labels."""
    rows = {name: OFFICIAL[name][0] for name in ("piqa", "arc_easy", "winogrande")}
    sizes = {"piqa": {"train": 3, "validation": 2, "test": 4}, "arc_easy": {"train": 2, "test": 5}}
    for name, splits in sizes.items():
        for split, size in splits.items():
            write(tmp_path, name, split, [rows[name]] * size)
    write(tmp_path, "winogrande", "train", [rows["winogrande"]] * 4)
    write(tmp_path, "winogrande", "validation", [rows["winogrande"]] * 6)
    write(tmp_path, "winogrande", "test", [rows["winogrande"] | {"answer": ""}] * 7)
    task = load_task("piqa+arc_easy+winogrande", tmp_path)
    found = {split: task.data[split].num_rows for split in task.splits}
    assert found == {"train": 9, "validation": 2, "test": 15, "piqa": 4, "arc_easy": 5, "winogrande": 6}
    assert task.shift_splits == ("piqa", "arc_easy", "winogrande")
    assert [len(row["options"]) for row in task.data["train"]] == [2] * 3 + [3] * 2 + [2] * 4
    assert task.data["winogrande"][0]["prompts"] == OFFICIAL["winogrande"][1]
    assert task.label_names == ("A", "B", "C")
    assert load_task(**json.loads(json.dumps(task.recipe))).recipe == task.recipe
    for wrong, why in (("piqa+sst2", "'sst2' is none of them"), ("piqa+piqa", "'piqa' is there twice")):
        with pytest.raises(InputError, match=why):
            load_task(wrong, tmp_path)
    write(tmp_path, "siqa", "train", [OFFICIAL["siqa"][0]] * 2)
    with pytest.raises(InputError, match="siqa has no labelled test or validation split"):
        load_task("piqa+siqa", tmp_path)


def test_texts_are_read_and_learnt(tmp_path):
    write(tmp_path, "gsm8k", "train", [{"question": "where is the cat?", "answer": "up up\n#### 1 2"}])
    write(tmp_path, "magicoder_oss_instruct", "train_python1k", [{"problem": "to go up", "solution": "up"}])
    row = {"task_id": "HumanEval/0", "prompt": "the cat", "canonical_solution": "goes up"}
    write(tmp_path, "humaneval", "test", [{**row, "test": "t", "entry_point": "cat"}])
    tokenizer = tiny_tokenizer()
    gsm8k = load_task("gsm8k", tmp_path)
    assert gsm8k.data["train"]["prompt"][:] == ["Question: where is the cat?\nAnswer:"]
    encoded = gsm8k.encode(tokenizer, "train")[0]
    scored = [label for label in encoded["labels"] if label != -100]
    assert scored == [*tokenizer(" up up\n#### 1 2", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert isinstance(gsm8k.likelihood(), NextTokenLikelihood)
    code = load_task("magicoder", tmp_path)
    assert code.splits == ("train",)
    assert code.data["train"]["prompt"][0].startswith("@@ Instruction\nto go up")
    assert load_task("humaneval", tmp_path).data["test"]["test"][:] == ["t"]


def test_what_is_too_long_loses_the_beginning_of_its_prompt(tmp_path):
    write(tmp_path, "gsm8k", "train", [{"question": "the " * 30 + "cat", "answer": "up"}])
    tokenizer = tiny_tokenizer()
    encoded = load_task("gsm8k", tmp_path).encode(tokenizer, "train", max_length=8)[0]
    assert len(encoded["input_ids"]) == 8
    assert tokenizer.decode(encoded["input_ids"]).endswith("cat Answer : up [end]")
    write(tmp_path, "piqa", "train", [{**OFFICIAL["piqa"][0], "goal": "the " * 30}])
    short = load_task("piqa", tmp_path).encode(tokenizer, "train", max_length=5)[0]
    assert [len(tokens) for tokens in short["input_ids"]] == [5, 5]
    assert [sum(answer) for answer in short["answer_mask"]] == [2, 2]


def test_numbers_are_matched_strictly_and_flexibly():
    answers = ["6 x 7 = 42\n#### 42", "the answer is $1,042.", "#### 41 or 42", "none", "#### 1,000."]
    solutions = ["#### 42", "so\n#### 1042", "#### 42", "#### 1", "a\n#### 1000"]
    found = gsm8k_matches(answers, solutions)
    assert found == {"strict": [True, False, False, False, True], "flexible": [True, True, True, False, True]}
    with pytest.raises(InputError, match="NUMBER"):
        gsm8k_matches(["1"], ["one"])


def test_mistakes_are_explained(tmp_path):
    write(tmp_path, "piqa", "train", [{"goal": "a", "sol1": "b", "label": 0}])
    with pytest.raises(InputError, match="no column 'sol2'"):
        load_task("piqa", tmp_path)
    write(tmp_path, "arc_easy", "train", [{**ARC, "answerKey": "Z"}])
    with pytest.raises(InputError, match=r"row 0 .*'Z'"):
        load_task("arc_easy", tmp_path)
    write(tmp_path, "siqa", "train", [OFFICIAL["siqa"][0]])
    for prompting, message in (
        ({"style": "poem"}, "style"),
        ({"normalization": "words"}, "normalization"),
        ({"colour": 1}, "no 'colour'"),
        ({"chat": "yes"}, "chat"),
    ):
        with pytest.raises(InputError, match=message):
            load_task("siqa", tmp_path, prompting=prompting)
    with pytest.raises(InputError, match="leave text_columns"):
        load_task("siqa", tmp_path, text_columns="question")
    with pytest.raises(InputError, match="arc_easy"):
        load_task("arc_eazy")
    with pytest.raises(InputError, match="is for tasks of language models"):
        load_task("sst2", tmp_path, prompting={"chat": True})


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model folder, and choices whose answer can be learnt."""
    folder = tmp_path_factory.mktemp("language")
    tiny_language_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rule = {"cat": "north", "dog": "south", "ball": "up"}
    rows = []
    for index in range(36):
        animal = list(rule)[index % 3]
        others = [place for place in ("north", "south", "up", "east") if place != rule[animal]]
        texts = [*others[: index % 2 + 1], rule[animal]]
        choices = {"text": texts, "label": list("ABC"[: len(texts)])}
        rows.append({"question": f"where is the {animal}?", "choices": choices, "answerKey": "ABC"[len(texts) - 1]})
    for split, part in (("train", rows), ("validation", rows[:8]), ("test", rows[:12])):
        write(folder, "arc_easy", split, part)
        write(folder, "gsm8k", split, [{"question": r["question"], "answer": "up #### 1"} for r in part])
    return folder


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


FEW = ["--max-steps", 3, "--rank", 2, "--batch-size", 6]


@pytest.mark.parametrize("style", ["options", "letters"])
def test_fit_evaluate_and_predict_choices_from_a_shell(tmp_path, capsys, places, style):
    run(
        capsys,
        "fit",
        "--model",
        places / "model",
        "--task",
        "arc_easy",
        "--data-dir",
        places,
        "--prompting",
        f"style={style}",
        "--output",
        tmp_path / "run",
        *FEW,
    )
    scores = json.loads(run(capsys, "evaluate", tmp_path / "run", "--json", "--num-samples", 2))
    assert scores["examples"] == 12
    assert 0 <= scores["accuracy"] <= 1
    assert {"nll", "ece", "brier"} <= scores.keys()
    lines = run(capsys, "predict", tmp_path / "run", "--split", "test", "--num-samples", 2).splitlines()
    probs = json.loads(lines[0])["probs"]
    assert set(probs) == {"A", "B", "C"}
    assert probs["C"] == 0  # the first question has two options
    assert sum(probs.values()) == pytest.approx(1, abs=1e-5)
    assert main(["predict", str(tmp_path / "run"), "--text", "where?"]) == 2
    assert "--split" in capsys.readouterr().err


def test_fit_and_evaluate_texts_from_a_shell(tmp_path, capsys, places):
    output = run(
        capsys,
        "fit",
        "--model",
        places / "model",
        "--task",
        "gsm8k",
        "--data-dir",
        places,
        "--output",
        tmp_path / "run",
        *FEW,
    )
    assert "nats per token" in output
    scores = json.loads(run(capsys, "evaluate", tmp_path / "run", "--json", "--num-samples", 2))
    assert scores["perplexity"] > 1
    assert "strict" not in scores
    few = ["--generate", "--max-new-tokens", 3, "--max-examples", 2, "--num-samples", 2]
    judged = json.loads(run(capsys, "evaluate", tmp_path / "run", "--json", *few))
    assert judged["examples"] == 2
    assert 0 <= judged["flexible_vote"] <= 1
    lines = run(capsys, "predict", tmp_path / "run", "--split", "test", "--num-samples", 2).splitlines()
    assert json.loads(lines[0])["log_likelihood"] < 0


def test_compare_and_report_take_choices(tmp_path, capsys, places):
    table = run(
        capsys,
        "compare",
        "--model",
        places / "model",
        "--task",
        "arc_easy",
        "--data-dir",
        places,
        "--output",
        tmp_path / "compare",
        "--num-samples",
        2,
        "--in-process",
        *FEW,
    )
    assert "MonteCLoRA, 2 draws" in table
    run(
        capsys,
        "report",
        tmp_path / "compare",
        "--output",
        tmp_path / "report.html",
        "--num-samples",
        2,
        "--no-diagnostics",
    )
    assert "where is the cat?" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_likelihood_comes_with_the_task(places):
    task = load_task("arc_easy", places, prompting={"normalization": "characters"})
    likelihood = task.likelihood()
    assert isinstance(likelihood, ChoiceLikelihood)
    assert likelihood.describe() == {"kind": "choice", "label_names": ["A", "B", "C"], "normalization": "characters"}
    network, tokenizer = task.load_network(places / "model")
    assert type(network).__name__ == "LlamaForCausalLM"
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(("registry", "name"), [(CHOICE_TASKS, "piqa"), (TEXT_TASKS, "humaneval")])
def test_a_repository_without_named_configurations_is_read(tmp_path, monkeypatch, registry, name):
    row = {"task_id": "0", "prompt": "the cat", "canonical_solution": "up", "test": "t", "entry_point": "cat"}
    write(tmp_path, name, "test", [OFFICIAL[name][0] if name in OFFICIAL else row])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(registry, name, replace(registry[name], repository=str(tmp_path / name)))
    assert load_task(name).data["test"].num_rows == 1
    monkeypatch.setitem(registry, name, replace(registry[name], repository=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match=f"cannot load task '{name}' from the hub .*pass data_dir"):
        load_task(name)
