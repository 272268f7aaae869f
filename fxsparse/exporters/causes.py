"""Why torch could not export a model: the first cause, the part of the model, and what helps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from fxsparse.exporters.inputs import first_line

_MENDS = (
    (
        r"data-dependent|DataDependent|control flow|torch\.cond|unbacked",
        "replace Python branches and loops on values by `torch.where` or `torch.cond`",
    ),
    (r"grouped_mm", "choose another implementation of the experts, one matrix product each or batched"),
    (r"only 4D query", "give scaled_dot_product_attention four axes, by a reshape before and after"),
    (r"No ONNX function found|Unsupported.*[Oo]perator|not supported.*opset", "replace that operator in `forward`"),
)
_MEND = "rewrite that part of `forward`, or export the part of the model around it"


def reason_of(error: BaseException, model: nn.Module) -> str:
    """One line: what went wrong first, and in which module of `model`, where that can be told."""
    text = re.sub(r"\\x1b\[\d+m|\x1b\[\d+m", "", first_line(root_cause(error)))
    part = part_of(error, model)
    return f"{text}, in `{part}`" if part else text


def mend_of(reason: str) -> str:
    """What the user can do about a reason that torch gave."""
    return next((mend for pattern, mend in _MENDS if re.search(pattern, reason)), _MEND)


def is_structural(reason: str) -> bool:
    """Whether a reason that torch gave has nothing to do with the batch size."""
    return any(re.search(pattern, reason) for pattern, _ in _MENDS)


def root_cause(error: BaseException) -> BaseException:
    """The first error of a chain of errors."""
    return list(_chain(error))[-1]


def part_of(error: BaseException, model: nn.Module) -> str:
    """Path of the innermost module that was running, or whose operation was translated, when `error` arose."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = ""
    for each in _chain(error):
        for names in _locals(each):
            node, module = names.get("node"), names.get("self")
            if isinstance(node, fx.Node):
                stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
                found = next((_relative(path) for path in reversed(stack) if _relative(path)), found)
            elif isinstance(module, nn.Module):
                found = paths.get(id(module), "") or found
    return found


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _locals(error: BaseException) -> Iterator[dict[str, Any]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_locals
        trace = trace.tb_next


def _relative(path: str) -> str:
    """The path inside the model of a path inside its flat wrapper."""
    return path.removeprefix("model.") if path.startswith("model.") else ""
