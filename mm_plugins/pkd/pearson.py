"""The loss of PKD: half the MSE of two feature maps whose channels were standardised, in closed form from
five sums."""

# Shapes: N images, C channels, H x W pixels; n = N*H*W positions of one channel, over which the statistics
# run. A mask has one value per position and image: N1HW.

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

STD_FLOOR: float = 1e-6
"""Added to each standard deviation, in units of the feature; the value of the authors' release."""

RELATIVE_FLOOR: float = 1e-6
"""A channel whose std is below this share of its mean holds only rounding noise in fp32."""

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes and returns the sum; must give every process the same values."""


class ChannelMoments(NamedTuple):
    """Five sums per channel from which value and gradient follow.

    Attributes:
        num_positions: Scalar ``n``, how many positions were summed.
        mean_student_C: Mean of each student channel.
        mean_teacher_C: Mean of each teacher channel.
        square_student_C: Centred sum of squares of the student, ``sum (s - mean)^2``.
        square_teacher_C: The same of the teacher.
        product_C: Centred sum of products, ``sum (s - mean_s) * (t - mean_t)``.
    """

    num_positions: Tensor
    mean_student_C: Tensor
    mean_teacher_C: Tensor
    square_student_C: Tensor
    square_teacher_C: Tensor
    product_C: Tensor


class ChannelTerms(NamedTuple):
    """What one level's loss and gradient are made of, per channel.

    Attributes:
        value_C: Loss of each channel, in [0, 2(n-1)/n].
        correlation_C: Pearson's r of each channel, in [-1, 1]; 0 where a channel is dead.
        dead_C: True where the student's or the teacher's channel is constant.
        slope_student_C: ``A`` in ``dL_c/ds_i = (A * (s_i - mean_s) - B * (t_i - mean_t)) / n``.
        slope_teacher_C: ``B`` in the same.
    """

    value_C: Tensor
    correlation_C: Tensor
    dead_C: Tensor
    slope_student_C: Tensor
    slope_teacher_C: Tensor


class PearsonLoss(NamedTuple):
    """Result of `standardised_mse`.

    Attributes:
        loss: Scalar in [0, 2), fp32 (fp64 for fp64 input); carries the gradient.
        correlation_C: Pearson's r per channel, no gradient; 0 for dead channels.
        dead_C: Boolean per channel: constant in the student or in the teacher.
        teacher_finite: Boolean scalar: False if the teacher map holds inf or NaN.
    """

    loss: Tensor
    correlation_C: Tensor
    dead_C: Tensor
    teacher_finite: Tensor


def resize(map_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize to ``(H, W)`` without corner alignment or antialiasing; the same tensor if the size
    fits."""
    if tuple(map_NCHW.shape[2:]) == tuple(size):
        return map_NCHW
    return F.interpolate(map_NCHW, size=size, mode="bilinear", align_corners=False)


def match_sizes(student_NCHW: Tensor, teacher_NCHW: Tensor, *, resize_student: bool) -> tuple[Tensor, Tensor]:
    """The pair in fp32 (fp64 for fp64 input) and in one spatial size: the teacher's, or else the
    student's."""
    dtype = torch.float64 if student_NCHW.dtype == torch.float64 else torch.float32
    s_NCHW, t_NCHW = student_NCHW.to(dtype), teacher_NCHW.to(dtype)
    if resize_student:
        return resize(s_NCHW, (t_NCHW.shape[2], t_NCHW.shape[3])), t_NCHW
    return s_NCHW, resize(t_NCHW, (s_NCHW.shape[2], s_NCHW.shape[3]))


