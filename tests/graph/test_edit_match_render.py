"""Editing, provenance, matching and rendering of graphs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxsparse.errors import CaptureError, PassError
from fxsparse.graph import (
    WeightKind,
    capture,
    diff,
    edit,
    parameter_reads,
    provenance,
    render,
    verify_match_complete,
    weight_uses,
)
from fxsparse.sparsity.layout import Layout


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.linear = nn.Parameter(torch.randn(6, 4))
        self.linear_bias = nn.Parameter(torch.randn(6))
        self.conv = nn.Parameter(torch.randn(4, 2, 3))
        self.up = nn.Parameter(torch.randn(4, 1, 2))
        self.right = nn.Parameter(torch.randn(6, 5))
        self.left = nn.Parameter(torch.randn(5, 3))
        self.einsum = nn.Parameter(torch.randn(5, 7))
        self.pair = nn.Parameter(torch.randn(2, 5, 5))
        self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(1, 5))
        self.experts = nn.Parameter(torch.randn(3, 5, 2))
        self.gamma = nn.Parameter(torch.ones(5))
        self.register_buffer("keep", torch.ones(2, 5))

    def forward(self, x: Tensor) -> Tensor:  # (3, 4)
        z = F.conv_transpose1d(F.conv1d(x[..., None].repeat(1, 1, 5), self.conv, None, 1, 1, 1, 2), self.up, groups=2)
        y = F.linear(self.inner(x), self.linear, self.linear_bias) + z.mean()
        y = (y @ self.right) * self.gamma  # (3, 5)
        w = torch.einsum("bi,io->bo", y, self.einsum).sum() + F.bilinear(y, y, self.pair).sum()
        joint = F.linear(y, torch.cat([self.a * self.keep, self.b]))  # (3, 3)
        product = torch.bmm(y[:, None], self.experts).sum()
        return torch.mm(self.left, joint).t().matmul(self.left.detach().view(5, 3)) + w + product


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def functional() -> fx.GraphModule:
    torch.manual_seed(0)
    module = capture(Functional(), (X,)).module
    assert isinstance(module, fx.GraphModule)
    return module


def test_weight_uses() -> None:
    found = [(use.parameter, use.kind, use.argument, len(use.views), use.groups) for use in weight_uses(functional())]
    kind = WeightKind
    assert found == [
        ("conv", kind.CONV, "weight", 0, 2),
        ("up", kind.CONV_TRANSPOSE, "weight", 0, 2),
        ("linear", kind.LINEAR, "weight", 0, 1),
        ("right", kind.MATMUL, "other", 0, 1),
        ("einsum", kind.EINSUM, "operand[1]", 0, 1),
        ("pair", kind.BILINEAR, "weight", 0, 1),
        ("a", kind.LINEAR, "weight", 2, 1),
        ("b", kind.LINEAR, "weight", 1, 1),
        ("experts", kind.MATMUL, "mat2", 0, 1),
        ("left", kind.MATMUL, "input", 0, 1),
        ("left", kind.MATMUL, "other", 2, 1),
    ]


def test_layouts_of_uses() -> None:
    layouts = {use.parameter: use.layout for use in reversed(weight_uses(functional()))}
    assert layouts["linear"] == Layout(0, 1)
    assert layouts["conv"] == Layout.conv(2) and layouts["up"] == Layout.conv_transpose(2)
    assert layouts["right"] == Layout(1, 0)  # x @ W: columns are outputs
    assert layouts["left"] == Layout(0, 1)  # W @ x: rows are outputs
    assert layouts["experts"] == Layout(2, 1)

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w.t()

    (use,) = weight_uses(capture(Transposed(), (X,)).module)  # type: ignore[arg-type]
    assert use.layout == Layout(0, 1) and [view.target for view in use.views] == ["t"]


def test_finding_changes_nothing() -> None:
    module = functional()
    before = [(str(node), dict(node.meta)) for node in module.graph.nodes]
    weight_uses(module)
    parameter_reads(module)
    assert before == [(str(node), dict(node.meta)) for node in module.graph.nodes]


def test_parameter_reads() -> None:
    reads = parameter_reads(functional())
    assert set(reads) == {name for name, _ in Functional().named_parameters()} - {"inner.weight", "inner.bias"}
    assert all(node.op == "get_attr" for nodes in reads.values() for node in nodes)


def test_matches_must_be_complete_and_single() -> None:
    verify_match_complete(["a", "b"], ["b", "a", "c"])
    with pytest.raises(CaptureError, match="no use found for `b`, `c`: exclude it"):
        verify_match_complete(["a", "b", "c"], ["a"])
    with pytest.raises(CaptureError, match=r"`a` \(=2 matches\) must be matched exactly once"):
        verify_match_complete(["a"], ["a", "a"])


def test_insert_replace_erase() -> None:
    module = functional()
    use = weight_uses(module)[2]
    names = {node.name for node in module.graph.nodes}
    mask = edit.insert_call(
        module.graph, torch.mul, (use.read, 2.0), pass_name="double", what="doubles", source="linear", after=use.read
    )
    assert edit.replace_uses(use.read, mask) == 1
    assert use.node.args[1] is mask and mask.args[0] is use.read
    assert [node.name for node in module.graph.nodes if node.name not in names] == [mask.name]
    assert provenance.read(mask) == provenance.Provenance("double", "doubles", "linear")
    assert str(provenance.read(mask)) == "double: doubles (from linear)"
    module.recompile()
    model = Functional()
    model.load_state_dict(module.state_dict())
    model.linear.data.mul_(2)
    torch.testing.assert_close(module(X), model(X))
    with pytest.raises(PassError, match=f"`{mask.name}` is still used by"):
        edit.erase(mask)
    edit.replace_uses(mask, use.read)
    edit.erase(mask)
    assert {node.name for node in module.graph.nodes} == names


def test_replace_uses_never_makes_a_cycle() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.neg, (x,))
    b = graph.call_function(torch.abs, (a,))
    c = graph.call_function(torch.sin, (b,))
    graph.output((x, c))
    assert edit.replace_uses(x, c) == 1  # the output only: a and b feed c
    graph.lint()
    assert a.args == (x,)


def test_inserted_targets_must_exist() -> None:
    module = functional()
    anchor = next(iter(module.graph.nodes))
    with pytest.raises(PassError, match=r"p: `target` \(=nowhere\) names no tensor"):
        edit.insert_get_attr(module, "nowhere", pass_name="p", what="w", after=anchor)
    with pytest.raises(PassError, match=r"`target` \(=linear\) names no submodule"):
        edit.insert_module_call(module, "linear", pass_name="p", what="w", after=anchor)
    node = edit.insert_get_attr(module, "keep", pass_name="p", what="w", after=anchor)
    call = edit.insert_module_call(module, "inner", (anchor,), pass_name="p", what="w", after=node)
    assert provenance.read(node) and provenance.read(call)
    with pytest.raises(ValueError, match="exactly one"):
        edit.insert_call(module.graph, torch.neg, (anchor,), pass_name="p", what="w")


def test_provenance_is_replaced_not_written_into() -> None:
    module = functional()
    node = next(iter(module.graph.nodes))
    node.meta["custom"] = {"other": 1}
    provenance.stamp(node, "first", "made")
    copied = copy.deepcopy(module)
    twin = next(iter(copied.graph.nodes))
    provenance.stamp(twin, "second", "changed")
    assert provenance.read(node) == provenance.Provenance("first", "made")
    assert provenance.read(twin) == provenance.Provenance("second", "changed")
    assert node.meta["custom"]["other"] == twin.meta["custom"]["other"] == 1


def test_provenance_survives_the_transformer_and_export() -> None:
    module = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (X,)).module
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.nodes:
        if node.op == "call_module":
            provenance.stamp(node, "made", str(node.target))
    transformed = fx.Transformer(module).transform()
    assert "made" in " ".join(str(provenance.read(node)) for node in transformed.graph.nodes)
    assert provenance.unstamped(module.graph.nodes, transformed.graph.nodes) == []
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    made = edit.insert_call(module.graph, torch.neg, (calls[0],), pass_name="negate", what="negates", after=calls[0])
    edit.replace_uses(calls[0], made)
    module.recompile()
    with torch.fx.traceback.preserve_node_meta():
        exported = torch.export.export(module, (X,))
    stamped = {node.name: provenance.read(node) for node in exported.graph.nodes if provenance.read(node)}
    assert provenance.Provenance("negate", "negates") in stamped.values()


def test_unstamped_births_are_named() -> None:
    module = functional()
    before = list(module.graph.nodes)
    with module.graph.inserting_after(before[0]):
        born = module.graph.call_function(torch.neg, (before[0],))
    assert provenance.unstamped(before, module.graph.nodes) == [born.name]


class Impure(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.steps.add_(1)
        y = x.clone()
        y.mul_(2.0)
        torch.rand_like(x)  # moves the generator
        x.sin().cos()
        F.dropout(x, 0.5)
        self.drop(x)
        return y


def test_dead_code_keeps_what_has_an_effect() -> None:
    module = capture(Impure(), (X,)).module
    assert isinstance(module, fx.GraphModule)
    dead = edit.eliminate_dead_code(module.graph)
    module.recompile()
    assert sorted(dead) == ["cos", "sin"]
    assert edit.eliminate_dead_code(module.graph) == []
    torch.manual_seed(0)
    out = module(X)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    original = Impure()
    assert torch.equal(out, original(X)) and torch.equal(state, torch.get_rng_state())
    assert module.steps == original.steps == 1


def test_lint_finds_dangling_targets() -> None:
    module = functional()
    edit.lint(module)
    read = weight_uses(module)[2].read
    read.target = "gone.weight"
    with pytest.raises(PassError, match=f"`{read.name}` refers to `gone.weight`"):
        edit.lint(module)


def test_lint_finds_disorder_and_accepts_plain_tensors() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(4)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale).relu()

    module = capture(Plain(), (X,)).module
    assert isinstance(module, fx.GraphModule)
    edit.lint(module)
    nodes = list(module.graph.nodes)
    nodes[-2].append(nodes[-3])
    with pytest.raises(PassError, match="not well formed"):
        edit.lint(module)


def test_render_shows_names_shapes_targets_density_and_provenance() -> None:
    module = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (X,)).module
    assert isinstance(module, fx.GraphModule)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask.view(-1)[:3] = True
    module[0].register_buffer("weight_mask", mask)  # type: ignore[index]
    first = next(node for node in module.graph.nodes if node.op == "call_module")
    provenance.stamp(first, "swap", "made sparse", "0")
    text = render(module, (X,))
    assert text.splitlines() == [
        "(root): graph of Sequential",
        "  %input_1 : [3, 4] = input input",
        "  %_0 : [3, 3] = self.0(%input_1)  <Linear>  # weight_mask density 0.2500; swap: made sparse (from 0)",
        "  %_1 : [3, 3] = self.1(%_0)  <ReLU>",
        "  %output : [3, 3] = return %_1",
    ]
    assert torch.equal(module(X), module(X))  # rendering ran a copy
    assert "forward" not in module.__dict__


def test_render_of_parts_and_diff() -> None:
    class Python(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) if x.sum() < 1e9 else x

    module = capture(Python(), (X,)).module
    text = render(module, (X,))
    assert text.startswith("(root): Python, Python\n\n(net): graph of Sequential\n") and "%_0 : [3, 4]" in text
    after = copy.deepcopy(module)
    assert diff(module, after) == ""
    last = [node for node in after.net.graph.nodes if node.op == "call_module"][-1]
    made = edit.insert_call(after.net.graph, torch.neg, (last,), pass_name="negate", what="negates", after=last)
    edit.replace_uses(last, made)
    changed = [line for line in diff(module, after).splitlines() if line.startswith(("+ ", "- "))]
    assert any("negate: negates" in line and "%neg = torch.neg(%_1)" in line for line in changed)
    assert any("return %neg" in line for line in changed)


class StandardisedInPlace(nn.Module):
    """A weight that one operation reads twice: its values, and its shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        return F.conv1d(x, (flat - flat.mean(1, keepdim=True)).reshape_as(self.weight))


def test_the_views_of_a_use_are_all_the_ways_to_it() -> None:
    (use,) = weight_uses(fx.symbolic_trace(StandardisedInPlace()))
    names = [getattr(view.target, "__name__", view.target) for view in use.views]
    assert names == ["flatten", "mean", "sub", "reshape_as"]
