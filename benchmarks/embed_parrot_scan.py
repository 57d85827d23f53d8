"""Real scans: a pretrained encoder and a causal model trained here, English and Chinese text, every attack at
every layer, defences against attackers that adapt, and the paper's four qualitative findings checked.

``python -m benchmarks.embed_parrot_scan`` goes on where an interrupted run stopped. It needs the data folder
(`tools/real_data.py`) and a small language model (``python tools/small_lm.py work_dirs/small_lm``).
"""

import argparse
import json
import logging
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.record import RESULTS, write_result
from hf_plugins.embed_parrot import LeakScanConfig, render_page, scan
from hf_plugins.whole_files import write_json
from tools.real_data import ROOT, data_set, minilm, read_rows, read_text

SEEDS = (0, 1, 2)
COMMAND = "python -m benchmarks.embed_parrot_scan"
PACKAGES = ("transformers",)
MODELS = {"MiniLM": "encoder, 6 layers", "small LM": "causal, 10 layers"}


def finance() -> list[str]:
    """Sentences of the financial phrasebank."""
    return [row["sentence"] for row in read_rows(data_set("financial_phrasebank") / "train.jsonl.gz")]


def control() -> list[str]:
    """Plain paragraphs of WikiText-2, the general-text control; its test part: no model here saw it."""
    lines = read_text(data_set("lm_text") / "wikitext2_test_part1.txt.gz").split("\n")
    return [line.strip() for line in lines if len(line) > 80 and not line.strip().startswith("=")]


def chinese() -> list[str]:
    """Chinese medical questions."""
    rows = read_rows(data_set("zh_medical") / "huatuo_kg.jsonl.gz")
    return [row["instruction"] for row in rows if 10 < len(row["instruction"]) < 60]


def english_sets(count: int) -> tuple[dict[str, list[str]], list[str]]:
    """Test sets (finance short and long, control) and finance text for fitting, disjoint."""
    texts = finance()
    tests, public = texts[3200:], texts[:3200]
    sets = {
        "finance, under 13 words": [text for text in tests if len(text.split()) < 13][:count],
        "finance, over 25 words": [text for text in tests if len(text.split()) > 25][:count],
        "general text (control)": control()[:count],
    }
    return sets, public


