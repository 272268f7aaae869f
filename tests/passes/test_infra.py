"""Each always-on check of the pass contract catches the pass that breaks it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fxsparse.errors import ConfigError, PassError
from fxsparse.graph import capture, edit, provenance
from fxsparse.passes import DIFFERENT, Close, Pass, Pipeline, graphs_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture(Net()).module


X = (torch.linspace(-1, 2, 20).reshape(5, 4),)


def relu_of(module: nn.Module) -> torch.fx.Node:
    (node,) = graphs_of(module)[""].graph.find_nodes(op="call_function", target=torch.relu)
    return node


class Idle(Pass):
    def call(self, module: nn.Module) -> bool:
        return False


class Doubles(Pass):
    """relu -> relu * 2, well made but not equivalent."""

    target = torch.mul

    def call(self, module: nn.Module) -> bool:
        relu = relu_of(module)
        new = edit.insert_call(
            relu.graph, self.target, (relu, 2), pass_name=self.name, what="doubles", source=relu.name, after=relu
        )
        edit.replace_uses(relu, new)
        self.record(relu.name, "doubled")
        return True


def test_an_idle_pass_returns_an_equal_clone(net: nn.Module) -> None:
    result = Idle()(net, X)
    assert not result.modified and result.records == () and result.module is not net
    assert result.verification is not None and result.verification.compared == ("eval", "train")
    assert result.module.first is not net.first
    for name, parameter in net.named_parameters():
        assert result.module.get_parameter(name) is parameter


def test_a_pass_that_changes_the_function_is_caught_on_example_inputs(net: nn.Module) -> None:
    assert Doubles()(net).modified
    with pytest.raises(PassError, match=r"^doubles: eval mode: output 0 differs"):
        Doubles()(net, X)


def test_declared_equivalence_rules_the_comparison(net: nn.Module) -> None:
    class Meant(Doubles):
        equivalence = DIFFERENT("it doubles")

    class TooLoose(Doubles):
        equivalence = Close(rtol=0.5)

    assert Meant()(net, X).verification.notes == ("not compared: it doubles",)
    with pytest.raises(PassError, match="too_loose: eval mode"):
        TooLoose()(net, X)


def test_writing_into_a_shared_tensor_is_caught(net: nn.Module) -> None:
    class Writes(Pass):
        def call(self, module: nn.Module) -> bool:
            module.first.weight.data.view(-1)[5] += 1e-6  # unseen by version counters
            return True

    with pytest.raises(PassError, match=r"writes: the input was changed: `first.weight` of its tensors"):
        Writes()(net)


def test_writing_into_a_buffer_is_caught(net: nn.Module) -> None:
    class Writes(Pass):
        def call(self, module: nn.Module) -> bool:
            module.norm.running_mean += 1
            return True

    with pytest.raises(PassError, match="the input was changed: `norm.running_mean`"):
        Writes()(net)


def test_freezing_a_shared_parameter_is_caught(net: nn.Module) -> None:
    class Freezes(Pass):
        def call(self, module: nn.Module) -> bool:
            module.first.weight.requires_grad_(False)
            return True

    with pytest.raises(PassError, match="the input was changed: `first.weight`"):
        Freezes()(net)


def test_reaching_for_the_input_itself_is_caught(net: nn.Module) -> None:
    class Reaches(Pass):
        def call(self, module: nn.Module) -> bool:
            net.second = nn.Linear(4, 2)
            return False

    with pytest.raises(PassError, match="the input was changed"):
        Reaches()(net)


def test_editing_the_graph_of_the_input_is_caught(net: nn.Module) -> None:
    class Reaches(Pass):
        def call(self, module: nn.Module) -> bool:
            relu = relu_of(net)
            relu.target = torch.sigmoid
            return False

    with pytest.raises(PassError, match="of its graphs"):
        Reaches()(net)


def test_both_kinds_of_lies_about_modified_are_caught(net: nn.Module) -> None:
    class Boasts(Pass):
        def call(self, module: nn.Module) -> bool:
            return True

    class Hides(Doubles):
        def call(self, module: nn.Module) -> bool:
            super().call(module)
            return False

    class HidesSwap(Pass):
        def call(self, module: nn.Module) -> bool:
            module.second = nn.Linear(4, 2)
            return False

    with pytest.raises(PassError, match="boasts: `call` returned True, but the module did not change"):
        Boasts()(net)
    with pytest.raises(PassError, match="hides: `call` returned False, but the module changed"):
        Hides()(net)
    with pytest.raises(PassError, match="hides_swap: `call` returned False"):
        HidesSwap()(net)


def test_a_node_without_provenance_is_caught(net: nn.Module) -> None:
    class Unstamped(Pass):
        def call(self, module: nn.Module) -> bool:
            relu = relu_of(module)
            with relu.graph.inserting_after(relu):
                new = relu.graph.call_function(torch.neg, (relu,))
            edit.replace_uses(relu, new)
            return True

    with pytest.raises(PassError, match="unstamped: node `neg` of the graph was born without provenance"):
        Unstamped()(net)


def test_a_dangling_target_is_caught(net: nn.Module) -> None:
    class Dangles(Pass):
        def call(self, module: nn.Module) -> bool:
            del module.norm
            return True

    with pytest.raises(PassError, match="dangles: node `norm` refers to `norm`"):
        Dangles()(net)


def test_an_ill_formed_graph_is_caught(net: nn.Module) -> None:
    class Disorders(Pass):
        def call(self, module: nn.Module) -> bool:
            relu = relu_of(module)
            placeholder = next(iter(relu.graph.nodes))
            placeholder.prepend(relu)
            return True

    with pytest.raises(PassError, match="disorders: "):
        Disorders()(net)


class Wanting(Pass):
    targets = ("a", "b")

    def __init__(self, *found: str) -> None:
        self.found = found

    def call(self, module: nn.Module) -> bool:
        for name in self.found:
            self.record(name, "seen")
        return False


def test_every_requested_target_is_matched_exactly_once(net: nn.Module) -> None:
    assert [r.target for r in Wanting("b", "c", "a")(net).records] == ["b", "c", "a"]
    with pytest.raises(PassError, match="wanting: nothing was found to rewrite for `b`"):
        Wanting("a")(net)
    with pytest.raises(PassError, match="wanting: `a` matched more than once"):
        Wanting("a", "b", "a")(net)


def test_a_cleanup_pass_that_never_ends_is_caught(net: nn.Module) -> None:
    class Restless(Doubles):
        idempotent = True

    with pytest.raises(PassError, match="restless: a second run still changes the module"):
        Restless()(net)


def test_ensures_sees_the_result_and_requires_the_input(net: nn.Module) -> None:
    seen = []

    class Looks(Doubles):
        def requires(self, module: nn.Module) -> None:
            seen.append(module)

        def ensures(self, before: nn.Module, after: nn.Module) -> None:
            seen.extend((before, after))

    result = Looks()(net)
    assert seen[0] is net and seen[1] is net and seen[2] is result.module

    class Refuses(Idle):
        def ensures(self, before: nn.Module, after: nn.Module) -> None:
            raise ConfigError("`x` (=1) is wrong")

    with pytest.raises(PassError, match=r"refuses: `x` \(=1\) is wrong"):
        Refuses()(net)


def test_any_error_is_wrapped_with_the_name_of_the_pass(net: nn.Module) -> None:
    class Breaks(Pass):
        def call(self, module: nn.Module) -> bool:
            raise KeyError("k")

    with pytest.raises(PassError, match="breaks: KeyError: 'k'") as caught:
        Breaks()(net)
    assert isinstance(caught.value.__cause__, KeyError)


def test_dead_code_goes_but_what_the_user_left_stays(net: nn.Module) -> None:
    class Forgets(Pass):
        def call(self, module: nn.Module) -> bool:
            relu = relu_of(module)
            new = edit.insert_call(
                relu.graph, torch.sigmoid, relu.args, pass_name=self.name, what="sigmoid", source="", after=relu
            )
            edit.replace_uses(relu, new)
            return True

    result = Forgets()(net)
    names = [node.name for node in graphs_of(result.module)[""].graph.nodes]
    assert "sigmoid" in names and "relu" not in names
    assert "sigmoid" in graphs_of(result.module)[""].code
    assert "relu" in [node.name for node in graphs_of(net)[""].graph.nodes]
    call = next(node for node in graphs_of(result.module)[""].graph.nodes if node.name == "norm")
    assert call.op == "call_module"


def test_records_belong_into_call() -> None:
    with pytest.raises(PassError, match="`record` belongs into `call`"):
        Idle().record("x", "y")


def test_clones_do_not_share_provenance(net: nn.Module) -> None:
    class Stamps(Pass):
        def call(self, module: nn.Module) -> bool:
            provenance.stamp(relu_of(module), self.name, "looked at")
            return False

    result = Stamps()(net)
    assert provenance.read(relu_of(result.module)).pass_name == "stamps"
    assert provenance.read(relu_of(net)) is None


def test_meta_and_hooks_survive(net: nn.Module) -> None:
    graphs_of(net)[""].meta["note"] = "kept"
    calls = []
    net.first.register_forward_hook(lambda *_: calls.append(1))
    result = Idle()(net)
    assert graphs_of(result.module)[""].meta["note"] == "kept"
    result.module(*X)
    assert calls == [1]


def test_a_pipeline_names_and_prints_its_stages(net: nn.Module) -> None:
    pipeline = Pipeline([Idle(), Doubles()])
    result = pipeline(net)
    assert [stage.name for stage in result.stages] == ["captured", "idle", "doubles"]
    assert result.modified and [r.pass_name for r in result.records] == ["doubles"]
    assert "doubles: relu: doubled" == str(result.records[0])
    text = str(result.stage("doubles"))
    assert text.startswith("== doubles ==\n  relu: doubled\n") and "mul" in text
    assert "mul" not in str(result.stage("captured"))
    with pytest.raises(ConfigError, match=r"`stage` \(='no'\).*captured, idle, doubles"):
        result.stage("no")


def test_stop_after(net: nn.Module) -> None:
    result = Pipeline([Idle(), Doubles()], stop_after="idle")(net)
    assert [stage.name for stage in result.stages] == ["captured", "idle"] and not result.modified
    with pytest.raises(ConfigError, match=r"`stop_after` \(='fold'\) must be one of idle, doubles"):
        Pipeline([Idle(), Doubles()], stop_after="fold")


def test_a_pipeline_checks_each_pass_on_example_inputs(net: nn.Module) -> None:
    with pytest.raises(PassError, match="^doubles: eval mode"):
        Pipeline([Idle(), Doubles()])(net, X)
    assert Pipeline([Idle(), Idle()])(net, X).modified is False


def test_the_global_random_state_stays(net: nn.Module) -> None:
    before = torch.get_rng_state()
    Idle()(net, X)
    assert torch.equal(before, torch.get_rng_state())


def test_a_plain_module_without_graphs_is_accepted() -> None:
    class Swaps(Pass):
        def call(self, module: nn.Module) -> bool:
            module[1] = nn.Tanh()
            return True

    before = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    result = Swaps()(before)
    assert isinstance(result.module[1], nn.Tanh) and isinstance(before[1], nn.ReLU)


class SetsAttribute(Pass):
    equivalence = DIFFERENT("another epsilon")

    def __init__(self, claim: bool) -> None:
        self.claim = claim

    def call(self, module: nn.Module) -> bool:
        module.norm.eps = 0.5
        return self.claim


def test_a_plain_attribute_counts_as_a_change(net: nn.Module) -> None:
    assert SetsAttribute(claim=True)(net).modified
    with pytest.raises(PassError, match="returned False, but the module changed"):
        SetsAttribute(claim=False)(net)
    assert net.norm.eps == 1e-5


def test_what_cannot_be_compared_is_said(net: nn.Module) -> None:
    with pytest.warns(UserWarning, match="idle: the result could not be compared: eval mode: .*RuntimeError"):
        Idle()(net, (torch.zeros(2, 3),))


def test_a_pipeline_refuses_what_is_no_pass() -> None:
    with pytest.raises(ConfigError, match="`passes` holds .*, which is no Pass"):
        Pipeline([Idle])
