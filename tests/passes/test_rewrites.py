"""The four rewrites on their own: what they do to graphs and trees, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxsparse.errors import PassError
from fxsparse.graph import CapturedModule, capture, provenance
from fxsparse.nn import (
    SPARSE_TYPES,
    Guard,
    MaskSpec,
    Resurrection,
    Route,
    SparseModule,
    masked_weight,
    masked_weights,
    masks,
    set_masks,
)
from fxsparse.nn import Linear as SparseLinear
from fxsparse.passes import PASSES, FoldMasks, InsertMasks, MaskEffective, MaskParameters, SwapModules, graphs_of
from fxsparse.sparsity import Layout, NByM
from fxsparse.testing import blocks

MODULE = MaskSpec(route=Route.MODULE)
NODE = MaskSpec(route=Route.MASK_NODE)
PARAMETER = MaskSpec(route=Route.PARAMETER, guard=Guard.GRADIENT)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def captured(model: nn.Module) -> nn.Module:
    return capture(model.double()).module


X = (torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4),)


def test_passes_are_listed() -> None:
    assert PASSES == (SwapModules, InsertMasks, MaskEffective, MaskParameters, FoldMasks)


@pytest.mark.parametrize("kind", SPARSE_TYPES, ids=lambda kind: kind.__name__)
def test_every_type_is_swapped_with_everything_that_belongs_to_it(kind: type[nn.Module]) -> None:
    args = (4, 6) if kind is nn.Linear else (4, 6, 3)
    layer = kind(*args, bias=False).double().eval()
    layer.note = "kept"
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(layer, nn.ReLU())
    x = (torch.randn(2, 4, *(7,) * (layer.weight.ndim - 2), dtype=torch.float64),)
    result = SwapModules({"0.weight": MaskSpec(NByM(1, 2), Layout())})(model, x)
    swapped = result.module[0]
    assert type(swapped) is SPARSE_TYPES[kind] and isinstance(swapped, kind) and type(model[0]) is kind
    assert swapped.weight is layer.weight and swapped.bias is None and swapped.note == "kept"
    assert not swapped.training and swapped.mask_spec.pattern == NByM(1, 2)
    calls.clear()
    assert torch.equal(result.module(*x), model(*x)) and calls == [1, 1]
    assert result.verification.compared == ("eval", "train")
    assert [record.target for record in result.records] == ["0.weight"]


def test_a_module_at_two_places_is_swapped_once() -> None:
    layer = nn.Linear(4, 4)
    model = captured(nn.Sequential(layer, nn.ReLU(), layer))
    result = SwapModules({"0.weight": MODULE, "2.weight": MODULE})(model, X)
    first, last = result.module.get_submodule("0"), result.module.get_submodule("2")
    assert first is last and isinstance(first, SparseLinear)
    assert set(masks(result.module)) == {"0.weight"}
    calls = [node for node in graphs_of(result.module)[""].graph.nodes if node.op == "call_module"]
    stamped = [node for node in calls if provenance.read(node) is not None]
    assert [str(node.target) for node in calls] == ["0", "1", "2"] or len(calls) == 3
    assert len(stamped) == 2 and all(provenance.read(node).pass_name == "swap_modules" for node in stamped)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwapModules({"nope.weight": MODULE}), "swap_modules: `nope.weight` is not a parameter"),
        (lambda: SwapModules({"1.weight": MODULE}), "belongs to a LayerNorm, which is not exactly one of Linear"),
        (lambda: SwapModules({"0.bias": MODULE}), "which is not exactly one of"),
        (lambda: SwapModules({"0.weight": NODE}), "must be Route.MODULE"),
        (lambda: InsertMasks({"0.weight": NODE}), "insert_masks: `0.weight` is read by no graph"),
        (lambda: InsertMasks({"0.weight": MODULE}), "must be Route.MASK_NODE"),
        (lambda: InsertMasks({"0.wait": NODE}), "is not a parameter"),
        (lambda: MaskParameters({"0.weight": MODULE}), "must be Guard.GRADIENT"),
        (lambda: MaskParameters({"9.weight": PARAMETER}), "is not a parameter"),
        (lambda: MaskParameters({"0.weight": MaskSpec(guard=Guard.GRADIENT)}), "it has no mask yet"),
    ],
)
def test_refusals_name_pass_and_weight(make, message: str) -> None:
    model = captured(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    with pytest.raises(PassError, match=message):
        make()(model)
    assert not masks(model)


def test_the_root_cannot_be_swapped() -> None:
    with pytest.raises(PassError, match="belongs to the root"):
        SwapModules({"weight": MODULE})(nn.Linear(4, 4))


def test_a_subclass_is_not_swapped() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(PassError, match="belongs to a Doubled"):
        SwapModules({"0.weight": MODULE})(nn.Sequential(Doubled(4, 4)))


def test_mask_nodes_stand_between_the_weight_and_all_its_readers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.kernel) @ self.kernel.t() + self.kernel.sum()

    model = captured(Net())
    result = InsertMasks({"kernel": NODE})(model, X)
    graph = graphs_of(result.module)[""].graph
    read, mask = graph.find_nodes(op="get_attr")
    (masked,) = graph.find_nodes(op="call_function", target=masked_weight)
    assert masked.args == (read, mask) and mask.target == "kernel_mask" and list(read.users) == [masked]
    assert len(masked.users) == 3
    for node in (mask, masked):
        record = provenance.read(node)
        assert (record.pass_name, record.source) == ("insert_masks", "kernel")
    with pytest.raises(PassError, match="`kernel` has a mask already"):
        InsertMasks({"kernel": NODE})(result.module)


def test_weights_of_submodules_are_masked_beside_them_in_the_graph_that_runs_them() -> None:
    model = captured(nn.Sequential(blocks.FunctionalLinear(4, 3), nn.ReLU()))
    result = InsertMasks({"0.kernel": NODE})(model, X)
    assert isinstance(result.module, CapturedModule)
    assert "0.kernel_mask" in result.module.state_dict()
    assert result.module.get_submodule("0").kernel_mask.all()


def test_a_guarded_parameter_masks_its_gradient_in_the_result_and_copies() -> None:
    model = blocks.PythonLinear(4, 3).double()
    result = MaskParameters({"kernel": PARAMETER})(model, X)
    sparse = result.module
    mask = torch.rand(3, 4) < 0.5
    set_masks(sparse, {"kernel": mask})
    sparse(*X).sum().backward()
    assert torch.equal(sparse.kernel.grad != 0, mask)


def test_a_swapped_module_can_be_guarded_too() -> None:
    model = captured(blocks.TiedTranspose(4, 3))
    swapped = SwapModules({"encode.weight": MODULE})(model).module
    guarded = MaskParameters({"encode.weight": MaskSpec(guard=Guard.GRADIENT)})(swapped, X)
    assert guarded.modified and guarded.module.encode.mask_spec.guard is Guard.GRADIENT
    assert guarded.module.encode.mask_spec.route is Route.MODULE
    assert swapped.encode.mask_spec.guard is Guard.FORWARD


def test_fold_is_idempotent_and_leaves_models_without_masks_alone() -> None:
    model = captured(nn.Sequential(nn.Linear(4, 4)))
    result = FoldMasks()(model, X)
    assert not result.modified and result.records == ()


def test_fold_removes_all_three_routes_at_once() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), blocks.FunctionalLinear(4, 4), blocks.PythonLinear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.b(self.a(x)))

    model = capture(Net().double(), X).module
    for made in (
        SwapModules({"a.weight": MODULE}),
        InsertMasks({"b.kernel": NODE}),
        MaskParameters({"c.kernel": PARAMETER}),
    ):
        model = made(model, X).module
    set_masks(model, {name: torch.rand(mask.shape) < 0.5 for name, mask in masks(model).items()})
    result = FoldMasks()(model, X)
    assert {record.target for record in result.records} == {"a.weight", "b.kernel", "c.kernel"}
    assert not masks(result.module) and type(result.module.a) is nn.Linear
    assert all(p is q for p, q in zip(result.module.parameters(), model.parameters(), strict=True))
    assert not any(isinstance(module, SparseModule) for module in result.module.modules())
    assert not any(name.endswith("_mask") for name in result.module.state_dict())
    assert set(masks(model)) == {"a.weight", "b.kernel", "c.kernel"}


def test_fold_does_not_write_even_a_sign_into_the_input() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    sparse = SwapModules({"0.weight": MODULE})(model).module
    set_masks(sparse, {"0.weight": torch.eye(4, dtype=torch.bool)})
    with torch.no_grad():
        sparse[0].weight[0, 1] = -0.0
    folded = FoldMasks()(sparse).module
    assert sparse[0].weight[0, 1].signbit() and not folded[0].weight[0, 1].signbit()
    assert folded[0].bias is sparse[0].bias


def test_fold_refuses_a_resurrection_phase() -> None:
    model = nn.Sequential(SparseLinear(4, 4, mask=torch.eye(4, dtype=torch.bool)))
    Resurrection(masked_weights(model)["0.weight"]).enter()
    with pytest.raises(PassError, match="fold_masks: .*resurrection phase"):
        FoldMasks()(model)


def test_fold_replaces_a_parameter_in_the_list_of_a_recurrent_layer_too() -> None:
    model = nn.LSTM(4, 3).double()
    sparse = MaskParameters({"weight_ih_l0": PARAMETER})(model).module
    set_masks(sparse, {"weight_ih_l0": torch.rand(12, 4) < 0.5})
    with torch.no_grad():
        sparse.weight_ih_l0[~masks(sparse)["weight_ih_l0"]] = -0.0
    folded = FoldMasks()(sparse, X).module
    assert folded.weight_ih_l0 is not sparse.weight_ih_l0
    assert folded._flat_weights[0] is folded.weight_ih_l0
    assert sparse._flat_weights[0] is sparse.weight_ih_l0
