"""The recorder: one eager run that tells every use of every parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.overrides import TorchFunctionMode

from fxsparse.errors import CaptureError
from fxsparse.graph.clone import isolated_clone
from fxsparse.graph.inputs import fresh_inputs, opened, tensors_of
from fxsparse.graph.macs import TWO_SIDED, ZERO_MAC_OPS, Operand, Product, op_name, product
from fxsparse.graph.scopes import SEED, seeded
from fxsparse.graph.tree import modules_of, parameters_of
from fxsparse.graph.writes import ParameterWrites

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Use:
    """One use of one parameter by one operation.

    Attributes:
        parameter: its name, the first one if it is tied.
        op: the operation, by torch's plain name ("linear", "conv2d", "matmul", "add", "lstm"...).
        argument: which argument holds it ("weight", "bias", "other", "params[0]", or a position).
        module: path of the innermost module that was running.
        owner: path of the module that owns the parameter.
        derived: the parameter-only operations between the two, in order (view, cat, weight norm...).
        weight_shape: shape of the value that reached the operation.
        input_shape: shape of the first operand that is not made of parameters, None if there is none.
        output_shape: shape of the first tensor that came out.
        macs: multiply-accumulates of this parameter here; 0 for biases, norms and moves; None = not known.
        call: number of the operation in the run; several uses may share one.
    """

    parameter: str
    op: str
    argument: str
    module: str
    owner: str
    derived: tuple[str, ...]
    weight_shape: Shape
    input_shape: Shape | None
    output_shape: Shape | None
    macs: int | None
    call: int


@dataclass(frozen=True)
class ActivationProduct:
    """A product of two activations (attention scores): no weight can make it cheaper."""

    op: str
    module: str
    macs: int


@dataclass(frozen=True)
class Recording:
    """What one eager run told.

    Attributes:
        uses: every use of every parameter, in order of execution.
        unused: parameters that no recorded operation read.
        written: parameters into which the forward pass writes in place.
        calls: how often each module (by its first path) was called.
        activation_products: products without a weight.
        opaque: paths of scripted modules, whose inside cannot be seen.
        replaced: parameters in whose place the forward pass puts other objects.
        absent: arguments that a call of a module left None: position or name, by the module's path.
    """

    uses: tuple[Use, ...]
    unused: tuple[str, ...]
    written: tuple[str, ...]
    calls: Mapping[str, int]
    activation_products: tuple[ActivationProduct, ...] = ()
    opaque: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    absent: Mapping[str, frozenset[int | str]] = field(default_factory=dict)

    def of(self, parameter: str) -> tuple[Use, ...]:
        """The uses of one parameter."""
        return tuple(use for use in self.uses if use.parameter == parameter)


def record(model: nn.Module, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Recording:
    """Run `model` once, in train mode with gradients and in eval mode without, and note how every parameter is used.

    The run takes place on an isolated copy (parameters alias the same storage and are written back if the forward pass
    writes into them), so parameters, buffers, gradients, hooks, flags, attributes, inputs and random generators stay
    as they are, also when the model raises. Works on any device, the meta device included, and in any dtype. A model
    that fails so is tried the other way about gradients, then in the other mode.

    Raises:
        CaptureError: when the model cannot be copied or raises on these inputs.
    """
    return recorded_run(model, args, kwargs or {}).recording


@dataclass(frozen=True)
class RecordedRun:
    """A recording, and what its run left behind.

    Attributes:
        recording: what was noted.
        clone: the copy that ran.
        inputs: the copies of the inputs that it ran on, as ``(args, kwargs)``.
        output: what came out, opened.
        gradients: whether the run took place with gradients.
        training: the mode that it ran in.
        failure: what the model raised in its own mode, where it ran in the other one therefore.
    """

    recording: Recording
    clone: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    gradients: bool
    training: bool
    failure: Exception | None = None


def recorded_run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordedRun:
    """`record`, with what the run left behind; it ran from `SEED`.

    Raises:
        CaptureError: as `record`.
    """
    mode = model.training
    first: Exception | None = None
    for training, gradients in ((mode, mode), (mode, not mode), (not mode, not mode), (not mode, mode)):
        try:
            done = _recorded_run(model, args, kwargs, training, gradients)
            return done if training is mode else replace(done, failure=first)
        except CaptureError:
            raise
        except Exception as error:  # whatever the user's forward raises
            first = first or error
    raise CaptureError(
        f"the model fails on `example_inputs` ({type(first).__name__}: {first}): give inputs that it accepts"
    ) from first


def _recorded_run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool, gradients: bool
) -> RecordedRun:
    clone = isolated_clone(model, to_run=True)
    if clone.training is not training:
        clone.train(training)
    inputs = fresh_inputs(args, kwargs)
    recorder = _Recorder(clone)
    handles = recorder.watch_modules()
    try:
        with seeded(SEED), torch.set_grad_enabled(gradients), recorder:
            output = opened(clone(*inputs[0], **inputs[1]))
    finally:
        recorder.written = recorder.writes.undo()
        for handle in handles:
            handle.remove()
    return RecordedRun(recorder.recording(), clone, inputs, output, gradients, training)


@dataclass
class _Source:
    """A tensor made of parameters only; it is kept alive so that its id stays its own."""

    tensor: torch.Tensor
    parameters: tuple[str, ...]
    carriers: tuple[str, ...]  # the parameters whose elements it consists of; the others only scale or shift them
    chain: tuple[str, ...] = ()
    has_product: bool = False


@dataclass
class _Recorder(TorchFunctionMode):
    model: nn.Module
    uses: list[Use] = field(default_factory=list)
    products: list[ActivationProduct] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.numels = {name: parameter.numel() for name, parameter in parameters_of(self.model)}
        self.sources = {id(p): _Source(p, (name,), (name,)) for name, p in parameters_of(self.model)}
        self.held = {source.parameters[0]: source for source in self.sources.values()}
        self.neutral = {id(buffer) for buffer in self.model.buffers()}
        self.writes = ParameterWrites(self.model)
        self.written: tuple[str, ...] = ()
        self.owners = {id(p): path for path, m in reversed(modules_of(self.model)) for p in m._parameters.values()}
        self.owner = {source.parameters[0]: self.owners[key] for key, source in self.sources.items()}
        self.stack: list[str] = []
        self.absent: dict[str, set[int | str]] = {}
        self.calls: Counter[str] = Counter()
        self.call = 0

    def watch_modules(self) -> list[Any]:
        """Hook every module of the copy, so that the innermost running one is known."""
        handles = []
        for path, module in modules_of(self.model):
            if isinstance(module, torch.jit.ScriptModule):
                continue
            handles.append(module.register_forward_pre_hook(self._enter(path), prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        return handles

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(path)
            self.calls[path] += 1
            for key, value in (*enumerate(args), *kwargs.items()):
                if value is None:
                    self.absent.setdefault(path, set()).add(key)

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.stack.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.writes.notice(func, args, kwargs)
        result = func(*args, **kwargs)
        self._observe(func, args, kwargs, result)
        return result

    def _observe(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tensors = tensors_of((args, kwargs))
        self._know_slices(tensors)
        found = product(func, args, kwargs, result) if tensors else None
        held = [self.sources[id(t)] for t in tensors if id(t) in self.sources]
        outputs = tensors_of(result)
        if not outputs:
            return
        self.call += 1
        factors = [t for t in tensors if not _is_index(func, t)]
        only_parameters = bool(held) and all(id(t) in self.sources or id(t) in self.neutral for t in factors)
        if found is not None:
            self._note_product(op_name(func), found, held, outputs[0])
        if held and not (only_parameters and found is None):
            self._note_rest(op_name(func), args, kwargs, found, outputs[0])
        if only_parameters:
            has_product = found is not None or any(source.has_product for source in held)
            for output in outputs:
                self.sources.setdefault(id(output), _derived(output, held, op_name(func), has_product))

    def _know_slices(self, tensors: list[torch.Tensor]) -> None:
        """What a function under torch.vmap reads of a parameter is a slice of it, as `weight[i]` is."""
        for tensor in tensors:
            if id(tensor) in self.sources or not is_batchedtensor(tensor):
                continue
            whole = self.sources.get(id(get_unwrapped(tensor)))
            if whole is not None:
                self.sources[id(tensor)] = replace(whole, tensor=tensor, chain=(*whole.chain, "getitem"))

    def _note_product(self, op: str, found: Product, held: list[_Source], output: torch.Tensor) -> None:
        module = self.stack[-1] if self.stack else ""
        weights = [operand for operand in found.operands if id(operand.tensor) in self.sources]
        if len(weights) > 1 and op in TWO_SIDED:  # both factors are made of parameters: count the MACs once
            largest = max(weights, key=lambda operand: operand.tensor.numel())
            weights = [operand if operand is largest else operand._replace(macs=0) for operand in weights]
        for operand in weights:  # under torch.vmap the shapes are those of one slice
            known = operand._replace(macs=None) if is_batchedtensor(output) else operand
            self._note_weight(op, known, found, output)
        extra = found.activation_macs
        if found.operands and not weights:
            extra += max((operand.macs or 0) for operand in found.operands)
        if extra:
            self.products.append(ActivationProduct(op, module, extra))

    def _note_weight(self, op: str, operand: Operand, found: Product, output: torch.Tensor) -> None:
        source = self.sources[id(operand.tensor)]
        for name in source.parameters:
            self._note(op, operand.argument, name, source, self._share(name, source, operand.macs), found.input, output)

    def _share(self, name: str, source: _Source, macs: int | None) -> int | None:
        """The part of `macs` that belongs to one of the parameters from which the weight was derived."""
        if macs is None or name not in source.carriers:
            return macs and 0
        if len(source.carriers) == 1:
            return macs
        total = source.tensor.numel()
        if sum(self.numels[carrier] for carrier in source.carriers) == total:  # cat, stack
            return macs * self.numels[name] // max(total, 1)
        return None

    def _note_rest(
        self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any], found: Product | None, output: torch.Tensor
    ) -> None:
        weights = {id(operand.tensor) for operand in found.operands} if found is not None else set()
        flat = [(str(i), value) for i, value in enumerate(args)] + list(kwargs.items())
        others = [t for t in tensors_of((args, kwargs)) if id(t) not in self.sources]
        for argument, value in flat:
            for tensor in tensors_of(value):
                source = self.sources.get(id(tensor))
                if source is None or id(tensor) in weights or source.has_product:
                    continue
                counted = found is not None or op in ZERO_MAC_OPS or tensor.ndim < 2
                for name in source.parameters:
                    label = _bias_name(op, argument)
                    self._note(op, label, name, source, 0 if counted else None, others[0] if others else None, output)

    def _note(
        self, op: str, argument: str, name: str, source: _Source, macs: int | None, x: Any, output: torch.Tensor
    ) -> None:
        is_activation = isinstance(x, torch.Tensor) and id(x) not in self.sources
        self.uses.append(
            Use(
                parameter=name,
                op=op,
                argument=argument,
                module=self.stack[-1] if self.stack else "",
                owner=self.owner[name],
                derived=source.chain,
                weight_shape=tuple(source.tensor.shape),
                input_shape=tuple(x.shape) if is_activation else None,
                output_shape=tuple(output.shape),
                macs=macs,
                call=self.call,
            )
        )

    def recording(self) -> Recording:
        """Everything noted so far."""
        opaque = tuple(path for path, m in modules_of(self.model) if isinstance(m, torch.jit.ScriptModule))
        used = {use.parameter for use in self.uses}
        return Recording(
            uses=tuple(self.uses),
            unused=tuple(name for name in self.owner if name not in used),
            written=self.written,
            calls=dict(self.calls),
            activation_products=tuple(self.products),
            opaque=opaque,
            replaced=tuple(name for name, source in self.held.items() if not self._holds(name, source.tensor)),
            absent={path: frozenset(keys) for path, keys in self.absent.items()},
        )

    def _holds(self, name: str, parameter: torch.Tensor) -> bool:
        path, _, attribute = name.rpartition(".")
        try:
            holder = self.model.get_submodule(path)
        except AttributeError:
            return False
        if isinstance(holder, torch.jit.ScriptModule):  # which makes its parameters anew for every reader
            return True
        return holder._parameters.get(attribute) is parameter


def _derived(output: torch.Tensor, held: list[_Source], op: str, has_product: bool) -> _Source:
    same = [source for source in held if source.tensor.numel() == output.numel()]
    plain = [source for source in same if not source.has_product]  # W in the low-rank update W + B A
    return _Source(
        tensor=output,
        parameters=tuple(dict.fromkeys(name for source in held for name in source.parameters)),
        carriers=tuple(dict.fromkeys(name for source in plain or same or held for name in source.carriers)),
        chain=(*max((source.chain for source in held), key=len), op),
        has_product=has_product,
    )


_SELECTIONS = frozenset({"getitem", "index_select", "gather", "take_along_dim", "narrow"})


def _is_index(func: Callable[..., Any], tensor: torch.Tensor) -> bool:
    """Whether `tensor` only chooses which elements `func` takes."""
    return op_name(func) in _SELECTIONS and not (tensor.is_floating_point() or tensor.is_complex())


def _bias_name(op: str, argument: str) -> str:
    biased = op == "linear" or op.startswith("conv")
    return "bias" if biased and argument == "2" else argument
