"""The command line: end to end, resume, one line and exit code 2 for wrong use."""

import json
from pathlib import Path

import pytest
import yaml

from hf_plugins.dp_fedavg.__main__ import main
from tests.hf_plugins.dp_fedavg.tiny import DATA, RECIPE

pytestmark = pytest.mark.host


def recipe(folder: Path, **changes: object) -> Path:
    content = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    content |= {"num_rounds": 2, "data": str(DATA), "output_dir": str(folder / "out")}
    content["dp"] |= {"noise_multiplier": 4.0}
    content |= changes
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.real
def test_run_then_nothing_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = recipe(tmp_path)
    assert main(["run", str(path)]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["rounds"] == 2
    assert first["unit"] == "user"
    assert main(["run", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == first
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"checkpoint.pt", "metrics.jsonl", "model.safetensors", "report.json"}


@pytest.mark.real
def test_trackers_get_every_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainerCallback

    from hf_plugins.rounds import trackers

    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args: object, state: object, control: object, logs: dict, **kwargs: object) -> None:
            seen.append((state.global_step, set(logs)))

    monkeypatch.setattr(trackers, "get_reporting_integration_callbacks", lambda names: [Tracker])
    assert main(["run", str(recipe(tmp_path, report_to=["tensorboard"]))]) == 0
    assert [step for step, _ in seen] == [1, 2]
    assert {"dp_fedavg/epsilon", "test/accuracy"} <= seen[1][1]


def test_epsilon_without_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The account of a recipe is that of the run: 2 rounds, q = 0.5, sigma = 4."""
    from hf_plugins.accounting import epsilon

    assert main(["epsilon", str(recipe(tmp_path)), "--num-clients", "30"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = epsilon(noise_multiplier=4.0, num_steps=2, sample_rate=0.5, delta=30**-1.1)
    assert found["epsilon"] == pytest.approx(expected)
    assert found["users"] == 30


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_round": 3}, "did you mean 'num_rounds'"),
        ({"data": "/nowhere"}, "point data at the folder that does"),
        ({"dp": {"noise_multiplier": -1}}, "noise_multiplier must be a finite number"),
        ({"local": {"lr": 1}}, "is no option of local training"),
        ({"model": "vit"}, "model must be mlp or cnn"),
        ({"local": {"learning_rate": "1e-3"}}, "YAML reads 1e-3 as text"),
        ({"num_rounds": "many"}, "num_rounds takes int; got 'many'"),
        ({"dp": {"noise_multiplier": "1e-3"}}, "noise_multiplier takes float | None"),
        ({"num_clients": True}, "num_clients takes int"),
    ],
)
def test_wrong_recipes_end_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, changes: dict, words: str
) -> None:
    assert main(["run", str(recipe(tmp_path, **changes))]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", str(tmp_path / "no.yaml")]) == 2
    assert "configs/ holds some to start from" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- 1")
    assert main(["run", str(tmp_path / "list.yaml")]) == 2
    assert "must hold `option: value` lines" in capsys.readouterr().err


@pytest.mark.real
def test_changed_recipe_does_not_go_on_with_the_old_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["run", str(recipe(tmp_path))]) == 0
    content = yaml.safe_load(recipe(tmp_path).read_text())
    content["dp"]["clipping_norm"] = 0.7
    assert main(["run", str(recipe(tmp_path, dp=content["dp"]))]) == 2
    assert "give the new run a folder of its own" in capsys.readouterr().err


@pytest.mark.real
def test_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    path = recipe(tmp_path)
    content = yaml.safe_load(path.read_text())
    content["dp"] |= {"log_private_statistics": True, "keep_ratio": 0.5}
    assert main(["run", str(recipe(tmp_path, dp=content["dp"]))]) == 0
    capsys.readouterr()
    assert main(["picture", str(tmp_path / "out")]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert [Path(name).name for name in written] == ["rounds.png", "lus.png"]
    assert all(Path(name).read_bytes()[:4] == b"\x89PNG" for name in written)
    assert main(["picture", str(tmp_path)]) == 2
    assert "run `mmhf dp-fedavg run RECIPE` first" in capsys.readouterr().err
