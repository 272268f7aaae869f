"""What a collector keeps: means, exponential means, keys, formats, files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fisher_cases import LastStep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxsparse.curvature import FisherCollector, Storage
from fxsparse.curvature.collector_moments import Decaying, Moments
from fxsparse.curvature.keys import Key, check_parameters, from_old, restrict, to_old
from fxsparse.curvature.storage import store
from fxsparse.errors import ConfigError, DataError

F64 = torch.float64
ROW = "default|0.weight|channel"


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batches(count: int = 3, n: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(n, 6, generator=generator, dtype=F64), torch.randint(0, 3, (n,), generator=generator))
        for _ in range(count)
    ]


def test_the_exponential_mean_is_corrected_once_and_consistent_in_batch_size() -> None:
    model = network()
    given_batches = batches()
    ema = FisherCollector(model, accumulate="ema", beta=0.9)
    single = [ema.oneshot(batch)[ROW] for batch in given_batches]
    num, den = torch.zeros(4, dtype=F64), 0.0
    for batch, f in zip(given_batches, single, strict=True):
        ema.update(batch)
        num, den = 0.9 * num + 0.1 * f * 4, 0.9 * den + 0.1 * 4
        assert torch.allclose(ema.get()[ROW], num / den, rtol=1e-12)
    first = FisherCollector(model, accumulate="ema", beta=0.9)
    first.update(given_batches[0])
    assert torch.allclose(first.get()[ROW], single[0], rtol=1e-13)  # corrected twice, it reads ten times that
    with pytest.raises(ConfigError, match="variances are kept"):
        ema.variance()


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = True
        self.first, self.second, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x))
        return self.head(y + self.second(x) if self.used else y)


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_what_no_gradient_reached_decays_only_on_request(absent: str) -> None:
    torch.manual_seed(0)
    model = Experts().double()
    one, two, *_ = batches()
    collector = FisherCollector(model, accumulate="ema", beta=0.5, absent=absent)
    collector.update(one)
    before = collector.get()["default|second.weight|channel"]
    model.used = False
    collector.update(two)
    after = collector.get()["default|second.weight|channel"]
    factor = 1.0 if absent == "skip" else 0.25 / 0.75
    assert torch.allclose(after, factor * before, rtol=1e-12)
    mean = FisherCollector(model)
    mean.update(two)
    model.used = True
    mean.update(one)
    assert torch.allclose(mean.get()["default|second.weight|channel"], before / 2, rtol=1e-12)


def test_oneshot_touches_no_task() -> None:
    collector = FisherCollector(network())
    one, two, _ = batches()
    collector.update(one, "a")
    before = collector.state_dict()["tasks"]
    alone = collector.oneshot(two, "b")
    assert collector.tasks() == ("a",)
    assert _flat(before) == _flat(collector.state_dict()["tasks"])
    other = FisherCollector(network())
    other.update(two, "b")
    assert all(torch.equal(alone[key], value) for key, value in other.get("b").items())


def _flat(value: object) -> object:
    if isinstance(value, Tensor):
        return value.tolist()
    return {key: _flat(each) for key, each in value.items()} if isinstance(value, dict) else value


def test_clear_forgets_everything_of_a_task() -> None:
    collector = FisherCollector(network())
    one, two, _ = batches()
    for batch, task in ((one, "a"), (two, "b")):
        collector.update(batch, task)
        collector.consolidate(task)
    collector.clear("a")
    assert collector.tasks() == ("b",)
    for read in (collector.get, collector.variance, collector.standard_error, collector.snapshot, collector.clear):
        with pytest.raises(ConfigError, match="'a'"):
            read("a")
    collector.update(two, "a")
    assert all(torch.equal(v, collector.get("b")["b" + k[1:]]) for k, v in collector.get("a").items())
    assert all(torch.equal(v, collector.variance("b")["b" + k[1:]]) for k, v in collector.variance("a").items())
    collector.clear()
    assert collector.tasks() == ()


def test_batch_means_are_never_squared() -> None:
    """The sum of squared batch means shrinks with the batch; the mean of squares does not."""
    model = network()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 6, generator=generator, dtype=F64)
    y = torch.multinomial(model(x).softmax(-1), 1, generator=generator)[:, 0]
    totals = []
    for size in (1, 8, 64, 512):
        collector = FisherCollector(model)
        for first in range(0, 512, size) if size > 1 else range(16):
            collector.update((x[first : first + size], y[first : first + size]))
        totals.append(sum(float(value.sum()) for value in collector.get().values()))
    assert totals[1] == pytest.approx(totals[3], rel=1e-12) and totals[2] == pytest.approx(totals[3], rel=1e-12)
    assert 0.5 < totals[0] / totals[3] < 2  # 16 samples only
    exact = FisherCollector(model, kind="true")
    exact.update((x, y))
    true = sum(float(value.sum()) for value in exact.get().values())
    assert 0.8 < totals[3] / true < 1.25  # not 1/512 of it


def test_collecting_until_the_largest_groups_have_settled() -> None:
    collector = FisherCollector(network())
    used = collector.collect(batches(40, 16), top=3, overlap=1.0, patience=4)
    assert 5 <= used < 40
    unsettled = FisherCollector(network())
    assert unsettled.collect(batches(3), top=3, patience=50) == 3
    with pytest.raises(ConfigError, match="`top`"):
        collector.collect([], top=0)


def test_metadata() -> None:
    model = network()
    model[2].weight = nn.Parameter(torch.randn(3, 4, dtype=F64))
    model.add_module("other", nn.Linear(4, 3).double())
    model.other.weight = model[2].weight
    collector = FisherCollector(model)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    collector.update(batches()[0])
    info = collector.metadata("default|2.weight|channel")
    assert info.aliases == ("2.weight", "other.weight") and info.units == 4
    assert info.members.tolist() == [4, 4, 4] and info.axis == 0 and info.shape == (3, 4) and info.slow == ""
    assert [key for key in collector.get() if "other.weight" in key] == []
    with pytest.raises(ConfigError, match="does not exist"):
        collector.metadata("default|weight|channel")
    with pytest.raises(ConfigError, match="three parts"):
        collector.metadata("weight")


@pytest.mark.parametrize("storage", list(Storage))
def test_snapshots_in_every_format(storage: Storage) -> None:
    collector = FisherCollector(network(), storage=storage)
    one, two, _ = batches()
    collector.update(one)
    with pytest.raises(ConfigError, match="not consolidated"):
        collector.snapshot()
    exact = collector.get()
    kept = collector.consolidate()
    for key, value in exact.items():
        assert torch.allclose(kept[key].double(), value, rtol=2**-10 if storage is Storage.CPU_FP16 else 1e-6)
    collector.update(two)
    assert all(torch.equal(kept[key], value) for key, value in collector.snapshot().items())
    assert not torch.equal(collector.get()[ROW], exact[ROW])
    assert collector.get()[ROW].dtype is F64  # the running sums are not rounded


def test_formats_refuse_what_is_no_fisher() -> None:
    for bad in (torch.tensor([-1.0]), torch.tensor([float("nan")]), torch.tensor([float("inf")])):
        with pytest.raises(DataError, match="negative or not finite"):
            store(bad, Storage.FP32)
    assert store(torch.zeros(3), Storage.CPU_FP16).read().tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{}, {"accumulate": "ema"}, {"storage": "cpu_fp16"}, {"variance": False}])
def test_state_is_restored_bit_for_bit(tmp_path: Path, options: dict[str, object]) -> None:
    model = network()
    one, two, three = batches()
    collector = FisherCollector(model, kind="mc", **options)  # type: ignore[arg-type]
    collector.update(one, "task 1 é")
    collector.consolidate("task 1 é")
    collector.update(two, "b")
    collector.save(tmp_path / "state.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.safetensors"]
    for restore in ("load", "load_state_dict"):
        other = FisherCollector(model, kind="mc", **options)  # type: ignore[arg-type]
        if restore == "load":
            other.load(tmp_path / "state.safetensors")
        else:
            other.load_state_dict(collector.state_dict())
        assert _flat(other.state_dict()) == _flat(collector.state_dict())
        assert other.get("b").keys() == collector.get("b").keys()
        copy = FisherCollector(model, kind="mc", **options)  # type: ignore[arg-type]
        copy.load_state_dict(collector.state_dict())
        other.update(three, "b")  # goes on with the same draws
        copy.update(three, "b")
        assert _flat(other.state_dict()) == _flat(copy.state_dict())


def test_states_of_other_collectors_are_refused(tmp_path: Path) -> None:
    collector = FisherCollector(network())
    collector.update(batches()[0])
    state = collector.state_dict()
    with pytest.raises(ConfigError, match="`kind` of the state"):
        FisherCollector(network(), kind="true").load_state_dict(state)
    with pytest.raises(ConfigError, match="`schema`"):
        FisherCollector(network()).load_state_dict({**state, "schema": 9})
    with pytest.raises(ConfigError, match="not collected here"):
        FisherCollector(network(), parameters=["0.weight"]).load_state_dict(state)
    (tmp_path / "x").write_bytes(b"no file of ours")
    with pytest.raises(ConfigError, match="no readable safetensors"):
        FisherCollector(network()).load(tmp_path / "x")


def test_keys() -> None:
    for task in ("task_1", "a b", "é|", ""):
        if "|" in task or not task:
            with pytest.raises(ConfigError, match="`task`"):
                FisherCollector(network()).update(batches()[0], task)
        else:
            assert Key.of(str(Key(task, "fc.weight", "channel"))) == (task, "fc.weight", "channel")
    for text in ("a|b", "a|b|c|d", "a||c", "|b|c"):
        with pytest.raises(ConfigError, match="three parts"):
            Key.of(text)
    with pytest.raises(ConfigError, match="holds '|'"):
        check_parameters(["a|b"])


def test_whole_names_are_compared() -> None:
    values = dict.fromkeys(
        ("t|fc.weight|channel", "t|mlp_fc.weight|channel", "t|a.weight|element", "t|ab.weight|element"), 0
    )
    assert list(restrict(values, param="fc.weight")) == ["t|fc.weight|channel"]
    assert list(restrict(values, prefix="a")) == ["t|a.weight|element"]
    assert list(restrict(values, module="ab")) == ["t|ab.weight|element"]
    assert len(restrict(values, group_type="element")) == 2 and restrict(values, task="u") == {}


def test_old_keys() -> None:
    names = ["fc.weight", "weight", "b.fc.weight"]
    old = {"task_1_fc.weight": 1, "t_b.fc.weight": 2}
    new = from_old(old, names, "channel")
    assert new == {"task_1|fc.weight|channel": 1, "t|b.fc.weight|channel": 2}
    assert to_old(new) == old
    with pytest.raises(ConfigError, match="no known parameter"):
        from_old({"task_fc.bias": 0}, names, "channel")
    with pytest.raises(ConfigError, match="no known parameter"):
        from_old({"fc.weight": 0}, ["fc.weight"], "channel")
    with pytest.raises(ConfigError, match="both become"):
        to_old({"t|w|head:q": 0, "t|w|head:k": 1})
    with pytest.raises(ConfigError, match="both become"):
        to_old({"a|b_c|element": 0, "a_b|c|element": 1})


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.floats(0.1, 9), st.floats(0.1, 3)), min_size=2, max_size=9),
    st.integers(1, 8),
)
def test_moments_merge_to_those_of_all(rows: list[tuple[float, float, float]], cut: int) -> None:
    u, m, w = (torch.tensor([row[k] for row in rows], dtype=F64) for k in range(3))
    cut = min(cut, len(rows) - 1)
    whole = Moments.of(u[:, None], m, w)
    parts = Moments.of(u[:cut, None], m[:cut], w[:cut]).merge(Moments.of(u[cut:, None], m[cut:], w[cut:]))
    for name in ("count", "squares", "mass", "mass_spread"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-9, abs=1e-9)
    for name in ("total", "spread", "cross"):
        assert torch.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-9, atol=1e-6)
    f = float((w * u).sum() / (w * m).sum())
    mean = float((w * u).sum() / w.sum())
    assert float(whole.mean()) == pytest.approx(f, rel=1e-12)
    free = float(w.sum() - w.square().sum() / w.sum())
    assert float(whole.variance()) == pytest.approx(float((w * (u - mean) ** 2).sum()) / free, rel=1e-9, abs=1e-9)


def test_a_variance_needs_two_units() -> None:
    with pytest.raises(DataError, match="at least 2 units"):
        Moments.of(torch.ones(1, 1)).variance()
    with pytest.raises(DataError, match="were not kept"):
        Moments.of_sum(torch.ones(1), 3, 3.0).variance()
    with pytest.raises(DataError, match="no unit"):
        Decaying().mean()


def test_many_units_are_added_in_double_precision() -> None:
    big = Moments(1e6, 1e6, 1e6, 0.0, torch.full((1,), 1e6, dtype=torch.float32))
    more = Moments.of_sum(torch.full((1,), 0.01), 1, 1.0)
    more.total = more.total.float() if more.total is not None else None
    merged = big.merge(more)
    assert merged.total is not None and merged.total.dtype is F64 and float(merged.total) == pytest.approx(1e6 + 0.01)


def test_two_processes_with_other_hashes_agree_bit_for_bit() -> None:
    code = (
        "import torch; from torch import nn; from fxsparse.curvature import FisherCollector; torch.manual_seed(0);"
        "m = nn.Sequential(nn.Conv1d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5));"
        "c = FisherCollector(m, kind='sketch'); c.update((torch.randn(6, 3, 5), torch.randint(0, 5, (6,))));"
        "print([(k, v.double().sum().item().hex()) for k, v in c.get().items()])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1", "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and "conv" not in outputs


class Routed(nn.Module):
    """Each sample goes to one of two experts: how many do depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts, self.head = (
            nn.Linear(6, 2),
            nn.ModuleList(nn.Linear(6, 4) for _ in "ab"),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(-1)
        best = scores.argmax(-1)
        y = x.new_zeros(len(x), 4)
        for number, expert in enumerate(self.experts):
            rows = (best == number).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, torch.tanh(expert(x[rows])) * scores[rows, number : number + 1])
        return self.head(y)


