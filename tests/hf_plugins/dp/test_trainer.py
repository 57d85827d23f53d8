"""The trainer inside the host's real loop: runs that must agree, and everything it refuses."""

import json
import math
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.trainer_utils import HubStrategy
from trl import SFTConfig

from hf_plugins.accounting import Ledger, epsilon
from hf_plugins.dp.config import DPConfig
from hf_plugins.dp.dataset import PoissonBatches
from hf_plugins.dp.trainer import DPSFTTrainer, DPTrainer
from tests.hf_plugins.dp import tiny
from tests.hf_plugins.dp.words import tokenizer

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.host

EVERYBODY = {"noise_multiplier": 0.0, "max_grad_norm": 1e6, "seed": 0}


class _Weights(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.seen.append(tiny.weights(model))


# Runs that must agree.


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_no_noise_and_no_clipping_is_the_plain_trainer_step_for_step(
    tmp_path: Path, mode: str, optim: str
) -> None:
    """Sample rate 1: every record in every step, as a plain trainer with the whole set as its batch."""
    ours, theirs = _Weights(), _Weights()
    options = {"optim": optim, "max_steps": 4, "learning_rate": 0.05, "lr_scheduler_type": "linear"}
    rows = tiny.classified(8)
    private = tiny.trainer(
        tmp_path,
        dp={**EVERYBODY, "grad_sample_mode": mode},
        rows=rows,
        per_device_train_batch_size=8,
        extra={"callbacks": [ours]},
        **options,
    )
    private.train()
    plain = Trainer(
        tiny.bert(),
        tiny.arguments(tmp_path, per_device_train_batch_size=8, max_grad_norm=0.0, **options),
        train_dataset=rows,
        data_collator=default_data_collator,
        callbacks=[theirs],
    )
    plain.train()
    assert len(ours.seen) == len(theirs.seen) == 4
    start = tiny.weights(tiny.bert())
    for a, b in zip(ours.seen, theirs.seen, strict=True):
        assert (a - start).norm() > 1e-3
        # Adam divides by the root of tiny second moments, which enlarges rounding.
        torch.testing.assert_close(a, b, atol=5e-5 if optim == "adamw_torch" else 5e-7, rtol=0)


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_accumulation_four_times_one_is_once_four(tmp_path: Path, mode: str) -> None:
    found = []
    for size, times in ((1, 4), (4, 1)):
        run = tiny.trainer(
            tmp_path,
            dp={"max_grad_norm": 0.1, "grad_sample_mode": mode},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
        )
        run.train()
        assert run.sample_rate == 4 / 24
        found.append(tiny.weights(run.model))
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=0)


def test_ghost_equals_hooks_with_noise_and_clipping(tmp_path: Path) -> None:
    found = []
    for mode in ("hooks", "ghost"):
        run = tiny.trainer(tmp_path, dp={"max_grad_norm": 0.1, "grad_sample_mode": mode})
        run.train()
        found.append(tiny.weights(run.model))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_resumed_is_uninterrupted_epsilon_included(tmp_path: Path) -> None:
    """Eight steps in one go against four and four, across an epoch's end; dropout and Adam take part."""
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
    }

    def run(folder: Path, **more: Any) -> DPTrainer:
        dp = {"noise_multiplier": None, "target_epsilon": 0.7, "seed": None}
        return tiny.trainer(folder, model=tiny.bert(dropout=0.1), dp=dp, **{**options, **more})

    whole = run(tmp_path / "whole")
    whole.train()
    again = run(tmp_path / "again", max_steps=8)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    torch.testing.assert_close(tiny.weights(again.model), tiny.weights(whole.model), atol=0, rtol=0)
    assert again.ledger.releases == whole.ledger.releases
    assert again.epsilon() == whole.epsilon() <= 0.7
    assert again.ledger.num_steps == 8
    secret = tmp_path / "whole" / "checkpoint-4" / "dp_secret.json"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    report = json.loads((tmp_path / "whole" / "checkpoint-8" / "privacy.json").read_text())
    assert report["epsilon"] == whole.epsilon()
    assert report["neighbours"] == "add or remove one unit"


