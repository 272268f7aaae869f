"""Whether the original runs at all, and whether it repeats itself."""

from __future__ import annotations

from fxsparse.zoo.subject import Sheet, Subject


def eager(subject: Subject, sheet: Sheet) -> None:
    """Build the original twice and run both in eval mode: the outputs are what everything is compared with."""
    model = subject.build()
    parameters = list(model.parameters())
    sheet.numbers["parameters"] = sum(parameter.numel() for parameter in parameters)
    sheet.numbers["modules"] = sum(1 for _ in model.modules())
    expected = subject.expected
    sheet.numbers["outputs"] = len(expected.tensors)
    subject.deterministic = subject.noise == 0.0
    sheet.check(
        subject.noise < float("inf"), "two models built with the same seed have outputs that cannot be compared"
    )
    if not subject.deterministic:
        sheet.numbers["noise"] = subject.noise
        sheet.remarks.append(
            f"not deterministic: two runs differ by {subject.noise:.2g}; {subject.tolerance():.2g} counts as equal"
        )
