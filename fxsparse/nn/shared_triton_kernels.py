"""Triton kernels of the products with shared supports; imported by `fxsparse.nn.shared_triton` alone, when one runs.

They read the input feature-major, x^T [F, B]: a gathered position is then a run of neighbouring tokens instead of
single scattered elements. Sums are accumulated in float32 in a fixed order, without atomics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Tile = Mapping[str, int]
"""Sizes of the blocks that one program works on: powers of two, at least 16."""


def _multiplied_body(
    left: tl.tensor, right: tl.tensor, sums: tl.tensor, PRECISION: tl.constexpr, WIDE: tl.constexpr
) -> tl.tensor:
    """The sum of `sums` and left right; WIDE for the interpreter, which would multiply the bits of bfloat16."""
    if WIDE:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)


_multiplied: Any = triton.jit(_multiplied_body)


def _turn(
    source: tl.tensor,
    target: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    step: tl.tensor,
    gap: tl.tensor,
    pitch: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """target[f, b] = source[b, f], by squares; sizes of whole tensors need 64 bits."""
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    b = (pid // blocks) * BLOCK + tl.arange(0, BLOCK)
    f = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    read, kept = (b < tokens)[:, None] & (f < width)[None, :], (f < width)[:, None] & (b < tokens)[None, :]
    place = source + b.to(tl.int64)[:, None] * step + f.to(tl.int64)[None, :] * gap
    square = tl.load(place, mask=read, other=0.0)
    tl.store(target + f.to(tl.int64)[:, None] * pitch + b[None, :], tl.trans(square), mask=kept)


def _forward(
    turned: tl.tensor,
    values: tl.tensor,
    bias: tl.tensor,
    columns: tl.tensor,
    output: tl.tensor,
    tokens: tl.tensor,
    groups: tl.tensor,
    group: tl.tensor,
    k: tl.tensor,
    pitch: tl.tensor,
    row: tl.tensor,
    bucket: tl.tensor,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """output[b, g G + r] = bias[g G + r] + sum_j x[b, S_g[j]] V[g, r, j]; groups run fastest, they share tokens."""
    blocks = tl.cdiv(group, BLOCK_R)
    pid = tl.program_id(0)
    g = (pid % (groups * blocks)) // blocks
    r = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    b = (pid // (groups * blocks)) * BLOCK_B + tl.arange(0, BLOCK_B)
    sums = tl.zeros((BLOCK_B, BLOCK_R), tl.float32)
    for start in range(0, k, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        where = tl.load(columns + g * k + j, mask=j < k, other=0).to(tl.int64)
        read = (j < k)[:, None] & (b < tokens)[None, :]
        inputs = tl.load(turned + where[:, None] * pitch + b[None, :], mask=read, other=0.0)
        held = (r < group)[:, None] & (j < k)[None, :]
        weights = tl.load(values + (g * group + r)[:, None] * row + j[None, :], mask=held, other=0.0)
        sums = _multiplied(tl.trans(inputs), tl.trans(weights), sums, PRECISION, WIDE)
    if BIASED:
        sums += tl.load(bias + g * group + r, mask=r < group, other=0.0).to(tl.float32)[None, :]
    place = output + b.to(tl.int64)[:, None] * (groups * group) + (g * group + r)[None, :]
    tl.store(place, sums.to(output.dtype.element_ty), mask=(b < tokens)[:, None] & (r < group)[None, :])


def _spread(
    gradient: tl.tensor,
    values: tl.tensor,
    spread: tl.tensor,
    tokens: tl.tensor,
    groups: tl.tensor,
    group: tl.tensor,
    k: tl.tensor,
    step: tl.tensor,
    pitch: tl.tensor,
    row: tl.tensor,
    bucket: tl.tensor,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """spread[g k + j, b] = sum_r V[g, r, j] dy[b, g G + r]."""
    blocks = tl.cdiv(k, BLOCK_K)
    pid = tl.program_id(0)
    g = (pid % (groups * blocks)) // blocks
    j = (pid % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = (pid // (groups * blocks)) * BLOCK_B + tl.arange(0, BLOCK_B)
    sums = tl.zeros((BLOCK_K, BLOCK_B), tl.float32)
    for start in range(0, group, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        read = (b < tokens)[:, None] & (r < group)[None, :]
        place = gradient + b.to(tl.int64)[:, None] * step + (g * group + r)[None, :]
        gradients = tl.load(place, mask=read, other=0.0)
        held = (r < group)[:, None] & (j < k)[None, :]
        weights = tl.load(values + (g * group + r)[:, None] * row + j[None, :], mask=held, other=0.0)
        sums = _multiplied(tl.trans(weights), tl.trans(gradients), sums, PRECISION, WIDE)
    target = spread + (g * k + j).to(tl.int64)[:, None] * pitch + b[None, :]
    tl.store(target, sums.to(spread.dtype.element_ty), mask=(j < k)[:, None] & (b < tokens)[None, :])


def _collect(
    spread: tl.tensor,
    readers: tl.tensor,
    starts: tl.tensor,
    output: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    total: tl.tensor,
    pitch: tl.tensor,
    bucket: tl.tensor,
    BLOCK_F: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    """output[b, f] = sum of the spread rows that belong to position f, in the order of `readers`."""
    blocks = tl.cdiv(width, BLOCK_F)
    pid = tl.program_id(0)
    f = (pid % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    b = (pid // blocks) * BLOCK_B + tl.arange(0, BLOCK_B)
    first = tl.load(starts + f, mask=f < width, other=total)
    last = tl.load(starts + f + 1, mask=f + 1 < width, other=total)
    sums = tl.zeros((BLOCK_F, BLOCK_B), tl.float32)
    for i in range(0, tl.max(last - first, 0)):
        more = first + i < last
        reader = tl.load(readers + first + i, mask=more, other=0).to(tl.int64)
        read = more[:, None] & (b < tokens)[None, :]
        sums += tl.load(spread + reader[:, None] * pitch + b[None, :], mask=read, other=0.0).to(tl.float32)
    place = output + b.to(tl.int64)[:, None] * width + f[None, :]
    tl.store(place, tl.trans(sums).to(output.dtype.element_ty), mask=(b < tokens)[:, None] & (f < width)[None, :])


def _weights(
    gradient: tl.tensor,
    turned: tl.tensor,
    columns: tl.tensor,
    found: tl.tensor,
    tokens: tl.tensor,
    groups: tl.tensor,
    group: tl.tensor,
    k: tl.tensor,
    step: tl.tensor,
    pitch: tl.tensor,
    span: tl.tensor,
    bucket: tl.tensor,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """found[s, g, r, j] = sum over the s-th `span` tokens of dy[b, g G + r] x[b, S_g[j]]."""
    wide, high = tl.cdiv(k, BLOCK_K), tl.cdiv(group, BLOCK_R)
    pid = tl.program_id(0)
    j = (pid % wide) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = (pid // wide % high) * BLOCK_R + tl.arange(0, BLOCK_R)
    g = pid // (wide * high) % groups
    s = pid // (wide * high * groups)
    where = tl.load(columns + g * k + j, mask=j < k, other=0).to(tl.int64)
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    end = tl.minimum(s * span + span, tokens)
    for start in range(s * span, end, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        held = (b < end)[:, None] & (r < group)[None, :]
        place = gradient + b.to(tl.int64)[:, None] * step + (g * group + r)[None, :]
        gradients = tl.load(place, mask=held, other=0.0)
        read = (j < k)[:, None] & (b < end)[None, :]
        inputs = tl.load(turned + where[:, None] * pitch + b[None, :], mask=read, other=0.0)
        sums = _multiplied(tl.trans(gradients), tl.trans(inputs), sums, PRECISION, WIDE)
    row = ((s * groups + g) * group + r).to(tl.int64)
    kept = (r < group)[:, None] & (j < k)[None, :]
    tl.store(found + row[:, None] * k + j[None, :], sums.to(found.dtype.element_ty), mask=kept)


class Tuned:
    """A kernel with the tiles it may take: the fastest, found once per shape, type and size of batch.

    The first tile alone is taken where results must not depend on timings (`torch.use_deterministic_algorithms`) and
    by Triton's interpreter.

    Args:
        body: The function that Triton compiles.
        key: Arguments for whose values tiles are compared; their data types count, too.
        tiles: Tiles with `warps` and `stages`.
    """

    def __init__(self, body: Callable[..., None], key: list[str], tiles: tuple[Tile, ...]) -> None:
        self.plain, self.first, self._sizes = triton.jit(body), tiles[0], tiles[0].keys()
        self.tuned = triton.autotune(configs=[_config(tile) for tile in tiles], key=key)(self.plain)

    def run(self, grid: Callable[[Tile], int], arguments: Mapping[str, object], tile: Tile | None) -> None:
        """Run as many programs as `grid` says for a tile, on the device of the tensors."""
        device = next(each.device for each in arguments.values() if isinstance(each, Tensor))
        if tile is None and (triton.knobs.runtime.interpret or torch.are_deterministic_algorithms_enabled()):
            tile = self.first
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if tile is None:
                self.tuned[lambda meta: (grid(meta),)](**arguments)
            else:
                chosen = _config({name: size for name, size in tile.items() if name in self._sizes})
                self.plain[(grid(chosen.kwargs),)](**arguments, **chosen.all_kwargs())


def _config(tile: Tile) -> Any:
    sizes = {name: size for name, size in tile.items() if name.isupper()}
    return triton.Config(sizes, num_warps=tile.get("warps", 4), num_stages=tile.get("stages", 3))


def _products(*sizes: tuple[int, int, int, int]) -> tuple[Tile, ...]:
    return tuple({"BLOCK_B": b, "BLOCK_K": k, "warps": warps, "stages": stages} for b, k, warps, stages in sizes)


_SHAPE = ["bucket", "groups", "group", "k", "PRECISION"]
TURN = Tuned(_turn, [], ({"BLOCK": 64, "warps": 8},))
FORWARD = Tuned(
    _forward,
    _SHAPE,
    _products((128, 32, 4, 3), (64, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (256, 32, 8, 3), (256, 64, 8, 3)),
)
SPREAD = Tuned(
    _spread,
    _SHAPE,
    _products((64, 64, 4, 2), (128, 64, 4, 2), (128, 128, 8, 2), (256, 64, 8, 2), (128, 32, 4, 2)),
)
WEIGHTS = Tuned(
    _weights,
    _SHAPE,
    _products((64, 64, 4, 3), (32, 64, 4, 4), (64, 128, 8, 3), (128, 64, 8, 3), (32, 128, 4, 3)),
)
COLLECT = Tuned(
    _collect,
    ["bucket", "width", "total"],
    tuple({"BLOCK_F": f, "BLOCK_B": b, "warps": warps} for f, b, warps in ((32, 128, 4), (32, 64, 4), (64, 64, 8))),
)