def test_noise_has_the_size_that_is_paid_for(tmp_path: Path) -> None:
    """Empty batches only: an SGD step moves each weight by lr * sigma * C / expected units, normal.

    Rate 1/24, one step without a record; 6 standard errors of the standard deviation.
    """
    rows = tiny.classified()
    seed = next(s for s in range(99) if not _draw(s))
    run = tiny.trainer(
        tmp_path,
        rows=rows,
        dp={"noise_multiplier": 2.0, "max_grad_norm": 0.3, "seed": seed},
        per_device_train_batch_size=1,
        max_steps=1,
        learning_rate=1.0,
    )
    before = tiny.weights(run.model)
    run.train()
    moved = tiny.weights(run.model) - before
    assert abs(float(moved.std()) / 0.6 - 1) < 6 / math.sqrt(2 * len(moved))
    assert run.ledger.num_steps == 1


def _draw(seed: int) -> list[list[int]]:
    units = [[i] for i in range(24)]
    batches = PoissonBatches(units, sample_rate=1 / 24, steps=24, bound=1, seed=seed, rank=0, num_ranks=1)
    return batches.draw(0)


def test_noise_differs_between_steps_and_trainings(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, max_steps=2, per_device_train_batch_size=1, extra={"callbacks": [_Weights()]}
    )
    run.train()
    first, second = _steps(run)
    assert (first - second).abs().max() > 1e-4
    middle = tiny.weights(run.model)
    run.train()
    assert run.ledger.num_steps == 4
    # A second training must not draw the noise of the first again.
    moved_first, moved_second = middle - tiny.weights(tiny.bert()), tiny.weights(run.model) - middle
    assert (moved_first - moved_second).abs().max() > 1e-4


def _steps(run: DPTrainer) -> list[Tensor]:
    (kept,) = [c for c in run.callback_handler.callbacks if isinstance(c, _Weights)]
    start = tiny.weights(tiny.bert())
    return [kept.seen[0] - start, kept.seen[1] - kept.seen[0]]


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """accelerate starts two gloo processes; one rank with twice the batch is the reference."""
    (tmp_path / "two").mkdir()
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "-m", "tests.hf_plugins.dp.ddp_run", str(tmp_path / "two"), "1"]
    done = subprocess.run(launch, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    two = [torch.load(tmp_path / "two" / f"rank{rank}.pt") for rank in range(2)]
    assert torch.equal(two[0]["weights"], two[1]["weights"])
    one = tiny.trainer(tmp_path, dp={"max_grad_norm": 0.1}, per_device_train_batch_size=2, max_steps=8)
    one.train()
    torch.testing.assert_close(two[0]["weights"], tiny.weights(one.model), atol=1e-6, rtol=0)
    assert two[0]["epsilon"] == two[1]["epsilon"] == one.epsilon()


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for mode in ("hooks", "ghost"):
        found = []
        for checkpointing in (False, True):
            run = tiny.trainer(
                tmp_path,
                model=tiny.llama(),
                rows=tiny.written(),
                dp={"max_grad_norm": 0.1, "grad_sample_mode": mode},
                activation_checkpointing=checkpointing,
                max_steps=1,
            )
            run.train()
            found.append(tiny.weights(run.model))
        torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=0)


def test_bf16_stays_close_and_is_clipped_exactly(tmp_path: Path) -> None:
    found = {}
    for half in (False, True):
        run = tiny.trainer(
            tmp_path,
            bf16=half,
            dp={"noise_multiplier": 0.0, "max_grad_norm": 0.1},
            per_device_train_batch_size=24,
        )
        run.train()
        found[half] = tiny.weights(run.model) - tiny.weights(tiny.bert())
    error = (found[True] - found[False]).norm() / found[False].norm()
    assert 0 < error < 0.05
    # Three steps of rate 0.1, each a mean of 24 records clipped to 0.1.
    assert found[True].norm() <= 3 * 0.1 * 0.1 * (1 + 1e-4)


