"""Which kind of task it is decides nothing outside the likelihoods themselves."""

import ast
from pathlib import Path

import pytest

import bayeslora
from bayeslora.models.selection import KINDS

ROOT = Path(bayeslora.__file__).parents[1]
MAY_ASK = {"models/likelihoods.py"}  # where any other module gets the defaults
LIKELIHOODS = {"Likelihood", *(kind.__name__ for kind in KINDS.values())}


def sources():
    for folder in ("bayeslora", "models", "guides"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file, file.relative_to(ROOT).as_posix()


def questions(tree):
    """Lines that ask for a kind: isinstance of a likelihood, or a comparison of some ``.kind``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            names |= {n.attr for n in ast.walk(node.args[1]) if isinstance(n, ast.Attribute)}
            if names & LIKELIHOODS:
                yield node.lineno
        compared = isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq | ast.In | ast.NotIn)
        if compared and any(is_kind(side) for side in (node.left, *node.comparators)):
            yield node.lineno
        if isinstance(node, ast.Match) and is_kind(node.subject):
            yield node.lineno


def is_kind(node):
    """``something.kind``, but not numpy's ``array.dtype.kind``."""
    return isinstance(node, ast.Attribute) and node.attr == "kind" and getattr(node.value, "attr", "") != "dtype"


def test_no_file_asks_which_kind_of_task_it_is():
    found = {
        f"{name}:{line}"
        for file, name in sources()
        for line in questions(ast.parse(file.read_text("utf-8")))
        if name not in MAY_ASK
    }
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(x, NextTokenLikelihood)",
        "isinstance(x.likelihood, (int, models.ChoiceLikelihood))",
        "isinstance(x, Likelihood | None)",
        "task.kind == 'text'",
        "'text' != self.task.kind",
        "task.kind not in ('choice', 'text')",
    ],
)
def test_such_questions_are_found(code):
    assert list(questions(ast.parse(code))) == [1]


@pytest.mark.parametrize("code", ["array.dtype.kind in 'biuf'", "isinstance(x, Posterior)", "kinds == 3"])
def test_others_are_not(code):
    assert not list(questions(ast.parse(code)))
