"""The core: values by hand, the literal formula, the gradient, and every numerical trap of the dossier."""

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_plugins.pkd.pearson import (
    ChannelMoments,
    channel_moments,
    channel_terms,
    resize,
    standardised_mse,
)
from tests.mm_plugins.pkd.reference import correlation_loops, pkd_loops, pkd_tensors

Pair = tuple[Tensor, Tensor]


def pair(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0, mix: float = 0.5) -> Pair:
    """A student and a teacher map that correlate a little, with means and scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    common, s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    scales = torch.rand(2, 1, shape[1], 1, 1, generator=generator, dtype=torch.float64) * 3 + 0.1
    return ((mix * common + s) * scales[0] - 2).to(dtype), ((mix * common + t) * scales[1] + 1).to(dtype)


def row(*values: float) -> Tensor:
    """One image, one channel, one row."""
    return torch.tensor(values, dtype=torch.float64).view(1, 1, 1, -1)


def gradient(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    student = student.detach().clone().requires_grad_()
    return torch.autograd.grad(standardised_mse(student, teacher, **options).loss, student)[0]


def test_opposite_pair_by_hand() -> None:
    """Fact 3. s=[0,1], t=[1,0]: r=-1 and n=2, so the loss is (n-1)/n (1-r) = 1/2 * 2 = 1; eps shifts it by
    3e-6."""
    torch.testing.assert_close(
        standardised_mse(row(0, 1), row(1, 0)).loss, torch.tensor(1.0).double(), atol=1e-5, rtol=0
    )


def test_orthogonal_pair_by_hand() -> None:
    """s=[0,0,1,1], t=[0,1,0,1]: centred products +1/4 -1/4 -1/4 +1/4 = 0, so r=0 and the loss is (n-1)/n =
    3/4."""
    loss = standardised_mse(row(0, 0, 1, 1), row(0, 1, 0, 1), eps=0.0).loss
    torch.testing.assert_close(loss, torch.tensor(0.75).double(), atol=1e-15, rtol=0)


def test_five_sums_by_hand() -> None:
    """s=[1,2,3,4], t=[1,2,3,5]: means 2.5, 2.75; SS = 2.25+.25+.25+2.25 = 5; TT = 3.0625+.5625+.0625+5.0625 =
    8.75; ST = 2.625+.375+.125+3.375 = 6.5; r = 6.5/sqrt(43.75), loss = 3/4 (1 - r)."""
    s, t = row(1, 2, 3, 4), row(1, 2, 3, 5)
    moments = channel_moments(s, t)
    assert [float(x) for x in moments] == pytest.approx([4, 2.5, 2.75, 5, 8.75, 6.5], abs=1e-14)
    result = standardised_mse(s, t, eps=0.0)
    r = 6.5 / 43.75**0.5
    assert float(result.correlation_C) == pytest.approx(r, abs=1e-14)
    assert float(result.loss) == pytest.approx(0.75 * (1 - r), abs=1e-14)


def test_eps_is_added_to_the_unbiased_std_by_hand() -> None:
    """Fact 1. s=[-2,2]: unbiased sd 2 sqrt(2). With eps=sqrt(2) each s_hat is -+2/(3 sqrt(2)); t is the
    opposite, so each difference is 4/(3 sqrt(2)), its square 8/9, and half the mean 4/9. (The biased sd gives
    0.54.)"""
    loss = standardised_mse(row(-2, 2), row(2, -2), eps=2**0.5).loss
    assert float(loss) == pytest.approx(4 / 9, abs=1e-15)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 5.0, -50.0]),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_equals_the_literal_formula(shape: tuple[int, int, int, int], seed: int, offset: float) -> None:
    """Fact 1: 1e-12 in fp64 and 1e-6 in fp32 (with the rounding that an offset brings), any shape."""
    s, t = pair(*shape, seed=seed)
    if shape[0] * shape[2] * shape[3] == 1:
        return
    assert float(standardised_mse(s, t).loss) == pytest.approx(pkd_loops(s, t), abs=1e-12)
    s, t = s.float() + offset, t.float()
    exact = pkd_loops(s.double(), t.double())
    assert float(standardised_mse(s, t).loss) == pytest.approx(exact, abs=1e-6 * max(1, abs(offset)))


def test_equals_the_authors_form_on_four_levels() -> None:
    """Fact 1: value and gradient of the tensor form, 256 channels, P3..P6 of a 256-pixel image."""
    for size in (32, 16, 8, 4):
        s, t = pair(2, 256, size, size, dtype=torch.float32, seed=size)
        s.requires_grad_()
        ours, theirs = standardised_mse(s, t).loss, pkd_tensors(s, t)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, s)[0] for x in (ours, theirs)), rtol=1e-4, atol=1e-9
        )


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_identity_with_the_correlation(eps: float) -> None:
    """Fact 2: L = mean_c (n-1)/(2n) (a^2 + b^2 - 2 a b r); a = b = 1 at eps = 0."""
    s, t = pair(2, 6, 5, 4)
    n = 40
    sd_s, sd_t = (x.transpose(0, 1).flatten(1).std(1) for x in (s, t))
    a, b = sd_s / (sd_s + eps), sd_t / (sd_t + eps)
    r = torch.tensor(correlation_loops(s, t), dtype=torch.float64)
    expected = ((n - 1) / (2 * n) * (a**2 + b**2 - 2 * a * b * r)).mean()
    result = standardised_mse(s, t, eps=eps)
    assert float(result.loss) == pytest.approx(float(expected), abs=1e-14)
    torch.testing.assert_close(result.correlation_C, r, atol=1e-13, rtol=0)


def test_invariances_and_bounds() -> None:
    """Fact 3: 0 for equal maps; no change under shift and positive scale; 2(n-1)/n for the negative (n =
    126)."""
    s, t = pair(2, 4, 7, 9)
    assert float(standardised_mse(t, t).loss) == pytest.approx(0, abs=1e-14)
    moved = s * torch.tensor([0.1, 1, 7, 30]).view(-1, 1, 1) + torch.tensor([5, 0, -3, 100]).view(-1, 1, 1)
    assert float(standardised_mse(moved, t).loss) == pytest.approx(
        float(standardised_mse(s, t).loss), abs=1e-6 * 20
    )
    assert float(standardised_mse(moved, t, eps=0.0).loss) == pytest.approx(
        float(standardised_mse(s, t, eps=0.0).loss), abs=1e-12
    )
    assert float(standardised_mse(-t, t, eps=0.0).loss) == pytest.approx(2 * 125 / 126, abs=1e-12)
    assert 2 * 125 / 126 - 1e-4 < float(standardised_mse(-t, t).loss) < 2 * 125 / 126


def test_unrelated_features_give_one() -> None:
    """Fact 3: r of independent Gaussians has sd 1/sqrt(n); over 64 channels of n = 2048 the mean stays within
    0.05 beyond 17 sigma."""
    s, t = pair(2, 64, 32, 32, mix=0.0)
    assert float(standardised_mse(s, t).loss) == pytest.approx(1.0, abs=0.05)


def test_gradient_is_the_closed_form() -> None:
    """Fact 4: (r s_hat - t_hat) / (n sd C), sums to 0 over a channel and is orthogonal to s_hat."""
    s, t = pair(2, 6, 5, 4)
    grad = gradient(s, t).transpose(0, 1).flatten(1)
    flat_s, flat_t = (x.transpose(0, 1).flatten(1) for x in (s, t))
    s_hat, t_hat = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (flat_s, flat_t))
    r = torch.tensor(correlation_loops(s, t), dtype=torch.float64)[:, None]
    expected = (r * s_hat - t_hat) / (40 * flat_s.std(1, keepdim=True) * 6)
    assert float((grad - expected).norm() / expected.norm()) < 1e-5
    assert float(grad.sum(1).abs().max()) < 1e-15
    expected_norm = (39 * (1 - r[:, 0] ** 2)).sqrt() / (40 * flat_s.std(1) * 6)
    torch.testing.assert_close(grad.norm(dim=1), expected_norm, rtol=1e-5, atol=0)
    exact = gradient(s, t, eps=0.0).transpose(0, 1).flatten(1)
    assert float((exact * s_hat).sum(1).abs().max()) < 1e-15


@pytest.mark.parametrize("options", [{}, {"eps": 0.3}, {"resize_student": False}], ids=str)
@pytest.mark.parametrize("teacher_size", [(3, 4), (5, 8)])
def test_gradcheck(options: dict, teacher_size: tuple[int, int]) -> None:
    """Fact 4 and 6: the hand-written backward against finite differences, with a resize and a large eps
    too."""
    s, _ = pair(2, 3, 3, 4)
    _, t = pair(2, 3, *teacher_size, seed=1)
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: standardised_mse(x, t, **options).loss, (s,))


def test_gradcheck_with_mask_and_factor() -> None:
    """The mask belongs to the function that is differentiated; the factor scales the gradient only."""
    s, t = pair(2, 3, 3, 4)
    valid = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: standardised_mse(x, t, valid_N1HW=valid).loss, (s,))
    torch.testing.assert_close(gradient(s, t, gradient_factor=3.0), 3 * gradient(s, t))
    assert standardised_mse(s, t, gradient_factor=3.0).loss == standardised_mse(s, t).loss


def test_teacher_receives_no_gradient() -> None:
    """Fact 4: also if it asks for one."""
    s, t = pair(1, 2, 3, 3)
    s.requires_grad_(), t.requires_grad_()
    standardised_mse(s, t).loss.backward()
    assert s.grad is not None
    assert t.grad is None


@pytest.mark.parametrize("teacher_size", [(8, 8), (4, 6)], ids=["both", "width"])
def test_resize_comes_first(teacher_size: tuple[int, int]) -> None:
    """Fact 6: the student is interpolated to the teacher, or the teacher to the student; equal H and unequal
    W too."""
    s, _ = pair(2, 3, 4, 4)
    _, t = pair(2, 3, *teacher_size, seed=1)
    s.requires_grad_()
    ours, theirs = standardised_mse(s, t).loss, pkd_tensors(s, t)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (ours, theirs)), rtol=1e-9, atol=1e-12)
    small = F.interpolate(t, (4, 4), mode="bilinear")
    assert float(standardised_mse(s, t, resize_student=False).loss) == pytest.approx(
        pkd_loops(s, small), abs=1e-12
    )


def test_resize_returns_the_same_tensor_if_it_fits() -> None:
    s, _ = pair(1, 1, 3, 4)
    assert resize(s, (3, 4)) is s


def test_single_position_gives_zero() -> None:
    """Fact 7: n = 1 has no std (the formula gives NaN); here loss and gradient are 0."""
    s, t = pair(1, 3, 1, 1)
    assert float(standardised_mse(s, t).loss) == 0
    assert gradient(s, t).tolist() == torch.zeros(1, 3, 1, 1).tolist()


def test_two_positions_have_the_factor_one_half() -> None:
    """n = 2: r is +1 or -1, so the loss of a channel is 0 or (1/2) * 2 = 1."""
    s = torch.tensor([[[[0.0, 1.0]], [[0.0, 1.0]]]]).double()
    t = torch.tensor([[[[0.0, 3.0]], [[4.0, 2.0]]]]).double()
    assert float(standardised_mse(s, t, eps=0.0).loss) == pytest.approx(0.5, abs=1e-15)


@pytest.mark.parametrize("level", [0.0, 0.1, 1000.0, -3e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_student_channel_gets_no_gradient(level: float, dtype: torch.dtype) -> None:
    """Fact 7. A constant channel has s_hat = 0, so its loss is sum t_hat^2 / 2n = (n-1)/(2n); the formula's
    gradient would be 1/eps = 1e6 times larger than that of a live channel."""
    s, t = pair(2, 4, 6, 5, dtype=dtype)
    s[:, 1] = level
    result = standardised_mse(s, t)
    rest = standardised_mse(s[:, [0, 2, 3]], t[:, [0, 2, 3]]).loss
    assert float(result.loss) == pytest.approx((3 * float(rest) + 59 / 120) / 4, abs=2e-6)
    assert result.dead_C.tolist() == [False, True, False, False]
    assert float(result.correlation_C[1]) == 0
    norms = gradient(s, t).transpose(0, 1).flatten(1).norm(dim=1)
    assert float(norms[1]) == 0
    assert float(norms.min()) < float(norms.max()) < 1


def test_rounding_noise_is_no_signal() -> None:
    """2.8: mean 1000 and sd 1e-4 in fp32 is rounding noise (the formula's gradient norm is about 6); so is an
    sd below eps around a mean of 0, where the formula's gradient would be 1/eps = 1e6 times too large."""
    s, t = pair(2, 3, 8, 8, dtype=torch.float32)
    s[:, 0] = 1000 + 1e-4 * s[:, 0]
    s[:, 1] = 1e-8 * (s[:, 1] - s[:, 1].mean())
    assert standardised_mse(s, t).dead_C.tolist() == [True, True, False]
    assert float(gradient(s, t)[:, :2].norm()) == 0


def test_large_mean_keeps_its_correlation() -> None:
    """Two passes: at mean 1000 and sd 1 sums of raw squares would lose r in fp32 (1e6 * 6e-8 = 0.06 on 1)."""
    s, t = pair(2, 2, 16, 16)
    far = s + 1000
    exact = standardised_mse(far.float().double(), t).loss
    assert float(standardised_mse(far.float(), t.float()).loss) == pytest.approx(float(exact), abs=2e-6)


def test_constant_teacher_channel_keeps_the_value_of_the_formula() -> None:
    """2.8: t_hat = 0, so the channel's loss is (n-1)/(2n) a^2 and its gradient about eps: harmless, kept."""
    s, t = pair(2, 2, 6, 5)
    t[:, 0] = 7
    result = standardised_mse(s, t)
    assert float(result.loss) == pytest.approx(pkd_loops(s, t), abs=1e-12)
    assert result.dead_C.tolist() == [True, False]
    assert float(gradient(s, t)[:, 0].norm()) < 1e-5


def test_teacher_finite_is_told() -> None:
    """Fact 7: inf and NaN in the teacher are reported; the caller names the level."""
    for bad in (float("inf"), float("nan")):
        s, t = pair(2, 3, 4, 4)
        assert bool(standardised_mse(s, t).teacher_finite)
        t[1, 2, 0, 0] = bad
        assert not bool(standardised_mse(s, t).teacher_finite)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("teacher_size", [6, 12])
def test_half_precision_is_computed_in_fp32(dtype: torch.dtype, autocast: bool, teacher_size: int) -> None:
    """Fact 8: exactly the fp32 result of the upcast maps, also under autocast; the gradient has the input's
    dtype."""
    s, _ = pair(2, 4, 6, 6, dtype=dtype)
    _, t = pair(2, 4, teacher_size, teacher_size, dtype=dtype, seed=1)
    s.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        half = standardised_mse(s, t).loss
        (grad,) = torch.autograd.grad(half, s)
    full = standardised_mse(s.float(), t.float()).loss
    assert half.dtype == torch.float32
    assert half.item() == full.item()
    torch.testing.assert_close(grad, gradient(s.float(), t.float()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("teacher_size", [16, 32])
def test_saves_nothing_of_the_size_of_a_map(teacher_size: int) -> None:
    """Section 8: only the two inputs are kept for backward, at their own addresses, also with a resize."""
    s, _ = pair(2, 8, 16, 16, dtype=torch.float32)
    _, t = pair(2, 8, teacher_size, teacher_size, dtype=torch.float32)
    s.requires_grad_()
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        standardised_mse(s, t)
    beyond = [x for x in kept if x.data_ptr() not in (s.data_ptr(), t.data_ptr())]
    assert len(kept) > len(beyond)
    assert sum(x.numel() for x in beyond) <= 11 * 8


def test_mask_equals_leaving_positions_out() -> None:
    """A mask that keeps a rectangle is the loss of the rectangle, and the rest gets no gradient."""
    s, t = pair(2, 3, 6, 5)
    valid = torch.zeros(2, 1, 6, 5, dtype=torch.bool)
    valid[:, :, :4, :3] = True
    s[~valid.expand_as(s)] = float("nan")
    inside_s, inside_t = s[:, :, :4, :3], t[:, :, :4, :3]
    result = standardised_mse(s, t, valid_N1HW=valid)
    assert float(result.loss) == pytest.approx(pkd_loops(inside_s, inside_t), abs=1e-12)
    grad = gradient(s, t, valid_N1HW=valid)
    torch.testing.assert_close(grad[:, :, :4, :3], gradient(inside_s, inside_t))
    assert float(grad[:, :, 4:].abs().sum() + grad[:, :, :, 3:].abs().sum()) == 0


def test_reduce_gives_the_global_batch() -> None:
    """Fact 15: two shards that add their sums give value and gradient of the whole batch; the gradient times
    the number of shards undoes the averaging of DDP. Shards of one halve differ from it (2.8)."""
    s, t = pair(4, 3, 5, 4)
    barrier, box = threading.Barrier(2), [torch.empty(0), torch.empty(0)]
    out: list[Pair] = [(s, s), (s, s)]

    def shard(rank: int) -> None:
        def reduce(x: Tensor) -> Tensor:
            box[rank] = x
            barrier.wait()
            total = box[0] + box[1]
            barrier.wait()
            return total

        part = s[2 * rank : 2 * rank + 2].clone().requires_grad_()
        loss = standardised_mse(part, t[2 * rank : 2 * rank + 2], reduce=reduce, gradient_factor=2).loss
        out[rank] = (loss, torch.autograd.grad(loss, part)[0])

    threads = [threading.Thread(target=shard, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join(timeout=20) for thread in threads]
    whole = standardised_mse(s, t).loss
    assert float(out[0][0]) == pytest.approx(float(whole), abs=1e-14)
    assert float(out[1][0]) == pytest.approx(float(whole), abs=1e-14)
    torch.testing.assert_close(
        torch.cat([grad for _, grad in out]) / 2, gradient(s, t), rtol=1e-12, atol=1e-18
    )
    assert abs(float(standardised_mse(s[:2], t[:2]).loss) - float(whole)) > 1e-3


def test_terms_of_moments_by_hand() -> None:
    """n=3, SS=TT=2, ST=1, eps=0: sd=1, p=q=1; value (2+2-2)/6 = 1/3; r = 1/2; A = ST/((n-1) sd p^2 q) = 1/2;
    B = 1."""
    one = torch.ones(1).double()
    terms = channel_terms(ChannelMoments(3 * one, 0 * one, 0 * one, 2 * one, 2 * one, one), eps=0.0)
    assert [float(x) for x in terms] == pytest.approx([1 / 3, 0.5, 0.0, 0.5, 1.0], abs=1e-15)


@pytest.mark.parametrize(
    ("one", "other"),
    [((2, 3, 4, 4), (2, 5, 4, 4)), ((2, 3, 4, 4), (1, 3, 4, 4)), ((2, 3, 4), (2, 3, 4, 4))],
)
def test_shapes_that_do_not_fit(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    """Fact 7: the message names both shapes and the mending."""
    with pytest.raises(ValueError, match="set distill.adapt='conv1x1'") as caught:
        standardised_mse(torch.zeros(one), torch.zeros(other))
    assert str(one) in str(caught.value)
    assert str(other) in str(caught.value)
