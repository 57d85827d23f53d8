"""A DPNASNet trained by `DPTrainer`: the release's optimizer, a finite epsilon, a usable result."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback, TrainingArguments, pipeline

from hf_plugins.dp import DPConfig
from hf_plugins.dp.model import attach
from hf_plugins.dpnas.model import DPNASNetConfig, DPNASNetForImageClassification
from hf_plugins.dpnas.trainer import ImageRecords, accuracy, make_trainer, save_for_pipeline, stack_records


def records(num: int = 24) -> ImageRecords:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % 2
    images = 0.2 * torch.rand(num, 1, 28, 28, generator=generator) + labels.view(-1, 1, 1, 1)
    return ImageRecords(images, labels)


def arguments(folder: Path, **changed: object) -> TrainingArguments:
    options = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 0.5, **changed}
    return TrainingArguments(
        output_dir=str(folder), save_strategy="no", report_to=[], use_cpu=True, **options
    )


@pytest.mark.host
def test_training_is_charged_and_the_result_is_usable(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DPNASNetForImageClassification(DPNASNetConfig.preset("mnist"))
    before = model.network.stem[0].weight.detach().clone()
    dp = DPConfig(noise_multiplier=1.0, max_grad_norm=0.1, grad_sample_mode="hooks", seed=1)
    options = arguments(tmp_path, lr_scheduler_type="constant")
    trainer = make_trainer(model, options, dp, records(), records())
    trainer.train()
    assert not torch.equal(before, model.network.stem[0].weight)
    assert trainer.ledger.num_steps == 3
    assert [r.sample_rate for r in trainer.ledger.releases] == [pytest.approx(1 / 3)]
    group = trainer.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    save_for_pipeline(trainer, tmp_path / "model")
    answer = pipeline("image-classification", model=str(tmp_path / "model"))(Image.new("L", (28, 28), 255))
    assert len(answer) == 5


def loss_of(
    model: torch.nn.Module, weights: dict[str, torch.Tensor], image: torch.Tensor, label: torch.Tensor
) -> torch.Tensor:
    logits = torch.func.functional_call(model, weights, (image[None],)).logits
    return torch.nn.functional.cross_entropy(logits, label[None])


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_gradients_of_each_image_equal_a_loop_and_functorch(name: str, mode: str) -> None:
    torch.manual_seed(0)
    config = DPNASNetConfig.preset(name)
    # In single precision rounding decides some of the poolings, and whole gradients differ.
    model = DPNASNetForImageClassification(config).double().train()
    images = torch.randn(3, config.in_channels, config.image_size, config.image_size).double()
    labels = torch.tensor([1, 7, 3])
    weights = {key: p.detach().clone() for key, p in model.named_parameters()}
    one = torch.func.grad(lambda w, x, y: loss_of(model, w, x, y))
    looped = [one(weights, x, y) for x, y in zip(images, labels, strict=True)]
    mapped = torch.func.vmap(one, in_dims=(None, 0, 0))(weights, images, labels)
    norms = torch.stack([torch.stack([g.norm() for g in each.values()]).norm() for each in looped])
    engine = attach(model, mode=mode, max_grad_norm=0.1, ghost_fault=None)
    engine.start(3)
    losses = torch.nn.functional.cross_entropy(model(images).logits, labels, reduction="none")
    result = engine.backward(losses, torch.arange(3), 3)
    engine.detach()
    torch.testing.assert_close(result.norms, norms, rtol=1e-5, atol=0)
    # All records are clipped, so the sum is that of gradients of length 0.1.
    for key, found in zip(engine.names, result.contributions, strict=True):
        wanted = sum(each[key] * (0.1 / norm) for each, norm in zip(looped, norms, strict=True))
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mapped[key], torch.stack([each[key] for each in looped]))


def test_at_the_start_every_gradient_is_clipped() -> None:
    """On unit noise the CIFAR-10 net's gradients are some 33 to 39 long (dossier, fact 5), 300 times the
    clipping norm: training is SGD on normalised gradients.
    """
    torch.manual_seed(0)
    model = DPNASNetForImageClassification(DPNASNetConfig.preset("cifar10")).train()
    engine = attach(model, mode="hooks", max_grad_norm=0.1, ghost_fault=None)
    engine.start(8)
    losses = torch.nn.functional.cross_entropy(
        model(torch.randn(8, 3, 32, 32)).logits, torch.arange(8), reduction="none"
    )
    norms = engine.backward(losses, torch.arange(8), 8).norms
    engine.detach()
    assert 25 < float(norms.min())
    assert float(norms.max()) < 50


@pytest.mark.host
def test_noise_of_a_step_is_the_releases(tmp_path: Path) -> None:
    """A weight moves by lr * sigma * C / batch = 2.0 * 2.15 * 0.1 / 2048 = 2.1e-4 a step from noise (fact 6);
    here with a batch of 8 records of no gradient, so 256 times that.
    """
    torch.manual_seed(0)
    model = DPNASNetForImageClassification(DPNASNetConfig.preset("mnist"))
    # Without weights behind it no image moves the stem, and the loss is flat in all but the last bias.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    dp = DPConfig(noise_multiplier=2.15, max_grad_norm=0.1, grad_sample_mode="hooks", seed=1)
    options = arguments(tmp_path, max_steps=1, learning_rate=2.0, lr_scheduler_type="constant")
    make_trainer(model, options, dp, records()).train()
    moved = torch.cat([p.detach().flatten() for p in model.network.cells.parameters()])
    assert float(moved.std()) == pytest.approx(2.0 * 2.15 * 0.1 / 8, rel=0.03)
    assert 2.0 * 2.15 * 0.1 / 2048 == pytest.approx(2.1e-4, rel=1e-3)


@pytest.mark.host
@pytest.mark.parametrize(("schedule", "last"), [("constant", 2.0), ("linear", 1.0)])
def test_schedule_is_the_hosts(tmp_path: Path, schedule: str, last: float) -> None:
    """``lr_scheduler_type`` is obeyed: the release's constant rate, or half of it after one step of two."""
    dp = DPConfig(noise_multiplier=1.0, max_grad_norm=0.1, seed=1)
    options = arguments(tmp_path, max_steps=2, learning_rate=2.0, lr_scheduler_type=schedule)
    trainer = make_trainer(
        DPNASNetForImageClassification(DPNASNetConfig.preset("mnist")), options, dp, records()
    )
    rates: list[float] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: object, state: object, control: object, **kwargs: Any) -> None:
            rates.append(kwargs["optimizer"].param_groups[0]["lr"])

    trainer.add_callback(Watch())
    trainer.train()
    assert rates == [2.0, last]


def test_accuracy_counts_right_answers() -> None:
    class Prediction:
        predictions = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]).numpy()
        label_ids = torch.tensor([1, 0, 0, 0]).numpy()

    assert accuracy(Prediction()) == {"accuracy": 0.75}


def test_records_pair_and_stack() -> None:
    batch = stack_records([records()[0], records()[3]])
    assert batch["pixel_values"].shape == (2, 1, 28, 28)
    assert batch["labels"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="every image needs a label; got .*2 images and 3 labels"):
        ImageRecords(torch.zeros(2, 1, 28, 28), torch.zeros(3))
