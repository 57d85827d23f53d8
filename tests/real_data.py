"""The one door of tests to real data outside the repository: skip, with the reason, where it is absent."""

from pathlib import Path

import pytest

from tools import real_data as finder


def real_data(name: str) -> Path:
    """Folder of the data set, or a skip that says how to provide it."""
    try:
        return finder.data_set(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


def minilm() -> Path:
    """Folder of the MiniLM encoder, or a skip that says how to install it."""
    try:
        return finder.minilm()
    except ImportError as error:
        pytest.skip(str(error))
