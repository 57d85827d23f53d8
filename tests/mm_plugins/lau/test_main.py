"""The picture command on a real image."""

from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmseg.apis import inference_model

from mm_plugins.lau.__main__ import draw_offsets, find_layer, main
from tests.mm_plugins.lau import tiny

IMAGE = sorted((tiny.IMAGES / "val").glob("*.png"))[0]


def weights(tmp_path: Path, name: str = "lau_fcn_r18_nuclei") -> Path:
    model = tiny.segmentor(name)
    if "lau" in name:
        # Large random offsets, and classes that balance, so that the picture has something to show.
        head = model.decode_head
        torch.nn.init.normal_(head.conv_seg.weight)
        model.cfg = tiny.config(name)
        head.conv_seg.bias.data = -inference_model(model, mmcv.imread(str(IMAGE))).seg_logits.data.mean(
            (1, 2)
        )
        for stack in (head.lau.branch.vertical, head.lau.branch.horizontal):
            torch.nn.init.xavier_uniform_(stack[2].weight, gain=4.0)
    meta = {"dataset_meta": {"classes": ("background", "nucleus"), "palette": [(0, 0, 0), (9, 200, 9)]}}
    torch.save({"state_dict": model.state_dict(), "meta": meta}, tmp_path / "w.pth")
    return tmp_path / "w.pth"


@pytest.mark.host
def test_picture_shows_four_panels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures" / "one.png"
    config = str(tiny.CONFIGS / "lau_fcn_r18_nuclei.py")
    assert main(["picture", config, str(weights(tmp_path)), str(IMAGE), str(out)]) == 0
    picture = mmcv.imread(str(out))
    assert picture.shape == (256, 4 * 256 + 3 * 4, 3)
    assert np.array_equal(picture[:, :256], mmcv.imread(str(IMAGE)))
    said = capsys.readouterr().out
    assert "Offset length in cells: mean" in said
    # The third panel is grey, and red exactly where the class changes.
    changes = picture[:, 520:776].astype(int)
    red = (changes[..., 2] - changes[..., 1]) > 50
    share = float(said.split("offsets at ")[1].split(" %")[0])
    assert 100 * red.mean() == pytest.approx(share, abs=0.01)
    assert share > 0


@pytest.mark.host
def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, config = weights(tmp_path, "fcn_r18_nuclei"), str(tiny.CONFIGS / "fcn_r18_nuclei.py")
    out = str(tmp_path / "x.png")
    assert main(["picture", config, str(plain), str(IMAGE), out]) == 2
    assert "the model holds 0 LaUUpsample layers; the picture needs one" in capsys.readouterr().err
    assert main(["picture", config, str(plain), str(tmp_path / "none.png"), out]) == 2
    note = tmp_path / "note.png"
    note.write_text("no image")
    assert main(["picture", config, str(plain), str(note), out]) == 2
    assert "is no image that can be read" in capsys.readouterr().err
    lau, with_lau = weights(tmp_path), str(tiny.CONFIGS / "lau_fcn_r18_nuclei.py")
    slide = [
        "model.test_cfg.mode=slide",
        "model.test_cfg.crop_size=(128,128)",
        "model.test_cfg.stride=(128,128)",
    ]
    assert main(["picture", with_lau, str(lau), str(IMAGE), out, "--cfg-options", *slide]) == 2
    assert "the model enlarged 4 maps for one image" in capsys.readouterr().err


def test_find_layer() -> None:
    model = tiny.segmentor()
    assert find_layer(model) is model.decode_head.lau
    with pytest.raises(ValueError, match="holds 0 LaUUpsample layers"):
        find_layer(torch.nn.Linear(1, 1))


def test_offsets_of_one_direction_have_one_colour_and_arrows() -> None:
    """Half a cell to the right everywhere: full red (BGR 0, 0, 255) but for arrows and legend."""
    offset = torch.zeros(2, 16, 16)
    offset[1] = 0.5
    picture = draw_offsets(offset, (64, 64), (4, 4), 16)
    upper = picture[:32].reshape(-1, 3)
    assert (upper == (0, 0, 255)).all(1).mean() > 0.5
    assert (upper.max(1) < 200).any()
