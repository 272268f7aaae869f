"""The YAML configuration of a comparison: every field checked, every error names its path."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxsparse.errors import ConfigError
from fxsparse.sparsity import ERK, Distribution, Global, Saliency, Taylor, Uniform, Wanda
from fxsparse.sparsity import Magnitude as MagnitudeSaliency
from fxsparse.training import METHODS, PRUNINGS, Diversity, Method, Regroup
from fxsparse.training.dsnot import DSNoT
from fxsparse.training.resu_phases import Lengths
from fxsparse.training.resu_subset import AboveQuantile, AllDead, CyclicDead, RandomDead, TopGradient
from fxsparse.training.resu_theta import Selective, ThetaAdamW, ThetaMomentum, ThetaSGD

KINDS: dict[str, type[Method]] = {kind.__name__: kind for kind in (*METHODS, *PRUNINGS)}
DISTRIBUTIONS: dict[str, type[Distribution]] = {"uniform": Uniform, "erk": ERK, "global": Global}
SALIENCIES: dict[str, type[Saliency]] = {"magnitude": MagnitudeSaliency, "taylor": Taylor, "wanda": Wanda}
DENSE = "dense"
_WORDS: dict[str, Mapping[str, Any]] = {
    "distribution": DISTRIBUTIONS,
    **dict.fromkeys(("saliency", "drop", "prune", "score"), SALIENCIES),
    "theta": {"adamw": ThetaAdamW, "momentum": ThetaMomentum, "selective": Selective, "sgd": ThetaSGD},
    "subset": {
        "above_quantile": AboveQuantile,
        "all": AllDead,
        "cyclic": CyclicDead,
        "random": RandomDead,
        "top_gradient": TopGradient,
    },
}
_MAPPINGS: dict[str, type[Any]] = {"lengths": Lengths, "refine": DSNoT, "regroup": Regroup, "diversity": Diversity}


class Section(BaseModel):
    """Base of all sections: unknown fields, other types, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    """Where results go, which seeds, how many processes."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "comparison"
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(default_factory=lambda: [0, 1, 2])
    workers: Annotated[int, Field(ge=1)] = 1
    results_dir: Annotated[str, Field(min_length=1)] = "results"


class Data(Section):
    """Which data: the embedded digits, or the IDX files of a folder (MNIST, Fashion-MNIST)."""

    dataset: Literal["digits", "idx"] = "digits"
    folder: str | None = None
    validation: Annotated[str, Field(pattern=r"^0?\.\d+$")] = "0.1"
    split_seed: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only so many training samples, for trials."""


class Train(Section):
    """Which network, trained how; the same for every arm."""

    arch: Literal["lenet_300_100", "lenet_5", "mlp", "small_conv_net"] = "lenet_300_100"
    hidden: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """Widths of the hidden layers of `mlp`."""
    steps: Annotated[int, Field(ge=1)] = 2000
    batch_size: Annotated[int, Field(ge=1)] = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    lr_schedule: Literal["constant", "cosine"] = "cosine"


class Arm(Section):
    """One method: its class and its options; `distribution`, `saliency`, `initial` and enumerations by their words."""

    method: str
    options: dict[str, Any] = Field(default_factory=dict)
    patterns: Annotated[list[str], Field(min_length=1)] | None = None
    """Its own patterns instead of the comparison's."""


class Reference(Section):
    """The arm that all others are compared with, seed by seed, at their own sparsity."""

    method: str
    pattern: str | None = None
    """None = the pattern of the arm that is compared."""


class Config(Section):
    """A whole comparison; every field has a default."""

    run: Run = Field(default_factory=Run)
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    dense: bool = True
    equal_flops: Annotated[float, Field(gt=1)] | None = None
    """Train each arm again, so much longer that it spends the FLOPs of dense training, at most so many times longer."""
    methods: Annotated[dict[str, Arm], Field(min_length=1)] = Field(
        default_factory=lambda: {name.lower(): Arm(method=name) for name in ("Static", "GMP", "SET", "RigL")}
    )
    sparsities: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)] = Field(
        default_factory=lambda: [0.9, 0.95]
    )
    patterns: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["unstructured"])
    reference: Reference | None = None
    """None = the first arm of the method Static, if there is one."""

    @property
    def words(self) -> list[str]:
        """Every pattern that an arm asks for, once."""
        return list(dict.fromkeys(word for arm in self.methods.values() for word in arm.patterns or self.patterns))

    @property
    def compared(self) -> Reference | None:
        """The arm that others are compared with."""
        static = next((label for label, arm in self.methods.items() if arm.method == "Static"), None)
        return self.reference or (None if static is None else Reference(method=static))


