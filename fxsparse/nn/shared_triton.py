"""Linear products with shared supports on CUDA by fused Triton kernels: gather and product in one, no gathered copy.

The input gradient needs, for each position, a sum over the groups that read it. Atomic additions would make that sum
depend on the order in which programs finish, so it goes in two kernels: each group's product is written out,
[groups * k, tokens], and every position then adds up its own rows in a fixed order. The same inputs give the same bits.
Triton is imported when the first kernel runs.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fxsparse.nn.shared_kernels import Triple, constant_in_graphs

TYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None
CAPABILITY = (8, 0)
"""The oldest CUDA devices that have all the types."""

ALIGNED = 16
"""Elements to whose multiples rows are padded."""

SPREAD_BYTES = 1 << 28
"""Memory that the input gradient may take beside its result; longer batches go in slices."""


@constant_in_graphs
def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can run for tensors of this device and type; says nothing about speed."""
    if device.type != "cuda" or dtype not in TYPES or not INSTALLED or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY


def linear_forward(
    input: Tensor, values: Tensor, columns: Tensor, bias: Tensor | None = None, tile: Mapping[str, int] | None = None
) -> Tensor:
    """[B, F] -> [B, groups * G].

    Args:
        input: [B, F], any strides.
        values: Alive values [groups, G, k].
        columns: Positions of all groups, int32 [groups * k].
        bias: Added to each row, [groups * G], or None.
        tile: Sizes of the blocks; the fastest by default.
    """
    groups, group, k = values.shape
    output = input.new_empty(len(input), groups * group)
    if output.numel() == 0:
        return output
    turned, even = _turned(input), _even(values)
    arguments = {
        **dict(turned=turned, values=even, bias=even if bias is None else bias.contiguous(), columns=columns),
        **dict(output=output, **_sizes(len(input), values.shape), pitch=turned.stride(0), row=even.stride(1)),
        **dict(BIASED=bias is not None, **_arithmetic(input), BLOCK_R=_rows_block(group)),
    }
    count = groups * _blocks(group, _rows_block(group))
    _kernels().FORWARD.run(lambda meta: count * _blocks(len(input), meta["BLOCK_B"]), arguments, tile)
    return output


