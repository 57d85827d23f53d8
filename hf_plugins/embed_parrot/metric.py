"""The scan: how much of a text the hidden states of a model give away, by layer, attack and defence."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from hf_plugins.embed_parrot import recovery
from hf_plugins.embed_parrot.config import LeakScanConfig
from hf_plugins.embed_parrot.dataset import Split, split_texts
from hf_plugins.embed_parrot.defences import AdaptiveView, Defence, parse_defence
from hf_plugins.embed_parrot.hook import (
    CachedPrefix,
    HiddenTap,
    collect_states,
    defended,
    embedding_table,
    final_norm,
    head_table,
    is_causal,
    transformer_layers,
)
from hf_plugins.embed_parrot.inversion import BaseEmbedInversion, HotmapEmbedInversion, RidgeInversion
from hf_plugins.embed_parrot.matching import Matches
from hf_plugins.embed_parrot.model import EmbedParrotConfig, small_decoder
from hf_plugins.embed_parrot.storage import ExportedStates, PartStore, fingerprint
from hf_plugins.embed_parrot.trainer import train_parrot
from hf_plugins.embed_parrot.vocabulary import match_vocabulary

logger = logging.getLogger(__name__)

FORMAT = "embed_parrot.scan.v1"
# States held at once; more layers than fit are read in further passes over the text.
_BUDGET_BYTES = 2 << 30
# A winner within this factor of the noise's mean length is what noise alone would leave.
_NOISE_SLACK = 1.2
# Of ridge, in units of the mean diagonal of its normal equations.
_PENALTIES = (1e-6, 1e-4, 1e-2)
# Vocabulary matching tries shortlists of 1, 4, and 16 times the option's length before all tokens.
_RANKED = 16
_ASSUMED = (
    "The attacker sees the hidden states of every token and knows the model's weights, and has public text "
    "to fit on; the text attacked is never part of it."
)

Parts = dict[str, list[Tensor]]
"""States or tokens of each text by part: ``fit``, ``calibrate`` and ``test/NAME``."""
Utility = Callable[[nn.Module], Mapping[str, float]]
"""A measure of how well the (defended) model still serves; more than one figure may be returned."""


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What is attacked: a model that can be run, or states that were exported from one."""

    codebook: Tensor
    head: Tensor
    head_bias: Tensor | None
    norm: nn.Module | None
    ids: Parts
    num_layers: int
    layers: tuple[int, ...]
    model: nn.Module | None = None
    exported: dict[int, Parts] | None = None
    causal: bool = False


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One part of the scan."""

    defence: str
    view: str
    layer: int
    attack: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.defence}/{self.view}/layer{self.layer}/{self.attack}/seed{self.seed}"


def scan(
    model: nn.Module | ExportedStates,
    data: Mapping[str, Sequence[str]] | Sequence[str] = (),
    *,
    tokenizer: Any = None,
    fit_texts: Sequence[str] = (),
    config: LeakScanConfig | None = None,
    work_dir: str | Path | None = None,
    utility: Utility | None = None,
    entities: Sequence[str] = (),
    name: str = "",
) -> dict[str, Any]:
    """Attack the hidden states of a model at each layer, with and without defences.

    Args:
        model: A causal LM or an encoder, also PEFT-wrapped or quantised; or `ExportedStates`.
        data: Texts to attack, or several named sets of them; not looked at for exported states.
        tokenizer: The model's; needed to attack a model, and for measures on text.
        fit_texts: Public text that attacks are fitted on; empty: what the first set does not need for
            testing.
        config: Options.
        work_dir: Folder for finished parts; a scan that was interrupted goes on from there.
        utility: Measure of the model's use under a defence, besides perplexity (causal) or the cosine of
            pooled outputs (encoders).
        entities: Strings whose recovery is counted apart, such as names and numbers that stand in the texts.
        name: Of the model, for the report.

    Returns:
        A report of plain JSON values; `page.render_page` makes a page of it. The model is left as it was:
        no gradient, no changed buffer, no hook, training flags restored.

    Raises:
        ValueError: If options, data and model do not fit together.

    Source: attacks and defence of Embed Parrot, arXiv 2405.11916; the harness is ours.
    """
    config = config or LeakScanConfig()
    defences = {spec: parse_defence(spec) for spec in config.defences}
    named = data if isinstance(data, Mapping) else {"text": data}
    if isinstance(model, ExportedStates):
        source = _exported_source(model, config)
    else:
        source = _model_source(model, named, tokenizer, fit_texts, config)
    identity = {
        "name": name,
        "config": asdict(config) | {"layers": list(source.layers)},
        "text": fingerprint([[x.tolist() for x in rows] for rows in source.ids.values()]),
        "weights": fingerprint([source.codebook.double().sum().item(), source.num_layers]),
    }
    with TemporaryDirectory(prefix="leak-scan-") as temporary:
        # JSON has no tuples: one trip through it makes a fresh and a stored identity equal.
        store = PartStore(work_dir or temporary, _plain(identity))
        run = _Scan(source=source, config=config, defences=defences, store=store, utility=utility)
        run.entities = tuple(dict.fromkeys(entities))
        run.run_all()
        return _plain(run.report(tokenizer, name))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _check_layers(config: LeakScanConfig, known: Sequence[int]) -> tuple[int, ...]:
    wrong = [layer for layer in config.layers if layer not in known]
    if wrong:
        raise ValueError(
            f"layers {wrong} are not there; this source has {known[0]} .. {known[-1]} ({len(known)} cuts)."
        )
    return tuple(config.layers or known)


def _parts(split: Split) -> Parts:
    tests = {f"test/{name}": rows for name, rows in split.test.items()}
    return {"fit": split.fit, "calibrate": split.calibrate, **tests}


def _model_source(
    model: nn.Module,
    data: Mapping[str, Sequence[str]],
    tokenizer: Any,
    fit_texts: Sequence[str],
    config: LeakScanConfig,
) -> _Source:
    if tokenizer is None:
        raise ValueError(
            "attacking a model needs its tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...)."
        )
    split = split_texts(
        tokenizer,
        dict(data),
        fit_texts,
        num_test=config.num_test,
        num_calibrate=config.num_calibrate,
        num_fit=config.num_fit,
        max_length=config.max_length,
    )
    _, layers = transformer_layers(model)
    head, bias = head_table(model)
    return _Source(
        codebook=embedding_table(model),
        head=head,
        head_bias=bias,
        norm=final_norm(model),
        ids=_parts(split),
        num_layers=len(layers),
        layers=_check_layers(config, range(len(layers) + 1)),
        model=model,
        causal=is_causal(model),
    )


def _exported_source(exported: ExportedStates, config: LeakScanConfig) -> _Source:
    order = np.random.default_rng(0).permutation(len(exported.ids)).tolist()
    num_test = min(config.num_test, len(order) // 2)
    num_calibrate = min(config.num_calibrate, (len(order) - num_test) // 5)
    if num_test < 1:
        raise ValueError(
            f"{len(order)} exported texts are too few: one half is attacked, the other fitted on."
        )
    cuts = {
        "test/exported": order[:num_test],
        "calibrate": order[num_test : num_test + num_calibrate],
        "fit": order[num_test + num_calibrate :][: config.num_fit],
    }

    def parts(rows: Sequence[Tensor]) -> Parts:
        return {part: [rows[index][: config.max_length] for index in chosen] for part, chosen in cuts.items()}

    known = sorted(exported.states)
    return _Source(
        codebook=exported.codebook,
        head=exported.codebook if exported.head is None else exported.head,
        head_bias=None,
        norm=None,
        ids=parts(exported.ids),
        num_layers=max(known),
        layers=_check_layers(config, known),
        exported={layer: parts(rows) for layer, rows in exported.states.items()},
    )


class _Scan:
    """One scan: walks over layers, defences and attacks, keeps each finished part, sums up."""

    def __init__(
        self,
        *,
        source: _Source,
        config: LeakScanConfig,
        defences: Mapping[str, Defence],
        store: PartStore,
        utility: Utility | None,
    ) -> None:
        self.source, self.config, self.defences, self.store = source, config, defences, store
        self.utility = utility
        self.entities: tuple[str, ...] = ()
        self.tests = [part for part in source.ids if part.startswith("test/")]
        self.skipped = self._skipped()
        self._plain_pooled: Tensor | None = None
        self._weights: dict[tuple[str, int, int], Tensor | None] = {}
        self._hotmaps: dict[tuple[str, bool], HotmapEmbedInversion] = {}

    def _skipped(self) -> dict[str, str]:
        """Attacks that cannot be run on this source, with the reason, for the report."""
        why = {}
        if self.source.model is None:
            why["vocab"] = "vocabulary matching runs the model, and only its states are here"
            why["bei_norm"] = "the final norm is not among exported states"
            for spec, defence in self.defences.items():
                if defence.site == "embedding":
                    why[spec] = "a defence of the embeddings needs the model to run on them"
        elif not self.source.causal:
            why["vocab"] = (
                "vocabulary matching needs causal attention; an encoder's states depend on later tokens too"
            )
        if self.source.model is not None and self.source.norm is None:
            # Post-norm encoders end every layer with one.
            why["bei_norm"] = "this model has no norm between its last layer and its head"
        asked = (*self.config.attacks, *self.defences)
        return {name: reason for name, reason in why.items() if name in asked}

    def cells(self) -> Iterator[_Cell]:
        """All parts of the scan, layer by layer."""
        for layer in self.source.layers:
            for spec, defence in self.defences.items():
                views = ("adaptive",) if spec == "none" else ("naive", "adaptive")
                for view in () if spec in self.skipped else views:
                    for attack in self.config.attacks:
                        if attack in self.skipped:
                            continue
                        varied = attack == "parrot" or not defence.deterministic
                        for seed in self.config.seeds if varied else self.config.seeds[:1]:
                            yield _Cell(defence=spec, view=view, layer=layer, attack=attack, seed=seed)

    # -- running ---------------------------------------------------------------------------------------------

    def run_all(self) -> None:
        """Run what is not finished yet."""
        open_cells = [cell for cell in self.cells() if self.store.get(cell.key) is None]
        wanted = sorted({cell.layer for cell in open_cells})
        tokens = sum(len(ids) for rows in self.source.ids.values() for ids in rows)
        per_layer = tokens * self.source.codebook.shape[1] * 4
        size = max(1, _BUDGET_BYTES // max(per_layer, 1))
        for start in range(0, len(wanted), size):
            group = wanted[start : start + size]
            clean = self._collect(group)
            for layer in group:
                self.store.put(f"scale/layer{layer}", _spread(clean[layer]))
            for spec, defence in self.defences.items():
                self._run_defence(spec, defence, clean, [c for c in open_cells if c.layer in group])
        self._run_utility()

    def _collect(self, layers: Sequence[int]) -> dict[int, Parts]:
        if self.source.exported is not None:
            return {layer: self.source.exported[layer] for layer in layers}
        assert self.source.model is not None, "a source without exported states has a model"
        found: dict[int, Parts] = {layer: {} for layer in layers}
        for part, rows in self.source.ids.items():
            states = (
                collect_states(
                    self.source.model,
                    rows,
                    layers,
                    raw=self.config.raw_last,
                    batch_size=self.config.batch_size,
                )
                if rows
                else dict.fromkeys(layers, [])
            )
            for layer in layers:
                found[layer][part] = states[layer]
        return found

    def _run_defence(self, spec: str, defence: Defence, clean: dict[int, Parts], cells: list[_Cell]) -> None:
        for seed in self.config.seeds:
            mine = [cell for cell in cells if cell.defence == spec and cell.seed == seed]
            if not mine:
                continue
            generator = torch.Generator().manual_seed(seed)
            layers = sorted({cell.layer for cell in mine})
            if spec == "none":
                states = clean
            elif defence.site == "embedding":
                assert self.source.model is not None, "defences of embeddings are skipped without a model"
                scaled = defence.at_scale(float(self.source.codebook.std()))
                with defended(self.source.model, scaled, 0, generator):
                    states = self._collect(layers)
            else:
                states = {
                    layer: self._apply(defence.at_scale(_spread(clean[layer])), clean[layer], generator)
                    for layer in layers
                }
            for cell in mine:
                start = time.perf_counter()
                used = self._scaled(defence, clean[cell.layer])
                guesses, extra = self._attack(cell, used, clean[cell.layer], states[cell.layer])
                extra["seconds"] = time.perf_counter() - start
                self.store.put(cell.key, {"guesses": guesses, **extra})
                logger.info("%s done in %.1f s", cell.key, extra["seconds"])

    def _scaled(self, defence: Defence, clean: Parts) -> Defence:
        at_embedding = defence.site == "embedding"
        return defence.at_scale(float(self.source.codebook.std()) if at_embedding else _spread(clean))

    @staticmethod
    def _apply(defence: Defence, parts: Parts, generator: torch.Generator) -> Parts:
        return {part: [defence(rows, generator) for rows in texts] for part, texts in parts.items()}

    def _attack(
        self, cell: _Cell, defence: Defence, clean: Parts, seen: Parts
    ) -> tuple[dict[str, list[list[int]]], dict[str, Any]]:
        """Tokens guessed for each text of each test set, and what else is to be kept."""
        adaptive = cell.view == "adaptive"
        view = defence.adaptive_view() if adaptive else AdaptiveView(knows="")
        fit = seen if adaptive else clean
        if cell.attack == "vocab":
            return self._match(cell, defence, view, fit, seen)
        top = self._fitted(cell, view, fit)
        guesses = {
            part: [top(view.canonical(rows)).ids_TK[:, 0].tolist() for rows in seen[part]]
            for part in self.tests
        }
        return guesses, {}

    def _fitted(self, cell: _Cell, view: AdaptiveView, fit: Parts) -> Callable[..., Matches]:
        device = self.source.codebook.device
        if cell.attack in ("bei", "bei_norm"):
            norm = self.source.norm if cell.attack == "bei_norm" else None
            attack = BaseEmbedInversion(self.source.head, norm=norm, bias_V=self.source.head_bias)
            return lambda x, top=1: attack.top(x.to(device), top)
        if cell.attack == "hei":
            hotmap = self._hotmap(cell, view, canonical=True)
            return lambda x, top=1: hotmap.top(x.to(device), top)
        ridge = self._ridge(cell, view, fit)
        if cell.attack == "ridge":
            return lambda x, top=1: ridge.top(x.to(device), top)
        return self._parrot(cell, view, fit, ridge)

    @staticmethod
    def _attacked_as(cell: _Cell) -> str:
        """A naive attacker fits on undefended states, whatever the defence."""
        return cell.defence if cell.view == "adaptive" else "none"

    def _hotmap(self, cell: _Cell, view: AdaptiveView, *, canonical: bool) -> HotmapEmbedInversion:
        key = (self._attacked_as(cell), canonical)
        if key not in self._hotmaps:
            made = HotmapEmbedInversion(
                view.codebook(self.source.codebook), canonical=view.canonical if canonical else None
            )
            # Normalised tables are as large as the embeddings; those of two defences are enough.
            kept = {k: v for k, v in self._hotmaps.items() if k[0] in ("none", key[0])}
            self._hotmaps = kept | {key: made}
        return self._hotmaps[key]

    def _ridge(self, cell: _Cell, view: AdaptiveView, fit: Parts) -> RidgeInversion:
        codebook = view.codebook(self.source.codebook)
        ridge = RidgeInversion(codebook, decode=self._hotmap(cell, view, canonical=False))
        key = (self._attacked_as(cell), cell.layer, cell.seed)
        if key not in self._weights:
            for states, ids in _batches(fit["fit"], self.source.ids["fit"]):
                ridge.update(view.canonical(states).to(codebook.device), ids.to(codebook.device))
            held = next(_batches(fit["calibrate"], self.source.ids["calibrate"]), None)
            if held is None:
                ridge.solve(penalties=_PENALTIES[:1])
            else:
                x, ids = view.canonical(held[0]).to(codebook.device), held[1].to(codebook.device)
                ridge.solve(penalties=_PENALTIES, hidden_TD=x, ids_T=ids)
            self._weights[key] = ridge.weight_DE
        ridge.weight_DE = self._weights[key]
        return ridge

    def _parrot(
        self, cell: _Cell, view: AdaptiveView, fit: Parts, ridge: RidgeInversion
    ) -> Callable[..., Matches]:
        config, codebook = self.config, ridge.codebook_VD
        longest = max(map(len, self.source.ids["fit"]), default=1)
        longest = max(longest, *(len(x) for part in self.tests for x in self.source.ids[part]))
        parrot = train_parrot(
            EmbedParrotConfig(
                target_hidden_size=codebook.shape[1],
                layer=cell.layer,
                decoder=small_decoder(config.parrot_layers, config.parrot_width, num_positions=longest),
                causal=config.parrot_causal,
                loss=config.parrot_loss,
                linear_skip=config.parrot_skip,
            ),
            [view.canonical(x) for x in fit["fit"]],
            self.source.ids["fit"],
            codebook.cpu(),
            folder=self.store.folder
            / "parrots"
            / fingerprint([self._attacked_as(cell), cell.layer, cell.seed]),
            ridge=ridge,
            num_steps=config.parrot_steps,
            batch_size=config.parrot_batch,
            learning_rate=config.parrot_lr,
            seed=cell.seed,
            use_cpu=codebook.device.type == "cpu",
        )
        return parrot.top

    def _match(
        self, cell: _Cell, defence: Defence, view: AdaptiveView, fit: Parts, seen: Parts
    ) -> tuple[dict[str, list[list[int]]], dict[str, Any]]:
        model = self.source.model
        assert model is not None, "vocabulary matching is skipped without a model"
        short = None
        if self.config.shortlist:
            ranked = "ridge" if "ridge" in self.config.attacks else "hei"
            helper = _Cell(**{**asdict(cell), "attack": ranked})
            short = self._fitted(helper, view, fit)
        # The attacker repeats what is deterministic in its own copy of the model.
        repeat = defence if cell.view == "adaptive" and defence.deterministic else parse_defence("none")
        work = {"probes": 0, "widened": 0}
        ratios: list[float] = []
        guesses: dict[str, list[list[int]]] = {}
        for part in self.tests:
            chosen = _first_tokens(self.source.ids[part], self.config.vocab_tokens)
            rows = [seen[part][index] for index in chosen]
            lengths = torch.tensor([len(row) for row in rows])
            shortlist = None
            if short is not None:
                size = min(_RANKED * self.config.shortlist, len(self.source.codebook))
                shortlist = nn.utils.rnn.pad_sequence(
                    [short(view.canonical(row), size).ids_TK.cpu() for row in rows], batch_first=True
                )
            with (
                defended(model, repeat, cell.layer, torch.Generator()),
                HiddenTap(model, cell.layer, raw=self.config.raw_last) as tap,
            ):
                found = match_vocabulary(
                    CachedPrefix(tap, len(rows)),
                    nn.utils.rnn.pad_sequence(rows, batch_first=True),
                    lengths,
                    vocab_size=len(self.source.codebook),
                    ranked_NTK=shortlist,
                    first=self.config.shortlist or 1,
                    settle_distance=_NOISE_SLACK * defence.noise_length(self.source.codebook.shape[1]),
                    canonical=view.canonical,
                )
            guesses[part] = [found.ids_NT[i, : int(n)].tolist() for i, n in enumerate(lengths)]
            work["probes"] += found.num_probes
            work["widened"] += found.num_widened
            ratios += found.ratio_NT[~found.ratio_NT.isnan()].tolist()
        return guesses, {**work, "ratio_median": float(np.median(ratios))}

    # -- utility ---------------------------------------------------------------------------------------------

    def _run_utility(self) -> None:
        model = self.source.model
        if model is None or list(self.defences) == ["none"]:
            return
        plain = parse_defence("none")
        jobs = [("none", plain, 0)]
        for spec, defence in self.defences.items():
            cuts = self.source.layers if defence.site == "cut" else (0,)
            jobs += [(spec, defence, layer) for layer in cuts if spec != "none"]
        for spec, defence, layer in jobs:
            key = f"utility/{spec}/layer{layer}"
            if self.store.get(key) is not None:
                continue
            at_cut = defence.site == "cut" and spec != "none"
            scale = self.store.get(f"scale/layer{layer}") if at_cut else float(self.source.codebook.std())
            generator = torch.Generator().manual_seed(self.config.seeds[0])
            with defended(model, defence.at_scale(scale), layer, generator):
                figures = self._utility_now(model)
            self.store.put(key, figures)

    def _utility_now(self, model: nn.Module) -> dict[str, float]:
        texts = self.source.ids[self.tests[0]][:64]
        figures: dict[str, float] = {}
        if self.source.causal and model.get_output_embeddings() is not None:
            figures["perplexity"] = _perplexity(model, texts)
        else:
            pooled = _pooled(model, texts, self.config.batch_size)
            if self._plain_pooled is None:
                # The first job is the undefended model, unless an interrupted scan has done it before.
                saved = self.store.get("pooled")
                self._plain_pooled = pooled if saved is None else torch.tensor(saved)
                self.store.put("pooled", self._plain_pooled.tolist())
            figures["pooled_cosine"] = float(torch.cosine_similarity(pooled, self._plain_pooled).mean())
        if self.utility is not None:
            figures |= {name: float(value) for name, value in self.utility(model).items()}
        return figures

    # -- report ----------------------------------------------------------------------------------------------

    def report(self, tokenizer: Any, name: str) -> dict[str, Any]:
        """Everything found, as plain values."""
        ignore = frozenset(tokenizer.all_special_ids) if tokenizer is not None else frozenset()
        grouped: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
        for cell in self.cells():
            part = self.store.get(cell.key)
            grouped.setdefault((cell.defence, cell.view, cell.layer, cell.attack), []).append(part)
        rows = []
        for (spec, view, layer, attack), runs in grouped.items():
            for part in self.tests:
                truth = self.source.ids[part]
                if attack == "vocab":
                    truth = [truth[i] for i in _first_tokens(truth, self.config.vocab_tokens)]
                row = {"defence": spec, "view": view, "layer": layer, "attack": attack, "set": part[5:]}
                guesses = [run["guesses"][part] for run in runs]
                row |= self._figures(truth, guesses, ignore, tokenizer)
                row["seconds"] = float(np.mean([run["seconds"] for run in runs]))
                row |= {key: runs[0][key] for key in ("probes", "widened", "ratio_median") if key in runs[0]}
                rows.append(row)
        hotmap = HotmapEmbedInversion(self.source.codebook)
        return {
            "format": FORMAT,
            "model": name
            or ("exported states" if self.source.model is None else type(self.source.model).__name__),
            "config": asdict(self.config),
            "versions": {p: metadata.version(p) for p in ("mmhf-plugins", "torch", "transformers")},
            "num_layers": self.source.num_layers,
            "width": self.source.codebook.shape[1],
            "vocabulary": len(self.source.codebook),
            "duplicate_embeddings": hotmap.num_duplicates,
            "causal": self.source.causal,
            "tokens": {part: sum(map(len, rows)) for part, rows in self.source.ids.items()},
            "last_layer": "before the final norm" if self.config.raw_last else "after the final norm",
            "assumed": _ASSUMED,
            "adaptive_knows": {spec: d.adaptive_view().knows for spec, d in self.defences.items()},
            "skipped": self.skipped,
            "cells": rows,
            "utility": self._utility_rows(),
            "sample": self._sample(tokenizer),
            "verdict": verdict(rows, self.config.fail_above),
        }

    def _figures(
        self, truth: list[Tensor], runs: list[list[list[int]]], ignore: frozenset[int], tokenizer: Any
    ) -> dict[str, Any]:
        right = [ids.tolist() for ids in truth]
        counts = np.array([recovery.token_matches(a, a, ignore=ignore)[1] for a in right], dtype=float)
        hits = np.array(
            [
                [recovery.token_matches(a, b, ignore=ignore)[0] for a, b in zip(right, g, strict=True)]
                for g in runs
            ],
            dtype=float,
        )
        # Read by its own head, a deep state answers with the token that follows.
        moved = [
            recovery.token_matches(a[1:], b[:-1], ignore=ignore)
            for a, b in zip(right, runs[0], strict=True)
            if len(a) > 1
        ]
        kept = [[x for x in ids if x not in ignore] for ids in right]
        guessed = [
            [y for x, y in zip(a, b, strict=True) if x not in ignore]
            for a, b in zip(right, runs[0], strict=True)
        ]
        mean_hits = hits.mean(0)
        interval = recovery.bootstrap_interval(
            lambda index: float(mean_hits[index].sum() / max(counts[index].sum(), 1)),
            len(counts),
            num_samples=self.config.bootstrap,
        )
        table = self.source.codebook.cpu()
        figures: dict[str, Any] = {
            "num_texts": len(right),
            "num_tokens": int(counts.sum()),
            "token_acc": list(interval),
            "per_seed": (hits.sum(1) / max(counts.sum(), 1)).tolist(),
            "shifted_acc": sum(h for h, _ in moved) / max(1, sum(c for _, c in moved)),
            "exact_match": float(np.mean([a == b for a, b in zip(kept, guessed, strict=True)])),
            "token_f1": float(
                np.mean([recovery.multiset_f1(a, b) for a, b in zip(kept, guessed, strict=True)])
            ),
            "embedding_cosine": float(
                np.mean(
                    [
                        float(torch.cosine_similarity(table[a].mean(0), table[b].mean(0), dim=0))
                        for a, b in zip(kept, guessed, strict=True)
                        if a
                    ]
                    or [0.0]
                )
            ),
        }
        if tokenizer is not None:
            texts = [_decode(tokenizer, ids) for ids in kept]
            found = [_decode(tokenizer, ids) for ids in guessed]
            pairs = list(zip(texts, found, strict=True))
            figures["rouge1"] = float(np.mean([recovery.rouge_n(a, b, 1) for a, b in pairs]))
            figures["rouge2"] = float(np.mean([recovery.rouge_n(a, b, 2) for a, b in pairs]))
            longest = np.array([recovery.rouge_l(a, b) for a, b in pairs])
            figures["rougeL"] = list(
                recovery.bootstrap_interval(
                    lambda index: float(longest[index].mean()), len(pairs), num_samples=self.config.bootstrap
                )
            )
            figures["bleu"] = recovery.bleu(texts, found)
            figures |= _entity_figures(self.entities, pairs)
        return figures

    def _utility_rows(self) -> list[dict[str, Any]]:
        plain = self.store.get("utility/none/layer0") or {}
        rows = []
        for spec, defence in self.defences.items():
            for layer in self.source.layers if defence.site == "cut" and spec != "none" else (0,):
                for metric, value in (self.store.get(f"utility/{spec}/layer{layer}") or {}).items():
                    rows.append(
                        {
                            "defence": spec,
                            "layer": layer if defence.site == "cut" and spec != "none" else None,
                            "metric": metric,
                            "value": value,
                            "plain": plain.get(metric),
                        }
                    )
        return rows

    def _sample(self, tokenizer: Any) -> dict[str, Any]:
        """One text of middle length, token by token, with what each attack made of it without a defence."""
        if tokenizer is None:
            return {}
        part = self.tests[0]
        texts = self.source.ids[part]
        limit = (
            len(_first_tokens(texts, self.config.vocab_tokens))
            if "vocab" in self.config.attacks
            else len(texts)
        )
        number = sorted(range(limit), key=lambda i: abs(len(texts[i]) - 24))[0]
        layers: dict[str, dict[str, Any]] = {}
        truth = texts[number].tolist()
        for cell in self.cells():
            if cell.defence == "none" and cell.seed == self.config.seeds[0]:
                guess = self.store.get(cell.key)["guesses"][part][number]
                layers.setdefault(str(cell.layer), {})[cell.attack] = {
                    "tokens": [_token(tokenizer, x) for x in guess],
                    "hits": [x == y for x, y in zip(truth, guess, strict=True)],
                    "text": _decode(tokenizer, guess),
                }
        return {"set": part[5:], "tokens": [_token(tokenizer, x) for x in truth], "layers": layers}


def verdict(rows: Sequence[Mapping[str, Any]], fail_above: float) -> dict[str, Any]:
    """The worst that an adaptive attacker does to what is meant to be deployed.

    Args:
        rows: Cells of a report.
        fail_above: Share of tokens that counts as a failure.

    Returns:
        ``worst`` (a row), ``leak`` (its share of tokens) and ``failed``. Where defences were scanned, the
        undefended model does not count: it is there for comparison.
    """
    specs = {row["defence"] for row in rows} - {"none"} or {"none"}
    counted = [row for row in rows if row["defence"] in specs]
    if not counted:
        raise ValueError("the scan ran no attack; each one asked for was skipped, and the log says why.")
    worst = max(counted, key=lambda row: row["token_acc"][0])
    names = ("defence", "view", "layer", "attack", "set")
    leak = worst["token_acc"][0]
    return {
        "worst": {name: worst[name] for name in names},
        "leak": leak,
        "fail_above": fail_above,
        "failed": leak > fail_above,
    }


def _entity_figures(entities: Sequence[str], pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Share of the entities of each text that stand in what was read of it; empty where there is none."""
    present = [[e for e in entities if recovery.entity_recall([e], truth) == 1] for truth, _ in pairs]
    count = sum(map(len, present))
    if not count:
        return {}
    found = [len(e) * recovery.entity_recall(e, pair[1]) for e, pair in zip(present, pairs, strict=True) if e]
    return {"entity_recall": sum(found) / count, "num_entities": count}


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _token(tokenizer: Any, token: int) -> str:
    """A token as people read it; a part of a character has no text of its own and is shown as its piece."""
    text = _decode(tokenizer, [token])
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text