def load_config(path: str | Path) -> Config:
    """Read a YAML file.

    Raises:
        ConfigError: the file is missing or no YAML, or a field is unknown or wrong; the message names its path.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`config` (={path}) cannot be read: {error}; give a YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"`config` (={path}) is not valid YAML: {' '.join(str(error).split())}") from error
    return parse_config({} if values is None else values, str(path))


def parse_config(values: object, where: str = "config") -> Config:
    """A configuration from nested mappings, every method of which can be built; see `load_config` for the errors."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"`{where}` (={values!r}) must hold sections: {', '.join(Config.model_fields)}")
    try:
        config = Config.model_validate(dict(values))
    except ValidationError as error:
        found = [
            f"`{'.'.join(str(part) for part in each['loc'])}` (={each['input']!r}): {each['msg']}"
            for each in error.errors()
        ]
        raise ConfigError(f"{where}: {'; '.join(found)}") from None
    for label, arm in config.methods.items():
        if label == DENSE:
            raise ConfigError(f"{where}: `methods.{DENSE}` is the name of the dense arm; choose another")
        try:
            build(arm, config.sparsities[0], 0)
        except ConfigError as error:
            raise ConfigError(f"{where}: `methods.{label}`: {error}") from error
    if config.reference is not None and config.reference.method not in config.methods:
        raise ConfigError(
            f"{where}: `reference.method` (={config.reference.method}) is none of {', '.join(config.methods)}"
        )
    if config.reference is not None and config.reference.pattern is not None:
        known = config.methods[config.reference.method].patterns or config.patterns
        if config.reference.pattern not in known:
            raise ConfigError(
                f"{where}: `reference.pattern` (={config.reference.pattern}) is none of {', '.join(known)}, the "
                f"patterns of {config.reference.method}"
            )
    if (config.train.arch == "mlp") != (config.train.hidden is not None):
        raise ConfigError(
            f"{where}: `train.hidden` (={config.train.hidden}) belongs to `train.arch` mlp, which needs it"
            f" (arch={config.train.arch})"
        )
    if config.data.dataset == "idx" and not config.data.folder:
        raise ConfigError(f"{where}: `data.folder` (=None) must name the folder of the IDX files")
    return config


def build(arm: Arm, sparsity: float, seed: int) -> Method:
    """The method of an arm at a sparsity.

    Raises:
        ConfigError: an unknown method or option, or a value that the method refuses.
    """
    kind = KINDS.get(arm.method)
    if kind is None:
        raise ConfigError(f"`method` (={arm.method}) is none of {', '.join(KINDS)}")
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    options = {}
    try:
        for name, value in arm.options.items():
            if name not in fields or name in ("sparsity", "seed", "pattern"):
                raise ConfigError(f"`options.{name}` (={value!r}) is no option of {arm.method}")
            options[name] = _value(kind, name, fields[name], value)
        return kind(sparsity, seed=seed, **options)
    except TypeError as error:
        raise ConfigError(f"{arm.method} refuses {arm.options}: {error}") from error


def _value(kind: type[Method], name: str, field: dataclasses.Field[Any], value: Any) -> Any:
    words = _WORDS.get(name, {})
    if words:
        word, options = next(iter(value.items())) if isinstance(value, Mapping) and len(value) == 1 else (value, {})
        if not isinstance(word, str) or word not in words or not isinstance(options, Mapping):
            raise ConfigError(
                f"`options.{name}` (={value!r}) is none of {', '.join(words)}, nor one of them with its options"
            )
        return words[word](**options)
    if name in _MAPPINGS:
        if not isinstance(value, Mapping | bool | None):
            raise ConfigError(f"`options.{name}` (={value!r}) must be its options by name, true or null")
        return _MAPPINGS[name](**value) if isinstance(value, Mapping) else _MAPPINGS[name]() if value else None
    default = field.default
    if isinstance(default, enum.Enum):
        members = {member.value: member for member in type(default)}
        if value not in members:
            raise ConfigError(f"`options.{name}` (={value!r}) is none of {', '.join(map(str, members))}")
        return members[value]
    if isinstance(value, list):
        return tuple(value)
    if not isinstance(value, str | int | float | bool | None):
        raise ConfigError(
            f"`options.{name}` (={value!r}) must be a number or a word in a comparison of {kind.__name__}"
        )
    return value
