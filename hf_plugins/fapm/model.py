"""FAPM on model folders: base and fine-tuned checkpoint in, pruned checkpoint (or a sparse sidecar) out,
tensor by tensor and chunk by chunk, over as many processes as ``accelerate launch`` started.
"""

import json
import logging
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_plugins.fapm.bitmask import BitPacker, byte_ranges, flipped, flips, placed, unpacked
from hf_plugins.fapm.config import FAPMConfig
from hf_plugins.fapm.peft import (
    Adapter,
    LoraPair,
    adapter_from_folder,
    adapter_from_model,
    check_fits,
    is_adapter,
)
from hf_plugins.fapm.score import Pair, Rule, Scorer, TensorPair, chunks, mean_magnitude
from hf_plugins.fapm.selection import Selection, Threshold, radix_thresholds, survey
from hf_plugins.fapm.storage import (
    BLOCK,
    DTYPES,
    FLOATS,
    NAMES,
    Checkpoint,
    Entry,
    Planned,
    ShardWriter,
    StoredPair,
    side_files,
    write_config,
)
from hf_plugins.fapm.task_vector import PruneStats, check_finite, choose, describe, kept_chunks, num_kept

logger = logging.getLogger(__name__)
REPORT = "fapm.json"
SIDECAR = "fapm_sidecar.safetensors"
# Dtypes that hold every value of a narrower one, so that a cast there and back is exact.
_HOLDS = {"BF16": ("F32", "F64"), "F16": ("F32", "F64"), "F32": ("F64",), "F64": ()}
_TIED = ("lm_head.weight", "embed_out.weight", "output.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


class Workers:
    """The processes of an ``accelerate launch``, or this one alone."""

    def __init__(self) -> None:
        self.rank, self.size = 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1:
            from accelerate import PartialState

            self.rank = PartialState(cpu=True).process_index

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])


@dataclass
class Job:
    """One tensor of the output."""

    name: str
    action: str
    """prune, base (copied from it) or tuned (copied from the fine-tuned side)."""
    keep: float
    planned: Planned
    base: Entry | None = None
    tuned: Entry | None = None
    rest: int = 0
    """Entries of new rows behind the common part."""
    count: int = 0
    """Entries kept."""
    selection: tuple[Selection, PruneStats] | None = None
    """What a global keep chose beforehand."""


class _Inputs:
    """Both sides, open, whatever form the fine-tuned one has."""

    def __init__(self, base: str | Path, tuned: Any, config: FAPMConfig) -> None:
        self.config = config
        self.base = Checkpoint(base)
        self.adapter: Adapter | None = None
        self.tuned: Checkpoint | None = None
        if isinstance(tuned, (str, Path)):
            folder = Path(tuned)
            self.label = str(tuned)
            if is_adapter(folder):
                self.adapter = adapter_from_folder(folder)
            else:
                self.tuned = Checkpoint(folder)
        else:
            self.label = f"live {type(tuned).__name__}"
            self.adapter = adapter_from_model(tuned)
        for side in (self.base, self.tuned):
            if side is not None and side.config().get("quantization_config"):
                raise ValueError(
                    f"{side.folder} is quantised (quantization_config in its config.json); FAPM needs "
                    "the weights themselves. Use the unquantised checkpoint."
                )
        if self.adapter:
            check_fits(self.adapter, self.base)

    def pair(self, job: Job) -> Pair:
        """The tensor's values before and after."""
        assert job.base is not None, f"{job.name}: only a tensor of the base is pruned"
        resident = self.config.resident_mib << 20
        if self.adapter:
            if job.name in self.adapter.factors:
                factors = self.adapter.factors[job.name]
                return LoraPair(self.base, job.base, factors, chunk=self.config.chunk, resident=resident)
            return TensorPair(self.base.tensor(job.name), self.adapter.full[job.name])
        assert self.tuned is not None, f"{job.name}: no fine-tuned side"
        assert job.tuned is not None, f"{job.name}: no fine-tuned tensor"
        return StoredPair(
            self.base,
            job.base,
            self.tuned,
            job.tuned,
            numel=job.base.numel,
            chunk=self.config.chunk,
            resident=resident,
        )

    def digest(self) -> str:
        """Hash of the fine-tuned side's headers, empty for a live model."""
        return self.tuned.digest() if self.tuned else ""

    def close(self) -> None:
        """Close the files of both sides."""
        for side in (self.base, self.tuned):
            if side is not None:
                side.close()


