"""Ticket files: round trip, identity, and every corruption refused with the model untouched."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from fxsparse.errors import ConfigError, TicketError
from fxsparse.lottery import Ticket, load_ticket, save_ticket, sha256_json
from fxsparse.lottery.canonical import sha256_file
from fxsparse.lottery.prunable import ensure_masks, prunable_names
from fxsparse.lottery.ticket_file import ticket_id
from fxsparse.nn import masks, set_masks
from fxsparse.sparsity import Mask, tensor_sha256
from tests.lottery.nets import Tiny


def _model(seed: int = 0, density: float = 0.5) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Tiny()
        ensure_masks(model, prunable_names(model))
        set_masks(model, {name: torch.rand(mask.shape) < density for name, mask in masks(model).items()})
    return model


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def ticket(tmp_path: Path) -> Ticket:
    model = _model()
    weights = _state(Tiny())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    for name, mask in masks(model).items():
        with torch.no_grad():
            model.get_parameter(name).masked_fill_(~mask, 0)
    return save_ticket(
        model,
        tmp_path / "a.ticket",
        weights=weights,
        optimizer=optimizer,
        lineage={"round": 1, "seed": 3},
        metrics={"accuracy": 0.5},
        input_signature=(torch.zeros(4, 6),),
    )


def test_round_trip(ticket: Ticket) -> None:
    model = Tiny()
    untouched = _state(model)
    assert ticket.apply(model) is model
    for name, tensor in ticket.weights.items():
        dead = ~ticket.masks[name] if name in ticket.masks else torch.zeros_like(tensor, dtype=torch.bool)
        assert torch.equal(model.state_dict()[name], tensor.masked_fill(dead, 0))
        assert name in untouched
    for name, mask in ticket.masks.items():
        assert torch.equal(masks(model)[name], mask)
        assert 0 < int(mask.sum()) < mask.numel()
    assert ticket.final is not None
    other = ticket.apply(Tiny(), final=True)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in ticket.final.items())
    assert set(ticket.optimizer["fc.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    assert ticket.metrics == {"accuracy": 0.5} and ticket.lineage["seed"] == 3
    assert ticket.example_inputs(5)[0].shape == (5, 6)


def test_files_are_two_and_not_pickles(ticket: Ticket) -> None:
    assert sorted(path.name for path in ticket.path.iterdir()) == ["manifest.json", "tensors.safetensors"]
    text = (ticket.path / "manifest.json").read_text()
    manifest = json.loads(text)
    assert list(manifest) == sorted(manifest) and manifest["format"] == "fxsparse.ticket"
    assert manifest["version"] == "1.0"
    assert manifest["files"] == [
        {
            "name": "tensors.safetensors",
            "bytes": (ticket.path / "tensors.safetensors").stat().st_size,
            "sha256": sha256_file(ticket.path / "tensors.safetensors"),
        }
    ]
    for row in manifest["masks"]:
        assert row["sha256"] == Mask(ticket.masks[row["name"]]).sha256(row["name"])
    for row in manifest["weights"]["tensors"]:
        assert row["sha256"] == tensor_sha256(row["name"], ticket.weights[row["name"]])
    stored = load_file(ticket.path / "tensors.safetensors")
    assert stored["mask/fc.weight"].dtype is torch.uint8 and stored["mask/fc.weight"].numel() == 16
    assert {key.split("/")[0] for key in stored} == {"mask", "init", "final", "optim"}


def test_the_id_is_the_hash_of_the_content(ticket: Ticket, tmp_path: Path) -> None:
    manifest = dict(ticket.manifest)
    for key in ("ticket_id", "metrics", "environment", "files"):
        del manifest[key]
    assert ticket.ticket_id == sha256_json(manifest)
    same = save_ticket(_model(), tmp_path / "b.ticket")
    assert same.ticket_id == save_ticket(_model(), tmp_path / "c.ticket", metrics={"x": 1}).ticket_id
    assert same.ticket_id != save_ticket(_model(1), tmp_path / "d.ticket").ticket_id
    assert same.ticket_id != save_ticket(_model(), tmp_path / "e.ticket", lineage={"round": 1}).ticket_id


def test_the_id_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from tests.lottery.test_ticket import _model; from fxsparse.lottery import save_ticket;"
        "print(save_ticket(_model(), sys.argv[1]).ticket_id)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "77")
    }
    assert found == {save_ticket(_model(), tmp_path / "here").ticket_id}


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 99),
)
def test_any_shape_and_dtype(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    import tempfile

    from fxsparse.lottery.ticket import install_parameter_mask

    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    install_parameter_mask(model, "w")
    mask = torch.rand(shape, generator=generator) < 0.5
    set_masks(model, {"w": mask})
    with tempfile.TemporaryDirectory() as directory:
        back = load_ticket(save_ticket(model, Path(directory) / "t").path)
    assert torch.equal(back.masks["w"], mask)
    assert torch.equal(back.weights["w"], model.w.detach()) and back.weights["w"].dtype is dtype


def test_tied_parameters_are_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight

    model = Tied()
    ensure_masks(model, prunable_names(model))
    set_masks(model, {"two.weight": torch.eye(4, dtype=torch.bool)})
    ticket = save_ticket(model, tmp_path / "t")
    assert ticket.manifest["weights"]["aliases"] == {"two.weight": "one.weight"}
    assert set(ticket.masks) == {"one.weight"} and set(ticket.weights) == {"one.weight", "one.bias", "two.bias"}
    fresh = ticket.apply(Tied())
    assert fresh.two.weight is fresh.one.weight and int((fresh.two.weight != 0).sum()) == 4
    untied = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    with pytest.raises(TicketError, match=r"two\.weight"):
        ticket.apply(untied)


def test_apply_to_masked_and_plain_models(ticket: Ticket) -> None:
    for model in (_model(5), Tiny(), _model(6, density=1.0)):
        buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("_mask")}
        parameters = dict(model.named_parameters())
        ticket.apply(model)
        assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
        assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())
        model(torch.randn(8, 6)).square().sum().backward()
        for name, mask in ticket.masks.items():
            gradient = model.get_parameter(name).grad
            assert gradient is not None and not gradient[~mask].any() and gradient[mask].any()


def _refused(ticket: Ticket, model: nn.Module, match: str, **options: Any) -> None:
    before, kinds = _state(model), {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(TicketError, match=match):
        ticket.apply(model, **options)
    after = _state(model)
    assert set(after) == set(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_models_that_do_not_fit(ticket: Ticket, tmp_path: Path) -> None:
    wider = Tiny()
    wider.fc = nn.Linear(18, 8)
    _refused(ticket, wider, r"`shape` of tensor `fc.bias` \(=\[7\]\)|`shape` of tensor `fc.weight`")
    _refused(ticket, Tiny().double(), r"`dtype` of tensor")
    renamed = Tiny()
    renamed.head = renamed.out
    del renamed.out
    _refused(ticket, renamed, r"`out\.bias` is not in the model")
    more = Tiny()
    more.extra = nn.Linear(2, 2)
    _refused(ticket, more, r"`extra\.bias` is not in the ticket")
    masked = Tiny()
    ensure_masks(masked, ("bn.weight", "fc.weight"))
    _refused(ticket, masked, r"`bn\.weight` has no mask in the ticket")
    slim = save_ticket(_model(), tmp_path / "slim.ticket")
    _refused(slim, Tiny(), "no `final` weights", final=True)


def test_a_mask_that_breaks_the_models_pattern(ticket: Ticket) -> None:
    from fxsparse.nn import MaskSpec, install_mask
    from fxsparse.sparsity import NByM

    model = Tiny()
    install_mask(model.fc, "weight", MaskSpec(NByM(1, 2)))
    _refused(ticket, model, r"fc\.weight")


# Corruptions: each takes the ticket's directory and damages it; `seal` makes the outer hashes fit again, so that the
# inner checks are what refuses.


def _seal(path: Path, manifest: dict[str, Any]) -> None:
    file = path / "tensors.safetensors"
    manifest["files"] = [{"name": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}]
    manifest["ticket_id"] = ticket_id(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def _edit(path: Path, edit: Callable[[dict[str, Any]], None], seal: bool = True) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    edit(manifest)
    if seal:
        _seal(path, manifest)
    else:
        (path / "manifest.json").write_text(json.dumps(manifest))


def _retensor(
    path: Path, edit: Callable[[dict[str, torch.Tensor]], None], metadata: dict[str, str] | None = None
) -> None:
    tensors = load_file(path / "tensors.safetensors")
    edit(tensors)
    save_file(tensors, path / "tensors.safetensors", metadata or {"format": "fxsparse.ticket"})
    _seal(path, json.loads((path / "manifest.json").read_text()))


def _flip(path: Path, file: str, index: int) -> None:
    content = bytearray((path / file).read_bytes())
    content[index] ^= 1
    (path / file).write_bytes(content)


def _rename_tensor(path: Path, new: str) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[new] = tensors.pop("init/fc.bias")

    _retensor(path, edit)


def _rename_everywhere(path: Path, new: str) -> None:
    def tensors(values: dict[str, torch.Tensor]) -> None:
        for kind in ("init", "final"):
            values[f"{kind}/{new}"] = values.pop(f"{kind}/fc.bias")

    def manifest(values: dict[str, Any]) -> None:
        next(row for row in values["weights"]["tensors"] if row["name"] == "fc.bias")["name"] = new

    _retensor(path, tensors)
    _edit(path, manifest)


def _set(*keys: Any, value: Any) -> Callable[[Path], None]:
    def edit(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value

    return lambda path: _edit(path, edit)


def _remove(*keys: Any) -> Callable[[Path], None]:
    def edit(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return lambda path: _edit(path, edit)


def _padding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mask/fc.weight"][-1] |= 0x80


def _bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["mask/fc.weight"][0] ^= 1


def _swap_bits(tensors: dict[str, torch.Tensor]) -> None:
    """Another mask with the same count."""
    bits = Mask.unpack(tensors["mask/fc.weight"], [7, 18]).tensor.reshape(-1)
    alive, dead = int(bits.nonzero()[0]), int((~bits).nonzero()[0])
    bits[alive], bits[dead] = False, True
    tensors["mask/fc.weight"] = Mask(bits).pack()


def _assign(key: str, index: int, value: float) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].reshape(-1)[index] = value

    return lambda path: _retensor(path, edit)


def _tensor(key: str, value: torch.Tensor | None) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value

    return lambda path: _retensor(path, edit)


def _truncate(path: Path, file: str, keep: int) -> None:
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[:keep])


def _truncated_and_sealed(path: Path) -> None:
    _truncate(path, "tensors.safetensors", -4)
    _seal(path, json.loads((path / "manifest.json").read_text()))


def _offsets(path: Path) -> None:
    """Two tensors of the header on the same bytes."""
    file = path / "tensors.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["init/fc.bias"]["data_offsets"] = header["init/bn.bias"]["data_offsets"]
    text = json.dumps(header).encode().ljust(length)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    _seal(path, json.loads((path / "manifest.json").read_text()))


CORRUPTIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no directory": (shutil.rmtree, "no ticket directory"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "manifest.json.*cannot be read"),
    "no tensors": (lambda p: (p / "tensors.safetensors").unlink(), "tensors.safetensors.*cannot be read"),
    "renamed file": (lambda p: (p / "tensors.safetensors").rename(p / "t.safetensors") and None, "cannot be read"),
    "truncated tensors": (lambda p: _truncate(p, "tensors.safetensors", -1), r"`bytes` \(="),
    "empty tensors": (lambda p: _truncate(p, "tensors.safetensors", 0), r"`bytes` \(=0\)"),
    "truncated and sealed": (_truncated_and_sealed, "header is damaged"),
    "overlapping offsets": (_offsets, "header is damaged"),
    "flipped bit in a tensor": (lambda p: _flip(p, "tensors.safetensors", -1), "`sha256`"),
    "flipped bit in the header": (lambda p: _flip(p, "tensors.safetensors", 12), "`sha256`"),
    "truncated manifest": (lambda p: _truncate(p, "manifest.json", 200), "not valid JSON"),
    "empty manifest": (lambda p: _truncate(p, "manifest.json", 0), "not valid JSON"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_text("[]") and None, "`format`"),
    "manifest is no text": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe") and None, "not valid JSON"),
    "NaN in the manifest": (lambda p: _edit(p, lambda m: m["metrics"].update(x=float("nan")), False), "not valid JSON"),
    "other format": (_set("format", value="zip"), "`format`"),
    "unknown major": (_set("version", value="2.0"), r"`version` \(='2.0'\)"),
    "edited without seal": (lambda p: _edit(p, lambda m: m["lineage"].update(round=9), False), "`ticket_id`"),
    "id of another": (lambda p: _edit(p, lambda m: m.update(ticket_id="0" * 64), False), "`ticket_id`"),
    "missing field": (_remove("weights", "aliases"), "missing or of the wrong type"),
    "missing lineage": (_remove("lineage"), "missing or of the wrong type"),
    "no id": (lambda p: _edit(p, lambda m: m.pop("ticket_id") and None, False), "`ticket_id` is missing"),
    "no list of files": (lambda p: _edit(p, lambda m: m.pop("files") and None, False), "`files` is missing"),
    "no metrics": (_remove("metrics"), "missing or of the wrong type"),
    "environment is no object": (_set("environment", value="x"), "`environment` .*must be an object"),
    "signature is text": (_set("model", "input_signature", value="x"), "missing or of the wrong type"),
    "signature of another dtype": (
        _set("model", "input_signature", value=[{"shape": [None, 6], "dtype": "load"}]), r"`dtype` \(='load'\)"
    ),
    "alive is a truth": (_set("masks", 0, "alive", value=True), "`alive`.*out of range"),
    "masks are no list": (_set("masks", value=3), "missing or of the wrong type"),
    "wrong kind": (_set("weights", "kind", value="dense"), "`weights.kind`"),
    "wrong alive": (_set("masks", 1, "alive", value=1), r"mask `fc.weight`: `alive`"),
    "alive out of range": (_set("masks", 1, "alive", value=127), "`alive`.*out of range"),
    "wrong numel": (_set("masks", 1, "numel", value=125), "mask `fc.weight`"),
    "wrong mask shape": (_set("masks", 1, "shape", value=[18, 7]), "mask `fc.weight`"),
    "negative shape": (_set("masks", 1, "shape", value=[-7, -18]), "`shape`"),
    "wrong weight shape": (_set("weights", "tensors", 1, "shape", value=[3, 1]), "tensor `conv.bias`"),
    "big-endian label": (_set("weights", "tensors", 1, "dtype", value=">f4"), r"`dtype` \(='>f4'\)"),
    "big-endian metadata": (
        lambda p: _retensor(p, lambda t: None, {"format": "fxsparse.ticket", "byteorder": "big"}),
        "little-endian",
    ),
    "wrong dtype": (_set("weights", "tensors", 1, "dtype", value="float64"), "tensor `conv.bias`"),
    "wrong tensor hash": (_set("weights", "tensors", 1, "sha256", value="0" * 64), "tensor `conv.bias`: `sha256`"),
    "hash is no hash": (_set("weights", "tensors", 1, "sha256", value="x"), "is no hash"),
    "padding bit": (lambda p: _retensor(p, _padding), "mask `fc.weight`.*[Pp]adding"),
    "mask bit": (lambda p: _retensor(p, _bit), "mask `fc.weight`: `alive`"),
    "other mask of equal count": (lambda p: _retensor(p, _swap_bits), "mask `fc.weight`: `sha256`"),
    "mask too short": (_tensor("mask/fc.weight", torch.zeros(15, dtype=torch.uint8)), "mask `fc.weight`"),
    "mask not packed": (_tensor("mask/fc.weight", torch.zeros(7, 18)), "mask `fc.weight`"),
    "mask missing": (_tensor("mask/fc.weight", None), "`mask/fc.weight` is missing"),
    "weight missing": (_tensor("init/fc.bias", None), "`init/fc.bias` is missing"),
    "final missing": (_tensor("final/fc.bias", None), "`final/fc.bias` is missing"),
    "value changed": (_assign("init/fc.bias", 0, 5.0), "`fc.bias`: `sha256`"),
    "NaN weight": (_assign("init/fc.bias", 0, float("nan")), r"`fc.bias` holds NaN or Inf \(=1"),
    "infinite final": (_assign("final/fc.bias", 0, float("inf")), r"`fc.bias` holds NaN or Inf"),
    "infinite moment": (_assign("optim/fc.bias/exp_avg", 0, float("inf")), r"NaN or Inf"),
    "float64 final": (_tensor("final/fc.bias", torch.zeros(7).double()), "`fc.bias`"),
    "unknown tensor": (_tensor("init/other", torch.zeros(1)), "`init/other` is unknown"),
    "unknown kind": (_tensor("extra/fc.bias", torch.zeros(7)), "`extra/fc.bias` is unknown"),
    "moment of no parameter": (_tensor("optim/nope/exp_avg", torch.zeros(1)), "`optim/nope/exp_avg` is unknown"),
    "moment with a path": (_tensor("optim/fc.bias/../exp_avg", torch.zeros(1)), "is unknown"),
    "renamed tensor": (lambda p: _rename_tensor(p, "init/fc.bias2"), "is missing"),
    "path-like name": (lambda p: _rename_everywhere(p, "../x"), r"'\.\./x' is not a parameter name"),
    "absolute name": (lambda p: _rename_everywhere(p, "/etc/x"), "is not a parameter name"),
    "dotted name": (lambda p: _rename_everywhere(p, "..x"), "is not a parameter name"),
    "backslash name": (lambda p: _rename_everywhere(p, "a\\b"), "is not a parameter name"),
    "empty name": (_set("masks", 0, "name", value=""), "is not a parameter name"),
    "mask twice": (lambda p: _edit(p, lambda m: m["masks"].append(m["masks"][0])), "stands twice"),
    "mask without weight": (_set("masks", 0, "name", value="nope"), "a mask has no weight: 'nope'"),
    "alias to nothing": (_set("weights", "aliases", value={"a": "b"}), "aliases"),
    "file outside": (
        lambda p: _edit(
            p, lambda m: m["files"][0].update(name="../../etc/passwd"), False
        ),
        "`files`.*must list tensors.safetensors",
    ),
    "no files": (lambda p: _edit(p, lambda m: m.update(files=[]), False), "`files`"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_corruptions_are_refused_and_named(name: str, ticket: Ticket) -> None:
    damage, match = CORRUPTIONS[name]
    damage(ticket.path)
    with pytest.raises(TicketError, match=match) as caught:
        load_ticket(ticket.path)
    assert str(ticket.path) in str(caught.value)


def test_the_seal_of_these_tests_is_not_what_refuses(ticket: Ticket) -> None:
    _retensor(ticket.path, lambda tensors: None)
    _edit(ticket.path, lambda manifest: None)
    assert load_ticket(ticket.path).ticket_id == ticket.ticket_id


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_flipped_bit_is_found(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        path = save_ticket(_model(), Path(directory) / "t").path
        file = path / data.draw(st.sampled_from(["tensors.safetensors", "manifest.json"]))
        content = bytearray(file.read_bytes())
        index = data.draw(st.integers(0, len(content) - 1))
        content[index] ^= 1 << data.draw(st.integers(0, 7))
        file.write_bytes(content)
        manifest = json.loads((path / "manifest.json").read_bytes()) if file.suffix != ".json" else None
        try:
            found = load_ticket(path)
        except TicketError:
            return
        # only what the id leaves out may differ: metrics, environment, white space
        assert manifest is None and found.ticket_id == save_ticket(_model(), Path(directory) / "u").ticket_id


def test_lineage_and_nesting_against_the_parent(tmp_path: Path) -> None:
    parent = save_ticket(_model(0, density=0.5), tmp_path / "parent")
    child_model = _model(0, density=0.5)
    set_masks(child_model, {name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in parent.masks.items()})
    child = save_ticket(child_model, tmp_path / "child", lineage={"parent": parent.ticket_id})
    assert load_ticket(child.path, parent).ticket_id == child.ticket_id
    stranger = save_ticket(_model(1), tmp_path / "stranger", lineage={"parent": parent.ticket_id})
    with pytest.raises(TicketError, match=r"mask `conv.weight` is not a subset"):
        load_ticket(stranger.path, parent)
    orphan = save_ticket(child_model, tmp_path / "orphan")
    with pytest.raises(TicketError, match=r"`parent` \(=None\)"):
        load_ticket(orphan.path, parent)


def test_saving_refuses_what_reading_would(tmp_path: Path) -> None:
    model = _model()
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(TicketError, match=r"`fc.bias` holds NaN or Inf \(=1"):
        save_ticket(model, tmp_path / "t")
    with pytest.raises(ConfigError, match="no masks"):
        save_ticket(Tiny(), tmp_path / "t")
    with pytest.raises(TicketError, match="`weights` lack tensor"):
        save_ticket(_model(), tmp_path / "t", weights={})
    wrong = copy.deepcopy(_state(Tiny()))
    wrong["fc.bias"] = torch.zeros(3)
    with pytest.raises(TicketError, match="fc.bias"):
        save_ticket(_model(), tmp_path / "t", weights=wrong)
    assert not list(tmp_path.iterdir())
    save_ticket(_model(), tmp_path / "t")
    before = sha256_file(tmp_path / "t" / "manifest.json")
    with pytest.raises(TicketError, match="exists already"):
        save_ticket(_model(1), tmp_path / "t")
    assert sha256_file(tmp_path / "t" / "manifest.json") == before


def test_building_the_model(tmp_path: Path) -> None:
    from fxsparse.models import lenet_300_100

    model = lenet_300_100(16, 3)
    ensure_masks(model, prunable_names(model))
    arguments = {"in_features": 16, "classes": 3}
    ticket = save_ticket(model, tmp_path / "t", factory="fxsparse.models:lenet_300_100", arguments=arguments)
    state = torch.get_rng_state()
    built = ticket.apply(ticket.build())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(built.get_parameter("fc1.weight"), model.fc1.weight)
    for factory in (None, "os:system", "fxsparse.models:__import__", "fxsparse.models:nope", "fxsparse.models.x:y"):
        other = save_ticket(model, tmp_path / f"t{factory}".replace(":", "_"), factory=factory)
        with pytest.raises(TicketError, match="factory"):
            other.build()
    with pytest.raises(TicketError, match="input_signature"):
        ticket.example_inputs()
