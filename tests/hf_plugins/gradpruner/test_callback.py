"""The callback inside the real Trainer: what it collects, when, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_plugins.decoder_layers import find_decoder_layers
from hf_plugins.gradpruner import GradPrunerCallback, GradPrunerConfig, prune_model
from hf_plugins.gradpruner import callback as module
from hf_plugins.gradpruner.callback import find_lora_modules, refuse_hidden_gradients, refuse_split_batches
from hf_plugins.gradpruner.storage import HISTORY_FOLDER
from tests.contract.rooms import ROOT
from tests.hf_plugins import tiny_models
from tests.hf_plugins.gradpruner import ranks
from tests.hf_plugins.gradpruner.collected import arguments, collect, rows, with_lora

pytestmark = pytest.mark.host


def steps_of(callback: GradPrunerCallback) -> list[float]:
    return [sum(step.values()) for step in callback.record.norms]


# ------------------------------------------------------------------ what is collected


def test_first_step_is_zero(tmp_path: Path) -> None:
    """Acceptance fact 1: B = 0 makes g_A = 0; with linear warm-up from 0 the second step as well."""
    found = steps_of(collect(tmp_path))
    assert found[0] == 0.0
    assert found[1] > 0.0
    found = steps_of(collect(tmp_path, lr_scheduler_type="linear", warmup_steps=4))
    assert found[:2] == [0.0, 0.0]
    assert found[2] > 0.0


def test_only_void_steps_are_an_error(tmp_path: Path) -> None:
    """Acceptance fact 1: t = 2 under warm-up."""
    config = GradPrunerConfig(num_steps=2, n_prune=2)
    with pytest.raises(ValueError, match="LoRA starts with B = 0"):
        collect(tmp_path, config=config, lr_scheduler_type="linear", warmup_steps=4)


def test_factors_are_what_autograd_says() -> None:
    """Acceptance fact 3: g_B = s G A^T, g_A = s B^T G, product = s^2 G A^T B^T G = s G dW^T G; s = alpha / r
    = 2."""
    model = with_lora(tiny_models.build("llama"))
    modules, _ = find_lora_modules(model)
    for lora in modules.values():
        lora.lora_B["default"].weight.data.normal_(0, 0.1)
        lora.get_base_layer().weight.requires_grad_()
    batch = tiny_models.token_ids()
    model(input_ids=batch, labels=batch).loss.backward()
    for key, lora in modules.items():
        a, b, g = (
            lora.lora_A["default"].weight,
            lora.lora_B["default"].weight,
            lora.get_base_layer().weight.grad,
        )
        torch.testing.assert_close(b.grad, 2 * g @ a.T, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(a.grad, 2 * b.T @ g, rtol=1e-3, atol=1e-6)
        left, right = module._step_factors(key, lora, "product")
        torch.testing.assert_close(left @ right, 2 * g @ (2 * b @ a).T @ g, rtol=1e-3, atol=1e-5)


class Recorder(TrainerCallback):
    """Copies the gradients that the optimizer is about to use."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
        pairs, _ = find_lora_modules(kwargs["model"])
        self.seen.append(
            {
                k: (m.lora_A["default"].weight.grad.clone(), m.lora_B["default"].weight.grad.clone())
                for k, m in pairs.items()
            }
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_scores_are_those_of_the_clipped_gradients(family: str, tmp_path: Path) -> None:
    """Sum over modules of the dense squares, mean over steps; the history holds the same in the weight's
    layout."""
    recorder, callback = Recorder(), GradPrunerCallback(GradPrunerConfig(num_steps=4, n_prune=2))
    model = tiny_models.build(family)
    data = rows()
    if family == "bert":
        data = [{"input_ids": row["input_ids"], "labels": torch.tensor(i % 3)} for i, row in enumerate(data)]
    options = {"task_type": "SEQ_CLS"} if family == "bert" else {}
    trainer = Trainer(
        with_lora(model, **options),
        arguments(tmp_path, max_grad_norm=0.5),
        train_dataset=data,
        callbacks=[callback, recorder],
    )
    trainer.train()
    assert trainer.state.global_step == 4
    scores = torch.zeros(6, dtype=torch.float64)
    for step in recorder.seen[:4]:
        norm = sum(x.square().sum() for pair in step.values() for x in pair)
        assert norm <= 0.5**2 * 1.001
        for (layer, _), (a, b) in step.items():
            scores[layer] += (b.double() @ a.double()).square().sum() / 4
    torch.testing.assert_close(callback.scores(), scores, rtol=1e-4, atol=1e-30)
    assert callback.history is not None
    layers = find_decoder_layers(model).modules
    for (layer, name), (a, b) in recorder.seen[2].items():
        left, right = callback.history.factors(layer, name)
        weight = layers[layer].get_submodule(name).get_base_layer().weight
        assert (left.shape[1], right.shape[2]) == weight.shape
        dense = (b @ a).T if family == "gpt2" else b @ a
        torch.testing.assert_close(left[2] @ right[2], dense, rtol=1e-4, atol=1e-9)


def test_scores_are_logged_and_training_stops(tmp_path: Path) -> None:
    callback = GradPrunerCallback(GradPrunerConfig(num_steps=3, n_prune=2))
    trainer = Trainer(
        with_lora(tiny_models.build("llama")), arguments(tmp_path), train_dataset=rows(), callbacks=[callback]
    )
    trainer.train()
    assert trainer.state.global_step == 3
    entry = next(entry for entry in trainer.state.log_history if "gradpruner/score_0" in entry)
    assert [entry[f"gradpruner/score_{i}"] for i in range(6)] == callback.scores().tolist()
    assert entry["step"] == entry["gradpruner/steps"] == 3


def test_training_can_go_on(tmp_path: Path) -> None:
    """stop_after=False: the same scores, all steps trained, and a share of the run as num_steps: .4 of 8 is
    4 steps."""
    callback = GradPrunerCallback(GradPrunerConfig(num_steps=0.4, n_prune=2, stop_after=False))
    trainer = Trainer(
        with_lora(tiny_models.build("llama")), arguments(tmp_path), train_dataset=rows(), callbacks=[callback]
    )
    trainer.train()
    assert trainer.state.global_step == 8
    assert len(callback.record.norms) == 4
    assert torch.equal(callback.scores(), collect(tmp_path).scores())


def test_base_weights_are_untouched(tmp_path: Path) -> None:
    """Acceptance fact 13."""
    model = tiny_models.build("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peft = with_lora(model)
    Trainer(
        peft,
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[GradPrunerCallback(GradPrunerConfig(num_steps=3))],
    ).train()
    after = peft.unload().state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_plan_to_short_model(tmp_path: Path) -> None:
    """From training to a shorter model in four lines; equal seeds give equal plans (acceptance fact 14)."""
    model = tiny_models.build("llama")
    callback = collect(tmp_path, model=model)
    plan = callback.plan()
    assert collect(tmp_path).plan() == plan
    short = tiny_models.build("llama")
    counts = prune_model(short, plan, history=callback.history)
    assert short.config.num_hidden_layers == 3
    assert sum(count["num_merged"] for count in counts.values()) > 0


# ------------------------------------------------------------------ estimators and histories


def test_exact_estimator_is_the_squared_gradient(tmp_path: Path) -> None:
    """Against G from a backward pass through trainable base weights, on the very first step (lr plays no
    part)."""
    config = GradPrunerConfig(num_steps=1, n_prune=2, estimator="exact")
    found = collect(tmp_path, config=config, train_sampling_strategy="sequential").record.norms[0]
    model = tiny_models.build("llama")
    batch = torch.stack([row["input_ids"] for row in rows()[:4]])
    model(input_ids=batch, labels=batch).loss.backward()
    for (layer, name), value in found.items():
        gradient = model.model.layers[layer].get_submodule(name).weight.grad
        assert value == pytest.approx(float(gradient.square().sum()), rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_exact_estimator_under_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    config = GradPrunerConfig(num_steps=2, n_prune=2, estimator="exact")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    got, want = collect(tmp_path, config=config, **options), collect(tmp_path, config=config)
    torch.testing.assert_close(got.scores(), want.scores(), rtol=1e-4, atol=0)


def test_exact_estimator_takes_the_dense_way_for_many_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 x 16 tokens outnumber sqrt(32 * 48): the gradient is formed; both ways give one number."""
    config = GradPrunerConfig(num_steps=1, n_prune=2, estimator="exact")
    few = collect(tmp_path, config=config, per_device_train_batch_size=2)
    calls: list[int] = []
    real = module.squared_norm
    monkeypatch.setattr(module, "squared_norm", lambda left, right: (calls.append(1), real(left, right))[1])
    many = collect(tmp_path, config=config, per_device_train_batch_size=32)
    product = len(many.record.norms[0])
    assert len(calls) < 2 * product
    model = tiny_models.build("llama")
    batch = torch.stack([row["input_ids"] for row in rows()])
    model(input_ids=batch, labels=batch).loss.backward()
    gradient = model.model.layers[3].self_attn.v_proj.weight.grad
    assert many.record.norms[0][3, "self_attn.v_proj"] == pytest.approx(
        float(gradient.square().sum()), rel=1e-4
    )
    assert few.record.norms[0] != many.record.norms[0]


def test_first_order_sees_the_first_step(tmp_path: Path) -> None:
    """B = 0 leaves g_B A, so no step is void; rank-2r factors are kept."""
    callback = collect(tmp_path, config=GradPrunerConfig(num_steps=2, n_prune=2, estimator="first_order"))
    assert all(value > 0 for value in steps_of(callback))
    assert callback.history is not None
    assert callback.history.factors(0, "self_attn.q_proj")[0].shape == (2, 32, 4)


def test_histories_agree(tmp_path: Path) -> None:
    """Disk = memory, bit for bit; scores keeps none; history_layers keeps some."""
    memory = collect(tmp_path)
    disk = collect(tmp_path, config=GradPrunerConfig(num_steps=4, n_prune=3, n_merge="2", history="disk"))
    none = collect(tmp_path, config=GradPrunerConfig(num_steps=4, n_prune=3, n_merge="2", history="scores"))
    assert memory.scores().tolist() == disk.scores().tolist() == none.scores().tolist()
    assert none.history is None
    assert memory.history is not None
    assert disk.history is not None
    assert len(list((tmp_path / HISTORY_FOLDER).glob("*.safetensors"))) == 4
    for one, two in zip(
        memory.history.factors(2, "mlp.up_proj"), disk.history.factors(2, "mlp.up_proj"), strict=True
    ):
        assert torch.equal(one, two)
    again = collect(tmp_path, config=GradPrunerConfig(num_steps=3, n_prune=3, n_merge="2", history="disk"))
    assert again.history is not None
    assert len(again.history) == 3


# ------------------------------------------------------------------ runs that must agree


def test_accumulation_equals_one_batch(tmp_path: Path) -> None:
    """Acceptance fact 11, clipping on: 4 x 1 = 1 x 4."""
    whole, split = ranks.trained(tmp_path, batch=4), ranks.trained(tmp_path, batch=1, accumulation=4)
    torch.testing.assert_close(split.scores(), whole.scores(), rtol=1e-4, atol=0)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Acceptance fact 11: DDP in the Trainer, and FSDP2's sharded gradients, against one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["-m", "tests.hf_plugins.gradpruner.ranks", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "scores.json").read_text())
    want = ranks.trained(tmp_path, batch=4).scores().tolist()
    assert found["ddp"] == pytest.approx(want, rel=1e-4)
    assert found["fsdp2"] == pytest.approx(want, rel=1e-4)
    assert found["history"] == [3, 3]


@pytest.mark.parametrize("history", ["memory", "disk"])
def test_resumed_equals_uninterrupted(tmp_path: Path, history: str) -> None:
    """Acceptance fact 11: stopped after 3 of 5 scored steps."""

    def run(folder: Path, steps: int, resume: bool) -> GradPrunerCallback:
        config = GradPrunerConfig(num_steps=5, n_prune=2, history=history)  # type: ignore[arg-type]
        callback = GradPrunerCallback(config)
        args = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=3)
        peft = with_lora(tiny_models.build("llama"))
        trainer = Trainer(peft, args, train_dataset=rows(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return callback

    whole = run(tmp_path / "a", 8, resume=False)
    run(tmp_path / "b", 4, resume=False)
    resumed = run(tmp_path / "b", 8, resume=True)
    assert len(resumed.record.norms) == 5
    torch.testing.assert_close(resumed.scores(), whole.scores(), rtol=1e-6, atol=0)
    assert resumed.history is not None
    assert whole.history is not None
    for got, want in zip(
        resumed.history.factors(1, "mlp.up_proj"), whole.history.factors(1, "mlp.up_proj"), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-9)
    for path in (tmp_path / "b" / "checkpoint-3").glob("gradpruner_scores*"):
        path.unlink()
    with pytest.raises(ValueError, match="Name the checkpoint by resume_from="):
        run(tmp_path / "b", 8, resume=True)


def test_sft_trainer(tmp_path: Path) -> None:
    """trl's trainer with peft_config: the same callback."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny_models.VOCABULARY)}, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w1", pad_token="w2", unk_token="w2")
    data = Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row["input_ids"]) for row in rows()]})
    callback = GradPrunerCallback(GradPrunerConfig(num_steps=4, n_prune=2))
    args = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        tiny_models.build("llama"),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[callback],
    )
    trainer.train()
    assert trainer.state.global_step == 4
    assert (callback.scores() > 0).all()
    assert len(callback.plan().dropped) == 2


