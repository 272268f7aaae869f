"""The tensors of a model that a ticket holds: all parameters and persistent buffers, each once, without the masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fxsparse.errors import ConfigError, TicketError
from fxsparse.lottery.canonical import dtype_name, sha256_json
from fxsparse.nn import check_mask_edit, masked_weights


@dataclass(frozen=True)
class ModelState:
    """The live tensors of a model by their first name.

    Attributes:
        tensors: parameters and persistent buffers, masks left out.
        parameters: the names among `tensors` that are parameters.
        aliases: every further name of a tied tensor -> its first name.
    """

    tensors: Mapping[str, Tensor]
    parameters: frozenset[str]
    aliases: Mapping[str, str]

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        """Read a model.

        Raises:
            ConfigError: the model has extra state that is no tensor, which a ticket cannot hold, or is in a
                resurrection phase.
        """
        own = set()
        for masked in masked_weights(model).values():
            own |= {id(buffer) for buffer in masked.buffers}
            for module, _ in masked.owners:
                check_mask_edit(module)
        parameters = {id(parameter) for parameter in model.parameters()}
        tensors: dict[str, Tensor] = {}
        aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise ConfigError(f"state `{name}` (={type(tensor).__name__}) is no tensor; finalize the model first")
            if id(tensor) in own:
                continue
            if (known := first.setdefault(id(tensor), name)) != name:
                aliases[name] = known
            else:
                tensors[name] = tensor
        return cls(tensors, frozenset(n for n, t in tensors.items() if id(t) in parameters), aliases)

    def row(self, name: str) -> dict[str, object]:
        """What the manifest says about a tensor, without its hash."""
        tensor = self.tensors[name]
        role = "parameter" if name in self.parameters else "buffer"
        return {"name": name, "dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "role": role}

    def graph_hash(self) -> str:
        """SHA-256 of names, roles, dtypes, shapes and ties: the same for a model before and after `transform`."""
        return sha256_json({"tensors": [self.row(name) for name in sorted(self.tensors)], "aliases": self.aliases})

    def check_fits(self, rows: Mapping[str, Mapping[str, object]], where: str) -> None:
        """Compare with the rows of a manifest.

        Raises:
            TicketError: a name, dtype or shape differs; the first one is named.
        """
        if missing := sorted(set(rows) - set(self.tensors)):
            raise TicketError(f"{where}: tensor `{missing[0]}` is not in the model; build the model that was saved")
        if unknown := sorted(set(self.tensors) - set(rows)):
            raise TicketError(f"{where}: the model's tensor `{unknown[0]}` is not in the ticket; build the saved model")
        for name in self.tensors:
            mine = self.row(name)
            for key in ("dtype", "shape"):
                if mine[key] != rows[name][key]:
                    raise TicketError(
                        f"{where}: `{key}` of tensor `{name}` (={rows[name][key]}) differs from the model's {mine[key]}"
                    )