@pytest.mark.filterwarnings("ignore:`.*` is collected by per-sample gradients:UserWarning")
def test_models_whose_path_depends_on_values() -> None:
    from fisher_oracle import fisher

    torch.manual_seed(0)
    model = Routed().double()
    for x, y in batches(4, 7):
        collector = FisherCollector(model, groups="element")
        collector.update((x, y))
        for name, value in fisher(model, (x,), y, torch.nn.functional.cross_entropy, "empirical").items():
            found = collector.get()[f"default|{name}|element"]
            assert torch.allclose(found, value, rtol=1e-10, atol=1e-12 * float(value.max())), name


def test_other_lengths_are_examined_anew() -> None:
    torch.manual_seed(0)

    model = LastStep().double()
    collector, total, count = FisherCollector(model), torch.zeros((), dtype=F64), 0
    for length in (3, 5, 3, 1):
        x, y = torch.randn(4, length, 6, dtype=F64), torch.tensor([0, 1, 2, 0])
        collector.update((x, y))
        alone = FisherCollector(model)
        alone.update((x, y))
        total, count = total + alone.get()["default|rnn.weight_ih_l0|unit"], count + 1
    assert torch.allclose(collector.get()["default|rnn.weight_ih_l0|unit"], total / count, rtol=1e-12)
    assert collector.metadata("default|rnn.weight_ih_l0|unit").slow == ""