def _keep_of(name: str, config: FAPMConfig) -> float:
    if (config.include and not re.search(config.include, name)) or (
        config.exclude and re.search(config.exclude, name)
    ):
        return 0.0
    return next(
        (keep for pattern, keep in config.per_tensor.items() if re.search(pattern, name)), config.keep
    )


def _check_patterns(names: Iterable[str], config: FAPMConfig) -> None:
    names = list(names)
    given = [("include", config.include), ("exclude", config.exclude)]
    for option, pattern in (*given, *(("per_tensor", key) for key in config.per_tensor)):
        if pattern and not any(re.search(pattern, name) for name in names):
            near = get_close_matches(pattern, names, n=3, cutoff=0.1) or names[:3]
            raise ValueError(
                f"{option}={pattern!r} is found in no tensor name; there are e.g. {', '.join(near)}."
            )


def _tuned_entry(name: str, tuned: Checkpoint) -> Entry | None:
    if name in tuned.entries:
        return tuned.entries[name]
    # A tied head is stored once, by some tools under the head's name and by others under the embedding's.
    if tuned.config().get("tie_word_embeddings", False):
        for left, right in ((_TIED, _EMBEDDINGS), (_EMBEDDINGS, _TIED)):
            if name.endswith(left):
                return next((entry for key, entry in tuned.entries.items() if key.endswith(right)), None)
    return None


def _jobs(inputs: _Inputs) -> list[Job]:
    """What happens to each tensor, in the order of the output files."""
    config, base = inputs.config, inputs.base
    _check_patterns(base.entries, config)
    jobs: list[Job] = []
    missing: list[str] = []
    used: set[str] = set()
    for entry in (entry for shard in base.shards for entry in shard.entries):
        is_float = entry.dtype in FLOATS
        dtype = NAMES[getattr(torch, config.out_dtype)] if config.out_dtype and is_float else entry.dtype
        planned = Planned(entry.name, dtype, entry.shape)
        keep = _keep_of(entry.name, config) if is_float else 1.0
        if inputs.adapter:
            changed = entry.name in inputs.adapter.factors or entry.name in inputs.adapter.full
            jobs.append(Job(entry.name, "prune" if changed and keep else "base", keep, planned, entry))
            continue
        assert inputs.tuned is not None, "a checkpoint or an adapter"
        tuned = _tuned_entry(entry.name, inputs.tuned)
        if tuned is None:
            missing.append(entry.name)
            continue
        used.add(tuned.name)
        jobs.append(_job(entry, tuned, planned, keep))
    for job in jobs:
        job.count = num_kept(job.base.numel, job.keep) if job.base else 0
    if inputs.tuned:
        extra = [entry for name, entry in inputs.tuned.entries.items() if name not in used]
        _check_missing(missing, extra, inputs)
        tied = inputs.tuned.config().get("tie_word_embeddings", False)
        jobs += [_new_tensor(entry, config) for entry in extra if not (tied and entry.name.endswith(_TIED))]
    return jobs


def _job(entry: Entry, tuned: Entry, planned: Planned, keep: float) -> Job:
    if tuned.shape == entry.shape:
        rest = 0
    elif entry.shape and tuned.shape[1:] == entry.shape[1:] and tuned.shape[0] > entry.shape[0]:
        # A vocabulary that grew: the new rows have no pre-trained value to go back to.
        rest = tuned.numel - entry.numel
        planned = planned._replace(shape=tuned.shape)
    else:
        raise ValueError(
            f"{entry.name} has shape {entry.shape} in the base and {tuned.shape} in the fine-tuned "
            "model. Give the base that was fine-tuned; if layers or rows were pruned before, that is the "
            "pruned base."
        )
    if entry.dtype not in FLOATS:
        return Job(entry.name, "tuned", 1.0, planned._replace(dtype=tuned.dtype), entry, tuned)
    if tuned.dtype not in FLOATS:
        raise ValueError(
            f"{entry.name} is {entry.dtype} in the base and {tuned.dtype} in the fine-tuned model, a "
            "quantised format. Use the unquantised checkpoint."
        )
    return Job(entry.name, "prune" if keep else "base", keep, planned, entry, tuned, rest)


