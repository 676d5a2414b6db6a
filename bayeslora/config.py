"""Every choice of a MonteCLoRA run in one frozen, validated, JSON-able object."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as shown
from typing import Any, Literal

from bayeslora.errors import InputError
from bayeslora.options import NOT_NEGATIVE, POSITIVE, Range, choices, option

# What LoraConfig can ask for that reads or bypasses lora_A behind our back, with the reason for refusing it.
REFUSED_LORA_OPTIONS = {
    "use_dora": "DoRA reads lora_A.weight directly to compute its magnitudes, so a draw would never reach it",
    "target_parameters": "PEFT adapts bare parameters (mixture-of-experts) without calling a lora_A layer",
    "monteclora_config": "this is PEFT's own MonteCLoRA; bayeslora replaces it",
    "megatron_config": "Megatron's parallel layers do not use a plain lora_A linear layer",
    "trainable_token_indices": "PEFT trains rows of the embeddings with a layer of its own: name the embeddings in "
    "modules_to_save instead",
    "layer_replication": "blocks that are repeated share their weights with others and have no name in the checkpoint",
    "megatron_core": "it names a module for PEFT to import, and Megatron's layers cannot be sampled",
}

MAX_RANK = 65_536
MAX_COMPONENTS = 1024

PRESETS: dict[str, dict[str, Any]] = {
    # The paper's settings (Tables 3 and 4): a small perturbation, for stability rather than for calibration.
    "paper": {
        "sample_scaler": 5e-3,
        "kl_weight": 1e-5,
        "num_components": 4,
        "guide": "mean_field",
        "noise": "shared",
        "scale_init": 1.0,
    },
    # Noise in units of each layer, which grows with what is learned: for every kind of task.
    "learned": {"sample_scaler": 8.0, "noise_units": "relative", "noise_schedule": "learned"},
    # Noise that grows with the certainty of the predictions: for classes and choices.
    "calibrated": {"sample_scaler": 0.25, "noise_schedule": "entropy"},
    # The same noise from the first step to the last: the defaults of this class.
    "constant": {},
}


def default_preset(kind: str, mode: str | None = None) -> str:
    """The preset for a kind of task: ``"learned"``; where nothing is to be learned, as ``mode="post_hoc"`` has it,
    ``"calibrated"`` where there are class probabilities, else ``"constant"``."""
    if mode != "post_hoc":
        return "learned"
    return "calibrated" if kind in ("classification", "choice") else "constant"


@dataclass(frozen=True)
class MonteCLoRAConfig:
    r"""Hyperparameters of a MonteCLoRA adapter.

    The adapted matrix has columns :math:`A_i = \mu_i + \epsilon \sum_k \pi_k S_{k,i}` (paper, section 4), with
    :math:`\pi \sim \mathrm{Dir}(\alpha)`, :math:`\Sigma \sim W_r(\mathrm{diag}(v), \nu)` and
    :math:`S_{k,i} \sim N(0, \Sigma)` in the posterior.

    Args:
        r: Rank of the adapters, 1 to 65 536.
        lora_alpha: LoRA's scaling numerator (PEFT's name; so are all up to ``lora_options``).
        target_modules: Names of the layers to adapt, or ``"all-linear"``.
        lora_dropout: Dropout on the input of ``lora_A``, in [0, 1).
        use_rslora: Scale by ``alpha / sqrt(r)`` instead of ``alpha / r``.
        modules_to_save: Layers trained whole and saved with the adapter, beside a classification head and whatever
            else is new: what the network's checkpoint does not hold.
        layers_to_transform: Indices of the blocks to adapt; all of them when ``None``.
        rank_pattern: Ranks that differ from ``r``, by layer name or pattern.
        lora_options: Any further argument of :class:`peft.LoraConfig`.
        num_components: N, Gaussian components of the mixture, 1 to 1024.
        sample_scaler: The scale of the noise around μ; 0 trains plain LoRA.
        noise_units: Of the sample scaler. ``"absolute"``: it is ε, the paper's, the same for all layers, however wide.
            ``"relative"``: it is ρ, the standard deviation of an entry of A − μ where training starts, over that of
            the A that PEFT starts with, :math:`(3 n_{in})^{-1/2}`; the same ρ means the same in layers of any width.
            ``"trained"``: over the root mean square of the A that the posterior is put on.
        kl_weight: η, the weight of the KL. ``None`` means 1e-2 for ``normalization="paper"`` (the paper's own 1e-5
            is too weak to hold v: the noise shrinks until the training set is fitted without it) and 1, the
            evidence lower bound, for ``normalization="elbo"``.
        cooperation: λ_C, weight of the cooperative loss Σ_k π_k².
        normalization: ``"paper"`` averages KL and cooperative loss over adapters; ``"elbo"`` sums the KL over
            adapters and columns and divides by the number of training examples.
        num_particles: M, outer draws of (π, Σ) per step; each costs a forward and backward pass.
        mixture: ``"dense"`` (all components) or ``"sparse"`` (only the component with the largest weight).
        components: ``"collapsed"`` draws the mixture as one Gaussian with exactly its law, at a cost that does
            not depend on N; ``"explicit"`` draws all N Gaussians, to look at them.
        noise: ``"per_example"`` gives every example of a training batch its own exact draw, by turning the
            sign of the noise's rows at random (flipout, Wen et al. 2018): each example's law is the same, and the
            gradient has less variance. ``"shared"`` uses one draw for the whole batch; so does training wherever rows
            of an adapted layer's input are not examples, and with a guide whose rows are not symmetric.
        noise_schedule: How ε changes while training, ``"constant"``, ``"cosine"``, ``"entropy"``, ``"learned"`` or
            ``"per_layer"`` (:mod:`bayeslora.noise_schedules`).
        guide: ``"amortized"``, ``"mean_field"`` or ``"gaussian"`` (:mod:`bayeslora.guides`).
        mode: ``"joint"`` trains everything; ``"post_hoc"`` freezes μ, B and the head, and trains only v and α.
        prior_concentration: α0 of the prior Dir(α0·1_N).
        degrees_of_freedom: ν of both Wishart distributions, at least r; the adapter's rank when ``None``. The smaller,
            the fewer directions hold most of a draw's variance: where v is even, about rν/(ν + r + 1) of r for one Σ.
            E[Σ] = ν·diag(v) grows with ν, so a larger ν goes with a smaller ε.
        alpha_init: ``"random"`` (log α uniform on [0, 1)) or ``"ones"``.
        scale_init: Initial value of every entry of v; where the KL is smallest when ``None``, so that v moves only
            where the data pull. 1 is the Wishart prior's own scale.
        wishart_scale: Of the Wisharts. ``"diagonal"``: I_r in the prior, diag(v) in the posterior. ``"full"``: FFᵀ and
            F diag(v) Fᵀ, with a lower triangular F for each adapter that is not trained: the identity, unless
            :meth:`bayeslora.BayesLoRA.from_adapter` finds another.

    Raises:
        InputError: naming the first argument that is out of range.

    Example:
        >>> config = MonteCLoRAConfig(r=4, sample_scaler=0.2)
        >>> config.kl_weight, config.replace(normalization="elbo", kl_weight=None).kl_weight
        (0.01, 1.0)
        >>> MonteCLoRAConfig.preset("calibrated").noise_schedule
        'entropy'
        >>> MonteCLoRAConfig.from_dict(config.to_dict()) == config
        True
    """

    r: int = option(8, "the rank of the adapters", Range(most=MAX_RANK))
    lora_alpha: float = option(16, "LoRA's scaling numerator", POSITIVE)
    target_modules: str | tuple[str, ...] | None = option("all-linear", "layers to adapt; default all-linear")
    lora_dropout: float = option(0.0, "dropout before lora_A", Range(float, 0, 1, below=True))
    use_rslora: bool = False
    modules_to_save: tuple[str, ...] | None = option(None, "layers trained whole, beside a new head")
    layers_to_transform: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    lora_options: Mapping[str, Any] = field(default_factory=dict)

    num_components: int = option(4, "N, the number of components", Range(most=MAX_COMPONENTS))
    sample_scaler: float = option(0.1, "ε, the scale of the noise; 0 is plain LoRA", NOT_NEGATIVE)
    noise_units: Literal["absolute", "relative", "trained"] = option(
        "absolute", "of the sample scaler: of A itself, of the scale at which a layer's A starts, or of a trained A"
    )
    kl_weight: float | None = option(None, "η, the weight of the KL", NOT_NEGATIVE)
    cooperation: float = option(1.0, "λ_C, the weight of the cooperative loss", NOT_NEGATIVE)
    normalization: Literal["paper", "elbo"] = option("paper", "how KL and data are weighed")
    num_particles: int = option(1, "M, draws per training step", Range(most=MAX_COMPONENTS), flag=False)
    mixture: Literal["dense", "sparse"] = option("dense", "all components, or the one with the largest weight")
    components: Literal["collapsed", "explicit"] = "collapsed"
    noise: Literal["per_example", "shared"] = option("per_example", "a draw for each example, or one a batch")
    noise_schedule: Literal["constant", "cosine", "entropy", "learned", "per_layer"] = option(
        "constant", "how ε changes while training"
    )
    guide: str = option("amortized", "amortized (default), mean_field or gaussian")
    mode: Literal["joint", "post_hoc"] = option("joint", "train everything, or v and α alone")
    prior_concentration: float = option(1.0, "α0 of the Dirichlet prior", POSITIVE, flag=False)
    degrees_of_freedom: float | None = option(None, "ν of the Wisharts", NOT_NEGATIVE, flag=False)
    alpha_init: Literal["random", "ones"] = "random"
    scale_init: float | None = option(None, "the initial v of the Wishart", POSITIVE, flag=False)
    wishart_scale: Literal["diagonal", "full"] = "diagonal"

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save", "layers_to_transform"):
            value = getattr(self, name)
            if isinstance(value, list | set):
                object.__setattr__(self, name, tuple(value))
            elif (name == "layers_to_transform" and isinstance(value, int)) or (
                name == "modules_to_save" and isinstance(value, str)
            ):
                object.__setattr__(self, name, (value,))
        if self.kl_weight is None:
            object.__setattr__(self, "kl_weight", 1e-2 if self.normalization == "paper" else 1.0)
        self._check_names()
        self._check_numbers()
        self._check_choices()
        self._check_lora_options()

    def _check_names(self) -> None:
        if not isinstance(self.target_modules, str):
            _require_names("target_modules", self.target_modules)
        _require_names("modules_to_save", self.modules_to_save)
        if not isinstance(self.layers_to_transform, tuple | None):
            raise InputError(f"layers_to_transform must be a list of indices, got {shown(self.layers_to_transform)}")
        for index in self.layers_to_transform or ():
            _require_integer("layers_to_transform", index, 0, 100_000, "indices of blocks")
        for name in ("rank_pattern", "lora_options"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
                raise InputError(f"{name} must be a mapping from names, got {shown(value)}")
        if not isinstance(self.use_rslora, bool):
            raise InputError(f"use_rslora must be True or False, got {shown(self.use_rslora)}")
        if not isinstance(self.guide, str):
            raise InputError(f"guide must be the name of a guide, got {shown(self.guide)}")

    def _check_numbers(self) -> None:
        for f in dataclasses.fields(self):
            takes, value = f.metadata.get("takes"), getattr(self, f.name)
            if takes is None or (value is None and f.default is None):
                continue
            if takes.kind is int:
                _require_integer(f.name, value, takes.least, takes.most, f.metadata["help"])
            else:
                _require_number(f.name, value, f.metadata["help"], positive=takes.above)
        if not self.lora_dropout < 1:
            raise InputError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        for pattern, rank in self.rank_pattern.items():
            _require_integer(f"rank_pattern[{shown(pattern)}]", rank, 1, MAX_RANK, "a rank")
        if self.degrees_of_freedom is not None:
            largest = max([self.r, *self.rank_pattern.values()])
            if not self.degrees_of_freedom >= largest:
                raise InputError(
                    f"degrees_of_freedom must be at least the rank ({largest}) or None for the rank itself, "
                    f"got {self.degrees_of_freedom!r}: a Wishart with fewer has no density"
                )

    def _check_choices(self) -> None:
        for name, allowed in choices(MonteCLoRAConfig).items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}; got {shown(getattr(self, name))}")
        if self.mode == "post_hoc" and self.sample_scaler == 0:
            raise InputError("mode='post_hoc' trains only the posterior, but sample_scaler=0 leaves none to train")
        needs = {"learned": "follows what the adapter learns", "per_layer": "measures the gradients of μ"}
        if self.mode == "post_hoc" and self.noise_schedule in needs:
            raise InputError(
                f"noise_schedule={self.noise_schedule!r} {needs[self.noise_schedule]}, and mode='post_hoc' freezes it: "
                "choose another noise_schedule, or the preset 'calibrated' or 'constant'"
            )

    def _check_lora_options(self) -> None:
        own = {f.name for f in dataclasses.fields(self)}
        for name, value in self.lora_options.items():
            if name in own:
                raise InputError(f"lora_options[{name!r}]: pass {name}= to MonteCLoRAConfig itself")
            if name in REFUSED_LORA_OPTIONS and value:
                raise InputError(f"{name} cannot be combined with bayeslora: {REFUSED_LORA_OPTIONS[name]}")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "MonteCLoRAConfig":
        """A named set of hyperparameters with ``changes`` on top.

        ``"learned"``: ρ is 8 where the adapter knows its training examples by heart, and less before, for every kind of
        task. ``"calibrated"``: ε is 0.25 times the certainty of the predictions, for classes and choices.
        ``"constant"``: the defaults of this class. ``"paper"``: the paper's (Tables 3 and 4), with little noise.

        Raises:
            InputError: for a name that there is not, or a change that is out of range.
        """
        if name not in PRESETS:
            raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> "MonteCLoRAConfig":
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; :meth:`from_dict` reads them back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        try:
            return json.loads(json.dumps(fields, default=_plain))
        except TypeError as error:
            raise InputError(f"lora_options must hold plain JSON values to be saved: {error}") from error

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MonteCLoRAConfig":
        """Rebuild from :meth:`to_dict`; unknown fields and wrong types are an :class:`InputError`."""
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise InputError(f"a configuration is a mapping from field names, got {shown(values)}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(
                f"unknown configuration field {shown(unknown[0])}; the file may come from a newer bayeslora"
            )
        return cls(**values)


NOISE_SCHEDULES = choices(MonteCLoRAConfig)["noise_schedule"]


def _plain(value: Any) -> Any:
    if isinstance(value, set | tuple):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} {value!r}")


def _require_names(name: str, value: Any) -> None:
    if not isinstance(value, tuple | None) or not all(isinstance(entry, str) for entry in value or ()):
        raise InputError(f"{name} must be a list of names, got {shown(value)}")


def _require_integer(name: str, value: Any, least: int, most: int, meaning: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise InputError(f"{name} ({meaning}) must be an integer from {least} to {most}, got {shown(value)}")


def _require_number(name: str, value: Any, meaning: str, *, positive: bool = False) -> None:
    """A number that float32 holds with room to spare: 0 where that is allowed, or between 1e-12 and 1e12."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and (1e-12 <= value <= 1e12 or value == 0)
    if not ok or (positive and value == 0):
        bound = "between 1e-12 and 1e12" if positive else "0 or between 1e-12 and 1e12"
        raise InputError(f"{name} ({meaning}) must be a number, {bound}; got {shown(value)}")
