"""Importing the suite first puts the stand-in for mmcv's compiled ops in place for every test."""

import pytest
from mmengine.registry import init_default_scope

import mm_plugins  # noqa: F401


@pytest.fixture(autouse=True)
def mmdet_scope() -> None:
    """mmengine's default scope is global: a test that ran an mmseg config must not decide the next one's."""
    init_default_scope("mmdet")
