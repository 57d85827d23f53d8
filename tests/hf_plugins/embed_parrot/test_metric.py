"""The scan on tiny models: cells, defences, resume, exported states, the verdict."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from hf_plugins.embed_parrot import metric
from hf_plugins.embed_parrot.config import LeakScanConfig
from hf_plugins.embed_parrot.dataset import encode
from hf_plugins.embed_parrot.hook import collect_states, embedding_table
from hf_plugins.embed_parrot.metric import scan, verdict
from hf_plugins.embed_parrot.page import render_page
from hf_plugins.embed_parrot.storage import export_states, load_states
from tests.hf_plugins.embed_parrot.tiny import bert, llama, texts, tokenizer

pytestmark = pytest.mark.host
SMALL: dict[str, Any] = {
    "layers": (0, 3),
    "num_test": 6,
    "num_calibrate": 5,
    "num_fit": 80,
    "max_length": 16,
    "vocab_tokens": 20,
    "shortlist": 5,
    "bootstrap": 20,
}


def _scan(model: torch.nn.Module, work_dir: Path | None = None, **options: Any) -> dict[str, Any]:
    config = LeakScanConfig(**(SMALL | options))
    return scan(
        model, {"en": texts(), "zh": texts("zh")}, tokenizer=tokenizer(), config=config, work_dir=work_dir
    )


def _accuracy(report: dict[str, Any], **wanted: Any) -> float:
    rows = [row for row in report["cells"] if all(row[key] == value for key, value in wanted.items())]
    assert rows, wanted
    return min(row["token_acc"][0] for row in rows)


@pytest.fixture(scope="module")
def causal() -> dict[str, Any]:
    return _scan(llama(), defences=("none", "dct:keep=4", "gauss:0.1", "permute"))


def test_every_attack_layer_set_and_view_is_there(causal: dict[str, Any]) -> None:
    """5 attacks x 2 layers x 2 sets for the plain model, twice that for each of three defences."""
    assert len(causal["cells"]) == 5 * 2 * 2 * (1 + 3 * 2)
    assert causal["tokens"]["test/en"] > 0
    assert causal["causal"] is True
    assert causal["skipped"] == {}
    json.dumps(causal)
    assert "read back" in render_page(causal)


def test_exact_attacks_are_exact(causal: dict[str, Any]) -> None:
    assert _accuracy(causal, defence="none", attack="vocab") == 1.0
    assert _accuracy(causal, defence="none", attack="hei", layer=0) == 1.0
    assert _accuracy(causal, defence="dct:keep=4", attack="vocab", view="adaptive") == 1.0
    assert _accuracy(causal, defence="dct:keep=4", attack="hei", layer=0, view="adaptive") == 1.0
    assert _accuracy(causal, defence="permute", attack="vocab", view="adaptive") == 1.0
    assert _accuracy(causal, defence="permute", attack="hei", layer=0, view="adaptive") == 1.0
    assert _accuracy(causal, defence="gauss:0.1", attack="vocab", layer=3) == 1.0


def test_naive_attackers_are_led_astray(causal: dict[str, Any]) -> None:
    for spec in ("dct:keep=4", "permute"):
        for attack in ("hei", "ridge", "vocab"):
            assert _accuracy(causal, defence=spec, attack=attack, view="naive", layer=3) < 0.5


def test_equal_texts_have_equal_measures(causal: dict[str, Any]) -> None:
    """Where all tokens are right, every measure is at its best, in Chinese as in English."""
    for row in causal["cells"]:
        if row["attack"] == "vocab" and row["defence"] == "none":
            assert row["token_acc"] == [1.0, 1.0, 1.0]
            assert row["rougeL"][0] == row["rouge1"] == row["token_f1"] == row["exact_match"] == 1.0
            assert row["bleu"] == pytest.approx(100)
            assert row["embedding_cosine"] == pytest.approx(1, abs=1e-5)


def test_adaptive_maps_are_fitted_under_the_defence() -> None:
    """A key that turns the embeddings leaves a map fitted without it nothing, and costs one fitted with it
    little.
    """
    report = _scan(llama(), defences=("dct:window=32,key=3",), attacks=("ridge",))
    assert _accuracy(report, view="naive") < 0.2
    assert _accuracy(report, view="adaptive") > 0.6


def test_use_of_the_model_stands_beside(causal: dict[str, Any]) -> None:
    figures = {(row["defence"], row["layer"]): row["value"] for row in causal["utility"]}
    assert set(figures) == {
        ("none", None),
        ("dct:keep=4", None),
        ("gauss:0.1", 0),
        ("gauss:0.1", 3),
        ("permute", 0),
        ("permute", 3),
    }
    assert all(
        row["metric"] == "perplexity" and row["plain"] == figures["none", None] for row in causal["utility"]
    )
    assert figures["gauss:0.1", 3] == pytest.approx(figures["none", None], rel=0.05)
    assert figures["permute", 3] != pytest.approx(figures["none", None], rel=1e-4)


def test_entities_are_counted_apart() -> None:
    """Of the words given those count that stand in an attacked text; the exact attack finds them all."""
    words = ["the", "has", "no such words anywhere"]
    options = {"attacks": ("vocab", "bei"), "layers": (3,), "vocab_tokens": 200}
    config = LeakScanConfig(**(SMALL | options))
    report = scan(llama(), texts()[:60], tokenizer=tokenizer(), config=config, entities=words)
    found = {row["attack"]: row for row in report["cells"]}
    assert found["vocab"]["entity_recall"] == 1.0
    assert found["bei"]["entity_recall"] < 0.5
    assert 1 <= found["vocab"]["num_entities"] <= 12
    assert "<th>entities</th>" in render_page(report)


def test_next_token_score_looks_one_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that names the row after the state's: with texts that count upwards it is always one ahead."""

    class Counting:
        def __call__(self, rows: list[str], **options: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[(int(row) + k) % 384 for k in range(8)] for row in rows]}

        all_special_ids: ClassVar[list[int]] = []

        def decode(self, ids: list[int], **options: Any) -> str:
            return " ".join(map(str, ids))

    model = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_input_embeddings().weight.roll(1, 0) * 1000)
    monkeypatch.setattr(metric, "final_norm", lambda model: None)
    config = LeakScanConfig(**(SMALL | {"attacks": ("bei",), "layers": (0,)}))
    report = scan(model, [str(n) for n in range(100)], tokenizer=Counting(), config=config)
    assert report["cells"][0]["shifted_acc"] > 0.9
    assert report["cells"][0]["token_acc"][0] < 0.1


