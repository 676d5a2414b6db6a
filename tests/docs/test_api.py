"""The page of the interface lists every public name, by itself or with its module."""

import importlib
import re

import pytest

from tests.public.namespace import PACKAGES, public
from tests.scripts import ROOT

PAGE = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
LISTED = set(re.findall(r"^\.\. auto(?:class|function|module|exception):: (\S+)$", PAGE, re.MULTILINE))
NAMES = [(package, name) for package in PACKAGES for name in public(package) if name not in ("__version__", "GUIDES")]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_every_public_name_is_listed(package, name):
    home = public(package)[name].__module__
    assert LISTED & {home, *(f"{place}.{name}" for place in (*PACKAGES, home))}


@pytest.mark.parametrize("listed", sorted(LISTED))
def test_what_is_listed_exists(listed):
    module, _, last = listed.rpartition(".")
    assert hasattr(importlib.import_module(module), last) or importlib.import_module(listed)
