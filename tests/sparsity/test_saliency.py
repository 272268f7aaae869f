from __future__ import annotations

import pytest
import torch

from fxsparse.errors import ConfigError
from fxsparse.sparsity import Gradient, Magnitude, Pooling, Random, Taylor, Wanda, generator

WEIGHT = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.0, -1.0]], dtype=torch.float64)
INPUTS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
TARGETS = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)


def gradients() -> torch.Tensor:
    """Gradient of each of the two samples of 1/2 |W x - t|^2, [2, 2, 3]."""
    errors = INPUTS @ WEIGHT.t() - TARGETS
    return errors[:, :, None] * INPUTS[:, None, :]


def test_golden_scores() -> None:
    weight = WEIGHT.clone().requires_grad_()
    loss = 0.5 * (INPUTS @ weight.t() - TARGETS).square().sum(1).mean()
    loss.backward()
    assert loss.item() == 3.0625
    mean = weight.grad
    assert mean is not None
    assert mean.tolist() == [[0.5, -1.25, 2.25], [-1, 0.5, -2.5]] == gradients().mean(0).tolist()
    assert Magnitude().score(weight).tolist() == [[1, 2, 0.5], [0, 1, 1]]
    assert Gradient().score(weight, mean).tolist() == [[0.5, 1.25, 2.25], [1, 0.5, 2.5]]
    taylor = Taylor().score(weight, mean)
    assert taylor.tolist() == [[0.5, 2.5, 1.125], [0, 0.5, 2.5]]
    assert taylor.sum() == 7.125
    wanda = Wanda().score(weight, inputs=INPUTS.square().sum(0).sqrt().expand(2, 3))
    torch.testing.assert_close(wanda, torch.tensor([[1, 2, 1.118034], [0, 1, 2.236068]]).double(), rtol=0, atol=5e-7)
    assert not taylor.requires_grad and torch.equal(weight, WEIGHT)


def test_squared_taylor_averages_squares_over_batches() -> None:
    per_batch = Taylor(squared=True).score(WEIGHT, gradients())
    slow = sum((WEIGHT * g) ** 2 for g in gradients()) / 2
    assert torch.equal(per_batch, slow)
    mean = gradients().mean(0)
    assert torch.equal(Taylor(squared=True).score(WEIGHT, mean), (WEIGHT * mean) ** 2)
    assert not torch.equal(per_batch, (WEIGHT * mean) ** 2)


def test_gradient_is_the_absolute_mean_never_the_mean_of_absolutes() -> None:
    opposite = torch.tensor([[1.0], [-1.0]])
    assert Gradient().score(torch.zeros(1), opposite.mean(0)).tolist() == [0.0]
    with pytest.raises(ConfigError, match="shape"):
        Gradient().score(torch.zeros(1), opposite)


def test_half_precision_products_do_not_underflow() -> None:
    tiny = torch.tensor([1e-4], dtype=torch.float16)
    assert float(Taylor().score(tiny, tiny)) > 0 and Taylor().score(tiny, tiny).dtype == torch.float32
    assert Magnitude().score(tiny.bfloat16()).dtype == torch.float32


def test_random_scores_follow_their_key_and_leave_the_global_state_alone() -> None:
    before = torch.random.get_rng_state()
    weight = torch.zeros(3, 4)
    assert torch.equal(Random(1).score(weight), Random(1).score(weight))
    assert not torch.equal(Random(1).score(weight), Random(2).score(weight))
    by_tensor = [Random(1).score(weight, generator=generator(1, index, 0, "saliency")) for index in (0, 1)]
    assert not torch.equal(*by_tensor) and by_tensor[0].dtype == torch.float64
    assert torch.equal(before, torch.random.get_rng_state())


def test_poolings() -> None:
    assert (Magnitude().pooling, Gradient().pooling, Taylor().pooling) == (Pooling.RMS, Pooling.RMS, Pooling.MEAN)
    assert Wanda().pooling is Pooling.RMS and Wanda().needs_inputs and not Wanda().needs_gradient
    assert Gradient().needs_gradient and Taylor().needs_gradient and not Magnitude().needs_gradient


def test_missing_or_misshapen_input_norms_are_refused() -> None:
    with pytest.raises(ConfigError, match="`inputs` \\(=None\\)"):
        Wanda().score(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="shape"):
        Wanda().score(torch.zeros(2, 3), inputs=torch.zeros(3))


@pytest.mark.parametrize("saliency", [Gradient(), Taylor(), Taylor(squared=True)])
def test_missing_or_misshapen_gradients_are_refused(saliency: Gradient | Taylor) -> None:
    with pytest.raises(ConfigError, match="gradient"):
        saliency.score(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="shape"):
        saliency.score(torch.zeros(2, 3), torch.zeros(3, 2))
