"""The YAML configuration of a run of iterative magnitude pruning: every field checked, every error names its path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fxsparse.errors import ConfigError
from fxsparse.lottery.counts import rational
from fxsparse.lottery.rewind import Step
from fxsparse.lottery.run_directory import config_hash

SCHEMA_VERSION = 1
UNSUPPORTED = {
    "run": ("artifacts_dir",),
    "data": (
        "data_dir", "image_root", "metadata", "image_size", "channels", "limit_total", "min_per_class",
        "train_split", "val_split", "test_split", "augment", "num_workers", "max_corrupt_fraction",
    ),
    "train": ("early_stopping", "patience", "class_weight"),
    "imp": ("controls", "selection", "tolerance", "confidence", "stop_after_failures"),
    "flops": None,
    "hybrid": None,
    "report": None,
}  # fmt: skip
"""Fields of the full workflow that this version refuses by name (None: the whole section)."""


def _rate_text(value: object) -> object:
    """A rate as its shortest decimal text, so that 0.2, .20 and "0.2" are one configuration."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("a decimal number such as 0.2")
    try:
        rational(value)
    except ConfigError:
        raise ValueError("a decimal number such as 0.2") from None
    text = repr(value) if isinstance(value, float) else str(value).strip()
    return format(Decimal(text).normalize(), "f")


def _open_unit(text: str) -> str:
    if not 0 < rational(text) < 1:
        raise ValueError("a number in (0, 1)")
    return text


def _half_open_unit(text: str) -> str:
    if not 0 < rational(text) <= 1:
        raise ValueError("a number in (0, 1]")
    return text


def _step_text(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError("a step such as 2ep, 500it or 2ep50it")
    try:
        return str(Step.parse(value))
    except ConfigError:
        raise ValueError("a step such as 2ep, 500it or 2ep50it") from None


def _device(text: str) -> str:
    kind, _, index = text.partition(":")
    if text not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdecimal()):
        raise ValueError("auto, cpu, cuda or cuda:0, cuda:1, ... (mps is not supported in this version)")
    return text


Rate = Annotated[str, BeforeValidator(_rate_text), AfterValidator(_open_unit)]
Factor = Annotated[str, BeforeValidator(_rate_text), AfterValidator(_half_open_unit)]
StepText = Annotated[str, BeforeValidator(_step_text)]
Seed = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: unknown fields, other types, NaN and infinities are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Run(Section):
    """Which run, where, with which seeds."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "imp_lenet"
    seed: Seed = 42
    seeds: Annotated[list[Seed], Field(min_length=1)] | None = None
    device: Annotated[str, AfterValidator(_device)] = "cpu"
    deterministic: bool = True


class Data(Section):
    """Which data."""

    dataset: Literal["digits"] = "digits"
    split_seed: Seed = 0


class MultiStep(Section):
    """A learning rate multiplied by `gamma` at each milestone."""

    milestones: Annotated[list[StepText], Field(min_length=1)]
    gamma: Annotated[float, Field(gt=0)] = 0.1


class Train(Section):
    """Which network, trained how."""

    arch: Literal["lenet_300_100", "small_conv_net"] = "lenet_300_100"
    epochs_per_round: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    lr_schedule: Literal["constant", "cosine"] | MultiStep = "constant"
    warmup_steps: StepText = "0it"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


class Imp(Section):
    """How tickets are searched for."""

    prunable_layers: Literal["all"] | Annotated[list[str], Field(min_length=1)] = "all"
    scope: Literal["global", "layerwise"] = "global"
    rate_factors: dict[str, Factor] = Field(default_factory=dict)
    min_alive_per_layer: Annotated[int, Field(ge=0)] = 1
    prune_rate_per_round: Rate = "0.2"
    target_sparsity: Rate = "0.9"
    num_rounds: Annotated[int, Field(ge=1)] | None = 11
    final_round: Literal["clip", "stretch"] = "clip"
    rewind: Literal["init", "step", "lr", "none"] = "init"
    rewind_step: StepText = "0it"
    rewind_optimizer: Literal["restore", "fresh"] = "restore"
    data_order: Literal["replay", "fresh"] = "replay"
    finetune_steps: Annotated[int, Field(ge=1)] | None = None
    checkpoint_every: StepText | None = "1ep"
    results_dir: Annotated[str, Field(min_length=1)] = "results"


class Config(Section):
    """A whole configuration; every field has a default."""

    run: Run = Field(default_factory=Run)
    data: Data = Field(default_factory=Data)
    train: Train = Field(default_factory=Train)
    imp: Imp = Field(default_factory=Imp)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds to run."""
        return tuple(self.run.seeds) if self.run.seeds is not None else (self.run.seed,)

    def resolved(self) -> dict[str, Any]:
        """All fields as plain values."""
        return self.model_dump(mode="json")

    def hash(self) -> str:
        """The hash that names the run directory."""
        return config_hash(self.resolved(), Config().resolved(), SCHEMA_VERSION)