def test_secure_run_has_no_seed_to_save(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, dp={"seed": None, "secure": True}, save_strategy="steps", save_steps=3, max_steps=3
    )
    run.train()
    assert not list(tmp_path.rglob("dp_secret.json"))
    assert run.privacy_report()["randomness"] == "os.urandom"
    again = tiny.trainer(tmp_path / "b", dp={"seed": None, "secure": True})
    again.train()
    assert not torch.equal(tiny.weights(run.model), tiny.weights(again.model))


def test_users_are_the_unit(tmp_path: Path) -> None:
    """Seven users of 3 or 4 records; sample rate 2/7; four records a user in a step at most."""
    run = tiny.trainer(
        tmp_path,
        dp={"unit": "user", "user_column": "user", "max_records_per_user": 2},
        per_device_train_batch_size=2,
    )
    run.train()
    assert run.sample_rate == 2 / 7
    assert run.privacy_report()["num_units"] == 7
    assert run.ledger.releases[0].sample_rate == 2 / 7


def test_user_moves_the_weights_by_one_clipping_norm_at_most(tmp_path: Path) -> None:
    """All 24 records are one user's: a step of rate 1 moves the weights by C = 0.01, not by 24 C."""
    rows = tiny.classified().remove_columns("user").add_column("user", ["ann"] * 24)
    run = tiny.trainer(
        tmp_path,
        rows=rows,
        dp={
            "noise_multiplier": 0.0,
            "max_grad_norm": 0.01,
            "unit": "user",
            "user_column": "user",
            "max_records_per_user": 24,
        },
        per_device_train_batch_size=1,
        max_steps=1,
        learning_rate=1.0,
    )
    before = tiny.weights(run.model)
    run.train()
    assert float((tiny.weights(run.model) - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_lora_on_a_causal_model_through_sft(tmp_path: Path) -> None:
    base = tiny.llama()
    rows = tiny.written().remove_columns(["labels", "attention_mask"])
    args = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        learning_rate=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        max_length=tiny.LENGTH,
        bf16=False,
    )
    run = DPSFTTrainer(
        tiny.lora(base, ["q_proj", "v_proj"]),
        args,
        train_dataset=rows,
        processing_class=tokenizer(),
        dp=DPConfig(noise_multiplier=4.0, seed=0),
    )
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) is ("lora" not in name), name
    assert run.epsilon() == pytest.approx(
        epsilon(sample_rate=4 / 24, noise_multiplier=4.0, num_steps=2, delta=1 / 240), abs=1e-9
    )


# What the user sees.


def test_logs_hold_epsilon_and_nothing_private(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        extra={"eval_dataset": tiny.classified(8, seed=5)},
    )
    out = run.train()
    logged = [entry for entry in run.state.log_history if "learning_rate" in entry]
    assert [entry["dp/epsilon"] for entry in logged] == sorted(entry["dp/epsilon"] for entry in logged)
    assert logged[-1]["dp/epsilon"] == run.epsilon()
    assert not [
        entry for entry in run.state.log_history if {"loss", "train_loss", "dp/clipped_ratio"} & set(entry)
    ]
    assert out.training_loss == 0
    assert run.state.total_flos == 0
    assert any(math.isfinite(entry.get("eval_loss", math.nan)) for entry in run.state.log_history)


def test_private_statistics_on_request(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, logging_steps=1, dp={"log_private_statistics": True, "max_grad_norm": 1e-3})
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(0.3 < loss < 1.5 for loss in losses)
    assert {entry["dp/clipped_ratio"] for entry in run.state.log_history if "dp/clipped_ratio" in entry} == {
        1.0
    }
    assert "training loss" in run.privacy_report()["not_covered"]


def test_epsilon_is_the_accountants(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, max_steps=5, dp={"delta": 1e-3})
    run.train()
    assert run.sample_rate == 4 / 24
    for accountant in ("pld", "rdp", "prv"):
        expected = epsilon(
            sample_rate=4 / 24, noise_multiplier=4.0, num_steps=5, delta=1e-3, accountant=accountant
        )
        assert run.epsilon(accountant) == pytest.approx(expected, abs=1e-12)


