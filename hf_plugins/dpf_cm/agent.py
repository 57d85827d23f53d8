"""`Pipeline`: a recipe from raw files to a guarded model, each step kept under its content key."""

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_plugins import recipes
from hf_plugins.data_ops.chat import ChatClient, TransformersChat, make_client
from hf_plugins.data_ops.llm_ops import LlmQualityScoreFilter
from hf_plugins.data_ops.op import (
    ROW_ID,
    DataOp,
    Ledger,
    OpContext,
    canonical,
    content_key,
    digest,
    make_op,
    run_ops,
)
from hf_plugins.data_ops.preference import (
    PreferenceDenoiseFilter,
    PreferenceVoteMapper,
    ResponseSamplingMapper,
)
from hf_plugins.dpf_cm import trainer
from hf_plugins.dpf_cm.config import STAGES, PPVDConfig, RecipeConfig
from hf_plugins.dpf_cm.dataset import read_sources
from hf_plugins.dpf_cm.hook import StateReader
from hf_plugins.dpf_cm.metric import evaluate_guard, search_memory
from hf_plugins.dpf_cm.model import PrivacyPreservingVectorDB, Sample
from hf_plugins.dpf_cm.page import render_page
from hf_plugins.whole_files import write_json, write_text

logger = logging.getLogger(__name__)
_MARKUP = (
    "clean_html_mapper",
    "clean_links_mapper",
    "clean_email_mapper",
    "clean_ip_mapper",
    "whitespace_normalization_mapper",
)


