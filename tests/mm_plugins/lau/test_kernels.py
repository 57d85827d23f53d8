"""The Triton kernels equal the plain path, under the interpreter on a CPU or as compiled code on a GPU.

Triton reads TRITON_INTERPRET when it is first imported, so on a CPU these tests run in a Python that started
with it; `test_the_kernels_under_the_interpreter` starts one. Maps are tiny, the interpreter is slow.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_plugins.lau import location_aware_upsample
from mm_plugins.lau.sampled_loss import sampled_cross_entropy
from mm_plugins.lau.sampling import load_kernels
from tests.mm_plugins.lau import reference

ROOT = Path(__file__).resolve().parents[3]
F64 = torch.float64
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (pip install triton)")
runs_kernels = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs triton, and a CUDA device or TRITON_INTERPRET=1 set before Python starts",
)


def problem(
    shape: tuple[int, int, int, int],
    scale: tuple[int, int],
    groups: int = 1,
    *,
    sigma: float = 1.0,
    dtype: torch.dtype = F64,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
    size = (shape[0], 2 * groups, scale[0] * shape[2], scale[1] * shape[3])
    offset = sigma * torch.randn(size, generator=generator, dtype=F64)
    offset = offset.to(torch.float32 if dtype == torch.bfloat16 else dtype)
    return x.to(DEVICE).requires_grad_(), offset.to(DEVICE).requires_grad_()


def both(x: torch.Tensor, offset: torch.Tensor, grad: torch.Tensor | None, **options: Any) -> list[tuple]:
    """Output and gradients of the plain path and of the kernels."""
    results = []
    for backend in ("rows", "triton"):
        out = location_aware_upsample(x, offset, backend=backend, **options)
        given = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view(out.shape)
        given = given if grad is None else grad
        results.append((out, *torch.autograd.grad(out, (x, offset), given)))
    return results


CASES = [
    # Case 1: more channels than one slice of backward holds. Case 4: more pixels of a cell than one block.
    ((2, 3, 2, 3), (4, 4), 1, "asymmetric", "inclusive", 0.7),
    ((1, 67, 2, 2), (2, 3), 1, "half_pixel", "inclusive", 1.0),
    ((1, 6, 2, 3), (2, 2), 3, "align_corners", "inward", 2.0),
    ((1, 2, 1, 3), (3, 3), 2, "half_pixel", "inward", 2.0),
    ((1, 2, 3, 1), (9, 9), 1, "asymmetric", "inclusive", 0.1),
    ((1, 2, 1, 1), (3, 3), 1, "asymmetric", "inclusive", 1.0),
]


@runs_kernels
@pytest.mark.parametrize(("shape", "scale", "groups", "base_grid", "border_gradient", "sigma"), CASES)
def test_equals_the_plain_path(
    shape: tuple, scale: tuple, groups: int, base_grid: str, border_gradient: str, sigma: float
) -> None:
    """Values and both gradients in fp64; the sums differ in order only."""
    x, offset = problem(shape, scale, groups, sigma=sigma)
    options = {"scale_factor": scale, "base_grid": base_grid, "border_gradient": border_gradient}
    for plain, ours in zip(*both(x, offset, None, **options), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


@runs_kernels
def test_equals_the_loops() -> None:
    x, offset = problem((1, 2, 2, 3), (3, 2), 2, sigma=1.5)
    out = location_aware_upsample(x, offset, scale_factor=(3, 2), backend="triton")
    torch.testing.assert_close(
        out.cpu(), reference.upsample(x.cpu(), offset.cpu(), (3, 2)), atol=1e-12, rtol=0
    )


@runs_kernels
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_other_dtypes(dtype: torch.dtype, atol: float) -> None:
    """bf16 keeps fp32 coordinates and sums; only what is stored is rounded (to 2^-9 of values up to 4)."""
    x, offset = problem((1, 3, 2, 2), (3, 3), dtype=dtype)
    for plain, ours in zip(*both(x, offset, None, scale_factor=3), strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, atol=atol, rtol=atol)


@runs_kernels
def test_any_strides_and_expanded_gradients() -> None:
    """Nothing is copied: channels-last maps, a cropped offset, a gradient of stride 0."""
    x, offset = problem((2, 3, 2, 2), (3, 3))
    wide = torch.zeros(2, 3, 6, 7, dtype=F64, device=DEVICE)
    wide[:, :2, :, :6] = offset.detach()
    offset = wide[:, :2, :, :6].requires_grad_()
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    one = torch.ones((), dtype=F64, device=DEVICE)
    results = both(x, offset, one.expand(2, 3, 6, 6), scale_factor=3)
    last = torch.linspace(-1, 1, 216, dtype=F64, device=DEVICE).view(2, 6, 6, 3).permute(0, 3, 1, 2)
    for pair in (results, both(x, offset, last, scale_factor=3, size=None)):
        for plain, ours in zip(*pair, strict=True):
            torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


@runs_kernels
def test_zero_offsets_keep_the_cells_and_slopes_look_to_the_next() -> None:
    """Fact 1 bit for bit, and cells 5, 7, 4: slopes 7-5, 4-7 and, at the last cell, 4-7."""
    x, offset = problem((1, 2, 2, 3), (3, 3), dtype=torch.float32)
    out = location_aware_upsample(x, torch.zeros_like(offset), scale_factor=3, backend="triton")
    assert torch.equal(out[..., ::3, ::3], x)
    row = torch.tensor([5.0, 7, 4], device=DEVICE).view(1, 1, 1, 3)
    zero = torch.zeros(1, 2, 1, 3, device=DEVICE, requires_grad=True)
    location_aware_upsample(row, zero, scale_factor=1, backend="triton").sum().backward()
    assert zero.grad[0, 1, 0].tolist() == [2, -3, -3]


@runs_kernels
def test_nan_comes_out_where_it_went_in() -> None:
    x, offset = problem((1, 2, 2, 2), (2, 2))
    with torch.no_grad():
        offset[0, 0, 3, 3], offset[0, 1, 0, 0] = float("nan"), float("inf")
    plain, ours = both(x, offset, None, scale_factor=2)
    assert ours[0][..., 3, 3].isnan().all()
    assert ours[0].isnan().sum() == 2
    torch.testing.assert_close(ours[0], plain[0], equal_nan=True)
    torch.testing.assert_close(ours[2], plain[2], equal_nan=True)


@runs_kernels
def test_all_pixels_in_one_cell_and_two_runs_alike() -> None:
    """The worst case of the sorted sum: one program adds up everything, the others nothing."""
    x, offset = problem((1, 3, 2, 3), (4, 4), dtype=torch.float32)
    with torch.no_grad():
        offset[:, 0] -= 9
        offset[:, 1] -= 9
    first, second = (both(x, offset, None, scale_factor=4) for _ in range(2))
    for plain, ours, again in zip(first[0], first[1], second[1], strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-5)
        assert torch.equal(ours, again)


@runs_kernels
@pytest.mark.parametrize(
    ("shape", "scale", "base_grid", "border_gradient"),
    [
        ((2, 5, 2, 2), (3, 3), "asymmetric", "inclusive"),
        ((1, 19, 2, 3), (2, 3), "half_pixel", "inward"),
        ((1, 67, 1, 2), (3, 2), "asymmetric", "inclusive"),
        ((1, 1, 2, 2), (3, 3), "half_pixel", "inclusive"),
    ],
)
def test_fused_loss_equals_the_plain_one(
    shape: tuple, scale: tuple, base_grid: str, border_gradient: str
) -> None:
    """Loss, right or wrong, and both gradients; ignored pixels, and one logit for two classes."""
    x, offset = problem(shape, scale)
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(max(shape[1], 2), (shape[0], *offset.shape[2:]), generator=generator).to(DEVICE)
    label[0, 0] = 255
    options = {"scale": scale, "base_grid": base_grid, "border_gradient": border_gradient}
    results = []
    for backend in ("rows", "triton"):
        loss, right = sampled_cross_entropy(x, offset, label, backend=backend, **options)
        factor = torch.linspace(0.5, 2, label.numel(), dtype=F64, device=DEVICE).view(label.shape)
        results.append((loss, right, *torch.autograd.grad((loss * factor).sum(), (x, offset))))
    assert (results[1][0][0, 0] == 0).all()
    assert (results[1][3][0, :, 0] == 0).all()
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-12)


@runs_kernels
def test_fused_loss_keeps_large_logits_and_marks_labels_that_are_no_class() -> None:
    """The online sum is shifted by the running maximum: logits of 1e4 do not overflow."""
    x, offset = problem((1, 20, 2, 2), (2, 2), dtype=torch.float32)
    label = torch.zeros(1, 4, 4, dtype=torch.long, device=DEVICE)
    big = (1e4 * x).detach()
    losses = [
        sampled_cross_entropy(big, offset, label, scale=(2, 2), backend=backend)[0]
        for backend in ("rows", "triton")
    ]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-2, rtol=1e-5)
    label[0, 1, 1] = 20
    loss, _ = sampled_cross_entropy(x, offset, label, scale=(2, 2), backend="triton")
    assert loss.isnan().nonzero().tolist() == [[0, 1, 1]]


@runs_kernels
def test_fused_loss_keeps_one_number_a_pixel() -> None:
    x, offset = problem((1, 20, 2, 2), (2, 2), dtype=torch.float32)
    label = torch.zeros(1, 4, 4, dtype=torch.long, device=DEVICE)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        sampled_cross_entropy(x, offset, label, scale=(2, 2), backend="triton")
    assert sum(kept) == x.numel() + offset.numel() + 2 * label.numel()


@runs_kernels
def test_a_head_trains_with_them() -> None:
    from tests.mm_plugins.lau import tiny

    losses = []
    for backend in ("rows", "triton"):
        torch.manual_seed(0)
        lau = {"backend": backend, "fused": True, "loss": {"mode": "reg"}, "init": "xavier"}
        head = tiny.head("FCNHead", lau, dropout_ratio=0.0).to(DEVICE)
        feature = [x[:, :, :2, :2].to(DEVICE) for x in tiny.features("FCNHead")[:1]]
        data = [sample.to(DEVICE) for sample in tiny.samples(4, ignored=1)]
        found = head.loss_by_feat(head.forward(feature), data)
        tiny.summed(found).backward()
        losses.append((found["loss_ce"], head.lau.branch.vertical[2].weight.grad, head.conv_seg.weight.grad))
    for plain, ours in zip(*losses, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.host
@needs_triton
def test_the_kernels_under_the_interpreter() -> None:
    if INTERPRETED or DEVICE == "cuda":
        pytest.skip("the tests of this file run in this process")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 15


COMPILE = """
import re, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

