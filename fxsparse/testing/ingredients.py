"""What generated models may be made of."""

from __future__ import annotations

import enum


class Ingredient(enum.Enum):
    """A family of things that a model may do. `nn.Linear`, plain activations and Python calls are always there."""

    CONV = "convolutions: 1-d, 2-d, strided, dilated, grouped, depthwise, transposed, all padding modes"
    NORM = "batch, layer, group and instance norms, with and without affine, subclassed, functional"
    POOL = "pooling, upsampling, channel and pixel shuffles"
    DROPOUT = "dropout modules, of elements and of channels"
    SHAPE = "reshape, flatten, permute, slice, split, chunk, pad, flip"
    MERGE = "residuals, concatenation, stacking, gates: the graph is a DAG and no chain"
    BLOCK = "user-defined submodules, Sequential, ModuleList, ModuleDict, ParameterList"
    FUNCTIONAL = "linear, conv, matmul, bmm and einsum on parameters, also through views, slices, cat and arithmetic"
    SUBCLASS = "subclasses of layers, layers of the transposed kind, lazy or standardised weights"
    SHARING = "modules that are called twice or have two names"
    TYING = "one parameter under several names"
    OUTSIDE = "weights read outside the module that owns them"
    EMBEDDING = "embeddings"
    ATTENTION = "attention modules, attention by hand, fewer key than query heads"
    RECURRENT = "LSTM, GRU and cells"
    INPLACE = "operations that write into their input"
    STATE = "buffers that the forward pass changes"
    PYTHON = "what no tracer takes: branches on values, loops over the batch, custom autograd, item assignment"
    CALLS = "keyword, optional, dict, tuple and list inputs; tuple, list and dict outputs; several inputs; tokens"
    PARAMETRIZED = "weights under torch's parametrizations"

    def __repr__(self) -> str:
        return str(self)


EVERYTHING = frozenset(Ingredient)
"""All ingredients."""

PLAIN = EVERYTHING - {Ingredient.CALLS, Ingredient.PARAMETRIZED}
"""Default: one floating tensor goes in, one comes out."""

TRACEABLE = PLAIN - {Ingredient.PYTHON}
"""What `torch.fx.symbolic_trace` takes as one graph for all inputs."""