# ------------------------------------------------------------------ what goes wrong


def test_steps_with_nan_are_skipped_and_counted(tmp_path: Path) -> None:
    """Acceptance fact 12: four finite steps are still collected."""

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
            if state.global_step == 2:
                pairs, _ = find_lora_modules(kwargs["model"])
                for lora in pairs.values():
                    lora.lora_A["default"].weight.grad.fill_(float("nan"))
                    lora.lora_A["default"].weight.grad = lora.lora_A["default"].weight.grad

        def on_optimizer_step(self, args, state, control, **kwargs) -> None:  # noqa: ANN001, ANN003
            for parameter in kwargs["model"].parameters():
                parameter.data.nan_to_num_(0.01)

    callback = GradPrunerCallback(GradPrunerConfig(num_steps=4, n_prune=2))
    trainer = Trainer(
        with_lora(tiny_models.build("llama")),
        arguments(tmp_path),
        train_dataset=rows(),
        callbacks=[Poison(), callback],
    )
    trainer.train()
    assert callback.record.num_skipped == 1
    assert len(callback.record.norms) == 4
    assert trainer.state.global_step == 5
    assert callback.history is not None
    assert len(callback.history) == 4
    assert torch.isfinite(callback.scores()).all()


def test_short_runs_and_little_data_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(module.logger, "warning", told.append)
    callback = collect(tmp_path, config=GradPrunerConfig(num_steps=40, n_prune=2), max_steps=4)
    assert len(callback.record.norms) == 4
    assert ["training ended after 4 scored steps, 40 were wanted" in text for text in told] == [True]
    told.clear()
    big = [rows(1)[0]] * 10_000
    peft = with_lora(tiny_models.build("llama"))
    callback = GradPrunerCallback(GradPrunerConfig(num_steps=3, n_prune=2))
    Trainer(
        peft, arguments(tmp_path, per_device_train_batch_size=1), train_dataset=big, callbacks=[callback]
    ).train()
    assert ["below 0.05 % of the data" in text for text in told] == [True]


