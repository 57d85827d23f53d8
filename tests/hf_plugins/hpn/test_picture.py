"""The picture of chosen configs."""

import xml.etree.ElementTree as ET

import pytest

from hf_plugins.hpn.picture import picture


def test_one_dot_for_each_client_and_parameter() -> None:
    text = picture({"0": {"lr": 0.1, "opt": "<sgd>"}, "10": {"lr": 0.2, "opt": "<sgd>"}, "2": {"lr": 0.1}})
    root = ET.fromstring(text)
    circles = [c for c in root if c.tag.endswith("circle")]
    assert len(circles) == 5
    labels = [t.text for t in root if t.tag.endswith("text")]
    assert labels == ["lr", "0.1", "0.2", "opt", "<sgd>", "0", "2", "10"]
    # Clients 0 and 2 share the value 0.1: one height, two places.
    assert len({c.get("cy") for c in circles[:2]}) == 1
    assert len({c.get("cx") for c in circles[:2]}) == 2


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="there are no configs to draw; the search found none"):
        picture({})
