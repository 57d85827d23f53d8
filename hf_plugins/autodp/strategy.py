"""The search for a strategy on real rows, and its application: `datasets` in, `datasets` out."""

import dataclasses
import json
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, load_from_disk

from hf_plugins import recipes
from hf_plugins.autodp.agent import guarded_chat, make_agent, public_texts
from hf_plugins.autodp.client import (
    DeitaSelector,
    FillMissingMapper,
    QaOptimizeMapper,
    QaSynthesis,
    data_clients,
    teacher_labels,
)
from hf_plugins.autodp.config import AutoDPConfig
from hf_plugins.autodp.dataset import (
    ANSWER,
    DIRTY,
    HISTORY,
    QUESTION,
    StrategyRunner,
    clean_ops,
    noise_specs,
    pair_texts,
    read_rows,
    row_cells,
    split_rows,
    take_sample,
    without_questions,
)
from hf_plugins.autodp.features import hash_embed, quality_features
from hf_plugins.autodp.metric import Values, judge_values, loss_values, winrate_score
from hf_plugins.autodp.model import LessSelector
from hf_plugins.autodp.privacy import PrivacyGuard
from hf_plugins.autodp.screening import Screener, fit_screener
from hf_plugins.autodp.searching import Scored, Search, Trial, make_search
from hf_plugins.autodp.storage import Cache, Journal, only_search, settle_run
from hf_plugins.autodp.strategies import (
    ASKS,
    IDENTITY,
    OPERATORS,
    TEAMS,
    Space,
    Step,
    Strategy,
    strategy_json,
    strategy_key,
)
from hf_plugins.autodp.trainer import EvaluationError, TrainJob, evaluate
from hf_plugins.autodp.verdicts import Score, StoppingRule, bootstrap_score
from hf_plugins.data_ops.chat import ChatClient
from hf_plugins.data_ops.op import DataOp, OpContext, canonical, content_key, digest, make_op
from hf_plugins.data_ops.perplexity import model_hash
from hf_plugins.whole_files import replacing, write_json, write_text

logger = logging.getLogger(__name__)

# What a strategy gets that cannot be scored: it crashes, or leaves no rows.
FAILED = -1.0
FORMAT = "autodp.search.1"


