"""Names that load a heavy host come when they are asked for."""

import pytest

import hf_plugins.rounds as rounds


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute "):
        rounds.Nothing  # noqa: B018
