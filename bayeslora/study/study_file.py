"""Study files: YAML in which everything is what it looks like.

YAML 1.1, as PyYAML reads it, takes ``010`` for 8, ``1:30`` for 90, ``no`` for false and the last of two equal keys for
both; YAML 1.2 reads some of these otherwise. What they disagree on is refused here, with its line.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import yaml

from bayeslora.errors import InputError

_TAG = "tag:yaml.org,2002:"
# plain scalars that are no text; those of YAML 1.2, where 1e-3 is a number too
_PLAIN = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+|[-+]?0o[0-7_]+")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012


for _name, _pattern in _PLAIN.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), None)


def read_study_file(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file.

    Raises:
        InputError: for a file that cannot be read or holds something else, and for what may be read in two ways: a key
            given twice, yes and no, numbers with leading zeros, underscores or colons. It names key and line.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None:
            for line, message in _doubts(node, "", []):
                raise InputError(f"{path}, line {line}: {message}")
        values = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise InputError(f"cannot read the study {path}: {error.strerror}") from error
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold a mapping with model, tasks and methods, but holds {shown(values)}")
    return values


def _doubts(node: yaml.Node, key: str, around: list[yaml.Node]) -> Iterator[tuple[int, str]]:
    """Line and message of everything that may be read in two ways; ``around`` are the nodes that ``node`` is in."""
    line = node.start_mark.line + 1
    if any(node is one for one in around):
        yield line, f"{key} refers to itself"
    elif isinstance(node, yaml.ScalarNode):
        if node.style is None and _is_doubtful(node):
            yield line, _doubt(key, node.value)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _doubts(entry, key, [*around, node])
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for name, value in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value in seen:
                yield name.start_mark.line + 1, f"{name.value!r} is given twice; which one counts?"
            seen.add(name.value if isinstance(name, yaml.ScalarNode) else None)
            yield from _doubts(name, key, [*around, node])
            yield from _doubts(value, str(name.value), [*around, node])


def _is_doubtful(node: yaml.ScalarNode) -> bool:
    """Whether YAML 1.1 reads a number or a truth value where we do not, or is about to be misread by people."""
    elsewhere = yaml.SafeLoader("").resolve(yaml.ScalarNode, node.value, (True, False))
    same = elsewhere in (node.tag, f"{_TAG}str", f"{_TAG}timestamp")
    return not same or _LEADING_ZERO.fullmatch(node.value) is not None


def _doubt(key: str, value: str) -> str:
    where = f"{key}: {value}" if key and key != value else value
    if value.lower() in ("yes", "no", "on", "off"):
        return f"{where} may be a word, or true or false: write true or false, or quote the word"
    return f"{where} may be read as different numbers, or as text: write decimal digits alone, or quote the text"