def _new_tensor(entry: Entry, config: FAPMConfig) -> Job:
    is_float = entry.dtype in FLOATS
    dtype = NAMES[getattr(torch, config.out_dtype)] if config.out_dtype and is_float else entry.dtype
    return Job(entry.name, "tuned", 1.0, Planned(entry.name, dtype, entry.shape), None, entry)


def _check_missing(missing: list[str], extra: list[Entry], inputs: _Inputs) -> None:
    if not missing:
        return
    assert inputs.tuned is not None, "a checkpoint"
    near = {name: get_close_matches(name, [entry.name for entry in extra], n=1) for name in missing[:3]}
    shown = "; ".join(f"{name}{f' (nearest: {found[0]})' if found else ''}" for name, found in near.items())
    raise ValueError(
        f"{inputs.tuned.folder} lacks {len(missing)} of {len(inputs.base.entries)} tensors of the base, "
        f"e.g. {shown}; it has {len(extra)} that the base lacks. Both must be saved by the same model class."
    )


def _plan(writer: ShardWriter, jobs: list[Job], base: Checkpoint) -> None:
    by_shard: dict[str, list[Planned]] = {shard.name: [] for shard in base.shards}
    for job in jobs:
        by_shard[job.base.shard if job.base else base.shards[-1].name].append(job.planned)
    for shard in base.shards:
        writer.plan(shard.name, by_shard[shard.name], like=shard)


def _mine(jobs: list[Job], workers: Workers) -> list[Job]:
    """The tensors of this process: largest first to whoever has the least."""
    load = [0] * workers.size
    chosen: list[Job] = []
    for job in sorted(jobs, key=lambda job: -np.prod(job.planned.shape, dtype=np.int64)):
        rank = load.index(min(load))
        load[rank] += int(np.prod(job.planned.shape, dtype=np.int64))
        if rank == workers.rank:
            chosen.append(job)
    return chosen


def _rule(config: FAPMConfig) -> Rule:
    return Rule(config.method, config.coefficient, config.seed)


