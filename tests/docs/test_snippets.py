"""Every Python snippet in the documents runs: configs are built, scripts are executed on tiny real models."""

import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.docs.blocks import Block, blocks
from tests.docs.worlds import MM_HEADS, WORLDS

SNIPPETS = blocks("python", "py")


def is_config(block: Block) -> bool:
    """Whether a snippet is (a part of) an mmdet or mmseg config."""
    return bool(
        re.match(
            r"(_base_|custom_imports|model|decode_head|bbox_head|val_evaluator|custom_hooks|train_cfg)\b",
            block.text,
        )
    ) and ("import " not in block.text.split("\n", 1)[0])


# A teacher of 90 million weights is drawn at random and run: minutes on a busy machine.
CONFIGS = [
    pytest.param(block, marks=pytest.mark.slow) if "x101" in block.text else block
    for block in SNIPPETS
    if is_config(block)
]
# A whole search, with a training for each strategy; a hundred rounds, each with its epsilon.
LONG = {"hf_plugins/autodp/README.md", "hf_plugins/dp_fedavg/README.md"}
SCRIPTS = [
    pytest.param(document, marks=pytest.mark.slow) if document in LONG else document
    for document in sorted({block.document for block in SNIPPETS if not is_config(block)})
]


def _load(block: Block, folder: Path) -> Any:
    from mmengine.config import Config

    text = block.text
    head = re.match(r"\w+", text).group()
    if head in MM_HEADS:
        text = MM_HEADS[head] + text
    if head == "decode_head":
        text += "\nmodel = dict(decode_head=decode_head)\n"
    if head == "bbox_head":
        text += "\nmodel = dict(bbox_head=bbox_head, panoptic_fusion_head=panoptic_fusion_head)\n"
    (folder / "snippet.py").write_text(text, encoding="utf-8")
    return Config.fromfile(folder / "snippet.py")


@pytest.mark.host
@pytest.mark.parametrize("block", CONFIGS, ids=str)
def test_config_snippet_builds(block: Block, tmp_path: Path) -> None:
    """``_base_`` comes from the installed wheels; teachers get random weights in place of the reader's."""
    from mmengine.registry import init_default_scope

    import mm_plugins  # noqa: F401

    config = _load(block, tmp_path)
    if "model" not in config:
        assert all("type" in hook for hook in config.custom_hooks)
        return
    init_default_scope(config.default_scope)
    if config.model.type == "PKDDetector":
        from mm_plugins.pkd.detector import inspect_config

        report = inspect_config(config)
        assert not [problem for problem in report.problems if "teacher_ckpt" not in problem]
        return
    if block.text.startswith("val_evaluator"):
        from mmdet.registry import METRICS

        assert METRICS.get(config.val_evaluator.type) is not None
        return
    built = _registry(config.default_scope).build(config.model)
    assert isinstance(built, nn.Module)


def _registry(scope: str) -> Any:
    if scope == "mmseg":
        from mmseg.registry import MODELS
    else:
        from mmdet.registry import MODELS
    return MODELS


@pytest.mark.host
@pytest.mark.parametrize("document", SCRIPTS)
def test_script_snippets_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippets of one document, in their order, share their names, as in a notebook."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = WORLDS[document](tmp_path) if document in WORLDS else {}
    for block in SNIPPETS:
        if block.document == document and not is_config(block):
            exec(compile("\n" * (block.line - 1) + block.text, document, "exec"), names)
