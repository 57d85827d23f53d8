"""Speed and memory of the attacks.

Vocabulary matching against the public way (the whole sequence again for every candidate) and against copied
caches, the truncated forward pass, the hot map in blocks, ridge against a parrot.

``python -m benchmarks.embed_parrot`` prints one JSON line and writes ``docs/results/embed_parrot.json``.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from benchmarks.record import RESULTS, spread, write_result
from hf_plugins.embed_parrot.hook import CachedPrefix, HiddenTap, collect_states, embedding_table
from hf_plugins.embed_parrot.inversion import HotmapEmbedInversion, RidgeInversion
from hf_plugins.embed_parrot.model import EmbedParrot, EmbedParrotConfig, small_decoder
from hf_plugins.embed_parrot.trainer import parrot_trainer, standardise_input
from hf_plugins.embed_parrot.vocabulary import match_vocabulary


def llama(vocab_size: int, num_layers: int, width: int = 128, *, spread: float = 0.02) -> LlamaForCausalLM:
    """A causal model of random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 32,
            num_key_value_heads=width // 32,
            initializer_range=spread,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call, and its result; on one thread that is its time on a machine with nothing else to
    do.
    """
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


@torch.no_grad()
def whole_sequences(model: LlamaForCausalLM, seen: Tensor, layer: int) -> list[int]:
    """The public way, restated: for each candidate the whole sequence runs again, alone, through all
    layers."""
    found: list[int] = []
    for t in range(len(seen)):
        best = (float("inf"), -1)
        for candidate in range(model.config.vocab_size):
            ids = torch.tensor([[*found, candidate]])
            states = model.model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
            best = min(best, (float((states[0, t] - seen[t]).norm()), candidate))
        found.append(best[1])
    return found


@torch.no_grad()
def copied_caches(model: LlamaForCausalLM, seen: Tensor, layer: int, block: int = 512) -> list[int]:
    """With a prefix cache that is copied for each candidate of a block, the usual way to batch."""
    found: list[int] = []
    vocabulary = torch.arange(model.config.vocab_size)
    with HiddenTap(model, layer) as tap:
        prefix = DynamicCache()
        for t in range(len(seen)):
            distances = []
            for part in vocabulary.split(block):
                cache = DynamicCache()
                for index, entry in enumerate(prefix.layers):
                    repeated = [x.repeat(len(part), 1, 1, 1) for x in (entry.keys, entry.values)]
                    cache.update(*repeated, index)
                states = tap(part[:, None], past_key_values=cache, use_cache=True)
                distances.append((states[:, 0] - seen[t]).norm(dim=1))
            found.append(int(torch.cat(distances).argmin()))
            tap(torch.tensor([[found[-1]]]), past_key_values=prefix, use_cache=True)
    return found


def shared_prefix(
    model: LlamaForCausalLM, seen: Tensor, layer: int, ranked: Tensor | None = None
) -> list[int]:
    """Ours: candidates behind one shared cache, in one row."""
    with HiddenTap(model, layer) as tap:
        found = match_vocabulary(
            CachedPrefix(tap, 1),
            seen[None],
            torch.tensor([len(seen)]),
            vocab_size=model.config.vocab_size,
            ranked_NTK=None if ranked is None else ranked[None],
        )
    return found.ids_NT[0].tolist()


def matching(*, vocab_size: int, length: int, num_layers: int, rounds: int) -> list[dict[str, Any]]:
    """Times of the four ways on one text, in turns; all must find the text."""
    model = llama(vocab_size, num_layers)
    layer = num_layers // 2
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab_size, (length,), generator=generator)
    fit = list(torch.randint(0, vocab_size, (200, length), generator=generator))
    table = embedding_table(model)
    ridge = RidgeInversion(table).update(
        torch.cat(collect_states(model, fit, [layer])[layer]), torch.cat(fit)
    )
    ridge.solve(penalties=(1e-6,))
    seen = collect_states(model, [ids], [layer])[layer][0]
    ranked = ridge.top(seen, min(50, vocab_size)).ids_TK
    ways: dict[str, Callable[[], list[int]]] = {
        "whole sequence per candidate (public)": lambda: whole_sequences(model, seen, layer),
        "cache copied per candidate": lambda: copied_caches(model, seen, layer),
        "shared prefix (ours)": lambda: shared_prefix(model, seen, layer),
        "shared prefix, 50 candidates of ridge first (ours)": lambda: shared_prefix(
            model, seen, layer, ranked
        ),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(rounds):
        for way, call in ways.items():
            # The slow way takes most of the run; once is enough, its time hardly varies.
            if turn and "public" in way:
                continue
            taken, found = seconds(call)
            assert found == ids.tolist(), f"{way} did not find the text"
            times[way].append(taken)
    slow = times["whole sequence per candidate (public)"][0]
    return [
        {
            "case": way,
            "figure": f"{length / statistics.median(taken):.3g} tokens/s",
            "times": taken,
            "ratio": spread([slow / value for value in taken]),
        }
        for way, taken in times.items()
    ]


def truncated(*, num_layers: int, rounds: int) -> list[dict[str, Any]]:
    """Time to read layer i against a full forward pass with all hidden states, in turns."""
    model = llama(4096, num_layers, 256)
    ids = torch.randint(0, 4096, (8, 64), generator=torch.Generator().manual_seed(0))
    rows = []
    for layer in (num_layers // 4, num_layers // 2, num_layers):
        full: list[float] = []
        cut: list[float] = []
        for _ in range(rounds + 1):
            with HiddenTap(model, layer) as tap:
                cut.append(seconds(lambda tap=tap: tap(ids))[0])
            with torch.no_grad():
                full.append(seconds(lambda: model(input_ids=ids, output_hidden_states=True))[0])
        # The first turn warms up.
        full, cut = full[1:], cut[1:]
        rows.append(
            {
                "case": f"states of layer {layer} of {num_layers}, nothing behind run",
                "figure": f"{ids.numel() / statistics.median(cut):.3g} tokens/s",
                "times": cut,
                "ratio": spread([a / b for a, b in zip(full, cut, strict=True)]),
            }
        )
    return rows


def _status(field: str) -> float:
    """A figure of this process in MiB, such as its resident memory (VmRSS) or the peak of it (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(
        f"this system does not tell {field} in /proc/self/status; memory is measured on Linux only"
    )


def _peak(kind: str, size: int) -> None:
    """Child process: one piece of work; prints by how much its peak memory rose, its time and a check sum."""
    torch.manual_seed(0)
    work: Callable[[], int]
    if kind in ("whole", "blocks"):
        table, states = torch.randn(size, 256), torch.randn(4096, 256)
        attack = HotmapEmbedInversion(table)
        unit = states / states.norm(dim=1, keepdim=True)

        def whole() -> int:
            return int((unit @ attack.unit_VD.T).argmax(1).sum())

        work = whole if kind == "whole" else lambda: int(attack(states).sum())
    else:
        model, prefix = llama(512, 8), torch.randint(0, 512, (size,))
        everything = torch.arange(512)
        tap = HiddenTap(model, 8).__enter__()
        if kind == "shared":
            ours = CachedPrefix(tap, 1)
            for token in prefix:
                ours.accept(token[None])

            def shared() -> int:
                return int(ours.probe(torch.tensor([0]), everything[None])[0].norm(dim=1).argmin())

            work = shared
        else:
            cache = DynamicCache()
            tap(prefix[None], past_key_values=cache, use_cache=True)

            def copied() -> int:
                full = DynamicCache()
                for index, entry in enumerate(cache.layers):
                    full.update(entry.keys.repeat(512, 1, 1, 1), entry.values.repeat(512, 1, 1, 1), index)
                return int(
                    tap(everything[:, None], past_key_values=full, use_cache=True)[:, 0].norm(dim=1).argmin()
                )

            work = copied
    # 5 resets the peak to what is resident now.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    taken, found = seconds(work)
    print(json.dumps({"mib": _status("VmHWM") - before, "seconds": taken, "sum": found}))


def memory(*, vocab_size: int, prefix: int) -> list[dict[str, Any]]:
    """Peak memory of two pieces of work, ours and the plain way, each in a process of its own."""
    rows = []
    cases = (
        (
            f"hot map of 4,096 states x {vocab_size:,} tokens",
            vocab_size,
            ("whole", "whole map"),
            ("blocks", "in blocks"),
        ),
        (
            f"512 candidates behind {prefix} tokens",
            prefix,
            ("copied", "cache copied"),
            ("shared", "shared prefix"),
        ),
    )
    for label, size, *ways in cases:
        found = {}
        for kind, _ in ways:
            words = [sys.executable, "-m", "benchmarks.embed_parrot", "--peak", kind, str(size)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        plain, ours = (found[kind] for kind, _ in ways)
        assert plain["sum"] == ours["sum"], "the two ways disagree"
        for (kind, name), whose in zip(ways, ("", " (ours)"), strict=True):
            rows.append(
                {
                    "case": f"{label}, {name}{whose}",
                    "figure": f"{found[kind]['mib']:.0f} MiB more at peak, {found[kind]['seconds']:.2g} s",
                    "times": [found[kind]["seconds"]],
                    "ratio": f"{plain['mib'] / found[kind]['mib']:.3g} (less memory)" if whose else "1",
                }
            )
    return rows


class _StopAt(TrainerCallback):
    """Ends training when held-out recovery reaches a share; keeps the time without the checks."""

    def __init__(self, check: Callable[[], float], goal: float, every: int) -> None:
        self.check, self.goal, self.every = check, goal, every
        self.started, self.idle, self.reached, self.steps = 0.0, 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step
        if state.global_step % self.every == 0:
            taken, self.reached = seconds(self.check)
            self.idle += taken
            control.should_training_stop = self.reached >= self.goal

    @property
    def seconds(self) -> float:
        return time.process_time() - self.started - self.idle


def ridge_and_parrot(*, num_texts: int, max_steps: int, num_layers: int) -> list[dict[str, Any]]:
    """Time of ridge, and of a parrot until it reads as much on held-out texts."""
    model = llama(512, num_layers)
    ids = list(torch.randint(0, 512, (num_texts, 32), generator=torch.Generator().manual_seed(0)))
    states = collect_states(model, ids, [num_layers])[num_layers]
    table, held = embedding_table(model), num_texts // 10
    truth = torch.cat(ids[:held])

    def share(attack: Any) -> float:
        hits = [attack.top(x).ids_TK[:, 0] for x in states[:held]]
        return float((torch.cat(hits) == truth).double().mean())

    ridge = RidgeInversion(table)

    def fit() -> None:
        ridge.update(torch.cat(states[held:]), torch.cat(ids[held:])).solve(penalties=(1e-8,))

    taken, _ = seconds(fit)
    goal = share(ridge)
    set_seed(0)
    parrot = EmbedParrot(
        EmbedParrotConfig(target_hidden_size=128, decoder=small_decoder(2, 128, num_positions=32))
    )
    standardise_input(parrot, states[held:])
    parrot.set_codebook(table)
    stop = _StopAt(lambda: share(parrot.eval()), goal, every=20)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=max_steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=True,
            logging_steps=10_000,
        )
        trainer = parrot_trainer(parrot, states[held:], ids[held:], table, arguments)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(stop)
        trainer.train()
    trained = stop.seconds
    word = "reached" if stop.reached >= goal else "not reached"
    tokens = 32 * (num_texts - held)
    return [
        {
            "case": f"ridge, {tokens:,} tokens, layer {num_layers}",
            "figure": f"{100 * goal:.1f} % in {taken:.2g} s",
            "times": [taken],
            "ratio": f"{trained / taken:.3g} (parrot's time over ridge's)",
        },
        {
            "case": f"parrot of the paper's form until as good, {word} in {stop.steps} steps",
            "figure": f"{100 * stop.reached:.1f} % in {trained:.2g} s",
            "times": [trained],
            "ratio": "1",
        },
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the result file, print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each way")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--short", action="store_true", help="small sizes, result not kept")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "SIZE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    transformers_logging.disable_progress_bar()
    if args.peak:
        _peak(args.peak[0], int(args.peak[1]))
        return 0
    if args.short:
        args.rounds, args.out = 2, Path(tempfile.mkdtemp(prefix="benchmark-"))
    small = args.short
    rows = [
        *matching(
            vocab_size=64 if small else 512,
            length=5 if small else 12,
            num_layers=2 if small else 8,
            rounds=args.rounds,
        ),
        *truncated(num_layers=4 if small else 16, rounds=args.rounds),
        *memory(vocab_size=8_000 if small else 50_000, prefix=32 if small else 128),
        *ridge_and_parrot(
            num_texts=60 if small else 600, max_steps=20 if small else 1500, num_layers=2 if small else 8
        ),
    ]
    path = write_result(
        "embed_parrot",
        command="python -m benchmarks.embed_parrot",
        config={"rounds": args.rounds, "threads": args.threads, "short": args.short},
        seeds=[0],
        packages=("transformers",),
        columns=["case", "figure", "times faster (or as said), median (range)"],
        rows=[[row["case"], row["figure"], row["ratio"]] for row in rows],
        notes=[
            "Random-weight Llama models. Vocabulary matching: 12 tokens, 512 candidates each, states of "
            "layer 4 of 8; every way finds the text, and the first row is what the others are compared with. "
            "The public way is restated from its description: no cache, no batch, all layers.",
            "The truncated pass is compared with a full forward pass that returns all hidden states. Times "
            "are CPU seconds on one thread.",
        ],
        details={row["case"]: row["times"] for row in rows},
        folder=args.out,
    )
    print(
        json.dumps({"benchmark": "embed_parrot", "result": path.name, "cases": [row["case"] for row in rows]})
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