def test_noise_is_calibrated_to_the_budget(tmp_path: Path) -> None:
    run = tiny.trainer(
        tmp_path, max_steps=10, dp={"noise_multiplier": None, "target_epsilon": 0.5, "delta": 1e-3}
    )
    with pytest.raises(RuntimeError, match=r"the noise multiplier is computed when train\(\) starts"):
        run.noise_multiplier  # noqa: B018
    run.train()
    assert 0.499 < run.epsilon() <= 0.5


def test_earlier_run_on_the_same_data_is_added(tmp_path: Path) -> None:
    first = tiny.trainer(tmp_path / "a", save_strategy="steps", save_steps=3)
    first.train()
    path = tmp_path / "a" / "checkpoint-3" / "dp_ledger.json"
    second = tiny.trainer(tmp_path / "b", dp={"spent_ledger": str(path)})
    second.train()
    assert second.ledger.num_steps == 6
    assert second.epsilon() > first.epsilon()
    third = tiny.trainer(
        tmp_path / "c", dp={"spent_ledger": str(path), "noise_multiplier": None, "target_epsilon": 9.0}
    )
    with pytest.raises(
        RuntimeError, match="cannot be split between an earlier run .spent_ledger. and this one"
    ):
        third.train()


# What it refuses.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor averages over the tokens of the batch"),
        (
            {"train_sampling_strategy": "group_by_length"},
            "is no Poisson sampling, for which epsilon is computed",
        ),
        ({"dataloader_drop_last": True}, "dataloader_drop_last drops records by position"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size starts steps anew"),
        ({"ignore_data_skip": True}, "would draw the records of past steps again"),
        ({"include_num_input_tokens_seen": "all"}, "publishes lengths of the drawn records"),
        ({"max_grad_norm": 0.5}, "clips the noisy mean; leave it at its default"),
        ({"torch_compile": True}, "torch_compile hides the layers that hooks must see"),
        (
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
            "activation checkpointing must be re-entrant",
        ),
    ],
)
def test_arguments_that_void_the_guarantee(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"these arguments do not go with differential privacy: .*{message}"):
        tiny.trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", True, "fp16 needs a loss scaler"),
        ("use_liger_kernel", True, "without gradients of each record; switch it off"),
        ("fsdp", "full_shard", "norms by shard are not the records' norms"),
        ("deepspeed", {"zero": 1}, "deepspeed steps inside backward"),
        ("optim", "galore_adamw_layerwise", "steps layer by layer inside backward"),
        ("_n_gpu", 2, "more than one GPU in one process"),
        ("push_to_hub", True, "pushes checkpoints, and with them the seed that takes the noise off"),
    ],
)
def test_arguments_that_need_other_machines(tmp_path: Path, name: str, value: Any, message: str) -> None:
    args = tiny.arguments(tmp_path)
    setattr(args, name, value)
    args.hub_strategy = HubStrategy.ALL_CHECKPOINTS
    with pytest.raises(ValueError, match=message):
        DPTrainer(tiny.bert(), args, train_dataset=tiny.classified(), dp=DPConfig(noise_multiplier=1.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "packing puts records of different people into one row"),
        ({"padding_free": True}, "padding_free merges the records of a batch into one row"),
        ({"loss_type": "dft"}, "is not a mean over each record's tokens"),
        ({"activation_offloading": True}, "activation_offloading is not supported"),
    ],
)
def test_sft_options_that_mix_records(tmp_path: Path, options: dict, message: str) -> None:
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    with pytest.raises(ValueError, match=message):
        DPSFTTrainer(tiny.llama(), args, train_dataset=tiny.written(), dp=DPConfig(noise_multiplier=1.0))


def test_arguments_are_never_guessed() -> None:
    with pytest.raises(TypeError, match="Batch size and length of the run decide epsilon"):
        DPTrainer(tiny.bert(), train_dataset=tiny.classified(), dp=DPConfig(noise_multiplier=1.0))