def test_no_lora() -> None:
    model = tiny_models.build("llama")
    with pytest.raises(ValueError, match="or give SFTTrainer a peft_config"):
        find_lora_modules(model)
    with pytest.raises(ValueError, match="GradPruner has nothing to score. Use target_modules='all-linear'"):
        find_lora_modules(with_lora(tiny_models.build("llama"), target_modules=["lm_head"]))


def test_adapters_that_hide_the_formula() -> None:
    with pytest.raises(ValueError, match="exactly one active plain LoRA adapter is needed"):
        find_lora_modules(with_lora(tiny_models.build("llama"), use_dora=True))
    two = with_lora(tiny_models.build("llama"))
    two.add_adapter("second", LoraConfig(target_modules="all-linear"))
    two.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="exactly one active plain LoRA adapter is needed"):
        find_lora_modules(two)


def test_lora_on_something_else_than_linear() -> None:
    model = tiny_models.build("llama")
    for layer in model.model.layers:
        layer.mlp.lookup = torch.nn.Embedding(3, 4)
    peft = with_lora(model, target_modules=["lookup", "q_proj"])
    assert set(name for _, name in find_lora_modules(peft)[0]) == {"self_attn.q_proj"}
    model = tiny_models.build("llama")
    for layer in model.model.layers:
        layer.mlp.mix = torch.nn.Conv1d(4, 4, 1)
    with pytest.raises(ValueError, match="only linear modules can. Take it out of target_modules"):
        find_lora_modules(with_lora(model, target_modules=["mix"]))


