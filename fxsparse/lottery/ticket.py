"""Tickets: masks, the weights to retrain them from, and where they came from."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, TicketError
from fxsparse.lottery.model_state import ModelState
from fxsparse.lottery.ticket_file import TicketReader, held_order
from fxsparse.nn import Guard, MaskedWeight, MaskSpec, Route, install_mask, masked_weights, tie_masks
from fxsparse.nn import masks as live_masks
from fxsparse.nn.masked import check_mask
from fxsparse.sparsity import LINEAR, Layout, MaskSet, Pattern, Unstructured
from fxsparse.training.initial import start_from

TRUSTED = "fxsparse.models:"


@dataclass(frozen=True)
class Ticket:
    """A winning ticket, read and checked.

    Attributes:
        path: the ticket directory.
        manifest: everything but the tensors, as written.
        masks: bool masks by parameter name, True = alive.
        weights: all parameters and buffers at the start (initialisation or rewind step), dense.
        final: all parameters and buffers after training, or None.
        optimizer: optimizer state tensors by parameter and slot (may be empty).
    """

    path: Path
    manifest: Mapping[str, Any]
    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    final: Mapping[str, Tensor] | None
    optimizer: Mapping[str, Mapping[str, Tensor]]

    @property
    def ticket_id(self) -> str:
        """SHA-256 that names the content: the same on any machine."""
        return str(self.manifest["ticket_id"])

    @property
    def lineage(self) -> Mapping[str, Any]:
        """Parent, round, method, rates, seed and policies."""
        lineage: Mapping[str, Any] = self.manifest["lineage"]
        return lineage

    @property
    def origin(self) -> Mapping[str, Any]:
        """The ticket's id and lineage, for the metadata of an export."""
        return {"ticket_id": self.ticket_id, **self.lineage}

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What was measured when the ticket was saved."""
        metrics: Mapping[str, Any] = self.manifest["metrics"]
        return metrics

    @property
    def alive(self) -> int:
        """Alive weights over all masks."""
        return MaskSet(self.masks).alive

    def rule(self, name: str) -> tuple[Pattern, Layout]:
        """The pattern and the layout of a mask, as they were when the ticket was saved."""
        row = next(row for row in self.manifest["masks"] if row["name"] == name)
        return TicketReader(self.path).rule(row)

    @property
    def numel(self) -> int:
        """Weights over all masks."""
        return MaskSet(self.masks).numel

    @property
    def sparsity(self) -> float:
        """Dead fraction over all masks."""
        return 1 - self.alive / self.numel if self.numel else 0.0

    def apply(self, model: nn.Module, *, final: bool = False) -> nn.Module:
        """Load weights and masks into a model, in place.

        Weights that have no mask yet get one at the parameter: dead entries are zero and stay zero in any training.
        Masks that may be any (`Unstructured`) take on the ticket's pattern; others keep theirs, which the ticket's
        masks must hold. The rows of a `SharedSupport` are found again from its mask.

        Nothing changes before all checks have passed.

        Args:
            model: the model that was saved, before or after `transform`.
            final: load the trained weights instead of those to retrain from.

        Returns:
            the model.

        Raises:
            TicketError: names, shapes or dtypes do not fit, the model has a mask that the ticket lacks, or `final`
                weights are asked for and the ticket has none.
        """
        values = self.final if final else self.weights
        if values is None:
            raise TicketError(f"{self.path}: the ticket has no `final` weights; retrain it, or save it with final=True")
        where, live = str(self.path), ModelState.of(model)
        rows = {row["name"]: row for row in self.manifest["weights"]["tensors"]}
        live.check_fits(rows, where)
        if dict(live.aliases) != self.manifest["weights"]["aliases"]:
            ties = self.manifest["weights"]["aliases"]
            raise TicketError(f"{where}: `aliases` (={ties}) differ from the model's ties {dict(live.aliases)}")
        self._check_masks(model, live)
        missing = [name for name in self.masks if name not in live_masks(model)]
        for name in missing:
            install_parameter_mask(model, name, *self.rule(name))
        if missing:
            tie_masks(model)
        with torch.no_grad():
            for name, tensor in live.tensors.items():
                tensor.copy_(values[name])
        weights = masked_weights(model)
        fits = {name: self._fit(weights[name]) for name in self.masks}
        start_from(weights, self.masks, {n: fit[0] for n, fit in fits.items()}, {n: fit[1] for n, fit in fits.items()})
        return model

    def _fit(self, masked: MaskedWeight) -> tuple[Pattern, Tensor | None]:
        """The pattern that a masked weight has with this ticket, and its row order unless the present one will do.

        Raises:
            ConfigError: the ticket's mask is not legal there.
        """
        mask, spec, weight = self.masks[masked.name], masked.spec, masked.weight
        if isinstance(spec.pattern, Unstructured):
            spec = replace(spec, pattern=self.rule(masked.name)[0])
        try:
            check_mask(masked.name, weight, spec, mask, masked.row_order)
        except ConfigError:
            order = held_order(spec.pattern, mask, spec.layout)
            if order is None:
                raise
            check_mask(masked.name, weight, spec, mask, order)
            return spec.pattern, order
        return spec.pattern, None

    def _check_masks(self, model: nn.Module, live: ModelState) -> None:
        present = masked_weights(model)
        if extra := sorted(set(present) - set(self.masks)):
            raise TicketError(f"{self.path}: the model's masked weight `{extra[0]}` has no mask in the ticket")
        for name in self.masks:
            if name not in live.parameters:
                raise TicketError(f"{self.path}: mask `{name}` has no parameter in the model; build the saved model")
            if name in present:
                try:
                    self._fit(present[name])
                except ConfigError as error:
                    raise TicketError(f"{self.path}: {error}") from error

    def build(self) -> nn.Module:
        """A fresh model from the factory that the manifest names, dense.

        Only factories of `fxsparse.models` are called; a ticket must not run foreign code.

        Raises:
            TicketError: the ticket names no factory, or another one.
        """
        model = self.manifest["model"]
        factory = model.get("factory")
        if not isinstance(factory, str) or not factory.startswith(TRUSTED):
            raise TicketError(
                f"{self.path}: `factory` (={factory}) is not one of fxsparse.models; build the "
                "model yourself and `apply` the ticket, at the shell with --model MODULE:FACTORY"
            )
        name = factory.removeprefix(TRUSTED)
        build = getattr(importlib.import_module("fxsparse.models"), name, None) if name.isidentifier() else None
        if build is None or name.startswith("_"):
            raise TicketError(f"{self.path}: `factory` (={factory}) does not exist in this version of fxsparse")
        with torch.random.fork_rng():
            built: nn.Module = build(**model.get("arguments", {}))
        return built

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Zeros of the shapes that the manifest's input signature says; a null size is the batch.

        Raises:
            TicketError: the ticket has no input signature.
        """
        signature = self.manifest["model"].get("input_signature")
        if not signature:
            raise TicketError(f"{self.path}: `input_signature` (={signature}) is missing; give example inputs yourself")
        sizes = [[batch if size is None else size for size in row["shape"]] for row in signature]
        return tuple(
            torch.zeros(size, dtype=getattr(torch, row["dtype"])) for size, row in zip(sizes, signature, strict=True)
        )