def test_methods_that_carry_the_guarantee_are_sealed(tmp_path: Path) -> None:
    class Own(DPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return super().compute_loss(*args, **kwargs)

    with pytest.raises(TypeError, match="Own replaces compute_loss.*, which carries the guarantee here"):
        tiny.trainer(tmp_path, trainer_class=Own)


def test_data_without_an_index_and_batches_larger_than_the_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="A stream cannot be sampled at a known rate"):
        tiny.trainer(tmp_path, rows=tiny.classified().to_iterable_dataset())
    with pytest.raises(ValueError, match="exceeds the 24 records of train_dataset. Make it smaller"):
        tiny.trainer(tmp_path, per_device_train_batch_size=25).train()
    with pytest.raises(ValueError, match="user_column='who' is no column of train_dataset"):
        tiny.trainer(tmp_path, dp={"unit": "user", "user_column": "who"})


def test_loss_of_the_batch_is_refused(tmp_path: Path) -> None:
    def mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits, labels)

    run = tiny.trainer(tmp_path, extra={"compute_loss_func": mean})
    with pytest.raises(ValueError, match="the loss must be one number for each record"):
        run.train()


def test_loss_that_mixes_records_is_refused(tmp_path: Path) -> None:
    def mixed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits - outputs.logits.mean(0)
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    run = tiny.trainer(tmp_path, extra={"compute_loss_func": mixed})
    before = tiny.weights(run.model)
    with pytest.raises(RuntimeError, match="the model or the loss mixes records"):
        run.train()
    assert torch.equal(tiny.weights(run.model), before)
    assert run.ledger.num_steps == 0


@pytest.mark.parametrize(
    ("errors", "looks", "passes"),
    [
        ([1e-5], 1, True),
        # A kink that rounding decides: one chunk a little off, the next one right.
        ([0.002, 1e-5], 2, True),
        ([0.002, 0.003, 0.002, 0.004], 4, False),
        # No rounding: refused at the first look.
        ([0.3, 1e-5], 1, False),
        ([math.nan, 1e-5], 1, False),
    ],
)
def test_the_self_check_looks_again_only_at_small_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, errors: list[float], looks: int, passes: bool
) -> None:
    seen = []

    def check(engine: Any, losses: Any, inputs: dict[str, Tensor], *rest: Any) -> tuple[float, Tensor]:
        seen.append(inputs["input_ids"])
        return errors[len(seen) - 1], losses({name: tensor[:1] for name, tensor in inputs.items()})

    monkeypatch.setattr("hf_plugins.dp.trainer.self_check_error", check)
    private = tiny.trainer(tmp_path, dp=EVERYBODY, rows=tiny.classified(12), max_steps=1)
    if passes:
        private.train()
    else:
        with pytest.raises(RuntimeError, match="the model or the loss mixes records"):
            private.train()
    assert len(seen) == looks
    assert len({str(ids.tolist()) for ids in seen}) == looks, "the same records again"


def test_own_loss_by_record_trains(tmp_path: Path) -> None:
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        assert num_items_in_batch is None
        return nn.functional.cross_entropy(outputs.logits, labels, reduction="none")

    found = []
    for extra in ({}, {"compute_loss_func": own}):
        run = tiny.trainer(tmp_path, extra=extra)
        run.train()
        found.append(tiny.weights(run.model))
    assert torch.equal(*found)


def test_loss_that_is_not_the_models_own_is_refused(tmp_path: Path) -> None:
    """A model that adds something to its loss (as mixtures of experts do) is not trained without it."""
    model = tiny.bert()
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = plain(*args, **kwargs)
        if outputs.loss is not None:
            outputs.loss = outputs.loss + 0.5
        return outputs

    model.forward = forward
    run = tiny.trainer(
        tmp_path,
        model=model,
        extra={},
        remove_unused_columns=False,
        rows=tiny.classified().remove_columns("user"),
    )
    with pytest.raises(RuntimeError, match="it is no plain ForSequenceClassification loss"):
        run.train()


