import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_plugins.data_ops import Ledger, ScriptedChat
from hf_plugins.dpf_cm import Pipeline, RecipeConfig
from hf_plugins.dpf_cm import agent as room

ROOT = Path(__file__).resolve().parents[3]
FAST = {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 64, "disable_tqdm": True}
SIZES = {"hidden_size": 32, "num_layers": 2, "vocabulary": 400}


def files(folder: Path) -> dict[str, Any]:
    """Small files of every kind, with one defect each that an operator must find."""

    def write(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        (folder / name).write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
        )
        return [{"files": [name]}]

    ills = ["头痛", "咳嗽", "发热", "腹痛", "失眠", "胸闷", "皮疹", "耳鸣"]
    text = [
        {"text": f"{ill}是常见症状，原因很多，需要结合病史和检查综合判断，必要时及时就医。"} for ill in ills
    ]
    qa = [
        {
            "question": f"{ill}三天了怎么办？",
            "answer": f"{ill}建议先休息观察，多喝温水，如果加重请到医院检查。",
        }
        for ill in ills
    ]
    qa += [
        {"question": "<p>牙疼</p>吃什么药？", "answer": "请看口腔科，<b>不要</b>自己乱吃药。"},
        dict(qa[0]),
    ]
    pairs = [{"prompt": q["question"], "chosen": q["answer"], "rejected": "不知道。"} for q in qa[:8]]
    seeds = [{"question": q["question"], "instruction": f"请{'仔细' * i}回答"} for i, q in enumerate(qa[:4])]
    return {
        "cpt_sources": [write("c.jsonl", [*text, {"text": "好" * 100}])[0] | {"format": "text"}],
        "sft_sources": write("s.jsonl", qa),
        "preference_sources": [write("p.jsonl", pairs)[0] | {"format": "preference"}],
        "seed_sources": [write("i.jsonl", seeds)[0] | {"format": "seeds"}],
        "benign_sources": write(
            "b.jsonl", [{"question": f"公开问题{i}号，天气好吗？", "answer": "好"} for i in range(12)]
        ),
        "init_model": SIZES, "cpt": FAST, "sft": FAST, "rm": FAST, "dpo": FAST, "work_dir": "out",
        "num_reward_models": 2, "trim": [0.125, 0.125], "num_examples": 2, "num_search": 4,
        "ppvd": {"store": "numpy", "max_length": 64}, "safe_reply": "请咨询医生。",
    }  # fmt: skip


def clients() -> dict[str, ScriptedChat]:
    def score(messages: list[dict[str, str]]) -> str:
        return json.dumps(
            {
                "score": 9
                if "Instruction" not in messages[1]["content"]
                else 1 + messages[1]["content"].count("仔细"),
                "reason": "r",
            }
        )

    fixed = json.dumps({"optimize": False, "question": None, "answer": None, "reason": "fine"})
    return {
        "scorer": ScriptedChat(score, identity="scorer"),
        "optimizer": ScriptedChat(lambda m: fixed, identity="optimizer"),
        "instructor": ScriptedChat(lambda m: "请耐心解释", identity="instructor"),
    }


@pytest.mark.host
def test_whole_recipe_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RecipeConfig(**files(tmp_path))
    told: list[str] = []
    first = Pipeline(recipe, base=tmp_path, clients=clients(), progress=lambda what, *_: told.append(what))
    results = first.run()
    assert results["cpt_data"] == {"rows": 8}
    assert results["sft_data"] == {"rows": 9}
    assert results["preference_data"] == results["rm"] == {"rows": 8}
    assert results["denoise"] == {"rows": 6}
    assert results["ppvd"]["num_searched"] == 4
    assert "memory search" in told
    rows = first.sft_data.to_list()
    assert {row["instruction"] for row in rows} == {"请耐心解释"}
    assert any(row["question"].strip().startswith("牙疼") for row in rows)
    work = tmp_path / "out"
    flow = json.loads((work / "sft_flow.json").read_text(encoding="utf-8"))
    assert flow[0]["rows_in"] == 10
    assert flow[-1]["rows_out"] == 9
    assert all(a["rows_out"] == b["rows_in"] for a, b in zip(flow, flow[1:], strict=False))
    dropped = Ledger.load(work / "sft_ledger.parquet").rows(action="dropped")
    assert len(dropped) == 1
    assert dropped[0]["reason"].startswith("near-duplicate of")
    page = (work / "report.html").read_text(encoding="utf-8")
    assert "document_minhash_deduplicator" in page
    assert "dpo" in page
    # Again: no operator runs, no model trains, the same results.
    from hf_plugins.data_ops.op import DataOp

    monkeypatch.setattr(DataOp, "run", None)
    monkeypatch.setattr(room.trainer, "SFTTrainer", None)
    monkeypatch.setattr(room.trainer, "DPOTrainer", None)
    assert Pipeline(recipe, base=tmp_path, clients=clients()).run() == results


