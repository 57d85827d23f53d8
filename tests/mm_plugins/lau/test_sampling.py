"""The operator: values, slopes, borders, dtypes, errors (acceptance facts 1-5, 11, 13, 14)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_plugins.lau import location_aware_upsample
from mm_plugins.lau.sampling import (
    BASE_GRIDS,
    base_coordinates,
    cell_rows,
    find_taps,
    sampling_coordinates,
    scale_pair,
    weight_gradient,
)
from tests.mm_plugins.lau import reference

F64 = torch.float64


def draw(
    shape: tuple[int, int, int, int],
    scale: tuple[int, int],
    groups: int = 1,
    *,
    sigma: float = 2.0,
    dtype: torch.dtype = F64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
    size = (shape[0], 2 * groups, scale[0] * shape[2], scale[1] * shape[3])
    return x, (sigma * torch.randn(size, generator=generator, dtype=F64)).to(dtype)


def away_from_cells(offset: torch.Tensor, scale: tuple[int, int], distance: float = 1e-2) -> torch.Tensor:
    """Offsets moved so that no coordinate is closer than `distance` to a whole number, where slopes jump."""
    groups = offset.shape[1] // 2
    p = torch.arange(offset.shape[2], dtype=F64)[:, None] / scale[0]
    q = torch.arange(offset.shape[3], dtype=F64) / scale[1]
    parts = []
    for start, part in ((p, offset[:, :groups]), (q, offset[:, groups:])):
        s = part + start
        share = (s - s.floor()).clamp(distance, 1 - distance)
        parts.append(s.floor() + share - start)
    return torch.cat(parts, dim=1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 2),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 2),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    kh=st.integers(1, 4),
    kw=st.integers(1, 4),
    base_grid=st.sampled_from(BASE_GRIDS),
    seed=st.integers(0, 99),
)
def test_agrees_with_the_loops(
    n: int, groups: int, per_group: int, h: int, w: int, kh: int, kw: int, base_grid: str, seed: int
) -> None:
    x, offset = draw((n, groups * per_group, h, w), (kh, kw), groups, seed=seed)
    out = location_aware_upsample(x, offset, scale_factor=(kh, kw), base_grid=base_grid)
    wanted = reference.upsample(x, offset, (kh, kw), base_grid)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_zero_offset_keeps_the_cells_and_repeats_the_last(k: int) -> None:
    """With p/k, pixel k*i is cell i bit for bit, and the last k-1 rows and columns repeat the last cell."""
    x, offset = draw((2, 3, 5, 6), (k, k), dtype=torch.float32)
    out = location_aware_upsample(x, torch.zeros_like(offset), scale_factor=k)
    assert torch.equal(out[..., ::k, ::k], x)
    tail = out[..., 4 * k :, 5 * k :]
    assert torch.equal(tail, x[..., -1:, -1:].expand_as(tail))
    crop = out[..., : 4 * k + 1, : 5 * k + 1]
    wanted = F.interpolate(x, size=crop.shape[2:], mode="bilinear", align_corners=True)
    # k = 3 rounds p/3; the others are exact.
    torch.testing.assert_close(crop, wanted, atol=1e-6 * x.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_constant_offset_is_half_pixel_interpolation(k: int, dtype: torch.dtype, atol: float) -> None:
    """An offset of (1-k)/(2k) turns p/k into (p + 1/2)/k - 1/2."""
    x, offset = draw((2, 3, 5, 6), (k, k), dtype=dtype)
    out = location_aware_upsample(x, torch.full_like(offset, (1 - k) / (2 * k)), scale_factor=k)
    wanted = F.interpolate(x, scale_factor=k, mode="bilinear", align_corners=False)
    torch.testing.assert_close(out, wanted, atol=atol, rtol=0)


@pytest.mark.parametrize(("base_grid", "align"), [("half_pixel", False), ("align_corners", True)])
def test_base_grids_are_the_two_of_interpolate(base_grid: str, align: bool) -> None:
    x, offset = draw((1, 2, 5, 7), (3, 3))
    out = location_aware_upsample(x, torch.zeros_like(offset), scale_factor=3, base_grid=base_grid)
    wanted = F.interpolate(x, scale_factor=3, mode="bilinear", align_corners=align)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)


SHAPES = [
    ((2, 6, 5, 7), (4, 4), 1),
    ((2, 6, 5, 7), (4, 4), 6),
    ((2, 6, 5, 7), (4, 4), 3),
    ((1, 6, 5, 7), (2, 3), 1),
    ((1, 4, 1, 7), (4, 4), 2),
    ((1, 4, 7, 1), (4, 4), 1),
    ((1, 4, 1, 1), (3, 3), 1),
]


@pytest.mark.parametrize(("dtype", "atol"), [(F64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "scale", "groups"), SHAPES)
def test_equals_grid_sample(
    shape: tuple, scale: tuple, groups: int, channels_last: bool, dtype: torch.dtype, atol: float
) -> None:
    """Also the gradients, away from whole coordinates, where the two differ on purpose."""
    x, offset = draw(shape, scale, groups, dtype=dtype)
    offset = away_from_cells(offset.double(), scale).to(dtype)
    if channels_last:
        x, offset = (t.contiguous(memory_format=torch.channels_last) for t in (x, offset))
    x.requires_grad_(), offset.requires_grad_()
    results = []
    for backend in ("rows", "grid_sample"):
        out = location_aware_upsample(x, offset, scale_factor=scale, backend=backend)
        grad = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        results.append((out, *torch.autograd.grad(out, (x, offset), grad)))
    assert not results[0][0].isnan().any()
    scale_of_values = max(1.0, x.abs().max().item())
    torch.testing.assert_close(results[0][0], results[1][0], atol=atol * scale_of_values, rtol=0)
    for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol * 20 * scale_of_values, rtol=0)


def test_large_maps_in_pieces_equal_grid_sample() -> None:
    """Many channels: backward works through several pieces of one image."""
    x, offset = draw((2, 300, 6, 9), (16, 16), dtype=torch.float32)
    x.requires_grad_(), offset.requires_grad_()
    out = [
        location_aware_upsample(x, offset, scale_factor=16, backend=backend)
        for backend in ("rows", "grid_sample")
    ]
    weight = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((o * weight).sum(), (x, offset)) for o in out]
    assert 300 * 96 * 144 > 2**20, "one image must be more than one piece"
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(grads[0][1], grads[1][1], atol=2e-3, rtol=1e-3)


def test_weight_gradient_is_that_of_autograd() -> None:
    """The operator called directly gives what autograd gives through it."""
    x, offset = draw((2, 5, 3, 4), (3, 3))
    taps = find_taps(*sampling_coordinates(offset, 3, 4, (3, 3), "asymmetric"), 3, 4)
    table, weights = cell_rows(x, 1), taps.weights().requires_grad_()
    mixed = F.embedding_bag(taps.cells(), table, per_sample_weights=weights, mode="sum")
    grad = torch.randn(mixed.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    (wanted,) = torch.autograd.grad(mixed, weights, grad)
    torch.testing.assert_close(weight_gradient(table, taps, grad), wanted, atol=1e-13, rtol=0)


def test_values_stay_between_the_cells_and_constants_stay() -> None:
    x, offset = draw((2, 3, 4, 5), (4, 4), sigma=5.0, dtype=torch.float32)
    out = location_aware_upsample(x, offset, scale_factor=4)
    slack = 1e-6 * x.abs().max()
    assert out.min() >= x.min() - slack
    assert out.max() <= x.max() + slack
    flat = location_aware_upsample(torch.full_like(x, 0.7), offset, scale_factor=4)
    torch.testing.assert_close(flat, torch.full_like(flat, 0.7), atol=1e-6, rtol=0)


def test_linear_and_indifferent_to_the_order_of_classes() -> None:
    x, offset = draw((2, 4, 4, 5), (3, 3))
    y, _ = draw((2, 4, 4, 5), (3, 3), seed=7)
    order = [2, 0, 3, 1]

    def up(map_: torch.Tensor) -> torch.Tensor:
        return location_aware_upsample(map_, offset, scale_factor=3)

    torch.testing.assert_close(up(2 * x - 3 * y), 2 * up(x) - 3 * up(y), atol=1e-12, rtol=0)
    assert torch.equal(up(x[:, order]), up(x)[:, order])


@pytest.mark.parametrize(("groups", "shape"), [(1, (1, 2, 3, 4)), (2, (2, 2, 3, 2)), (1, (1, 2, 1, 3))])
@pytest.mark.parametrize("border_gradient", ["inclusive"])
def test_gradcheck(groups: int, shape: tuple, border_gradient: str) -> None:
    x, offset = draw(shape, (3, 2), groups, sigma=1.0)
    offset = away_from_cells(offset, (3, 2))
    x.requires_grad_(), offset.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: location_aware_upsample(a, b, scale_factor=(3, 2), border_gradient=border_gradient),
        (x, offset),
    )


def test_the_gradient_to_the_map_is_the_gradient_of_the_output_moved_around() -> None:
    """Weights of a pixel sum to 1, so nothing is lost: sum(dU) = sum(g) in every channel."""
    x, offset = draw((2, 3, 4, 5), (4, 4), sigma=4.0)
    x.requires_grad_()
    out = location_aware_upsample(x, offset, scale_factor=4)
    grad = torch.randn(out.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    (dx,) = torch.autograd.grad(out, x, grad)
    torch.testing.assert_close(dx.sum((0, 2, 3)), grad.sum((0, 2, 3)), atol=1e-10, rtol=0)


def offset_slopes(values: list[float], offset: list[float], **options: str) -> list[float]:
    """d out[i] / d dx[i] on one row of cells, k = 1."""
    x = torch.tensor(values, dtype=F64).view(1, 1, 1, -1)
    d = torch.zeros(1, 2, 1, len(values), dtype=F64)
    d[0, 1, 0] = torch.tensor(offset, dtype=F64)
    d.requires_grad_()
    location_aware_upsample(x, d, scale_factor=1, **options).sum().backward()
    assert d.grad is not None
    return d.grad[0, 1, 0].tolist()


def test_slope_at_whole_coordinates_is_towards_the_next_cell() -> None:
    """Cells 5, 7, 4: at cell 0 the slope is 7-5, at 1 it is 4-7, at the last one the left slope 4-7."""
    assert offset_slopes([5, 7, 4], [0, 0, 0]) == [2, -3, -3]


def test_border_belongs_to_the_map_and_outside_there_is_no_slope() -> None:
    """Pixel 0 at -0.5: outside. Pixel 1 at exactly 0: slope 7-5. Pixel 2 at 2.25: outside."""
    assert offset_slopes([5, 7, 4], [-0.5, -1.0, 0.25]) == [0, 2, 0]


def test_inward_gradient_lets_offsets_come_back() -> None:
    """Loss = sum of outputs. Pixel 0 at -1 has slope +2: descent would go further out, so 0.

    With values negated the slope is -2 and descent leads back to the map, so it is passed.
    At the right border cells 4, 7 have slope +3 (descent leads back), 7, 4 slope -3 (it does not).
    """
    assert offset_slopes([5, 7, 4], [-1, 0, 0], border_gradient="inward")[0] == 0
    assert offset_slopes([-5, -7, -4], [-1, 0, 0], border_gradient="inward")[0] == -2
    assert offset_slopes([5, 4, 7], [0, 0, 2], border_gradient="inward")[2] == 3
    assert offset_slopes([5, 7, 4], [0, 0, 2], border_gradient="inward")[2] == 0


def test_expanded_gradient_equals_a_contiguous_one() -> None:
    x, offset = draw((2, 3, 4, 5), (2, 2))
    x.requires_grad_(), offset.requires_grad_()
    out = location_aware_upsample(x, offset, scale_factor=2)
    one = torch.autograd.grad(out.sum(), (x, offset), retain_graph=True)
    other = torch.autograd.grad(out, (x, offset), torch.ones(out.shape, dtype=F64))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_only_the_gradients_asked_for_are_made() -> None:
    x, offset = draw((1, 3, 4, 5), (2, 2))
    offset.requires_grad_()
    location_aware_upsample(x, offset, scale_factor=2).sum().backward()
    assert x.grad is None
    assert offset.grad is not None


@pytest.mark.parametrize("num_cells", [16, 128])
def test_half_precision_logits_keep_exact_coordinates(num_cells: int) -> None:
    """bf16 rounds values by at most 2^-9 of them, twice; the coordinates not at all, however wide the map."""
    x, offset = draw((1, 2, 3, num_cells), (2, 8), dtype=torch.float32)
    half = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = location_aware_upsample(half, offset, scale_factor=(2, 8))
    assert out.dtype == torch.bfloat16
    exact = location_aware_upsample(half.float(), offset, scale_factor=(2, 8))
    assert (out.float() - exact).abs().max() <= 2**-8 * x.abs().max()


def test_gradients_keep_the_dtypes_of_the_inputs() -> None:
    x, offset = draw((1, 2, 3, 4), (2, 2), dtype=torch.float32)
    half = x.bfloat16().requires_grad_()
    offset.requires_grad_()
    location_aware_upsample(half, offset, scale_factor=2).float().square().sum().backward()
    assert half.grad is not None
    assert offset.grad is not None
    assert half.grad.dtype == torch.bfloat16
    assert offset.grad.dtype == torch.float32


def test_two_backward_passes_give_the_same_bits() -> None:
    x, offset = draw((2, 7, 9, 8), (4, 4), dtype=torch.float32)
    x.requires_grad_(), offset.requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        out = location_aware_upsample(x, offset, scale_factor=4)
        runs = [torch.autograd.grad(out.square().sum(), (x, offset), retain_graph=True) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_gpu_equals_cpu_and_is_deterministic() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, offset = draw((2, 19, 9, 8), (4, 4), dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for device in ("cpu", "cuda", "cuda"):
            a, b = (t.detach().to(device).requires_grad_() for t in (x, offset))
            out = location_aware_upsample(a, b, scale_factor=4)
            runs.append([t.cpu() for t in (out, *torch.autograd.grad(out.square().sum(), (a, b)))])
    finally:
        torch.use_deterministic_algorithms(False)
    for cpu, first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(cpu, first, atol=1e-4, rtol=1e-4)


def test_output_smaller_than_the_enlarged_map() -> None:
    x, offset = draw((1, 3, 4, 5), (4, 4))
    whole = location_aware_upsample(x, offset, scale_factor=4)
    cut = location_aware_upsample(x, offset, scale_factor=4, size=(13, 18))
    assert torch.equal(cut, whole[..., :13, :18])


def test_nan_goes_in_and_comes_out() -> None:
    x, offset = draw((1, 2, 4, 4), (2, 2))
    offset[0, 0, 3, 3] = float("nan")
    x.requires_grad_(), offset.requires_grad_()
    out = location_aware_upsample(x, offset, scale_factor=2)
    assert out[..., 3, 3].isnan().all()
    assert out.isnan().sum() == 2
    out.sum().backward()
    assert offset.grad is not None
    assert not offset.grad[..., :3].isnan().any()


def test_memory_for_backward_is_that_of_the_inputs() -> None:
    x, offset = draw((1, 50, 8, 8), (4, 4), dtype=torch.float32)
    x.requires_grad_(), offset.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        location_aware_upsample(x, offset, scale_factor=4)
    assert sum(kept) == x.numel() + offset.numel()


def test_export_takes_grid_sample_and_keeps_the_values() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
            return location_aware_upsample(x, offset, scale_factor=4)

    x, offset = draw((1, 3, 5, 6), (4, 4), dtype=torch.float32)
    program = torch.export.export(Layer(), (x, offset))
    assert any("grid_sampler" in str(node.target) for node in program.graph.nodes)
    exported = program.module()(x, offset)
    torch.testing.assert_close(exported, Layer()(x, offset), atol=1e-5, rtol=0)


def test_compiled_forward_equals_eager() -> None:
    x, offset = draw((1, 3, 5, 6), (4, 4), dtype=torch.float32)
    compiled = torch.compile(lambda a, b: location_aware_upsample(a, b, scale_factor=4), backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, offset), location_aware_upsample(x, offset, scale_factor=4))


def test_base_coordinates_by_hand() -> None:
    like = torch.zeros(1)
    assert base_coordinates(4, 2, 2, "asymmetric", like).tolist() == [0, 0.5, 1, 1.5]
    assert base_coordinates(4, 2, 2, "half_pixel", like).tolist() == [-0.25, 0.25, 0.75, 1.25]
    torch.testing.assert_close(
        base_coordinates(4, 2, 2, "align_corners", like), torch.tensor([0, 1 / 3, 2 / 3, 1])
    )


@pytest.mark.parametrize("bad", [0, -1, 2.5, (2, 0), (2, 2, 2), True])
def test_bad_scale_factor(bad: object) -> None:
    with pytest.raises(ValueError, match="scale_factor must be a whole number >= 1"):
        scale_pair(bad)


@pytest.mark.parametrize(
    ("x_shape", "offset_shape", "message"),
    [
        ((1, 2, 4), (1, 2, 8, 8), "must have four axes"),
        ((1, 2, 4, 4), (1, 3, 8, 8), r"2\*G channels .*\(1, 2, 4, 4\) and offset \(1, 3, 8, 8\)"),
        ((1, 3, 4, 4), (1, 4, 8, 8), "G a divisor of the channels"),
        ((1, 2, 4, 4), (1, 2, 8, 9), r"must cover the enlarged map.*\(1, 2, 4, 4\).*\(1, 2, 8, 9\)"),
        ((2, 2, 4, 4), (1, 2, 8, 8), "Predict offsets with the same factor"),
    ],
)
def test_bad_shapes_are_named(x_shape: tuple, offset_shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        location_aware_upsample(torch.zeros(x_shape), torch.zeros(offset_shape), scale_factor=2)


def test_bad_dtype_size_and_options() -> None:
    x, offset = draw((1, 2, 4, 4), (2, 2))
    with pytest.raises(
        ValueError, match="x and offset must be floating point; got .*torch.int64.* Labels cannot be mixed"
    ):
        location_aware_upsample(x.long(), offset, scale_factor=2)
    with pytest.raises(ValueError, match=r"size must lie within the enlarged map \(8, 8\); got \(9, 8\)"):
        location_aware_upsample(x, offset, scale_factor=2, size=(9, 8))
    for option in ("base_grid", "border_gradient", "backend"):
        with pytest.raises(ValueError, match=f"{option} must be one of .*; got 'x'"):
            location_aware_upsample(x, offset, scale_factor=2, **{option: "x"})
