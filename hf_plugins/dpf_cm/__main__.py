"""``mmhf dpf-cm run RECIPE``: data, training and guard of a medical model; ``mmhf dpf-cm ppvd``: the guard.

``mmhf dpf-cm ops`` lists the data operators. ``run`` also works under ``accelerate launch -m
hf_plugins.dpf_cm run``.
"""

import argparse
import dataclasses
import inspect
import json
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_plugins.dpf_cm.config import STAGES, PPVDConfig
from hf_plugins.process_group import run_command
from hf_plugins.whole_files import write_json, write_text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        0 if all is well, 2 if the command could not run.
    """
    parser = argparse.ArgumentParser(
        prog="mmhf dpf-cm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run a recipe, or some of its stages")
    run.add_argument("recipe", help="YAML file; its keys are the options of RecipeConfig")
    run.add_argument("--stage", default="", metavar="A,B,...", help=f"of {', '.join(STAGES)}; all by default")
    commands.add_parser("ops", help="list the data operators with their parameters")
    _add_ppvd(commands.add_parser("ppvd", help="search memory, build, change, attack or serve a guard"))
    args = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_plugins.dpf_cm").setLevel(logging.INFO)
    try:
        return {"run": _run, "ops": _ops, "ppvd": _ppvd}[args.command](args)
    except ModuleNotFoundError:
        raise  # `mmhf` names the extra that brings it.
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _progress(what: str, done: int, total: int) -> None:
    end = "\n" if done >= total else "\r"
    print(f"{what}: {done}/{total}", end=end, file=sys.stderr, flush=True)


def _run(args: argparse.Namespace) -> int:
    from hf_plugins.dpf_cm.agent import Pipeline

    pipeline = Pipeline.from_yaml(args.recipe, progress=_progress)
    results = pipeline.run([word for word in args.stage.split(",") if word] or None)
    for stage, value in results.items():
        brief = {k: v for k, v in value.items() if k != "leakage"} if isinstance(value, dict) else value
        print(f"{stage}: {brief}")
        for attack in value.get("leakage", {}).get("attacks", ()) if isinstance(value, dict) else ():
            print(
                f"  {attack['attack']}: ROUGE-L {attack['rouge_before']:.2f} -> {attack['rouge_after']:.2f}, "
                f"whole answers {attack['exact_before']:.0%} -> {attack['exact_after']:.0%}"
            )
    print(f"report: {pipeline.work / 'report.html'}")
    return 0


def _ops(args: argparse.Namespace) -> int:
    import hf_plugins.dpf_cm.dataset  # noqa: F401
    from hf_plugins.data_ops import operators

    for name, cls in operators().items():
        fields = ", ".join(
            f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
            for f in dataclasses.fields(cls)
        )
        print(f"{name}({fields})\n    {(inspect.getdoc(cls) or '').splitlines()[0]}")
    return 0


def _add_ppvd(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True)

    def action(name: str, text: str, *, model: bool = True) -> argparse.ArgumentParser:
        found = actions.add_parser(name, help=text)
        if model:
            found.add_argument("model", help="folder of the guarded model")
            found.add_argument("--key-file", help="file of 32 bytes that seals or sketches the store")
            found.add_argument("--place", help="URI of the store, if it is not inside the folder")
        return found

    action("key", "make a key file", model=False).add_argument("file")
    search = action("search", "find the private samples that the model repeats")
    search.add_argument("--samples", required=True, help="JSON lines of id, prompt (or question), answer")
    search.add_argument("--out", required=True, help="file of the memorised samples; a killed search goes on")
    search.add_argument(
        "--threshold", type=float, default=0.85, help="ROUGE-L above which a sample is memorised"
    )
    search.add_argument(
        "--screen", type=float, help="skip samples of less teacher-forced agreement, for example 0.5"
    )
    search.add_argument("--batch-size", type=int, default=8)
    build = action("build", "make a guard of memorised samples")
    build.add_argument("folder", help="where the guard goes")
    build.add_argument("--samples", required=True, help="JSON lines of id, prompt, answer; perhaps safe")
    build.add_argument("--benign", required=True, help="JSON lines or text of public prompts")
    build.add_argument("--safe-reply", help="what is said where a sample has no `safe` answer of its own")
    for option in dataclasses.fields(PPVDConfig):
        build.add_argument(
            "--" + option.name.replace("_", "-"), help=option.metadata["help"].replace("%", "%%")
        )
    add = action("add", "add memorised samples")
    add.add_argument("folder")
    add.add_argument("--samples", required=True)
    add.add_argument("--safe-reply")
    forget = action("forget", "erase samples, in every version on disk")
    forget.add_argument("folder")
    forget.add_argument("ids", nargs="+")
    attack = action("attack", "attack the model with and without its guard")
    attack.add_argument("folder")
    attack.add_argument("--samples", required=True)
    attack.add_argument("--benign", required=True, help="prompts that took no part in calibration")
    attack.add_argument("--out", type=Path, required=True, help="folder of report.json and report.html")
    serve = action("serve", "stand as a proxy in front of an OpenAI-compatible server")
    serve.add_argument("folder")
    serve.add_argument("--upstream", required=True, help="for example http://127.0.0.1:8000/v1")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8900)


def _rows(path: str) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        if path.endswith(".txt"):
            found.append({"prompt": line})
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: no JSON. One object a line: id, prompt, answer.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: a line must be an object with prompt and answer.")
        found.append(row)
    return found


def _samples(path: str) -> list[Any]:
    from hf_plugins.data_ops.op import digest
    from hf_plugins.dpf_cm.model import Sample

    found = []
    for number, row in enumerate(_rows(path), 1):
        prompt, answer = row.get("prompt", row.get("question")), row.get("answer")
        if not (isinstance(prompt, str) and isinstance(answer, str) and prompt and answer):
            raise ValueError(f"{path}: row {number} lacks prompt (or question) and answer as texts.")
        found.append(Sample(str(row.get("id") or digest(prompt, answer)[:20]), prompt, answer))
    return found


def _prompts(path: str) -> list[str]:
    found = [row.get("prompt", row.get("question", row.get("text"))) for row in _rows(path)]
    if not found or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{path}: every row needs a text under prompt, question or text.")
    return found


def _load(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder!r}; save it there first, nothing is downloaded.")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def _options(args: argparse.Namespace) -> PPVDConfig:
    values: dict[str, Any] = {}
    for option in dataclasses.fields(PPVDConfig):
        given = getattr(args, option.name)
        if given is None:
            continue
        try:
            values[option.name] = _value(option, given)
        except ValueError as error:
            raise ValueError(
                f"--{option.name.replace('_', '-')}: {given!r} is no value of type {option.type}."
            ) from error
    return PPVDConfig(**values)


def _value(option: Any, given: str) -> Any:
    kind = str(option.type)
    if "tuple" in kind:
        return tuple(float(word) for word in given.split(",") if word)
    if "bool" in kind:
        if given.lower() not in ("true", "false"):
            raise ValueError(given)
        return given.lower() == "true"
    return int(given) if "int" in kind else float(given) if "float" in kind else given


def _ppvd(args: argparse.Namespace) -> int:
    if args.action == "key":
        # Readable by its owner alone, and never written over.
        with os.fdopen(os.open(args.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        print(f"{args.file}: 32 bytes; keep it away from the guard's folder")
        return 0
    from hf_plugins.dpf_cm.metric import search_memory
    from hf_plugins.dpf_cm.model import PrivacyPreservingVectorDB

    key = Path(args.key_file).read_bytes() if args.key_file else None
    options = _options(args) if args.action == "build" else None
    samples = _samples(args.samples) if hasattr(args, "samples") else []
    benign = _prompts(args.benign) if hasattr(args, "benign") else []
    model, tokenizer = _load(args.model)
    if args.action == "search":
        return _search(args, search_memory, model, tokenizer, samples)
    if args.action == "build":
        given = [row.get("safe", args.safe_reply) for row in _rows(args.samples)]
        if not all(isinstance(text, str) for text in given):
            raise ValueError(
                "some samples have no safe answer; give `safe` in each row, or --safe-reply TEXT."
            )
        guard = PrivacyPreservingVectorDB.build(
            model,
            tokenizer,
            samples,
            given,
            benign,
            config=options,
            folder=args.folder,
            place=args.place,
            key=key,
        )
        print(f"{args.folder}: {len(guard)} samples, {guard.calibration}")
        return 0
    guard = PrivacyPreservingVectorDB.open(args.folder, model, tokenizer, place=args.place, key=key)
    return {"add": _add, "forget": _forget, "attack": _attack, "serve": _serve}[args.action](
        args, guard, samples, benign
    )


def _search(args: argparse.Namespace, search: Any, model: Any, tokenizer: Any, samples: list[Any]) -> int:
    journal = f"{args.out}.journal"
    found = search(
        model,
        tokenizer,
        samples,
        threshold=args.threshold,
        screen=args.screen,
        batch_size=args.batch_size,
        journal=journal,
        progress=lambda done, total: _progress("memory search", done, total),
    )
    rows = [
        {"id": s.id, "prompt": s.prompt, "answer": s.answer, "rouge": r.rouge}
        for s, r in zip(samples, found, strict=True)
        if r.memorised
    ]
    write_text(args.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{args.out}: {len(rows)} of {len(samples)} samples are memorised")
    return 0


def _add(args: argparse.Namespace, guard: Any, samples: list[Any], benign: list[str]) -> int:
    given = [row.get("safe", args.safe_reply) for row in _rows(args.samples)]
    if not all(isinstance(text, str) for text in given):
        raise ValueError("some samples have no safe answer; give `safe` in each row, or --safe-reply TEXT.")
    guard.add(samples, given)
    print(f"{args.folder}: {len(guard)} samples, {guard.calibration}")
    return 0


def _forget(args: argparse.Namespace, guard: Any, samples: list[Any], benign: list[str]) -> int:
    count = guard.forget(args.ids)
    print(f"{args.folder}: {count} of {len(args.ids)} samples erased, {len(guard)} left")
    return 0


def _attack(args: argparse.Namespace, guard: Any, samples: list[Any], benign: list[str]) -> int:
    from hf_plugins.dpf_cm.metric import evaluate_guard
    from hf_plugins.dpf_cm.page import render_page

    report = evaluate_guard(
        guard, samples, {"benign": benign}, progress=lambda done, total: _progress("attacks", done, total)
    )
    write_json(args.out / "report.json", report)
    write_text(args.out / "report.html", render_page({"title": "Guard under attack", "leakage": report}))
    for row in report["attacks"]:
        print(f"{row['attack']}: ROUGE-L {row['rouge_before']:.3f} -> {row['rouge_after']:.3f}")
    print(f"report: {args.out / 'report.html'}")
    return 0


def _serve(args: argparse.Namespace, guard: Any, samples: list[Any], benign: list[str]) -> int:
    from hf_plugins.dpf_cm.server import GuardProxy

    proxy = GuardProxy(guard, args.upstream, host=args.host, port=args.port)
    print(f"guarding {args.upstream} on http://{args.host}:{proxy.port}/v1", flush=True)
    try:
        proxy.serve_forever()
    except KeyboardInterrupt:
        proxy.close()
    return 0


if __name__ == "__main__":
    run_command(main)
