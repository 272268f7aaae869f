"""Tickets keep the patterns of their masks: what is loaded is compiled, retrained and exported as what was saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fxsparse.errors import ConfigError, TicketError
from fxsparse.lottery import load_ticket, save_ticket
from fxsparse.lottery.ticket_file import ticket_id
from fxsparse.nn import masked_weights
from fxsparse.planning import transform
from fxsparse.sparsity import (
    PATTERNS,
    Block,
    Channel,
    ConstantFanIn,
    NByM,
    Pattern,
    Positions,
    SharedSupport,
    Unstructured,
    read_pattern,
)
from fxsparse.sparsity.n_by_m import Remainder
from fxsparse.training import RigL, attach

WRITTEN = (
    Unstructured(),
    NByM(1, 4, exact=False, remainder=Remainder.TAIL),
    Block(4, 2),
    Channel(),
    ConstantFanIn(),
    SharedSupport(8, Positions.ELEMENT),
)


def _shared(seed: int, pattern: Pattern, *, permuted: bool = False) -> nn.Module:
    """A convolution, a transposed one and a linear layer with masks of the pattern."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(16, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 8)
    )
    sparse = transform(model, (torch.randn(2, 16, 3, 3),), pattern=pattern, sparsity=0.5)
    for masked in masked_weights(sparse).values() if permuted else ():
        order = torch.tensor([6, 1, 4, 3, 2, 7, 0, 5])
        layout, scores = masked.spec.layout, torch.rand(masked.weight.shape)
        masked.set_mask_(pattern.mask(scores, 0.5, layout, row_order=order), order)
    return sparse


@pytest.mark.parametrize(
    "pattern", [SharedSupport(4), SharedSupport(4, Positions.ELEMENT), NByM(2, 4), Channel(1), Block(2, 2)], ids=str
)
@pytest.mark.parametrize("into", ["plain", "transformed", "same"])
def test_the_pattern_comes_back_with_the_masks(tmp_path: Path, pattern: Pattern, into: str) -> None:
    shared = isinstance(pattern, SharedSupport)
    model = _shared(0, pattern, permuted=shared)
    ticket = load_ticket(save_ticket(model, tmp_path / "t").path)
    assert [row["pattern"] for row in ticket.manifest["masks"]] == [str(pattern)] * 3
    torch.manual_seed(9)
    fresh = nn.Sequential(
        nn.Conv2d(16, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 8)
    )
    if into != "plain":
        other = Unstructured() if into == "transformed" else pattern
        fresh = transform(fresh, (torch.randn(2, 16, 3, 3),), pattern=other)
    ticket.apply(fresh)
    x = torch.randn(2, 16, 3, 3)
    assert torch.equal(fresh(x), model(x))
    for name, masked in masked_weights(fresh).items():
        assert masked.spec.pattern == pattern and torch.equal(masked.mask, ticket.masks[name])
        assert masked.spec.layout == masked_weights(model)[name].spec.layout
        pattern.check(masked.mask, masked.spec.layout, masked.row_order)
        assert (masked.row_order is not None) == shared
    again = save_ticket(fresh, tmp_path / "again")
    assert again.ticket_id == ticket.ticket_id
    if shared:  # the next method moves whole groups
        optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
        handle = attach(fresh, optimizer, RigL(sparsity=0.5, every=1), total_steps=9)
        for _ in range(2):
            optimizer.zero_grad()
            fresh(x).square().mean().backward()
            optimizer.step()
        assert handle.updates > 0
        for masked in masked_weights(fresh).values():
            pattern.check(masked.mask, masked.spec.layout, masked.row_order)


def test_a_model_of_another_pattern_is_refused(tmp_path: Path) -> None:
    ticket = save_ticket(_shared(0, SharedSupport(4)), tmp_path / "t")
    model = _shared(1, SharedSupport(8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TicketError, match=r"0\.weight.*SharedSupport\(8\)"):
        ticket.apply(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"pattern": "SharedSupport(5)"}, r"breaks SharedSupport\(5\)|does not fit"),
        ({"pattern": "SharedSuport(4)"}, r"did you mean SharedSupport\?"),
        ({"pattern": "__import__('os').system('x')"}, "no pattern of this version"),
        ({"pattern": 4}, r"`pattern` \(=4\)"),
        ({"layout": {"out_axis": "a"}}, "`layout`"),
        ({"layout": {"rows": 1}}, "rows"),
        ({"layout": [1]}, "`layout`"),
        ({"layout": {"out_axis": 1, "in_axis": 0, "groups": 3}}, "divisible"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(tmp_path: Path, row: dict[str, Any], match: str) -> None:
    ticket = save_ticket(_shared(0, SharedSupport(4)), tmp_path / "t")
    manifest = json.loads((ticket.path / "manifest.json").read_text())
    manifest["masks"][0] |= row
    manifest["ticket_id"] = ticket_id(manifest)
    (ticket.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TicketError, match=match):
        load_ticket(ticket.path)


def test_patterns_are_read_back_as_written() -> None:
    assert {type(pattern) for pattern in WRITTEN} == set(PATTERNS)
    for pattern in WRITTEN:
        assert read_pattern(str(pattern)) == pattern
    for text in ("SharedSupport(0)", "NByM(2)", "Channel(x)", "Block(2, 2, 2)", "1", "(" * 10_000, "", "str(4)"):
        with pytest.raises(ConfigError, match="`pattern`"):
            read_pattern(text)
    with pytest.raises(ConfigError, match="positions"):
        read_pattern("SharedSupport(4, positions=3)")
