"""Losses by record, accuracy, plots."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_plugins.dp_fedavg.metric import TestAccuracy, accuracy, plot_kept, plot_rounds, record_loss
from hf_plugins.rounds import TrainableVector


def test_loss_of_each_record() -> None:
    """Uniform logits over 4 classes: log 4; for sequences the mean over positions."""
    flat = record_loss(lambda x: torch.zeros(3, 4), (torch.zeros(3), torch.tensor([0, 1, 2])))
    torch.testing.assert_close(flat, torch.full((3,), 4.0).log())
    logits = torch.zeros(2, 5, 4)
    logits[0, :, 1] = 50.0
    wave = record_loss(lambda x: logits, (torch.zeros(2, 5), torch.ones(2, 5, dtype=torch.long)))
    torch.testing.assert_close(wave, torch.tensor([0.0, torch.tensor(4.0).log()]))


def test_accuracy_over_batches() -> None:
    net = nn.Linear(1, 2, bias=False)
    records = (torch.tensor([[1.0], [-1.0], [1.0]]), torch.tensor([1, 1, 1]))
    weights = TrainableVector(net)
    found = TestAccuracy(weights, records, batch_size=2)(torch.tensor([0.0, 1.0]))
    assert found["test/accuracy"] == pytest.approx(2 / 3)
    expected = (
        2 * torch.nn.functional.softplus(torch.tensor(-1.0)) + torch.nn.functional.softplus(torch.tensor(1.0))
    ) / 3
    assert found["test/loss"] == pytest.approx(float(expected), rel=1e-5)
    assert accuracy(net, records)["test/accuracy"] == pytest.approx(2 / 3)


def rows(level: float) -> list[dict]:
    return [
        {
            "round": r,
            "test/accuracy": level,
            "dp_fedavg/epsilon": r * 0.1,
            "dp_fedavg/clipping_norm": 0.5,
            "dp_fedavg/private/norm_median": 1.0,
            "dp_fedavg/private/clipped_ratio": 0.5,
        }
        for r in (1, 2)
    ]


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_rounds({"a": [rows(0.5), rows(0.6)], "b": [rows(0.7)]}, tmp_path / "out" / "p.png", title="t")
    assert (tmp_path / "out" / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.png"]


def test_plot_of_what_lus_keeps(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    history = [{"round": r, "clients/lus_kept/a": 0.5, "clients/lus_kept/b": 0.1 * r} for r in (1, 2)]
    plot_kept([{"round": 0}, *history], tmp_path / "lus.png", title="t")
    assert (tmp_path / "lus.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="needs keep_ratio < 1 and log_private_statistics: true"):
        plot_kept(rows(0.5), tmp_path / "no.png")


def test_plot_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plots need matplotlib"):
        plot_rounds({}, tmp_path / "p.png")
