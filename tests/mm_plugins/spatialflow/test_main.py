"""The command: pictures of real images, checks and mending of annotations, conversion of weights."""

import json
import shutil
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
import torch

from mm_plugins.spatialflow.__main__ import main
from tests.mm_plugins.spatialflow import tiny

pytestmark = pytest.mark.host
CONFIG = str(tiny.CONFIGS / "spatialflow_r18_nuclei.py")
IMAGE = sorted((tiny.NUCLEI / "images" / "val").glob("*.png"))[0]


def weights(folder: Path) -> Path:
    model = tiny.detector("spatialflow_r18_nuclei")
    # Background everywhere, and a few boxes.
    model.semantic_head.conv.weight.data.zero_()
    model.semantic_head.conv.bias.data = torch.tensor([3.0, 0.0])
    torch.nn.init.normal_(model.bbox_head.retina_cls.weight, std=0.3)
    meta = {"dataset_meta": {"classes": ("nucleus", "background"), "palette": [(90, 190, 250), (30, 30, 40)]}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, folder / "w.pth")
    return folder / "w.pth"


def test_picture_of_a_real_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures" / "one.png"
    options = ["--cfg-options", "test_dataloader.dataset.data_root=" + str(tiny.NUCLEI)]
    assert main(["picture", CONFIG, str(weights(tmp_path)), str(IMAGE), str(out), *options]) == 0
    assert mmcv.imread(str(out)).shape == mmcv.imread(str(IMAGE)).shape
    assert not np.array_equal(mmcv.imread(str(out)), mmcv.imread(str(IMAGE)))
    said = capsys.readouterr().out
    assert "1 background" in said
    assert "% of the pixels are void" in said
    assert [path.name for path in out.parent.iterdir()] == ["one.png"]


def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(weights(tmp_path)), str(tmp_path / "x.png")
    note = tmp_path / "note.png"
    note.write_text("no image")

    def refused(*words: str) -> str:
        assert main(["picture", *words]) == 2
        # The host's logger may complain about pytest's closed stream; ours is the last line.
        lines = capsys.readouterr().err.splitlines()
        assert [line.startswith("error: ") for line in lines].count(True) == 1
        assert lines[-1].startswith("error: ")
        return lines[-1]

    assert "is no image that can be read" in refused(CONFIG, model, str(note), out)
    assert "none.png" in refused(CONFIG, model, str(tmp_path / "none.png"), out)
    assert "none.py" in refused(str(tmp_path / "none.py"), model, str(IMAGE), out)
    assert "--strength must lie in [0, 1]" in refused(CONFIG, model, str(IMAGE), out, "--strength", "55")
    boxes = tmp_path / "boxes.py"
    boxes.write_text(
        '_base_ = ["mmdet::retinanet/retinanet_r18_fpn_1x_coco.py"]\n'
        "model = dict(backbone=dict(init_cfg=None))\n"
    )
    from mmdet.registry import MODELS
    from mmengine.config import Config

    plain = MODELS.build(Config.fromfile(boxes).model)
    torch.save({"state_dict": plain.state_dict(), "meta": {}}, tmp_path / "boxes.pth")
    said = refused(str(boxes), str(tmp_path / "boxes.pth"), str(IMAGE), out)
    assert "is no panoptic model: it predicts" in said


def nuclei_json(folder: Path) -> Path:
    path = folder / "panoptic.json"
    shutil.copy(tiny.NUCLEI / "panoptic_val.json", path)
    return path


def test_check_and_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Areas and boxes thrown away come back as they were."""
    path, pngs, out = nuclei_json(tmp_path), str(tiny.NUCLEI / "panoptic" / "val"), tmp_path / "mended.json"
    assert main(["check", str(path), pngs]) == 0
    assert "4 images, 163 segments, no fault" in capsys.readouterr().out
    whole = json.loads(path.read_text())
    bare = json.loads(path.read_text())
    for annotation in bare["annotations"][:3]:
        for segment in annotation["segments_info"]:
            del segment["bbox"]
            segment["area"] = 1
    path.write_text(json.dumps(bare))
    assert main(["check", str(path), pngs]) == 2
    assert "has no bbox in the JSON; `mmhf spatialflow mend" in capsys.readouterr().err
    assert main(["mend", str(path), pngs, str(out)]) == 0
    assert "3 of 4 images changed" in capsys.readouterr().out
    assert json.loads(out.read_text())["annotations"] == whole["annotations"]
    assert main(["mend", str(path), str(tmp_path), str(out)]) == 2
    assert "Give the folder that holds the PNGs" in capsys.readouterr().err
    (tmp_path / "list.json").write_text("[]")
    assert main(["check", str(tmp_path / "list.json"), pngs]) == 2
    assert "Give the panoptic_*.json file" in capsys.readouterr().err


def test_faulty_picture_in_a_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = nuclei_json(tmp_path)
    pngs = tmp_path / "png"
    shutil.copytree(tiny.NUCLEI / "panoptic" / "val", pngs)
    first = sorted(pngs.glob("*.png"))[0]
    cv2.imwrite(str(first), np.full((256, 256, 3), 9, np.uint8))
    assert main(["check", str(path), str(pngs)]) == 2
    assert "that the JSON does not list" in capsys.readouterr().err


def test_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights under the release's names, and back; the converted ones load strictly."""
    model = tiny.detector()
    names = {"roi_head.mask_head.": "mask_head.", "semantic_head.": "stuff_head."}
    released = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        if name.startswith("stuff_head.conv."):
            tensor = torch.cat([tensor[:36], tensor[53:], tensor[36:53]])
        released[name] = tensor
    source, out = tmp_path / "release.pth", tmp_path / "ours.pth"
    torch.save({"state_dict": released, "meta": {}}, source)
    config = str(tiny.CONFIGS / "_base_" / "small.py")
    assert main(["convert", str(source), str(out), "--config", config]) == 0
    assert f"{len(released)} entries" in capsys.readouterr().out
    fresh = tiny.detector(seed=1)
    fresh.load_state_dict(torch.load(out)["state_dict"], strict=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    assert main(["convert", str(source), str(out), "--config", CONFIG]) == 2
    assert "Give the config of the same backbone and variant" in capsys.readouterr().err
    assert main(["convert", str(out), str(tmp_path / "again.pth")]) == 2
    assert "needs no conversion" in capsys.readouterr().err
