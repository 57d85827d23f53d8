"""The keep curve of a model: what each keep of a grid holds of the task vector, and, with text at hand, what
it forgets and what it has learnt. One ranking serves all keeps, since their masks are nested.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_plugins.fapm.config import FAPMConfig
from hf_plugins.fapm.keep_curve import CurveSums, check_keeps, keep_curve, level_chunks
from hf_plugins.fapm.model import CheckpointPairs
from hf_plugins.fapm.score import Scorer, mean_magnitude

Row = dict[str, float]


def checkpoint_curve(
    base: str | Path, finetuned: Any, keeps: Sequence[float], config: FAPMConfig | None = None
) -> list[Row]:
    """Effective density, kept energy and mean relative change for a grid of keeps; no model is loaded.

    Args:
        base: Folder of the pre-trained model.
        finetuned: Folder of the fine-tuned model or of a LoRA adapter, or a live PEFT model.
        keeps: Shares in ascending order.
        config: Options; ``keep`` and ``per_tensor`` play no part.

    Returns:
        One row a keep.

    Raises:
        ValueError: If the grid or the inputs are wrong, or the method has no masks that nest.
    """
    config = config or FAPMConfig()
    _check(keeps, config)
    dtype = getattr(torch, config.out_dtype) if config.out_dtype else None
    total: CurveSums | None = None
    with CheckpointPairs(base, finetuned, config) as pairs:
        for name in pairs.names:
            sums = keep_curve(pairs.open(name), keeps, rule=pairs.rule, dtype=dtype, chunk=config.chunk)
            total = sums if total is None else total.add(sums)
    return total.rows() if total else []


def _check(keeps: Sequence[float], config: FAPMConfig) -> None:
    check_keeps(keeps)
    if config.is_global or config.method in ("dare", "wise_ft"):
        raise ValueError(
            f"a keep curve needs per-tensor masks that nest; method {config.method!r} with scope "
            f"{config.scope!r} has none. Use fapm, magnitude or relative."
        )


@torch.no_grad()
def model_curve(
    model: torch.nn.Module,
    base: str | Path,
    finetuned: Any,
    keeps: Sequence[float],
    evaluate: Callable[[torch.nn.Module], Mapping[str, float]],
    config: FAPMConfig | None = None,
) -> list[Row]:
    """Evaluate a live model at every keep of a grid; its weights walk from the base to the fine-tuned ones.

    Args:
        model: Holds the weights of ``base``, with the names of its checkpoint; ends with those of the largest
            keep.
        base: Folder of the pre-trained model.
        finetuned: Folder of the fine-tuned model or of a LoRA adapter, or a live PEFT model.
        keeps: Shares in ascending order.
        evaluate: Called with the model at each keep.
        config: Options; ``keep`` and ``per_tensor`` play no part.

    Returns:
        One row a keep: ``keep`` and what ``evaluate`` gave.

    Raises:
        ValueError: If the grid is wrong, or the model lacks a tensor of the checkpoint.
    """
    config = config or FAPMConfig()
    _check(keeps, config)
    weights = model.state_dict()
    with CheckpointPairs(base, finetuned, config) as pairs:
        if missing := [name for name in pairs.names if name not in weights]:
            raise ValueError(
                f"the live model lacks {missing[0]}, which {base} holds; load the model from that folder."
            )
        levels = {name: _levels(pairs, name, keeps, config) for name in pairs.names}
        rows = []
        for index, keep in enumerate(keeps):
            for name in pairs.names:
                _move(weights[name], pairs, name, levels[name] == index)
            rows.append({"keep": keep, **evaluate(model)})
    return rows


def _levels(pairs: "CheckpointPairs", name: str, keeps: Sequence[float], config: FAPMConfig) -> Tensor:
    pair = pairs.open(name)
    scorer = Scorer(pair, pairs.rule, mu=mean_magnitude(pair, chunk=config.chunk)[0], chunk=config.chunk)
    return torch.cat([torch.from_numpy(level) for _, level in level_chunks(scorer, keeps)])


def _move(weight: Tensor, pairs: "CheckpointPairs", name: str, newly: Tensor) -> None:
    """Give the newly kept entries their fine-tuned value, in place."""
    pair, flat = pairs.open(name), weight.view(-1)
    for start in range(0, pair.numel, pairs.chunk):
        stop = min(start + pairs.chunk, pair.numel)
        place = torch.nonzero(newly[start:stop]).flatten()
        flat[place.to(weight.device) + start] = pair.read(start, stop)[1][place].to(weight)


def text_quality(model: torch.nn.Module, rows: Tensor, *, reference: Tensor | None = None) -> Row:
    """Perplexity and next-token accuracy on rows of token ids, and the KL divergence from another model.

    Args:
        model: A causal model.
        rows: Token ids (rows, length).
        reference: Log-probabilities (rows, length - 1, vocabulary) of another model; None leaves the KL out.

    Returns:
        ``ppl``, ``acc`` and, with a reference, ``kl`` in nats a token.
    """
    loss, right, divergence = 0.0, 0, 0.0
    for index, ids in enumerate(rows.to(next(model.parameters()).device)):
        log_p = torch.log_softmax(model(input_ids=ids[None]).logits[0, :-1].float(), -1)
        loss -= float(log_p.gather(1, ids[1:, None]).sum())
        right += int((log_p.argmax(-1) == ids[1:]).sum())
        if reference is not None:
            q = reference[index].to(log_p.device)
            divergence += float((q.exp() * (q - log_p)).sum())
    count = rows.shape[0] * (rows.shape[1] - 1)
    found = {"ppl": math.exp(loss / count), "acc": right / count}
    return found if reference is None else {**found, "kl": divergence / count}


def log_probabilities(model: torch.nn.Module, rows: Tensor) -> Tensor:
    """What a model says of every next token, (rows, length - 1, vocabulary), fp32 on the CPU."""
    device = next(model.parameters()).device
    logits = [model(input_ids=ids[None].to(device)).logits[0, :-1].float().cpu() for ids in rows]
    return torch.log_softmax(torch.stack(logits), -1)


def plot_curve(rows: Sequence[Row], path: Path) -> None:
    """Draw a curve: forgetting against downstream where texts were given, else density and energy over keep.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            'a plot needs matplotlib: pip install "mmhf-plugins[report]", or leave --plot out'
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.4))
    if "general_ppl" in rows[0] and "downstream_ppl" in rows[0]:
        x, y = ([row[key] for row in rows] for key in ("general_ppl", "downstream_ppl"))
        axes.plot(x, y, marker="o", color="#0072b2")
        for row in rows:
            axes.annotate(f"{row['keep']:g}", (row["general_ppl"], row["downstream_ppl"]), fontsize=8)
        axes.set_xlabel("perplexity of general text (forgetting)")
        axes.set_ylabel("perplexity of downstream text")
        axes.set_title("Down and left is better; labels are keeps")
    else:
        for key, colour in (("kept_energy", "#0072b2"), ("effective_density", "#d55e00")):
            axes.plot(
                [row["keep"] for row in rows], [row[key] for row in rows], "o-", color=colour, label=key
            )
        axes.set_xlabel("keep")
        axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)