class AutoDP:
    """Searches the order of data-processing steps that makes fine-tuning data of one model best.

    Args:
        model: Folder of the model that is tuned while searching.
        config: Options.
        clients: Language models that see rows, by role; entries of ``config.clients`` or clients.
        agent: The agent; an entry as in ``config.agent`` or a client. It never sees rows.
        values: A metric of your own: from the results of strategy and raw data (``losses``, ``answers``) to
            one value a held-out question, in [-1, 1], above 0 where the strategy is better.
        cache: Folder of shared tables, evaluations and answers; default ``OUT/cache``.

    Raises:
        ValueError: If a client would send rows elsewhere, or the model is not there.
    """

    def __init__(
        self,
        model: str | Path,
        config: AutoDPConfig | None = None,
        *,
        clients: Mapping[str, Any] | None = None,
        agent: Mapping[str, Any] | ChatClient | None = None,
        values: Values | None = None,
        cache: str | Path | None = None,
    ) -> None:
        self.model = str(model)
        self.config = config or AutoDPConfig(metric="loss")
        self.clients = dict(self.config.clients if clients is None else clients)
        self.agent = self.config.agent if agent is None else agent
        self.values = values
        self.cache_folder = None if cache is None else Path(cache)
        if not (Path(self.model) / "config.json").is_file():
            raise ValueError(f"no model in {self.model!r}; give the folder that save_pretrained wrote.")
        # Refused here, before any work.
        data_clients(self.clients, cache=None, remote_data=self.config.remote_data)

    def search(
        self,
        data: str | Path | Dataset,
        out: str | Path,
        *,
        dev: str | Path | Dataset | None = None,
        test: str | Path | Dataset | None = None,
        anchors: str | Path | Dataset | None = None,
        question: str = "",
        answer: str = "",
        show: Callable[[str], None] = logger.info,
    ) -> dict[str, Any]:
        """Search; goes on where an earlier run with the same settings in ``out`` stopped.

        Args:
            data: Rows to process, see `read_rows`.
            out: Folder of the run: journal, result.json, recipe.yaml.
            dev: Held-out rows that strategies are compared on; None takes some of ``data``.
            test: Held-out rows for the report; None takes some of ``data``.
            anchors: Rows that LESS measures influence on; None takes some of ``dev``, or of ``data``.
            question: Column of questions, see `read_rows`.
            answer: Column of answers.
            show: Told each line of progress.

        Returns:
            The result, as in ``result.json``.

        Raises:
            ValueError: If data, options or the run in ``out`` do not fit.
            RuntimeError: If another search works in ``out``, or the raw data cannot be trained on.
        """
        out = Path(out)
        with only_search(out):
            parts = self._parts(data, {"dev": dev, "test": test, "anchors": anchors}, question, answer)
            run = _Run(self, out, parts, show)
            return run.search()

    def confirm(
        self,
        strategy: Strategy,
        data: str | Path | Dataset,
        out: str | Path,
        *,
        dev: str | Path | Dataset | None = None,
        test: str | Path | Dataset | None = None,
        anchors: str | Path | Dataset | None = None,
        part: str = "test",
        fresh: bool = True,
        show: Callable[[str], None] = logger.info,
    ) -> dict[str, Any]:
        """Score one strategy against the raw data, by default with fresh seeds on the test questions.

        Args:
            strategy: What to score.
            data: Rows, as in `search`.
            out: Folder for this strategy and others of the same settings.
            dev: As in `search`.
            test: As in `search`.
            anchors: As in `search`.
            part: Which questions: ``test`` or ``dev``.
            fresh: Whether to train with other seeds than a search does.
            show: Told each line of progress.

        Returns:
            ``score``, ``low``, ``high``, ``questions``, ``seeds``, mean ``losses`` of raw data and strategy.
        """
        out = Path(out)
        with only_search(out):
            parts = self._parts(data, {"dev": dev, "test": test, "anchors": anchors}, "", "")
            run = _Run(self, out, parts, show)
            run.prepare()
            return run.final(strategy, part=part, fresh=fresh)

    def _parts(self, data: Any, given: Mapping[str, Any], question: str, answer: str) -> dict[str, Dataset]:
        def rows(value: Any) -> Dataset:
            if isinstance(value, Dataset):
                from hf_plugins.data_ops.op import with_row_ids

                if missing := {QUESTION, ANSWER} - set(value.column_names):
                    raise ValueError(
                        f"a Dataset needs columns question and answer; it lacks {sorted(missing)}."
                    )
                return with_row_ids(value)
            return read_rows(value, question=question, answer=answer)

        sizes = {"dev": self.config.num_dev, "test": self.config.num_test, "anchors": self.config.num_anchors}
        found = {name: rows(value) for name, value in given.items() if value is not None}
        dev, anchors = given["dev"], given["anchors"]
        if dev is not None and anchors is None:
            # Held-out rows that the user gave are better targets than rows that wait for processing.
            rest = split_rows(found["dev"], {"anchors": sizes["anchors"]}, seed=self.config.seed)
            found |= {"dev": rest["train"], "anchors": rest["anchors"]}
        whole = rows(data)
        if found:
            whole = without_questions(whole, list(found.values()))
        found |= split_rows(
            whole, {name: size for name, size in sizes.items() if name not in found}, seed=self.config.seed
        )
        return found

    def apply(
        self,
        recipe: str | Path | Mapping[str, Any],
        data: str | Path | Dataset,
        out: str | Path,
        *,
        question: str = "",
        answer: str = "",
        show: Callable[[str], None] = logger.info,
    ) -> Dataset:
        """Run a chosen strategy on all rows.

        Args:
            recipe: ``recipe.yaml`` of a search, or its content.
            data: Rows, see `read_rows`.
            out: Folder for ``rows.jsonl``, the Arrow folder ``rows`` and ``applied.json``.
            question: Column of questions.
            answer: Column of answers.
            show: Told each line of progress.

        Returns:
            The processed rows.
        """
        if not isinstance(recipe, Mapping):
            recipe = read_recipe(recipe)
        out = Path(out)
        rows = data if isinstance(data, Dataset) else read_rows(data, question=question, answer=answer)
        if recipe.get("screener"):
            rows = _flag(
                rows, screener_from_json(json.loads(Path(recipe["screener"]).read_text(encoding="utf-8")))
            )
        cache = Cache(self.cache_folder or out / "cache", reuse=self.config.reuse)
        runner = self.runner(
            cache,
            anchors=str(recipe.get("anchors", "")),
            history=HISTORY in rows.column_names,
            synthetic=self.config.final_synthetic,
            max_rows=0,
            num_rows=len(rows),
            show=show,
        )
        strategy = self.space().strategy(recipe["strategy"]) if recipe["strategy"] else IDENTITY
        prepared = runner.run(strategy, rows)
        for step in prepared.steps:
            show(f"{step['step']}: {step['rows']} rows" + (" (stored)" if step["stored"] else ""))
        with replacing(out / "rows.jsonl") as part:
            prepared.rows.to_json(str(part), force_ascii=False)
        note = {
            "strategy": strategy_json(strategy),
            "key": prepared.key,
            "fingerprint": content_key(prepared.rows),
            "rows_before": len(rows),
            "rows": len(prepared.rows),
            "steps": prepared.steps,
        }
        write_json(out / "applied.json", note)
        return prepared.rows

    def space(self) -> Space:
        """The steps that can be run: those that ask a language model only where one is given for their
        role.
        """
        specs = TEAMS if self.config.space == "teams" else OPERATORS
        able = tuple(spec for spec in specs if self._can(spec.name))
        for name in [spec.name for spec in specs if spec not in able]:
            logger.warning(
                "step %r is left out: it asks a language model; set clients: {%s: ...}",
                name,
                self._role(name),
            )
        return Space(able, max_length=4 if self.config.space == "teams" else 6)

    def _role(self, name: str) -> str:
        if name == "select" and self.config.select == "deita":
            return "scorer"
        return ASKS.get(name, "")

    def _can(self, name: str) -> bool:
        role = self._role(name)
        return not role or bool({role, "default"} & set(self.clients))

    def runner(
        self,
        cache: Cache,
        *,
        anchors: str,
        history: bool,
        synthetic: int,
        num_rows: int,
        show: Callable[[str], None],
        max_rows: int = 1000,
    ) -> StrategyRunner:
        """What runs strategies: operators of each step, clients with their cache of answers."""
        answers = cache.folder / "answers.sqlite" if self.config.reuse else None
        clients = data_clients(self.clients, cache=answers, remote_data=self.config.remote_data)
        said = [0.0]

        def progress(what: str, done: int, total: int) -> None:
            if time.monotonic() - said[0] > 10:
                said[0] = time.monotonic()
                show(f"  {what}: {done} of {total}")

        context = OpContext(
            num_proc=self.config.num_proc if self.config.num_proc > 1 else None,
            clients=clients,
            progress=progress,
        )

        def ops(step: Step) -> list[DataOp]:
            return self.step_ops(
                step,
                anchors=anchors,
                history=history,
                synthetic=synthetic,
                num_rows=num_rows,
                max_rows=max_rows,
            )

        return StrategyRunner(cache, ops, context)

    def step_ops(
        self, step: Step, *, anchors: str, history: bool, synthetic: int, num_rows: int, max_rows: int
    ) -> list[DataOp]:
        """Operators of a step of the space."""
        config = self.config
        pair = (QUESTION, ANSWER)
        texts = (*pair, HISTORY) if history else pair

        def less(ratio: float) -> DataOp:
            return LessSelector(
                hf_model=self.model,
                anchors=anchors,
                ratio=ratio,
                checkpoints=config.less_checkpoints,
                warmup_ratio=config.less_warmup,
                lora_r=config.lora_r or 16,
                lora_alpha=4 * (config.lora_r or 16),
                projection_dim=config.projection_dim,
                max_length=config.max_length,
                seed=config.seed,
                use_cpu=config.use_cpu,
            )

        def synthesis(count: int) -> DataOp:
            return QaSynthesis(count=count, max_rows=max_rows, seed=config.seed)

        name = step.name
        if name == "clean":
            return clean_ops(
                self.model, history=history, min_tokens=config.min_tokens, max_tokens=config.max_tokens
            )
        if name == "generate":
            return [synthesis(synthetic), FillMissingMapper(seed=config.seed)]
        if name == "optimize":
            return [QaOptimizeMapper(seed=config.seed)]
        if name == "select":
            return [
                less(config.select_ratio)
                if config.select == "less"
                else DeitaSelector(ratio=config.select_ratio)
            ]
        if name == "select_less":
            return [less(step.get("ratio"))]
        if name == "select_deita":
            return [DeitaSelector(ratio=step.get("ratio"))]
        if name == "fill_missing":
            return [FillMissingMapper(seed=config.seed)]
        if name == "synthesize":
            return [synthesis(round(step.get("share") * num_rows))]
        specs: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "deduplicate": lambda: [
                {
                    "document_minhash_deduplicator": {
                        "text_key": texts,
                        "jaccard_threshold": step.get("threshold"),
                    }
                }
            ],
            "strip_noise": lambda: noise_specs(texts),
            "strip_symbols": lambda: [{"remove_specific_chars_mapper": {"text_key": texts}}],
            "length": lambda: [
                {
                    "token_num_filter": {
                        "text_key": pair,
                        "hf_tokenizer": self.model,
                        "min_num": step.get("min_tokens"),
                        "max_num": config.max_tokens,
                    }
                }
            ],
            "repetition": lambda: [
                {
                    "character_repetition_filter": {
                        "text_key": pair,
                        "rep_len": 10,
                        "max_ratio": step.get("max_ratio"),
                    }
                }
            ],
            "perplexity": lambda: [
                {
                    "perplexity_filter": {
                        "text_key": pair,
                        "hf_model": self.model,
                        "max_ppl": None,
                        "max_ratio": step.get("max_ratio"),
                        "max_length": min(config.max_length, 1024),
                    }
                }
            ],
        }
        return [make_op(spec) for spec in specs[name]()]


