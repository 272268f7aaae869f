"""The recorder: every use of every parameter, and no trace left behind."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxsparse.errors import CaptureError
from fxsparse.graph import isolated_clone, record, structural_clone


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.q, self.k = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 4))
        self.gain = nn.Parameter(torch.randn(5, 1))
        self.idle = nn.Parameter(torch.zeros(2, 2))
        self.low, self.high = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 4))
        self.latents = nn.Parameter(torch.randn(3, 4))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.embedding(ids))
        joint = F.linear(x, torch.cat([self.q, self.k]) * self.gain)
        update = F.linear(x, self.embedding.weight + self.low @ self.high)
        return self.normed(self.head(x)) + joint + update + self.linear(self.latents).sum()


def uses(model: nn.Module, *args: Any) -> dict[str, list[tuple[str, str, str, tuple[str, ...], int | None]]]:
    found: dict[str, list[tuple[str, str, str, tuple[str, ...], int | None]]] = {}
    for use in record(model, args).uses:
        found.setdefault(use.parameter, []).append((use.op, use.argument, use.module, use.derived, use.macs))
    return found


def test_every_use_is_told() -> None:
    found = uses(Everything(), torch.arange(5)[None])
    assert found["linear.weight"] == [
        ("linear", "weight", "linear", (), 5 * 16),
        ("linear", "weight", "linear", (), 3 * 16),  # the second call reads learned inputs
    ]
    assert found["linear.bias"][0] == ("linear", "bias", "linear", (), 0)
    assert found["embedding.weight"] == [
        ("embedding", "1", "embedding", (), 0),
        ("linear", "weight", "", ("matmul", "add"), 5 * 20),
        ("linear", "weight", "head", (), 5 * 20),
    ]
    assert found["q"] == [("linear", "weight", "", ("cat", "mul"), 5 * 12)]
    assert found["k"] == [("linear", "weight", "", ("cat", "mul"), 5 * 8)]
    assert found["gain"] == [("linear", "weight", "", ("cat", "mul"), 0)]
    assert found["low"][0] == ("matmul", "input", "", (), 5 * 2 * 4)
    assert found["high"][0] == ("matmul", "other", "", (), 0)  # the MACs of a product of two parameters count once
    direction, magnitude = "normed.parametrizations.weight.original1", "normed.parametrizations.weight.original0"
    assert found[direction] == [("linear", "weight", "normed", ("_weight_norm",), 5 * 25)]
    assert found[magnitude][0][4] == 0


def test_owners_aliases_shapes_and_unused() -> None:
    recording = record(Everything(), (torch.arange(5)[None],))
    assert recording.unused == ("idle",)
    tied = recording.of("embedding.weight")[-1]
    assert (tied.owner, tied.module) == ("embedding", "head")
    assert (tied.weight_shape, tied.input_shape, tied.output_shape) == ((5, 4), (1, 5, 4), (1, 5, 5))
    assert recording.calls["linear"] == 2 and "idle" not in recording.calls
    learned = recording.of("linear.weight")[1]
    assert learned.input_shape is None and learned.output_shape == (3, 4)
    assert len({use.call for use in recording.uses if use.op == "linear" and use.module == "linear"}) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype(dtype: torch.dtype) -> None:
    found = uses(Everything().to(dtype), torch.arange(5)[None])
    assert found["q"] == [("linear", "weight", "", ("cat", "mul"), 5 * 12)]


def test_meta_device_and_autocast() -> None:
    with torch.device("meta"):
        model = Everything()
        ids = torch.empty(1, 5, dtype=torch.long)
    assert uses(model, ids) == uses(Everything(), torch.arange(5)[None])
    with torch.autocast("cpu", torch.bfloat16):
        assert uses(Everything(), torch.arange(5)[None]).keys() == uses(model, ids).keys()


class Messy(nn.Module):
    """Changes everything that a forward pass can change."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4, max_norm=0.1)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.zeros(()))
        self.calls, self.seen, self.fail = 0, [], fail

    def forward(self, ids: Tensor, box: dict[str, Tensor]) -> Tensor:
        self.steps += 1
        self.calls += 1
        self.seen.append(1)
        self.scale.data.mul_(2.0)
        self.scale.requires_grad_(False)
        box["x"].add_(1)
        self.eval()
        torch.rand(1)
        random.random()
        x = self.norm(self.embedding(ids)) * self.scale + box["x"]
        if self.fail:
            raise ValueError("broken on purpose")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_nothing_is_changed_also_when_the_model_raises(fail: bool) -> None:
    model = Messy(fail)
    model.embedding.weight.grad = torch.ones(5, 4)
    hooks: list[Any] = []
    model.norm.register_forward_hook(lambda m, i, o: hooks.append(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    box = {"x": torch.zeros(4)}
    state = torch.get_rng_state(), random.getstate()
    if fail:
        with pytest.raises(CaptureError, match="ValueError: broken on purpose"):
            record(model, (torch.arange(5), box))
    else:
        recording = record(model, (torch.arange(5), box))
        assert set(recording.written) == {"embedding.weight", "scale"}
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == random.getstate()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert identities == [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    assert (model.calls, model.seen) == (0, []) and torch.equal(box["x"], torch.zeros(4))
    assert model.training and model.norm.training and model.scale.requires_grad
    assert torch.equal(model.embedding.weight.grad, torch.ones(5, 4)) and model.scale.grad is None
    assert len(model.norm._forward_hooks) == 1 and not model.norm._forward_pre_hooks
    assert torch.is_grad_enabled() and not torch.overrides._get_current_function_mode_stack()


def test_scripted_modules_are_opaque() -> None:
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Linear(4, 4))
    recording = record(nn.Sequential(scripted, nn.Linear(4, 2)), (torch.randn(2, 4),))
    assert recording.opaque == ("0",)
    assert [use.parameter for use in recording.uses] == ["1.weight", "1.bias"]


def test_packed_sequences() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]), batch_first=True)
            return self.rnn(packed)[1]

    found = record(Packed(), (torch.randn(2, 4, 3),)).of("rnn.weight_ih_l0")
    assert [use.macs for use in found] == [6 * 18]  # six time steps over both sequences