@contextmanager
def _named(job: Job) -> Iterator[None]:
    """Say which tensor an error is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{job.name}: {error}") from error


def _global_selection(inputs: _Inputs, mine: list[Job], jobs: list[Job], workers: Workers) -> None:
    """One threshold over all tensors, from histograms summed over tensors and processes."""
    config = inputs.config
    pruned = [job for job in jobs if job.action == "prune"]
    total = num_kept(sum(job.base.numel for job in pruned if job.base), config.keep)
    mine = sorted((job for job in mine if job.action == "prune"), key=lambda job: job.name)
    means = {}
    for job in mine:
        means[job.name] = mean_magnitude(inputs.pair(job), chunk=config.chunk)

    def scorer(job: Job) -> Scorer:
        return Scorer(inputs.pair(job), _rule(config), mu=means[job.name][0], chunk=config.chunk)

    def scores() -> Iterator[tuple[int, Tensor]]:
        for job in mine:
            yield from scorer(job).scores()

    everything = sum(job.base.numel for job in pruned if job.base)
    if total in (0, everything):
        threshold = Threshold(np.inf if total == 0 else -np.inf, 0)
    else:
        threshold = radix_thresholds(scores, [total], lambda counts: sum(workers.gather(counts)))[0]
    counts = {}
    for job in mine:
        above = equal = 0
        for _, s in scorer(job).scores():
            above += int(np.count_nonzero(s.numpy() > threshold.value))
            equal += int(np.count_nonzero(s.numpy() == threshold.value))
        counts[job.name] = (above, equal)
    counts = {name: pair for part in workers.gather(counts) for name, pair in part.items()}
    left = threshold.ties if 0 < total < everything else (everything if total else 0)
    ties = {}
    for name in sorted(counts):
        ties[name] = min(left, counts[name][1])
        left -= ties[name]
    for job in pruned:
        job.count = counts[job.name][0] + ties[job.name]
    for job in mine:
        found = Selection(Threshold(threshold.value, ties[job.name]), "global")
        each = scorer(job)
        survey(each, found)
        with _named(job):
            check_finite(each.pair, means[job.name][0], found.energy, chunk=config.chunk)
        stats = describe(each, found, k=job.count, zeros=means[job.name][1])
        job.selection = (found, stats)


def _copy(
    source: Checkpoint, entry: Entry, writer: ShardWriter, name: str, start: int = 0, at: int = 0
) -> None:
    """Copy a tensor from entry ``start`` on to place ``at`` of the output, cast where the dtype differs."""
    dtype = DTYPES[writer.entries[name].dtype]
    buffer = torch.empty(min(BLOCK // entry.itemsize, max(entry.numel - start, 1)), dtype=DTYPES[entry.dtype])
    for first, last in chunks(entry.numel - start, buffer.numel()):
        values = source.read_into(entry, start + first, buffer[: last - first])
        writer.write(name, at + first, values.to(dtype))


def _copy_rest(job: Job, inputs: _Inputs, writer: ShardWriter) -> None:
    """New rows of a grown vocabulary, as fine-tuned."""
    if job.rest:
        assert inputs.tuned is not None, "new rows come from the fine-tuned side"
        assert job.tuned is not None, "new rows come from a tensor"
        common = job.tuned.numel - job.rest
        _copy(inputs.tuned, job.tuned, writer, job.name, start=common, at=common)


def _run_job(
    job: Job, inputs: _Inputs, writer: ShardWriter, sidecar: "_SidecarWriter | None"
) -> PruneStats | None:
    """Write one tensor; gives its statistics if it was pruned."""
    if job.action == "base":
        if sidecar is None:
            assert job.base is not None, "copied from the base"
            _copy(inputs.base, job.base, writer, job.name)
            _copy_rest(job, inputs, writer)
        return None
    if job.action == "tuned":
        if sidecar is None:
            assert inputs.tuned is not None, "copied from the fine-tuned side"
            assert job.tuned is not None, "copied from its tensor"
            _copy(inputs.tuned, job.tuned, writer, job.name)
        return None
    pair, rule, chunk = inputs.pair(job), _rule(inputs.config), inputs.config.chunk
    if job.selection is None:
        with _named(job):
            scorer, found, stats = choose(pair, job.keep, rule=rule, chunk=chunk)
    else:
        found, stats = job.selection
        scorer = Scorer(pair, rule, mu=stats.mean_magnitude, chunk=chunk)
    dtype = DTYPES[job.planned.dtype]
    for start, out, mask in kept_chunks(scorer, found, stats, keep=job.keep, dtype=dtype):
        if sidecar is None:
            writer.write(job.name, start, out)
        else:
            sidecar.push(job, pair.read(start, start + len(mask))[0], out, mask)
    if sidecar is not None:
        sidecar.finish(job)
    else:
        _copy_rest(job, inputs, writer)
    return stats


class _SidecarWriter:
    """Packed mask and changed values of each tensor, in one safetensors file."""

    def __init__(self, writer: ShardWriter) -> None:
        self.writer = writer
        self._packer, self._at, self._bytes, self._crc = BitPacker(), 0, 0, 0

    def plan(self, jobs: list[Job], base: Checkpoint, config: FAPMConfig) -> None:
        """Lay out the file: sizes follow from the keeps."""
        tensors = []
        for job in jobs:
            if job.action == "tuned" and job.base is not None:
                continue
            if job.rest or job.base is None:
                raise ValueError(
                    f"{job.name} is new or has new rows in the fine-tuned model: a sidecar holds "
                    "changes of tensors that the base has. Write the full model instead."
                )
            if job.action != "prune":
                continue
            tensors.append(Planned(f"{job.name}|mask", "U8", (-(-job.base.numel // 8),)))
            tensors.append(Planned(f"{job.name}|crc32", "I64", (1,)))
            if job.planned.dtype != job.base.dtype and job.planned.dtype not in _HOLDS[job.base.dtype]:
                raise ValueError(
                    f"{job.name} is {job.base.dtype} in the base: a sidecar in {job.planned.dtype} "
                    "could not give it back when it is removed. Use out_dtype float32, or None."
                )
            if job.planned.dtype == job.base.dtype:
                bits = {2: "I16", 4: "I32", 8: "I64"}[job.base.itemsize]
                tensors.append(Planned(f"{job.name}|flips", bits, (job.count,)))
            else:
                tensors.append(Planned(f"{job.name}|new", job.planned.dtype, (job.count,)))
                tensors.append(Planned(f"{job.name}|old", job.base.dtype, (job.count,)))
        self.writer.plan(SIDECAR, tensors)

    def push(self, job: Job, base: Tensor, out: Tensor, mask: np.ndarray) -> None:
        """The next chunk of a tensor."""
        packed = self._packer.push(mask)
        if len(packed):
            self.writer.write(f"{job.name}|mask", self._bytes, torch.from_numpy(packed))
            self._bytes += len(packed)
        self._crc = zlib.crc32(base.contiguous().view(torch.uint8).numpy(), self._crc)
        count = int(np.count_nonzero(mask))
        if count:
            if base.dtype == out.dtype:
                signed = {2: np.int16, 4: np.int32, 8: np.int64}[base.element_size()]
                found = torch.from_numpy(flips(base, out, mask).view(signed))
                self.writer.write(f"{job.name}|flips", self._at, found)
            else:
                chosen = torch.from_numpy(mask)
                self.writer.write(f"{job.name}|new", self._at, out[chosen])
                self.writer.write(f"{job.name}|old", self._at, base[chosen])
        self._at += count

    def finish(self, job: Job) -> None:
        """The last bits and the checksum of the base tensor."""
        if len(rest := self._packer.rest()):
            self.writer.write(f"{job.name}|mask", self._bytes, torch.from_numpy(rest))
        self.writer.write(f"{job.name}|crc32", 0, torch.tensor([self._crc]))
        self._packer, self._at, self._bytes, self._crc = BitPacker(), 0, 0, 0


def _part_folder(out: Path, inputs: Iterable[Path]) -> Path:
    """Where the output grows until it is complete.

    Raises:
        ValueError: If the output is one of the inputs, or already there.
    """
    if out.resolve() in {folder.resolve() for folder in inputs}:
        raise ValueError(f"{out} is also an input; name another folder for the output.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{out} exists and is not empty; name another folder for the output, or remove it first."
        )
    return out.with_name(f".{out.name}.part")


def _publish(part: Path, out: Path) -> None:
    if out.is_dir():
        out.rmdir()
    part.rename(out)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        found["mmhf-plugins"] = metadata.version("mmhf-plugins")
    except metadata.PackageNotFoundError:
        found["mmhf-plugins"] = "not installed, run from its source"
    return found


def _report(
    inputs: _Inputs, stats: Mapping[str, PruneStats], workers: Workers, seconds: float
) -> dict[str, Any]:
    config = inputs.config
    moved = [s for s in stats.values() if s.moved_ratio > 0]
    numel = sum(s.numel for s in moved)
    effective = sum(s.effective_density * s.numel for s in moved) / max(numel, 1)
    expected = sum(s.num_kept for s in moved) / max(numel, 1) if config.method != "wise_ft" else 0.0
    warnings = []
    if config.keep and not moved and stats:
        warnings.append("nothing moved: both models hold the same values.")
    elif effective < expected / 2:
        warnings.append(
            f"effective density is {effective:.4f} where {expected:.4f} was kept: most of the kept "
            "entries are equal to the pre-trained ones as stored. The updates are too small for this dtype "
            "at the weights FAPM prefers; prune fp32 weights or the LoRA factors, with out_dtype float32 or "
            "a sidecar."
        )
    by_magnitude = sorted(name for name, s in stats.items() if s.by_magnitude)
    if by_magnitude:
        warnings.append(f"ranked by magnitude, since the base is all zero: {', '.join(by_magnitude)}.")
    return {
        "config": asdict(config),
        "base": {"folder": str(inputs.base.folder), "sha256_of_headers": inputs.base.digest()},
        "finetuned": {"source": inputs.label, "sha256_of_headers": inputs.digest()},
        "versions": _versions(),
        "processes": workers.size,
        "seconds": round(seconds, 3),
        "totals": {
            "tensors_pruned": len(stats),
            "entries": sum(s.numel for s in stats.values()),
            "kept": sum(s.num_kept for s in stats.values()),
            "moved_entries": round(sum(s.moved_ratio * s.numel for s in stats.values())),
            "effective_density": effective,
            "ties_taken": sum(s.ties_taken for s in stats.values()),
            "undefined": sum(s.num_undefined for s in stats.values()),
        },
        "warnings": warnings,
        "tensors": {name: s.as_dict() for name, s in sorted(stats.items())},
    }


def _side_files(inputs: _Inputs, tuned: Any, part: Path, jobs: list[Job]) -> None:
    folders = [inputs.base.folder]
    if isinstance(tuned, (str, Path)):
        folders.append(Path(tuned))
    floats = [job.planned for job in jobs if job.planned.dtype in FLOATS]
    for name, source in side_files(folders).items():
        if name == "config.json" and floats:
            most = max(floats, key=lambda planned: np.prod(planned.shape, dtype=np.int64))
            write_config(source, part / name, most.dtype)
        else:
            shutil.copyfile(source, part / name)


def _together(workers: Workers, work: Callable[[], Any]) -> list[Any]:
    """Run a step in every process and gather what each found; if one fails, all do."""
    try:
        result, error = work(), None
    except (OSError, ValueError, RuntimeError) as caught:
        if workers.size == 1:
            raise
        result, error = None, caught
    outcomes = workers.gather((result, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    failed = [message for _, message in outcomes if message]
    if failed:
        raise RuntimeError(f"another process of the launch failed, nothing was written: {failed[0]}")
    return [result for result, _ in outcomes]


def fapm_prune_checkpoint(
    base: str | Path, finetuned: Any, out: str | Path, config: FAPMConfig | None = None
) -> dict[str, Any]:
    """Prune the task vector of a whole model and write the result as a model folder.

    No model is loaded: memory is some chunks, whatever the size of the model. The output keeps the base's
    shards, takes config and tokenizer from the fine-tuned folder, and gets its name only when it is complete.
    Under ``accelerate launch`` every process takes a part of the tensors.

    Args:
        base: Folder of the pre-trained model (safetensors, one file or shards).
        finetuned: Folder of the fine-tuned model, folder of a LoRA adapter, or a live PEFT model.
        out: Folder to write; must not exist, or be empty.
        config: Options; None takes the paper's.

    Returns:
        What also stands in ``fapm.json``: options, inputs, totals, warnings and figures of every tensor.

    Raises:
        ValueError: If the inputs do not fit together, are damaged or hold NaN; nothing is left behind.
        OSError: If the disk is full; nothing is left behind.
        RuntimeError: If another process of the launch failed.
    """
    config = config or FAPMConfig()
    workers, out, start = Workers(), Path(out), time.perf_counter()
    inputs = _Inputs(base, finetuned, config)
    folders = [inputs.base.folder] + ([Path(finetuned)] if isinstance(finetuned, (str, Path)) else [])
    part = _part_folder(out, folders)
    writer = ShardWriter(part)
    try:
        jobs = _jobs(inputs)
        mine = _mine(jobs, workers)
        sidecar = _SidecarWriter(writer) if config.sidecar else None
        if config.is_global:
            _together(workers, lambda: _global_selection(inputs, mine, jobs, workers))
        if sidecar:
            sidecar.plan(jobs, inputs.base, config)
        else:
            _plan(writer, jobs, inputs.base)

        def create() -> None:
            if workers.rank == 0:
                if part.exists():
                    shutil.rmtree(part)
                part.mkdir(parents=True)
                writer.create()

        def prune() -> dict[str, PruneStats]:
            found = {job.name: _run_job(job, inputs, writer, sidecar) for job in mine}
            writer.close(sync=config.sync)
            return {name: stats for name, stats in found.items() if stats is not None}

        _together(workers, create)
        stats = {name: each for part_stats in _together(workers, prune) for name, each in part_stats.items()}
        report = _report(inputs, stats, workers, time.perf_counter() - start)

        def publish() -> None:
            if workers.rank == 0:
                if sidecar is None:
                    writer.write_index()
                    _side_files(inputs, finetuned, part, jobs)
                (part / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                _publish(part, out)

        _together(workers, publish)
    finally:
        writer.close(sync=False)
        inputs.close()
        if workers.rank == 0 and part.exists():
            shutil.rmtree(part)
    if workers.rank == 0:
        for warning in report["warnings"]:
            logger.warning("%s", warning)
    return report


class CheckpointPairs:
    """The tensors of a base that fine-tuning may have changed, to be opened one by one; a context manager."""

    def __init__(self, base: str | Path, finetuned: Any, config: FAPMConfig) -> None:
        self._inputs = _Inputs(base, finetuned, config)
        try:
            self._jobs = {job.name: job for job in _jobs(self._inputs) if job.action == "prune"}
        except ValueError:
            self._inputs.close()
            raise
        self.names, self.rule, self.chunk = list(self._jobs), _rule(config), config.chunk

    def open(self, name: str) -> Pair:
        """Values of one tensor before and after."""
        return self._inputs.pair(self._jobs[name])

    def __enter__(self) -> "CheckpointPairs":
        return self

    def __exit__(self, *_: object) -> None:
        self._inputs.close()


def apply_sidecar(model: str | Path, sidecar: str | Path, out: str | Path, *, remove: bool = False) -> Path:
    """Add a sidecar to its base model, or remove it again; both give exact bytes.

    Args:
        model: The base model's folder; with ``remove``, the folder of base plus sidecar.
        sidecar: Folder or file that `fapm_prune_checkpoint` wrote with ``sidecar=True``.
        out: Folder to write; must not exist, or be empty.
        remove: Take the changes back.

    Returns:
        ``out``.

    Raises:
        ValueError: If the sidecar does not belong to the model.
    """
    sidecar, out = Path(sidecar), Path(out)
    folder = sidecar if sidecar.is_dir() else sidecar.parent
    part = _part_folder(out, [Path(model), folder])
    writer = ShardWriter(part)
    with Checkpoint(model) as source, _open_sidecar(folder) as changes:
        names = {name.rsplit("|", 1)[0] for name in changes.entries}
        if unknown := sorted(names - set(source.entries)):
            raise ValueError(
                f"{model} lacks {unknown[0]}, which the sidecar changes; give the base it was made for."
            )
        try:
            for shard in source.shards:
                planned = [_after(entry, names, changes, remove) for entry in shard.entries]
                writer.plan(shard.name, planned, like=shard)
            part.mkdir(parents=True, exist_ok=True)
            writer.create()
            for entry in source.entries.values():
                if entry.name in names:
                    _apply(entry, source, changes, writer, remove=remove)
                else:
                    _copy(source, entry, writer, entry.name)
            writer.close(sync=True)
            writer.write_index()
            for name, path in side_files([source.folder]).items():
                if name == "config.json":
                    write_config(path, part / name, max(writer.entries.values(), key=lambda e: e.numel).dtype)
                else:
                    shutil.copyfile(path, part / name)
            _publish(part, out)
        finally:
            writer.close(sync=False)
            if part.exists():
                shutil.rmtree(part)
    return out


def _open_sidecar(folder: Path) -> Checkpoint:
    if not (folder / SIDECAR).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {SIDECAR}; write one with FAPMConfig(sidecar=True) or --sidecar."
        )
    return Checkpoint(folder, files=(SIDECAR,))


def _after(entry: Entry, names: set[str], changes: Checkpoint, remove: bool) -> Planned:
    key = f"{entry.name}|{'old' if remove else 'new'}"
    dtype = changes.entries[key].dtype if entry.name in names and key in changes.entries else entry.dtype
    return Planned(entry.name, dtype, entry.shape)


def _apply(
    entry: Entry, source: Checkpoint, changes: Checkpoint, writer: ShardWriter, *, remove: bool
) -> None:
    """Stream one tensor through its mask; the checksum tells whether the base is the right one."""
    bits, kind = changes.entries[f"{entry.name}|mask"], "flips"
    if f"{entry.name}|flips" not in changes.entries:
        kind = "old" if remove else "new"
    values = changes.entries[f"{entry.name}|{kind}"]
    expected = int(changes.tensor(f"{entry.name}|crc32"))
    if (entry.numel + 7) // 8 != bits.numel:
        raise ValueError(f"{entry.name} has another size than in the sidecar; give the base it was made for.")
    crc = at = 0
    for start, stop in byte_ranges(entry.numel, BLOCK // entry.itemsize):
        now = source.read_into(entry, start, torch.empty(stop - start, dtype=DTYPES[entry.dtype]))
        packed = torch.empty((stop - start + 7) // 8, dtype=torch.uint8)
        mask = unpacked(changes.read_into(bits, start // 8, packed).numpy(), 0, stop - start)
        count = int(np.count_nonzero(mask))
        new = changes.read_into(values, at, torch.empty(count, dtype=DTYPES[values.dtype]))
        at += count
        if kind == "flips":
            unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[entry.itemsize]
            out = flipped(now, mask, new.numpy().view(unsigned))
        else:
            out = placed(now, mask, new)
        crc = zlib.crc32((out if remove else now).view(torch.uint8).numpy(), crc)
        writer.write(entry.name, start, out)
    if crc != expected:
        what = "base plus this sidecar" if remove else "the base that the sidecar was made for"
        raise ValueError(f"{entry.name} in {source.folder} is not {what}: its checksum differs.")
