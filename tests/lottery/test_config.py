"""YAML configurations: defaults, every refusal with the field's path, the hash."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fxsparse.errors import ConfigError
from fxsparse.lottery import IMP, FinalRound, Rewind, Scope, Step
from fxsparse.lottery.config import UNSUPPORTED, Config, Train, load_config, parse_config
from fxsparse.lottery.experiment import ARGUMENTS, learning_rate_factor
from fxsparse.lottery.experiment import settings as engine_settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("imp_*.yaml"))


def test_defaults_are_those_of_the_engine() -> None:
    config = parse_config({})
    assert config == Config() and config.seeds == (42,)
    assert config.train.optimizer == "adam" and config.train.batch_size == 32
    assert config.imp.num_rounds == 11 and config.imp.prune_rate_per_round == "0.2"
    assert engine_settings(config) == IMP(num_rounds=11, checkpoint_every=Step(1))


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "c.yaml") == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_the_files_that_ship(path: Path) -> None:
    config = load_config(path)
    engine_settings(config)
    assert f"configs/{path.name}" in path.read_text() and config.run.name == path.stem


def test_every_field_reaches_the_engine() -> None:
    values = {
        "run": {"name": "x", "seeds": [1, 2], "device": "auto", "deterministic": False},
        "imp": {
            "prunable_layers": ["fc*"],
            "scope": "layerwise",
            "rate_factors": {"fc1": 0.5},
            "min_alive_per_layer": 3,
            "prune_rate_per_round": "0.30",
            "target_sparsity": 0.8,
            "num_rounds": None,
            "final_round": "stretch",
            "rewind": "step",
            "rewind_step": "1ep5it",
            "rewind_optimizer": "fresh",
            "data_order": "fresh",
            "checkpoint_every": None,
        },
    }
    config = parse_config(values)
    found = engine_settings(config)
    assert found.rate == "0.3" and found.target == "0.8" and found.num_rounds is None
    assert found.final_round is FinalRound.STRETCH and found.scope is Scope.LAYERWISE
    assert found.rewind is Rewind.STEP and found.rewind_step == Step(1, 5)
    assert found.layers == ("fc*",) and found.rate_factors == {"fc1": "0.5"} and found.min_alive == 3
    assert found.checkpoint_every is None and config.seeds == (1, 2)
    default = engine_settings(Config())
    same = [f.name for f in dataclasses.fields(IMP) if getattr(found, f.name) == getattr(default, f.name)]
    assert same == ["finetune_steps"]  # every other field was moved off its default
    assert set(ARGUMENTS) == set(Train.model_fields["arch"].annotation.__args__)  # type: ignore[union-attr]  # Literal


BAD: list[tuple[Any, str]] = [
    ({"imp": {"scope": "globl"}}, r"`imp.scope` \(='globl'\) must be 'global' or 'layerwise'"),
    ({"imp": {"scop": "global"}}, r"`imp.scop` is not a field: did you mean scope\? allowed: prunable_layers, scope"),
    ({"trian": {}}, r"`trian` is not a field: did you mean train\? allowed: run, data, train, imp"),
    ({"train": {"learning_rate": "1e-3"}}, r"`train.learning_rate` \(='1e-3'\).*write 0.001 or 1.0e-3"),
    ({"train": {"learning_rate": 0}}, r"`train.learning_rate` \(=0\) must be greater than 0"),
    ({"train": {"learning_rate": math.nan}}, r"`train.learning_rate` \(=nan\)"),
    ({"train": {"learning_rate": math.inf}}, r"`train.learning_rate` \(=inf\)"),
    ({"train": {"momentum": 1}}, r"`train.momentum` \(=1\) must be less than 1"),
    ({"train": {"weight_decay": -0.1}}, r"`train.weight_decay`"),
    ({"train": {"batch_size": 0}}, r"`train.batch_size` \(=0\) must be greater than or equal to 1"),
    ({"train": {"batch_size": True}}, r"`train.batch_size` \(=True\) must be a valid integer"),
    ({"train": {"batch_size": 2.0}}, r"`train.batch_size` \(=2.0\)"),
    ({"train": {"epochs_per_round": "3"}}, r"`train.epochs_per_round` \(='3'\)"),
    ({"train": {"arch": "vgg16"}}, r"`train.arch` \(='vgg16'\) must be 'lenet_300_100' or 'small_conv_net'"),
    ({"train": {"optimizer": "lion"}}, r"`train.optimizer`.*'adam' or 'sgd'"),
    ({"train": {"lr_schedule": "x"}}, r"`train.lr_schedule` \(='x'\) must be 'constant' or 'cosine'"),
    ({"train": {"lr_schedule": {"milestones": ["2e"]}}}, r"`train.lr_schedule.milestones.0` \(='2e'\) must be a step"),
    ({"train": {"lr_schedule": {"milestones": ["1ep"], "gama": 1.0}}}, r"`train.lr_schedule.gama` is not a field"),
    ({"train": {"precision": "int8"}}, r"`train.precision`"),
    ({"train": {"warmup_steps": "soon"}}, r"`train.warmup_steps` \(='soon'\) must be a step such as 2ep"),
    ({"imp": {"prune_rate_per_round": 1.5}}, r"`imp.prune_rate_per_round` \(=1.5\) must be a number in \(0, 1\)"),
    ({"imp": {"prune_rate_per_round": 0}}, r"`imp.prune_rate_per_round` \(=0\)"),
    ({"imp": {"prune_rate_per_round": "lots"}}, r"`imp.prune_rate_per_round` \(='lots'\) must be a decimal number"),
    ({"imp": {"prune_rate_per_round": True}}, r"`imp.prune_rate_per_round` \(=True\)"),
    ({"imp": {"target_sparsity": 1}}, r"`imp.target_sparsity` \(=1\)"),
    ({"imp": {"target_sparsity": [0.9]}}, r"`imp.target_sparsity`"),
    ({"imp": {"rate_factors": {"fc1": 2}}}, r"`imp.rate_factors.fc1` \(=2\) must be a number in \(0, 1\]"),
    ({"imp": {"num_rounds": 0}}, r"`imp.num_rounds` \(=0\)"),
    ({"imp": {"num_rounds": "3"}}, r"`imp.num_rounds` \(='3'\)"),
    ({"imp": {"min_alive_per_layer": -1}}, r"`imp.min_alive_per_layer`"),
    ({"imp": {"prunable_layers": 3}}, r"`imp.prunable_layers` \(=3\)"),
    ({"imp": {"prunable_layers": []}}, r"`imp.prunable_layers`"),
    ({"imp": {"rewind": "later"}}, r"`imp.rewind` \(='later'\) must be 'init', 'step', 'lr' or 'none'"),
    ({"imp": {"rewind_step": "5x"}}, r"`imp.rewind_step` \(='5x'\)"),
    ({"imp": {"scope": "structure"}}, r"`imp.scope` \(=structure\) is not supported in this version"),
    ({"imp": {"results_dir": ""}}, r"`imp.results_dir`"),
    ({"run": {"seed": -1}}, r"`run.seed` \(=-1\)"),
    ({"run": {"seeds": [1, -1]}}, r"`run.seeds.1` \(=-1\)"),
    ({"run": {"seeds": []}}, r"`run.seeds` \(=\[\]\) must have at least 1 item$"),
    ({"imp": {1: 2}}, r"`imp.1` \(=1\) must be strings"),
    ({"run": {"name": "../up"}}, r"`run.name` \(='../up'\)"),
    ({"run": {"device": "mps"}}, r"`run.device` \(='mps'\).*not supported"),
    ({"run": {"device": "tpu"}}, r"`run.device` \(='tpu'\) must be auto, cpu, cuda"),
    ({"run": {"deterministic": "yes"}}, r"`run.deterministic` \(='yes'\)"),
    ({"run": []}, r"`run` \(=\[\]\) must be a section"),
    ({"data": {"dataset": "mnist"}}, r"`data.dataset` \(='mnist'\) must be 'digits'"),
    ([1], r"must hold sections: run, data, train, imp"),
    ("text", r"must hold sections"),
]


@pytest.mark.parametrize(("values", "match"), BAD, ids=[str(values)[:50] for values, _ in BAD])
def test_refusals_name_the_path(values: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        parse_config(values)


def test_fields_of_later_versions_are_refused_by_name() -> None:
    for section, fields in UNSUPPORTED.items():
        for field in fields or ("anything",):
            path = rf"`{section}\.{field}`" if fields else rf"section `{section}`"
            with pytest.raises(ConfigError, match=path + r".*not supported in this version"):
                parse_config({section: {field: None}})


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"train": {"batch_size": 0, "x": 1}, "imp": {"scope": 3}})
    assert all(part in str(caught.value) for part in ("train.batch_size", "train.x", "imp.scope"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("imp: [", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("imp:\n  scope: global\n  scope: layerwise\n", "`scope` stands twice"),
        ("train: {batch_size: 1, batch_size: 1}", "`batch_size` stands twice"),
        ("- 1", "must hold sections"),
    ],
)
def test_bad_files(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match) as caught:
        load_config(path)
    assert str(path) in str(caught.value) or "twice" in match


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_the_hash_knows_what_matters(tmp_path: Path) -> None:
    plain = Config().hash()
    assert parse_config({"imp": {"prune_rate_per_round": "0.200", "rewind_step": 0}}).hash() == plain
    assert (
        parse_config({"run": {"seed": 9, "name": "n", "device": "auto"}, "imp": {"results_dir": "r"}}).hash() == plain
    )
    for other in ({"imp": {"target_sparsity": 0.91}}, {"train": {"batch_size": 33}}, {"data": {"split_seed": 1}}):
        assert parse_config(other).hash() != plain


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 99),
    st.sampled_from(["constant", "cosine", {"milestones": ["1ep", "30it"], "gamma": 0.5}]),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=3),
)
def test_resolved_configurations_read_back(batch: int, schedule: Any, seeds: list[int]) -> None:
    config = parse_config({"train": {"batch_size": batch, "lr_schedule": schedule}, "run": {"seeds": seeds}})
    again = parse_config(yaml.safe_load(yaml.safe_dump(config.resolved())))
    assert again == config and again.hash() == config.hash()


def test_learning_rate_schedules() -> None:
    def factors(**options: Any) -> list[float]:
        factor = learning_rate_factor(parse_config({"train": options}).train, steps_per_epoch=4)
        return [round(factor(step, 20), 6) for step in range(21)]

    assert factors(lr_schedule="constant") == [1.0] * 21
    cosine = factors(lr_schedule="cosine")
    assert cosine[0] == 1 and cosine[10] == 0.5 and cosine[20] == 0
    warm = factors(lr_schedule="cosine", warmup_steps="1ep")
    assert warm[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and warm[12] == 0.5 and warm[20] == 0
    steps = factors(lr_schedule={"milestones": ["2ep", "15it"], "gamma": 0.1})
    assert (steps[7], steps[8], steps[14], steps[15]) == (1.0, 0.1, 0.1, 0.01)
