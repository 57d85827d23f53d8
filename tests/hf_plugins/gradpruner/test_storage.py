"""Scores and histories on disk; checkpoints shortened as streams."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_plugins.gradpruner import GradientHistory, PruningPlan, plan_pruning, prune_model, storage
from hf_plugins.gradpruner.storage import ScoreRecord, prune_checkpoint, read_scores
from hf_plugins.whole_files import write_json
from tests.hf_plugins import tiny_models


def factors(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        (layer, name): (torch.randn(3, 2, generator=generator), torch.randn(2, 4, generator=generator))
        for layer in (0, 1, 10)
        for name in ("q", "mlp.up")
    }


def filled(folder: Path | None, **options: object) -> GradientHistory:
    history = GradientHistory(folder, **options)  # type: ignore[arg-type]
    for step in range(3):
        history.add(factors(step))
    return history


@pytest.mark.parametrize("on_disk", [False, True])
def test_history_gives_back_what_it_took(tmp_path: Path, on_disk: bool) -> None:
    history = filled(tmp_path / "h" if on_disk else None)
    assert len(history) == 3
    assert history.modules(1) == ["mlp.up", "q"]
    assert history.modules(10) == ["mlp.up", "q"]
    left, right = history.factors(1, "q")
    assert torch.equal(left, torch.stack([factors(step)[1, "q"][0] for step in range(3)]))
    assert torch.equal(right, torch.stack([factors(step)[1, "q"][1] for step in range(3)]))
    history.truncate(1)
    assert len(history.factors(1, "q")[0]) == 1
    with pytest.raises(ValueError, match="or start the scoring run anew"):
        history.truncate(2)


def test_memory_and_disk_are_one_format(tmp_path: Path) -> None:
    memory = filled(None)
    memory.save(tmp_path / "a")
    for one in (GradientHistory.open(tmp_path / "a"), GradientHistory()):
        if one.folder is None:
            one.load(tmp_path / "a")
        assert torch.equal(one.factors(10, "mlp.up")[1], memory.factors(10, "mlp.up")[1])
    with pytest.raises(FileNotFoundError, match="holds no gradient factors; score with"):
        GradientHistory.open(tmp_path / "nothing")


def test_only_wanted_layers_are_kept() -> None:
    history = filled(None, layers=[1])
    assert history.modules(0) == []
    assert history.modules(1) == ["mlp.up", "q"]
    with pytest.raises(KeyError, match="collect again with history=memory or disk"):
        history.factors(0, "q")


def test_scores_round_trip(tmp_path: Path) -> None:
    record = ScoreRecord(
        num_layers=2, estimator="product", num_params={(0, "a.b"): 6, (1, "q"): 2}, num_skipped=1
    )
    record.add({(0, "a.b"): 0.0, (1, "q"): 0.0})
    record.add({(0, "a.b"): 3.0, (1, "q"): 4.0})
    assert record.num_zero == 1
    write_json(tmp_path / storage.SCORES_FILE, record.to_dict())
    again = read_scores(tmp_path)
    assert again == record
    assert again.scores().tolist() == [1.5, 2.0]
    assert again.scores(normalize="params").tolist() == [0.25, 1.0]
    with pytest.raises(FileNotFoundError, match="run `mmhf gradpruner score` first"):
        read_scores(tmp_path / "gone")


# ------------------------------------------------------------------ checkpoints

PLAN = plan_pruning([9.0, 3.0, 1.0, 2.0, 8.0, 7.0], n_prune=3, n_merge=2)


def random_history(model: PreTrainedModel, plan: PruningPlan = PLAN) -> GradientHistory:
    """Factors for every matrix of the donors and receivers, in the layout of the weight."""
    layers = storage.find_decoder_layers(model).modules
    history = GradientHistory()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        step = {}
        for layer in {index for pair in plan.merged for index in pair}:
            for name, parameter in layers[layer].named_parameters():
                if parameter.ndim == 2:
                    m, n = parameter.shape
                    pair = torch.randn(m, 2, generator=generator), torch.randn(2, n, generator=generator)
                    step[layer, name.removesuffix(".weight")] = pair
        history.add(step)
    return history


@pytest.mark.parametrize("weighting", ["none", "importance"])
@pytest.mark.parametrize(
    ("family", "sharded"), [("llama", True), ("qwen2", False), ("gemma2", True), ("gpt2", False)]
)
def test_stream_equals_memory(family: str, sharded: bool, weighting: str, tmp_path: Path) -> None:
    """Bit for bit, also after from_pretrained; gradpruner.json and the config lie beside the weights."""
    model = tiny_models.build(family)
    history = random_history(model)
    model.save_pretrained(tmp_path / "long", max_shard_size="40KB" if sharded else "1GB")
    assert (tmp_path / "long" / "model.safetensors.index.json").exists() == sharded
    (tmp_path / "long" / "tokenizer.json").write_text("{}")
    report = prune_checkpoint(
        tmp_path / "long",
        tmp_path / "short",
        PLAN,
        history=history,
        weighting=weighting,
        notes={"why": "test"},
    )
    counts = prune_model(model, PLAN, history=history, weighting=weighting)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    want = model.state_dict()
    assert again.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[name]) for name, value in again.state_dict().items())
    assert torch.equal(again.eval()(tiny_models.token_ids()).logits, model(tiny_models.token_ids()).logits)
    written = json.loads((tmp_path / "short" / "gradpruner.json").read_text())
    assert written == json.loads(json.dumps(report))
    assert PruningPlan.from_dict(written["plan"]) == PLAN
    assert written["why"] == "test"
    assert (
        sum(c["num_merged"] for c in written["merged_tensors"].values())
        == sum(c["num_merged"] for c in counts.values())
        > 0
    )
    assert (tmp_path / "short" / "tokenizer.json").exists()
    assert not (tmp_path / "short.part").exists()


def test_bf16_and_difference(tmp_path: Path) -> None:
    """LaCo's merge changes norms too, and stays in bf16."""
    model = tiny_models.build("llama").bfloat16()
    plan = PruningPlan(
        num_layers=6, dropped=(2, 3), merged=((2, 1), (3, 1)), rule="difference", method="laco"
    )
    model.save_pretrained(tmp_path / "long")
    prune_checkpoint(tmp_path / "long", tmp_path / "short", plan)
    prune_model(model, plan)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "short")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_encoder_without_its_outer_name(tmp_path: Path) -> None:
    """MiniLM's file says encoder.layer, the classifier bert.encoder.layer."""
    model = tiny_models.build("bert")
    model.bert.save_pretrained(tmp_path / "long")
    prune_checkpoint(tmp_path / "long", tmp_path / "short", PruningPlan(num_layers=6, dropped=(1, 4)))
    got = load_file(tmp_path / "short" / "model.safetensors")
    old = load_file(tmp_path / "long" / "model.safetensors")
    name = "encoder.layer.{}.attention.self.query.weight"
    assert torch.equal(got[name.format(3)], old[name.format(5)])
    assert name.format(4) not in got


