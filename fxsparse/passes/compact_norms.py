"""Layer norms that lose features: those that are left are normalised as if the others, zeros, were still there."""

from __future__ import annotations

from torch import fx, nn

from fxsparse.graph.channels import Channels
from fxsparse.graph.channels_atoms import Labels
from fxsparse.graph.channels_flow import op_of
from fxsparse.nn.layer_norm import SizedLayerNorm
from fxsparse.passes.compact_sinks import Bools


def resize(model: nn.Module, channels: Channels, removed: Bools) -> None:
    """Let the layer norms that lose features count what they had; the model is edited in place."""
    for graph in channels.graphs:
        for node in graph.graph.nodes:
            path = str(node.meta.get("path", ""))
            if path in channels.flow.open_norms and op_of(node) in ("layer_norm", "native_layer_norm"):
                module = model.get_submodule(path)
                if isinstance(module, nn.LayerNorm) and _loses(channels, node, removed):
                    SizedLayerNorm.of(module)


def _loses(channels: Channels, node: fx.Node, removed: Bools) -> bool:
    held = channels.flow.dims.get(node)
    dims = held[0] if isinstance(held, list) else held
    labels: Labels | None = dims[-1] if dims else None
    return labels is not None and bool(removed[channels.classes[labels]].any())
