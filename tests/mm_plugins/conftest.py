"""Importing the suite first puts the stand-in for mmcv's compiled ops in place for every test."""

import mm_plugins  # noqa: F401