class Pipeline:
    """Runs a recipe or some stages; what a stage needs runs first, what is finished is taken from disk.

    Args:
        recipe: The options.
        base: Folder that the recipe's paths start from.
        clients: Language models by role, instead of the recipe's entries.
        progress: Told (what, done, total) during long work.
    """

    def __init__(
        self,
        recipe: RecipeConfig,
        *,
        base: str | Path = ".",
        clients: Mapping[str, ChatClient] | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.recipe, self.base, self.progress = recipe, Path(base), progress
        self.work = (self.base / recipe.work_dir).resolve()
        self.guard_options = PPVDConfig(**recipe.ppvd)
        self._key = self._read_key()
        for stage in ("cpt", "sft", "rm", "dpo"):
            trainer.stage_options(stage, getattr(recipe, stage), recipe.seed)
        if clients is None:
            cache = self.work / "llm_cache.db"
            clients = {role: make_client(spec, cache=cache) for role, spec in recipe.clients.items()}
        self.clients = dict(clients)
        self.notes: list[str] = []
        self._state = PartialState()
        # Wrong operators are found before the first row is read.
        self._cpt_ops, self._sft_ops = self._ops("cpt"), self._ops("sft")

    @classmethod
    def from_yaml(cls, path: str | Path, **options: Any) -> "Pipeline":
        """Read a recipe; its paths start from its folder.

        Raises:
            ValueError: If the file is no mapping or names an unknown option.
        """
        path = Path(path)
        values = recipes.read_recipe(path)
        known = {item.name for item in dataclasses.fields(RecipeConfig)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{path}: no option {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
        return cls(RecipeConfig(**values), base=options.pop("base", path.parent), **options)

    def _read_key(self) -> bytes | None:
        """The guard's key, checked before hours of training end at a store that cannot be made."""
        protect, file = self.guard_options.protect, self.recipe.key_file
        if file is None:
            if protect != "none":
                raise ValueError(
                    f"ppvd: protect={protect!r} needs key_file in the recipe; "
                    "`mmhf dpf-cm ppvd key FILE` makes one."
                )
            return None
        if protect == "none":
            raise ValueError(
                "key_file is given, and ppvd: protect is none, so nothing would be sealed. Set protect to "
                "encrypt or sketch, or leave key_file out."
            )
        path = self.base / file
        if path.resolve().is_relative_to(self.work.resolve()):
            raise ValueError(
                f"key_file {path} lies in work_dir, beside what it seals; keep it in another place, so that "
                "a copy of the folder does not open itself."
            )
        if not path.is_file():
            raise FileNotFoundError(f"no key in {path}; make one with `mmhf dpf-cm ppvd key {path}`.")
        key = path.read_bytes()
        if len(key) != 32:
            raise ValueError(
                f"key_file {path} holds {len(key)} bytes, not 32; make one with `mmhf dpf-cm ppvd key FILE`."
            )
        return key

    # -- operators --

    def _client(self, role: str) -> bool:
        return role in self.clients or "default" in self.clients

    def _without(self, what: str, role: str) -> None:
        note = f"{what} left out: no client serves the role {role!r}."
        if note not in self.notes:
            logger.warning("%s", note)
            self.notes.append(note)

    def _ops(self, kind: str) -> list[DataOp]:
        recipe = self.recipe
        given = {"cpt": recipe.cpt_ops, "sft": recipe.sft_ops}[kind]
        if given is not None:
            return [make_op(self._placed(spec)) for spec in given]
        key: Any = "text" if kind == "cpt" else ["question", "answer"]
        markup: list[Any] = [{name: {"text_key": key}} for name in _MARKUP]
        specs: list[Any] = []
        if kind == "cpt":
            specs = [
                {f"{name}_filter": {"text_key": key}}
                for name in ("character_repetition", "word_repetition", "special_characters")
            ]
            if recipe.perplexity_model:
                folder = str(self.base / recipe.perplexity_model)
                specs.append(
                    {
                        "perplexity_filter": {
                            "text_key": key,
                            "hf_model": folder,
                            "max_ppl": None,
                            "max_ratio": 0.05,
                        }
                    }
                )
            specs.append({"words_num_filter": {"text_key": key}})
            specs = specs + markup if recipe.paper_order else markup + specs
        else:
            specs.append({"document_minhash_deduplicator": {"text_key": key}})
            specs = specs if recipe.paper_order else markup[:1] + markup[-1:] + specs
            if self._client("scorer"):
                specs.append({"llm_quality_score_filter": {"lang": recipe.lang}})
            else:
                self._without("quality scores", "scorer")
            if self._client("optimizer"):
                specs.append({"optimize_qa_mapper": {"lang": recipe.lang}})
            else:
                self._without("optimisation", "optimizer")
        if recipe.eval_files:
            files = [str(self.base / file) for file in recipe.eval_files]
            eval_keys = list(recipe.eval_keys)
            specs.append(
                {
                    "ngram_decontamination_filter": {
                        "text_key": key,
                        "eval_files": files,
                        "eval_keys": eval_keys,
                    }
                }
            )
        return [make_op(spec) for spec in specs]

    def _placed(self, spec: Any) -> Any:
        """Paths inside an operator's parameters start from the recipe's folder too."""
        if not isinstance(spec, Mapping):
            return spec
        ((name, params),) = spec.items() if len(spec) == 1 else (("", spec),)
        params = dict(params or {})
        for key in ("hf_model", "hf_tokenizer", "seeds_file"):
            if isinstance(params.get(key), str):
                params[key] = str(self.base / params[key])
        if isinstance(params.get("eval_files"), list):
            params["eval_files"] = [str(self.base / file) for file in params["eval_files"]]
        return {name: params} if name else spec

    def _run_ops(self, name: str, read: Callable[[Ledger], Dataset], ops: Sequence[DataOp]) -> Dataset:
        """Read and process rows on the first process; the others take the stored result."""
        with self._state.main_process_first():
            context = OpContext(num_proc=self.recipe.num_proc, clients=self.clients, progress=self.progress)
            rows = read(context.ledger)
            unread = len(context.ledger.entries)
            result = run_ops(rows, ops, context, work_dir=self.work / "data")
        if self._state.is_main_process:
            context.ledger.save(self.work / f"{name}_ledger.parquet")
            self._write(
                f"{name}_flow.json",
                _flow(context.ledger, len(rows) + unread, ["read", *(op.name for op in ops)]),
            )
            samples = _changed_samples(rows, result)
            self._write(f"{name}_samples.json", samples)
        return result

    def _write(self, name: str, value: Any) -> None:
        write_json(self.work / name, value)

    def _read(self, sources: Sequence[Mapping[str, Any]], ledger: Ledger | None = None) -> Dataset:
        return read_sources(sources, base=self.base, ledger=ledger, max_row_bytes=self.recipe.max_row_bytes)

    # -- stages --

    @cached_property
    def cpt_data(self) -> Dataset:
        """Cleaned texts."""
        return self._run_ops("cpt", lambda ledger: self._read(self.recipe.cpt_sources, ledger), self._cpt_ops)

    @cached_property
    def sft_data(self) -> Dataset:
        """Processed dialogues."""
        ops = list(self._sft_ops)
        if self.recipe.seed_sources and self.recipe.sft_ops is None:
            if self._client("instructor") and self._client("scorer"):
                spec = {"seeds_file": str(self._scored_seeds()), "num_examples": self.recipe.num_examples}
                ops.append(
                    make_op(
                        {
                            "chained_instruction_mapper": spec
                            | {"lang": self.recipe.lang, "seed": self.recipe.seed}
                        }
                    )
                )
            else:
                self._without("chained-example instructions", "instructor")
        return self._run_ops("sft", lambda ledger: self._read(self.recipe.sft_sources, ledger), ops)

    def _scored_seeds(self) -> Path:
        scorer = LlmQualityScoreFilter(
            input_keys=("instruction",), field_names=("Instruction",), min_score=0.0, lang=self.recipe.lang
        )
        path = self.work / "seeds.jsonl"
        with self._state.main_process_first():
            seeds = run_ops(
                self._read(self.recipe.seed_sources),
                [scorer],
                OpContext(clients=self.clients),
                work_dir=self.work / "data",
            )
            if self._state.is_main_process:
                rows = [
                    {
                        "id": row[ROW_ID],
                        "question": row["question"],
                        "instruction": row["instruction"],
                        "score": row["llm_quality_score"],
                    }
                    for row in seeds
                ]
                write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return path

    @cached_property
    def base_model(self) -> Path:
        """The recipe's base model, or a small one with fresh weights."""
        if self.recipe.model is not None:
            folder = self.base / self.recipe.model
            if not (folder / "config.json").is_file():
                raise FileNotFoundError(f"no model in {folder}; save one there first, nothing is downloaded.")
            return folder
        texts = list(self.cpt_data["text"]) if self.recipe.cpt_sources else []
        if self.recipe.sft_sources:
            texts += [f"{row['question']}\n{row['answer']}" for row in self.sft_data]
        key = digest(*texts, json.dumps(self.recipe.init_model, sort_keys=True), str(self.recipe.seed))[:12]
        with self._state.main_process_first():
            return trainer.small_model(
                texts, self.work / "models" / f"init-{key}", self.recipe.init_model, self.recipe.seed
            )

    @cached_property
    def cpt(self) -> Path:
        """Folder of the model after continued pre-training; the base model if there is no text for it."""
        if not self.recipe.cpt_sources:
            return self.base_model
        return trainer.train_cpt(
            self.base_model, self.cpt_data, self.work / "models", self.recipe.cpt, seed=self.recipe.seed
        )

    @cached_property
    def sft(self) -> Path:
        """Folder of the fine-tuned model."""
        self._need("sft_sources", "sft")
        return trainer.train_sft(
            self.cpt, self.sft_data, self.work / "models", self.recipe.sft, seed=self.recipe.seed
        )

    def _need(self, option: str, stage: str) -> None:
        if not getattr(self.recipe, option):
            raise ValueError(f"the stage {stage} needs {option} in the recipe; name the files.")

    @cached_property
    def preference_data(self) -> Dataset:
        """Preference pairs: the recipe's, or responses of the SFT model that were voted on."""
        given = [make_op(self._placed(spec)) for spec in self.recipe.preference_ops or []]
        if self.recipe.preference_sources:
            return self._run_ops(
                "preference", lambda ledger: self._read(self.recipe.preference_sources, ledger), given
            )
        prompts = self.sft_data.shuffle(seed=self.recipe.seed)
        prompts = prompts.select(range(min(self.recipe.num_prompts, len(prompts)))).select_columns(
            [ROW_ID, "question", "history"]
        )
        prompts = prompts.rename_column("question", "prompt")
        if not (self._client("voter_1") or "policy" in self.clients):
            raise ValueError(
                "preference pairs are voted on by language models, and no client serves voter_1 to "
                "voter_3; give clients or preference_sources."
            )
        self.clients.setdefault("policy", TransformersChat(str(self.sft)))
        ops = [
            ResponseSamplingMapper(seed=self.recipe.seed),
            PreferenceVoteMapper(lang=self.recipe.lang, seed=self.recipe.seed),
            *given,
        ]
        return self._run_ops("preference", lambda _: prompts, ops)

    @cached_property
    def rm(self) -> Dataset:
        """Pairs with the margins of the reward models."""
        data = self.preference_data
        _, margins = trainer.train_reward_models(
            self.sft,
            data,
            self.work / "models",
            self.recipe.rm,
            count=self.recipe.num_reward_models,
            cross_fit=self.recipe.cross_fit,
            seed=self.recipe.seed,
        )
        lists = [[None if value != value else float(value) for value in row] for row in margins]
        return data.add_column("rm_margins", lists)

    @cached_property
    def denoise(self) -> Dataset:
        """Pairs without the ends of the ranking."""
        low, high = self.recipe.trim
        op = PreferenceDenoiseFilter(trim_low=low, trim_high=high, action=self.recipe.denoise_action)
        scored = self.rm
        return self._run_ops("denoise", lambda _: scored, [op])

    @cached_property
    def dpo(self) -> Path:
        """Folder of the model after DPO."""
        return trainer.train_dpo(
            self.sft, self.denoise, self.work / "models", self.recipe.dpo, seed=self.recipe.seed
        )

    @cached_property
    def final_model(self) -> Path:
        """What is deployed: after DPO if the recipe has pairs (or votes), else after SFT."""
        return self.dpo if self.recipe.preference_sources or self._client("voter_1") else self.sft

    @cached_property
    def ppvd(self) -> dict[str, Any]:
        """Search the final model's memory, build its guard, attack both."""
        self._need("benign_sources", "ppvd")
        folder = self.final_model
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(str(folder)).eval(),
            AutoTokenizer.from_pretrained(str(folder)),
        )
        samples = [Sample(row[ROW_ID], row["question"], row["answer"]) for row in self.sft_data]
        samples = samples[: self.recipe.num_search]
        found = search_memory(
            model,
            tokenizer,
            samples,
            threshold=self.guard_options.rouge_threshold,
            batch_size=self.guard_options.batch_size,
            journal=self.work / f"memory-{digest(str(folder), content_key(self.sft_data))[:12]}.jsonl",
            progress=self.progress and (lambda done, total: self.progress("memory search", done, total)),  # type: ignore[misc]
        )
        risky = [sample for sample, result in zip(samples, found, strict=True) if result.memorised]
        summary: dict[str, Any] = {
            "num_searched": len(samples),
            "num_memorised": len(risky),
            "model": str(folder),
        }
        if not risky:
            return summary
        benign_rows = self._read(self.recipe.benign_sources)
        column = "text" if "text" in benign_rows.column_names else "question"
        known = {sample.prompt for sample in samples}
        benign = [text for text in benign_rows[column] if text not in known]
        # Named after what it is made of: other weights, samples or options make another guard, and the one
        # that samples were erased from is found again.
        made_of = [
            StateReader(model, tokenizer, self.guard_options.layer).fingerprint(),
            canonical(dataclasses.asdict(self.guard_options)),
            *(sample.id for sample in risky),
            content_key(benign_rows),
            str(self.recipe.safe_reply),
        ]
        home = self.work / "ppvd" / digest(*made_of)[:12]
        summary["guard"] = str(home)
        if (home / "ppvd.json").is_file():
            guard = PrivacyPreservingVectorDB.open(home, model, tokenizer, key=self._key)
        else:
            guard = PrivacyPreservingVectorDB.build(
                model,
                tokenizer,
                risky,
                self._safe_answers(risky),
                benign[: 2 * len(benign) // 3],
                config=self.guard_options,
                folder=home,
                key=self._key,
            )
        report = evaluate_guard(
            guard,
            risky,
            {"held-out benign": benign[2 * len(benign) // 3 :]},
            max_new_tokens=self._longest(tokenizer, risky),
        )
        return summary | {"calibration": guard.calibration and guard.calibration._asdict(), "leakage": report}

    @staticmethod
    def _longest(tokenizer: Any, samples: Sequence[Sample]) -> int:
        return min(
            512, 16 + max(len(tokenizer(s.answer, add_special_tokens=False)["input_ids"]) for s in samples)
        )

    def _safe_answers(self, samples: Sequence[Sample]) -> list[str]:
        if self.recipe.safe_reply is not None:
            return [self.recipe.safe_reply] * len(samples)
        if not self._client("safe"):
            raise ValueError(
                "safe answers come from a client of the role 'safe', or set safe_reply in the recipe."
            )
        client = self.clients.get("safe") or self.clients["default"]
        asked = [[{"role": "user", "content": sample.prompt}] for sample in samples]
        return [reply[0].rpartition("</think>")[2].strip() for reply in client.complete_many(asked)]

    # -- running --

    def run(self, stages: Sequence[str] | None = None) -> dict[str, Any]:
        """Run stages (by default all that have data) and write ``run.json`` and ``report.html``.

        Args:
            stages: Of cpt_data, cpt, sft_data, sft, preference_data, rm, denoise, dpo, ppvd; what they need
                is run first.

        Returns:
            Results by stage: rows of data stages, folders of models, the guard's report.

        Raises:
            ValueError: If there is no such stage, or the recipe lacks what it needs.
        """
        unknown = [stage for stage in stages or () if stage not in STAGES]
        if unknown:
            raise ValueError(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}.")
        results: dict[str, Any] = {}
        for stage in stages or self._wanted():
            value = getattr(self, stage)
            results[stage] = (
                {"rows": len(value)}
                if isinstance(value, Dataset)
                else str(value)
                if isinstance(value, Path)
                else value
            )
            logger.info("%s: done", stage)
        if self._state.is_main_process:
            self._write(
                "run.json",
                {"recipe": dataclasses.asdict(self.recipe), "results": results, "notes": self.notes},
            )
            self._write_page(results)
        return results

    def _wanted(self) -> list[str]:
        recipe = self.recipe
        pairs = bool(recipe.preference_sources) or self._client("voter_1")
        has = {
            "cpt_data": bool(recipe.cpt_sources), "cpt": bool(recipe.cpt_sources),
            "sft_data": bool(recipe.sft_sources), "sft": bool(recipe.sft_sources),
            "preference_data": pairs, "rm": pairs, "denoise": pairs, "dpo": pairs,
            "ppvd": bool(recipe.benign_sources),
        }  # fmt: skip
        if not any(has.values()):
            raise ValueError("the recipe names no data; give cpt_sources or sft_sources.")
        return [stage for stage in STAGES if has[stage]]

    def _write_page(self, results: Mapping[str, Any]) -> None:
        flows, samples = {}, []
        for name in ("cpt", "sft", "preference", "denoise"):
            path = self.work / f"{name}_flow.json"
            if path.is_file():
                flows[name] = json.loads(path.read_text(encoding="utf-8"))
                samples += json.loads((self.work / f"{name}_samples.json").read_text(encoding="utf-8"))[:3]
        stages = []
        for path in sorted((self.work / "models").glob("*/stage.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            losses = record["losses"] or [float("nan")]
            stages.append(
                {
                    "stage": path.parent.name.split("-")[0],
                    "steps": record["steps"],
                    "first": losses[0],
                    "last": losses[-1],
                    "folder": path.parent.name,
                }
            )
        guard = results.get("ppvd") or {}
        page = render_page(
            {
                "title": "DPF-CM run",
                "flows": flows,
                "samples": samples,
                "stages": stages,
                "leakage": guard.get("leakage"),
                "notes": self.notes,
            }
        )
        write_text(self.work / "report.html", page)


def _flow(ledger: Ledger, rows_in: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows in, dropped, added and out of each operator, with the kinds of reasons."""
    steps = []
    for name in names:
        records = ledger.rows(op=name)
        dropped = [row for row in records if row["action"] == "dropped"]
        added = sum(row["action"] == "added" for row in records)
        kinds = Counter(_kind(row["reason"]) for row in dropped)
        out = rows_in - len(dropped) + added
        steps.append(
            {
                "op": name,
                "rows_in": rows_in,
                "dropped": len(dropped),
                "added": added,
                "changed": sum(row["action"] == "changed" for row in records),
                "rows_out": out,
                "reasons": [
                    {"op": name, "reason": kind, "rows": count} for kind, count in kinds.most_common(8)
                ],
            }
        )
        rows_in = out
    return steps


def _kind(reason: str) -> str:
    """A reason without its figures, so that like ones count together."""
    return " ".join(word for word in reason.split() if not any(c.isdigit() for c in word)) or reason


def _changed_samples(before: Dataset, after: Dataset, count: int = 5) -> list[dict[str, str]]:
    """Some rows whose text an operator changed."""
    place = {name: index for index, name in enumerate(before[ROW_ID])}
    shared = [name for name in ("text", "question", "answer") if name in before.column_names]
    found = []
    for index in range(min(len(after), 2000)):
        row = after[index]
        old = before[place[row[ROW_ID]]] if row[ROW_ID] in place else None
        if old is not None and any(old[name] != row[name] for name in shared):
            join = lambda r: "\n".join(str(r[name])[:300] for name in shared)  # noqa: E731
            found.append({"before": join(old), "after": join(row)})
        if len(found) == count:
            break
    return found
