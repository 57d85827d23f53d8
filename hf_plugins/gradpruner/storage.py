"""What lies on disk: gradient factors and scores of a scoring run, and checkpoints that are shortened as
streams."""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import logging

from hf_plugins.decoder_layers import check_droppable, find_decoder_layers, layer_prefix, shorten_config
from hf_plugins.gradpruner.importance import Normalize, Score, layer_scores, step_scores
from hf_plugins.gradpruner.merging import Donor, merge_difference, merge_module
from hf_plugins.gradpruner.plan import PruningPlan, check_plan, orphans
from hf_plugins.gradpruner.shards import (
    Entry,
    FileMatrix,
    copy_chunks,
    read_checkpoint,
    read_entries,
    tensor_chunks,
    write_header,
)
from hf_plugins.whole_files import replacing, write_json

logger = logging.get_logger(__name__)

SCORES_FILE = "gradpruner_scores.json"
HISTORY_FOLDER = "gradpruner_history"
REPORT_FILE = "gradpruner.json"
# Small files that make a checkpoint whole besides weights and config.
COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
Module = tuple[int, str]
Factors = Mapping[Module, tuple[Tensor, Tensor]]


class GradientHistory:
    """Thin gradient factors of every collected step, in the layout of the base weight.

    Args:
        folder: Where to spill, one file a step; None keeps them in memory.
        layers: Layers worth keeping; None for all.
    """

    def __init__(self, folder: Path | None = None, layers: Collection[int] | None = None) -> None:
        self.folder, self.layers = folder, None if layers is None else frozenset(layers)
        self._steps: list[dict[str, Tensor]] = []
        self._num_files = 0

    def __len__(self) -> int:
        return len(self._steps) or self._num_files

    @staticmethod
    def open(folder: Path) -> "GradientHistory":
        """History that `save` or a run with ``history="disk"`` left.

        Raises:
            FileNotFoundError: If the folder holds no step.
        """
        history = GradientHistory(folder)
        history._num_files = len(list(folder.glob("step_*.safetensors")))
        if not history._num_files:
            raise FileNotFoundError(
                f"{folder} holds no gradient factors; score with history=memory or disk, or merge nothing "
                "(n_merge=0)."
            )
        return history

    def add(self, factors: Factors) -> None:
        """Append one step; fp32, moved to the CPU."""
        tensors = {}
        for (layer, name), (left, right) in factors.items():
            if self.layers is None or layer in self.layers:
                tensors[f"{layer}.{name}.left"] = left.to("cpu", torch.float32).contiguous()
                tensors[f"{layer}.{name}.right"] = right.to("cpu", torch.float32).contiguous()
        if self.folder is None:
            self._steps.append(tensors)
        else:
            self._write(self.folder, self._num_files, tensors)
            self._num_files += 1

    @staticmethod
    def _write(folder: Path, step: int, tensors: dict[str, Tensor]) -> None:
        # A run that a power cut ends scores anew; waiting for the disk would slow each of its steps.
        with replacing(folder / f"step_{step:05d}.safetensors", sync=False) as part:
            save_file(tensors, part)

    def truncate(self, num_steps: int) -> None:
        """Forget steps from number ``num_steps`` on, as a resumed run needs that repeats them.

        Raises:
            ValueError: If fewer steps are there.
        """
        if self.folder is not None:
            files = sorted(self.folder.glob("step_*.safetensors"))
            for path in files[num_steps:]:
                path.unlink()
            self._num_files = min(len(files), num_steps)
        else:
            del self._steps[num_steps:]
        if len(self) != num_steps:
            raise ValueError(
                f"the history holds {len(self)} steps and the checkpoint speaks of {num_steps}. Resume "
                f"with the files of {self.folder or 'the checkpoint'}, or start the scoring run anew."
            )

    def save(self, folder: Path) -> None:
        """Write all steps of a history in memory into a folder."""
        for path in folder.glob("step_*.safetensors"):
            path.unlink()
        for step, tensors in enumerate(self._steps):
            self._write(folder, step, tensors)

    def load(self, folder: Path) -> None:
        """Read the steps that `save` wrote back into memory."""
        self._steps = []
        for path in sorted(folder.glob("step_*.safetensors")):
            with safe_open(path, "pt") as file:
                self._steps.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118

    def modules(self, layer: int) -> list[str]:
        """Names of the modules of a layer whose factors are kept, sorted."""
        keys = self._keys()
        return sorted(
            key.removesuffix(".left").partition(".")[2]
            for key in keys
            if key.startswith(f"{layer}.") and key.endswith(".left")
        )

    def _keys(self) -> list[str]:
        if self.folder is None:
            return list(self._steps[0]) if self._steps else []
        with safe_open(self.folder / "step_00000.safetensors", "pt") as file:
            return list(file.keys())

    def factors(self, layer: int, name: str) -> tuple[Tensor, Tensor]:
        """Factors of one module over all steps: left (T, M, R) and right (T, R, N), fp32.

        Raises:
            KeyError: If they were not kept.
        """
        if name not in self.modules(layer):
            raise KeyError(
                f"no gradient factors of layer {layer}, module {name!r}; collect again with history=memory "
                f"or disk (kept: {self.modules(layer) or 'none of this layer'})."
            )
        key = f"{layer}.{name}"
        if self.folder is None:
            steps = self._steps
            return torch.stack([s[f"{key}.left"] for s in steps]), torch.stack(
                [s[f"{key}.right"] for s in steps]
            )
        lefts, rights = [], []
        for step in range(self._num_files):
            with safe_open(self.folder / f"step_{step:05d}.safetensors", "pt") as file:
                lefts.append(file.get_tensor(f"{key}.left"))
                rights.append(file.get_tensor(f"{key}.right"))
        return torch.stack(lefts), torch.stack(rights)


