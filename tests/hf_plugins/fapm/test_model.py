"""Whole folders: streaming equals memory, nothing half-written remains, sidecars come off, two processes."""

import errno
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_plugins.fapm import FAPMConfig, apply_sidecar, fapm_prune_checkpoint, fapm_prune_tensor
from hf_plugins.fapm.model import REPORT, SIDECAR
from hf_plugins.fapm.storage import SINGLE
from tests.hf_plugins.fapm.tiny import moved, read_model, weights, write_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Base and fine-tuned toy model in fp32, and where the output goes."""
    before, after = weights()
    return write_model(tmp_path / "base", before), write_model(tmp_path / "ft", after), tmp_path / "out"


def nothing_left(folder: Path) -> bool:
    """Neither output nor a hidden part of it."""
    return not [path.name for path in folder.iterdir() if "out" in path.name]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("chunk", "resident"), [(1, 64), (7, 0), (4096, 0), (1 << 18, 64)])
def test_streaming_equals_memory(tmp_path: Path, shards: int, chunk: int, resident: int) -> None:
    before, after = weights(dtype=torch.bfloat16)
    # Equal steps on weights of two sizes: ties are the rule.
    before["tied"] = torch.tensor([1.0, -1.0, 2.0, -2.0] * 100, dtype=torch.bfloat16)
    after["tied"] = before["tied"] + 0.5
    base = write_model(tmp_path / "base", before, shards=shards)
    ft = write_model(tmp_path / "ft", after, shards=4 - shards)
    report = fapm_prune_checkpoint(
        base, ft, tmp_path / "out", FAPMConfig(keep=0.3, chunk=chunk, resident_mib=resident)
    )
    found = read_model(tmp_path / "out")
    assert list(found) == list(read_model(base))
    for name, w in before.items():
        out, stats = fapm_prune_tensor(w, after[name], keep=0.3)
        assert torch.equal(found[name].view(torch.int16), out.view(torch.int16))
        assert bool(((found[name] == w) | (found[name] == after[name])).all())
        ours = report["tensors"][name]
        assert ours["num_kept"] == stats.num_kept
        assert round(ours["effective_density"] * w.numel()) == int((found[name] != w).sum())
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == sorted(
        path.name for path in base.glob("model*")
    )


def test_ties_in_a_file_take_the_lowest_indices(tmp_path: Path) -> None:
    """All |dW| = 1/2 and W of 1 and 2: the 2s score .5 - 1.5 * .25 > 0 and go first, lowest index first."""
    w = torch.tensor([1.0, 2.0] * 5000)
    base = write_model(tmp_path / "base", {"w": w})
    ft = write_model(tmp_path / "ft", {"w": w + 0.5})
    fapm_prune_checkpoint(base, ft, tmp_path / "out", FAPMConfig(keep=0.1, chunk=64))
    kept = torch.nonzero(read_model(tmp_path / "out")["w"] != w).flatten()
    assert kept.tolist() == list(range(1, 2000, 2))


def test_zero_and_one_give_the_files(folders: tuple[Path, Path, Path]) -> None:
    base, ft, out = folders
    for keep, source in ((0.0, base), (1.0, ft)):
        fapm_prune_checkpoint(base, ft, out, FAPMConfig(keep=keep))
        assert (out / SINGLE).read_bytes() == (source / SINGLE).read_bytes()
        for path in out.iterdir():
            path.unlink()


def test_report_and_side_files(folders: tuple[Path, Path, Path]) -> None:
    base, ft, out = folders
    (ft / "tokenizer.json").write_text("{}")
    report = fapm_prune_checkpoint(base, ft, out)
    assert json.loads((out / REPORT).read_text()) == report
    assert (out / "tokenizer.json").is_file()
    totals = report["totals"]
    assert totals["entries"] == 640 + 384 + 16 + 7
    assert totals["kept"] == 64 + 38 + 1 + 0
    assert totals["effective_density"] == pytest.approx(103 / 1047)
    assert report["config"]["keep"] == 0.1
    assert report["processes"] == 1
    assert not report["warnings"]
    assert set(report["versions"]) == {"python", "torch", "mmhf-plugins"}


def test_which_tensors(folders: tuple[Path, Path, Path]) -> None:
    base, ft, out = folders
    options = {"exclude": "norm", "per_tensor": {"embed": 1.0, "mlp": 0.5}}
    report = fapm_prune_checkpoint(base, ft, out, FAPMConfig(keep=0.2, **options))
    before, after, found = (read_model(folder) for folder in (base, ft, out))
    assert torch.equal(found["norm.weight"], before["norm.weight"])
    assert torch.equal(found["embed_tokens.weight"], after["embed_tokens.weight"])
    assert report["tensors"]["layers.0.mlp.weight"]["num_kept"] == 192
    assert report["tensors"]["bias"]["num_kept"] == 1
    fapm_prune_checkpoint(base, ft, out.with_name("out2"), FAPMConfig(include="mlp"))
    found = read_model(out.with_name("out2"))
    assert [name for name in found if not torch.equal(found[name], before[name])] == ["layers.0.mlp.weight"]


def test_pattern_that_matches_nothing(folders: tuple[Path, Path, Path]) -> None:
    base, ft, out = folders
    for options in ({"include": "layrs"}, {"exclude": "layrs"}, {"per_tensor": {"layrs": 0.1}}):
        with pytest.raises(ValueError, match=r"is found in no tensor name; there are e.g. .*layers"):
            fapm_prune_checkpoint(base, ft, out, FAPMConfig(**options))


@pytest.mark.parametrize("method", ["magnitude", "relative", "dare", "wise_ft"])
def test_baselines_equal_the_tensor_function(folders: tuple[Path, Path, Path], method: str) -> None:
    base, ft, out = folders
    fapm_prune_checkpoint(base, ft, out, FAPMConfig(keep=0.3, method=method, seed=4))
    before, after, found = (read_model(folder) for folder in (base, ft, out))
    for name, w in before.items():
        expected = fapm_prune_tensor(w, after[name], keep=0.3, method=method, seed=4)[0]
        assert torch.equal(found[name], expected)


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.37, 1.0])
def test_global_keep_is_one_threshold(folders: tuple[Path, Path, Path], keep: float) -> None:
    """TIES-trim: the int(n * keep) largest of all tensors' |dW| together, found here by one sort."""
    base, ft, out = folders
    report = fapm_prune_checkpoint(base, ft, out, FAPMConfig(keep=keep, method="ties"))
    before, after, found = (read_model(folder) for folder in (base, ft, out))
    names = sorted(before)
    size = torch.cat([(after[name] - before[name]).abs().flatten() for name in names])
    changed = torch.cat([(found[name] != before[name]).flatten() for name in names])
    k = int(len(size) * keep)
    assert int(changed.sum()) == k
    expected = torch.zeros_like(changed)
    expected[torch.sort(size, descending=True, stable=True).indices[:k]] = True
    assert torch.equal(changed, expected)
    if keep:
        assert report["totals"]["kept"] == k


