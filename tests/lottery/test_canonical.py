"""Canonical JSON and hashes: golden values."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from fxsparse.errors import ConfigError
from fxsparse.lottery import canonical_json, config_hash, sha256_json
from fxsparse.lottery.canonical import decimal_text, dtype_name, strict_json
from fxsparse.sparsity import Mask, tensor_sha256

CONFIG = {"imp": {"prune_rate_per_round": "0.1", "target_sparsity": "0.95"}, "schema_version": 1}
CONFIG_HASH = "0ca491b396163edda44288d345f1c6968d920925d74c8c4b2553430ca81f4178"


def test_config_golden() -> None:
    assert canonical_json(CONFIG) == (
        '{"imp":{"prune_rate_per_round":"0.1","target_sparsity":"0.95"},"schema_version":1}'
    )
    assert sha256_json(CONFIG) == CONFIG_HASH
    assert config_hash({"imp": CONFIG["imp"]}) == CONFIG_HASH
    assert config_hash({"imp": {"target_sparsity": 0.95, "prune_rate_per_round": 0.1}}) == CONFIG_HASH


def test_packing_and_hash_goldens() -> None:
    mask = Mask(torch.tensor([1, 0, 1, 1, 0, 0, 0, 1, 1, 1], dtype=torch.bool).reshape(2, 5))
    assert bytes(mask.pack().tolist()).hex() == "8d03"
    assert mask.sha256("fc.weight") == "8ca16541e0701cb835325a687438a4ae46863d1305a57b395ec6b95c9a19ac3e"
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert tensor_sha256("fc.weight", weight) == "8c43f9c8eb22bd373d29217218f70af7ba8a442e20527d224e99f6ef30bcf38c"


def test_numbers_are_integers_or_decimal_text() -> None:
    assert canonical_json([1, 1.0, -0.0, 0.1, 1e-7, 1e22, True, None]) == (
        '[1,1,0,"0.1","0.0000001",10000000000000000000000,true,null]'
    )
    assert canonical_json(Fraction(4, 2)) == "2"
    assert decimal_text(0.30000000000000004) == "0.30000000000000004"
    assert canonical_json({"ü": "é"}) == '{"\\u00fc":"\\u00e9"}'
    assert canonical_json((1, [2])) == "[1,[2]]"


@pytest.mark.parametrize("bad", [math.nan, math.inf, {1: 2}, object(), b"x", {"a": {2}}])
def test_what_has_no_canonical_form_raises(bad: object) -> None:
    with pytest.raises(ConfigError):
        canonical_json(bad)


def test_neutral_and_default_fields_do_not_matter() -> None:
    plain = config_hash({"imp": CONFIG["imp"]})
    noise = {
        "imp": {**CONFIG["imp"], "results_dir": "/elsewhere"},
        "run": {"name": "x", "seed": 3, "seeds": [1], "device": "cuda", "artifacts_dir": "a", "verbosity": 2},
        "data": {"num_workers": 4},
        "report": {"anything": True},
    }
    assert config_hash(noise) == plain
    assert config_hash({**noise, "train": {"lr": 0.5}}, {"train": {"lr": 0.5}}) == plain
    assert config_hash({**noise, "train": {"lr": 0.25}}, {"train": {"lr": 0.5}}) != plain
    assert config_hash({**noise, "run": {"deterministic": False}}) != plain
    assert config_hash({"imp": CONFIG["imp"]}, schema_version=2) != plain


def test_hashes_do_not_depend_on_the_process() -> None:
    code = (
        "from fxsparse.lottery.canonical import sha256_json;"
        "print(sha256_json({k: {k: 1.5} for k in {'b', 'a', 'ü', 'zz'}}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    body = '{"a":{"a":"1.5"},"b":{"b":"1.5"},"zz":{"zz":"1.5"},"\\u00fc":{"\\u00fc":"1.5"}}'
    assert found == {hashlib.sha256(body.encode()).hexdigest() + "\n"}


def test_strict_json() -> None:
    for text in ('{"a": 1, "a": 2}', "[NaN]", "[Infinity]", "{"):
        with pytest.raises(ValueError):
            strict_json(text)
    assert strict_json('{"a": [1.5]}') == {"a": [1.5]}


def test_dtypes() -> None:
    assert dtype_name(torch.bfloat16) == "bfloat16"
    with pytest.raises(ConfigError, match="complex64"):
        dtype_name(torch.complex64)