@pytest.mark.host
def test_pairs_by_votes(tmp_path: Path) -> None:
    values = files(tmp_path) | {
        "preference_sources": [],
        "num_prompts": 3,
        "cpt_sources": [],
        "seed_sources": [],
    }
    vote = ScriptedChat(lambda m: '{"best": 1, "worst": 2}')
    policy = ScriptedChat(lambda m: [f"回答{i}" for i in range(5)], identity="policy")
    roles = {"voter_1": vote, "voter_2": vote, "voter_3": vote, "policy": policy, **clients()}
    pipeline = Pipeline(RecipeConfig(**values), base=tmp_path, clients=roles)
    data = pipeline.preference_data
    assert 0 < len(data) <= 3
    assert all(row["chosen"] != row["rejected"] for row in data)
    lonely = Pipeline(RecipeConfig(**values), base=tmp_path, clients={})
    with pytest.raises(
        ValueError, match="no client serves voter_1 to voter_3; give clients or preference_sources"
    ):
        lonely.preference_data  # noqa: B018


def test_left_out_operators_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = Pipeline(RecipeConfig(**files(tmp_path)), base=tmp_path, clients={})
    assert len(pipeline.sft_data) == 9
    assert [note.split(":")[0] for note in pipeline.notes] == [
        "quality scores left out", "optimisation left out", "chained-example instructions left out",
    ]  # fmt: skip
    assert "no client serves the role 'scorer'" in caplog.text


def test_orders_of_cleaning(tmp_path: Path) -> None:
    values = files(tmp_path)
    ours = [op.name for op in Pipeline(RecipeConfig(**values), base=tmp_path, clients={})._cpt_ops]
    paper = [
        op.name
        for op in Pipeline(RecipeConfig(**values, paper_order=True), base=tmp_path, clients={})._cpt_ops
    ]
    assert sorted(ours) == sorted(paper)
    assert ours[0] == "clean_html_mapper"
    assert paper[0] == "character_repetition_filter"
    assert paper.index("words_num_filter") < paper.index("clean_html_mapper")
    more = values | {"perplexity_model": "m", "eval_files": ["s.jsonl"]}
    names = [op.name for op in Pipeline(RecipeConfig(**more), base=tmp_path, clients={})._cpt_ops]
    assert names[-1] == "ngram_decontamination_filter"
    assert "perplexity_filter" in names


def test_own_operators_and_paths(tmp_path: Path) -> None:
    values = files(tmp_path) | {
        "sft_ops": [
            "document_deduplicator",
            {"ngram_decontamination_filter": {"text_key": "question", "eval_files": ["s.jsonl"]}},
        ]
    }
    values["sft_ops"][0] = {"document_deduplicator": {"text_key": ["question", "answer"]}}
    ops = Pipeline(RecipeConfig(**values), base=tmp_path, clients={})._sft_ops
    assert ops[1].params()["eval_files"] == (str(tmp_path / "s.jsonl"),)


def test_recipes_of_the_repository_are_read(tmp_path: Path) -> None:
    for path in sorted((ROOT / "configs" / "dpf_cm").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        clients = {role: ScriptedChat([]) for role in values.get("clients", {})}
        pipeline = Pipeline.from_yaml(path, clients=clients)
        assert pipeline.recipe.sft_sources


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: [", "A recipe has plain `option: value` lines"),
        ("- a", "must hold `option: value` lines"),
        ("stfu: 1", "no option stfu; there are"),
        ("{sft: {epochs: 3}}", "SFTConfig has no option epochs"),
        ("{ppvd: {ngram: 1}}", "ngram must be >= 2"),
        ("{cpt_ops: [nothing]}", "no operator 'nothing'"),
        ("{clients: {scorer: {kind: x}}}", "kind of a cli.*ent must be"),
    ],
)
def test_wrong_recipes(text: str, match: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=match):
        Pipeline.from_yaml(tmp_path / "r.yaml")