class _Run:
    """One search in one folder."""

    def __init__(
        self, owner: AutoDP, out: Path, parts: dict[str, Dataset], show: Callable[[str], None]
    ) -> None:
        self.owner, self.config, self.out, self.show = owner, owner.config, out, show
        self.parts = parts
        self.start = time.monotonic()
        self.cache = Cache(owner.cache_folder or out / "cache", reuse=self.config.reuse)
        self.journal = Journal(out / "journal.jsonl")
        settings = {
            "config": asdict(self.config),
            "model": model_hash(owner.model),
            "data": {name: content_key(rows) for name, rows in sorted(parts.items())},
            "clients": sorted(owner.clients),
        }
        if settle_run(out, json.loads(json.dumps(settings))):
            show(f"going on with the search in {out}: {len(self.journal.entries('trial'))} trials are done")
        self.model_key = settings["model"]
        self.paths = {name: self._stored(parts[name]) for name in ("dev", "test", "anchors")}
        self.raw: dict[tuple[float, int, str], dict[str, Any]] = {}
        self.incumbent = -math.inf
        self.seconds = {"ops": 0.0, "train": 0.0, "gen": 0.0, "judge": 0.0, "agent": 0.0}
        self.trainings = 0

    def _stored(self, rows: Dataset) -> str:
        key = content_key(rows)
        self.cache.table(key, lambda: (rows, {}))
        return str(self.cache.table_path(key))

    def prepare(self) -> None:
        """Screen and sample the rows, and set up what runs strategies on them."""
        self.train = self._screen(self.parts["train"])
        self.sample = take_sample(
            self.train, self.config.sample_ratio, method=self.config.sampler, seed=self.config.seed
        )
        self.runner = self.owner.runner(
            self.cache,
            anchors=self.paths["anchors"],
            history=HISTORY in self.sample.column_names,
            synthetic=self.config.num_synthetic,
            num_rows=len(self.sample),
            show=self.show,
        )

    def search(self) -> dict[str, Any]:
        """The whole search; returns its result, which also lies in the folder."""
        self.prepare()
        space = self.owner.space()
        self.show(
            f"{len(self.train)} rows to process, {len(self.sample)} sampled; {len(self.parts['dev'])} dev "
            f"and {len(self.parts['test'])} test questions; steps: {', '.join(space.names)}"
        )
        search = self._search(space)
        self._loop(search)
        best = search.best()
        self.show(f"chosen: {strategy_key(best)}")
        final = self._final(best)
        result = self._result(search, best, final, len(self.train), space)
        self._recipe(best)
        write_json(self.out / "result.json", result)
        for folder in (self.out / "jobs").glob("*/checkpoint-*"):
            shutil.rmtree(folder, ignore_errors=True)
        return result

    def _screen(self, train: Dataset) -> Dataset:
        config = self.config
        if config.screening == "off":
            return train
        if config.screening == "column":
            if config.screening_column not in train.column_names:
                raise ValueError(
                    f"screening='column' needs a column {config.screening_column!r}; there are "
                    f"{', '.join(train.column_names)}."
                )
            flags = [bool(value) for value in train[config.screening_column]]
            if config.screening_column == DIRTY:
                train = train.remove_columns(DIRTY)
            return train.add_column(DIRTY, flags)
        path = self.out / "screener.json"
        if not path.is_file():
            clients = data_clients(
                self.owner.clients, cache=self.cache.folder / "answers.sqlite", remote_data=config.remote_data
            )
            client = clients.get("screener") or clients["default"]
            generator = np.random.default_rng(config.seed)
            count = min(config.screening_labels, len(train))
            numbers, labels = teacher_labels(
                client, train, generator.choice(len(train), count, replace=False).tolist()
            )
            screener = fit_screener(screening_features(train.select(numbers)), labels, seed=config.seed)
            write_json(path, screener_json(screener))
        screener = screener_from_json(json.loads(path.read_text(encoding="utf-8")))
        if not screener.usable:
            logger.warning(
                "screening cannot tell rows apart (AUC %.2f): all rows are rewritten", screener.auc
            )
        flagged = _flag(train, screener)
        self.show(f"screening: {sum(flagged[DIRTY])} of {len(train)} rows need work (AUC {screener.auc:.2f})")
        return flagged

    def _search(self, space: Space) -> Search:
        config = self.config
        chat = None
        if config.search in ("agent", "hybrid"):
            cells = [row_cells(rows) for rows in self.parts.values()]
            guard = PrivacyGuard(
                lambda: (text for part in cells for text in part()),
                public_texts(space, rounds=config.max_rounds),
            )
            ask = guarded_chat(make_agent(self.owner.agent, space), guard, self.journal)

            def chat(messages: list[dict[str, str]]) -> str:
                start = time.perf_counter()
                text = ask(messages)
                self.seconds["agent"] += time.perf_counter() - start
                return text

        return make_search(
            config.search,
            space,
            count=config.num_strategies,
            seed=config.seed,
            chat=chat,
            max_rounds=config.max_rounds,
            prompt=config.prompt,
        )

    def _loop(self, search: Search) -> None:
        known = {(entry["strategy"], entry["budget"]): entry for entry in self.journal.entries("trial")}
        number = 0
        while trials := search.ask():
            number += 1
            fresh = [t for t in trials if (strategy_key(t.strategy), t.budget) not in known]
            for budget in {trial.budget for trial in fresh}:
                # Once a budget, in this thread: all comparisons at it need the same raw model.
                self._raw(budget, self.config.seed, "dev", keep=budget < 1)
            with ThreadPoolExecutor(self.config.workers) as pool:
                # Operators share stored tables and run here, one strategy at a time; trainings side by side.
                jobs = []
                for index, trial in enumerate(fresh):
                    jobs.append((trial, pool.submit(self._evaluate, trial, self._prepare(trial), index)))
                    if self.config.workers == 1:
                        known |= self._note(*jobs.pop(), number)
                for trial, job in jobs:
                    known |= self._note(trial, job, number)
            entries = [known[strategy_key(trial.strategy), trial.budget] for trial in trials]
            self.incumbent = max(
                [self.incumbent, *(entry["score"] for entry in entries if entry["budget"] == 1)]
            )
            search.tell([Scored(t, e["score"], e["low"]) for t, e in zip(trials, entries, strict=True)])

    def _prepare(self, trial: Trial) -> Any:
        start = time.perf_counter()
        try:
            return self.runner.run(trial.strategy, self.sample)
        finally:
            self.seconds["ops"] += time.perf_counter() - start

    def _note(self, trial: Trial, job: Any, number: int) -> dict[tuple[str, float], dict[str, Any]]:
        entry = {"kind": "trial", "round": number} | job.result()
        self.journal.append(entry)
        spent = time.monotonic() - self.start
        budget = "" if trial.budget == 1 else f" at {trial.budget:g} of the updates"
        told = (
            f"failed: {entry['failed']}"
            if entry.get("failed")
            else f"{entry['low']:+.4f} to {entry['high']:+.4f}"
        )
        left = self._tokens_left()
        self.show(
            f"[{spent:5.0f} s, round {number}] {entry['strategy']}{budget}: {entry['score']:+.4f} ({told}), "
            f"{entry['rows']} rows{left}"
        )
        return {(entry["strategy"], entry["budget"]): entry}

    def _tokens_left(self) -> str:
        parts = [
            f"{role}: {client.max_tokens - client.tokens} tokens left"
            for role, client in self.runner.context.clients.items()
            if getattr(client, "max_tokens", None)
        ]
        return f" [{', '.join(parts)}]" if parts else ""

    def _raw(self, budget: float, seed: int, part: str, *, keep: bool) -> dict[str, Any]:
        """The model trained on the unprocessed sample, once for each length, seed and set of questions."""
        if (budget, seed, part) not in self.raw:
            prepared = self.runner.run(IDENTITY, self.sample)
            found = self._train(IDENTITY, prepared, budget, seed, part, keep=keep, worker=0)
            self.raw[budget, seed, part] = found
        return self.raw[budget, seed, part]

    def _train(
        self,
        strategy: Strategy,
        prepared: Any,
        budget: float,
        seed: int,
        part: str,
        *,
        keep: bool,
        worker: int,
    ) -> dict[str, Any]:
        config = self.config
        job = TrainJob(
            model=self.owner.model,
            rows=str(self.cache.table_path(prepared.key)),
            questions=self.paths[part],
            out="",
            num_steps=config.num_steps,
            budget=budget,
            learning_rate=config.learning_rate,
            batch_size=config.batch_size,
            device_batch_size=config.device_batch_size,
            max_length=config.max_length,
            lora_r=config.lora_r,
            seed=seed,
            keep=keep,
            max_new_tokens=config.max_new_tokens if config.metric == "winrate" or self.owner.values else 0,
            use_cpu=config.use_cpu,
        )
        settings = {
            k: v
            for k, v in asdict(job).items()
            if k not in ("model", "rows", "questions", "out", "keep", "resume")
        }
        key = digest(prepared.key, self.model_key, content_key(self.parts[part]), canonical(settings))
        if (stored := self.cache.evaluation(key)) is not None:
            return stored | {"key": key, "stored": True}
        folder = self.out / "jobs" / digest(strategy_key(strategy), str(seed), prepared.key)[:16]
        job = dataclasses.replace(job, out=str(folder), resume=any(folder.glob("checkpoint-*")))
        launch = config.launch
        if config.workers > 1 and torch.cuda.device_count() > 1:
            launch += f" --gpu_ids {worker % torch.cuda.device_count()} --num_processes 1"
        result = evaluate(job, isolate=config.isolate, launch=launch.strip())
        self.trainings += 1
        for name in ("train", "gen"):
            self.seconds[name] += result["seconds"][name]
        self.cache.store_evaluation(key, result)
        return result | {"key": key, "stored": False}

    def _evaluate(self, trial: Trial, prepared: Any, worker: int) -> dict[str, Any]:
        entry = {
            "strategy": strategy_key(trial.strategy),
            "steps": strategy_json(trial.strategy),
            "budget": trial.budget,
            "rows": len(prepared.rows),
            "ledger": [
                {k: step[k] for k in ("step", "rows", "ledger", "seconds")} for step in prepared.steps
            ],
        }
        worst = {"score": FAILED, "low": FAILED, "high": FAILED, "stored": False}
        if len(prepared.rows) == 0:
            return entry | worst | {"failed": "no rows are left"}
        seed = self.config.seed
        try:
            result = self._train(
                trial.strategy, prepared, trial.budget, seed, "dev", keep=trial.keep, worker=worker
            )
        except EvaluationError as error:
            return entry | worst | {"failed": str(error)[:2000]}
        raw = self._raw(trial.budget, seed, "dev", keep=trial.keep)
        score, controlled = self._score(result, raw, "dev", incumbent=self.incumbent)
        return entry | {
            "score": score.value,
            "low": score.low,
            "high": score.high,
            "questions": score.num_questions,
            "unparsed": score.num_unparsed,
            "length_controlled": controlled,
            "stored": result["stored"],
            "seconds": result["seconds"],
        }

    def _score(
        self, result: dict[str, Any], raw: dict[str, Any], part: str, *, incumbent: float = -math.inf
    ) -> tuple[Score, float]:
        config = self.config
        if self.owner.values is not None:
            return bootstrap_score(
                self.owner.values(result, raw), level=config.level, seed=config.seed
            ), math.nan
        if config.metric == "loss":
            values = loss_values(result, raw)
            return bootstrap_score(values, level=config.level, seed=config.seed), float(np.nanmean(values))
        clients = self.runner.context.clients
        start = time.perf_counter()
        rule = StoppingRule() if config.early_stopping and incumbent > -math.inf else None
        values = judge_values(
            clients.get("judge") or clients["default"],
            self.parts[part][QUESTION],
            result["answers"],
            raw["answers"],
            rule=rule,
            incumbent=incumbent,
        )
        self.seconds["judge"] += time.perf_counter() - start
        pairs = zip(result["answers"], raw["answers"], strict=True)
        lengths = np.array([len(a) - len(b) for a, b in pairs], float)
        return winrate_score(values, lengths, level=config.level, seed=config.seed)

    def _final(self, best: Strategy) -> dict[str, Any]:
        """The winner against the raw data with fresh seeds on questions that nothing was chosen by."""
        if best == IDENTITY:
            return {"score": 0.0, "low": 0.0, "high": 0.0, "questions": 0, "seeds": []}
        stored = self.journal.entries("final")
        if stored and stored[-1]["strategy"] == strategy_key(best):
            return stored[-1]
        entry = {"kind": "final", "strategy": strategy_key(best)} | self.final(best)
        self.journal.append(entry)
        told = f"{entry['score']:+.4f} ({entry['low']:+.4f} to {entry['high']:+.4f})"
        self.show(f"on the test questions, fresh seeds: {told}")
        return entry

    def final(self, strategy: Strategy, *, part: str = "test", fresh: bool = True) -> dict[str, Any]:
        """Train raw data and strategy with each seed and compare them."""
        prepared = self.runner.run(strategy, self.sample)
        first = self.config.seed + (1000 if fresh else 0)
        seeds = [first + index for index in range(self.config.final_seeds)]
        scores, losses = [], []
        for seed in seeds:
            raw = self._raw(1.0, seed, part, keep=False)
            result = self._train(strategy, prepared, 1.0, seed, part, keep=False, worker=0)
            losses.append([float(np.nanmean(raw["losses"])), float(np.nanmean(result["losses"]))])
            scores.append(self._score(result, raw, part)[0])
        # The interval of the mean over seeds, as wide as the widest: the questions are the same for all.
        value = float(np.mean([score.value for score in scores]))
        return {
            "score": round(value, 4),
            "low": value - max(score.value - score.low for score in scores),
            "high": value + max(score.high - score.value for score in scores),
            "questions": scores[0].num_questions,
            "seeds": seeds,
            "losses": losses,
        }

    def _result(
        self, search: Search, best: Strategy, final: dict[str, Any], num_train: int, space: Space
    ) -> dict[str, Any]:
        trials = [{k: v for k, v in e.items() if k != "kind"} for e in self.journal.entries("trial")]
        clients = self.runner.context.clients
        return {
            "format": FORMAT,
            "chosen": strategy_json(best),
            "chosen_key": strategy_key(best),
            "final": {k: v for k, v in final.items() if k != "kind"},
            "trials": trials,
            "rounds": getattr(search, "log", []),
            "stopped": getattr(search, "stopped", ""),
            "steps": list(space.names),
            "rows": {"train": num_train, "sample": len(self.sample)}
            | {name: len(self.parts[name]) for name in ("dev", "test", "anchors")},
            "seconds": {**self.seconds, "total": time.monotonic() - self.start},
            "counts": {
                "trainings": self.trainings,
                "team_runs": self.runner.team_runs,
                "cache_hits": self.cache.hits,
                "cache_misses": self.cache.misses,
                "calls": {role: getattr(client, "calls", None) for role, client in clients.items()},
                "answers_reused": {role: getattr(client, "hits", None) for role, client in clients.items()},
            },
            "config": asdict(self.config),
            "model": Path(self.owner.model).name,
            "model_sha256": self.model_key,
            "versions": {
                name: metadata.version(name)
                for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
            },
            "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), "
            + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        }

    def _recipe(self, best: Strategy) -> None:
        anchors = self.out / "anchors"
        if anchors.exists():
            shutil.rmtree(anchors)
        load_from_disk(self.paths["anchors"]).save_to_disk(str(anchors))
        recipe: dict[str, Any] = {
            "strategy": strategy_json(best),
            "model": self.owner.model,
            "anchors": "anchors",
            "config": asdict(self.config),
        }
        if (self.out / "screener.json").is_file():
            recipe["screener"] = "screener.json"
        write_text(self.out / "recipe.yaml", yaml.safe_dump(recipe, allow_unicode=True, sort_keys=False))


