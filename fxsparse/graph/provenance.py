"""Where a node comes from: which pass made it, what it does, and from what it was made.

The record lives in ``node.meta["custom"]["fxsparse"]``, the one key that survives fx.Transformer and torch.export.
Copies of a graph share the nested dict, so it is replaced, never written into.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

KEY = "fxsparse"


@dataclass(frozen=True)
class Provenance:
    """One record: the pass's name, what the node does, and the node, parameter or module it stems from ("" = none)."""

    pass_name: str
    what: str
    source: str = ""

    def __str__(self) -> str:
        return f"{self.pass_name}: {self.what}" + (f" (from {self.source})" if self.source else "")


def stamp(node: fx.Node, pass_name: str, what: str, source: str = "") -> None:
    """Record on `node` who made or changed it; a later stamp replaces an earlier one."""
    record = {"pass": pass_name, "what": what, "source": source}
    node.meta["custom"] = {**node.meta.get("custom", {}), KEY: record}


def read(node: fx.Node) -> Provenance | None:
    """The record on `node`, or None for a node that no pass has touched."""
    record = node.meta.get("custom", {}).get(KEY)
    return None if record is None else Provenance(record["pass"], record["what"], record["source"])


def unstamped(before: Iterable[fx.Node], after: Iterable[fx.Node]) -> list[str]:
    """Names of the nodes in `after` that are absent from `before` (by name) and carry no record."""
    known = {node.name for node in before}
    return [node.name for node in after if node.name not in known and read(node) is None]
