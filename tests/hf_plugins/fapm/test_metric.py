"""The keep curve of a model: streamed sums, a live model walked through the grid, the picture."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_plugins.fapm import FAPMConfig, fapm_prune_checkpoint
from hf_plugins.fapm.metric import checkpoint_curve, log_probabilities, model_curve, plot_curve, text_quality
from tests.hf_plugins.fapm.tiny import read_model, weights, write_model

KEEPS = (0.0, 0.05, 0.1, 0.4, 1.0)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    before, after = weights()
    return write_model(tmp_path / "base", before), write_model(tmp_path / "ft", after)


class Toy(nn.Module):
    """A module with the names of a toy checkpoint."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        return self.tensors


def test_curve_of_a_folder_equals_single_runs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    config = FAPMConfig(chunk=50, resident_mib=0)
    for keep, row in zip(KEEPS, checkpoint_curve(*folders, KEEPS, config), strict=True):
        if keep:
            report = fapm_prune_checkpoint(*folders, tmp_path / f"out{keep}", FAPMConfig(keep=keep))
            assert row["effective_density"] == pytest.approx(report["totals"]["effective_density"])
        else:
            assert row == {"keep": 0, "effective_density": 0, "kept_energy": 0, "mean_relative_change": 0}


@pytest.mark.parametrize("method", ["fapm", "magnitude"])
def test_live_model_passes_through_every_keep(
    folders: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    config = FAPMConfig(method=method)
    model = Toy(read_model(folders[0]))
    seen = []

    def evaluate(live: nn.Module) -> dict[str, float]:
        seen.append({name: tensor.clone() for name, tensor in live.state_dict().items()})
        return {"step": float(len(seen))}

    rows = model_curve(model, *folders, KEEPS, evaluate, config)
    assert rows == [{"keep": keep, "step": index + 1.0} for index, keep in enumerate(KEEPS)]
    for keep, tensors in zip(KEEPS, seen, strict=True):
        out = tmp_path / f"out{keep}"
        fapm_prune_checkpoint(*folders, out, FAPMConfig(method=method, keep=keep))
        assert all(torch.equal(tensors[name], tensor) for name, tensor in read_model(out).items())


def test_wrong_use(folders: tuple[Path, Path]) -> None:
    for options in ({"method": "ties"}, {"method": "dare"}, {"method": "wise_ft"}, {"scope": "global"}):
        with pytest.raises(ValueError, match="Use fapm, magnitude or relative"):
            checkpoint_curve(*folders, KEEPS, FAPMConfig(**options))
    with pytest.raises(ValueError, match="different shares in ascending order"):
        checkpoint_curve(*folders, (0.2, 0.1))
    with pytest.raises(ValueError, match="the live model lacks .* load the model from that folder"):
        model_curve(Toy({}), *folders, KEEPS, lambda model: {})


class Bigram(nn.Module):
    """Logits that depend on the last token alone."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, input_ids: Tensor) -> object:
        return type("Output", (), {"logits": self.table[input_ids]})


def test_text_figures_by_hand() -> None:
    """A model that gives the next token 1/2, 1/4 and 1/4 of the mass: perplexity (2 * 4 * 4)^(1/3); the KL
    between (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4) is 1/2 ln 2 - 1/4 ln 2 = ln 2 / 4.
    """
    table = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]).log()
    model, rows = Bigram(table), torch.tensor([[0, 0, 1, 0]])
    with torch.no_grad():
        found = text_quality(model, rows)
        assert found["ppl"] == pytest.approx((2 * 4 * 4) ** (1 / 3))
        assert found["acc"] == pytest.approx(1 / 3)
        reference = log_probabilities(model, rows[:, :2])
        other = Bigram(table[[1, 0, 2]])
        kl = text_quality(other, rows[:, :2], reference=reference)["kl"]
    assert kl == pytest.approx(torch.log(torch.tensor(2.0)).item() / 4)


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"keep": 0.1, "effective_density": 0.1, "kept_energy": 0.2}]
    plot_curve(rows, tmp_path / "a" / "sums.svg")
    plot_curve([rows[0] | {"general_ppl": 3.0, "downstream_ppl": 5.0}], tmp_path / "text.svg")
    assert "perplexity of general text" not in (tmp_path / "a" / "sums.svg").read_text()
    assert (tmp_path / "text.svg").stat().st_size > 1000
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="a plot needs matplotlib"):
        plot_curve(rows, tmp_path / "c.svg")
