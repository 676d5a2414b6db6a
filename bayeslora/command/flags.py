"""Flags: how they are parsed and explained, what their values are, and those for the options of a dataclass."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bayeslora.errors import InputError
from bayeslora.options import COUNT, Range, choices
from bayeslora.tasks.prompting import ChoicePrompting, TextPrompting

FLAGS = {"r": "rank"}  # a field's flag, where it is not the field's own name
_OTHERWISE = FLAGS | {"output_dir": "output"}  # an argument's flag, likewise
_PROMPTING = {field.name for kind in (ChoicePrompting, TextPrompting) for field in dataclasses.fields(kind)}
_QUOTES = "\"'"

# As the library's messages name an argument: name=, name=value, or a name with an underscore. What stands in quotes is
# somebody's own, such as a column's name; so are parts of a path, and a call in Python stays one.
_ARGUMENT = re.compile(
    r"""(?<!\w)(?:'[^']*'|"[^"]*")(?!\w)
    | (?<![\w./\\-])(?<!\w\()(?P<name>[a-z][a-z0-9]*(?:_[a-z0-9]+)*)
      (?P<given>=(?P<value>'[^']*'|"[^"]*"|\[[^\]]*\]|\.\.\.|-?\w+(?:[.+-]+\w+)*)?)?
      (?![\w/\\(=]|\.\w)""",
    re.VERBOSE,
)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """With every default that there is, but for those that the help tells itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        nothing = action.default is None or action.default is False or action.default in ([], argparse.SUPPRESS)
        told = nothing or "default" in (action.help or "")
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """One line for a mistake, as everywhere else."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help says what there is")


def number(name: str, takes: Range = COUNT) -> Callable[[str], Any]:
    """For argparse: a number in a range; ``name`` is what errors call it."""

    def parse(text: str) -> Any:
        try:
            return takes.parse(name, text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def number_or(words: Sequence[str], name: str, takes: Range) -> Callable[[str], Any]:
    """For argparse: a number in a range, or one of some words."""
    parse = number(name, takes)
    return lambda text: text if text in words else parse(text)


def word(text: str) -> str:
    """For argparse: something rather than nothing, as an unset variable of the shell leaves."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def path(text: str) -> Path:
    return Path(word(text))


def sentence(text: str) -> str:
    """For argparse: what a tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("is not valid Unicode: give it in the encoding of this terminal") from error
    return word(text)


def add_options(
    group: Any,
    owner: type,
    fields: Iterable[dataclasses.Field[Any]],
    *,
    several: Iterable[str] = (),
    default: Callable[[dataclasses.Field[Any]], Any] = lambda field: field.default,
    told: Callable[[dataclasses.Field[Any]], str] = lambda field: "",
) -> None:
    """A flag for each of the ``fields`` of a dataclass, with a list for those in ``several``; help ends as ``told``."""
    for field in fields:
        flag, value, help = flag_of(field), default(field), field.metadata["help"]
        takes, allowed = field.metadata["takes"], choices(owner).get(field.name)
        kind: dict[str, Any] = {"choices": allowed} if allowed else {"type": word}
        if takes:
            kind = {"type": number(field.name if flag == field.name else f"{field.name} ({help})", takes)}
        if field.name in several:
            kind |= {"nargs": "+"} if takes else {"nargs": "+", "metavar": "NAME"}
            value = value if value is None else [value]
        group.add_argument(f"--{flag.replace('_', '-')}", default=value, help=help + told(field), **kind)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The field's name on the command line, with underscores."""
    return FLAGS.get(field.name, field.name)


def as_flags(message: str, arguments: argparse.Namespace) -> str:
    """What the library says of its arguments, said of the flags of the command that was given.

    Example:
        >>> as_flags("pass batch_size=1, or a longer max_length", argparse.Namespace(batch_size=8, max_length=64))
        'pass --batch-size 1, or a longer --max-length'
    """

    def flag(found: re.Match[str]) -> str:
        name = found["name"] and _OTHERWISE.get(found["name"], found["name"])
        if name in _PROMPTING and found["value"] and "prompting" in arguments and name not in arguments:
            return f"--prompting {name}={found['value'].strip(_QUOTES).lower()}"
        if not name or name not in arguments or ("_" not in found["name"] and not found["given"]):
            return found[0]
        said = f"--{name.replace('_', '-')}"
        if found["value"] in ("None", "False"):
            return f"no {said}"
        values = [] if found["value"] in (None, "True") else found["value"].strip("[]").split(", ")
        return " ".join([said, *(value.strip(_QUOTES) for value in values)])

    return _ARGUMENT.sub(flag, message)


def command(
    commands: Any, name: str, run: str, summary: str, details: str = "", *, check: str = ""
) -> argparse.ArgumentParser:
    """``run``: the function behind it, as ``module:function`` of this folder, and ``check`` that of
    :mod:`bayeslora.command.checks` which is called before it; what that returns, ``run`` gets after the arguments.
    """
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=details,
        formatter_class=Help,
    )
    parser.set_defaults(command=name, default_of=parser.get_default)
    check = check and f"bayeslora.command.checks:{check}"
    parser.set_defaults(run=f"bayeslora.command.{run}", check=check)
    return parser