class Target:
    get_current_device = get_current_stream = lambda self, *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Target())
run, found = jit.JITFunction.run, {}
def only_compile(self, *args, grid, warmup, **options):
    found.setdefault(self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options).asm["ptx"])
jit.JITFunction.run = only_compile
from mm_plugins.lau import kernels
assert not kernels.INTERPRETED
x, offset = torch.zeros(1, 20, 4, 5, requires_grad=True), torch.zeros(1, 2, 16, 20, requires_grad=True)
options = ((4, 4), "asymmetric", "inclusive")
torch.autograd.grad(kernels.SampleKernels.apply(x, offset, *options).sum(), (x, offset))
gather = found.pop("_gather_kernel")
label = torch.zeros(1, 16, 20, dtype=torch.long)
torch.autograd.grad(kernels.CrossEntropyKernels.apply(x, offset, label, *options, 255)[0].sum(), (x, offset))
found["_gather_kernel of the operator"] = gather
for name, ptx in sorted(found.items()):
    assert ".target sm_90" in ptx, name
    print(name, "atomic" if re.search(r"\\b(atom|red)\\.", ptx) else "plain")
"""


@pytest.mark.slow
@needs_triton
def test_all_kernels_compile_for_a_gpu_without_atomics() -> None:
    """Down to machine code for compute capability 9.0, on any machine; it holds no atomic instruction."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:-1] == [
        "_cell_kernel plain",
        "_combine_kernel plain",
        "_cross_entropy_kernel plain",
        "_gather_kernel plain",
        "_gather_kernel of the operator plain",
        "_sample_kernel plain",
        "_slope_kernel plain",
    ]


def test_without_triton_the_way_to_get_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mm_plugins.lau.kernels", raising=False)
    monkeypatch.delattr(sys.modules["mm_plugins.lau"], "kernels", raising=False)
    with pytest.raises(ImportError, match=r"backend='triton' needs the package triton.*pip install triton"):
        load_kernels(torch.zeros(1))


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes tensors of a CPU")
def test_tensors_of_a_cpu_are_refused() -> None:
    x, offset = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"needs tensors on a CUDA device; got cpu. Use backend='auto'"):
        location_aware_upsample(x, offset, scale_factor=2, backend="triton")


def test_export_is_refused() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
            return location_aware_upsample(x, offset, scale_factor=2, backend="triton")

    with pytest.raises(ValueError, match="backend='triton' cannot be exported. Set backend='auto'"):
        torch.export.export(Layer(), (torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 4, 4)))
