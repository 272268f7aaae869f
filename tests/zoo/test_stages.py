"""The stages find what they are there to find: each is run on a sparse model that was spoilt on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxsparse
from fxsparse.graph.scopes import preserved_rng
from fxsparse.zoo.measure import Outputs, difference, flatten, named_difference, outputs_difference
from fxsparse.zoo.probe import drawn, probe
from fxsparse.zoo.stages import FUNCTIONS
from fxsparse.zoo.stages.train import gradient_gaps
from fxsparse.zoo.subject import NotApplicableError, Sheet, Subject

MLP = "from torch import nn; m=nn.Sequential(nn.Linear(6,8),nn.BatchNorm1d(8),nn.Dropout(.3),nn.Linear(8,3))"
INPUTS = "args=(torch.randn(B,6),); kwargs={}"


@pytest.fixture(autouse=True)
def rng() -> Iterator[None]:
    with preserved_rng():
        yield


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return Subject({"name": "a", "ctor": MLP, "inputs": INPUTS}, 4, 0.8, str(tmp_path))


def judge(subject: Subject, stage: str) -> Sheet:
    sheet = Sheet()
    FUNCTIONS[stage](subject, sheet)
    return sheet


@pytest.mark.parametrize("stage", ["eager", "transform", "train", "reload", "half", "batch"])
def test_an_honest_model_has_no_problems(subject: Subject, stage: str) -> None:
    sheet = judge(subject, stage)
    assert sheet.problems == [] and not sheet.wrong


def revive(sparse: nn.Module) -> None:
    mask = fxsparse.masks(sparse)["0.weight"]
    with torch.no_grad():
        sparse.get_parameter("0.weight")[~mask] = 1e-30


def thin(sparse: nn.Module) -> None:
    masks = {name: mask.clone() for name, mask in fxsparse.masks(sparse).items()}
    masks["0.weight"].flatten()[masks["0.weight"].flatten().nonzero()[0]] = False
    fxsparse.set_masks(sparse, masks)


def freeze_mode(sparse: nn.Module) -> None:
    norm = sparse.get_submodule("1")
    norm.train = lambda mode=True: norm  # type: ignore[method-assign,assignment]


def bend_gradient(sparse: nn.Module) -> None:
    sparse.get_parameter("3.weight").register_hook(lambda gradient: gradient * 1.01)


def noise(sparse: nn.Module) -> None:
    sparse.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))


def shift(sparse: nn.Module) -> None:
    sparse.register_forward_hook(lambda module, args, output: output * 1.001)


def explode(sparse: nn.Module) -> None:
    sparse.get_submodule("3").register_forward_hook(
        lambda module, args, output: output * float("inf") if module.training else output
    )


@pytest.mark.parametrize(
    ("stage", "spoil", "words"),
    [
        ("train", revive, "`0.weight` has 38 dead entries that are not zero"),
        ("train", thin, "keeps 9, planned 10"),
        ("train", freeze_mode, "leaves other modes than the original's: ['1']"),
        ("train", bend_gradient, "gradients of alive entries (`3.weight`) differ by 0.01"),
        ("train", noise, "with two seeds differ"),
        ("train", explode, "the loss is not finite"),
        ("reload", shift, "outputs of the original with the folded state differ by 0.001"),
        ("half", lambda sparse: sparse.get_submodule("3").register_parameter("extra", nn.Parameter(torch.ones(1))), ""),
        ("batch", shift, "outputs at batch size 5 differ by 0.00"),
    ],
)
def test_a_spoilt_model_is_found(subject: Subject, stage: str, spoil: Callable[[nn.Module], None], words: str) -> None:
    spoil(subject.sparse)
    try:
        sheet = judge(subject, stage)
    except NotApplicableError:
        raise
    except Exception as error:  # a stage that raises is a failed stage, too
        assert words == "", error
        return
    assert words in "; ".join(sheet.problems)
    assert sheet.wrong


def test_a_transform_that_is_not_neutral_is_found(subject: Subject) -> None:
    honest = subject.expected
    subject.__dict__["expected"] = Outputs(honest.structure, tuple(t + 1e-3 for t in honest.tensors))
    assert "outputs at sparsity 0 in eval mode differ" in judge(subject, "transform").problems[0]


def test_masks_that_a_state_dict_lacks_are_found(subject: Subject) -> None:
    def drop(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
        state.pop("0.weight_mask", None)

    judge(subject, "transform")
    subject.sparse.register_state_dict_post_hook(drop)
    sheet = judge(subject, "reload")
    assert sheet.problems == ["masks were not loaded: ['0.weight']"]


def test_hooks_that_are_silent_are_counted(subject: Subject) -> None:
    numbers = judge(subject, "reload").numbers
    assert (numbers["leaf_hooks"], numbers["leaf_modules"], numbers["silent_hooks"]) == (4, 4, [])


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        ("batch", {"inputs": "args=(torch.randn(4,6),); kwargs={}"}, "do not depend on the batch size"),
        ("batch", {"inputs": "assert B == 4; args=(torch.randn(4,6),); kwargs={}"}, "exist at batch size 4 only"),
        ("train", {"train_inputs": "args=(torch.randn(4,5),); kwargs={}"}, "the original does not train"),
        (
            "half",
            {"ctor": f"{MLP}; m.register_forward_pre_hook(lambda m, a: a[0].float())"},
            "does not run in bfloat16",
        ),
    ],
)
def test_what_the_original_does_not_do_does_not_apply(
    subject: Subject, stage: str, change: dict[str, str], words: str
) -> None:
    subject.entry = {**subject.entry, **change}
    with pytest.raises(NotApplicableError, match=words):
        judge(subject, stage)


def test_an_entry_that_leaves_no_model_is_named(subject: Subject) -> None:
    subject.entry = {**subject.entry, "ctor": "m=3"}
    with pytest.raises(TypeError, match=r"`ctor` left `m` \(=int\)"):
        subject.build()


def test_building_is_seeded(subject: Subject) -> None:
    first, second = subject.build().state_dict(), subject.build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(subject.inputs()[0][0], subject.inputs()[0][0])
    assert subject.inputs(7)[0][0].shape == (7, 6)


def test_gradients_are_compared_where_they_are_alive() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    mask = {"w": torch.tensor([True, False])}
    assert gradient_gaps({"w": a}, {"w": b}, {}) == ([], 0.25, "w")
    assert gradient_gaps({"w": a}, {"w": b}, mask) == ([], 0.0, "")
    assert gradient_gaps({"w": a, "b": None}, {"w": None, "b": a}, {}) == (["w", "b"], 0.0, "")
    assert gradient_gaps({"w": a, "b": None}, {"w": a, "b": None}, {}) == ([], 0.0, "")
    assert gradient_gaps({"w": a}, {}, {}) == (["w"], 0.0, "")
    assert gradient_gaps({"w": a, "b": a * 1e-9}, {"w": a, "b": a * 2e-9}, {})[1] < 1.1e-6


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([0.0, 0.0], [0.0, 1e-9], float("inf")),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0, float("inf")], [1.0, float("inf")], 0.0),
        ([1.0, float("inf")], [1.0, float("-inf")], float("inf")),
        ([1.0, float("inf")], [1.5, float("inf")], 0.5),
        ([1.0], [1.0, 1.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_differences_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert difference(torch.tensor(a), torch.tensor(b)) == expected


def test_differences_of_other_kinds() -> None:
    assert difference(torch.tensor([1]), torch.tensor([1.0])) == float("inf")
    assert difference(torch.tensor([4, 8]), torch.tensor([4, 6])) == 0.25
    assert difference(torch.tensor([2j]), torch.tensor([1j])) == 0.5
    assert difference(torch.tensor([True]), torch.tensor([False])) == 1.0


def test_small_gradients_are_compared_with_a_share_of_the_largest() -> None:
    expected = {"a": torch.tensor([1.0]), "b": torch.tensor([1e-9])}
    assert named_difference(expected, {"a": torch.tensor([1.0]), "b": torch.tensor([2e-9])})[0] < 1.1e-6
    assert named_difference(expected, {"a": torch.tensor([1.5]), "b": torch.tensor([1e-9])}) == (0.5, "a")
    assert named_difference(expected, {"a": torch.tensor([1.0]), "b": None}) == (float("inf"), "b")
    assert named_difference(expected, {"a": torch.tensor([1.0])}) == (float("inf"), "b")
    assert named_difference({"a": None}, {"a": None}) == (0.0, "")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.complex64, torch.float8_e4m3fn])
def test_buffers_of_any_dtype_are_compared(dtype: torch.dtype) -> None:
    ones, zeros = torch.ones(2).to(dtype), torch.zeros(2).to(dtype)
    assert named_difference({"a": ones}, {"a": ones.clone()}) == (0.0, "")
    assert named_difference({"a": ones}, {"a": zeros}) == (1.0, "a")


def test_the_structure_of_outputs_counts() -> None:
    def outputs(value: object) -> Outputs:
        structure, tensors = flatten(value)
        return Outputs(structure, tuple(tensors))

    x = torch.ones(2)
    assert outputs_difference(outputs({"a": x, "n": 3}), outputs({"a": x, "n": 3})) == 0
    for other in ({"a": x, "n": 4}, {"b": x, "n": 3}, [x, 3], {"a": x.double(), "n": 3}, {"a": x[:1], "n": 3}):
        assert outputs_difference(outputs({"a": x, "n": 3}), outputs(other)) == float("inf")


KEEPING = """
import torch
from torch import nn
class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.table, self.length = nn.Linear(6, 6), None, 0
    def forward(self, x):
        if self.table is None or self.length != x.shape[1]:
            self.length, self.table = x.shape[1], torch.arange(x.shape[1]) * x.new_ones(1)
        return self.layer(x) * self.table
