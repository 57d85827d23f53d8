"""LoRA adapters as task vectors: ``dW = s * B @ A`` from the factors in fp32, never from a bf16 merge."""

import json
import logging
import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_plugins.fapm.storage import ADAPTER, DTYPES, Checkpoint, Entry

logger = logging.getLogger(__name__)
PREFIX = "base_model.model."
# Rows of a product are computed in fixed blocks, so that no chunk size changes a rounding.
BLOCK = 1 << 18
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?(A|B|magnitude_vector)(?:\.weight)?$")


class LoraFactors(NamedTuple):
    """``W' = W + scale * left @ right``, rows and columns as W is stored."""

    left: Tensor
    """(rows, r), fp32."""
    right: Tensor
    """(r, columns), fp32."""
    scale: float
    magnitude: Tensor | None = None
    """DoRA: length of each row of W', (rows,)."""


class Adapter(NamedTuple):
    """What an adapter changes."""

    factors: dict[str, LoraFactors]
    """Name of a base tensor -> its factors."""
    full: dict[str, Tensor]
    """Name -> tensor that was trained as a whole (modules_to_save, biases)."""
    base_name: str
    """base_model_name_or_path."""


class LoraPair:
    """A tensor of the base checkpoint and its LoRA product as a `score.Pair`; W' is computed in fp32."""

    def __init__(
        self, base: Checkpoint, entry: Entry, factors: LoraFactors, *, chunk: int, resident: int
    ) -> None:
        self.numel = entry.numel
        self._base, self._entry, self._factors = base, entry, factors
        self._columns = factors.right.shape[1]
        self._step = max(1, BLOCK // self._columns)
        self._whole = self.numel * (entry.itemsize + 4) <= resident
        size = self.numel if self._whole else min(chunk, self.numel)
        self._w, self._ft = torch.empty(size, dtype=DTYPES[entry.dtype]), torch.empty(size)
        self._block, self._block_at = torch.empty(0), -1
        if self._whole:
            self._fill(0, self.numel)

    def _block_of(self, index: int) -> Tensor:
        """Fine-tuned rows of one fixed block, flat."""
        if index != self._block_at:
            first = index * self._step
            last = min(first + self._step, self.numel // self._columns)
            shape = (last - first, self._columns)
            w = torch.empty(shape[0] * shape[1], dtype=DTYPES[self._entry.dtype])
            w = self._base.read_into(self._entry, first * self._columns, w).view(shape).float()
            f = self._factors
            tuned = w.addmm_(f.left[first:last], f.right, alpha=f.scale)
            if f.magnitude is not None:
                tuned *= (f.magnitude[first:last] / torch.linalg.vector_norm(tuned, dim=1))[:, None]
            self._block, self._block_at = tuned.flatten(), index
        return self._block

    def _fill(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        w, ft = self._w[: stop - start], self._ft[: stop - start]
        self._base.read_into(self._entry, start, w)
        size, place = self._step * self._columns, start
        while place < stop:
            block = self._block_of(place // size)
            end = min(stop, (place // size + 1) * size)
            ft[place - start : end - start] = block[place % size : place % size + end - place]
            place = end
        return w, ft

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Entries [start, stop) of W as stored and of W' in fp32; the next call may overwrite them."""
        if self._whole:
            return self._w[start:stop], self._ft[start:stop]
        return self._fill(start, stop)


def _pattern_value(pattern: Mapping[str, Any], module: str, default: float) -> float:
    """PEFT's rule for rank_pattern and alpha_pattern: a key fits the end of the module's name."""
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def read_adapter(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Adapter:
    """Factors and whole tensors of a saved LoRA adapter.

    Args:
        state: Its tensors, with PEFT's names.
        config: Its adapter_config.json.

    Returns:
        The adapter, by names of base tensors.

    Raises:
        ValueError: If it is no additive LoRA adapter on matrices.
    """
    kind = str(config.get("peft_type", "")).rsplit(".", 1)[-1]
    if kind != "LORA" or config.get("lora_bias"):
        raise ValueError(
            f"adapter of type {kind}{' with lora_bias' if kind == 'LORA' else ''}: only plain LoRA, rsLoRA "
            "and DoRA are read from factors. Merge it in fp32 (merge_and_unload) and give the merged folder."
        )
    parts: dict[tuple[str, bool], dict[str, Tensor]] = {}
    full: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        if found := _FACTOR.match(name):
            parts.setdefault((found[1], bool(found[2])), {})[found[3]] = tensor.detach().float().cpu()
        else:
            full[name] = tensor.detach().cpu()
    factors = {
        f"{module}.weight": _factors(module, embedding, part, config)
        for (module, embedding), part in parts.items()
    }
    return Adapter(factors, full, str(config.get("base_model_name_or_path") or ""))


def _factors(
    module: str, embedding: bool, part: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LoraFactors:
    if not {"A", "B"} <= set(part):
        raise ValueError(f"{module}: the adapter holds only one of lora_A and lora_B; save it again.")
    a, b = part["A"], part["B"]
    if a.dim() != 2:
        raise ValueError(
            f"{module}: LoRA on a convolution is not read from factors. Merge it in fp32 "
            "(merge_and_unload) and give the merged folder."
        )
    alpha = _pattern_value(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scale = alpha / a.shape[0] ** (0.5 if config.get("use_rslora") else 1.0)
    magnitude = part.get("magnitude_vector")
    if not (embedding or config.get("fan_in_fan_out")):
        return LoraFactors(b, a, scale, magnitude)
    if magnitude is not None:
        raise ValueError(
            f"{module}: DoRA on a transposed weight is not read from factors. Merge it in fp32 "
            "(merge_and_unload) and give the merged folder."
        )
    # Stored with inputs as rows (Conv1D, Embedding): the product is transposed.
    return LoraFactors(a.T.contiguous(), b.T.contiguous(), scale)


def adapter_from_folder(folder: Path) -> Adapter:
    """An adapter that ``save_pretrained`` of PEFT wrote."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with Checkpoint(folder) as stored:
        state = {name: stored.tensor(name).clone() for name in stored.entries}
    return read_adapter(state, config)


def adapter_from_model(model: Any) -> Adapter:
    """The one active adapter of a live PEFT model.

    Raises:
        ValueError: If several adapters are active, or one is merged into the weights.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"one active adapter is needed; got {active}. Choose one with set_adapter(NAME).")
    if any(module.merged for module in model.modules() if isinstance(module, LoraLayer)):
        raise ValueError(
            "the adapter is merged into the weights, its factors are spent. Call unmerge_adapter() first."
        )
    state = get_peft_model_state_dict(model, adapter_name=active[0], save_embedding_layers=False)
    return read_adapter(state, model.peft_config[active[0]].to_dict())


def check_fits(adapter: Adapter, base: Checkpoint) -> None:
    """Refuse an adapter whose tensors are not those of the base; warn when it names another base.

    Raises:
        ValueError: If a tensor is missing in the base, or has another shape there.
    """
    for name in (*adapter.factors, *adapter.full):
        if name not in base.entries:
            near = get_close_matches(name, base.entries, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"the adapter changes {name}, which {base.folder} does not hold.{hint} "
                "Give the base model that the adapter was trained on."
            )
    for name, factors in adapter.factors.items():
        shape = (factors.left.shape[0], factors.right.shape[1])
        if shape != base.entries[name].shape:
            raise ValueError(
                f"{name} has shape {base.entries[name].shape} in the base, the adapter's product {shape}. "
                "Give the base model that the adapter was trained on."
            )
    if adapter.base_name and Path(adapter.base_name).name != base.folder.resolve().name:
        logger.warning(
            "the adapter was trained on %r; the base given is %s. Make sure that they are one model.",
            adapter.base_name,
            base.folder,
        )


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no full model."""
    return (folder / "adapter_config.json").is_file() and (folder / ADAPTER).is_file()
