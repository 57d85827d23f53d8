"""Cost of private training: `DPTrainer` against a plain Opacus loop and against the host's own Trainer.

``python -m benchmarks.dp`` measures CPU time of a step (interleaved rounds in one process) and peak memory (a
fresh child process each) for MiniLM with full fine-tuning and LoRA, a small Llama with LoRA and DPNASNet, and
writes ``docs/results/dp.json``. ``--short`` measures one model once and writes nothing.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from opacus.grad_sample import prepare_module
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.record import spread, write_result  # noqa: E402
from hf_plugins.dp import DPConfig, DPTrainer  # noqa: E402
from tools.real_data import minilm  # noqa: E402

TOKENS = 32
MEMORY_GIB = 4


class Case(NamedTuple):
    """A model and records for it."""

    build: Callable[[], nn.Module]
    records: Callable[[int], dict[str, Tensor]]
    batch: int


def _lora(model: nn.Module, targets: list[str]) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))


def _minilm() -> nn.Module:
    model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


def _dpnasnet() -> nn.Module:
    from hf_plugins.dpnas import DPNASNetConfig, DPNASNetForImageClassification

    return DPNASNetForImageClassification(DPNASNetConfig())


def _text(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, 20000, (count, TOKENS), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens[:, 0] % 2}


def _language(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4096, (count, 2 * TOKENS), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def _images(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 1, 28, 28) if _dpnasnet().config.in_channels == 1 else (count, 3, 32, 32)
    return {"pixel_values": torch.rand(shape, generator=generator), "labels": torch.arange(count) % 10}


CASES = {
    "MiniLM, full": Case(_minilm, _text, 8),
    "MiniLM, LoRA": Case(lambda: _lora(_minilm(), ["query", "value"]), _text, 16),
    "Llama 6 x 256, LoRA": Case(lambda: _lora(_llama(), ["q_proj", "v_proj"]), _language, 16),
    "DPNASNet": Case(_dpnasnet, _images, 32),
}


class _Clock(TrainerCallback):
    """CPU seconds between the ends of steps, data loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if self.last:
            self.seconds.append(now - self.last)
        self.last = now


def _trainer(
    case: Case, records: dict[str, Tensor], mode: str | None, steps: int, chunk: int
) -> tuple[Any, _Clock]:
    """A trainer whose every step takes all records: ours in one mode, or the host's for None."""
    clock = _Clock()
    count = len(records["labels"])
    # PyTorch format: the loader stacks rows and converts nothing, as the Opacus loop needs no conversion.
    rows = Dataset.from_dict({k: v.tolist() for k, v in records.items()}).with_format("torch")
    args = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=chunk,
        gradient_accumulation_steps=count // chunk,
        max_steps=steps,
        optim="sgd",
        learning_rate=1e-3,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    common = {"train_dataset": rows, "data_collator": default_data_collator, "callbacks": [clock]}
    if mode is None:
        return Trainer(case.build(), args, **common), clock
    dp = DPConfig(noise_multiplier=1.0, grad_sample_mode=mode, seed=0)
    return DPTrainer(case.build(), args, dp=dp, **common), clock


class _OpacusLoop:
    """The shortest correct loop on Opacus itself."""

    def __init__(self, case: Case, records: dict[str, Tensor], mode: str) -> None:
        self.model = case.build().train()
        self.inputs = dict(records)
        self.labels = self.inputs.pop("labels")
        count = len(self.labels)
        if "bert" in type(getattr(self.model, "base_model", self.model)).__name__.lower() or mode == "hooks":
            # Without positions of its own for each record Opacus fails on BERT.
            if "attention_mask" in self.inputs:
                self.inputs["position_ids"] = torch.arange(TOKENS).expand(count, -1).contiguous()
                self.inputs["token_type_ids"] = torch.zeros(count, TOKENS, dtype=torch.long)
        self.hooks = prepare_module(self.model, mode, wrap_model=False, loss_reduction="mean", strict=False)
        plain = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        kind = DPOptimizerFastGradientClipping if mode == "ghost" else DPOptimizer
        self.optimizer = kind(plain, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=count)
        self.criterion: Any = nn.CrossEntropyLoss()
        if mode == "ghost":
            self.criterion = DPLossFastGradientClipping(self.hooks, self.optimizer, self.criterion)

    def step(self) -> float:
        start = time.process_time()
        logits = self.model(**self.inputs).logits
        if logits.dim() == 3:
            scores, labels = logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten()
            shape = {"shape": (len(logits), logits.shape[1] - 1)} if self.is_ghost() else {}
            loss = self.criterion(scores, labels, **shape)
        else:
            loss = self.criterion(logits, self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start

    def is_ghost(self) -> bool:
        return isinstance(self.criterion, DPLossFastGradientClipping)


def measure_time(case: Case, rounds: int, steps: int) -> dict[str, list[float] | str]:
    """CPU seconds of steps by engine, rounds interleaved; a text where an engine cannot run the model."""
    records = case.records(case.batch)
    found: dict[str, Any] = {}
    trainers = {
        "Trainer": _trainer(case, records, None, steps + 1, case.batch),
        "hooks": _trainer(case, records, "hooks", steps + 1, case.batch),
        "ghost": _trainer(case, records, "ghost", steps + 1, case.batch),
    }
    loops: dict[str, _OpacusLoop] = {}
    for mode in ("hooks", "ghost"):
        try:
            loops[f"Opacus {mode}"] = _OpacusLoop(case, records, mode)
            loops[f"Opacus {mode}"].step()
            found[f"Opacus {mode}"] = []
        except (RuntimeError, ValueError, NotImplementedError) as error:
            loops.pop(f"Opacus {mode}", None)
            found[f"Opacus {mode}"] = f"fails: {str(error)[:80]}"
    for _ in range(rounds):
        for name, loop in loops.items():
            found[name] += [loop.step() for _ in range(steps)]
        for trainer, _ in trainers.values():
            trainer.train()
    return {**found, **{name: clock.seconds for name, (_, clock) in trainers.items()}}


def _peak(case: Case, mode: str | None, batch: int, queue: Any) -> None:
    records = case.records(batch)
    trainer, _ = _trainer(case, records, mode, 2, batch)
    page = resource.getpagesize()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * page
    trainer.train()
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20)