def load(name: str, small_lm: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    if name == "MiniLM":
        return AutoModel.from_pretrained(minilm()), AutoTokenizer.from_pretrained(minilm())
    return AutoModelForCausalLM.from_pretrained(small_lm), AutoTokenizer.from_pretrained(small_lm)


def jobs(scale: float) -> dict[str, dict[str, Any]]:
    """Every scan by name: model, text, options. ``scale`` shortens all of it for a trial."""
    tests = max(4, int(40 * scale))
    english, public = english_sets(tests)
    zh = chinese()
    zh_tests, zh_public = {"Chinese medical": zh[:tests]}, zh[tests:]
    base: dict[str, Any] = {
        "num_test": tests,
        "num_fit": max(30, int(2500 * scale)),
        "num_calibrate": max(4, int(30 * scale)),
        "seeds": SEEDS if scale == 1 else (0,),
        "parrot_steps": max(4, int(400 * scale)),
        "parrot_lr": 3e-3,
        "parrot_batch": 8,
        "max_length": 48,
        "vocab_tokens": max(20, int(40 * scale)),
        "bootstrap": 500,
    }
    plain = ("bei", "bei_norm", "hei", "ridge")
    finance_only = {name: texts for name, texts in english.items() if "control" not in name}
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, model: str, data: dict[str, list[str]], fit: list[str], **options: Any) -> None:
        found[name] = {"model": model, "data": data, "fit": fit, "options": {**base, **options}}

    add("minilm-english", "MiniLM", english, public, attacks=plain, layers=tuple(range(7)))
    add("minilm-english-parrot", "MiniLM", english, public, attacks=("parrot",), layers=(6,))
    searched = (*plain, "vocab")
    # Exact matching reads every token at every layer; few tokens are enough to see it.
    few = {"layers": tuple(range(11)), "vocab_tokens": 20}
    add("small-lm-english", "small LM", english, public, attacks=searched, **few)
    add("small-lm-english-parrot", "small LM", english, public, attacks=("parrot",), layers=(10,))
    # The trained attack layer by layer, in jobs of their own so that each can be run alone.
    for start, layers in (("front", (0, 1, 2)), ("middle", (4, 5))):
        add(f"minilm-english-parrot-{start}", "MiniLM", english, public, attacks=("parrot",), layers=layers)
    for start, layers in (("front", (0, 1, 2)), ("middle", (3, 4, 5, 6)), ("deep", (7, 8, 9))):
        name = f"small-lm-english-parrot-{start}"
        add(name, "small LM", english, public, attacks=("parrot",), layers=layers)
    for short, model, cut in (("minilm", "MiniLM", 3), ("small-lm", "small LM", 5)):
        add(
            f"{short}-parrot-defended",
            model,
            english,
            public,
            attacks=("parrot",),
            layers=(cut,),
            defences=("none", "dct:window=8"),
        )
    add("minilm-chinese", "MiniLM", zh_tests, zh_public, attacks=plain, layers=(0, 3, 6))
    add("minilm-chinese-parrot", "MiniLM", zh_tests, zh_public, attacks=("parrot",), layers=(6,))
    add("small-lm-chinese", "small LM", zh_tests, zh_public, attacks=searched, layers=(0, 1, 5, 10))
    add("small-lm-chinese-parrot", "small LM", zh_tests, zh_public, attacks=("parrot",), layers=(10,))
    kinds = ("none", "dct:window=8", "gauss:0.5", "gauss:2", "int8", "permute")
    # Nothing is trained by gradient here, so one seed of the noise over all tokens will do.
    less = {"num_fit": max(30, int(1000 * scale)), "attacks": ("hei", "ridge"), "seeds": (0,)}
    add("minilm-defences", "MiniLM", finance_only, public, layers=(3, 6), defences=(*kinds, "dx:60"), **less)
    add(
        "small-lm-defences",
        "small LM",
        finance_only,
        public,
        layers=(1, 5),
        defences=(*kinds, "dx:30"),
        **less,
    )
    # Where noise keeps the search from settling every token of the vocabulary is tried, so few are taken.
    add(
        "small-lm-defences-exact",
        "small LM",
        dict([next(iter(finance_only.items()))]),
        public,
        attacks=("ridge", "vocab"),
        layers=(1, 5),
        defences=(*kinds, "dx:30"),
        seeds=(0,),
        vocab_tokens=20,
    )
    variants: dict[str, dict[str, Any]] = {
        "bidirectional": {"parrot_causal": False},
        "cross entropy": {"parrot_loss": "cosine_ce"},
        "ridge skip": {"parrot_skip": True},
    }
    for name, options in variants.items():
        key = f"variant-{name.replace(' ', '-')}"
        add(key, "small LM", finance_only, public, attacks=("parrot",), layers=(10,), **options)
        found[key]["variant"] = name
    return found


def label_of(model: str, small_lm: Path) -> str:
    """Name of a model in the tables: a small LM of another length than the default one says so."""
    note = small_lm / "small_lm.json"
    if model != "small LM" or not note.is_file():
        return model
    steps = json.loads(note.read_text(encoding="utf-8"))["settings"]["num_steps"]
    return model if steps == 1600 else f"{model}, {steps} steps"


def run_job(name: str, job: Mapping[str, Any], work: Path, small_lm: Path) -> dict[str, Any]:
    """One scan, or its stored report."""
    done = work / name / "report.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    model, tokenizer = load(job["model"], small_lm)
    report = scan(
        model,
        job["data"],
        tokenizer=tokenizer,
        fit_texts=job["fit"],
        config=LeakScanConfig(**job["options"]),
        work_dir=work / name / "parts",
        name=f"{job['model']} ({MODELS[job['model']]})",
    )
    report["label"] = label_of(job["model"], small_lm)
    (work / name / "report.html").write_text(render_page(report), encoding="utf-8")
    write_json(done, report)
    return report


def cells(report: Mapping[str, Any], **wanted: Any) -> list[Mapping[str, Any]]:
    """Rows of a report whose fields have the wanted values."""
    return [row for row in report["cells"] if all(row[key] == value for key, value in wanted.items())]


def accuracy(report: Mapping[str, Any], **wanted: Any) -> float | None:
    """Mean share of tokens over the rows wanted, or None if there is none."""
    rows = cells(report, **wanted)
    return statistics.fmean(row["token_acc"][0] for row in rows) if rows else None


def percent(value: float | None) -> str:
    """A share in per cent, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def with_seeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Mean and range over seeds of the mean over sets, in per cent."""
    if not rows:
        return "-"
    per_seed = [
        100 * statistics.fmean(values) for values in zip(*(row["per_seed"] for row in rows), strict=True)
    ]
    mean = f"{statistics.fmean(per_seed):.1f}"
    return mean if len(per_seed) == 1 else f"{mean} ({min(per_seed):.1f}-{max(per_seed):.1f})"


