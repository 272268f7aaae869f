"""Capture: what becomes a graph, what must not, and that nothing is lost or frozen on the way."""

from __future__ import annotations

import copy
import random
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from fxsparse.errors import CaptureError, ConfigError
from fxsparse.graph import CapturedModule, capture, provenance

X = torch.linspace(-2.0, 2.0, 24).reshape(4, 6)


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class CustomBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(self.inner(x))


class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.block(x), 0.5, self.training)


class NormThenAct(nn.BatchNorm1d):
    """A subclass as timm has it: traced through, its mode would be frozen."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OptionalMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.block(x)
        return y if mask is None else y * mask


class HarmlessOptional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, x, x, key_padding_mask=mask)[0]


class Frozen(nn.Module):
    """Runs its backbone without gradients: fx drops the context silently."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)


class Autocast(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(self.backbone(x)).float()


class Checkpointed(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint.checkpoint(self.backbone, x, use_reentrant=False))


class BakedNoise(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x) + torch.randn(6))


class BakedConstant(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(6)
        total += 1.0
        return self.head(self.backbone(x) + total)


class PythonRandom(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x) * random.random())


class KeepsState(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features.append(x)
        return self.head(self.backbone(x))


class CountsCalls(KeepsState):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(self.backbone(x))


class Branches(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        y = self.backbone(x)
        return self.head(y) if y.sum() > 1000 else self.head(-y)


class OverridesTrain(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def train(self, mode: bool = True) -> OverridesTrain:
        super().train(mode)
        self.backbone.eval()
        return self


class CodeAttribute(Frozen):
    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self.backbone(x)))


REFUSED = [
    (CustomBackward, "autograd.Function"),
    (FunctionalDropout, "train and eval"),
    (OptionalMask, "optional argument `mask`"),
    (Frozen, "no_grad"),
    (Autocast, "autocast"),
    (Checkpointed, "checkpoint"),
    (BakedNoise, "frozen into the graph"),
    (BakedConstant, "frozen into the graph"),
    (PythonRandom, "random numbers"),
    (KeepsState, "attribute `features`"),
    (CountsCalls, "attribute `calls`"),
    (Branches, "control flow"),
    (OverridesTrain, "`train`"),
    (CodeAttribute, "`code`"),
]


def trained_gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    random.seed(3)
    out = model(x)
    loss = (out * torch.linspace(1, 2, out.numel()).reshape(out.shape)).sum()
    names = [name for name, parameter in model.named_parameters()]
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names], allow_unused=True)
    return out.detach(), {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


@pytest.mark.parametrize(("kind", "reason"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_refused_models_stay_python_and_behave(kind: type[nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model = kind()
    before = dict(model.__dict__)
    captured = capture(model, (X,))
    refusal = captured.refusals[0]
    assert refusal.path == "" and reason in f"{refusal.reason}" and refusal.mend
    assert reason in str(refusal) and str(refusal).startswith("`the model` stays Python")
    assert type(captured.module) is kind
    assert captured.graphs and "" not in captured.graphs  # the Sequential inside became a graph
    for mode in (True, False):
        expected, gradients = trained_gradients(model.train(mode), X)
        found, found_gradients = trained_gradients(captured.module.train(mode), X)
        assert torch.equal(expected, found)
        assert gradients.keys() == found_gradients.keys()
        assert all(torch.equal(gradients[name], found_gradients[name]) for name in gradients)
    model.train()
    assert before.keys() == model.__dict__.keys()


@pytest.mark.parametrize(("kind", "reason"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_refused_without_example_inputs(kind: type[nn.Module], reason: str) -> None:
    captured = capture(kind())
    assert captured.graphs == () and captured.recording is None
    assert [refusal.path for refusal in captured.refusals] == [""]
    assert reason in captured.refusals[0].reason


def test_the_custom_backward_is_kept() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return StraightThrough.apply(x * self.scale)

    model = capture(Root(), (torch.ones(3),)).module
    assert not isinstance(model, CapturedModule)
    model(torch.ones(3)).sum().backward()
    assert model.scale.grad == 6  # 0 where the function was traced through


def test_subclasses_of_batch_norm_stay_leaves_in_both_modes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), NormThenAct(3), nn.Dropout(0.5)).eval()
    captured = capture(model, (X,))
    assert captured.graphs == ("",)
    calls = [node.target for node in captured.module.graph.nodes if node.op == "call_module"]
    assert calls == ["0", "1", "2"]
    captured.module.train()
    before = captured.module[1].running_mean.clone()
    captured.module(X)
    assert not torch.equal(before, captured.module[1].running_mean)
    captured.module.eval()
    after = captured.module[1].running_mean.clone()
    captured.module(X)
    assert torch.equal(after, captured.module[1].running_mean)


class Signature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(6, 6)

    def forward(self, input: Tensor, /, other: Tensor, *rest: Tensor, scale: float = 2.0, **options: Any) -> Tensor:
        return self.input(input) * scale + other


def test_signature_is_kept() -> None:
    model = Signature()
    captured = capture(model, ((X, X), {"scale": 3.0}))
    assert captured.graphs == ("",)
    for args, kwargs in (
        ((X,), {"other": X}),
        ((X, X), {"scale": 5.0}),
        ((X, X, X, X), {}),
        ((X,), {"other": X, "unknown": 1}),
    ):
        assert torch.equal(captured.module(*args, **kwargs), model(*args, **kwargs))
    with pytest.raises(TypeError):
        captured.module(X)
    with pytest.raises(TypeError):
        captured.module(input=X, other=X)


def test_an_optional_argument_that_changes_nothing_in_the_graph() -> None:
    model = HarmlessOptional().eval()
    captured = capture(model, (X[:, None],))
    assert captured.graphs == ("",)
    mask = torch.zeros(1, 4, dtype=torch.bool)
    mask[0, 3] = True
    assert torch.equal(captured.module(X[:, None], mask=mask), model(X[:, None], mask=mask))
    assert torch.equal(captured.module(X[:, None]), model(X[:, None]))


class TypeTest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 6)

    def forward(self, x: Any) -> Tensor:
        if isinstance(x, tuple):
            x = x[0]
        return self.l(x)


class TensorTest(TypeTest):
    def forward(self, x: Any) -> Tensor:
        return self.l(x) if isinstance(x, Tensor) else self.l(x) * 0.0


def test_type_tests_on_inputs_need_example_inputs() -> None:
    alone = capture(TypeTest())
    assert alone.graphs == () and "type test on `x`" in alone.refusals[0].reason
    assert capture(TypeTest(), (X,)).graphs == ("",)
    silent = capture(TensorTest(), (X,))  # decided wrongly on a proxy, without any exception
    assert silent.graphs == () and "behaves differently" in silent.refusals[0].reason


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.bag = [self.head.weight]  # a reference beside the tree
        self.register_buffer("shift", torch.ones(7), persistent=False)
        self.register_buffer("scale", torch.ones(7))
        self.unused = nn.Linear(2, 2)
        self.note = "kept"

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids)) * self.scale + self.shift

    def encode(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)

    @property
    def width(self) -> int:
        return self.embedding.embedding_dim


def test_everything_of_the_module_is_kept_and_shared() -> None:
    model = Tied()
    captured = capture(model, (torch.arange(4),)).module
    assert isinstance(captured, CapturedModule) and captured.origin is Tied
    assert list(captured.state_dict()) == list(model.state_dict())
    assert "shift" not in captured.state_dict()
    for (name, p), (other, q) in zip(model.named_parameters(), captured.named_parameters(), strict=True):
        assert name == other and p is q
    assert all(b is c for b, c in zip(model.buffers(), captured.buffers(), strict=True))
    assert [name for name, _ in captured.named_modules()] == [name for name, _ in model.named_modules()]
    assert captured.head.weight is captured.embedding.weight is captured.bag[0]
    assert captured.note == "kept" and captured.width == 6
    assert torch.equal(captured.encode(torch.arange(2)), model.encode(torch.arange(2)))
    assert captured.embedding is not model.embedding  # containers are fresh: edits do not reach the caller's model
    with pytest.raises(AttributeError):
        captured.no_such_thing  # noqa: B018  # the access is the test


def test_deepcopy_and_pickle_round_trips(tmp_path: Any) -> None:
    import pickle

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    captured = capture(model, (X,)).module
    node = next(node for node in captured.graph.nodes if node.op == "call_module")
    provenance.stamp(node, "a pass", "touched it", "0")
    copied = copy.deepcopy(captured)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in captured.parameters()}
    shared = copy.deepcopy(captured, {id(p): p for p in captured.parameters()})
    assert all(p is q for p, q in zip(shared.parameters(), captured.parameters(), strict=True))
    torch.save(captured, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copied, shared, loaded, pickle.loads(pickle.dumps(captured)), copy.copy(captured)):
        assert isinstance(other, CapturedModule) and other.training
        assert [str(n) for n in other.graph.nodes] == [str(n) for n in captured.graph.nodes]
        assert any("a pass" in str(provenance.read(n)) for n in other.graph.nodes)
        assert torch.equal(other.eval()(X), captured.eval()(X))
        captured.train()
    copied[0].weight.data.zero_()
    assert captured[0].weight.abs().sum() > 0


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool1d(x, 2)


def test_functions_that_pickle_does_not_find_by_name_round_trip() -> None:
    import pickle

    captured = capture(Pooled(), (X,)).module
    loaded = pickle.loads(pickle.dumps(captured))
    assert isinstance(loaded, CapturedModule) and [n.name for n in loaded.graph.nodes] == [
        n.name for n in captured.graph.nodes
    ]
    assert torch.equal(loaded(X), captured(X))


class SparseTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, sparse=True)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1))


