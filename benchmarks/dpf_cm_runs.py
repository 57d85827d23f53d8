"""Measured runs of DPF-CM on real medical rows: planted defects, preference denoising, the guard under
attack, and fine-tuning on processed against raw data. ``python -m benchmarks.dpf_cm_runs PART ...`` (all
parts by default).

Parts: defects, denoise, guard, sft. Seeds are kept one by one in ``work_dirs/dpf_cm_runs``, so an interrupted
run goes on. The data folder is needed (`tools/real_data.py`). Models are small and trained here from fresh
weights.
"""

import argparse
import json
import random
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.record import write_result
from hf_plugins.data_ops import OpContext, ScriptedChat, make_op, run_ops, with_row_ids
from hf_plugins.data_ops.op import ROW_ID
from hf_plugins.data_ops.preference import ensemble_distance
from hf_plugins.data_ops.text import tokens
from hf_plugins.dpf_cm import trainer
from hf_plugins.dpf_cm.config import PPVDConfig
from hf_plugins.dpf_cm.dataset import DIALOGUE, read_sources
from hf_plugins.dpf_cm.hook import answer_ids, prompt_ids
from hf_plugins.dpf_cm.metric import evaluate_guard, search_memory
from hf_plugins.dpf_cm.model import PrivacyPreservingVectorDB, Sample
from tools.real_data import ROOT, data_set

WORK = ROOT / "work_dirs" / "dpf_cm_runs"
PACKAGES = ("datasets", "transformers", "trl", "rensa")


def qa(name: str, count: int, *, skip: int = 0, longest: int = 400) -> list[dict[str, str]]:
    """Real pairs (question, answer) of one set, the short ones in file order."""
    sources = {
        "patient_doctor_qa": ("zh_medical", "qa", {"question": "ask"}),
        "huatuo_kg": ("zh_medical", "alpaca", {}),
        "medquad": ("medquad", "qa", {}),
        "pubmedqa": ("pubmedqa", "qa", {"answer": "long_answer"}),
    }
    folder, form, keys = sources[name]
    file = f"{name}.jsonl.gz" if folder == "zh_medical" else "train.jsonl.gz"
    rows = read_sources([{"files": [str(data_set(folder) / file)], "format": form, "keys": keys}])
    found = [
        {"question": r["question"], "answer": r["answer"]}
        for r in rows
        if len(r["question"]) + len(r["answer"]) <= longest
    ]
    return found[skip : skip + count]


# --- planted defects
# -----------------------------------------------------------------------------------------

# What is planted, by whether the row is in Chinese.
_AD = {
    True: "<div class='ad'><a href='http://ad.example.cn/x?id=3'>点击咨询</a></div><br/>&nbsp;",
    False: "<div class='ad'><a href='http://ad.example.cn/x?id=3'>Ask a doctor now</a></div><br/>&nbsp;",
}
_CONTACT = {
    True: "可加我微信同号{phone}，邮箱dr{number}@hosp.example.com",
    False: " Reach me at {phone} or dr{number}@hosp.example.com.",
}
_TYPO = {True: "的了在是", False: "aeio"}


def _chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


def _terms(text: str) -> set[str]:
    """Pairs of Chinese characters, and words of more than three letters."""
    words = tokens(text.lower())
    pairs = {a + b for a, b in zip(words, words[1:], strict=False) if len(a) == len(b) == 1}
    return pairs | {word for word in words if len(word) > 3}