def test_models_that_cannot_be_shortened_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx"):
        find_lora_modules(with_lora(tiny_models.gpt2(2, scale_attn_by_inverse_layer_idx=True)))
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        find_lora_modules(with_lora(tiny_models.t5()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_prune": 6}, "6 of 6 layers shall go"),
        ({"n_prune": 2, "n_merge": "3"}, "n_merge=3 of 2 dropped layers"),
        ({"layers": [0, 2]}, "listed to go and protected"),
        ({"protect": [7], "n_prune": 1}, "protect names layers"),
    ],
)
def test_counts_are_checked_before_training(options: dict, message: str, tmp_path: Path) -> None:
    """Acceptance fact 12: no step is taken."""
    callback = GradPrunerCallback(GradPrunerConfig(**options))
    trainer = Trainer(
        with_lora(tiny_models.build("llama")), arguments(tmp_path), train_dataset=rows(), callbacks=[callback]
    )
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_frozen_adapters_are_told(tmp_path: Path) -> None:
    peft = with_lora(tiny_models.build("llama"))
    peft.base_model.model.model.layers[2].mlp.up_proj.lora_B["default"].weight.requires_grad_(False)
    callback = GradPrunerCallback(GradPrunerConfig(num_steps=3, n_prune=2))
    with pytest.raises(RuntimeError, match="it is frozen or was not used in the forward pass"):
        Trainer(peft, arguments(tmp_path), train_dataset=rows(), callbacks=[callback]).train()