def test_sparse_gradients_are_compared() -> None:
    captured = capture(SparseTable(), (torch.tensor([[1, 2], [2, 6]]),))
    assert isinstance(captured.module, CapturedModule)


def test_sequential_stays_indexable() -> None:
    captured = capture(nn.Sequential(nn.Linear(6, 4), nn.ReLU())).module
    assert len(captured) == 2 and isinstance(captured[0], nn.Linear)
    assert [type(m) for m in captured] == [nn.Linear, nn.ReLU]


def test_root_hooks_stay() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU())
    model.register_forward_hook(lambda module, args, output: output + 10)
    captured = capture(model, (X,))
    assert captured.graphs == ("",)
    assert torch.equal(captured.module(X), model(X)) and captured.module(X).min() >= 10


class Hooked(nn.Module):
    """A hook that closes over the model itself, as feature extractors do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
        self.features: list[Tensor] = []
        self.net[1].register_forward_hook(lambda module, args, output: self.features.append(output))

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        return self.net(x) + self.features[0].mean()


def test_inner_hooks_still_run_on_the_copy() -> None:
    model = Hooked()
    captured = capture(model, (X,))
    assert torch.equal(captured.module(X), model(X))
    assert len(model.features) == 1 and len(captured.module.features) == 1
    assert captured.graphs == ("net", "net.1")  # the hooked part is a leaf of the graph around it, and a graph itself


class Scale(nn.Module):
    """A layer of the user's: parameters and no modules."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class BranchingScale(Scale):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel if x.sum() < 1e9 else x