def linear_backward(
    gradient: Tensor,
    input: Tensor,
    values: Tensor,
    index: Triple,
    needs: Sequence[bool],
    tile: Mapping[str, int] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and values.

    Args:
        gradient: Of the output, [B, groups * G].
        input: As it was, [B, F].
        values: As they were, [groups, G, k].
        index: Columns, readers and starts.
        needs: Which of the two are needed.
        tile: Sizes of the blocks; the fastest by default.
    """
    gradient = gradient.contiguous()
    of_input = input_gradient(gradient, values, index, input.shape[1], tile) if needs[0] else None
    return of_input, weight_gradient(gradient, input, values, index[0], tile) if needs[1] else None


def input_gradient(
    gradient: Tensor, values: Tensor, index: Triple, width: int, tile: Mapping[str, int] | None = None
) -> Tensor:
    """dL/dx, [B, F], from the contiguous gradient of the output."""
    found = gradient.new_empty(len(gradient), width)
    if found.numel() == 0 or values.numel() == 0:
        return found.zero_()
    even, part = _even(values), _slice(index[0].numel(), gradient)
    for start in range(0, len(gradient), part):
        _write_gradient_(found[start : start + part], gradient[start : start + part], values.shape, even, index, tile)
    return found


def _write_gradient_(
    output: Tensor, gradient: Tensor, shape: torch.Size, even: Tensor, index: Triple, tile: Mapping[str, int] | None
) -> None:
    """The input gradient of some tokens, from the padded values."""
    groups, group, k = shape
    (tokens, width), total = output.shape, index[0].numel()
    spread = gradient.new_empty(total, _up(tokens))
    arguments = {
        **dict(gradient=gradient, values=even, spread=spread, **_sizes(tokens, shape)),
        **dict(step=gradient.stride(0), pitch=spread.stride(0), row=even.stride(1)),
        **dict(**_arithmetic(gradient), BLOCK_R=_rows_block(group)),
    }

    def programs(meta: Mapping[str, int]) -> int:
        return groups * _blocks(k, meta["BLOCK_K"]) * _blocks(tokens, meta["BLOCK_B"])

    def sums(meta: Mapping[str, int]) -> int:
        return _blocks(width, meta["BLOCK_F"]) * _blocks(tokens, meta["BLOCK_B"])

    _kernels().SPREAD.run(programs, arguments, tile)
    arguments = {
        **dict(spread=spread, readers=index[1], starts=index[2], output=output, tokens=tokens, width=width),
        **dict(total=total, pitch=spread.stride(0), bucket=tokens.bit_length()),
    }
    _kernels().COLLECT.run(sums, arguments, None if tile is None else {"BLOCK_F": tile["BLOCK_K"], **tile})


def weight_gradient(
    gradient: Tensor, input: Tensor, values: Tensor, columns: Tensor, tile: Mapping[str, int] | None = None
) -> Tensor:
    """dL/dV, [groups, G, k], from the contiguous gradient of the output.

    Few groups make few programs: the tokens are split then, and the parts added up in float32.
    """
    groups, group, k = values.shape
    tokens = len(gradient)
    if tokens == 0 or values.numel() == 0:
        return torch.zeros_like(values)
    turned = _turned(input)
    parts = _parts(tokens, groups * _blocks(group, 64) * _blocks(k, 64), gradient.device)
    span = _up(_blocks(tokens, parts))
    parts = _blocks(tokens, span)
    found = values.new_empty(parts, groups, group, k, dtype=values.dtype if parts == 1 else torch.float32)
    arguments = {
        **dict(gradient=gradient, turned=turned, columns=columns, found=found, **_sizes(tokens, values.shape)),
        **dict(step=gradient.stride(0), pitch=turned.stride(0), span=span),
        **dict(**_arithmetic(input), BLOCK_R=_rows_block(group)),
    }
    count = parts * groups * _blocks(group, _rows_block(group))
    _kernels().WEIGHTS.run(lambda meta: count * _blocks(k, meta["BLOCK_K"]), arguments, tile)
    return found[0] if parts == 1 else found.sum(0).to(values.dtype)


def _kernels() -> types.ModuleType:
    from fxsparse.nn import shared_triton_kernels

    return shared_triton_kernels


def _sizes(tokens: int, shape: torch.Size) -> dict[str, int]:
    groups, group, k = shape
    return {"tokens": tokens, "groups": groups, "group": group, "k": k, "bucket": tokens.bit_length()}


def _turned(input: Tensor) -> Tensor:
    """x^T, [F, B], in rows of multiples of 16; the input itself where it lies so."""
    if input.stride(0) == 1 and input.stride(1) % 16 == 0 and input.data_ptr() % 16 == 0:
        return input.t()
    tokens, width = input.shape
    target = input.new_empty(width, _up(tokens))
    arguments = dict(tokens=tokens, width=width, step=input.stride(0), gap=input.stride(1), pitch=target.stride(0))
    _kernels().TURN.run(
        lambda meta: _blocks(tokens, meta["BLOCK"]) * _blocks(width, meta["BLOCK"]),
        {"source": input, "target": target, **arguments},
        {"BLOCK": 64},
    )
    return target


def _even(values: Tensor) -> Tensor:
    """The values in rows of multiples of 16, zero where there is none: aligned rows are read in wide accesses."""
    missing = -values.shape[2] % ALIGNED
    return F.pad(values, (0, missing)) if missing else values.contiguous()


def _up(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _rows_block(group: int) -> int:
    """Rows of a group that one program takes: a power of two that tensor cores can multiply."""
    return min(max(1 << (group - 1).bit_length(), 16), 128)


def _arithmetic(input: Tensor) -> dict[str, object]:
    """How blocks are multiplied: float32 as torch's own products do it."""
    short = input.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if short else "ieee", "WIDE": not input.is_cuda}


def _slice(rows: int, gradient: Tensor) -> int:
    """Tokens whose spread fits into `SPREAD_BYTES`, at least one row of blocks."""
    return max(SPREAD_BYTES // max(rows * gradient.element_size(), 1) // ALIGNED * ALIGNED, ALIGNED)


def _parts(tokens: int, programs: int, device: torch.device) -> int:
    """Into how many parts tokens are split so that all processors work, each with some hundred tokens at least."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return max(min(2 * processors // max(programs, 1), tokens // 256), 1)
