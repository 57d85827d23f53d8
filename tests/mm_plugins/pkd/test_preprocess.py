"""The teacher sees what its own preprocessor would give it."""

import pytest
import torch

import mm_plugins  # noqa: F401
from mm_plugins.pkd.model_config import input_format
from mm_plugins.pkd.preprocess import InputFormat, remap_images, valid_positions

PYTORCH = {
    "type": "DetDataPreprocessor",
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "bgr_to_rgb": True,
    "pad_size_divisor": 32,
}
CAFFE = {
    "type": "DetDataPreprocessor",
    "mean": [103.53, 116.28, 123.675],
    "std": [1.0, 1.0, 1.0],
    "bgr_to_rgb": False,
    "pad_size_divisor": 32,
}
RAW = {"type": "DetDataPreprocessor", "pad_size_divisor": 32, "pad_value": 114}


@pytest.mark.parametrize("target", [CAFFE, RAW, {**PYTORCH, "pad_value": 3}], ids=["caffe", "raw", "pad"])
def test_teacher_input_equals_its_own_preprocessor(target: dict) -> None:
    """Fact 16: 1e-4 of a pixel, padding included, against mmdet's DetDataPreprocessor on the same images."""
    from mmdet.registry import MODELS

    generator = torch.Generator().manual_seed(0)
    sizes = [(40, 64), (64, 50)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    batches = [
        MODELS.build(cfg)({"inputs": [image.clone() for image in images], "data_samples": None})["inputs"]
        for cfg in (PYTORCH, target)
    ]
    source, wanted = (input_format({"data_preprocessor": cfg}) for cfg in (PYTORCH, target))
    mapped = remap_images(batches[0], source, wanted, sizes)
    torch.testing.assert_close(mapped, batches[1], atol=1e-4, rtol=0)
    assert mapped[0, 0, 63, 63] == wanted.pad_value


def test_equal_formats_pass_the_batch_through() -> None:
    images = torch.rand(1, 3, 32, 32)
    same = input_format({"data_preprocessor": PYTORCH})
    assert remap_images(images, same, same, [(20, 20)]) is images


def test_mapping_by_hand() -> None:
    """Student pixel (1, 2, 3) with std 2 and mean 10 is raw (12, 14, 16); swapped (16, 14, 12); teacher mean
    4, std 4: (3, 2.5, 2). The second column is padding: the teacher's pad value 9."""
    source = InputFormat(mean=(10.0,), std=(2.0,), swap_channels=True)
    target = InputFormat(mean=(4.0,), std=(4.0,), pad_value=9.0)
    image = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1).repeat(1, 1, 1, 2)
    mapped = remap_images(image, source, target, [(1, 1)])
    assert mapped[0, :, 0].tolist() == [[3.0, 9.0], [2.5, 9.0], [2.0, 9.0]]
    assert image[0, :, 0, 1].tolist() == [1, 2, 3]


def test_padded_size_must_suit_the_teacher() -> None:
    with pytest.raises(ValueError, match="Set model.data_preprocessor.pad_size_divisor=32"):
        remap_images(torch.zeros(1, 3, 40, 32), InputFormat(), InputFormat(pad_size_divisor=32), [(40, 32)])


def test_valid_positions_by_hand() -> None:
    """Input 8 x 8, map 2 x 4: centres at rows 2, 6 and columns 1, 3, 5, 7. An image of 6 x 4 covers row 2 (6
    is not < 6) and columns 1, 3; one of 8 x 8 covers all."""
    mask = valid_positions([(6, 4), (8, 8)], (8, 8), (2, 4))
    assert mask.shape == (2, 1, 2, 4)
    assert mask[0, 0].tolist() == [[True, True, False, False], [False] * 4]
    assert bool(mask[1].all())
