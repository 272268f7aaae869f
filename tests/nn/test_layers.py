"""Every argument of every layer against its torch original, bit for bit."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import fxsparse.nn as fnn
from fxsparse.errors import ConfigError
from fxsparse.sparsity import Block, Channel, Layout, NByM, SharedSupport, Unstructured

KINDS = tuple(fnn.SPARSE_TYPES.items())
IDS = [dense.__name__ for dense, _ in KINDS]


def arguments(axes: int) -> list[dict]:
    """Arguments for a convolution from 4 to 6 channels."""
    sizes = {1: (3,), 2: (3, 2), 3: (3, 2, 1)}[axes]
    cases = [
        dict(kernel_size=3),
        dict(kernel_size=sizes),
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=3, padding=2, dilation=2),
        dict(kernel_size=3, groups=2, bias=False),
        dict(kernel_size=1, stride=3),
        dict(kernel_size=3, padding="same"),
        dict(kernel_size=2, padding="same", dilation=3),
        dict(kernel_size=3, padding="valid"),
        dict(kernel_size=3, dtype=torch.float64),
    ]
    modes = ("reflect", "replicate", "circular")
    cases += [dict(kernel_size=3, padding=1, padding_mode=mode) for mode in modes]
    cases += [dict(kernel_size=3, padding="same", padding_mode="circular", groups=2)]
    return cases


def transposed_arguments() -> list[dict]:
    return [
        dict(kernel_size=3),
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=3, stride=2, padding=1, output_padding=1),
        dict(kernel_size=3, dilation=2, groups=2),
        dict(kernel_size=2, stride=3, bias=False),
        dict(kernel_size=3, dtype=torch.float64),
        dict(kernel_size=3, padding_mode="zeros"),
    ]


def cases() -> list:
    found = [(nn.Linear, (5, 7), kwargs, (3, 5)) for kwargs in ({}, {"bias": False}, {"dtype": torch.float64})]
    found += [(nn.Linear, (5, 7), {}, (5,)), (nn.Linear, (5, 7), {}, (2, 3, 5))]
    for axes, dense in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
        shape = (2, 4, 9, 8, 7)[: 2 + axes]
        found += [(dense, (4, 6), kwargs, shape) for kwargs in arguments(axes)]
        found += [(dense, (4, 6), {"kernel_size": 3}, shape[1:])]
    for axes, dense in ((1, nn.ConvTranspose1d), (2, nn.ConvTranspose2d), (3, nn.ConvTranspose3d)):
        found += [(dense, (4, 6), kwargs, (2, 4, 5, 4, 3)[: 2 + axes]) for kwargs in transposed_arguments()]
    return found


def run(module: nn.Module, input: torch.Tensor, *extra: object) -> list[torch.Tensor]:
    """Output and all gradients for a loss that weighs every output entry differently."""
    input = input.detach().clone().requires_grad_()
    output = module(input, *extra)
    weights = torch.arange(1, output.numel() + 1, dtype=output.dtype).reshape(output.shape) / output.numel()
    module.zero_grad()
    (output * weights).sum().backward()
    return [output.detach(), input.grad, *(parameter.grad.clone() for parameter in module.parameters())]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel:UserWarning"
)  # torch's, for its own layer too
@pytest.mark.parametrize(("dense_type", "sizes", "kwargs", "shape"), cases())
def test_full_mask_equals_torch_and_half_mask_equals_zeroed_torch(dense_type, sizes, kwargs, shape):
    kind = fnn.SPARSE_TYPES[dense_type]
    torch.manual_seed(1)
    dense = dense_type(*sizes, **kwargs)
    torch.manual_seed(1)
    sparse = kind(*sizes, **kwargs)
    assert isinstance(sparse, dense_type)
    assert torch.equal(sparse.weight, dense.weight)  # the same draws in the same order
    input = torch.randn(shape, dtype=kwargs.get("dtype", torch.float32))
    reference = run(dense, input)
    assert_same(run(sparse, input), reference)
    taken = kind.from_dense(dense)
    assert_same(run(taken, input), reference)

    mask = torch.rand(dense.weight.shape) < 0.5
    mask.view(-1)[:2] = torch.tensor([True, False])
    fnn.set_masks(taken, {"weight": mask})
    twin = copy.deepcopy(dense)
    with torch.no_grad():
        twin.weight.copy_(torch.where(mask, twin.weight, torch.zeros(())))
    expected = run(twin, input)
    index = 2  # output, input gradient, then the weight's
    expected[index] = torch.where(mask, expected[index], torch.zeros((), dtype=expected[index].dtype))
    assert_same(run(taken, input), expected)
    assert taken.weight is dense.weight


@pytest.mark.parametrize("kind", [fnn.ConvTranspose1d, fnn.ConvTranspose2d, fnn.ConvTranspose3d])
def test_output_size(kind):
    axes = int(kind.__name__[-2])
    dense = kind.dense_type(4, 6, 3, stride=2, padding=1)
    input = torch.randn((2, 4, 5, 4, 3)[: 2 + axes])
    sparse = kind.from_dense(dense)
    size = [2 * extent for extent in input.shape[2:]]
    assert sparse(input, output_size=size).shape[2:] == torch.Size(size)
    assert_same(run(sparse, input, size), run(dense, input, size))
    assert_same(run(sparse, input, tuple(size)), run(dense, input, size))
    with pytest.raises(ValueError, match="output size"):
        sparse(input, output_size=[99] * axes)


@pytest.mark.parametrize(("dense_type", "kind"), KINDS, ids=IDS)
def test_constructors_take_torch_arguments_in_torch_order(dense_type, kind):
    theirs = list(inspect.signature(dense_type.__init__).parameters.values())
    ours = list(inspect.signature(kind.__init__).parameters.values())
    assert [p.name for p in ours] == [*(p.name for p in theirs), "pattern", "mask"]
    assert [p.default for p in ours[: len(theirs)]] == [p.default for p in theirs]
    assert list(inspect.signature(kind.forward).parameters) == list(inspect.signature(dense_type.forward).parameters)


def test_torch_refusals_stay():
    with pytest.raises(ValueError, match="groups"):
        fnn.Conv2d(4, 6, 3, groups=0)
    with pytest.raises(ValueError, match="padding_mode"):
        fnn.Conv2d(4, 6, 3, padding_mode="mirror")
    with pytest.raises(ValueError, match="zeros"):
        fnn.ConvTranspose2d(4, 6, 3, padding_mode="circular")
    with pytest.raises(ValueError, match="strided"):
        fnn.Conv1d(4, 6, 3, padding="same", stride=2)


def test_constructor_takes_mask_device_dtype():
    mask = torch.rand(7, 5) < 0.4
    layer = fnn.Linear(5, 7, device="meta", dtype=torch.bfloat16, mask=mask)
    assert layer.weight.is_meta and layer.weight_mask.is_meta and layer.weight.dtype is torch.bfloat16
    assert layer(torch.empty(3, 5, device="meta", dtype=torch.bfloat16)).shape == (3, 7)
    assert "density=?" in repr(layer)
    layer = fnn.Linear(5, 7, mask=mask)
    assert torch.equal(layer.weight_mask, mask) and layer.weight_mask is not mask
    assert torch.equal(layer.weight == 0, ~mask)


def test_constructor_checks_the_mask():
    with pytest.raises(ConfigError, match=r"torch.float32.*bool"):
        fnn.Linear(5, 7, mask=torch.ones(7, 5))
    with pytest.raises(ConfigError, match=r"\(5, 7\).*\(7, 5\)"):
        fnn.Linear(5, 7, mask=torch.ones(5, 7, dtype=torch.bool))
    broken = torch.eye(8, dtype=torch.bool)
    with pytest.raises(ConfigError, match="weight.*NByM"):
        fnn.Linear(8, 8, pattern=NByM(2, 4), mask=broken)
    with pytest.raises(ConfigError):
        fnn.Linear(6, 8, pattern=NByM(2, 4))  # does not divide


def test_full_mask_is_legal_in_every_pattern():
    for pattern in (NByM(2, 4), Block(2, 2), Channel(0), SharedSupport(2)):
        layer = fnn.Linear(8, 8, pattern=pattern)
        fnn.set_masks(layer, {"weight": torch.ones(8, 8, dtype=torch.bool)})
        assert layer.mask_spec.pattern == pattern


def test_layouts():
    assert fnn.layout_of(nn.Linear(2, 3)) == Layout.linear()
    assert fnn.layout_of(nn.Conv2d(4, 4, 1, groups=2)) == Layout.conv(2)
    assert fnn.layout_of(nn.ConvTranspose2d(4, 4, 1, groups=2)) == Layout.conv_transpose(2)
    attention = nn.MultiheadAttention(4, 2)
    assert fnn.layout_of(attention.out_proj) == Layout.linear()
    with pytest.raises(ConfigError, match="BatchNorm1d"):
        fnn.layout_of(nn.BatchNorm1d(3))
    assert fnn.ConvTranspose2d(4, 6, 3, groups=2).mask_spec.layout == Layout.conv_transpose(2)
    assert type(attention.out_proj) not in fnn.SPARSE_TYPES


def test_from_dense_refuses_subclasses():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    for module in (Scaled(2, 3), nn.MultiheadAttention(4, 2).out_proj, nn.Conv1d(1, 1, 1), fnn.Linear(2, 3)):
        with pytest.raises(ConfigError, match=type(module).__name__):
            fnn.Linear.from_dense(module)
    with pytest.raises(ConfigError, match="not initialised"):
        fnn.install_mask(nn.LazyLinear(3), "weight")


def test_from_dense_takes_over_everything():
    dense = nn.Linear(4, 3, dtype=torch.float64)
    dense.eval()
    dense.tag = ["kept"]
    dense.register_buffer("scale", torch.ones(2))
    dense.register_buffer("scratch", torch.ones(2), persistent=False)
    calls = []
    dense.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    dense.register_forward_pre_hook(lambda module, args, kwargs: calls.append("pre"), with_kwargs=True)
    loads = []
    dense.register_load_state_dict_pre_hook(lambda module, *rest: loads.append(type(module)))
    dense.bias.requires_grad_(False)
    before = {key: (value.copy() if isinstance(value, dict) else value) for key, value in dense.__dict__.items()}
    sparse = fnn.Linear.from_dense(dense)
    assert sparse.weight is dense.weight and sparse.bias is dense.bias and not sparse.bias.requires_grad
    assert not sparse.training and sparse.tag is dense.tag and sparse.scale is dense.scale
    assert "scratch" not in sparse.state_dict()
    sparse(torch.randn(2, 4, dtype=torch.float64))
    assert calls == ["pre", fnn.Linear]
    sparse.load_state_dict(sparse.state_dict())
    assert loads == [fnn.Linear]
    assert list(dense.__dict__) == list(before) and all(dense.__dict__[key] == before[key] for key in before)
    assert list(sparse.state_dict()) == ["weight", "bias", "scale", "weight_mask"]


@pytest.mark.parametrize(("dense_type", "kind"), KINDS, ids=IDS)
def test_to_dense_returns_the_plain_class(dense_type, kind):
    sizes = (4, 6) if dense_type is nn.Linear else (4, 6, 3)
    sparse = kind(*sizes)
    sparse.eval().tag = 3
    mask = torch.rand(sparse.weight.shape) < 0.5
    fnn.set_masks(sparse, {"weight": mask})
    with torch.no_grad():
        sparse.weight[~mask] = 7.0  # someone wrote to dead entries: the forward does not see it, nor must the dense one
    input = torch.randn((2, 4) if dense_type is nn.Linear else (2, 4, 9, 8, 7)[: sparse.weight.ndim])
    expected = sparse(input)
    dense = sparse.to_dense()
    assert type(dense) is dense_type and dense.weight is sparse.weight and dense.tag == 3 and not dense.training
    assert torch.equal(dense(input), expected)
    assert list(dense.state_dict()) == list(dense_type(*sizes).state_dict())
    assert set(dense.__dict__) == {*dense_type(*sizes).__dict__, "tag"}
    assert not dense._load_state_dict_pre_hooks and not dense._load_state_dict_post_hooks
    dense.load_state_dict(dense_type(*sizes).state_dict())
    assert dense.weight[~mask].abs().sum() > 0  # a dense module again
    assert "weight_mask" in sparse.state_dict()


def test_reset_parameters_keeps_dead_weights_zero():
    mask = torch.rand(6, 4) < 0.5
    for layer in (fnn.Linear(4, 6, mask=mask), fnn.Conv2d(4, 6, 1, mask=mask[:, :, None, None])):
        old = layer.weight.detach().clone()
        layer.reset_parameters()
        assert not torch.equal(old, layer.weight)
        assert torch.equal((layer.weight == 0).reshape(6, 4), ~mask)
    layer = fnn.ConvTranspose1d(4, 6, 1, mask=mask.T[:, :, None].contiguous())
    layer.reset_parameters()
    assert torch.equal((layer.weight == 0)[:, :, 0], ~mask.T)


def test_repr_names_density_and_pattern():
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, :2] = True
    text = repr(fnn.Linear(8, 4, pattern=SharedSupport(2), mask=mask))
    assert text.startswith("Linear(in_features=8, out_features=4, bias=True, density=0.25, pattern=SharedSupport(")


def test_channels_last_weights_keep_their_kernels():
    dense = nn.Conv2d(8, 8, 3, padding=1).to(memory_format=torch.channels_last)
    sparse = fnn.Conv2d.from_dense(dense)
    assert sparse.weight_mask.stride() == dense.weight.stride()
    assert sparse.effective_weight.stride() == dense.weight.stride()
    input = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    assert_same(run(sparse, input), run(dense, input))
    moved = fnn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    assert moved.effective_weight.stride() == moved.weight.stride()


def test_deepcopy_and_pickle_are_independent():
    mask = torch.rand(6, 4) < 0.5
    layer = fnn.Linear(4, 6, pattern=Unstructured(), mask=mask)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
    for other in copies:
        assert other.mask_spec == layer.mask_spec and other.weight is not layer.weight
        assert torch.equal(other.weight_mask, mask)
        fnn.set_masks(other, {"weight": torch.zeros(6, 4, dtype=torch.bool)})
        assert torch.equal(layer.weight_mask, mask)
        other.load_state_dict(nn.Linear(4, 6).state_dict())
        assert not other.weight.any()


def test_half_double_and_device_moves_keep_the_mask_bool():
    mask = torch.rand(6, 4) < 0.5
    layer = fnn.Linear(4, 6, mask=mask)
    buffer = layer.weight_mask
    for move in (lambda m: m.double(), lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu")):
        move(layer)
        assert layer.weight_mask is buffer and buffer.dtype is torch.bool
        assert layer.effective_weight.dtype is layer.weight.dtype
        assert torch.equal(layer.effective_weight == 0, ~mask | (layer.weight == 0))