def merged(reports: Mapping[str, Mapping[str, Any]], short: str, language: str) -> dict[str, Any]:
    """One report of all scans of a model and language; where two hold the same cell, that with more seeds."""
    names = [name for name in reports if name.startswith(f"{short}-{language}")]
    names += [name for name in (f"{short}-parrot-defended",) if name in reports and language == "english"]
    rows: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for name in names:
        for row in cells(reports[name], defence="none"):
            key = (row["attack"], row["layer"], row["set"])
            if key not in rows or len(row["per_seed"]) > len(rows[key]["per_seed"]):
                rows[key] = row
    return {**reports[names[0]], "cells": list(rows.values())}


def by_model(reports: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """Reports of each model: beginning of their names, model, reports."""
    found = []
    for short, model in (("minilm", "MiniLM"), ("small-lm", "small LM")):
        mine = {name: report for name, report in reports.items() if name.startswith(short)}
        for label in dict.fromkeys(report.get("label", model) for report in mine.values()):
            chosen = {name: r for name, r in mine.items() if r.get("label", model) == label}
            found.append((short, label, chosen))
    return found


def attack_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Model x text x layer: what each attack reads back."""
    rows = []
    for short, model, mine in by_model(reports):
        found = [
            merged(mine, short, language)
            for language in ("english", "chinese")
            if any(name.startswith(f"{short}-{language}") for name in mine)
        ]
        for report in found:
            for text in dict.fromkeys(row["set"] for row in report["cells"]):
                for layer in sorted({row["layer"] for row in cells(report, set=text)}):
                    here = {"set": text, "layer": layer}
                    norm = cells(report, attack="bei_norm", **here)
                    shifted = norm or cells(report, attack="bei", **here)
                    rows.append(
                        [model, text, layer]
                        + [percent(accuracy(report, attack=a, **here)) for a in ("bei", "hei", "ridge")]
                        + [with_seeds(cells(report, attack="parrot", **here))]
                        + [percent(accuracy(report, attack="vocab", **here))]
                        + [percent(shifted[0]["shifted_acc"] if shifted else None)]
                    )
    return rows


def defence_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Model x defence x cut: best naive and best adaptive attack, and what is left of the model's use."""
    rows = []
    for name in ("minilm-defences", "small-lm-defences"):
        if name not in reports:
            continue
        report = dict(reports[name])
        if f"{name}-exact" in reports:
            report["cells"] = report["cells"] + cells(reports[f"{name}-exact"], attack="vocab")
        for spec in dict.fromkeys(row["defence"] for row in report["cells"]):
            for layer in sorted({row["layer"] for row in report["cells"]}):
                best = {}
                for views in (("naive",), ("naive", "adaptive")):
                    found = {
                        (view, attack): accuracy(report, defence=spec, view=view, layer=layer, attack=attack)
                        for view in views
                        for attack in ("hei", "ridge", "vocab")
                    }
                    known = {key: value for key, value in found.items() if value is not None}
                    top = max(known, key=known.__getitem__, default=None)
                    best[views[-1]] = "-" if top is None else f"{100 * known[top]:.1f} ({top[1]})"
                use = {
                    entry["metric"]: entry["value"]
                    for entry in report["utility"]
                    if entry["defence"] == spec and entry["layer"] in (layer, None)
                }
                if "perplexity" in use:
                    text = f"perplexity {use['perplexity']:.4g}"
                else:
                    text = f"cosine {use['pooled_cosine']:.3f}"
                model = "MiniLM" if name.startswith("minilm") else "small LM"
                rows.append([model, spec, layer, best["naive"], best["adaptive"], text])
    return rows


def finding_rows(reports: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """The paper's four qualitative findings, the figures that bear on each, and whether they hold here."""
    rows = []
    for short, model, mine in by_model(reports):
        if f"{short}-english" in mine:
            rows += depth_findings(merged(mine, short, "english"), model)
        if f"{short}-parrot-defended" in mine:
            rows.append(defence_finding(mine[f"{short}-parrot-defended"], model))
    return sorted(rows, key=lambda row: row[0])


def depth_findings(report: Mapping[str, Any], model: str) -> list[list[Any]]:
    """Findings 1 to 3 of one model."""
    names = ("bei", "hei", "ridge", "parrot")
    layers = [{row["layer"] for row in cells(report, attack=a)} for a in names]
    last = max(set.intersection(*(found for found in layers if found)))
    at = {layer: {a: accuracy(report, attack=a, layer=layer) for a in names} for layer in (0, 1, last)}
    drop = {a: (at[0][a] or 0) - (at[last][a] or 0) for a in ("bei", "hei")}
    text = ", ".join(
        f"{a.upper()} {percent(at[0][a])} -> {percent(at[1][a])} -> {percent(at[last][a])}" for a in drop
    )
    deep = at[last]
    rows = [
        [
            "1: BEI and HEI are good only near the input",
            model,
            f"layers 0, 1, {last}: {text}",
            "yes" if min(drop.values()) > 0.5 else "in part" if min(drop.values()) > 0.1 else "no",
        ]
    ]
    if deep["parrot"] is None:
        return rows
    rows.append(
        [
            "2: EP beats BEI and HEI in the last layer",
            model,
            f"EP {percent(deep['parrot'])}, BEI {percent(deep['bei'])}, HEI {percent(deep['hei'])} "
            f"(ridge {percent(deep['ridge'])})",
            "yes" if deep["parrot"] > max(deep["bei"] or 0, deep["hei"] or 0) else "no",
        ]
    )
    sets = dict.fromkeys(row["set"] for row in report["cells"])
    share = {text: accuracy(report, attack="parrot", layer=last, set=text) or 0.0 for text in sets}
    worst = max(share.values()) - min(share.values())
    rows.append(
        [
            "3: EP is robust to length and to other text",
            model,
            f"EP at layer {last}: " + ", ".join(f"{text} {percent(value)}" for text, value in share.items()),
            "yes" if worst < 0.1 else "in part" if worst < 0.3 else "no",
        ]
    )
    return rows


def defence_finding(report: Mapping[str, Any], model: str) -> list[Any]:
    """Finding 4 of one model."""
    plain = accuracy(report, defence="none") or 0.0
    naive = accuracy(report, defence="dct:window=8", view="naive") or 0.0
    adaptive = accuracy(report, defence="dct:window=8", view="adaptive") or 0.0
    return [
        "4: the transform lowers EP's recovery",
        model,
        f"layer {report['cells'][0]['layer']}, window 8: EP {percent(plain)} plain, {percent(naive)} naive, "
        f"{percent(adaptive)} adaptive",
        f"naive: {'yes' if naive < plain - 0.05 else 'no'}; "
        f"adaptive: {'yes' if adaptive < plain - 0.05 else 'no'}",
    ]


def variant_rows(
    reports: Mapping[str, Mapping[str, Any]], known: Mapping[str, Mapping[str, Any]]
) -> list[list[Any]]:
    """Parrots of the small model's last layer: the paper's form and ours, and ridge beside them."""
    if "small-lm-english" not in reports:
        return []
    english = merged(reports, "small-lm", "english")
    finance_only = [
        row for row in english["cells"] if row["layer"] == 10 and row["set"].startswith("finance")
    ]
    rows = []
    for attack, label in (
        ("ridge", "ridge (no training)"),
        ("parrot", "parrot as in the paper: cosine, causal"),
    ):
        mine = [row for row in finance_only if row["attack"] == attack]
        if not mine:
            continue
        rows.append([label, with_seeds(mine)])
    for name, job in known.items():
        if "variant" in job and name in reports:
            rows.append([f"parrot, {job['variant']}", with_seeds(cells(reports[name], attack="parrot"))])
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Scan, write the result files, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "work_dirs" / "embed_parrot_scan", help="folder of parts"
    )
    parser.add_argument(
        "--small-lm", type=Path, default=ROOT / "work_dirs" / "small_lm", help="folder of the causal model"
    )
    parser.add_argument("--only", nargs="+", default=[], help="names of scans to run, and no tables")
    parser.add_argument(
        "--tables", action="store_true", help="run nothing more, write tables of what is there"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--note", help="a remark to print below the tables")
    parser.add_argument("--short", action="store_true", help="one tiny scan, result not kept")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("hf_plugins.embed_parrot").setLevel(logging.INFO)
    transformers_logging.disable_progress_bar()
    if args.short:
        args.work = Path(tempfile.mkdtemp(prefix="benchmark-"))
        job = jobs(0.02)["minilm-chinese"]
        job["options"]["layers"] = (0, 6)
        report = run_job("short", job, args.work, args.small_lm)
        print(json.dumps({"benchmark": "embed_parrot_scan", "short": True, "cells": len(report["cells"])}))
        return 0
    known = jobs(1.0)
    wanted = args.only or ([] if args.tables else list(known))
    for name in wanted:
        run_job(name, known[name], args.work, args.small_lm)
    reports = {
        name: run_job(name, known[name], args.work, args.small_lm)
        for name in known
        if (args.work / name / "report.json").is_file()
    }
    missing = [name for name in known if name not in reports]
    if not args.only or args.tables:
        write_tables(reports, known, missing, args.out, remarks=[args.note] if args.note else [])
    print(json.dumps({"benchmark": "embed_parrot_scan", "scans": list(reports), "missing": missing}))
    return 0


def rounded(value: Any) -> Any:
    """Floats with four digits, so that the file stays small."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    return [rounded(item) for item in value] if isinstance(value, list) else value


def write_tables(
    reports: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Mapping[str, Any]],
    missing: Sequence[str],
    out: Path,
    *,
    remarks: Sequence[str] = (),
) -> None:
    """The four result files; a table none of whose scans is there is left out."""
    config = {name: {"model": known[name]["model"], **report["config"]} for name, report in reports.items()}
    absent = [f"Not run yet: {', '.join(missing)}."] if missing else []
    tokens = {name: report["tokens"] for name, report in reports.items()}

    def write(
        name: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        notes: Sequence[str],
        details: Any = None,
    ) -> None:
        if not rows:
            return
        write_result(
            name,
            command=COMMAND,
            config=config,
            seeds=list(SEEDS),
            packages=PACKAGES,
            columns=columns,
            rows=rows,
            notes=[*notes, *remarks, *absent],
            details=details,
            folder=out,
        )

    fields = (
        "defence",
        "view",
        "layer",
        "attack",
        "set",
        "num_tokens",
        "token_acc",
        "per_seed",
        "shifted_acc",
    )
    fields += ("token_f1", "rougeL", "bleu", "embedding_cosine", "seconds")
    lean = {
        name: [[rounded(row[key]) for key in fields] for row in report["cells"]]
        for name, report in reports.items()
    }
    write(
        "embed_parrot_scan",
        [
            "model",
            "text",
            "layer",
            "BEI",
            "HEI",
            "ridge",
            "EP, mean (range over seeds)",
            "vocabulary matching",
            "BEI, next token",
        ],
        attack_rows(reports),
        [
            "Per cent of tokens read back at their position, no defence. Ridge and EP are fitted on 2,500 "
            "finance sentences (Chinese: on Chinese questions), so the control is text of another kind. EP "
            "in the paper's form (causal decode model, cosine), 400 steps of 8 texts of a 2-layer GPT-2 of "
            "width 128; three seeds where a range stands, else one.",
            "The last column scores the model's own head (after the final norm where there is one) against "
            "the text moved by one token: what BEI really says at depth.",
            "The small LM's tokenizer is byte-level BPE learnt on English, so its Chinese tokens are "
            "mostly bytes; MiniLM's uncased vocabulary holds single Chinese characters, and those it lacks "
            "are all [UNK].",
        ],
        {"tokens": tokens, "fields": list(fields), "cells": lean},
    )
    write(
        "embed_parrot_findings",
        ["finding of the paper", "model", "here, per cent of tokens", "holds here"],
        finding_rows(reports),
        [
            "Means over the three English sets unless said otherwise; EP over three seeds. The paper's own "
            "figures are not public."
        ],
    )
    write(
        "embed_parrot_defences",
        [
            "model",
            "defence",
            "cut after layer",
            "naive attacker, best",
            "adaptive attacker, best",
            "use of the model",
        ],
        defence_rows(reports),
        [
            "Per cent of finance tokens read back by the best of HEI, ridge and (small LM) vocabulary "
            "matching of 20 tokens; one draw of each random defence. gauss:r is noise of r times the spread "
            "of an entry; dx:eta has mean length width / eta. Use of the model: perplexity on finance "
            "text, or the cosine of the encoder's pooled output to that of the plain encoder.",
        ],
        {
            "utility": {
                name: report["utility"] for name, report in reports.items() if name.endswith("-defences")
            }
        },
    )
    write(
        "embed_parrot_variants",
        ["attack on the small LM's last layer", "tokens read back, %, mean (range over seeds)"],
        variant_rows(reports, known),
        [
            "Finance text, mean of the short and the long set; 400 steps of 8 texts for each parrot.",
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
