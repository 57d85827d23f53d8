"""DPNASNet inside transformers: saved and loaded by the Auto classes, used by a pipeline, trained by a
Trainer.
"""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

from hf_plugins.dpnas.genotypes import RELEASED
from hf_plugins.dpnas.model import DPNASNetConfig, DPNASNetForImageClassification, DPNASNetImageProcessor


def saved(folder: Path, name: str = "mnist") -> DPNASNetForImageClassification:
    model = DPNASNetForImageClassification(DPNASNetConfig.preset(name))
    model.save_pretrained(folder)
    DPNASNetImageProcessor.for_model(model.config).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("name", "count"), [("cifar10", 529434), ("mnist", 213418), ("fashion_mnist", 214570)]
)
def test_presets_are_the_released_networks(name: str, count: int) -> None:
    model = DPNASNetForImageClassification(DPNASNetConfig.preset(name))
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.config.genotype == RELEASED[name].triples()


def test_auto_classes_give_the_same_logits(tmp_path: Path) -> None:
    model = saved(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(again, DPNASNetForImageClassification)
    assert AutoConfig.from_pretrained(tmp_path).genotype == model.config.genotype
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(again(pixel_values=x).logits, model(pixel_values=x).logits, atol=0, rtol=0)


def test_loss_is_the_mean_cross_entropy() -> None:
    model = DPNASNetForImageClassification(DPNASNetConfig.preset("mnist"))
    x, y = torch.randn(3, 1, 28, 28), torch.tensor([1, 2, 3])
    out = model(pixel_values=x, labels=y)
    torch.testing.assert_close(out.loss, -out.logits.log_softmax(1)[torch.arange(3), y].mean())
    assert model(pixel_values=x).loss is None


def test_processor_makes_grey_and_colour_tensors() -> None:
    grey = DPNASNetImageProcessor.for_model(DPNASNetConfig.preset("mnist"))
    pixels = grey(Image.new("RGB", (50, 60), (255, 255, 255)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.ones(1, 1, 28, 28))
    colour = DPNASNetImageProcessor.for_model(DPNASNetConfig.preset("cifar10"))
    pictures = [Image.new("L", (32, 32), 0), Image.new("L", (32, 32), 255)]
    pixels = colour(pictures, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 32, 32)
    torch.testing.assert_close(
        pixels[0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    )


@pytest.mark.host
def test_pipeline_reads_pictures(tmp_path: Path) -> None:
    saved(tmp_path)
    assert AutoImageProcessor.from_pretrained(tmp_path).image_size == 28
    answer = pipeline("image-classification", model=str(tmp_path))(Image.new("RGB", (64, 50)))
    assert len(answer) == 5
    assert abs(sum(entry["score"] for entry in answer)) <= 1.0001


def test_unknown_presets_and_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="no released DPNASNet is called .*'svhn'; there are cifar10, mnist"):
        DPNASNetConfig.preset("svhn")
    with pytest.raises(ValueError, match="a cell needs each of its edges once"):
        DPNASNetConfig(genotype=[[0, 0, 1]])
