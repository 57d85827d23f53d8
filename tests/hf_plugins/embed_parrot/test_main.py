"""The command line through ``main([...])`` and ``mmhf leak-scan``."""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from hf_plugins import cli
from hf_plugins.embed_parrot.__main__ import _config, load_model, main, split_list
from hf_plugins.embed_parrot.config import ATTACKS, LeakScanConfig
from hf_plugins.embed_parrot.model import EmbedParrot
from tests.hf_plugins.embed_parrot.tiny import TEXTS, bert, llama, tokenizer

pytestmark = pytest.mark.host
RECIPES = Path(__file__).resolve().parents[3] / "configs" / "embed_parrot"
OPTIONS = [option.name for option in dataclasses.fields(LeakScanConfig)]
SMALL = (
    "--layers 0,3 --attacks hei,ridge --num-test 5 --num-fit 40 --num-calibrate 4 --max-length 12 "
    "--bootstrap 10"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def _run(folder: Path, out: Path, *words: str) -> int:
    return main([str(folder), "--data", f"mail={TEXTS}/en.jsonl", "--out", str(out), *SMALL.split(), *words])


def test_scan_writes_both_reports(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _run(folder, tmp_path, "--defences", "none,dct:window=4,key=2") == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {row["set"] for row in report["cells"]} == {"mail"}
    assert report["config"]["defences"] == ["none", "dct:window=4,key=2"]
    assert "<!doctype html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "100.0 % of tokens read back at worst" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part"))


def test_exit_code_above_the_limit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert _run(folder, tmp_path, "--fail-above", "0.5") == 1
    assert "above --fail-above 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_options(recipe: Path) -> None:
    args = argparse.Namespace(config=recipe, **dict.fromkeys(OPTIONS))
    config = _config(args)
    assert isinstance(config.attacks, tuple)
    assert config.seeds == (0, 1, 2)
    args.attacks, args.num_fit = "all", 7
    changed = _config(args)
    assert (changed.attacks, changed.num_fit, changed.defences) == (ATTACKS, 7, config.defences)


def test_recipe_and_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "r.yaml").write_text("defences: [int8]\nfail_above: 0.5\nlayers: [1]\n", encoding="utf-8")
    assert _run(folder, tmp_path, "--config", str(tmp_path / "r.yaml")) == 1
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["config"]["layers"] == [0, 3]
    assert {row["defence"] for row in report["cells"]} == {"int8"}
    (tmp_path / "r.yaml").write_text("defence: int8\n", encoding="utf-8")
    assert _run(folder, tmp_path, "--config", str(tmp_path / "r.yaml")) == 2
    assert re.search(r": no option .*defence; there are .*layers, attacks", capsys.readouterr().err)


def test_reached_by_its_alias(folder: Path, tmp_path: Path) -> None:
    words = [
        str(folder),
        "--data",
        f"{TEXTS}/zh.jsonl:text",
        "--fit",
        f"{TEXTS}/en.jsonl",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["leak-scan", *words, *SMALL.split()]) == 0
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert {row["set"] for row in report["cells"]} == {"zh"}


def test_export_scan_and_train_without_the_model(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    states = tmp_path / "x.safetensors"
    words = ["export", str(folder), "--data", f"{TEXTS}/en.jsonl", "--layers", "0,2", "--max-length", "12"]
    assert main([*words, "--out", str(states), "--num-texts", "60"]) == 0
    options = "--layers 0,2 --attacks hei,ridge --num-test 5 --num-fit 40 --bootstrap 10".split()
    assert main([str(states), "--tokenizer", str(folder), "--out", str(tmp_path / "scan"), *options]) == 0
    small = "--steps 2 --width 64 --num-layers 1 --cpu --loss cosine_ce --no-causal".split()
    assert main(["train", str(states), "--layer", "2", "--out", str(tmp_path / "parrot"), *small]) == 0
    parrot = EmbedParrot.from_pretrained(tmp_path / "parrot" / "final")
    assert (parrot.config.layer, parrot.config.causal, parrot.config.loss) == (2, False, "cosine_ce")
    assert main(["train", str(states), "--layer", "1", "--out", str(tmp_path / "parrot")]) == 2
    assert re.search(r"holds layers .*0, 2; got --layer .*1", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["nowhere", "--data", f"{TEXTS}/en.jsonl"],
            "no model folder .*nowhere.*; save the model there first",
        ),
        ([".", "--data", "nothing.txt"], "error:"),
        (
            ["package:no_such_package/x", "--data", f"{TEXTS}/en.jsonl"],
            "no installed package .*no_such_package",
        ),
        (
            ["x", "--data", "y", "--layers", "first"],
            "layers.* takes whole numbers such as 0,3,6; got .*first",
        ),
        (["x", "--data", "y", "--attacks", "magic"], "attacks must be some of"),
    ],
)
def test_wrong_use_is_said(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*words, "--out", str(tmp_path)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_lists_keep_the_options_of_a_defence_together() -> None:
    assert split_list("none,dct:window=8,key=3,int8") == ["none", "dct:window=8,key=3", "int8"]
    assert split_list("") == []


def test_kinds_of_models(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    llama().save_pretrained(tmp_path / "causal")
    bert().save_pretrained(tmp_path / "encoder")
    wrapped = get_peft_model(load_model(str(tmp_path / "causal")), LoraConfig(target_modules=["q_proj"]))
    wrapped.save_pretrained(tmp_path / "adapter")
    assert load_model(str(tmp_path / "causal")).get_output_embeddings() is not None
    assert type(load_model(str(tmp_path / "encoder"))).__name__ == "BertModel"
    adapted = load_model(str(tmp_path / "adapter"))
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    assert torch.equal(adapted.get_input_embeddings().weight, llama().get_input_embeddings().weight)
