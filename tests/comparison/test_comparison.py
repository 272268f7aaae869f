"""The comparison: equal terms for all arms, nothing trained twice, a table that can be checked by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from fxsparse.comparison import Reference, load_config, parse_config, run, summarise_cells
from fxsparse.comparison import cell as cell_module
from fxsparse.comparison.cell import Cell, load, train
from fxsparse.comparison.config import KINDS, build
from fxsparse.comparison.page import write_page
from fxsparse.comparison.results import markdown
from fxsparse.comparison.runner import _options, cells
from fxsparse.data import digits
from fxsparse.errors import ConfigError, DataError
from fxsparse.nn import ThetaInit
from fxsparse.sparsity import ERK, Block, NByM, SharedSupport, Taylor, Uniform, Unstructured, Wanda
from fxsparse.training import ITOP, METHODS, PRUNINGS, RESU, Diversity, Growth, OneShot, Regroup, RigL
from fxsparse.training.dsnot import DSNoT
from fxsparse.training.resu_phases import Lengths
from fxsparse.training.resu_subset import RandomDead
from fxsparse.training.resu_theta import ThetaSGD

PATTERNS = {"unstructured": Unstructured(), "shared-support:10": SharedSupport(10)}


def small(folder: Path, **changes: object) -> dict[str, object]:
    values: dict[str, object] = {
        "run": {"name": "t", "seeds": [0, 1], "results_dir": str(folder)},
        "train": {"steps": 12, "learning_rate": 0.004},
        "methods": {
            "still": {"method": "Static"},
            "rigl": {"method": "RigL", "options": {"every": 3}},
            "snip": {"method": "SNIP"},
        },
        "sparsities": [0.8],
    }
    return {**values, **changes}


def test_a_run_and_its_resumption(tmp_path, monkeypatch):
    config = parse_config(small(tmp_path))
    told: list[str] = []
    home, arms = run(config, PATTERNS, progress=lambda cell, done, total: told.append(f"{done}/{total}"))
    assert told == [f"{i}/8" for i in range(1, 9)] and len(cells(config)) == 8
    assert [(arm.label, arm.accuracy.count) for arm in arms] == [("dense", 2), ("still", 2), ("rigl", 2), ("snip", 2)]
    assert arms[0].flops == arms[0].memory == 1.0 and arms[0].against is None
    assert all(arm.against is not None for arm in arms[2:]) and arms[1].against is None
    for arm in arms[1:]:
        assert abs(arm.reached - 0.8) < 0.01
    assert (home / "table.md").read_text() == markdown(arms, Reference(method="still"))
    first = (home / "results.json").read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("trained twice")

    monkeypatch.setattr("fxsparse.comparison.runner.train", refuse)
    again, same = run(config, PATTERNS)
    assert again == home and same == arms and (home / "results.json").read_text() == first
    monkeypatch.undo()
    (lost,) = (home / "cells").glob("rigl-*-1-*.json")
    lost.unlink()
    run(config, PATTERNS)
    assert (home / "results.json").read_text() == first  # the same numbers come back
    more = parse_config(small(tmp_path, sparsities=[0.8, 0.9]))
    told.clear()
    assert run(more, PATTERNS, progress=lambda cell, done, total: told.append(cell.key))[0] == home
    assert len(told) == 6 and all("-0.9-" in key for key in told)


def test_parallel_processes_give_the_same_numbers(tmp_path):
    changes = {"methods": {"rigl": {"method": "RigL", "options": {"every": 3}}}, "dense": False}
    one, arms = run(parse_config(small(tmp_path / "a", **changes)), PATTERNS)
    values = small(tmp_path / "b", **changes)
    values["run"] = {**values["run"], "workers": 2}
    two, others = run(parse_config(values), PATTERNS)
    assert arms == others and (one / "results.json").read_text() == (two / "results.json").read_text()


def test_arms_share_weights_and_samples(tmp_path, monkeypatch):
    config = parse_config(small(tmp_path, train={"steps": 3}))
    splits = load(config)
    seen: dict[str, list[torch.Tensor]] = {}
    plain = cell_module._Trainer._rows
    for label in ("dense", "still", "rigl", "snip"):
        rows = seen.setdefault(label, [])
        monkeypatch.setattr(
            cell_module._Trainer, "_rows", lambda self, size, rows=rows: rows.append(plain(self, size)) or rows[-1]
        )
        train(config, Cell(label, "unstructured", 0.8, 1), Unstructured(), splits)
    assert all(torch.equal(a, b) for label in seen for a, b in zip(seen["dense"], seen[label], strict=True))
    models = [cell_module._model(config, splits, 1) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_costs_by_hand(tmp_path):
    config = parse_config(
        small(tmp_path, methods={"still": {"method": "Static", "options": {"distribution": "uniform"}}})
    )
    result = train(config, Cell("still", "unstructured", 0.75, 0), Unstructured(), load(config))
    sizes = [64 * 300, 300 * 100, 100 * 10]
    assert result["flops"] == pytest.approx(0.25, abs=1e-4) and result["steps"] == 12
    # weight, gradient and Adam's two moments of the alive quarter, and a bit of mask for each of all
    assert result["memory"] == pytest.approx((0.25 * 4 + 1 / 32) / 4, abs=1e-4)
    assert result["explored"] == pytest.approx(0.25, abs=1e-4) and sum(sizes) == 50200


@pytest.mark.parametrize("freeze", [False, True])
def test_a_resu_phase_costs_what_trains_in_it(tmp_path, freeze):
    """Dead positions under training are multiplied like alive ones; counting masks alone would hide them."""
    options = {
        "cycles": 1,
        "rise": None,
        "lengths": {"train": 0.5, "stabilize": 0.0, "resu": 0.5},
        "final_fraction": 0.0,
        "subset": {"random": {"fraction": 0.4}},
        "distribution": "uniform",
        "freeze_active": freeze,
    }
    config = parse_config(small(tmp_path, methods={"resu": {"method": "RESU", "options": options}}, train={"steps": 8}))
    result = train(config, Cell("resu", "unstructured", 0.75, 0), Unstructured(), load(config))
    alive, theta = 0.25, 0.4 * 0.75
    phase = 2 * (alive + theta) + (theta if freeze else alive + theta)
    assert result["flops"] == pytest.approx(
        (4 * 3.0 + 4 * phase) / (8 * 3.0), abs=1e-3
    )  # 4 dense steps, 4 of the phase


def test_pruning_at_initialisation_holds_all_weights_once(tmp_path):
    config = parse_config(small(tmp_path, data={"limit": 40}))  # fewer samples than calibration batches would take
    result = train(config, Cell("snip", "unstructured", 0.8, 0), Unstructured(), load(config))
    assert result["memory"] == pytest.approx(2 / 4)  # weights and gradients, of weights, gradients and two moments


def test_any_label_names_a_file_inside_the_results(tmp_path):
    labels = ["ac/dc", "../out", "ac%2Fdc", "a b"]
    config = parse_config(small(tmp_path, methods={label: {"method": "Static"} for label in labels}, dense=False))
    home, arms = run(config, PATTERNS)
    assert [arm.label for arm in arms] == labels and len(list((home / "cells").iterdir())) == 2 * len(labels)
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} == {home.name, "cells"}


@pytest.mark.parametrize(
    ("methods", "pattern", "message"),
    [
        (
            {"bad": {"method": "SNFS"}},
            "block:2x2",
            "`methods.bad` at pattern block:2x2, sparsity 0.8: .*redistribute=False",
        ),
        ({"bad": {"method": "RESU", "options": {"cycles": 50}}}, "unstructured", "too short"),
        ({"bad": {"method": "GMP", "options": {"every": 0.5}}}, "unstructured", "at least 1 step"),
        ({"bad": {"method": "SNIP"}}, "2:4", "must be 0 or 1 - n/m"),
    ],
)
def test_refused_arms_are_told_before_anything_is_trained(tmp_path, monkeypatch, methods, pattern, message):
    def refuse(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("fxsparse.comparison.runner.train", refuse)
    still = {"still": {"method": "Static", "patterns": ["unstructured"]}}
    config = parse_config(small(tmp_path, methods={**still, **methods}, patterns=[pattern]))
    with pytest.raises(ConfigError, match=message):
        run(config, {**PATTERNS, "block:2x2": Block(2, 2), "2:4": NByM(2, 4)})


def test_the_table_by_hand():
    found = {
        Cell("s", "p", 0.9, seed): {
            "test_accuracy": a,
            "sparsity": 0.9,
            "flops": 0.1,
            "steps": 9,
            "memory": 0.2,
            "explored": 0.3,
        }
        for seed, a in enumerate((0.5, 0.6))
    }
    for seed, a in enumerate((0.7, 0.9)):
        found[Cell("m", "p", 0.9, seed)] = {**found[Cell("s", "p", 0.9, 0)], "test_accuracy": a}
    still, moved = summarise_cells(found, Reference(method="s"))
    assert still.accuracy.mean == pytest.approx(0.55) and moved.accuracy.mean == pytest.approx(0.8)
    assert moved.against.mean == pytest.approx(0.25)  # .2 and .3
    half = 12.706 * 0.05 * math.sqrt(2) / math.sqrt(2)
    assert moved.against.half_width == pytest.approx(half, rel=1e-3)
    assert "| m | p | 0.9 | 0.900 | 80.00 ± 127.06 | +25.00 ± 63.53 | 9 | 0.100 | 0.200 | 0.300 | 2 |" in markdown(
        [still, moved]
    )


def test_equal_flops_trains_again_for_longer(tmp_path):
    values = small(tmp_path, methods={"still": {"method": "Static"}, "gmp": {"method": "GMP", "options": {"every": 1}}})
    config = parse_config({**values, "equal_flops": 4.0})
    told: list[str] = []
    home, arms = run(config, PATTERNS, progress=lambda cell, done, total: told.append(f"{cell.key} {done}/{total}"))
    rows = {(arm.label, arm.longer): arm for arm in arms}
    assert len(rows) == 5 and told[-1].endswith("10/10")
    still, gmp = rows["still", False], rows["gmp", False]
    assert rows["dense", False].steps == still.steps == gmp.steps == 12
    assert rows["still", True].steps == round(12 * min(4.0, 1 / still.flops)) == 48  # a fifth of the FLOPs: the limit
    assert rows["gmp", True].steps == round(12 / gmp.flops) < 48
    assert rows["still", True].flops == pytest.approx(4 * still.flops)
    assert rows["gmp", True].flops == pytest.approx(1.0, abs=0.1)  # its schedule stretches with the steps
    assert rows["gmp", True].against.mean == pytest.approx(
        rows["gmp", True].accuracy.mean - rows["still", True].accuracy.mean
    )
    assert rows["gmp", False].against.mean == pytest.approx(gmp.accuracy.mean - still.accuracy.mean)
    assert f"| 48 | {4 * still.flops:.3f} |" in (home / "table.md").read_text()
    assert (
        rows["still", False] == {(a.label, a.longer): a for a in run(parse_config(values), PATTERNS)[1]}["still", False]
    )
    write_page(arms, tmp_path / "page.html", "t")
    assert "still, equal FLOPs" in (tmp_path / "page.html").read_text()


def test_the_page(tmp_path):
    found = {
        Cell(label, pattern, s, 0): {
            "test_accuracy": 0.9,
            "sparsity": s,
            "flops": 1,
            "steps": 9,
            "memory": 1,
            "explored": 1,
        }
        for label, pattern, s in [("dense", "", 0.0), ("<m>", "unstructured", 0.9), ("<m>", "2:4", 0.5)]
    }
    write_page(summarise_cells(found), tmp_path / "page.html", "a & b")
    text = (tmp_path / "page.html").read_text()
    assert "a &amp; b" in text and "&lt;m&gt;" in text and text.count("Plotly.newPlot") >= 2
    assert "http" not in text[text.rindex("</script>") :]


def test_every_method_can_be_an_arm():
    assert set(KINDS.values()) == {*METHODS, *PRUNINGS}
    arm = parse_config(
        {
            "methods": {
                "a": {"method": "ITOP", "options": {"growth": "gradient", "distribution": "uniform", "alpha": 0.2}},
                "b": {"method": "OneShot", "options": {"saliency": "wanda"}},
                "c": {"method": "GMP", "options": {"regroup": {"every": 2}, "diversity": {"sole": 2.0}}},
                "d": {"method": "RigL"},
            }
        }
    ).methods
    assert build(arm["a"], 0.5, 3) == ITOP(0.5, growth=Growth.GRADIENT, distribution=Uniform(), alpha=0.2, seed=3)
    assert build(arm["b"], 0.5, 0) == OneShot(0.5, saliency=Wanda())
    grouped = build(arm["c"], 0.5, 0)
    assert grouped.regroup == Regroup(every=2) and grouped.diversity == Diversity(sole=2.0)
    assert build(arm["d"], 0.5, 0) == RigL(0.5, distribution=ERK())


def test_options_that_have_options():
    options = {
        "theta": {"sgd": {"lr": 0.0}},
        "subset": {"random": {"fraction": 0.5}},
        "score": "taylor",
        "init": "uniform",
        "lengths": {"train": 0.5, "stabilize": 0.0, "resu": 0.5},
        "refine": True,
        "budget": [0.3, 0.1],
    }
    arm = parse_config({"methods": {"x": {"method": "RESU", "options": options}}}).methods["x"]
    assert build(arm, 0.5, 1) == RESU(
        0.5,
        theta=ThetaSGD(lr=0.0),
        subset=RandomDead(0.5),
        score=Taylor(),
        init=ThetaInit.UNIFORM,
        lengths=Lengths(0.5, 0.0, 0.5),
        refine=DSNoT(),
        budget=(0.3, 0.1),
        seed=1,
    )


def test_an_arm_has_its_own_patterns_and_any_arm_can_be_the_reference(tmp_path):
    changes = {
        "methods": {
            "rigl": {"method": "RigL", "options": {"every": 3}},
            "grouped": {"method": "GMP", "options": {"every": 3, "regroup": True}, "patterns": ["shared-support:10"]},
        },
        "reference": {"method": "rigl", "pattern": "unstructured"},
        "train": {"steps": 6, "arch": "mlp", "hidden": [30, 20]},
        "dense": False,
    }
    config = parse_config(small(tmp_path, **changes))
    assert config.words == ["unstructured", "shared-support:10"]
    assert [(cell.label, cell.pattern) for cell in cells(config)[::2]] == [
        ("rigl", "unstructured"),
        ("grouped", "shared-support:10"),
    ]
    home, arms = run(config, PATTERNS)
    rows = {(row["cell"]["label"], row["cell"]["seed"]): row for row in json.loads((home / "results.json").read_text())}
    differences = [rows["grouped", seed]["test_accuracy"] - rows["rigl", seed]["test_accuracy"] for seed in (0, 1)]
    assert arms[0].against is None and arms[1].against.mean == pytest.approx(sum(differences) / 2)
    assert "against rigl unstructured" in (home / "table.md").read_text().splitlines()[0]
    mlp = cell_module._model(config, load(config), 0)
    assert [tuple(p.shape) for p in mlp.parameters() if p.dim() == 2] == [(30, 64), (20, 30), (10, 20)]


def test_convolutional_nets_of_a_comparison():
    splits = digits(0)
    image = torch.zeros(2, 1, 28, 28)
    big = dataclasses.replace(splits, train=dataclasses.replace(splits.train, inputs=image))
    for arch in ("lenet_5", "small_conv_net"):
        assert cell_module._model(parse_config({"train": {"arch": arch}}), big, 0)(image).shape == (2, 10)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "must hold sections"),
        ({"trian": {}}, "`trian`"),
        ({"train": {"steps": 0}}, "`train.steps` \\(=0\\)"),
        ({"train": {"learning_rate": math.nan}}, "`train.learning_rate`"),
        ({"run": {"seeds": []}}, "`run.seeds`"),
        ({"sparsities": [1.0]}, "`sparsities.0`"),
        ({"methods": {"x": {"method": "Rigl"}}}, "`methods.x`: `method` \\(=Rigl\\) is none of"),
        (
            {"methods": {"x": {"method": "RigL", "options": {"evry": 3}}}},
            "`options.evry` \\(=3\\) is no option of RigL",
        ),
        ({"methods": {"x": {"method": "RigL", "options": {"every": 0}}}}, "`methods.x`: `every`"),
        ({"methods": {"x": {"method": "RigL", "options": {"decay": "fast"}}}}, "`options.decay` .* is none of"),
        ({"methods": {"x": {"method": "RigL", "options": {"distribution": "even"}}}}, "is none of uniform, erk"),
        ({"methods": {"dense": {"method": "RigL"}}}, "name of the dense arm"),
        ({"data": {"dataset": "idx"}}, "`data.folder`"),
        ({"reference": {"method": "gmpp"}}, "`reference.method` \\(=gmpp\\) is none of"),
        (
            {"reference": {"method": "static", "pattern": "2:4"}},
            "`reference.pattern` \\(=2:4\\) is none of unstructured, the patterns of static",
        ),
        ({"train": {"arch": "mlp"}}, "`train.hidden` \\(=None\\)"),
        ({"train": {"hidden": [3]}}, "`train.hidden` \\(=\\[3\\]\\)"),
        ({"methods": {"x": {"method": "RESU", "options": {"theta": {"sgd": {"speed": 1}}}}}}, "RESU refuses"),
        ({"methods": {"x": {"method": "RESU", "options": {"subset": {"some": {}}}}}}, "`options.subset`"),
        ({"methods": {"x": {"method": "RESU", "options": {"lengths": 3}}}}, "`options.lengths` \\(=3\\)"),
    ],
)
def test_bad_configurations_name_the_field(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(values)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("run: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    config = parse_config(small(tmp_path, methods={"still": {"method": "Static"}}, dense=False, train={"steps": 1}))
    home, _ = run(config, PATTERNS)
    broken = next((home / "cells").iterdir())
    for text in ("{", json.dumps({"other": 1})):
        broken.write_text(text)
        with pytest.raises(DataError, match="delete it, and it is trained again"):
            run(config, PATTERNS)


SHIPPED = sorted((Path(__file__).resolve().parents[2] / "configs").glob("compare_*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_configurations(path):
    config = load_config(path)
    assert len(config.run.seeds) >= 3 and any("resu" in label for label in config.methods)


def test_a_result_is_named_by_all_settings_of_its_method(tmp_path):
    """Else a default that has changed would pass off old numbers as its own."""
    names = set()
    for options in ({}, {"alpha": 0.3}, {"alpha": 0.2}, {"every": 7}):
        config = parse_config(small(tmp_path, methods={"rigl": {"method": "RigL", "options": options}}))
        names.add(_options(config, Cell("rigl", "unstructured", 0.8, 0)))
    assert len(names) == 4 - (RigL(0.5).alpha in (0.2, 0.3))  # naming the default changes nothing