def test_layers_stay_nodes_so_that_later_hooks_run() -> None:
    model = nn.Sequential(Scale(), nn.Sequential(Scale(), nn.Tanh()), BranchingScale())
    for captured in (capture(model, (X,)), capture(model)):
        fired: list[str] = []
        assert captured.graphs == ("", "0", "1.0")
        assert [refusal.path for refusal in captured.refusals] == ["2"]
        for path in ("0", "1.0", "2"):
            hook = partial(lambda fired, path, module, args, output: fired.append(path), fired, path)
            captured.module.get_submodule(path).register_forward_hook(hook)
        assert torch.equal(captured.module(X), model(X)) and fired == ["0", "1.0", "2"]


def test_modules_that_are_alike_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = sys.modules["fxsparse.graph.capture"], []
    honest = module.trace
    monkeypatch.setattr(module, "trace", lambda root: seen.append(root) or honest(root))
    model = nn.Sequential(*[Scale() for _ in range(4)])
    model[2].factor = 2  # an attribute of its own: traced on its own
    captured = capture(model, (X,))
    assert captured.graphs == ("", "0", "1", "2", "3") and len(seen) == 3
    graphs = [captured.module.get_submodule(path).graph for path in ("0", "1", "3")]
    assert len({id(graph) for graph in graphs}) == 3
    assert torch.equal(captured.module(X), model(X))