@pytest.fixture
def long(tmp_path: Path) -> Path:
    tiny_models.build("llama").save_pretrained(tmp_path / "long", max_shard_size="40KB")
    return tmp_path / "long"


def assert_nothing_written(folder: Path) -> None:
    assert [path.name for path in folder.iterdir()] == ["long"]


def test_truncated_shard_leaves_nothing(long: Path) -> None:
    shard = sorted(long.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is cut short"):
        prune_checkpoint(long, long.parent / "short", PruningPlan(num_layers=6, dropped=(1,)))
    assert_nothing_written(long.parent)


def test_failure_while_writing_leaves_nothing(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a full disk."""
    real, calls = storage.copy_chunks, []

    def full(entry: storage.Entry) -> object:
        calls.append(entry)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        return real(entry)

    monkeypatch.setattr(storage, "copy_chunks", full)
    with pytest.raises(OSError, match="No space left"):
        prune_checkpoint(long, long.parent / "short", PruningPlan(num_layers=6, dropped=(1,)))
    assert_nothing_written(long.parent)


def test_config_and_weights_must_belong_together(long: Path) -> None:
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(ValueError, match="Config and weights do not belong together"):
        prune_checkpoint(long, long.parent / "short", PruningPlan(num_layers=5, dropped=(1,)))
    assert_nothing_written(long.parent)


def test_plans_that_do_not_fit(long: Path) -> None:
    out = long.parent / "short"
    with pytest.raises(ValueError, match="score this very model first"):
        prune_checkpoint(long, out, PruningPlan(num_layers=7, dropped=(1,)))
    with pytest.raises(ValueError, match="needs their gradient factors"):
        prune_checkpoint(long, out, PLAN)
    history = GradientHistory()
    history.add({(1, "self_attn.w_pack"): (torch.ones(1, 1), torch.ones(1, 1))})
    with pytest.raises(ValueError, match="is not in the checkpoint, but the plan merges it"):
        prune_checkpoint(long, out, PLAN, history=history)
    assert_nothing_written(long.parent)


def test_quantised_receivers_are_refused(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "long")
    weights = load_file(tmp_path / "long" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, tmp_path / "long" / "model.safetensors")
    with pytest.raises(TypeError, match="quantised weights cannot be merged"):
        prune_checkpoint(tmp_path / "long", tmp_path / "short", PLAN, history=random_history(model))
    assert_nothing_written(tmp_path)


def test_existing_folders_are_left_alone(long: Path) -> None:
    out = long.parent / "short"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        prune_checkpoint(long, out, PruningPlan(num_layers=6, dropped=(1,)))
    assert (out / "mine.txt").read_text() == "kept"
    shutil.rmtree(out)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    tiny_models.t5().save_pretrained(tmp_path / "long")
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        prune_checkpoint(tmp_path / "long", tmp_path / "short", PruningPlan(num_layers=2, dropped=(1,)))