@pytest.mark.host
def test_sealed_guard_of_a_recipe(tmp_path: Path) -> None:
    """The store of a recipe with a key holds ciphertext, opens again with the key, and never without."""
    from hf_plugins.dpf_cm.storage import open_store
    from tests.hf_plugins.dpf_cm.memorised import BENIGN, LOOKALIKE, PRIVATE, model, tokenizer

    for part in (model(), tokenizer()):
        part.save_pretrained(tmp_path / "model")

    def write(name: str, rows: list[dict[str, str]]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")

    write("private.jsonl", [{"question": s.prompt, "answer": s.answer} for s in PRIVATE])
    write("public.jsonl", [{"question": text, "answer": "好"} for text in BENIGN + LOOKALIKE])
    (tmp_path / "guard.key").write_bytes(b"0123456789abcdef0123456789abcdef")
    values: dict[str, Any] = {
        "work_dir": "out", "key_file": "guard.key", "safe_reply": "请咨询医生。",
        "sft_sources": [{"files": ["private.jsonl"]}], "benign_sources": [{"files": ["public.jsonl"]}],
        "ppvd": {"store": "numpy", "protect": "encrypt", "max_fpr": 0.1},
        "sft_ops": [{"document_deduplicator": {"text_key": ["question", "answer"]}}],
    }  # fmt: skip

    def run(**changes: Any) -> dict[str, Any]:
        pipeline = Pipeline(RecipeConfig(**(values | changes)), base=tmp_path, clients={})
        pipeline.__dict__["final_model"] = tmp_path / "model"
        return pipeline.run(["ppvd"])["ppvd"]

    first = run()
    assert first["num_memorised"] == len(PRIVATE)
    assert first["leakage"]["attacks"][0]["rouge_after"] < 0.5
    width = model().config.hidden_size
    assert open_store("numpy", Path(first["guard"]) / "store").load().vectors.shape[1] != width
    # Keys of one text are equal to rounding; the curve between them is not compared.
    again = run()
    assert again["leakage"]["attacks"] == first["leakage"]["attacks"]
    assert again["calibration"] == pytest.approx(first["calibration"], abs=1e-5)
    (tmp_path / "other.key").write_bytes(b"1" * 32)
    with pytest.raises(ValueError, match="give the key it was written with"):
        run(key_file="other.key")
    # Other options or data make another guard beside this one.
    assert again["guard"] == first["guard"]
    other = run(ppvd=values["ppvd"] | {"max_fpr": 0.2})
    write("private.jsonl", [{"question": s.prompt, "answer": s.answer} for s in PRIVATE[1:]])
    fewer = run()
    assert len({first["guard"], other["guard"], fewer["guard"]}) == 3
    assert fewer["num_memorised"] == len(PRIVATE) - 1


def test_keys_that_cannot_work_end_before_any_work(tmp_path: Path) -> None:
    def make(**values: Any) -> None:
        Pipeline(RecipeConfig(work_dir="o", **values), base=tmp_path, clients={})

    sealed = {"protect": "encrypt"}
    with pytest.raises(
        ValueError, match="needs key_file in the recipe; .mmhf dpf-cm ppvd key FILE. makes one"
    ):
        make(ppvd=sealed)
    with pytest.raises(ValueError, match="Set protect to encrypt or sketch, or leave key_file out"):
        make(key_file="k")
    with pytest.raises(FileNotFoundError, match="no key in .*; make one with .*mmhf dpf-cm ppvd key"):
        make(ppvd=sealed, key_file="k")
    (tmp_path / "k").write_bytes(b"short")
    with pytest.raises(
        ValueError, match="holds 5 .*bytes, not 32; make one with .*mmhf dpf-cm ppvd key FILE"
    ):
        make(ppvd=sealed, key_file="k")
    with pytest.raises(ValueError, match="lies in work_dir, .* keep it in another place"):
        make(ppvd=sealed, key_file="o/k")


def test_wrong_runs(tmp_path: Path) -> None:
    pipeline = Pipeline(RecipeConfig(work_dir="o"), base=tmp_path, clients={})
    with pytest.raises(ValueError, match="no stage train.*.*; there are .*.*cpt_data, cpt"):
        pipeline.run(["train"])
    with pytest.raises(ValueError, match="the recipe names no data; give cpt_sources or sft_sources"):
        pipeline.run()
    with pytest.raises(ValueError, match="the stage sft needs sft_sources.* in the recipe"):
        pipeline.run(["sft"])
    with pytest.raises(ValueError, match="the stage ppvd needs benign_sources"):
        pipeline.run(["ppvd"])
    gone = Pipeline(RecipeConfig(work_dir="o", model="none"), base=tmp_path, clients={})
    with pytest.raises(FileNotFoundError, match="save one there first, nothing is downloaded"):
        gone.base_model  # noqa: B018
    with pytest.raises(ValueError, match="come from a client of the role 'safe', or set safe_reply"):
        pipeline._safe_answers([])
    safe = Pipeline(
        RecipeConfig(work_dir="o"), base=tmp_path, clients={"safe": ScriptedChat(["<think>a</think> b"])}
    )
    from hf_plugins.dpf_cm.model import Sample

    assert safe._safe_answers([Sample("a", "q", "x")]) == ["b"]


def test_public_names_are_lazy() -> None:
    import hf_plugins.dpf_cm as package

    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="the package hf_plugins.dpf_cm has no attribute"):
        package.Nothing  # noqa: B018
