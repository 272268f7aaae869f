"""MODULE:FACTORY: every accepted form, and a typed refusal with the mend for the rest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fxsparse.cli.factory import load_factory
from fxsparse.errors import ConfigError

SOURCE = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Width:
    value: int = 3

def plain():
    return nn.Linear(Width().value, 2)

def with_inputs():
    return nn.Linear(3, 2), (torch.ones(4, 3),)

def with_keywords():
    return nn.Linear(3, 2), ((), {"input": torch.ones(4, 3)})

class Zoo:
    @staticmethod
    def build():
        return nn.Linear(3, 5)

ready = nn.Linear(3, 7)
number = 5

def needs(width):
    return nn.Linear(width, 2)

def fails():
    raise RuntimeError("no weights here")

def wrong():
    return 3

def bare_tensor():
    return nn.Linear(3, 2), torch.ones(4, 3)

def not_a_model():
    return 1, (torch.ones(4, 3),)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "my models.py"
    path.write_text(SOURCE)
    return str(path)


def test_forms(file: str) -> None:
    model, inputs = load_factory(f"{file}:plain")
    assert isinstance(model, nn.Linear) and model.in_features == 3 and inputs is None
    model, inputs = load_factory(f"{file}:with_inputs")
    assert isinstance(inputs, tuple) and torch.equal(inputs[0], torch.ones(4, 3))
    assert load_factory(f"{file}:with_keywords").example_inputs[1].keys() == {"input"}  # type: ignore[index]
    assert load_factory(f"{file}:Zoo.build").model.out_features == 5
    assert load_factory(f"{file}:ready").model.out_features == 7  # a model is callable: it is not called
    assert load_factory("fxsparse.models:lenet_300_100").model.fc1.out_features == 300  # type: ignore[union-attr]


def test_modules_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fxsparse_test_zoo_module.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_factory("fxsparse_test_zoo_module:plain").example_inputs is None
    assert sys.path == before
    with pytest.raises(ConfigError):
        load_factory("fxsparse_test_zoo_module:fails")
    assert sys.path == before
    del sys.modules["fxsparse_test_zoo_module"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", r"`number` of .* \(=5\) is neither"),
        ("needs", r"TypeError.*without arguments"),
        ("fails", r"RuntimeError: no weights here"),
        ("wrong", r"returned `int`; return a model or"),
        ("bare_tensor", r"type `Tensor`; give a tuple: return model, \(x,\)"),
        ("not_a_model", r"returned `tuple`; return a model"),
        ("absent", r"`absent` is not in .* the module offers .*plain"),
        ("Zoo.absent", r"`Zoo.absent` is not in"),
    ],
)
def test_refusals(file: str, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_factory(f"{file}:{name}")


@pytest.mark.parametrize(
    "text", ["", "fxsparse.models", ":factory", "fxsparse.models:", "nowhere.py", "no colon at all"]
)
def test_text_without_a_factory(text: str) -> None:
    with pytest.raises(ConfigError, match="has no factory name; write `package.module:factory`"):
        load_factory(text)


def test_modules_that_cannot_be_imported(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    for text, message in (
        ("no.such.module:f", "ModuleNotFoundError"),
        (f"{tmp_path}/absent.py:f", "no file"),
        (f"{broken}:f", "ZeroDivisionError"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_factory(text)
    assert "_fxsparse_factory_broken" not in sys.modules
