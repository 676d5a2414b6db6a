"""What a study reads and writes: names as paths, files cut in half, YAML that looks like something else, full disks."""

import errno
import io
import itertools
import json
import shutil
import sys
import unicodedata

import pytest
from transformers import BertTokenizerFast

from bayeslora.command.main import main
from bayeslora.errors import InputError, StorageError
from bayeslora.study import Study
from bayeslora.study.methods.base import Lineup
from bayeslora.study.predictions import read_predictions
from bayeslora.study.runner import run_study
from bayeslora.study.spec import Cell, cells, slug
from bayeslora.study.study_file import read_study_file
from bayeslora.study.trials import JOURNAL_FILE, open_journal
from tests.conftest import VOCABULARY, tiny_network
from tests.folders import FullAfter

PRIOR = "tests.workers.study_methods:Prior"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny BERT, and two sets of reviews that differ in the share of good ones."""
    folder = tmp_path_factory.mktemp("study")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(VOCABULARY - len(words)))]))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder / "model")
    tiny_network().save_pretrained(folder / "model")
    for share in (1, 3):
        (folder / f"share{share}").mkdir()
        rows = [f"{word},{int(word == 'good')}" for word in ["good"] * share + ["bad"]]
        for split in ("train", "test"):
            (folder / f"share{share}" / f"{split}.csv").write_text("\n".join(["text,label", *rows * 3]) + "\n")
    return folder


@pytest.fixture(scope="module")
def study(place):
    def make(*methods, tasks=("reviews",), **changes) -> Study:
        shares = itertools.cycle((1, 3))
        tasks = [
            {"name": name, "data_dir": str(place / f"share{next(shares)}"), "text_columns": "text"} for name in tasks
        ]
        return Study.from_dict(
            {
                "model": str(place / "model"),
                "tasks": tasks,
                "methods": list(methods) or [prior()],
                "learning_rates": [0.01],
                "batch_sizes": [8],
                "ranks": [2],
                "max_length": 12,
                "shift_splits": False,
                **changes,
            }
        )

    return make


def prior(label="prior", **options):
    return {"name": PRIOR, "label": label, **options}


def scored(result):
    """Everything but what depends on the clock."""
    columns = ["task", "method", "split", "seed", "accuracy", "nll", "ece"]
    return result.results[columns].to_dict("records")


@pytest.fixture(scope="module")
def done(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    made = study(prior(count_in=str(folder / "count")), seeds=[0, 1])
    return made, folder / "out", folder / "count", scored(run_study(made, folder / "out", progress=False))


KEPT = {
    "LoRA": "lora",
    "LoRA+": "lora-plus",
    "MonteCLoRA": "monteclora",
    "full fine-tuning": "full-fine-tuning",
    "MonteCLoRA (num_components=2, sample_scaler=0.1)": "monteclora-num-components-2-sample-scaler-0.1",
    "sentiment": "sentiment",
    "arc_easy": "arc-easy",
    "PEFT's MonteCLoRA": "peft-s-monteclora",
    "...": "x",
}


class TestNames:
    @pytest.mark.parametrize("name", KEPT)
    def test_names_in_use_keep_their_folders(self, name):
        assert slug(name) == KEPT[name]
        cell = Cell(name, name, 0.001, 8, 2, 0)
        assert cell.folder.as_posix() == f"{KEPT[name]}-lr0.001-batch8-rank2/{KEPT[name]}-seed0"

    def test_no_two_names_share_a_path(self, study):
        """Of all pairs: different paths, also where case and the form of accents do not count, or refused."""
        words = [
            "é",
            "E",
            "e",
            "ε",
            "Ε",
            "影评",
            "书评",
            "ё",
            "е",
            "a b",
            "a_b",
            "ä",
            "A\u0308",
            "x" * 300,
            "x" * 301,
            "ﬁ",
            "fi",
        ]
        for one, two in itertools.combinations(words, 2):
            if slug(one) == slug(two):
                with pytest.raises(InputError, match="change one of them"):
                    study(tasks=(one, two))
                continue
            made = study(tasks=(one, two))
            paths = {unicodedata.normalize("NFD", str(cell.folder)).casefold() for cell in cells(made, ["prior"])}
            assert len(paths) == 2
            assert all(len(part.encode()) < 250 for path in paths for part in path.split("/"))
        assert slug("é") == slug(unicodedata.normalize("NFD", "é"))

    def test_tasks_and_methods_of_any_alphabet_have_own_results(self, study, tmp_path):
        tasks, methods = ("Отзывы", "书评"), (prior("δ"), prior("ε"))
        made = study(*methods, tasks=tasks)
        result = run_study(made, tmp_path / "out", progress=False)
        assert len(result.results) == 4
        shares = {
            cell: float(result.predictions(cell, "test")[cell.method][0][0, 1]) for cell in cells(made, ["δ", "ε"])
        }
        assert {cell.task: round(share, 6) for cell, share in shares.items()} == {"Отзывы": 0.5, "书评": 0.75}
        assert len(list((tmp_path / "out" / "figures").glob("*-cost.png"))) == 2
        for line in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8").splitlines():
            if line.startswith("!["):
                assert (tmp_path / "out" / line.split("](")[1].rstrip(")")).is_file()

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"tasks": ("reviews", "Reviews")}, "tasks 'reviews' and 'Reviews' would both be written to reviews-"),
            ({"tasks": ("a b", "a_b")}, "'a b' and 'a_b'"),
            ({"tasks": ("reviews", "reviews")}, "two tasks are called"),
            ({"learning_rates": [1e-3, 1.0000001e-3]}, "learning rates 0.001 and 0.0010000001"),
        ],
    )
    def test_what_would_write_over_each_other_is_refused(self, study, changes, says):
        with pytest.raises(InputError, match=says):
            study(**changes)

    @pytest.mark.parametrize(
        ("labels", "says"),
        [
            (("Prior", "prior"), "methods 'Prior' and 'prior'"),
            (("p (1)", "p: 1"), "change one of them"),
            (("labels",), "labels lie beside predictions"),
        ],
    )
    def test_methods_too(self, study, labels, says, tmp_path):
        with pytest.raises(InputError, match=says):
            run_study(study(*map(prior, labels)), tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()

    def test_nor_does_another_study_in_the_same_folder(self, study, tmp_path):
        before = run_study(study(prior("Prior")), tmp_path / "out", progress=False)
        later = run_study(study(prior("prior")), tmp_path / "out", progress=False)
        assert "holds results of method 'Prior'" in later.failures["error"][0]
        again = run_study(study(prior("Prior")), tmp_path / "out", progress=False)
        assert scored(again) == scored(before)
        (cell,) = cells(again.study, ["Prior"])
        assert set(again.predictions(cell, "test")) == {"Prior"}


class TestCutFiles:
    @pytest.fixture
    def finished(self, done, tmp_path):
        """A finished study to damage, what it scored, and the file that counts its trainings."""
        made, folder, count, before = done
        shutil.copytree(folder, tmp_path / "out")
        count.write_text("0\n1\n")
        return made, tmp_path / "out", count, before

    def again(self, finished):
        made, folder, count, before = finished
        assert scored(run_study(made, folder, progress=False)) == before
        return sorted(count.read_text().split())

    def test_the_journal_at_every_byte_of_its_last_two_lines(self, finished):
        """Whole lines stay, what comes next is read, and no trial that was there is lost."""
        journal = finished[1] / JOURNAL_FILE
        whole = journal.read_bytes()
        lines = whole.splitlines(keepends=True)
        begin = len(whole) - len(lines[-1]) - len(lines[-2])
        assert len(whole) - begin > 200
        for size in range(begin, len(whole) + 1):
            journal.write_bytes(whole[:size])
            opened = open_journal(journal)
            kept = len(whole[:size].splitlines()) - (not whole[:size].endswith(b"\n"))
            assert [json.dumps(log) for log in opened.read_logs(0)] == [json.dumps(json.loads(x)) for x in lines[:kept]]
            if size % 5 == 0:
                opened.append_logs([{"op_code": 10}])
                assert len(list(open_journal(journal).read_logs(0))) == kept + 1

    def test_a_line_cut_off_while_others_write(self, finished):
        """A worker died in the middle of a line: the next one's line does not end up behind the half of it."""
        journal = finished[1] / JOURNAL_FILE
        alive = open_journal(journal)
        count = len(list(alive.read_logs(0)))
        for half in (b'{"op_code":8,"tr', b"\0" * 70_000, b"{"):
            with journal.open("ab") as file:
                file.write(half)
            alive.append_logs([{"op_code": 10}])
            count += 1
            assert len(list(alive.read_logs(0))) == count

    @pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
    def test_a_study_goes_on_after_its_journal_was_cut(self, finished, kept):
        journal = finished[1] / JOURNAL_FILE
        whole = journal.read_bytes()
        journal.write_bytes(whole[: int(kept * len(whole))])
        assert self.again(finished) == ["0", "1"]  # cells are found in their folders

    def test_a_damaged_line_in_the_middle(self, finished):
        """As earlier versions left it: half a line, and the next one behind it."""
        journal = finished[1] / JOURNAL_FILE
        lines = journal.read_bytes().splitlines(keepends=True)
        middle = len(lines) // 2
        journal.write_bytes(b"".join([*lines[:middle], lines[middle][:20], *lines[middle:]]))
        assert self.again(finished) == ["0", "1"]
        assert all(json.loads(line) for line in journal.read_bytes().splitlines())

    @pytest.mark.parametrize(
        ("name", "kept", "journal"),
        [
            ("scores.json", 0.5, True),
            ("scores.json", 0.5, False),
            ("scores.json", 0.0, False),
            ("predictions.npz", 0.99, True),
            ("predictions.npz", 0.5, False),
            ("predictions.npz", 0.0, True),
            ("comparison.json", 0.99, True),
            ("comparison.json", 0.0, False),
            ("run.lock", 0.5, False),
        ],
    )
    def test_any_other_file(self, finished, name, kept, journal):
        made, folder, _, _ = finished
        first = next(cells(made, ["prior"])).folder
        file = folder / ("" if name == "comparison.json" else first) / name
        whole = file.read_bytes() if file.exists() else b'{"pid": 1, "host": "elsewhere"}'
        file.write_bytes(whole[: int(kept * len(whole))])
        if not journal:
            (folder / JOURNAL_FILE).unlink()
        repeated = name == "predictions.npz" or (name == "scores.json" and not journal)
        for _ in range(2):
            assert self.again(finished) == (["0", "0", "1"] if repeated else ["0", "1"])
        assert read_predictions(folder / first, "test")["prior"][0].shape == (6, 2)

    def test_a_full_disk_is_one_error_and_the_study_goes_on(self, finished):
        made, folder, _, _ = finished
        more = Study.from_dict({**made.to_dict(), "seeds": [0, 1, 2]})
        size = (folder / JOURNAL_FILE).stat().st_size
        for room in (5, 200, 1500):
            with pytest.raises(StorageError, match="free"), FullAfter(size + room):
                run_study(more, folder, progress=False)
        result = run_study(more, folder, progress=False)
        assert sorted(result.results["seed"]) == [0, 1, 2]
        assert not len(result.failures)