def measure_memory(case: Case, mode: str | None, batch: int) -> float:
    """MiB that two steps need beyond the loaded model, at their peak, in a child process."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_peak, args=(case, mode, batch, queue))
    child.start()
    value = queue.get(timeout=300)
    child.join()
    return value


def ratio(times: dict[str, Any], name: str, base: str, rounds: int) -> str:
    """How many times longer a step is: ratio of medians in each round; median, smallest and largest of
    these.
    """
    if isinstance(times[name], str) or isinstance(times[base], str):
        return "fails"
    medians = {}
    for key in (name, base):
        steps = len(times[key]) // rounds
        medians[key] = [statistics.median(times[key][i * steps : (i + 1) * steps]) for i in range(rounds)]
    return spread([a / b for a, b in zip(medians[name], medians[base], strict=True)])


def largest_batch(small: tuple[int, float], large: tuple[int, float]) -> int:
    """Records that fit into the memory of the table, from a line through two measurements."""
    slope = max((large[1] - small[1]) / (large[0] - small[0]), 1e-3)
    return int((MEMORY_GIB * 1024 - (small[1] - slope * small[0])) / slope)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print one JSON line a model, write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each engine in a round")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.short:
        args.cases, args.rounds, args.steps = ["Llama 6 x 256, LoRA"], 1, 2
    time_rows, memory_rows, details = [], [], {}
    # Memory first: a parent that has trained hands freed memory to its children, and their peaks vanish.
    memories: dict[str, dict[str, list[float]]] = {}
    for name in args.cases:
        batches = (CASES[name].batch,) if args.short else (CASES[name].batch, 2 * CASES[name].batch)
        memories[name] = {
            mode or "Trainer": [measure_memory(CASES[name], mode, batch) for batch in batches]
            for mode in (None, "hooks", "ghost")
        }
    for name in args.cases:
        case, memory = CASES[name], memories[name]
        times = measure_time(case, args.rounds, args.steps)
        details[name] = {"seconds": times, "peak MiB": memory, "batch": case.batch}
        print(json.dumps({name: details[name]}), flush=True)
        step = statistics.median(times["Trainer"]) / case.batch * 1000
        time_rows.append(
            [
                f"{name} (batch {case.batch})",
                f"{step:.1f}",
                ratio(times, "hooks", "Trainer", args.rounds),
                ratio(times, "ghost", "Trainer", args.rounds),
                ratio(times, "hooks", "Opacus hooks", args.rounds),
                ratio(times, "ghost", "Opacus ghost", args.rounds),
            ]
        )
        if not args.short:
            peaks = [f"{memory[key][0]:.0f}" for key in ("Trainer", "hooks", "ghost")]
            most = [
                str(largest_batch((case.batch, memory[key][0]), (2 * case.batch, memory[key][1])))
                for key in ("Trainer", "hooks", "ghost")
            ]
            memory_rows.append([f"{name} (batch {case.batch})", *peaks, " / ".join(most)])
    if args.short:
        return 0
    config = {"rounds": args.rounds, "steps": args.steps, "threads": 1}
    packages = ("transformers", "peft", "opacus")
    write_result(
        "dp",
        command=f"python -m benchmarks.dp --rounds {args.rounds} --steps {args.steps}",
        config=config,
        seeds=[0],
        packages=packages,
        columns=[
            "model",
            "Trainer, ms a record",
            "hooks / Trainer",
            "ghost / Trainer",
            "hooks / Opacus hooks loop",
            "ghost / Opacus ghost loop",
        ],
        rows=time_rows,
        notes=[
            "CPU time of a whole step, one thread; ratio of medians within a round, median (smallest - "
            "largest) over interleaved rounds; ours includes the host's loop, Poisson sampling, collating, "
            "the Opacus loop gets one ready batch.",
        ],
        details=details,
    )
    write_result(
        "dp_memory",
        command=f"python -m benchmarks.dp --rounds {args.rounds} --steps {args.steps}",
        config=config,
        seeds=[0],
        packages=packages,
        columns=[
            "model",
            "Trainer, MiB",
            "hooks, MiB",
            "ghost, MiB",
            f"records in {MEMORY_GIB} GiB (same order)",
        ],
        rows=memory_rows,
        notes=[
            "Peak resident memory of two steps beyond the loaded model, a child process each; the last "
            "column is a line through the peaks of one and two batches, not a run.",
        ],
        details=details,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