class ReadsGradMode(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(x)
        return self.head(x) if torch.is_grad_enabled() else self.head(x) * 2


class AsksGradMode(Frozen):
    """Reads it and does the same either way."""

    def forward(self, x: Tensor) -> Tensor:
        torch.is_grad_enabled()
        return self.head(self.backbone(x))


def test_reads_of_the_gradient_mode_are_noticed() -> None:
    before = torch.is_grad_enabled
    for example in (None, (X,)):
        captured = capture(ReadsGradMode(), example)
        assert "" not in captured.graphs and "with and without gradients" in captured.refusals[0].reason
        assert capture(AsksGradMode(), example).graphs == ("",)
    assert torch.is_grad_enabled is before and "training" not in nn.Module.__dict__


class HidesItsMode(Frozen):
    """A class attribute in front of the flag."""

    training = True

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.backbone(x), 0.5, self.training))


def test_a_mode_that_is_read_past_the_guard_is_seen() -> None:
    captured = capture(HidesItsMode())
    assert captured.graphs == () and "train and eval" in captured.refusals[0].reason


class WrongParts(nn.Module):
    """Two of six submodules become graphs that are wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([TensorTest() if i in (1, 4) else nn.Sequential(nn.Linear(6, 6)) for i in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x) if x.sum() < 1e9 else x
        return x


@pytest.mark.parametrize("compare", [True, False])
def test_wrong_graphs_are_found_among_right_ones(compare: bool) -> None:
    model = WrongParts()
    captured = capture(model, (X,), compare=compare)
    assert captured.compared is compare
    if not compare:  # for callers who find the difference themselves: then they capture anew
        assert len(captured.graphs) == 6
        captured = capture(model, (X,), known=captured)
    assert captured.graphs == ("parts.0", "parts.2", "parts.3", "parts.5")
    found = [refusal.path for refusal in captured.refusals if "behaves differently" in refusal.reason]
    assert found == ["parts.1", "parts.4"]
    assert torch.equal(captured.module(X), model(X))


class Unsteady(Frozen):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        Unsteady.count += 1
        return self.head(self.backbone(x)) + Unsteady.count


def test_a_model_that_never_repeats_itself_stays_python() -> None:
    captured = capture(Unsteady(), (X,))
    assert captured.graphs == () and "does not repeat itself" in captured.refusals[0].reason


class Parts(nn.Module):
    """Python around two graphs, one submodule that never runs and one whose graph would be wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2)])
        self.again = self.blocks[0]
        self.idle = nn.Sequential(nn.Linear(6, 6))
        self.test = TensorTest()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if x.sum() < 1e9:
                x = block(x)
        return self.test(self.again(x))