@dataclass(kw_only=True)
class ScoreRecord:
    """Squared gradient norms of every module at every collected step, and how they were collected."""

    num_layers: int
    """Layers of the model."""
    estimator: str
    """Which gradient."""
    norms: list[dict[Module, float]] = field(default_factory=list)
    """One dict a step."""
    num_params: dict[Module, int] = field(default_factory=dict)
    """Entries of each module's weight."""
    num_skipped: int = 0
    """Optimizer steps left out because a gradient was inf or NaN."""
    num_zero: int = 0
    """Collected steps whose norms are all exactly 0."""

    def add(self, norms: dict[Module, float]) -> None:
        """Append one step."""
        self.norms.append(norms)
        self.num_zero += not any(norms.values())

    def by_step(self, *, score: Score = "squared", normalize: Normalize = "none") -> Tensor:
        """Scores (T, L); see `importance.step_scores`."""
        return step_scores(
            self.norms, self.num_layers, score=score, normalize=normalize, num_params=self.num_params or None
        )

    def scores(self, *, score: Score = "squared", normalize: Normalize = "none") -> Tensor:
        """Scores (L,); see `importance.layer_scores`."""
        return layer_scores(self.by_step(score=score, normalize=normalize))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "num_layers": self.num_layers,
            "estimator": self.estimator,
            "num_skipped": self.num_skipped,
            "num_zero": self.num_zero,
            "num_params": {f"{layer}.{name}": count for (layer, name), count in self.num_params.items()},
            "norms": [
                {f"{layer}.{name}": value for (layer, name), value in step.items()} for step in self.norms
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ScoreRecord":
        """The record that `to_dict` wrote."""

        def modules(flat: Mapping[str, Any]) -> dict[Module, Any]:
            return {(int(key.partition(".")[0]), key.partition(".")[2]): value for key, value in flat.items()}

        return cls(
            num_layers=values["num_layers"],
            estimator=values["estimator"],
            norms=[modules(step) for step in values["norms"]],
            num_params=modules(values["num_params"]),
            num_skipped=values["num_skipped"],
            num_zero=values["num_zero"],
        )


def read_scores(folder: Path) -> ScoreRecord:
    """The record a scoring run saved.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = folder / SCORES_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; run `mmhf gradpruner score` first and name its output folder."
        )
    return ScoreRecord.from_dict(json.loads(path.read_text(encoding="utf-8")))


class _Source(NamedTuple):
    """A checkpoint about to be shortened."""

    config: PreTrainedConfig
    """Of the whole model."""
    prefix: str
    """Start of layer tensors' names, such as ``model.layers``."""
    files: dict[str, list[str]]
    """Weight file -> names, in the order of their bytes."""
    entries: dict[str, Entry]
    """Name -> place."""

    def key(self, layer: int, name: str) -> str:
        """Full name of a layer's tensor.

        Raises:
            ValueError: If the checkpoint lacks it.
        """
        key = f"{self.prefix}.{layer}.{name}"
        if key not in self.entries:
            raise ValueError(
                f"{key} is not in the checkpoint, but the plan merges it. Score and shorten the same "
                "model, in the layout that save_pretrained() writes."
            )
        return key


def _open_source(folder: Path) -> _Source:
    config = AutoConfig.from_pretrained(folder)
    files = read_checkpoint(folder)
    entries = {name: entry for file in files for name, entry in read_entries(folder / file).items()}
    text = config.get_text_config()
    check_droppable(text)
    # Built without memory, only to learn what its list of layers is called.
    with torch.device("meta"):
        name = find_decoder_layers(AutoModel.from_config(config)).name
    return _Source(config, layer_prefix(entries, name, text.num_hidden_layers), files, entries)


def prune_checkpoint(
    source: str | Path,
    out: str | Path,
    plan: PruningPlan,
    *,
    history: GradientHistory | None = None,
    keep: float = 0.2,
    weighting: str = "none",
    notes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Shorten a checkpoint on disk without loading the model: rename, rewrite receivers, copy the rest.

    Holds one module at a time (its weight, row blocks, and its gradient factors). The result appears under
    its name only when it is whole; a failure leaves nothing behind.

    Args:
        source: Folder with ``config.json`` and safetensors weights, one file or shards.
        out: New folder; must not exist.
        plan: Which layers go.
        history: Gradient factors of the donors, if the plan merges by sign.
        keep: Share of a donor's entries that may be merged.
        weighting: See `merging.merge_module`.
        notes: More to put into ``gradpruner.json``.

    Returns:
        Content of ``gradpruner.json``: plan, options, counts of each merged tensor, versions.

    Raises:
        FileExistsError: If ``out`` exists.
        FileNotFoundError: If weights are missing.
        ValueError: If weights are cut short, or do not belong to config, index or plan.
        TypeError: If weights to merge are quantised.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; name a new folder, nothing is overwritten.")
    checkpoint = _open_source(source)
    check_plan(plan, checkpoint.config.get_text_config().num_hidden_layers, has_history=history is not None)
    if plan.merged and orphans(plan):
        logger.warning(
            f"layers {orphans(plan)} have no kept layer before them and are dropped without merging."
        )
    merges = _planned_merges(checkpoint, plan, history)
    with _whole_or_nothing(out) as part:
        counts = _write_weights(checkpoint, plan, merges, history, part, keep=keep, weighting=weighting)
        # Merges of a short model's list must be planned on the long one, so the config changes last.
        shorten_config(checkpoint.config.get_text_config(), plan.dropped)
        checkpoint.config.save_pretrained(part)
        for path in sorted(source.iterdir()):
            if (
                path.suffix in COMPANIONS
                and path.name != "model.safetensors.index.json"
                and not (part / path.name).exists()
            ):
                shutil.copyfile(path, part / path.name)
        report = {
            "plan": plan.to_dict(),
            "keep": keep,
            "weighting": weighting,
            "merged_tensors": counts,
            "versions": _versions(),
            **(notes or {}),
        }
        write_json(part / REPORT_FILE, report)
    return report


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("mmhf-plugins", "torch", "transformers", "peft")}


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[Path]:
    part = out.with_name(out.name + ".part")
    # A rest of a killed run is of no use to anyone.
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


class _Merge(NamedTuple):
    """One tensor of a receiver that is rewritten."""

    donors: tuple[int, ...]
    receiver: int
    name: str


def _planned_merges(source: _Source, plan: PruningPlan, history: GradientHistory | None) -> dict[str, _Merge]:
    merges = {}
    for receiver, donors in plan.receivers.items():
        if plan.rule == "difference":
            start = f"{source.prefix}.{receiver}."
            names = [key.removeprefix(start) for key in source.entries if key.startswith(start)]
        else:
            assert history is not None, "check_plan lets no sign merge without a history pass"
            names = [f"{name}.weight" for name in history.modules(donors[0])]
        for name in names:
            merge = _Merge(donors, receiver, name)
            # Also finds missing and quantised tensors before anything is written.
            for layer in (receiver, *donors):
                FileMatrix(source.entries[source.key(layer, name)])
            merges[source.key(receiver, name)] = merge
    return merges


def _merged_tensor(
    source: _Source,
    plan: PruningPlan,
    merge: _Merge,
    history: GradientHistory | None,
    *,
    keep: float,
    weighting: str,
) -> tuple[Tensor, dict[str, int] | None]:
    receiver = FileMatrix(source.entries[source.key(merge.receiver, merge.name)])[:]
    donors = [FileMatrix(source.entries[source.key(donor, merge.name)]) for donor in merge.donors]
    if plan.rule == "difference":
        merge_difference(receiver, donors)
        return receiver, None
    assert history is not None, "check_plan lets no sign merge without a history pass"
    module = merge.name.removesuffix(".weight")
    sources = [
        Donor(weight, *history.factors(donor, module))
        for weight, donor in zip(donors, merge.donors, strict=True)
    ]
    own = history.factors(merge.receiver, module) if weighting == "importance" else None
    counts = merge_module(receiver, sources, keep=keep, weighting=weighting, receiver_factors=own)  # type: ignore[arg-type]
    return receiver, counts._asdict()


def _write_weights(
    source: _Source,
    plan: PruningPlan,
    merges: Mapping[str, _Merge],
    history: GradientHistory | None,
    out: Path,
    *,
    keep: float,
    weighting: str,
) -> dict[str, Any]:
    renamed = _new_names(source, plan)
    files = {
        file: kept for file, names in source.files.items() if (kept := [n for n in names if n in renamed])
    }
    counts: dict[str, Any] = {}
    weight_map = {}
    for number, names in enumerate(files.values(), start=1):
        target = (
            "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        )
        with (out / target).open("wb") as file:
            write_header(file, {renamed[name]: source.entries[name] for name in names})
            for name in names:
                weight_map[renamed[name]] = target
                if name not in merges:
                    for chunk in copy_chunks(source.entries[name]):
                        file.write(chunk)
                    continue
                tensor, count = _merged_tensor(
                    source, plan, merges[name], history, keep=keep, weighting=weighting
                )
                counts[renamed[name]] = count or {"num_entries": tensor.numel()}
                for chunk in tensor_chunks(tensor):
                    file.write(chunk)
    if len(files) > 1:
        size = sum(source.entries[name].num_bytes for name in renamed)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(out / "model.safetensors.index.json", index)
    return counts


def _new_names(source: _Source, plan: PruningPlan) -> dict[str, str]:
    position = {str(old): str(new) for new, old in enumerate(plan.kept)}
    names, start = {}, f"{source.prefix}."
    for name in source.entries:
        if not name.startswith(start):
            names[name] = name
            continue
        number, _, rest = name.removeprefix(start).partition(".")
        if number in position:
            names[name] = f"{start}{position[number]}.{rest}"
    return names