class LeavesAfter(io.StringIO):
    """Standard output whose reader goes away after some lines."""

    def __init__(self, lines):
        super().__init__()
        self.lines = lines

    def write(self, text):
        if self.getvalue().count("\n") >= self.lines:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("lines", [0, 2])
def test_a_reader_that_leaves_ends_a_study_and_fails_no_other_cell(study, tmp_path, monkeypatch, lines):
    made = study({"name": "monteclora", "predictions": ["mean"]}, seeds=[0, 1], training={"max_steps": 2})
    monkeypatch.setattr(sys, "stdout", LeavesAfter(lines))
    with pytest.raises(BrokenPipeError):
        run_study(made, tmp_path / "out")
    monkeypatch.undo()
    trials = [json.loads(line) for line in (tmp_path / "out" / JOURNAL_FILE).read_text().splitlines()]
    assert sum(trial["op_code"] == 4 for trial in trials) == 1  # it began one
    assert len(list((tmp_path / "out").glob("*/*/scores.json"))) <= 1
    result = run_study(made, tmp_path / "out", progress=False)
    assert not len(result.failures)
    assert sorted(set(result.results["seed"])) == [0, 1]


class TestYaml:
    def read(self, tmp_path, text):
        file = tmp_path / "study.yaml"
        file.write_text(text, encoding="utf-8")
        return read_study_file(file)

    @pytest.mark.parametrize(
        ("written", "means"),
        [
            ("1e-3", 1e-3),
            ("1E5", 1e5),
            ("2.5e+3", 2500.0),
            (".5", 0.5),
            ("1.", 1.0),
            ("-1.5", -1.5),
            ("0", 0),
            ("-0", 0),
            ("+5", 5),
            ("10", 10),
            ("0.5", 0.5),
            ("true", True),
            ("False", False),
            ("null", None),
            ("~", None),
            ("", None),
            ("2024-01-01", "2024-01-01"),
            ("2024-13-45", "2024-13-45"),
            ("1.2.3", "1.2.3"),
            ("10.0.0.1", "10.0.0.1"),
            ("12e", "12e"),
            ("'010'", "010"),
            ('"yes"', "yes"),
            ("lora", "lora"),
            ("a: b", {"a": "b"}),
            ("[1e-3, x]", [1e-3, "x"]),
        ],
    )
    def test_what_is_what_it_looks_like(self, tmp_path, written, means):
        text = f"a:\n  {written}\n" if ": " in written else f"a: {written}\n"
        found = self.read(tmp_path, text)["a"]
        assert found == means
        assert type(found) is type(means)

    @pytest.mark.parametrize(
        "written",
        [
            "010",
            "-010",
            "08",
            "0_1",
            "1_000",
            "1_000.5",
            "0x10",
            "0o10",
            "0b11",
            "1:30",
            "190:20:30",
            "1:30.5",
            "yes",
            "No",
            "ON",
            "off",
            "[1, 2, 010]",
            "{b: yes}",
            "[[off]]",
        ],
    )
    def test_what_may_be_read_in_two_ways_names_key_and_line(self, tmp_path, written):
        with pytest.raises(InputError, match=r"study.yaml, line 3: (a|b): ") as caught:
            self.read(tmp_path, f"model: demo\n# a comment\na: {written}\n")
        assert "quote" in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("a: 1\nb: 2\na: 3", "line 3: 'a' is given twice"),
            ("x:\n  - {b: 1,\n     b: 1}", "line 3: 'b' is given twice"),
            ('a: 1\n"a": 2', "line 2: 'a' is given twice"),
            ("on: 1", "line 1: on may be a word"),
            ("a: &x [*x]", "refers to itself"),
            ("a: *x", "undefined alias"),
            ("", "must hold a mapping"),
            ("- a\n- b", "must hold a mapping"),
            ("a", "must hold a mapping"),
            ("a: 1\n---\nb: 2", "single document"),
            ("a:\n\tb: 1", "cannot start any token"),
            ("a: !!int x", "is not YAML"),
            ("a: !!timestamp x", "is not YAML"),
            ("a: !!python/name:os.system x", "is not YAML"),
            ("? [a]\n: 1", "unhashable"),
            ("[" * 1000, "is not YAML"),
            ("a: " + "9" * 5000, "is not YAML"),
        ],
        ids=range(17),
    )
    def test_what_is_no_study(self, tmp_path, text, says):
        with pytest.raises(InputError, match=says):
            self.read(tmp_path, text)

    def test_anchors_and_merge_keys(self, tmp_path):
        found = self.read(tmp_path, "base: &b {r: 1e-3, s: x}\nmine: {<<: *b, s: y}\nlist: [*b, *b]\n")
        assert found["mine"] == {"r": 1e-3, "s": "y"}
        assert found["list"] == [{"r": 1e-3, "s": "x"}] * 2

    def test_a_file_that_is_not_text(self, tmp_path):
        (tmp_path / "study.yaml").write_bytes("model: demo".encode("utf-16"))
        for file, says in (
            (tmp_path / "study.yaml", "is not YAML"),
            (tmp_path, "directory"),
            (tmp_path / "x", "No such"),
        ):
            with pytest.raises(InputError, match=says):
                Study.from_yaml(file)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"model": 5}, "model takes text"),
            ({"test_split": None}, "test_split takes text"),
            ({"tasks": [{"name": 2024}]}, "name of a task takes text"),
            ({"tasks": [2024]}, "mapping"),
            ({"tasks": [{"name": "x", "text_columns": 5}]}, "text_columns of a task takes"),
            ({"tasks": [{"name": "x", "text_columns": ["a", 5]}]}, "text_columns of a task takes text"),
            ({"tasks": [{"name": "x", "label_names": [True, False]}]}, "label_names of a task takes text"),
            ({"tasks": [{"name": "x", "label_names": "ab"}]}, "takes a list"),
            ({"tasks": [{"name": "x", "shift_splits": 5}]}, "shift_splits of a task takes a list"),
            ({"reference": 5}, "reference takes a text"),
            ({"tasks": [{"name": "x", "prompting": ["a"]}]}, "prompting of a task must be a mapping"),
            ({"shift_splits": "no"}, "shift_splits takes true or false"),
            ({"keep_adapters": 1}, "keep_adapters takes true"),
            ({"trainer": ["bf16"]}, "trainer must be a mapping"),
            ({"training": ["epochs"]}, "training must be a mapping"),
            ({"training": {"epochs": "five"}}, "epochs takes a number"),
            ({"training": {"epochs": float("nan")}}, "epochs takes"),
            ({"training": {"max_steps": 0}}, "max_steps takes"),
            ({"training": {"warmup": 100}}, "warmup takes"),
            ({"training": {"schedule": 1}}, "schedule takes text"),
            ({"learning_rates": [float("inf")]}, "learning_rates takes"),
            ({"learning_rates": [float("nan")]}, "learning_rates takes"),
            ({"seeds": [-1]}, "seeds takes"),
            ({"seeds": [2**32]}, "seeds takes"),
            ({"ranks": [10**30]}, "ranks takes"),
            ({"train_examples": 1e3}, "train_examples"),
        ],
        ids=str,
    )
    def test_entries_of_another_kind_are_named(self, study, changes, says):
        with pytest.raises(InputError, match=says):
            Study.from_dict({**study().to_dict(), **changes})

    @pytest.mark.parametrize(
        ("method", "says"),
        [
            (prior(5), "label takes text"),
            (prior(fail_on_seed="x"), "fail_on_seed takes a whole number"),
            (prior(learning_rate_scale=True), "learning_rate_scale takes a number"),
            ({"name": "monteclora", "antithetic": "no"}, "antithetic takes true or false"),
            ({"name": "monteclora", "num_samples": 1.5}, "num_samples takes"),
            ({"name": "lora", "options": [1]}, "no option"),
        ],
        ids=str,
    )
    def test_options_of_another_kind_are_named(self, study, method, says):
        with pytest.raises(InputError, match=says):
            Lineup.of(study(method).methods)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"training": {"schedule": "nosuch"}}, "TrainingArguments refuses"),
            ({"trainer": {"bf17": True}}, "TrainingArguments refuses"),
            ({"trainer": {"num_train_epochs": 9}}, "training has epochs"),
            ({"trainer": {"weight_decay": 0.1}}, "training has weight_decay"),
            ({"trainer": {"learning_rate": 0.1}}, "learning_rates has it"),
            ({"trainer": {"save_strategy": "epoch"}}, "keep_adapters keeps what was trained"),
        ],
        ids=str,
    )
    def test_what_trainer_does_not_take_is_refused_before_a_folder_is_made(self, study, tmp_path, changes, says):
        with pytest.raises(InputError, match=says):
            run_study(study(**changes), tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists()


class TestReport:
    @pytest.fixture
    def refused(self, tmp_path, capsys):
        """Asks for a report of a run whose adapter nobody could open: what is refused was refused before."""
        run = tmp_path / "run"
        (run / "adapter").mkdir(parents=True)
        (run / "run.json").write_text("{}")

        def ask(output):
            assert main(["report", str(run), "--output", str(output)]) == 2
            captured = capsys.readouterr()
            assert captured.out == ""
            assert captured.err.count("\n") == 1
            return captured.err

        return ask

    def test_a_folder(self, refused, tmp_path):
        assert "is a folder" in refused(tmp_path)

    def test_below_a_file(self, refused, tmp_path):
        (tmp_path / "file").write_text("precious")
        for output in ("file/report.html", "file/deeper/report.html"):
            assert "cannot write a report to" in refused(tmp_path / output)
        assert (tmp_path / "file").read_text() == "precious"

    def test_names_that_are_too_long(self, refused, tmp_path):
        assert "cannot write a report to" in refused(tmp_path / ("x" * 300))
        assert "too long" in refused(tmp_path / ("x" * 300) / "report.html")

    def test_a_place_that_takes_no_files(self, refused):
        assert "cannot write a report to" in refused("/proc/report.html")

    def test_a_place_that_would_do_is_left_as_it_was(self, refused, tmp_path):
        assert "run.json does not say" in refused(tmp_path / "new" / "report.html")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]

    def test_the_disk_fills_while_it_is_written(self, tmp_path):
        from bayeslora.command.reporting import _write

        (tmp_path / "report.html").write_text("before")
        with pytest.raises(StorageError, match=r"cannot write the report to .*File too large"), FullAfter(1000):
            _write(tmp_path / "report.html", "x" * 5000)
        assert (tmp_path / "report.html").read_text() == "before"
        assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

    def test_letters_that_are_no_unicode_do_not_cost_the_page(self, tmp_path):
        from bayeslora.command.reporting import _write

        assert _write(tmp_path / "report.html", "run\udcff").read_text(encoding="utf-8") == "run?"

    @pytest.mark.parametrize("command", ["fit", "compare"])
    @pytest.mark.parametrize("output", ["file", "file/below", "x" * 300, "/proc/out"])
    def test_outputs_of_other_commands(self, place, tmp_path, capsys, monkeypatch, command, output):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("precious")
        words = [
            command,
            "--model",
            str(place / "model"),
            "--task",
            "reviews",
            "--data-dir",
            str(place / "share1"),
            "--text-columns",
            "text",
            "--max-steps",
            "1",
            "--rank",
            "2",
            "--output",
            output,
        ]
        assert main(words) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
        assert output in captured.err
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