def test_the_largest_submodules_become_graphs() -> None:
    model = Parts()
    captured = capture(model, (X,))
    assert captured.graphs == ("blocks.0", "blocks.1")
    assert captured.module.again is captured.module.blocks[0]
    reasons = {refusal.path: refusal.reason for refusal in captured.refusals}
    assert "did not run" in reasons["idle"] and "behaves differently" in reasons["test"]
    assert torch.equal(captured.module(X), model(X))
    assert list(captured.module.state_dict()) == list(model.state_dict())


def test_graphs_are_not_specialised_to_the_sample() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(6, 3)
            self.register_buffer("bias", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.l(x.reshape(x.shape[0], -1)) + self.bias.expand(x.size(0), -1)

    model = Flat()
    captured = capture(model, (torch.randn(2, 2, 3),)).module
    assert isinstance(captured, CapturedModule)
    x = torch.randn(5, 2, 3)
    assert torch.equal(captured(x), model(x))
    model.bias.add_(1)  # buffers are read, not frozen
    assert torch.equal(captured(x), model(x))
    model = model.double()
    assert captured.l.weight.dtype == torch.float64 and captured(x.double()).dtype == torch.float64


def test_parametrized_layers_are_leaves_and_keep_their_keys() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 4)), nn.ReLU())
    captured = capture(model, (X,))
    assert captured.graphs == ("",)
    assert list(captured.module.state_dict()) == list(model.state_dict())
    assert torch.equal(captured.module(X), model(X))


def test_the_seed_of_devices_that_nothing_has_used_yet_stays_the_callers() -> None:
    torch.manual_seed(5)
    waiting = torch.cuda._lazy_seed_tracker.get_calls()
    assert waiting or torch.cuda.is_initialized()
    capture(Branches(), (X,))
    after = torch.cuda._lazy_seed_tracker.get_calls()
    assert len(after) == len(waiting) and all(a is b for a, b in zip(after, waiting, strict=True))


def test_nothing_global_or_of_the_callers_changes() -> None:
    model = Branches().eval()
    model.head.bias.requires_grad_(False)
    model.backbone[0].weight.grad = torch.ones(6, 6)
    state = torch.get_rng_state(), random.getstate(), torch.is_grad_enabled()
    apply = torch.autograd.Function.__dict__["apply"]
    x = X.clone()
    for example in (None, (x,)):
        capture(model, example)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1:] == (random.getstate(), torch.is_grad_enabled())
    assert torch.autograd.Function.__dict__["apply"] is apply
    assert not model.training and not model.backbone.training and not model.head.bias.requires_grad
    assert torch.equal(model.backbone[0].weight.grad, torch.ones(6, 6)) and model.head.weight.grad is None
    assert torch.equal(x, X) and type(model) is Branches and not isinstance(model.backbone, CapturedModule)


def test_capturing_twice_changes_nothing() -> None:
    once = capture(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), (X,)).module
    twice = capture(once, (X,))
    assert twice.graphs == ("",) and isinstance(twice.module, CapturedModule)
    assert twice.module.code == once.code and twice.module is not once


def test_a_root_that_torch_made_becomes_a_graph() -> None:
    captured = capture(nn.Linear(6, 4), (X,))
    assert captured.graphs == ("",)
    assert [node.target for node in captured.module.graph.nodes if node.op == "get_attr"] == ["weight", "bias"]


def test_typed_errors() -> None:
    with pytest.raises(CaptureError, match=r"`model` \(=int\)"):
        capture(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"`example_inputs` \(=Tensor\)"):
        capture(nn.Linear(6, 4), X)
    with pytest.raises(CaptureError, match="fails on `example_inputs`"):
        capture(nn.Linear(6, 4), (torch.ones(2, 5),))
    with pytest.raises(CaptureError, match="parameter `0.weight` has no shape yet"):
        capture(nn.Sequential(nn.LazyLinear(3)), (X,))

    class Locked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 4)
            self.inner.lock = (i for i in range(3))  # type: ignore[assignment]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    with pytest.raises(CaptureError, match="`inner.lock` cannot be copied"):
        capture(Locked(), (X,))
