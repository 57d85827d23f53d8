"""The command: equal to the Python call, recipes, sidecars, curves, exit codes."""

import json
from pathlib import Path

import pytest
import torch

from hf_plugins.fapm import FAPMConfig, fapm_prune_checkpoint
from hf_plugins.fapm.__main__ import main
from tests.hf_plugins.fapm.tiny import weights, write_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    before, after = weights()
    write_model(tmp_path / "base", before)
    write_model(tmp_path / "ft", after)
    return [str(tmp_path / name) for name in ("base", "ft", "out")]


def test_command_equals_the_call(folders: list[str], capsys: pytest.CaptureFixture) -> None:
    options = ["--keep", "0.3", "--per-tensor", "mlp=0.5", "--exclude", "norm", "--no-sync", "--chunk", "64"]
    assert main([*folders, *options]) == 0
    config = FAPMConfig(keep=0.3, per_tensor={"mlp": 0.5}, exclude="norm", sync=False, chunk=64)
    report = fapm_prune_checkpoint(folders[0], folders[1], folders[2] + "2", config)
    out = Path(folders[2])
    assert (out / "model.safetensors").read_bytes() == Path(
        folders[2] + "2", "model.safetensors"
    ).read_bytes()
    assert json.loads((out / "fapm.json").read_text())["config"] == report["config"]
    assert f"{report['totals']['kept']:,} of 1,031 entries kept" in capsys.readouterr().out


def test_recipe_and_what_overrides_it(folders: list[str], tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base: {folders[0]}\nfinetuned: {folders[1]}\nkeep: 0.3\nper_tensor:\n  mlp: 0.5\n")
    assert main(["prune", "--config", str(recipe), "--keep", "0.4"]) == 2
    recipe.write_text(recipe.read_text() + f"out: {folders[2]}\n")
    assert main(["prune", "--config", str(recipe), "--keep", "0.4"]) == 0
    config = json.loads(Path(folders[2], "fapm.json").read_text())["config"]
    assert (config["keep"], config["per_tensor"]) == (0.4, {"mlp": 0.5})


def test_shipped_recipes_name_real_options() -> None:
    yaml = pytest.importorskip("yaml")
    recipes = sorted((ROOT / "configs" / "fapm").glob("*.yaml"))
    assert recipes
    for path in recipes:
        values = yaml.safe_load(path.read_text())
        options = {name: value for name, value in values.items() if name not in ("base", "finetuned", "out")}
        FAPMConfig(**options)


def test_sidecar_commands(folders: list[str], tmp_path: Path) -> None:
    base, ft, out = folders
    assert main([base, ft, out, "--sidecar"]) == 0
    assert main(["add", base, out, str(tmp_path / "added")]) == 0
    assert main(["remove", str(tmp_path / "added"), out, str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == Path(
        base, "model.safetensors"
    ).read_bytes()


def test_curve(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figures = tmp_path / "curve.json"
    assert main(["curve", *folders[:2], "--keeps", "0.1", "0.5", "--json", str(figures)]) == 0
    rows = json.loads(figures.read_text())
    assert [row["keep"] for row in rows] == [0.1, 0.5]
    assert json.loads(capsys.readouterr().out) == rows


@pytest.mark.host
def test_curve_over_texts(tmp_path: Path) -> None:
    """At keep 0 the KL to the base is 0; at keep 1 the downstream figure is that of the fine-tuned model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {word: index for index, word in enumerate("[UNK] the a cat dog sat ran on in mat".split())}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, **size))
    for name, step in (("base", 0.0), ("ft", 2e-2)):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight), alpha=step)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "general.txt").write_text("the cat sat on the mat " * 20)
    (tmp_path / "task.txt").write_text("a dog ran in the mat " * 20)
    arguments = ["curve", str(tmp_path / "base"), str(tmp_path / "ft"), "--keeps", "0", "0.3", "1"]
    arguments += ["--general", str(tmp_path / "general.txt"), "--downstream", str(tmp_path / "task.txt")]
    arguments += [
        "--length",
        "16",
        "--json",
        str(tmp_path / "curve.json"),
        "--plot",
        str(tmp_path / "curve.svg"),
    ]
    assert main(arguments) == 0
    first, middle, last = json.loads((tmp_path / "curve.json").read_text())
    assert first["general_kl"] == pytest.approx(0, abs=1e-6)
    assert 0 < middle["general_kl"] < last["general_kl"]
    with torch.no_grad():
        ids = torch.tensor(tokenizer((tmp_path / "task.txt").read_text())["input_ids"])
        rows = ids[: len(ids) // 16 * 16].view(-1, 16)
        loss = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in rows]).mean()
    assert last["downstream_ppl"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert (tmp_path / "curve.svg").is_file()


@pytest.mark.host
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["demo", "--folder", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"base", "finetuned", "out"}
    assert main(["demo"]) == 0
    assert "reloaded: LlamaForCausalLM" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "20"], "keep must lie in [0, 1]"),
        (["--per-tensor", "mlp"], "per_tensor needs REGEX=KEEP"),
        (["--include", "nothing"], "is found in no tensor name"),
    ],
)
def test_wrong_use_says_why(
    folders: list[str], capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    assert main([*folders, *options]) == 2
    assert message in capsys.readouterr().err


def test_recipe_with_unknown_keys(folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("yaml")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("kep: 0.1\n")
    assert main([*folders, "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert "the recipe has unknown keys" in error
    assert "kep; known" in error
    assert main(["prune", folders[0]]) == 2
    error = capsys.readouterr().err
    assert "must be given, on the command line or in the recipe" in error
    assert "finetuned, out" in error


def test_wrong_words() -> None:
    for arguments in (["add", "only-one"], ["a", "b", "c", "--method", "wanda"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