def test_sample_shows_guesses_by_layer(causal: dict[str, Any]) -> None:
    sample = causal["sample"]
    assert set(sample["layers"]) == {"0", "3"}
    assert sample["layers"]["3"]["vocab"]["tokens"] == sample["tokens"]
    assert all(sample["layers"]["3"]["vocab"]["hits"])
    assert sample["layers"]["3"]["vocab"]["text"] == "".join(sample["tokens"])


def test_parts_of_characters_are_told_apart() -> None:
    """Bytes of a Chinese sign have no text of their own; in the sample they are neither equal nor blank."""
    config = LeakScanConfig(**(SMALL | {"attacks": ("bei",), "layers": (3,)}))
    report = scan(llama(), {"zh": texts("zh")}, tokenizer=tokenizer(), config=config)
    sample = report["sample"]
    assert not any("\ufffd" in token for token in sample["tokens"])
    assert len(set(sample["tokens"])) > 5
    shared = [a == b for a, b in zip(sample["tokens"], sample["layers"]["3"]["bei"]["tokens"], strict=True)]
    assert shared == sample["layers"]["3"]["bei"]["hits"]


def test_encoder_and_parrot_with_seeds() -> None:
    report = _scan(
        bert(),
        attacks=("bei", "bei_norm", "hei", "ridge", "parrot", "vocab"),
        seeds=(0, 1),
        parrot_steps=4,
        parrot_width=64,
        parrot_layers=1,
        defences=("none", "int8"),
        layers=(3,),
        parrot_batch=4,
    )
    assert set(report["skipped"]) == {"bei_norm", "vocab"}
    assert "causal attention" in report["skipped"]["vocab"]
    parrots = [row for row in report["cells"] if row["attack"] == "parrot" and row["defence"] == "none"]
    assert [len(row["per_seed"]) for row in parrots] == [2, 2]
    assert parrots[0]["token_acc"][0] == pytest.approx(sum(parrots[0]["per_seed"]) / 2)
    figures = {row["defence"]: row["value"] for row in report["utility"]}
    assert figures["none"] == pytest.approx(1)
    assert 0.99 < figures["int8"] < 1


def test_own_measure_of_use() -> None:
    config = LeakScanConfig(**(SMALL | {"attacks": ("hei",), "defences": ("int8",), "layers": (1,)}))
    report = scan(
        bert(),
        texts(),
        tokenizer=tokenizer(),
        config=config,
        utility=lambda model: {"calls": 3.0},
        name="mine",
    )
    assert report["model"] == "mine"
    assert {row["metric"] for row in report["utility"]} == {"pooled_cosine", "calls"}
    assert {row["set"] for row in report["cells"]} == {"text"}
    assert all(row["plain"] is not None for row in report["utility"])


