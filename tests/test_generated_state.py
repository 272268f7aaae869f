"""Generated models: copies, pickles, state dicts, tickets.

`FXSPARSE_EXAMPLES=5000` runs thousands (see tests/generated.py).
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from pathlib import Path

import torch
from hypothesis import given
from torch import nn

from fxsparse.lottery import load_ticket, save_ticket
from fxsparse.nn import masks, set_masks
from fxsparse.planning import finalize, transform
from fxsparse.testing import fill_
from tests.generated import (
    Planned,
    assert_close,
    assert_same_function,
    assert_same_outputs,
    evaluated,
    examples,
    masked_at_parameters,
    planned,
    trained,
    with_dead_zeroed,
)


def _refilled(drawn: Planned) -> nn.Module:
    """The model with other weights, never zero; what no state dict holds is the same."""
    model = fill_(drawn.program.model(), drawn.program.seed + 1)
    for name, buffer in model.named_buffers():
        if name not in model.state_dict():
            buffer.copy_(drawn.model.get_buffer(name))
    return model


@examples(25)
@given(planned())
def test_state_dicts_go_round_strictly(drawn: Planned) -> None:
    sparse, other = drawn.plan.apply(), _refilled(drawn)
    held = {name: mask.clone() for name, mask in masks(sparse).items()}
    keys = set(drawn.model.state_dict())
    assert set(sparse.state_dict()) >= keys

    twin = transform(other, drawn.inputs)  # sparse -> sparse
    twin.load_state_dict(sparse.state_dict(), strict=True)
    assert all(torch.equal(mask, held[name]) for name, mask in masks(twin).items())
    assert_same_function(twin, sparse, drawn.inputs)

    folded = finalize(sparse)  # sparse -> dense
    if not masks(folded):
        assert list(folded.state_dict()) == list(drawn.model.state_dict())
        plain = _refilled(drawn)
        plain.load_state_dict(folded.state_dict(), strict=True)
        assert_same_function(plain, sparse, drawn.inputs)

    sparse.load_state_dict(other.state_dict(), strict=True)  # dense -> sparse: masks stay
    assert all(torch.equal(mask, held[name]) for name, mask in masks(sparse).items())
    if masked_at_parameters(sparse):
        for name, mask in masks(sparse).items():
            assert torch.equal(sparse.get_parameter(name).detach() == 0, ~mask), name
        zeroed = with_dead_zeroed(other, sparse)
        assert_same_function(sparse, zeroed, drawn.inputs)


@examples(25)
@given(planned())
def test_a_deep_copy_is_independent(drawn: Planned) -> None:
    sparse = drawn.plan.apply()
    before = trained(sparse, drawn.inputs)
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    twin = copy.deepcopy(sparse)
    fill_(twin, drawn.program.seed + 1)
    set_masks(twin, {name: torch.ones_like(mask) for name, mask in masks(twin).items()})
    trained(twin, drawn.inputs)
    for name, value in sparse.state_dict().items():
        assert torch.equal(value, state[name]), name
    after = trained(sparse, drawn.inputs)
    assert_same_outputs(after.outputs, before.outputs)
    assert_close(after.gradients, before.gradients, 0.0)
    fresh = transform(fill_(drawn.program.model(), drawn.program.seed + 1), drawn.inputs)
    for got, want in zip(evaluated(twin, drawn.inputs), evaluated(fresh, drawn.inputs), strict=True):
        assert_close({"output": got}, {"output": want})


@examples(25)
@given(planned())
def test_what_pickles_dense_pickles_sparse(drawn: Planned) -> None:
    try:
        pickle.loads(pickle.dumps(drawn.model))
    except (RuntimeError, pickle.PicklingError, AttributeError, TypeError):
        return
    sparse = drawn.plan.apply()
    twin = pickle.loads(pickle.dumps(sparse))
    assert all(torch.equal(mask, masks(twin)[name]) for name, mask in masks(sparse).items())
    found, expected = trained(twin, drawn.inputs), trained(sparse, drawn.inputs)
    assert_same_outputs(found.outputs, expected.outputs)
    assert_close(found.gradients, expected.gradients, 0.0)


@examples(20)
@given(planned())
def test_train_and_eval_flags_and_frozen_parameters_are_kept(drawn: Planned) -> None:
    model = drawn.program.model()
    for index, module in enumerate(model.modules()):
        module.training = bool(index % 2)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(bool(index % 3))
    flags = {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    sparse = transform(model, drawn.inputs, sparsity=0.5)
    assert {path: module.training for path, module in model.named_modules(remove_duplicate=False)} == flags
    found = {path: module.training for path, module in sparse.named_modules(remove_duplicate=False)}
    assert {path: flag for path, flag in found.items() if path in flags} == flags
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in sparse.named_parameters()} == grads
    assert all(module.training for module in sparse.train().modules())
    assert not any(module.training for module in sparse.eval().modules())


@examples(20)
@given(planned())
def test_tickets_go_round(drawn: Planned) -> None:
    sparse = drawn.plan.apply()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.ticket"
        saved = save_ticket(sparse, path, weights=drawn.model.state_dict())
        ticket = load_ticket(path)
        assert ticket.ticket_id == saved.ticket_id
        assert all(torch.equal(mask, masks(sparse)[name]) for name, mask in ticket.masks.items())
        retrained = ticket.apply(transform(_refilled(drawn), drawn.inputs))
        final = ticket.apply(transform(_refilled(drawn), drawn.inputs), final=True)
        assert_same_function(retrained, sparse, drawn.inputs)
        assert_same_function(final, sparse, drawn.inputs)
        if masked_at_parameters(sparse):
            dense = ticket.apply(_refilled(drawn))
            assert_same_function(dense, sparse, drawn.inputs)
            found, expected = trained(dense, drawn.inputs), trained(sparse, drawn.inputs)
            for name in masks(sparse).keys() & expected.gradients.keys():
                assert_close({name: found.gradients[name]}, {name: expected.gradients[name]})
