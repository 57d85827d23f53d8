"""BLUR: one step, fixed points, goldens, and its gradient against autograd."""

import pytest
import torch

from hf_plugins.dp_fedavg.blur import blur_gradient, blur_penalty, delta_norm, proximal_gradient
from tests.hf_plugins.dp_fedavg import reference

A = [3.0, 4.0, 0.5, -0.25]


def run(
    strength: float, steps: int, bound: float = 1.0, eta: float = 0.1, hinge: str = "square"
) -> torch.Tensor:
    """SGD on 0.5 ||w - a||^2 + BLUR from 0."""
    a = torch.tensor(A, dtype=torch.float64)
    w = torch.zeros(4, dtype=torch.float64)
    for _ in range(steps):
        pull = blur_gradient([w], strength=strength, clipping_norm=bound, hinge=hinge)[0]
        w = w - eta * (w - a + pull)
    return w


def test_one_step_with_zero_task_gradient() -> None:
    """Outside: delta times (1 - eta lambda) = 1 - 0.1 * 0.4 = 0.96. Inside: bit-identical."""
    outside = [torch.tensor([3.0]), torch.tensor(4.0)]
    stepped = [
        d - 0.1 * g
        for d, g in zip(outside, blur_gradient(outside, strength=0.4, clipping_norm=1.0), strict=True)
    ]
    torch.testing.assert_close(stepped[0], torch.tensor([3.0 * 0.96]))
    torch.testing.assert_close(stepped[1], torch.tensor(4.0 * 0.96))
    inside = [torch.tensor([0.6]), torch.tensor(0.8)]
    for bound in (1.0, 2.0):
        pull = blur_gradient(inside, strength=0.4, clipping_norm=bound)
        assert not any(p.any() for p in pull), "on the surface and inside nothing pulls"


@pytest.mark.parametrize(
    ("strength", "norm"), [(0.4, 3.593681), (1.0, 2.515576), (4.0, 1.006231), (0.0, 5.031153)]
)
def test_fixed_point_on_a_quadratic(strength: float, norm: float) -> None:
    """min(||a||, max(S, ||a|| / (1 + lambda))), direction a; ||a|| = sqrt(25.3125) = 5.031153."""
    w = run(strength, 2000)
    assert float(w.norm()) == pytest.approx(norm, abs=1e-5)
    torch.testing.assert_close(
        w / w.norm(), torch.tensor(A, dtype=torch.float64) / 5.0311529, atol=1e-6, rtol=0
    )


def test_fixed_point_by_coordinates() -> None:
    golden = torch.tensor([2.142857, 2.857143, 0.357143, -0.178571], dtype=torch.float64)
    torch.testing.assert_close(run(0.4, 2000), golden, atol=1e-6, rtol=0)


def test_after_ten_steps() -> None:
    golden = torch.tensor([1.680163, 2.240217, 0.280027, -0.140014], dtype=torch.float64)
    torch.testing.assert_close(run(0.4, 10), golden, atol=1e-6, rtol=0)
    assert float(run(0.4, 10).norm()) == pytest.approx(2.817719, abs=1e-6)
    assert float(run(0.0, 10).norm()) == pytest.approx(3.276898, abs=1e-6)


def test_against_reference() -> None:
    expected = reference.blur_on_quadratic(A, 0.1, 0.4, 1.0, 10)
    torch.testing.assert_close(run(0.4, 10), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("hinge", ["square", "norm"])
@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_gradient_is_that_of_the_penalty(hinge: str, scale: float) -> None:
    delta = [
        (torch.randn(s, generator=torch.Generator().manual_seed(1)) * scale).requires_grad_()
        for s in [(3, 2), ()]
    ]
    blur_penalty(delta, strength=0.7, clipping_norm=1.5, hinge=hinge).backward()
    pull = blur_gradient([d.detach() for d in delta], strength=0.7, clipping_norm=1.5, hinge=hinge)
    for d, p in zip(delta, pull, strict=True):
        torch.testing.assert_close(
            p, d.grad if d.grad is not None else torch.zeros_like(d), atol=1e-6, rtol=1e-5
        )


def test_penalty_by_hand() -> None:
    """delta = [3, 4], S = 1, lambda = 2: square (25 - 1) = 24; norm (5 - 1)^2 = 16."""
    delta = [torch.tensor([3.0, 4.0])]
    assert float(blur_penalty(delta, strength=2.0, clipping_norm=1.0)) == 24.0
    assert float(blur_penalty(delta, strength=2.0, clipping_norm=1.0, hinge="norm")) == 16.0
    assert float(blur_penalty(delta, strength=2.0, clipping_norm=6.0)) == 0.0


def test_clients_side_by_side_have_their_own_norm() -> None:
    near, far = torch.full((1, 4), 0.1), torch.full((1, 4), 10.0)
    pull = blur_gradient([torch.cat([near, far])], strength=0.5, clipping_norm=1.0, lead=1)[0]
    assert not pull[0].any()
    torch.testing.assert_close(pull[1], far[0] * 0.5)
    assert delta_norm([torch.cat([near, far])], lead=1).tolist() == pytest.approx([0.2, 20.0])


def test_proximal_pulls_everywhere() -> None:
    assert proximal_gradient([torch.tensor([0.1])], strength=2.0)[0].tolist() == pytest.approx([0.2])
