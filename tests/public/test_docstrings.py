"""Every public name says what it takes, and shows a call with its result; the calls are run."""

import doctest
import importlib
import inspect
import re

import matplotlib.pyplot as plt
import pytest
from matplotlib import pyplot

from tests.public.namespace import PACKAGES, namespace, public, write_files, write_run

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MOST_LINES = 8
NAMES = [f"{package}.{name}" for package in PACKAGES for name in public(package)]
CONSTANTS = ["bayeslora.__version__", "bayeslora.guides.GUIDES"]  # cannot have a docstring of their own
DOCUMENTED = [name for name in NAMES if name not in CONSTANTS]


@pytest.fixture(autouse=True)
def _figures_are_closed():
    """An example leaves its figure open, and matplotlib warns at more than twenty in one process."""
    yield
    pyplot.close("all")


def found(name):
    """The object of a public name."""
    package, _, last = name.rpartition(".")
    return public(package)[last]


def examples(value, name):
    """Those of a function, or of a class and its own methods."""
    tests = doctest.DocTestFinder(exclude_empty=True).find(value, name, globs={})
    return [test for test in tests if test.examples]


def arguments(value):
    """What a function, or a class with an ``__init__`` of ours, is called with."""
    called = value.__init__ if inspect.isclass(value) else value
    if not getattr(called, "__module__", "").startswith("bayeslora"):
        return []
    return [name for name in inspect.signature(value).parameters if name not in ("args", "kwargs")]


@pytest.fixture(autouse=True)
def _no_pictures_left():
    """Examples of pictures do not close them; the twenty-first that is open warns, in another test."""
    yield
    plt.close("all")


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_are_true(name, tmp_path, monkeypatch):
    """Each example is run as it stands, in an empty folder, and prints what the docstring says that it prints."""
    tests = examples(found(name), name)
    of_itself = [example for test in tests if test.name == name for example in test.examples]
    assert any(example.want for example in of_itself), f"{name} shows no call with its result"
    monkeypatch.chdir(tmp_path)
    run(tests, tmp_path)


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_are_shown_by_their_package(name, tmp_path, monkeypatch):
    package, _, last = name.rpartition(".")
    test = doctest.DocTestParser().get_doctest(importlib.import_module(package).__doc__, {}, package, None, 0)
    assert any(last in example.source and example.want for example in test.examples)
    monkeypatch.chdir(tmp_path)
    run([test], tmp_path)


def run(tests, folder):
    for test in tests:
        report = []
        source = "".join(example.source for example in test.examples)
        test.globs = namespace(source)
        if '"reviews"' in source or "runs/reviews" in source:
            write_files(folder)
        if "runs/reviews" in source:
            write_run(folder)
        result = doctest.DocTestRunner(optionflags=OPTIONS).run(test, out=report.append, clear_globs=False)
        assert result.failed == 0, "".join(report)
        assert sum(example.source.count("\n") for example in test.examples) <= MOST_LINES, f"{test.name} is long"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_argument_is_described(name):
    """Each has its name in the docstring, so that none can be added without a word on it."""
    value = found(name)
    missing = [argument for argument in arguments(value) if not re.search(rf"\b{argument}\b", value.__doc__)]
    assert missing == []


def test_every_error_is_announced():
    """A public function that raises InputError itself says so."""
    functions = {name: found(name) for name in DOCUMENTED if inspect.isfunction(found(name))}
    silent = [
        name
        for name, value in functions.items()
        if "raise InputError" in inspect.getsource(value) and not re.search(r"Raises:\n +InputError: \S", value.__doc__)
    ]
    assert silent == []