def test_structural_clone_shares_tensors_and_nothing_else() -> None:
    model = Everything()
    model.partial = {"weight": model.q}  # type: ignore[assignment]
    clone = structural_clone(model)
    assert all(p is q for p, q in zip(model.parameters(), clone.parameters(), strict=True))
    assert clone.partial["weight"] is model.q and clone.partial is not model.partial
    assert clone.linear is not model.linear
    clone.linear = nn.Linear(1, 1)
    assert model.linear.in_features == 4


def test_isolated_clone_aliases_values_without_gradients_and_hooks() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].weight.grad = torch.ones(2, 3)
    fired: list[int] = []
    model[0].weight.register_hook(lambda gradient: fired.append(1))
    clone = isolated_clone(model, copied=("0.bias",))
    assert clone[0].weight is not model[0].weight and clone[0].weight.grad is None
    assert clone[0].weight.data_ptr() == model[0].weight.data_ptr()
    assert clone[0].bias.data_ptr() != model[0].bias.data_ptr()
    assert clone[1].running_mean.data_ptr() != model[1].running_mean.data_ptr()
    torch.autograd.grad(clone(torch.randn(4, 3)).sum(), list(clone.parameters()))
    assert not fired


def test_torch_graph_modules_keep_hooks_and_buffer_persistence() -> None:
    inner = nn.Sequential(nn.Linear(3, 2))
    inner.register_buffer("temporary", torch.ones(1), persistent=False)
    graph = torch.fx.symbolic_trace(inner)
    graph.register_buffer("temporary", torch.ones(1), persistent=False)
    graph.register_forward_hook(lambda module, args, output: output + 5)
    model = nn.Sequential(graph)
    clone = structural_clone(model)
    x = torch.randn(2, 3)
    assert torch.equal(clone(x), model(x))
    assert list(clone.state_dict()) == list(model.state_dict())


def test_scripted_parameters_stay_leaves_in_copies() -> None:
    with pytest.warns(DeprecationWarning):
        model = nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    clone = isolated_clone(model)
    assert clone[0] is not model[0] and structural_clone(model)[0] is model[0]
    assert all(parameter.is_leaf for parameter in clone.parameters())
    assert [p.requires_grad for p in clone.parameters()] == [True, False, True, True]


def test_weights_read_under_vmap_are_slices_of_their_parameters() -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights, self.biases = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6))

        def forward(self, x: Tensor) -> Any:
            def member(weight: Tensor, bias: Tensor) -> Tensor:
                return x @ weight + bias

            return torch.func.vmap(member)(self.weights, self.biases)

    recording = record(Ensemble(), (torch.randn(2, 4),))
    assert recording.unused == ()
    product, shift = recording.uses
    assert (product.parameter, product.op, product.derived) == ("weights", "matmul", ("getitem",))
    assert (product.weight_shape, product.input_shape, product.macs) == ((4, 6), (2, 4), None)
    assert (shift.parameter, shift.op, shift.derived) == ("biases", "add", ("getitem",))
