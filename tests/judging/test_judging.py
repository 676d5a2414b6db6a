"""Written answers are judged, by vote too; HumanEval needs the switch before anything is written."""

import numpy as np
import pytest

from bayeslora import BayesLoRA, InputError, MonteCLoRAConfig, load_task
from bayeslora.analysis import risk_coverage, vote
from bayeslora.inference.generation import Generation
from bayeslora.judging.judge import judge, judge_gsm8k
from tests.language import tiny_language_model, tiny_tokenizer, write


def test_votes_are_counted_and_weighted():
    answers = [["a", "b", "b"], ["a", None, None], [None, None, None]]
    plain = vote(answers)
    assert plain.answers == ["b", "a", None]
    np.testing.assert_allclose(plain.confidence, [2 / 3, 1 / 3, 0])
    weighted = vote(answers, np.log([[3, 1, 1], [1, 1, 2], [1, 1, 1]]))
    assert weighted.answers == ["a", "a", None]
    np.testing.assert_allclose(weighted.confidence, [3 / 5, 1 / 4, 0])
    assert vote([["x", "y"]]).answers == ["x"]  # of equal shares the first
    np.testing.assert_allclose(vote([["x", "y"]], [[-1e5, -1e5 + np.log(3)]]).confidence, [3 / 4])  # far below 0
    curve = risk_coverage(1 - plain.confidence, [False, True, True])
    assert curve.risk[0] == 0
    for wrong in ([], [["a"], ["a", "b"]], [[]]):
        with pytest.raises(InputError, match="same number"):
            vote(wrong)
    with pytest.raises(InputError, match="finite"):
        vote([["a", "b"]], [[0, np.nan]])


def test_gsm8k_by_draw_by_vote_and_by_weighted_vote():
    texts = [["#### 1", "#### 2", "it is 2"], ["#### 5", "#### 4", "#### 4"]]
    sizes = np.ones((2, 3))
    log_likelihood = np.log([[0.8, 0.1, 0.1], [0.9, 0.05, 0.05]])
    written = Generation([], texts, log_likelihood, sizes, [])
    assert judge_gsm8k(written, ["#### 2", "#### 5"]) == pytest.approx(
        {
            "strict": 2 / 6,
            "strict_vote": 0.0,
            "strict_weighted_vote": 0.5,
            "flexible": 3 / 6,
            "flexible_vote": 0.5,
            "flexible_auroc": 0.5,  # both questions have two answers of one kind and one of another
            "flexible_weighted_vote": 0.5,
        }
    )


def test_answers_that_differ_more_are_wrong_more_often():
    texts = [["#### 1", "#### 1", "#### 1"], ["#### 2", "#### 2", "#### 3"], ["#### 4", "none", "#### 6"]]
    written = Generation([], texts, np.zeros((3, 3)), np.ones((3, 3)), [])
    assert judge_gsm8k(written, ["#### 1", "#### 3", "#### 7"])["strict_auroc"] == 1
    assert judge_gsm8k(written, ["#### 3", "#### 2", "#### 7"])["strict_auroc"] == 0.5
    assert "strict_auroc" not in judge_gsm8k(written, ["#### 1", "#### 2", "#### 4"])


@pytest.fixture
def model():
    return BayesLoRA(tiny_language_model(), MonteCLoRAConfig(r=2)), tiny_tokenizer()


def test_gsm8k_is_written_and_judged(tmp_path, model):
    write(tmp_path, "gsm8k", "test", [{"question": "where is the cat?", "answer": "up\n#### 1"}] * 2)
    scores = judge(*model[:1], load_task("gsm8k", tmp_path), model[1], num_samples=2, max_new_tokens=4, progress=False)
    always = {f"{way}{kind}" for way in ("strict", "flexible") for kind in ("", "_vote", "_weighted_vote")}
    assert always <= set(scores) <= always | {"strict_auroc", "flexible_auroc"}
    assert all(0 <= score <= 1 for score in scores.values())


def test_humaneval_runs_with_the_switch_only(tmp_path, model, monkeypatch):
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def one(): return 1\n#",
        "canonical_solution": "",
        "entry_point": "one",
        "test": "def check(candidate):\n    assert candidate() == 1",
    }
    write(tmp_path, "humaneval", "test", [row, {**row, "test": "def check(candidate):\n    assert candidate() == 2"}])
    task, (bayes, tokenizer) = load_task("humaneval", tmp_path), model
    options = {"num_samples": 2, "max_new_tokens": 3, "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(BayesLoRA, "generate", lambda *a, **k: pytest.fail("nothing is written without the switch"))
        with pytest.raises(InputError, match="execute_generated_code"):
            judge(bayes, task, tokenizer, **options)
    scores = judge(bayes, task, tokenizer, execute_generated_code=True, **options)
    assert scores == {"pass@1": 0.5, "pass@2": 0.5}  # what is written stays in the comment that the prompt opens


def test_tasks_without_a_judge_are_refused(tmp_path, model):
    write(tmp_path, "magicoder", "train", [{"problem": "a", "solution": "b"}])
    with pytest.raises(InputError, match="nothing judges"):
        judge(model[0], load_task("magicoder", tmp_path), model[1], "train")