class _UniqueLoader(yaml.SafeLoader):
    """The safe loader, but a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"`{key}` stands twice, near line {node.start_mark.line + 1}; keep one")
        return super().construct_mapping(node, deep)


def load_config(path: str | Path) -> Config:
    """Read a YAML file.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown or not supported yet, a value has another type or
            is out of range; the message names the field's path and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`config` (={path}) cannot be read: {error}; give a YAML file") from error
    loader = _UniqueLoader(text)
    try:
        values = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"`config` (={path}) is not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()
    return parse_config({} if values is None else values, str(path))


def parse_config(values: object, where: str = "config") -> Config:
    """A configuration from nested mappings; see `load_config` for the errors."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"`{where}` (={values!r}) must hold sections: {', '.join(Config.model_fields)}")
    for name, fields in UNSUPPORTED.items():
        section = values.get(name)
        if section is not None and fields is None:
            raise ConfigError(f"{where}: section `{name}` (={section!r}) is not supported in this version; remove it")
        for field in fields or ():
            if isinstance(section, Mapping) and field in section:
                value = section[field]
                raise ConfigError(f"{where}: `{name}.{field}` (={value!r}) is not supported in this version; remove it")
    if isinstance(section := values.get("imp"), Mapping) and section.get("scope") == "structure":
        raise ConfigError(
            f"{where}: `imp.scope` (=structure) is not supported in this version; allowed global, layerwise"
        )
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_messages(error))) from None


def _messages(error: ValidationError) -> Iterator[str]:
    for finding in error.errors():
        parts = [str(part) for part in finding["loc"] if not _is_branch(part)]
        path, value = ".".join(parts), finding["input"]
        if finding["type"] == "extra_forbidden":
            yield _unknown(parts)
            continue
        text = re.sub(
            r"^(Input|List|Dictionary|String|Keys) should ", "must ", finding["msg"].removeprefix("Value error, ")
        )
        text = re.sub(r" after validation, not \d+$", "", text)
        text = re.sub(r"a valid dictionary or instance of \w+", "a section of fields", text)
        hint = ""
        if "number" in finding["msg"] and isinstance(value, str):
            hint = " (YAML reads 1e-3 as text: write 0.001 or 1.0e-3)"
        rule = text if text.startswith("must ") else f"must be {text}"
        yield f"`{path}` (={value!r}) {rule}{hint}"


def _is_branch(part: object) -> bool:
    """Whether part of an error's location is a name that pydantic gives to a branch of a union."""
    return isinstance(part, str) and ("[" in part or part == "MultiStep")


def _unknown(parts: list[str]) -> str:
    section: type[BaseModel] = Config
    for part in parts[:-1]:
        inner = section.model_fields[part].annotation if part in section.model_fields else None
        section = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else MultiStep
    allowed = list(section.model_fields)
    close = difflib.get_close_matches(parts[-1], allowed, 1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"`{'.'.join(parts)}` is not a field: {guess}allowed: {', '.join(allowed)}"
