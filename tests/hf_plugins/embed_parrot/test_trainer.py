"""Training a parrot by the stock Trainer: it learns, resumes exactly, and two processes equal one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hf_plugins.embed_parrot.hook import collect_states, embedding_table
from hf_plugins.embed_parrot.inversion import HotmapEmbedInversion, RidgeInversion
from hf_plugins.embed_parrot.model import EmbedParrot, EmbedParrotConfig, small_decoder
from hf_plugins.embed_parrot.storage import export_states
from hf_plugins.embed_parrot.trainer import parrot_trainer, standardise_input, train_parrot
from tests.hf_plugins.embed_parrot.tiny import llama

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.host


def _data(
    num_texts: int, seed: int = 0, **options: Any
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """Codebook, states after the last layer and tokens of random texts."""
    model = llama(**options)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, model.config.vocab_size, (12,), generator=generator) for _ in range(num_texts)]
    return embedding_table(model), collect_states(model, ids, [3])[3], ids


def _config(**options: Any) -> EmbedParrotConfig:
    return EmbedParrotConfig(
        **({"target_hidden_size": 32, "decoder": small_decoder(1, 64, num_positions=12)} | options)
    )


def _accuracy(attack: Any, states: list[torch.Tensor], ids: list[torch.Tensor]) -> float:
    hits = [attack.top(x).ids_TK[:, 0] == y for x, y in zip(states, ids, strict=True)]
    return float(torch.cat(hits).double().mean())


@pytest.fixture(scope="module")
def mixed() -> dict[str, Any]:
    """States of a model whose weights mix strongly (spread .12), which leaves HEI little."""
    table, states, ids = _data(300, vocab_size=64, initializer_range=0.12)
    ridge = RidgeInversion(table).update(torch.cat(states[:260]), torch.cat(ids[:260]))
    ridge.solve(penalties=(1e-6,))
    test = {"states": states[260:], "ids": ids[260:]}
    return {"table": table, "states": states[:260], "ids": ids[:260], "test": test, "ridge": ridge}


def _train(mixed: dict[str, Any], folder: Path, steps: int = 250, **options: Any) -> EmbedParrot:
    return train_parrot(
        _config(**options),
        mixed["states"],
        mixed["ids"],
        mixed["table"],
        folder=folder,
        ridge=mixed["ridge"],
        num_steps=steps,
        learning_rate=3e-3,
        use_cpu=True,
    )


def test_a_parrot_keeps_up_with_ridge_and_leaves_hei_behind(mixed: dict[str, Any], tmp_path: Path) -> None:
    """The bound of .05 below ridge was set when this was built: .53 against ridge .32 and HEI .07 here."""
    parrot = _train(mixed, tmp_path / "a", loss="cosine_ce", causal=False)
    found = _accuracy(parrot, **mixed["test"])
    ridge = _accuracy(mixed["ridge"], **mixed["test"])
    assert found >= ridge - 0.05
    assert found > _accuracy(HotmapEmbedInversion(mixed["table"]), **mixed["test"]) + 0.2


def test_with_the_skip_it_starts_at_ridge(mixed: dict[str, Any], tmp_path: Path) -> None:
    parrot = _train(mixed, tmp_path / "b", steps=60, linear_skip=True)
    assert _accuracy(parrot, **mixed["test"]) >= _accuracy(mixed["ridge"], **mixed["test"]) - 0.02


def test_finished_parrots_are_not_trained_again(mixed: dict[str, Any], tmp_path: Path) -> None:
    first = _train(mixed, tmp_path / "c", steps=3)
    stamp = (tmp_path / "c" / "final" / "model.safetensors").stat().st_mtime_ns
    again = _train(mixed, tmp_path / "c", steps=3)
    assert (tmp_path / "c" / "final" / "model.safetensors").stat().st_mtime_ns == stamp
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["final"]


def test_resumed_equals_uninterrupted(mixed: dict[str, Any], tmp_path: Path) -> None:
    """Same loss at every later step and the same weights, bit for bit."""

    def trainer(folder: Path) -> Any:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        return parrot_trainer(
            EmbedParrot(_config()), mixed["states"], mixed["ids"], mixed["table"], arguments
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    losses = [
        [row["loss"] for row in run.state.log_history if "loss" in row and row["step"] > 3]
        for run in (whole, resumed)
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    loaded = EmbedParrot.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    pairs = zip(whole.model.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_two_processes_equal_one(mixed: dict[str, Any], tmp_path: Path) -> None:
    """Two processes with 4 texts each take the steps that one with 8 takes; all texts are of one length, so
    that means of means are means.
    """
    export_states(
        tmp_path / "x.safetensors",
        codebook=mixed["table"],
        ids=mixed["ids"],
        states={3: mixed["states"]},
        dtype=torch.float32,
    )
    found = []
    for number, batch in ((1, 8), (2, 4)):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(number),
            "--master_port",
            "0",
        ]
        words = (
            f"-m hf_plugins.embed_parrot train {tmp_path}/x.safetensors --layer 3 --out {tmp_path}/{number} "
        )
        words += f"--steps 3 --batch-size {batch} --width 64 --num-layers 1 --cpu"
        launch[5:7] = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        done = subprocess.run(
            [*launch, *words.split()],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(EmbedParrot.from_pretrained(tmp_path / str(number) / "final"))
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        # Adam's first steps divide a gradient by its own size: differences of 1e-5 in gradients stay below
        # 1e-4 times the learning rate here.
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_input_adapter_starts_standardised(mixed: dict[str, Any]) -> None:
    """After folding, what enters the decode model has mean 0 and spread near 1 on each channel."""
    states = [1000 * x + 50 for x in mixed["states"]]
    torch.manual_seed(0)
    parrot = EmbedParrot(_config())
    standardise_input(parrot, states)
    entered = parrot.adapter_in(torch.cat(states)).detach()
    assert entered.mean(0).abs().max() < 0.01
    assert 0.3 < float(entered.std(0).mean()) < 3