def read_recipe(path: str | Path) -> dict[str, Any]:
    """A recipe of a search; places of files are relative to its own.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no recipe.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no recipe {str(path)!r}; `mmhf autodp search` writes recipe.yaml into its folder."
        )
    recipe = recipes.read_recipe(path)
    if "strategy" not in recipe:
        raise ValueError(f"{path} is no recipe of a search: it has no key 'strategy'.")
    for name in ("anchors", "screener"):
        if recipe.get(name):
            recipe[name] = str(path.parent / recipe[name])
    return recipe


def screening_features(rows: Dataset) -> np.ndarray:
    """Hashed text and cheap quality features of rows."""
    return np.concatenate(
        [hash_embed(pair_texts(rows)), quality_features(rows[QUESTION], rows[ANSWER])], axis=1
    )


def _flag(rows: Dataset, screener: Screener) -> Dataset:
    if DIRTY in rows.column_names:
        rows = rows.remove_columns(DIRTY)
    return rows.add_column(DIRTY, screener.dirty(screening_features(rows)).tolist())


def screener_json(screener: Screener) -> dict[str, Any]:
    """A classifier as JSON."""
    values = asdict(screener)
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def screener_from_json(values: Mapping[str, Any]) -> Screener:
    """What `screener_json` wrote."""
    arrays = {name: np.array(values[name]) for name in ("weights", "mean", "scale")}
    return Screener(
        **arrays,
        platt=tuple(values["platt"]),
        threshold=values["threshold"],
        auc=values["auc"],
        curve=tuple(tuple(point) for point in values["curve"]),
    )