def test_global_ties_go_by_name_and_place(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", {"b": torch.ones(10), "a": torch.ones(10)})
    ft = write_model(tmp_path / "ft", {"b": torch.zeros(10), "a": torch.zeros(10)})
    fapm_prune_checkpoint(base, ft, tmp_path / "out", FAPMConfig(keep=0.6, scope="global"))
    found = read_model(tmp_path / "out")
    assert found["a"].tolist() == [0.0] * 10
    assert found["b"].tolist() == [0.0] * 2 + [1.0] * 8


def test_bf16_trap_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    w, ft = moved(100_000, scale=2.5e-4)
    base = w.bfloat16()
    tuned = base.float() + (ft - w)
    write_model(tmp_path / "base", {"w": base})
    write_model(tmp_path / "bf16", {"w": tuned.bfloat16()})
    write_model(tmp_path / "fp32", {"w": tuned})
    with caplog.at_level(logging.WARNING):
        trapped = fapm_prune_checkpoint(tmp_path / "base", tmp_path / "bf16", tmp_path / "a")
    assert trapped["totals"]["effective_density"] == 0.0
    assert "prune fp32 weights or the LoRA factors" in caplog.text
    assert trapped["warnings"]
    caplog.clear()
    wide = FAPMConfig(out_dtype="float32")
    cured = fapm_prune_checkpoint(tmp_path / "base", tmp_path / "fp32", tmp_path / "b", wide)
    assert cured["totals"]["effective_density"] == pytest.approx(0.1)
    assert not caplog.text


def test_models_that_are_equal_are_told(folders: tuple[Path, Path, Path]) -> None:
    base, _, out = folders
    copy = write_model(out.with_name("copy"), read_model(base))
    report = fapm_prune_checkpoint(base, copy, out)
    assert report["warnings"] == ["nothing moved: both models hold the same values."]


def test_all_zero_base_is_told(tmp_path: Path) -> None:
    write_model(tmp_path / "a", {"bias": torch.zeros(20)})
    write_model(tmp_path / "b", {"bias": torch.arange(20.0)})
    report = fapm_prune_checkpoint(tmp_path / "a", tmp_path / "b", tmp_path / "out")
    assert "ranked by magnitude, since the base is all zero: bias" in report["warnings"][0]
    assert read_model(tmp_path / "out")["bias"].nonzero().flatten().tolist() == [18, 19]


def test_new_rows_new_tensors_and_counters(tmp_path: Path) -> None:
    """Rows and tensors that the base lacks stay as fine-tuned; counters are no weights and are copied."""
    w, ft = (x.view(20, 5) for x in moved(100))
    grown = torch.cat([ft, torch.full((3, 5), 7.0)])
    steps = torch.tensor([1, 2])
    for keep in (0.0, 0.2):
        folder = tmp_path / str(keep)
        write_model(folder / "base", {"embed": w, "steps": steps})
        write_model(folder / "ft", {"embed": grown, "steps": steps + 1, "score.weight": torch.ones(4)})
        fapm_prune_checkpoint(folder / "base", folder / "ft", folder / "out", FAPMConfig(keep=keep))
        found = read_model(folder / "out")
        assert torch.equal(found["embed"][:20], fapm_prune_tensor(w, ft, keep=keep)[0])
        assert torch.equal(found["embed"][20:], grown[20:])
        assert found["steps"].tolist() == [2, 3]
        assert found["score.weight"].tolist() == [1.0] * 4


def test_tied_heads_under_either_name(tmp_path: Path) -> None:
    w, ft = (x.view(20, 5) for x in moved(100))
    write_model(tmp_path / "base", {"model.embed_tokens.weight": w}, tie_word_embeddings=True)
    both = {"model.embed_tokens.weight": ft, "lm_head.weight": ft.clone()}
    write_model(tmp_path / "ft", both, tie_word_embeddings=True)
    fapm_prune_checkpoint(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    assert list(read_model(tmp_path / "out")) == ["model.embed_tokens.weight"]
    write_model(tmp_path / "head", {"lm_head.weight": ft}, tie_word_embeddings=True)
    fapm_prune_checkpoint(tmp_path / "base", tmp_path / "head", tmp_path / "out2")
    assert (tmp_path / "out2" / SINGLE).read_bytes() == (tmp_path / "out" / SINGLE).read_bytes()


def test_dtypes_of_both_sides_may_differ(tmp_path: Path) -> None:
    w, ft = moved(1000)
    write_model(tmp_path / "base", {"w": w.bfloat16()}, dtype="bfloat16")
    write_model(tmp_path / "ft", {"w": ft}, dtype="float32")
    fapm_prune_checkpoint(tmp_path / "base", tmp_path / "ft", tmp_path / "a")
    assert read_model(tmp_path / "a")["w"].dtype == torch.bfloat16
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    fapm_prune_checkpoint(tmp_path / "base", tmp_path / "ft", tmp_path / "b", FAPMConfig(out_dtype="float32"))
    expected = fapm_prune_tensor(w.bfloat16(), ft, out_dtype=torch.float32)[0]
    assert torch.equal(read_model(tmp_path / "b")["w"], expected)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "float32"


def damaged(kind: str, base: Path, ft: Path) -> None:
    """Spoil an input."""
    before, after = read_model(base), read_model(ft)
    if kind == "cut":
        os.truncate(ft / SINGLE, (ft / SINGLE).stat().st_size - 10)
    elif kind == "nan":
        after["layers.0.mlp.weight"][3, 3] = torch.nan
    elif kind == "shape":
        after["layers.0.mlp.weight"] = after["layers.0.mlp.weight"][:, :8].contiguous()
    elif kind == "fewer rows":
        after["layers.0.mlp.weight"] = after["layers.0.mlp.weight"][:8].contiguous()
    elif kind == "keys":
        after["layer.0.mlp.weight"] = after.pop("layers.0.mlp.weight")
    elif kind == "int8":
        after["layers.0.mlp.weight"] = after["layers.0.mlp.weight"].to(torch.int8)
    elif kind == "quantised":
        (base / "config.json").write_text('{"quantization_config": {"bits": 4}}')
    if kind not in ("cut", "quantised"):
        write_model(ft, after)
        write_model(base, before)


BAD_INPUT = {
    "cut": "is cut short",
    "nan": r"layers.0.mlp.weight: NaN or inf among the values",
    "shape": "that is the pruned base",
    "fewer rows": "has shape .* in the base and .* in the fine-tuned model",
    "keys": r"lacks 1 of 4.*tensors of the base, e.g..*layers.0.mlp.weight \(nearest: layer.0.mlp.weight\)",
    "int8": "a quantised format. Use the unquantised checkpoint",
    "quantised": r"is quantised \(quantization_config in its config.json\)",
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_leaves_nothing(folders: tuple[Path, Path, Path], kind: str) -> None:
    base, ft, out = folders
    damaged(kind, base, ft)
    with pytest.raises(ValueError, match=BAD_INPUT[kind]):
        fapm_prune_checkpoint(base, ft, out)
    assert nothing_left(out.parent)


def test_nan_under_a_global_keep(folders: tuple[Path, Path, Path]) -> None:
    base, ft, out = folders
    damaged("nan", base, ft)
    with pytest.raises(ValueError, match=r"layers.0.mlp.weight: NaN or inf among the values"):
        fapm_prune_checkpoint(base, ft, out, FAPMConfig(method="ties"))
    assert nothing_left(out.parent)


def test_output_that_is_taken(folders: tuple[Path, Path, Path]) -> None:
    base, ft, out = folders
    with pytest.raises(ValueError, match="is also an input; name another folder"):
        fapm_prune_checkpoint(base, ft, ft)
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match="exists and is not empty; name another folder"):
        fapm_prune_checkpoint(base, ft, out)
    assert (out / "mine.txt").read_text() == "keep me"


def full_when_allocating(monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", allocate)


def full_when_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, []

    def write(*args: object) -> int:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, "pwrite", write)


@pytest.mark.parametrize("fill", [full_when_allocating, full_when_writing])
def test_full_disk_leaves_nothing(
    folders: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch, fill: Callable
) -> None:
    base, ft, out = folders
    fill(monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        fapm_prune_checkpoint(base, ft, out)
    assert nothing_left(out.parent)


def test_rest_of_a_killed_run_is_replaced(folders: tuple[Path, Path, Path]) -> None:
    base, ft, out = folders
    stale = out.with_name(".out.part")
    stale.mkdir()
    (stale / "model-99.safetensors").write_bytes(b"old")
    fapm_prune_checkpoint(base, ft, out)
    assert not stale.exists()
    assert not (out / "model-99.safetensors").exists()


SIDECARS = {
    "bf16": (torch.bfloat16, {}),
    "fp32": (torch.float32, {"chunk": 7, "resident_mib": 0}),
    "fp32 on bf16": (torch.bfloat16, {"out_dtype": "float32"}),
    "global": (torch.float32, {"scope": "global"}),
}


@pytest.mark.parametrize("case", SIDECARS)
def test_sidecar_there_and_back(tmp_path: Path, case: str) -> None:
    """Base plus sidecar is the full output, byte for byte; without it the base is back."""
    dtype, options = SIDECARS[case]
    before, after = weights(dtype=dtype)
    if "out_dtype" in options:
        after = {name: tensor.float() * 1.0001 for name, tensor in after.items()}
    base = write_model(tmp_path / "base", before, shards=2)
    ft = write_model(tmp_path / "ft", after)
    fapm_prune_checkpoint(base, ft, tmp_path / "full", FAPMConfig(keep=0.2, **options))
    fapm_prune_checkpoint(base, ft, tmp_path / "side", FAPMConfig(keep=0.2, sidecar=True, **options))
    apply_sidecar(base, tmp_path / "side", tmp_path / "added")
    apply_sidecar(tmp_path / "added", tmp_path / "side", tmp_path / "removed", remove=True)
    for expected, found in (("full", "added"), ("base", "removed")):
        for path in (tmp_path / expected).glob("*.safetensors"):
            assert path.read_bytes() == (tmp_path / found / path.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "side").iterdir()) == [REPORT, SIDECAR]


def test_sidecar_is_small(tmp_path: Path) -> None:
    """bf16 at keep .1: n/8 bytes of mask and .2 n of values, .325 n against 2 n."""
    w, ft = moved(100_000, dtype=torch.bfloat16)
    base = write_model(tmp_path / "base", {"w": w})
    tuned = write_model(tmp_path / "ft", {"w": ft})
    fapm_prune_checkpoint(base, tuned, tmp_path / "side", FAPMConfig(sidecar=True))
    assert (tmp_path / "side" / SIDECAR).stat().st_size == pytest.approx(32_500, abs=400)


def test_sidecar_of_another_base(folders: tuple[Path, Path, Path]) -> None:
    base, ft, out = folders
    side = out.with_name("side")
    fapm_prune_checkpoint(base, ft, side, FAPMConfig(sidecar=True))
    with pytest.raises(
        ValueError, match="is not the base that the sidecar was made for.*its checksum differs"
    ):
        apply_sidecar(ft, side, out)
    with pytest.raises(ValueError, match="is not base plus this sidecar.*its checksum differs"):
        apply_sidecar(base, side, out, remove=True)
    smaller = write_model(out.with_name("smaller"), {"bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="which the sidecar changes; give the base it was made for"):
        apply_sidecar(smaller, side, out)
    resized = read_model(base) | {"bias": torch.zeros(30)}
    with pytest.raises(ValueError, match="has another size than in the sidecar"):
        apply_sidecar(write_model(out.with_name("resized"), resized), side, out)
    with pytest.raises(FileNotFoundError, match="write one with FAPMConfig"):
        apply_sidecar(base, ft, out)
    assert nothing_left(out.parent)


def test_sidecar_that_could_not_come_off(tmp_path: Path) -> None:
    w, ft = (x.view(20, 5) for x in moved(100))
    base = write_model(tmp_path / "base", {"w": w})
    tuned = write_model(tmp_path / "ft", {"w": ft})
    with pytest.raises(ValueError, match="could not give it back when it is removed"):
        fapm_prune_checkpoint(base, tuned, tmp_path / "out", FAPMConfig(sidecar=True, out_dtype="bfloat16"))
    grown = write_model(tmp_path / "grown", {"w": torch.cat([ft, ft[:1]])})
    with pytest.raises(ValueError, match="Write the full model instead"):
        fapm_prune_checkpoint(base, grown, tmp_path / "out", FAPMConfig(sidecar=True))


def launch(arguments: list[str], *, processes: int = 2) -> subprocess.CompletedProcess:
    """`accelerate launch -m hf_plugins.fapm` on the CPU."""
    # accelerate's launcher of several processes is called multi_gpu, also where they compute on the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", str(processes), "--main_process_port", "0"]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "hf_plugins.fapm",
    ]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.host
@pytest.mark.parametrize("options", [["--chunk", "64"], ["--method", "ties", "--sidecar"]])
def test_two_processes_write_the_same_files(tmp_path: Path, options: list[str]) -> None:
    before, after = weights()
    base = write_model(tmp_path / "base", before, shards=3)
    ft = write_model(tmp_path / "ft", after)
    done = launch([str(base), str(ft), str(tmp_path / "two"), *options])
    assert done.returncode == 0, done.stderr
    config = FAPMConfig(method="ties", sidecar=True) if "ties" in options else FAPMConfig()
    one = fapm_prune_checkpoint(base, ft, tmp_path / "one", config)
    two = json.loads((tmp_path / "two" / REPORT).read_text())
    assert two["processes"] == 2
    assert two["totals"]["kept"] == one["totals"]["kept"]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    for name in names:
        if name != REPORT:
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.host
def test_failure_of_one_process_ends_all(tmp_path: Path) -> None:
    """NaN in the one tensor of the second process: both end, and nothing is left."""
    before, after = weights()
    after["layers.0.mlp.weight"][0, 0] = torch.nan
    base, ft = write_model(tmp_path / "base", before), write_model(tmp_path / "ft", after)
    done = launch([str(base), str(ft), str(tmp_path / "out")])
    assert done.returncode != 0
    assert "another process of the launch failed, nothing was written" in done.stderr
    assert "NaN or inf among the values" in done.stderr
    assert nothing_left(tmp_path)


@pytest.mark.host
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_output_loads_in_transformers(tmp_path: Path, kind: str) -> None:
    """Finite logits, every weight where it belongs, tied weights still tied."""
    from transformers import AutoModelForCausalLM

    from tests.hf_plugins import tiny_models

    torch.manual_seed(0)
    model = getattr(tiny_models, kind)(2)
    model.save_pretrained(tmp_path / "base")
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=1e-3)
    model.save_pretrained(tmp_path / "ft", max_shard_size="40KB")
    fapm_prune_checkpoint(tmp_path / "base", tmp_path / "ft", tmp_path / "out", FAPMConfig(keep=0.25))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tuned = model.state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, fapm_prune_tensor(base[name], tuned[name], keep=0.25)[0])
    assert torch.isfinite(loaded(input_ids=torch.arange(8)[None]).logits).all()
    if model.config.tie_word_embeddings:
        assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


# VmHWM instead of getrusage: the latter begins with the peak of the process that started this one.
MEMORY = """
import re, sys
from pathlib import Path
from hf_plugins.fapm import FAPMConfig, fapm_prune_checkpoint
def peak(): return int(re.search("VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
start = peak()
fapm_prune_checkpoint(*sys.argv[1:4], FAPMConfig(sync=False))
print(start, peak())
"""


def memory_of(tmp_path: Path, tensors: int, numel: int) -> tuple[float, float]:
    """Peak resident MiB before and after pruning a bf16 pair, in a process of its own."""
    w, ft = moved(numel, dtype=torch.bfloat16)
    names = [f"layer.{index}.weight" for index in range(tensors)]
    for folder, tensor in (("base", w), ("ft", ft)):
        write_model(tmp_path / folder, {name: tensor.clone() for name in names}, shards=min(tensors, 4))
    command = [sys.executable, "-c", MEMORY, *(str(tmp_path / name) for name in ("base", "ft", "out"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = (float(word) for word in done.stdout.split())
    return before, after


@pytest.mark.host
def test_memory_stays_below_the_tensor(tmp_path: Path) -> None:
    """A pair of 2 x 48 MiB is not held: 3 MiB of bits, 3 MiB of buffers, 1 % candidates are added."""
    before, after = memory_of(tmp_path, 1, 24 << 20)
    assert after - before < 48
    assert after < 512


@pytest.mark.slow
def test_memory_of_two_gigabytes(tmp_path: Path) -> None:
    _, after = memory_of(tmp_path, 8, 128 << 20)
    assert after < 512
