"""What a method is, and how a study finds it by name.

A method is one small frozen dataclass; its fields are its options. Those that train subclass :class:`TrainedMethod`,
those that make more of a finished training :class:`PostHocMethod`, and those that combine the trainings of several
seeds :class:`AcrossSeeds`. A file in this folder registers its own with :func:`register`; a study names one from
elsewhere as ``my_module:MyMethod``.
"""

import dataclasses
import difflib
import math
import pkgutil
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np

from bayeslora.errors import InputError
from bayeslora.study.entries import MethodSpec, suggest
from bayeslora.study.outcome import Predict, Predictor, Trained

if TYPE_CHECKING:
    from bayeslora.study.experiment import Experiment
    from bayeslora.study.spec import Study

METHODS: dict[str, type["Method"]] = {}
KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}


@dataclass(frozen=True)
class Method(ABC):
    """``label`` is what tables call the method; a title and its options unless given."""

    label: str = ""

    name: ClassVar[str]
    title: ClassVar[str]

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if not _fits(value, one.type):
                kind = getattr(one.type, "__name__", str(one.type))
                raise InputError(f"method {self.name!r}: {one.name} takes {KINDS.get(kind, kind)}, got {shown(value)}")
        if not self.label:
            object.__setattr__(self, "label", self.default_label())

    def default_label(self) -> str:
        """The title, and the options that are not the default."""
        changed = [
            f"{f.name}={value}"
            for f in dataclasses.fields(self)
            if f.name not in ("label", "base") and (value := getattr(self, f.name)) != f.default
        ]
        return f"{self.title} ({', '.join(changed)})" if changed else self.title

    def check_choices(self, **choices: Sequence[str]) -> None:
        """Refuse an option that is none of those that it may be."""
        for option, known in choices.items():
            if getattr(self, option) not in known:
                raise InputError(
                    f"method {self.name!r}: {option} takes {' or '.join(known)}, got {getattr(self, option)!r}"
                )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Method":
        """The method with these options, as a study names them."""
        known = [f.name for f in dataclasses.fields(cls)]
        for option in options:
            if option not in known:
                raise InputError(f"method {cls.name!r} has no option {option!r}; {suggest(str(option), known)}")
        values: dict[str, Any] = {w: tuple(v) if isinstance(v, list) else v for w, v in options.items()}
        return cls(**values)

    @classmethod
    def untuned(cls, options: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The options with which nothing searches for a width; None where that is all that the method is for."""
        return options


@dataclass(frozen=True)
class TrainedMethod(Method):
    """A method that trains; its rate is the grid's times ``learning_rate_scale``."""

    learning_rate_scale: float = 1.0

    @abstractmethod
    def train(self, experiment: "Experiment") -> Trained:
        """Train on ``experiment.train``, from ``experiment.network()``, within the study's budget."""

    @abstractmethod
    def predictors(self, trained: Trained, experiment: "Experiment") -> Iterator[Predictor]:
        """The predictors; the first is what post-hoc methods build on."""

    def save(self, trained: Trained, experiment: "Experiment") -> None:
        """Keep what was trained in ``experiment.folder``."""
        trained.network.save_pretrained(experiment.folder / "adapter")


@dataclass(frozen=True)
class PostHocMethod(Method):
    """A method that takes a finished training of ``base`` (a method's name or label) and predicts otherwise.

    ``shows_base``: its predictors are called by what it builds on too, so that another base makes other names.
    """

    base: str = "lora"

    shows_base: ClassVar[bool] = True

    @abstractmethod
    def predictors(self, trained: Trained, experiment: "Experiment", predict: Predict) -> Iterator[Predictor]:
        """The predictors; ``predict`` is the base's own. ``trained.network`` must be left as it was."""

    def checkpoints(self) -> int:
        """How many checkpoints of the training it needs."""
        return 0


@dataclass(frozen=True)
class AcrossSeeds(Method):
    """A method that combines the predictions of ``base`` over the study's seeds."""

    base: str = "lora"

    @abstractmethod
    def combine(self, probs: np.ndarray) -> np.ndarray:
        """From (seeds, n, C) to (n, C)."""

    def check(self, study: "Study") -> None:
        if len(study.seeds) < 2:
            raise InputError(
                f"{self.label!r} combines the trainings of several seeds, and the study has one: add seeds"
            )

    def label_on(self, trained: str, members: int) -> str:
        """What tables call the combination of so many trainings of a method with this label."""
        return f"{trained} {self.label} of {members}"


def register(cls: type[Method]) -> type[Method]:
    """Make a method known by its ``name``."""
    METHODS[cls.name] = cls
    return cls


def without_tuning(specs: Sequence[MethodSpec]) -> list[MethodSpec]:
    """The methods without what searches for a width of a posterior: some predictors, and some methods as a whole."""
    left = [(spec, _class_of(spec).untuned(spec.options)) for spec in specs]
    return [MethodSpec(spec.name, options) for spec, options in left if options is not None]


def make_method(spec: MethodSpec) -> Method:
    """The method that a study asks for.

    Raises:
        InputError: for a name that nothing has, and options that the method does not take.
    """
    cls = _class_of(spec)
    try:
        return cls.from_options(spec.options)
    except TypeError as error:
        raise InputError(f"method {spec.name!r}: {error}") from error


def _class_of(spec: MethodSpec) -> type[Method]:
    cls = _import(spec.name) if ":" in spec.name else all_methods().get(spec.name)
    if cls is None:
        raise InputError(f"no method {spec.name!r}; {suggest(spec.name, sorted(METHODS))}, or module:Class")
    return cls


def all_methods() -> dict[str, type[Method]]:
    """Every registered method by its name."""
    for module in method_modules():
        import_module(module)
    return METHODS


def method_modules() -> list[str]:
    """The files of this folder: a method is known once its file lies here."""
    folder = import_module(__package__)
    return [f"{__package__}.{file.name}" for file in pkgutil.iter_modules(folder.__path__)]


@dataclass(frozen=True)
class Lineup:
    """A study's methods: those that ``train``, and by the label of each, what builds on it."""

    trained: dict[str, TrainedMethod]
    post_hoc: dict[str, list[PostHocMethod]]
    across: dict[str, list[AcrossSeeds]]
    specs: dict[str, list[MethodSpec]]

    @classmethod
    def of(cls, specs: Sequence[MethodSpec]) -> "Lineup":
        """Build every method and find what each is based on.

        Raises:
            InputError: for an unknown method or option, two of one label, a base that the study does not train.
        """
        made = [(spec, make_method(spec)) for spec in specs]
        if any(method.label == "labels" for _, method in made):
            raise InputError("no method can be called 'labels': labels lie beside predictions; give it another label")
        trained = {method.label: method for _, method in made if isinstance(method, TrainedMethod)}
        lineup = cls(
            trained,
            {label: [] for label in trained},
            {label: [] for label in trained},
            {label: [] for label in trained},
        )
        called: set[tuple[str, str | None]] = set()  # a label, and what it builds on
        for spec, method in made:
            base = lineup.base(method) if isinstance(method, PostHocMethod | AcrossSeeds) else None
            name = (method.label, base if getattr(method, "shows_base", True) else None)
            if name in called:
                raise InputError(f"two methods are called {method.label!r}: give one of them another label")
            called.add(name)
            if isinstance(method, TrainedMethod):
                lineup.specs[method.label].append(spec)
            elif isinstance(method, PostHocMethod):
                lineup.post_hoc[lineup.base(method)].append(method)
                lineup.specs[lineup.base(method)].append(spec)
            elif isinstance(method, AcrossSeeds):
                lineup.across[lineup.base(method)].append(method)
        if not trained:
            raise InputError("the study trains nothing: name at least one method such as lora or monteclora")
        return lineup

    def check(self, study: "Study") -> None:
        """Raise ``InputError`` for an ensemble of one, and a reference that the study cannot have."""
        across = [method for made in self.across.values() for method in made]
        if across and len(study.seeds) < 2:
            raise InputError(
                f"{across[0].label!r} combines the trainings of several seeds, and the study has one: add seeds"
            )
        further = [*across, *(method for made in self.post_hoc.values() for method in made)]
        on_top = [f"{label} + {method.label}" for label, made in self.post_hoc.items() for method in made]
        for name in study.reference:
            is_on_top = any(name.startswith(f"{label} + ") for label in self.trained)
            known = on_top if is_on_top else [*self.trained, *(method.label for method in further)]
            if not any(name.startswith(label.rstrip("*")) for label in known):
                raise InputError(f"study: nothing is called as the reference {name!r}; {suggest(name, known)}")

    def base(self, method: PostHocMethod | AcrossSeeds) -> str:
        """The label of the trained method that ``method`` builds on."""
        if method.base in self.trained:
            return method.base
        named = [label for label, trained in self.trained.items() if trained.name == method.base]
        if not named:
            raise InputError(f"{method.label!r} builds on {method.base!r}, which the study does not train: add it")
        if len(named) > 1:
            raise InputError(
                f"{method.label!r} builds on {method.base!r}, of which the study trains {len(named)}: "
                f"give base the label of one ({', '.join(named)})"
            )
        return named[0]


def _fits(value: Any, kind: Any) -> bool:
    """Whether an option's value is of its field's type, where that is one a study file can write."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind) if kind in (bool, str, types.NoneType) else True


def _import(path: str) -> type[Method]:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError as error:
        raise InputError(f"method {path!r}: cannot import {module}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        close = difflib.get_close_matches(name, dir(import_module(module)), n=1)
        raise InputError(
            f"method {path!r}: {module} has no method class {name!r}"
            + (f"; did you mean {close[0]!r}?" if close else "")
        )
    return found
