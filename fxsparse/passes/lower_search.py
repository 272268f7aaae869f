"""The search for the layers that can be lowered: what fails or makes the outputs differ stays dense."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence

from torch import nn

from fxsparse.passes.lower_forms import Form, LayerRecord, LoweringResult, Policy
from fxsparse.passes.lower_plan import Weight, record, unread
from fxsparse.passes.lower_proof import Proof
from fxsparse.passes.lower_subject import Subject

_ATTEMPTS = (8, 64)  # at least, at most
_WORK = 60_000  # nodes of the graph times attempts


class Search:
    """Lowers what was chosen, all at once; where that fails, by halves.

    The attempts are bounded by the size of the graph. What was not tried alone when they end stays dense, and the notes
    say so.

    Args:
        subject: The model.
        forms: Name of each weight -> its form.
        choose: What the caller chose.
    """

    def __init__(self, subject: Subject, forms: Mapping[str, Form], choose: Mapping[str, Form] | Policy | None) -> None:
        self.first = subject
        self.forms = forms
        self.choose = choose
        self.refused: dict[str, str] = {}
        self.notes: list[str] = [*subject.notes]
        self.attempts = self.allowed = allowed_attempts(subject)
        self._unused: Subject | None = subject
        self._best: tuple[nn.Module, Subject, float] | None = None

    def run(self) -> LoweringResult:
        """The result with all that could be lowered.

        Raises:
            CaptureError: the exported form does not run.
            PassError: it differs from the model, or the model does not repeat itself.
        """
        wanted = [name for name, form in self.forms.items() if form is not Form.DENSE]
        accepted: list[str] = []
        if wanted:
            self.proof = Proof(self.first.folded, self.first.module, self.first.args, self.first.kwargs)
            self.notes += self.proof.notes
            if self.proof.told:
                self._grow(wanted, accepted)
            else:
                self.refused |= dict.fromkeys(wanted, "no output of the example inputs could show that it is equal")
            self._told_of_the_untried(wanted, accepted)
        if self._best is None:
            return LoweringResult(self.first.folded, self._records(self.first, ()), tuple(self.notes))
        module, subject, worst = self._best
        self.notes.insert(0, self.proof.said(worst))
        return LoweringResult(module, self._records(subject, accepted), tuple(self.notes), worst)

    def _grow(self, wanted: Sequence[str], accepted: list[str]) -> None:
        """Add what can be lowered with what is accepted, the largest parts first."""
        waiting = deque([list(wanted)])
        while waiting and self.attempts:
            candidates = waiting.popleft()
            error = self._attempt([*accepted, *candidates])
            if error is None:
                accepted.extend(candidates)
            elif len(candidates) == 1:
                self.refused[candidates[0]] = error
            else:
                middle = len(candidates) // 2
                waiting += (candidates[:middle], candidates[middle:])

    def _attempt(self, names: Sequence[str]) -> str | None:
        """Lower the named weights and keep the result; say why where that does not work."""
        self.attempts -= 1
        subject, self._unused = self._unused or self.first.again(), None
        try:
            module = subject.lower({name: self.forms[name] for name in names})
            worst = self.proof.worst(module)
        except Exception as error:  # whatever fails in a rewritten graph is a reason to leave a layer dense
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        if worst > self.proof.allowed:
            return f"the outputs differ by {worst:.3g} of their scale"
        self._best = module, subject, worst
        return None

    def _told_of_the_untried(self, wanted: Sequence[str], accepted: Sequence[str]) -> None:
        left = [name for name in wanted if name not in {*accepted, *self.refused}]
        if left:
            why = f"not tried alone: the search ended after {self.allowed} attempts"
            self.refused |= dict.fromkeys(left, why)
            self.notes.append(f"{len(left)} of {len(wanted)} layers were {why}; name fewer layers in `choose`")

    def _records(self, subject: Subject, accepted: Sequence[str]) -> tuple[LayerRecord, ...]:
        found, lowered = [], {*accepted}
        for weight in subject.weights:
            name = weight.layer.name
            chosen = callable(self.choose) or (isinstance(self.choose, Mapping) and name in self.choose)
            line = record(weight, self.forms[name] if name in lowered else Form.DENSE, chosen)
            if name in self.refused:
                line = dataclasses.replace(line, reason=f"left as it is: {self.refused[name]}{_computed(weight)}")
            found.append(line)
        return (*found, *unread(subject.masks, subject.weights))


def allowed_attempts(subject: Subject) -> int:
    """How often a model is lowered at most: each attempt costs what its graph does."""
    nodes = len(subject.module.graph.nodes) if subject.module is not None else 1
    return min(max(_WORK // max(1, nodes), _ATTEMPTS[0]), _ATTEMPTS[1])


def _computed(weight: Weight) -> str:
    """What a weight that is no parameter suffers from: its values would be stored, rounded."""
    if all(site.direct for site in weight.sites):
        return ""
    return "; it is computed from parameters, whose result would be stored rounded: store it as a parameter first"