def channel_moments(
    s_NCHW: Tensor, t_NCHW: Tensor, *, valid_N1HW: Tensor | None = None, reduce: Reduce | None = None
) -> ChannelMoments:
    """Count, means and centred second moments of each channel, over all images and positions.

    Two passes: means first, then centred sums; sums of raw squares lose r when the mean is far above the std.

    Args:
        s_NCHW: Student map.
        t_NCHW: Teacher map of the same shape and dtype.
        valid_N1HW: Boolean; positions that are False count for nothing. All count by default.
        reduce: Sums over processes; called twice, with ``1 + 2C`` and ``3C`` numbers.

    Returns:
        Moments in the dtype of the maps.
    """
    num_channels, axes = s_NCHW.shape[1], (0, 2, 3)
    if valid_N1HW is None:
        count = s_NCHW.new_tensor([s_NCHW.numel() // num_channels])
        sums = s_NCHW.sum(axes), t_NCHW.sum(axes)
    else:
        count = valid_N1HW.sum().to(s_NCHW.dtype).view(1)
        sums = s_NCHW.where(valid_N1HW, 0).sum(axes), t_NCHW.where(valid_N1HW, 0).sum(axes)
    packed = torch.cat([count, *sums])
    if reduce is not None:
        packed = reduce(packed)
    count = packed[0].clamp(min=1)
    mean_s_C, mean_t_C = (packed[1:] / count).split(num_channels)

    s_NCHW, t_NCHW = s_NCHW - mean_s_C.view(-1, 1, 1), t_NCHW - mean_t_C.view(-1, 1, 1)
    if valid_N1HW is not None:
        s_NCHW, t_NCHW = s_NCHW.where(valid_N1HW, 0), t_NCHW.where(valid_N1HW, 0)
    product_C = (s_NCHW * t_NCHW).sum(axes)
    # The centred copies belong to this function, so squaring in place saves two feature-sized buffers.
    packed = torch.cat([s_NCHW.square_().sum(axes), t_NCHW.square_().sum(axes), product_C])
    if reduce is not None:
        packed = reduce(packed)
    return ChannelMoments(count, mean_s_C, mean_t_C, *packed.split(num_channels))


def channel_terms(moments: ChannelMoments, *, eps: float = STD_FLOOR) -> ChannelTerms:
    """Loss, correlation and gradient coefficients of each channel.

    With ``p = sd_s + eps``, ``q = sd_t + eps`` and unbiased ``sd``:
    ``L_c = (SS/p^2 + TT/q^2 - 2 ST/(p q)) / (2n)``, where ``SS, TT, ST`` are the centred sums.
    Its derivative is ``(A (s_i - mean_s) - B (t_i - mean_t)) / n`` with
    ``A = eps/p^3 + ST/((n-1) sd_s p^2 q)`` and ``B = 1/(p q)``.

    A channel is dead when its std is at most ``max(eps, 1e-6 |mean|)``. It counts as exactly constant: it
    adds what the formula gives for a constant (``(n-1)/(2n)`` if the other side is alive), and no gradient if
    it is the student's.

    Args:
        moments: From `channel_moments`.
        eps: Added to the standard deviations, in units of the feature.

    Returns:
        Terms in the dtype of the moments.

    Source: PKD, arXiv 2207.02039, factors as in the authors' release; the rule for dead channels is ours.
    """
    n = moments.num_positions
    dof = (n - 1).clamp(min=1)
    sd_s_C, sd_t_C = (moments.square_student_C / dof).sqrt(), (moments.square_teacher_C / dof).sqrt()
    dead_s_C = sd_s_C <= (RELATIVE_FLOOR * moments.mean_student_C.abs()).clamp(min=eps)
    dead_t_C = sd_t_C <= (RELATIVE_FLOOR * moments.mean_teacher_C.abs()).clamp(min=eps)
    dead_C = dead_s_C | dead_t_C

    square_s_C = moments.square_student_C.masked_fill(dead_s_C, 0)
    square_t_C = moments.square_teacher_C.masked_fill(dead_t_C, 0)
    product_C = moments.product_C.masked_fill(dead_C, 0)
    sd_s_C, sd_t_C = sd_s_C.masked_fill(dead_s_C, 1), sd_t_C.masked_fill(dead_t_C, 1)
    p_C, q_C = sd_s_C + eps, sd_t_C + eps

    value_C = (square_s_C / p_C**2 + square_t_C / q_C**2 - 2 * product_C / (p_C * q_C)) / (2 * n)
    slope_s_C = eps / p_C**3 + product_C / (dof * sd_s_C * p_C**2 * q_C)
    return ChannelTerms(
        # Rounding can push a perfect match a hair below zero.
        value_C=value_C.clamp(min=0),
        correlation_C=product_C / (dof * sd_s_C * sd_t_C),
        dead_C=dead_C,
        slope_student_C=slope_s_C.masked_fill(dead_s_C, 0),
        slope_teacher_C=(1 / (p_C * q_C)).masked_fill(dead_C, 0),
    )


def student_gradient(
    s_NCHW: Tensor,
    t_NCHW: Tensor,
    moments: ChannelMoments,
    terms: ChannelTerms,
    scale: Tensor,
    *,
    valid_N1HW: Tensor | None = None,
) -> Tensor:
    """Gradient of ``scale * mean_c L_c`` with respect to the student map.

    Args:
        s_NCHW: Student map.
        t_NCHW: Teacher map of the same shape.
        moments: The moments of this pair.
        terms: The terms of these moments.
        scale: Scalar factor.
        valid_N1HW: The mask given to `channel_moments`.

    Returns:
        Map of the student's shape.
    """
    scale = scale / (moments.num_positions * s_NCHW.shape[1])
    slope_s_C, slope_t_C = terms.slope_student_C * scale, terms.slope_teacher_C * scale
    # Centre before scaling: multiplied out, mean * slope would swamp the small deviations.
    grad_NCHW = (s_NCHW - moments.mean_student_C.view(-1, 1, 1)).mul_(slope_s_C.view(-1, 1, 1))
    grad_NCHW -= (t_NCHW - moments.mean_teacher_C.view(-1, 1, 1)).mul_(slope_t_C.view(-1, 1, 1))
    return grad_NCHW if valid_N1HW is None else grad_NCHW.where(valid_N1HW, 0)


class _StandardisedMSE(torch.autograd.Function):
    """Keeps references to the two inputs and nine numbers per channel; everything feature-sized is
    recomputed."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        student_NCHW: Tensor,
        teacher_NCHW: Tensor,
        valid_N1HW: Tensor | None,
        resize_student: bool,
        eps: float,
        reduce: Reduce | None,
        gradient_factor: float,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(student_NCHW.device.type, enabled=False):
            s_NCHW, t_NCHW = match_sizes(student_NCHW, teacher_NCHW, resize_student=resize_student)
            moments = channel_moments(s_NCHW, t_NCHW, valid_N1HW=valid_N1HW, reduce=reduce)
            terms = channel_terms(moments, eps=eps)
        ctx.save_for_backward(student_NCHW, teacher_NCHW, valid_N1HW, *moments, *terms)  # type: ignore[arg-type]
        ctx.resize_student, ctx.gradient_factor = resize_student, gradient_factor  # type: ignore[attr-defined]
        loss, finite = terms.value_C.mean(), torch.isfinite(moments.square_teacher_C).all()
        correlation_C, dead_C = terms.correlation_C.clone(), terms.dead_C.clone()
        ctx.mark_non_differentiable(correlation_C, dead_C, finite)
        return loss, correlation_C, dead_C, finite

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor, *_: Tensor) -> tuple:
        student_NCHW, teacher_NCHW, valid_N1HW, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
        moments, terms = ChannelMoments(*rest[:6]), ChannelTerms(*rest[6:])
        # A leaf of its own, so that the resize (if any) is differentiated here and frees what it used.
        leaf_NCHW = student_NCHW.detach().requires_grad_()
        with torch.autocast(student_NCHW.device.type, enabled=False), torch.enable_grad():
            s_NCHW, t_NCHW = match_sizes(leaf_NCHW, teacher_NCHW, resize_student=ctx.resize_student)  # type: ignore[attr-defined]
        scale = grad_loss * ctx.gradient_factor  # type: ignore[attr-defined]
        grad_NCHW = student_gradient(
            s_NCHW.detach(), t_NCHW.detach(), moments, terms, scale, valid_N1HW=valid_N1HW
        )
        if s_NCHW is not leaf_NCHW:
            (grad_NCHW,) = torch.autograd.grad(s_NCHW, leaf_NCHW, grad_NCHW)
        return grad_NCHW, None, None, None, None, None, None


def standardised_mse(
    student_NCHW: Tensor,
    teacher_NCHW: Tensor,
    *,
    valid_N1HW: Tensor | None = None,
    resize_student: bool = True,
    eps: float = STD_FLOOR,
    reduce: Reduce | None = None,
    gradient_factor: float = 1.0,
) -> PearsonLoss:
    """Half the MSE between two feature maps whose channels were standardised.

    ``L = mean_c 1/2 mean_n (s_hat - t_hat)^2`` with ``x_hat = (x - mean) / (sd + eps)``, which equals
    ``mean_c (n-1)/n (1 - r_c)`` for eps -> 0, r being Pearson's correlation over the n positions of a
    channel.

    The gradient goes to the student only, also if the teacher map requires one. Nothing of the size of a map
    is saved for backward beyond the two inputs. Half precision is computed in fp32, with autocast switched
    off.

    Args:
        student_NCHW: Map that receives the gradient; any float dtype.
        teacher_NCHW: Target map with the same N and C; H and W may differ.
        valid_N1HW: Boolean, in the size that both maps have after resizing; False positions count for
            nothing.
        resize_student: If sizes differ, resize the student's map to the teacher's (True) or the reverse.
        eps: Added to the standard deviation, in units of the feature.
        reduce: Sums over processes, for statistics of the global batch; every process must then call.
        gradient_factor: Multiplies the gradient only; the number of processes when `reduce` is given and the
            gradients are averaged afterwards, as DDP does.

    Returns:
        Loss in [0, 2), correlation and dead flags per channel, and whether the teacher was finite.
        One position in all (n = 1) gives 0 with zero gradient.

    Raises:
        ValueError: If a map is not 4-dimensional, or N or C differ.

    Source: PKD, arXiv 2207.02039; factors and order (resize, then standardise) as in the authors' release.
        Departures: both dimensions are compared before resizing, and dead student channels get no gradient.
    """
    if student_NCHW.ndim != 4 or teacher_NCHW.ndim != 4 or student_NCHW.shape[:2] != teacher_NCHW.shape[:2]:
        raise ValueError(
            "student and teacher maps must be (N, C, H, W) with the same N and C; got "
            f"{tuple(student_NCHW.shape)} and {tuple(teacher_NCHW.shape)}. "
            "If C differs, set distill.adapt='conv1x1' in PKDDetector (a 1x1 conv on the student's map)."
        )
    return PearsonLoss(
        *_StandardisedMSE.apply(
            student_NCHW, teacher_NCHW.detach(), valid_N1HW, resize_student, eps, reduce, gradient_factor
        )
    )