class _Meddler(TrainerCallback):
    """Does one thing before the optimizer's step, or at the end of one."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        parameter = next(p for p in model.parameters() if p.grad is not None)
        if self.what == "scale":
            parameter.grad.mul_(2)
        elif self.what == "replace":
            parameter.grad = parameter.grad.clone()

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if self.what == "unfreeze":
            model.requires_grad_(True)
        elif self.what == "step":
            kwargs["optimizer"].step()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("scale", "a gradient was changed or added after its noise"),
        ("replace", "a gradient was changed or added after its noise"),
        ("step", "without a noisy gradient of its own"),
        ("unfreeze", r"the set of trainable parameters changed since train\(\) began"),
    ],
)
def test_callbacks_cannot_break_a_step(tmp_path: Path, what: str, message: str) -> None:
    model = tiny.bert()
    model.bert.embeddings.requires_grad_(False)
    run = tiny.trainer(tmp_path, model=model, extra={"callbacks": [_Meddler(what)]})
    with pytest.raises(RuntimeError, match=message):
        run.train()


def test_foreign_parameters_in_the_optimizer_are_refused(tmp_path: Path) -> None:
    model, stranger = tiny.bert(), nn.Linear(1, 1)
    optimizer = torch.optim.SGD([*model.parameters(), *stranger.parameters()], lr=0.1)
    run = tiny.trainer(tmp_path, model=model, extra={"optimizers": (optimizer, None)})
    with pytest.raises(
        ValueError, match="the optimizer holds 2.* trainable parameters that are not of this model"
    ):
        run.train()


def test_own_optimizer_trains(tmp_path: Path) -> None:
    model = tiny.bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = tiny.trainer(tmp_path, model=model, extra={"optimizers": (optimizer, None)})
    run.train()
    again = tiny.trainer(tmp_path)
    again.train()
    assert torch.equal(tiny.weights(model), tiny.weights(again.model))


def test_second_train_over_budget_is_refused_before_it_steps(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, dp={"noise_multiplier": None, "target_epsilon": 0.5})
    run.train()
    after = tiny.weights(run.model)
    with pytest.raises(RuntimeError, match="more steps would bring epsilon to .* over the budget of 0.5"):
        run.train()
    assert torch.equal(tiny.weights(run.model), after)


def test_checkpoint_without_a_ledger_is_refused(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=3)
    run.train()
    (tmp_path / "checkpoint-2" / "dp_ledger.json").unlink()
    with pytest.raises(RuntimeError, match="so what it has spent is unknown"):
        tiny.trainer(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_steps_beyond_the_plan_and_outside_of_train_are_refused(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path)
    with pytest.raises(RuntimeError, match=r"training_step\(\) belongs to train\(\), which checks the model"):
        run.training_step(run.model, None)
    run._noise_multiplier = 1.0
    with pytest.raises(RuntimeError, match="planned steps are spent; another one is not in the budget"):
        run._pay()


def test_search_over_trials_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="hyperparameter_search trains many times on the same records"):
        tiny.trainer(tmp_path).hyperparameter_search()


def test_batch_norm_is_refused_before_any_step(tmp_path: Path) -> None:
    model = tiny.bert()
    model.bert.pooler.activation = nn.Sequential(nn.BatchNorm1d(8), nn.Tanh())
    with pytest.raises(ValueError, match="these layers mix the records of a batch"):
        tiny.trainer(tmp_path, model=model).train()


def test_no_privacy_is_reported_as_such(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tiny.trainer(tmp_path, dp={"noise_multiplier": 0.0}, logging_steps=1)
    run.train()
    assert run.epsilon() == math.inf
    assert "this run is not private; epsilon is infinite" in caplog.text
    assert run.privacy_report()["epsilon"] > 1e300
    json.dumps(run.privacy_report(), allow_nan=False)


def test_ledger_of_the_report_is_loadable(tmp_path: Path) -> None:
    run = tiny.trainer(tmp_path)
    run.train()
    run.save_model(str(tmp_path / "out"))
    ledger = Ledger()
    ledger.load_state_dict(json.loads((tmp_path / "out" / "dp_ledger.json").read_text()))
    assert ledger.releases == run.ledger.releases
