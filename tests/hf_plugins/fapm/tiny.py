"""Small checkpoints for these tests: written to disk by safetensors itself, moved a little from a base."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_plugins.fapm.score import TensorPair


def moved(
    n: int, *, seed: int = 0, scale: float = 1e-2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Gaussian weights and the same after a small update; ``scale`` is the ratio of the two deviations."""
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(n, generator=generator) * 0.02).to(dtype)
    return w, (w.float() + torch.randn(n, generator=generator) * 0.02 * scale).to(dtype)


def pair(w: Tensor, ft: Tensor) -> TensorPair:
    """Both as the cores read them."""
    return TensorPair(w, ft)


def write_model(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, **config: object) -> Path:
    """A folder as save_pretrained writes it: one file, or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    names = list(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = names[index::shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return folder


def read_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


SHAPES = {
    "embed_tokens.weight": (40, 16),
    "layers.0.mlp.weight": (24, 16),
    "norm.weight": (16,),
    "bias": (7,),
}


def weights(*, seed: int = 0, scale: float = 1e-2, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """Tensors of a toy model before and after fine-tuning."""
    before, after = {}, {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        w, ft = moved(int(torch.Size(shape).numel()), seed=seed + index, scale=scale, dtype=dtype)
        before[name], after[name] = w.view(shape), ft.view(shape)
    return before, after