def install_parameter_mask(
    model: nn.Module, name: str, pattern: Pattern | None = None, layout: Layout | None = None
) -> None:
    """Give the parameter `name` of any model an all-alive mask at the parameter, unstructured by default."""
    owner, _, attribute = name.rpartition(".")
    spec = MaskSpec(pattern or Unstructured(), layout or LINEAR, Route.PARAMETER, Guard.GRADIENT)
    install_mask(model.get_submodule(owner), attribute, spec)


def load_ticket(path: str | Path, parent: Ticket | None = None) -> Ticket:
    """Read a ticket directory; everything is checked before anything is returned.

    Args:
        path: the ticket directory.
        parent: the ticket of the round before, to check the lineage and that no weight came back to life.

    Raises:
        TicketError: missing, truncated, altered or malformed; the message names file, tensor and value.
    """
    reader = TicketReader(Path(path))
    manifest = reader.manifest()
    tensors = reader.tensors(manifest)
    masks, weights = reader.masks(manifest, tensors), reader.weights(manifest, tensors)
    final, optimizer = reader.final(manifest, tensors), reader.optimizer(manifest, tensors)
    known = {f"mask/{name}" for name in masks} | {f"{manifest['weights']['kind']}/{name}" for name in weights}
    known |= {f"final/{name}" for name in final or {}}
    known |= {f"optim/{name}/{slot}" for name, slots in optimizer.items() for slot in slots}
    reader.check_no_others(tensors, known)
    ticket = Ticket(Path(path), manifest, masks, weights, final, optimizer)
    if parent is not None:
        _check_parent(ticket, parent)
    return ticket


def _check_parent(ticket: Ticket, parent: Ticket) -> None:
    if ticket.lineage.get("parent") != parent.ticket_id:
        said = ticket.lineage.get("parent")
        raise TicketError(f"{ticket.path}: `parent` (={said}) is not the ticket {parent.ticket_id} at {parent.path}")
    if set(ticket.masks) != set(parent.masks):
        names = sorted(set(ticket.masks) ^ set(parent.masks))
        raise TicketError(f"{ticket.path}: masks {names} are not in both the ticket and its parent")
    for name, mask in ticket.masks.items():
        if mask.shape != parent.masks[name].shape or bool((mask & ~parent.masks[name]).any()):
            raise TicketError(f"{ticket.path}: mask `{name}` is not a subset of its parent's at {parent.path}")
