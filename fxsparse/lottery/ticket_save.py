"""Saving a ticket."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fxsparse.errors import ConfigError, TicketError
from fxsparse.lottery.model_state import ModelState
from fxsparse.lottery.ticket import Ticket, load_ticket
from fxsparse.lottery.ticket_file import FORMAT, VERSION, rule_row, tensor_row, write_ticket
from fxsparse.nn import masked_weights
from fxsparse.nn.sharded import check_whole
from fxsparse.sparsity import Mask


def save_ticket(
    model: nn.Module,
    path: str | Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    step: int = 0,
    final: bool | None = None,
    optimizer: Optimizer | None = None,
    lineage: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    input_signature: tuple[Tensor, ...] | None = None,
) -> Ticket:
    """Write the masks and weights of a model as a ticket directory, atomically.

    Args:
        model: a model with masks.
        path: the directory to make, by custom ``NAME.ticket``.
        weights: the values to retrain from, for all parameters and persistent buffers (`model.state_dict()` taken
            then will do); by default the model's present ones.
        step: the step k that `weights` are of; 0 is initialisation.
        final: add the model's present values as the trained ones; by default when `weights` are given.
        optimizer: add its state of the model's parameters.
        lineage: parent, round, method, seed, rates (as text) and policies.
        metrics: what was measured (not part of the ticket's id).
        factory: ``module:function`` that builds the model.
        arguments: keyword arguments of the factory.
        input_signature: example inputs, of which shapes and dtypes are written, the first size as the batch.

    Returns:
        the ticket, read back and checked.

    Raises:
        ConfigError: the model has no masks, or is spread over ranks.
        TicketError: values are missing, of another shape or not finite, or the path exists or cannot be written.
    """
    state = ModelState.of(model)
    check_whole(model)
    masked = masked_weights(model)
    masks = {name: Mask(weight.mask.detach().cpu().clone()) for name, weight in masked.items()}
    if not masks:
        raise ConfigError("`model` has no masks; transform it first, or prune it")
    kind = "init" if step == 0 else "rewind"
    starts = _values(state, weights)
    tensors = {f"mask/{name}": mask.pack() for name, mask in masks.items()}
    tensors |= {f"{kind}/{name}": tensor for name, tensor in starts.items()}
    if final if final is not None else weights is not None:
        tensors |= {f"final/{name}": tensor for name, tensor in _values(state, None).items()}
    if optimizer is not None:
        tensors |= _optimizer_tensors(state, optimizer)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "model": {
            "factory": factory,
            "arguments": dict(arguments or {}),
            "graph_hash": state.graph_hash(),
            "input_signature": _signature(input_signature),
        },
        "masks": [
            {
                "name": name,
                "shape": list(mask.shape),
                "numel": mask.numel,
                "alive": mask.alive,
                "sha256": mask.sha256(name),
                **rule_row(masked[name].spec.pattern, masked[name].spec.layout),
            }
            for name, mask in masks.items()
        ],
        "weights": {
            "kind": kind,
            "k": step,
            "tensors": [tensor_row(state.row(name), starts[name]) for name in starts],
            "aliases": dict(state.aliases),
        },
        "lineage": {"parent": None, "round": None, "method": None, "seed": None, **(lineage or {})},
        "metrics": dict(metrics or {}),
        "environment": _environment(next(iter(state.tensors.values())).device),
    }
    write_ticket(Path(path), tensors, manifest)
    return load_ticket(path)


def _values(state: ModelState, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    result = {}
    for name, live in state.tensors.items():
        if given is not None and name not in given:
            raise TicketError(f"`weights` lack tensor `{name}`; give all parameters and persistent buffers")
        value = (live if given is None else given[name]).detach().cpu().clone()
        if value.shape != live.shape or value.dtype != live.dtype:
            raise TicketError(f"`weights` tensor `{name}` (={value.dtype} {list(value.shape)}) is not like the model's")
        result[name] = value
    return result


def _optimizer_tensors(state: ModelState, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"optim/{name}/{slot}": value.detach().cpu().clone()
        for name in state.tensors
        if name in state.parameters
        for slot, value in optimizer.state.get(state.tensors[name], {}).items()
        if isinstance(value, Tensor)
    }


def _signature(inputs: tuple[Tensor, ...] | None) -> list[dict[str, Any]] | None:
    if inputs is None:
        return None
    return [{"shape": [None, *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")} for x in inputs]


def _environment(device: torch.device) -> dict[str, str]:
    from importlib.metadata import version

    return {
        "fxsparse": version("fxsparse"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "device": device.type,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
