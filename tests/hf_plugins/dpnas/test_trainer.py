"""A DPNASNet trained by `DPTrainer`: the release's optimizer, a finite epsilon, a usable result."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import TrainingArguments, pipeline

from hf_plugins.dp import DPConfig
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
    trainer = make_trainer(model, arguments(tmp_path), dp, records(), records())
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