m = Keeping()
"""


def test_the_trace_that_is_timed_leaves_nothing_on_the_model_under_test(tmp_path: Path) -> None:
    sheet = judge(Subject({"name": "a", "ctor": KEEPING, "inputs": INPUTS}, 4, 0.8, str(tmp_path)), "transform")
    assert sheet.problems == [] and sheet.numbers["masked"] == 1


# --- torch.compile ----------------------------------------------------------------------------------------------------


class Routed(nn.Module):
    """The expert takes one row for each alive weight of the gate.

    torch compiles no frame that breaks within a loop, nor its own layers alone: of the original there is no graph.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(6, 1, bias=False)
        self.experts = nn.ModuleList([nn.Linear(6, 6)])
        with torch.no_grad():
            self.gate.weight.copy_(torch.arange(1.0, 7.0))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in self.experts:
            rows = torch.where(self.gate(x)[:, 0] > 0)[0]
            out.index_add_(0, rows, expert(x[rows]))
        return out


def test_a_compilation_that_only_values_need_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Subject, "build", lambda self: Routed())
    entry = {"name": "a", "ctor": "", "inputs": "args=(torch.eye(6),); kwargs={}"}
    sheet = judge(Subject(entry, 6, 0.66, str(tmp_path)), "compile")
    assert sheet.problems == [] and sheet.numbers["recompiled"] > 0
    assert any("same zeros" in remark for remark in sheet.remarks)