def _spread(parts: Parts) -> float:
    return float(torch.cat(parts["fit"]).std())


def _first_tokens(texts: Sequence[Tensor], budget: int) -> list[int]:
    """Numbers of the first texts whose tokens reach the budget together; one at least."""
    total, chosen = 0, []
    for index, ids in enumerate(texts):
        if total >= budget:
            break
        chosen.append(index)
        total += len(ids)
    return chosen


def _batches(
    states: Sequence[Tensor], ids: Sequence[Tensor], size: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(ids), size):
        yield torch.cat(list(states[start : start + size])), torch.cat(list(ids[start : start + size]))


@torch.no_grad()
def _perplexity(model: nn.Module, texts: Sequence[Tensor]) -> float:
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    device = model.get_input_embeddings().weight.device
    loss, count = 0.0, 0
    for ids in texts:
        if len(ids) > 1:
            logits = model(input_ids=ids[None].to(device)).logits[0, :-1].float()
            loss += float(nn.functional.cross_entropy(logits, ids[1:].to(device), reduction="sum"))
            count += len(ids) - 1
    for module, training in was_training.items():
        module.training = training
    return float(np.exp(min(loss / max(count, 1), 80.0)))


def _pooled(model: nn.Module, texts: Sequence[Tensor], batch_size: int) -> Tensor:
    last = len(transformer_layers(model)[1])
    rows = collect_states(model, texts, [last], raw=False, batch_size=batch_size)[last]
    return torch.stack([row.mean(0) for row in rows])