def test_model_is_left_as_it_was() -> None:
    model = llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _scan(model, defences=("none", "dct:keep=4"), attacks=("hei", "vocab"))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class _StopError(Exception):
    pass


def test_interrupted_scan_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after three parts, a second start runs the other ones only and ends where an unbroken scan
    does.
    """
    options: dict[str, Any] = {
        "defences": ("none", "gauss:0.5"),
        "attacks": ("hei", "ridge"),
        "seeds": (0, 1),
    }
    whole = _scan(llama(), **options)
    plain = metric._Scan._attack
    calls: list[str] = []

    def counted(self: Any, cell: Any, *rest: Any) -> Any:
        if len(calls) == 3 and "stop" not in calls:
            calls.append("stop")
            raise _StopError
        calls.append(cell.key)
        return plain(self, cell, *rest)

    monkeypatch.setattr(metric._Scan, "_attack", counted)
    with pytest.raises(_StopError):
        _scan(llama(), tmp_path, **options)
    again = _scan(llama(), tmp_path, **options)
    keys = [call for call in calls if call != "stop"]
    assert len(keys) == len(set(keys)) == 2 * 2 + 2 * 2 * 2 * 2

    def shape(report: dict[str, Any]) -> list[Any]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in report["cells"]]

    assert shape(again) == shape(whole)
    assert again["utility"] == whole["utility"]
    with pytest.raises(ValueError, match="holds parts of another scan"):
        _scan(llama(), tmp_path, **(options | {"num_fit": 70}))


def test_layers_read_in_several_passes_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"attacks": ("hei", "ridge"), "layers": ()}
    whole = _scan(llama(), **options)
    monkeypatch.setattr(metric, "_BUDGET_BYTES", 1)
    single = _scan(llama(), **options)
    assert [row["token_acc"] for row in whole["cells"]] == [row["token_acc"] for row in single["cells"]]
    assert len(whole["cells"]) == 2 * 4 * 2


@pytest.mark.parametrize("spec", ["none", "permute"])
def test_exported_states_equal_the_model_at_hand(tmp_path: Path, spec: str) -> None:
    model = llama()
    ids = encode(tokenizer(), texts(), 16)
    states = collect_states(model, ids, [0, 2])
    path = export_states(tmp_path / "x.safetensors", codebook=embedding_table(model), ids=ids, states=states)
    config = LeakScanConfig(
        **(
            SMALL
            | {"layers": (), "defences": (spec, "dct:window=2"), "attacks": ("bei", "hei", "ridge", "vocab")}
        )
    )
    report = scan(load_states(path), config=config, tokenizer=tokenizer())
    assert set(report["skipped"]) == {"vocab", "dct:window=2"}
    assert {row["layer"] for row in report["cells"]} == {0, 2}
    assert {row["defence"] for row in report["cells"]} == {spec}
    assert report["utility"] == []
    if spec == "none":
        assert _accuracy(report, attack="hei", layer=0) == 1.0
        assert _accuracy(report, attack="ridge", layer=2) > 0.8
    bare = scan(load_states(path), config=config)
    assert "bleu" not in bare["cells"][0]
    assert bare["sample"] == {}
    render_page(bare)


def test_verdict_counts_what_is_deployed() -> None:
    def row(defence: str, view: str, share: float) -> dict[str, Any]:
        return {
            "defence": defence,
            "view": view,
            "layer": 1,
            "attack": "hei",
            "set": "x",
            "token_acc": [share, 0.0, 1.0],
        }

    rows = [row("none", "adaptive", 1.0), row("int8", "naive", 0.2), row("int8", "adaptive", 0.6)]
    found = verdict(rows, 0.5)
    assert (found["leak"], found["failed"], found["worst"]["view"]) == (0.6, True, "adaptive")
    assert not verdict(rows, 0.6)["failed"]
    assert verdict(rows[:1], 0.5)["leak"] == 1.0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="attacking a model needs its tokenizer"):
        scan(llama(), texts())
    with pytest.raises(
        ValueError, match=r"layers \[9\].* are not there; this source has .*0 \.\. 3 \(4 cuts\)"
    ):
        _scan(llama(), layers=(0, 9))
    with pytest.raises(ValueError, match="the scan ran no attack; each one asked for was skipped"):
        _scan(bert(), attacks=("vocab",))
    one = export_states(
        tmp_path / "x.safetensors",
        codebook=torch.randn(4, 2),
        ids=[torch.tensor([1])],
        states={0: [torch.randn(1, 2)]},
    )
    with pytest.raises(ValueError, match="1.* exported texts are too few: one half is attacked"):
        scan(load_states(one))