def test_a_compilation_that_masks_need_is_a_problem(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = subject.sparse.get_submodule("0")
    layer.word = "old"  # type: ignore[assignment]
    layer.register_forward_hook(lambda module, args, out: out + 1 if module.word == "old" else out + 1.0)
    write = fxsparse.set_masks

    def set_masks(model: nn.Module, masks: dict[str, Tensor]) -> None:
        write(model, masks)
        layer.word = "new"  # type: ignore[assignment]

    monkeypatch.setattr(fxsparse, "set_masks", set_masks)
    assert judge(subject, "compile").problems == ["set_masks led to 1 new compilations"]


DRAWING = """
import itertools
import torch
from torch import nn
calls = itertools.count()
class Drawing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
    def forward(self, x):
        own = torch.Generator().manual_seed(next(calls))
        return self.layer(x * torch.rand(6, generator=own)) if self.training else self.layer(x)
m = Drawing()
"""


@pytest.mark.filterwarnings("ignore:transform. the result could not be compared:UserWarning")
def test_what_no_seed_repeats_in_train_mode_is_compared_within_its_own_noise(tmp_path: Path) -> None:
    subject = Subject({"name": "a", "ctor": DRAWING, "inputs": INPUTS}, 4, 0.5, str(tmp_path))
    sheet = judge(subject, "train")
    assert sheet.problems == [] and "from itself" in " ".join(sheet.remarks)


def test_magnitudes_of_wholly_dead_rows_need_no_gradient(tmp_path: Path) -> None:
    norm = "from torch.nn.utils.parametrizations import weight_norm; from torch import nn; "
    ctor = norm + "m=nn.Sequential(weight_norm(nn.Linear(6,8)),nn.ReLU(),nn.Linear(8,3))"
    subject = Subject({"name": "a", "ctor": ctor, "inputs": INPUTS}, 4, 0.9, str(tmp_path))
    (mask,) = [mask for name, mask in fxsparse.masks(subject.sparse).items() if "original1" in name]
    assert not mask.any(1).all()
    assert judge(subject, "train").problems == []


RESIZING = """
import torch
from torch import nn
class Resizing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("table", torch.zeros(1), persistent=False)
    def forward(self, x):
        if self.table.shape[0] != x.shape[1]:
            self.table = torch.linspace(1, 2, x.shape[1])
        return self.layer(x) * self.table
m = Resizing()
"""


def test_buffers_that_the_forward_pass_replaces_stay_what_they_are(tmp_path: Path) -> None:
    subject = Subject({"name": "a", "ctor": RESIZING, "inputs": INPUTS}, 4, 0.8, str(tmp_path))
    for stage in ("transform", "train", "reload", "batch"):
        assert judge(subject, stage).problems == [], stage


class Detects(nn.Module):
    """Gives the rows whose score is above a threshold, as detectors do: none, or through code without bfloat16."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        found = self.layer(x)
        return found[[i for i, row in enumerate(found) if float(row.detach().sum()) > self.threshold]]


@pytest.mark.parametrize(
    ("threshold", "said"), [(1e9, "its outputs are empty or constant"), (0.0, "outputs differ by")]
)
def test_an_original_is_judged_on_several_inputs_and_not_by_empty_outputs(
    tmp_path: Path, threshold: float, said: str
) -> None:
    torch.manual_seed(0)
    taken, reason = probe(Detects(threshold).eval(), ((torch.randn(6, 4),), {}), tmp_path, 1e-3)
    assert taken == "" and f"the legacy exporter: {said}" in reason


def test_an_original_that_exports_is_found_to(tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert probe(nn.Linear(4, 3).eval(), ((torch.randn(2, 4),), {}), tmp_path, 1e-3) == ("torch.export", "")


def test_random_inputs_are_ones_that_the_model_takes() -> None:
    class Wants(nn.Module):
        def forward(self, x: Tensor, whole: Tensor) -> Tensor:
            assert x[0] == x.max() or (x - torch.tensor([9.0, 1.0, 2.0])).abs().max() < 2
            return x + whole

    example = torch.tensor([9.0, 1.0, 2.0])
    draws = drawn(Wants(), ((example,), {"whole": torch.arange(3)}), count=20)
    assert len(draws) == 20
    for args, kwargs in draws:
        assert not torch.equal(args[0], example) or torch.equal(args[0].sort().values, example.sort().values)
        assert torch.equal(kwargs["whole"], torch.arange(3))


NO_BFLOAT16 = """
import torch
from torch import nn
class Detects(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
    def forward(self, x):
        found = self.layer(x)
        if found.dtype is torch.bfloat16 and int((self.layer.weight == 0).sum()) > 9:
            raise NotImplementedError('"kernel" not implemented for BFloat16')
        return found
m = Detects()
"""


def test_the_original_is_asked_for_bfloat16_with_the_same_zeros(tmp_path: Path) -> None:
    subject = Subject({"name": "a", "ctor": NO_BFLOAT16, "inputs": INPUTS}, 4, 0.8, str(tmp_path))
    with pytest.raises(NotApplicableError, match=r'same zeroed weights: NotImplementedError: "kernel"'):
        judge(subject, "half")


VALUE_DEPENDENT = """
import torch
from torch import nn
class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
    def forward(self, x):
        found = self.layer(x)
        return found * int((self.layer.weight.abs() > 0.42).sum())
m = Counts()
"""


def test_new_compilations_that_the_same_zeros_need_are_no_problem(tmp_path: Path) -> None:
    subject = Subject({"name": "a", "ctor": VALUE_DEPENDENT, "inputs": INPUTS}, 4, 0.8, str(tmp_path))
    with torch.no_grad():
        for parameter in subject.sparse.parameters():
            parameter.mul_(3.0)
    sheet = judge(subject, "compile")
    assert sheet.problems == [] and sheet.numbers["recompiled"] > 0
