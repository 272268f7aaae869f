"""What the operations between a parameter and a product do to its entries, told by their names."""

from __future__ import annotations

from collections.abc import Sequence

CONVS = tuple(f"conv{n}d" for n in (1, 2, 3))
TRANSPOSED = tuple(f"conv_transpose{n}d" for n in (1, 2, 3))

PRODUCTS = frozenset(
    (*CONVS, *TRANSPOSED, *"linear matmul mm bmm mv addmm addmv addbmm baddbmm inner tensordot einsum".split())
    + ("grouped_mm", "_grouped_mm", "multi_head_attention_forward")
)
"""Operations whose weights are sparsified by default."""

MOVES = frozenset("to float double half bfloat16 type type_as contiguous clone detach requires_grad view_as".split())
FLIPS = frozenset("t T mT transpose swapaxes swapdims".split())
PICKS = frozenset("getitem select unbind index_select split chunk narrow expand expand_as unsqueeze squeeze".split())

_PERMUTES = FLIPS | frozenset("H mH adjoint permute movedim moveaxis".split())
_RESHAPES = frozenset("view reshape reshape_as view_as flatten unflatten unsqueeze squeeze".split())
_SHUFFLES = frozenset({"flip", "roll"})
_ZERO_AT_ZERO = frozenset(
    "abs absolute sign sgn relu relu_ relu6 leaky_relu elu celu selu gelu silu hardswish softsign tanh hardshrink "
    "softshrink tanhshrink sin asin arcsin sinh asinh tan atan arctan atanh erf erfinv expm1 log1p square round "
    "floor ceil trunc fix frac positive".split()
)

KEEPS_ZEROS = (
    MOVES
    | _PERMUTES
    | PICKS
    | _RESHAPES
    | _SHUFFLES
    | _ZERO_AT_ZERO
    | frozenset(
        "cat concat concatenate stack hstack vstack tensor_split repeat tile pad mul div neg data real imag "
        "masked_fill masked_weight where tril triu dropout cpu cuda multiply divide truediv repeat_interleave "
        "broadcast_to block_diag as_strided unfold diagonal".split()
    )
)
"""Operations that leave a dead entry zero wherever it goes."""

_IN_PLACE = (
    MOVES - {"view_as"}
    | _ZERO_AT_ZERO
    | frozenset(
        "mul div neg data real imag masked_fill masked_weight where tril triu dropout cpu cuda multiply divide "
        "truediv".split()
    )
)


def mask_place(chain: Sequence[str], shape: Sequence[int]) -> int | None:
    """Behind which operation of a chain the mask of its parameter fits, entry by entry.

    Operations that keep no zeros are taken to leave each entry at its place, as element-wise ones, norms and
    standardisations do.

    Args:
        chain: The plain names of the operations from the parameter to the product; no product among them.
        shape: Shape of the parameter.

    Returns:
        An index into the chain; None where all operations keep zeros, so that no mask is needed, or where the entries
        have left their places by then.
    """
    lossy = [index for index, name in enumerate(chain) if name not in KEEPS_ZEROS]
    if not lossy or _SHUFFLES & set(chain):
        return None
    first, last = lossy[0], lossy[-1]
    if set(chain[:first]) <= _IN_PLACE and not (_PERMUTES | _RESHAPES) & set(chain[first:last]):
        stops = (index for index in range(last + 1, len(chain)) if chain[index] in _PERMUTES | _RESHAPES)
        return next(stops, len(chain)) - 1
    permutations = sum(name in _PERMUTES for name in chain)
    back = permutations % 2 == 0 if len(shape) == 2 else permutations == 0 or len(set(shape)) == len(shape)
    return len(chain) - 1 if back else None