def test_engines_that_hide_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance fact 12; the state is what accelerate keeps when such an engine runs."""
    args = arguments(tmp_path)
    refuse_hidden_gradients(args)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {"distributed_type": DistributedType.DEEPSPEED})
    with pytest.raises(ValueError, match="gradients are already freed when this callback runs: DeepSpeed"):
        refuse_hidden_gradients(args)
    for version in (1, 2):
        state = {
            "distributed_type": DistributedType.FSDP,
            "fsdp_plugin": SimpleNamespace(fsdp_version=version),
        }
        monkeypatch.setattr(AcceleratorState, "_shared_state", state)
        if version == 1:
            with pytest.raises(ValueError, match="FSDP1 keeps gradients as flat shards"):
                refuse_hidden_gradients(args)
        else:
            refuse_hidden_gradients(args)
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    for optimizer in ("galore_adamw_layerwise", "lomo"):
        with pytest.raises(ValueError, match="so no gradient is left to score. Use optim='adamw_torch'"):
            refuse_hidden_gradients(arguments(tmp_path, optim=optimizer))


def test_exact_needs_the_batch_in_one_piece(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="estimator='exact' needs the whole batch in one backward pass"):
        refuse_split_batches(arguments(tmp_path, gradient_accumulation_steps=2))
    config = GradPrunerConfig(num_steps=2, n_prune=2, estimator="exact")
    with pytest.raises(ValueError, match="Use estimator='product'"):
        collect(tmp_path, config=config, gradient_accumulation_steps=2)