def scorer(rows: Sequence[dict[str, str]]) -> Callable[[list[dict[str, str]]], str]:
    """A rule that stands for a scoring model: an answer should take up a rare term of its question.

    It knows how often terms occur in the questions, and nothing of what was planted.
    """
    counts = Counter(term for row in rows for term in _terms(row["question"]))
    rare = {term for term, count in counts.items() if count <= max(3, len(rows) // 50)}

    def score(messages: list[dict[str, str]]) -> str:
        parts = re.findall(r"## (?:Question|Answer)\n(.*?)\n\n", messages[1]["content"] + "\n\n", re.S)
        shared = _terms(parts[0]) & rare & _terms(parts[1])
        return json.dumps({"score": 9 if shared else 3, "reason": "overlap with the question"})

    return score


def plant(
    rows: Sequence[dict[str, str]], seed: int, share: float = 0.05
) -> tuple[list[dict[str, str]], list[str]]:
    """Real rows with known defects: each kind on its own share of rows; duplicates are added as new rows.

    Returns:
        Rows, and the kind of each (empty for an untouched one).
    """
    rng = random.Random(seed)
    rows = [dict(row) for row in rows]
    kinds = [""] * len(rows)
    order = list(range(len(rows)))
    rng.shuffle(order)
    size = int(share * len(rows))
    answers = [row["answer"] for row in rows]
    for place, kind in enumerate(("repetition", "symbols", "markup", "personal", "short", "mismatch")):
        for index in order[place * size : (place + 1) * size]:
            row, kinds[index] = rows[index], kind
            chinese = _chinese(row["answer"])
            if kind == "repetition":
                row["answer"] = (row["answer"][:12] or "好的好的好的好的好的好的") * 12
            elif kind == "symbols":
                row["answer"] = "".join(
                    c + rng.choice("★◆#*@!~…●") * (rng.random() < 0.6) for c in row["answer"]
                )
            elif kind == "markup":
                comma = "，" if chinese else ", "
                row["answer"] = (
                    _AD[chinese] + row["answer"].replace(comma, f"{comma}<br/>", 3) + "<!-- end -->"
                )
            elif kind == "personal":
                phone = "1" + rng.choice("3578") + "".join(rng.choices("0123456789", k=9))
                row["answer"] += _CONTACT[chinese].format(phone=phone, number=rng.randrange(999))
            elif kind == "short":
                row["answer"] = row["answer"][:3]
            else:
                row["answer"] = answers[rng.choice([i for i in order[size * 6 :]])]
    for index in order[6 * size : 7 * size]:
        copy = dict(rows[index])
        place = len(copy["answer"]) // 2
        typo = rng.choice(_TYPO[_chinese(copy["answer"])])
        copy["answer"] = copy["answer"][:place] + typo + copy["answer"][place + 1 :]
        rows.append(copy)
        kinds.append("duplicate")
    return rows, kinds


_DETECTORS: list[tuple[str, str, dict[str, Any]]] = [
    ("repetition", "character_repetition_filter", {"text_key": "answer"}),
    ("symbols", "special_characters_filter", {"text_key": "answer", "max_ratio": 0.35}),
    ("markup", "clean_html_mapper", {"text_key": ["question", "answer"]}),
    ("personal", "pii_redaction_mapper", {"text_key": ["question", "answer"]}),
    ("short", "words_num_filter", {"text_key": "answer", "min_num": 5}),
    ("duplicate", "document_minhash_deduplicator", {"text_key": ["question", "answer"]}),
    ("mismatch", "llm_quality_score_filter", {"lang": "zh"}),
]


def defects(seeds: Sequence[int], count: int) -> None:
    """Precision and recall of each operator for the defect that it is meant for."""
    figures: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
    for seed in seeds:
        for language, rows in (
            ("Chinese", qa("patient_doctor_qa", count) + qa("huatuo_kg", count)),
            ("MedQuAD", qa("medquad", count, longest=1500)),
            ("PubMedQA", qa("pubmedqa", count, longest=1500)),
        ):
            dirty, kinds = plant(rows, seed)
            data = Dataset.from_list(dirty)
            for kind, name, params in _DETECTORS:
                context = OpContext(clients={"default": ScriptedChat(scorer(dirty))})
                ided = with_row_ids(data)
                make_op({name: params}).run(ided, context)
                truth = {i for i, k in zip(ided[ROW_ID], kinds, strict=True) if k == kind}
                hit = {
                    row[ROW_ID] for row in context.ledger.rows() if row["action"] in ("dropped", "changed")
                }
                right = len(hit & truth)
                figures.setdefault((language, name), []).append(
                    (right / len(hit) if hit else 1.0, right / len(truth), len(hit - truth))
                )
    rows_out = []
    meant = {name: kind for kind, name, _ in _DETECTORS}
    for (language, name), values in figures.items():
        precision, recall, extra = (statistics.mean(v[i] for v in values) for i in range(3))
        rows_out.append([name, meant[name], language, f"{precision:.3f}", f"{recall:.3f}", f"{extra:.1f}"])
    write_result(
        "dpf_cm_defects",
        command="python -m benchmarks.dpf_cm_runs defects",
        config={"rows": count, "share": 0.05, "detectors": [list(d[:2]) for d in _DETECTORS]},
        seeds=seeds,
        packages=PACKAGES,
        columns=["operator", "planted defect", "rows", "precision", "recall", "other rows hit (mean)"],
        rows=rows_out,
        notes=[
            f"Real rows (Chinese: {count} patient_doctor_qa + {count} huatuo_kg; up to {count} of MedQuAD "
            "and of PubMedQA, question and long answer), each defect planted on 5 % of them; means over "
            "seeds.",
            "Precision counts natural defects against the operator: the raw rows hold repetition, markup "
            "and duplicates of their own. The scorer is a rule (the answer takes up a rare term of its "
            "question), not a language model.",
        ],
        details={f"{a}/{b}": v for (a, b), v in figures.items()},
    )


# --- preference denoising
# ------------------------------------------------------------------------------------


# Bytes of a prompt and its longer answer below which both fit into the reward model's 512 tokens.
_FITS = 1500


def _pairs(limit: int) -> Dataset:
    """Short pairs, whole: a reward model that sees no answer's end has little to tell answers apart by."""
    files = [str(data_set("preference_demo") / f"dpo_{lang}.jsonl.gz") for lang in ("zh", "en")]
    rows = read_sources([{"files": files, "format": "preference"}])

    def size(row: dict[str, Any]) -> int:
        answers = (len(row[key].encode()) for key in ("chosen", "rejected"))
        return len(row["prompt"].encode()) + max(answers)

    keep = [i for i, row in enumerate(rows) if size(row) <= _FITS]
    return rows.select(keep[:limit]).map(lambda row: {"history": []})


def _auc(scores: np.ndarray, flipped: np.ndarray) -> float:
    ranks = np.argsort(np.argsort(scores, kind="stable"))
    n = int(flipped.sum())
    return 1 - float((ranks[flipped].sum() - n * (n - 1) / 2) / (n * (~flipped).sum()))


def denoise(seeds: Sequence[int], limit: int, steps: int) -> None:
    """Planted flips found by the ensemble, in-sample and cross-fitted, against one model's gap and votes."""
    rows = []
    collected: dict[str, list[list[float]]] = {}
    for seed in seeds:
        path = WORK / f"denoise-{seed}-{limit}-{steps}.json"
        if not path.is_file():
            data = _pairs(limit)
            rng = np.random.default_rng(seed)
            flipped = np.zeros(len(data), bool)
            flipped[rng.permutation(len(data))[: len(data) // 5]] = True

            def flip(row: dict[str, Any], index: int, flipped: np.ndarray = flipped) -> dict[str, Any]:
                a, b = row["chosen"], row["rejected"]
                return {"chosen": b, "rejected": a} if flipped[index] else {"chosen": a, "rejected": b}

            noisy = data.map(flip, with_indices=True)
            texts = [f"{r['prompt']}\n{r['chosen']}\n{r['rejected']}" for r in data]
            sizes = {"hidden_size": 96, "num_layers": 2, "vocabulary": 2000}
            base = trainer.small_model(texts, WORK / f"denoise-base-{seed}", sizes, seed)
            options = {
                "max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 1e-3,
                "max_length": 512,
                "disable_tqdm": True, "logging_steps": 1000, "save_strategy": "no",
            }  # fmt: skip
            found: dict[str, Any] = {}
            for cross in (False, True):
                _, margins = trainer.train_reward_models(
                    base, noisy, WORK / "models", options, count=5, cross_fit=cross, seed=seed
                )
                d = ensemble_distance(margins)
                known = ~np.isnan(margins)
                votes = np.where(known, margins < 0, 0).sum(1) / known.sum(1)
                first = d if cross else margins[:, 0]
                for name, scores in (
                    (f"ensemble, {'cross-fitted' if cross else 'in-sample (paper)'}", d),
                    (f"one model's gap (RwGap), {'cross-fitted' if cross else 'in-sample'}", first),
                    (f"vote of signs, {'cross-fitted' if cross else 'in-sample'}", -votes),
                ):
                    if cross and not name.startswith("ensemble"):
                        # With one model a fold, gap and vote are the distance and its sign.
                        continue
                    low = np.argsort(scores, kind="stable")
                    tenth, fifth = (low[: int(s * len(d))] for s in (0.1, 0.2))
                    found[name] = [
                        _auc(scores, flipped), float(flipped[tenth].mean()),
                        float(flipped[fifth].sum() / flipped.sum()),
                    ]  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found))
        for name, values in json.loads(path.read_text()).items():
            collected.setdefault(name, []).append(values)
    for name, values in collected.items():
        cells = [
            f"{statistics.mean(v[i] for v in values):.3f} "
            f"({min(v[i] for v in values):.3f}-{max(v[i] for v in values):.3f})"
            for i in range(3)
        ]
        rows.append([name, *cells])
    write_result(
        "dpf_cm_denoise",
        command="python -m benchmarks.dpf_cm_runs denoise",
        config={"pairs": limit, "flipped": 0.2, "reward_models": 5, "steps": steps},
        seeds=seeds,
        packages=PACKAGES,
        columns=["score", "AUC of flips", "flips among the lowest tenth", "flips found in the lowest fifth"],
        rows=rows,
        notes=[
            f"{len(_pairs(limit))} real pairs (Chinese and English; those that fit whole into 512 tokens), "
            "one fifth flipped by hand: chance is 0.5, 0.2 and 0.2. Reward models: 2 layers, width 96, fresh "
            f"weights, {steps} steps of 16. Mean (range) over seeds.",
        ],
        details=collected,
    )


# --- the guard
# -----------------------------------------------------------------------------------------------

_DESIGNS: dict[str, dict[str, Any]] = {
    "whole sample, raw, cosine > 0.8 (literal paper)": {
        "key_points": (1.0,),
        "whiten": False,
        "threshold": 0.8,
    },
    "prompt only, raw, cosine > 0.8": {"key_points": (0.0,), "whiten": False, "threshold": 0.8},
    "prompt only, whitened, calibrated": {"key_points": (0.0,)},
    "4 prefixes, whitened, calibrated (default keys)": {},
    "4 prefixes + block 10-grams (default)": {"output_guard": "block"},
    "4 prefixes + question's end + block 10-grams": {"output_guard": "block", "suffix_points": (0.6,)},
    "default, 2048-bit sketch": {"output_guard": "block", "protect": "sketch"},
}


def _paraphrase(text: str) -> str:
    """The question in other words, by rule: politeness in front, synonyms, another end."""
    for old, new in (
        ("怎么办", "该如何处理"), ("医生", "大夫"), ("请问", "想了解一下"), ("吗", "么"), ("什么", "哪些"),
        ("治疗", "医治"),
        ("严重", "要紧"), ("患者", "病人"), ("如何", "怎样"), ("应该", "应当"),
    ):  # fmt: skip
        text = text.replace(old, new)
    return "您好，" + text + "谢谢"


def guard(seeds: Sequence[int], count: int, steps: int) -> None:
    """A model trained until it repeats private rows; attacks without and with guards of several designs."""
    rows_out: list[list[Any]] = []
    collected: dict[str, list[dict[str, Any]]] = {}
    memory = []
    for seed in seeds:
        path = WORK / f"guard-{seed}-{count}-{steps}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(_guard_seed(seed, count, steps), ensure_ascii=False))
        record = json.loads(path.read_text())
        memory.append(record["memorised"])
        for design, report in record["designs"].items():
            collected.setdefault(design, []).append(report)
    names = [a["attack"] for a in next(iter(collected.values()))[0]["attacks"]]
    before = next(iter(collected.values()))

    def mean(reports: Sequence[dict[str, Any]], place: int, key: str) -> float:
        return statistics.mean(report["attacks"][place][key] for report in reports)

    def cells(reports: Sequence[dict[str, Any]], when: str) -> list[str]:
        kinds = (f"rouge_{when}", f"exact_{when}")
        return [" / ".join(f"{mean(reports, i, kind):.2f}" for kind in kinds) for i in range(len(names))]

    rows_out.append(["no guard", *cells(before, "before"), "-", "-", "-", "-"])
    for design, reports in collected.items():
        benign = [statistics.mean(r["benign"][i]["false_positives"] for r in reports) for i in (0, 1)]
        same = statistics.mean(r["benign"][0]["unchanged"] for r in reports)
        rows_out.append(
            [
                design,
                *cells(reports, "after"),
                *[f"{100 * value:.1f} %" for value in benign],
                f"{100 * same:.1f} %",
                # A replaced reply is shorter; its time says nothing.
                f"{statistics.median(t for r in reports for t in r['added_ms']):.1f}" if same > 0.5 else "-",
            ]
        )
    shown = collected["4 prefixes + block 10-grams (default)"]
    drop = mean(shown, 0, "absolute_drop")
    write_result(
        "dpf_cm_guard",
        command="python -m benchmarks.dpf_cm_runs guard",
        config={"private": count, "steps": steps, "designs": list(_DESIGNS)},
        seeds=seeds,
        packages=PACKAGES,
        columns=[
            "guard",
            *names,
            "benign matched",
            "look-alikes matched",
            "benign replies unchanged",
            "ms added to a reply of 32 tokens",
        ],  # fmt: skip
        rows=rows_out,
        notes=[
            f"ROUGE-L of what an attacker gets / share of replies that hold the whole target; means over the "
            f"memorised of {count} private rows (patient_doctor_qa; memorised: "
            f"{', '.join(map(str, memory))} by seed) and over seeds. Safe answers are one fixed sentence, "
            f"whose own ROUGE-L with the targets is what a replaced reply scores. Model: 2 layers, width 96, "
            "fresh weights, trained until it repeats them.",
            f"The paper's 27 % is 0.85 - 0.58, the threshold minus the mean after. By that definition the "
            f"default here gives 0.85 - {mean(shown, 0, 'rouge_after'):.2f}; the drop from the mean before "
            f"is {drop:.2f} ({100 * mean(shown, 0, 'relative_drop'):.0f} %).",
            "Benign: questions of the same source that the model never saw, none used for calibration; "
            "look-alikes: private questions with one clause of another patient's.",
        ],
        details=collected,
    )


def _guard_seed(seed: int, count: int, steps: int) -> dict[str, Any]:
    private = qa("patient_doctor_qa", count, skip=count * seed, longest=200)
    public = qa("patient_doctor_qa", 140, skip=count * 4, longest=200)
    sources = Dataset.from_list(
        [row | {"instruction": None, "history": [], "source": "p"} for row in private]
    )
    data = Dataset.from_list(sources.to_list(), features=DIALOGUE)
    texts = [f"{r['question']}\n{r['answer']}" for r in private + public]
    base = trainer.small_model(
        texts, WORK / f"guard-base-{seed}", {"hidden_size": 96, "num_layers": 2, "vocabulary": 1500}, seed
    )
    options = {
        "max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 6e-3, "max_length": 256,
        "disable_tqdm": True, "logging_steps": 50, "save_strategy": "no",
    }  # fmt: skip
    folder = trainer.train_sft(base, data, WORK / "models", options, seed=seed)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(str(folder)).eval(),
        AutoTokenizer.from_pretrained(str(folder)),
    )
    samples = [Sample(f"s{i}", r["question"], r["answer"]) for i, r in enumerate(private)]
    found = search_memory(model, tokenizer, samples, batch_size=16)
    risky = [s for s, m in zip(samples, found, strict=True) if m.memorised]
    questions = [r["question"] for r in public]
    half = 100
    rng = random.Random(seed)
    alike = []
    for sample in risky:
        parts = re.split(r"(?<=[，。？！,?!])", sample.prompt)
        other = re.split(r"(?<=[，。？！,?!])", rng.choice(questions[half:]))
        alike.append("".join([*parts[:-1][: max(1, len(parts) // 2)], *other[len(other) // 2 :]]))
    designs, memo = {}, {}
    for name, changes in _DESIGNS.items():
        fixed = changes.get("threshold")
        options = {"store": "numpy", "output_guard": "off"} | changes
        if fixed is not None:
            # A guard refuses to start with this threshold; it is put in place behind its back.
            options |= {"min_tpr": 0.0, "max_fpr": 0.5, "threshold": None}
        config = PPVDConfig(**options)
        built = PrivacyPreservingVectorDB.build(
            model, tokenizer, risky, ["这个问题涉及个人情况，请直接咨询您的医生。"] * len(risky),
            questions[:half],
            config=config, key=b"k" * 32,
        )  # fmt: skip
        if fixed is not None and built.calibration is not None:
            built.calibration = built.calibration._replace(threshold=fixed)
        designs[name] = evaluate_guard(
            built,
            risky,
            {"benign": questions[half:], "look-alikes": alike},
            paraphrases=[_paraphrase(s.prompt) for s in risky],
            max_new_tokens=8 + max(len(answer_ids(tokenizer, s.answer)) for s in risky),
            batch_size=24,
            memo=memo,
        ) | {
            "calibration": built.calibration and built.calibration._asdict(),
            "added_ms": _added_ms(built, questions[half : half + 6]),
        }
        print(f"seed {seed}: {name}", flush=True)
    return {"memorised": f"{len(risky)}/{len(samples)}", "designs": designs}


def _added_ms(
    built: PrivacyPreservingVectorDB, questions: Sequence[str], num_tokens: int = 32
) -> list[float]:
    """CPU milliseconds that the guard adds to one reply of fixed length, a figure a question."""
    model, tokenizer = built.reader.model, built.reader.tokenizer
    found = []
    for question in questions:
        ids = torch.tensor([prompt_ids(tokenizer, question)])
        best = []
        for generate in (model.generate, built.generate):
            times = []
            for _ in range(3):
                start = time.process_time()
                generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                    min_new_tokens=num_tokens, max_new_tokens=num_tokens, pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
                times.append(time.process_time() - start)
            best.append(min(times))
        found.append(1000 * (best[1] - best[0]))
    return found


# --- SFT on processed against raw rows
# -----------------------------------------------------------------------


@torch.no_grad()
def _heldout_nll(folder: Path, rows: Sequence[dict[str, str]]) -> float:
    """Mean negative log-likelihood of answer tokens, nats."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(str(folder)).eval(),
        AutoTokenizer.from_pretrained(str(folder)),
    )
    total, count = 0.0, 0
    for row in rows:
        prompt, answer = prompt_ids(tokenizer, row["question"]), answer_ids(tokenizer, row["answer"])
        ids = torch.tensor([[*prompt, *answer]])
        logs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= logs.gather(1, torch.tensor(answer)[:, None]).sum().item()
        count += len(answer)
    return total / count


def sft(seeds: Sequence[int], count: int, steps: int) -> None:
    """Equal updates on raw rows (with planted defects), processed rows, and rows before planting."""
    heldout = qa("huatuo_kg", 150, skip=2000, longest=250)
    collected: dict[str, list[float]] = {}
    sizes: dict[str, list[int]] = {}
    for seed in seeds:
        clean = qa("huatuo_kg", count, longest=250)
        dirty, _ = plant(clean, seed, share=0.09)
        rows = Dataset.from_list(
            [r | {"instruction": None, "history": [], "source": "x"} for r in dirty], features=DIALOGUE
        )
        ops = [
            {"clean_html_mapper": {"text_key": ["question", "answer"]}},
            {"pii_redaction_mapper": {"text_key": ["question", "answer"]}},
            {"character_repetition_filter": {"text_key": "answer"}},
            {"special_characters_filter": {"text_key": "answer", "max_ratio": 0.35}},
            {"words_num_filter": {"text_key": "answer", "min_num": 5}},
            {"document_minhash_deduplicator": {"text_key": ["question", "answer"]}},
            {"llm_quality_score_filter": {"lang": "zh"}},
        ]
        context = OpContext(clients={"default": ScriptedChat(scorer(dirty))})
        processed = run_ops(rows, [make_op(op) for op in ops], context)
        without_rule = run_ops(rows, [make_op(op) for op in ops[:-1]], OpContext())
        before = Dataset.from_list(
            [r | {"instruction": None, "history": [], "source": "x"} for r in clean], features=DIALOGUE
        )
        texts = [f"{r['question']}\n{r['answer']}" for r in clean]
        base = trainer.small_model(
            texts, WORK / f"sft-base-{seed}", {"hidden_size": 96, "num_layers": 2, "vocabulary": 1500}, seed
        )
        options = {
            "max_steps": steps, "per_device_train_batch_size": 16, "learning_rate": 3e-3, "max_length": 256,
            "disable_tqdm": True, "logging_steps": 50, "save_strategy": "no",
        }  # fmt: skip
        for name, data in (
            ("raw with planted defects", rows),
            ("processed", processed),
            ("processed, no quality score", without_rule),
            ("before planting", before),
        ):
            folder = trainer.train_sft(base, data, WORK / "models", options, seed=seed)
            path = Path(folder) / "heldout.json"
            if not path.is_file():
                path.write_text(json.dumps(_heldout_nll(folder, heldout)))
            collected.setdefault(name, []).append(json.loads(path.read_text()))
            sizes.setdefault(name, []).append(len(data))
    raw = collected["raw with planted defects"]
    rows_out = []
    for name, values in collected.items():
        gain = [b - a for a, b in zip(values, raw, strict=True)]
        rows_out.append(
            [name, statistics.mean(sizes[name]),
             f"{statistics.mean(values):.4f} ({min(values):.4f}-{max(values):.4f})",
             f"{statistics.mean(gain):+.4f} ({min(gain):+.4f} to {max(gain):+.4f})"]
        )  # fmt: skip
    write_result(
        "dpf_cm_sft",
        command="python -m benchmarks.dpf_cm_runs sft",
        config={"rows": count, "steps": steps, "share": 0.09},
        seeds=seeds,
        packages=PACKAGES,
        columns=[
            "training rows",
            "number",
            "held-out NLL of answers, nats (range over seeds)",
            "gain over raw, same seed",
        ],
        rows=rows_out,
        notes=[
            f"huatuo_kg; {steps} updates of 16 in every arm, same weights and seed to start from; 150 "
            "held-out pairs; model of 2 layers, width 96. Seven kinds of defects planted on 9 % of rows "
            "each; the scorer is a rule.",
        ],
        details={"nll": collected, "rows": sizes},
    )


def main() -> None:
    """Run the parts that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help="defects, denoise, guard, sft; all by default")
    parser.add_argument(
        "--short", action="store_true", help="tiny settings; writes nothing into docs/results"
    )
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas between")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    if args.short:
        import benchmarks.record

        benchmarks.record.write_result.__kwdefaults__["folder"] = WORK / "short"
    small = args.short
    seeds = (0,) if small else tuple(int(word) for word in args.seeds.split(","))
    parts: dict[str, Callable[[], None]] = {
        "defects": lambda: defects(seeds, 200 if small else 500),
        "denoise": lambda: denoise(seeds, 60 if small else 160, 5 if small else 40),
        "guard": lambda: guard(seeds, 8 if small else 24, 60 if small else 240),
        "sft": lambda: sft(seeds, 200 if small else 600, 10 if small else 45),
    }
    for name in args.parts or parts:
        if name not in parts:
            parser.error(f"no part {name!r}; there are {', '.join(parts)}")
        parts[name]()
        print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
