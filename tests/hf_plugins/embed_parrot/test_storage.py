"""Exported states and the parts of a scan on disk."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_plugins.embed_parrot.storage import PartStore, export_states, fingerprint, load_states


def _export(path: Path, **changes: object) -> Path:
    values = {
        "codebook": torch.randn(9, 4),
        "ids": [torch.tensor([1, 2]), torch.tensor([3, 4, 5])],
        "states": {0: [torch.randn(2, 4), torch.randn(3, 4)], 3: [torch.randn(2, 4), torch.randn(3, 4)]},
    }
    return export_states(path, **(values | changes))


def test_round_trip(tmp_path: Path) -> None:
    head, states = torch.randn(9, 4), {2: [torch.randn(2, 4), torch.randn(3, 4)]}
    loaded = load_states(_export(tmp_path / "x.safetensors", states=states, head=head, dtype=torch.float32))
    assert [row.tolist() for row in loaded.ids] == [[1, 2], [3, 4, 5]]
    assert list(loaded.states) == [2]
    torch.testing.assert_close(loaded.states[2][1], states[2][1], atol=0, rtol=0)
    torch.testing.assert_close(loaded.head, head, atol=0, rtol=0)


def test_states_are_bf16_and_head_optional(tmp_path: Path) -> None:
    states = {1: [torch.randn(2, 4), torch.randn(3, 4)]}
    loaded = load_states(_export(tmp_path / "x.safetensors", states=states))
    assert torch.equal(loaded.states[1][0], states[1][0].bfloat16().float())
    assert loaded.head is None
    assert not list(tmp_path.glob("*.part"))


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer 3.*: the states do not match the tokens, text by text"):
        _export(tmp_path / "x.safetensors", states={3: [torch.randn(2, 4), torch.randn(2, 4)]})
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="exported states need codebook, ids, lengths and layer.0"):
        load_states(tmp_path / "other.safetensors")
    broken = {
        "codebook": torch.ones(2, 2),
        "ids": torch.ones(3),
        "lengths": torch.tensor([2]),
        "layer.0": torch.ones(3, 2),
    }
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="lengths add up to .*2, but there are .*3"):
        load_states(tmp_path / "broken.safetensors")


def test_parts_are_kept(tmp_path: Path) -> None:
    store = PartStore(tmp_path / "parts", {"a": 1})
    assert store.get("x/y") is None
    store.put("x/y", {"value": [1, 2]})
    assert PartStore(tmp_path / "parts", {"a": 1}).get("x/y") == {"value": [1, 2]}


def test_parts_of_another_scan_are_refused(tmp_path: Path) -> None:
    PartStore(tmp_path / "parts", {"a": 1, "b": 2})
    with pytest.raises(ValueError, match=r"holds parts of another scan \(differs in b\); remove the folder"):
        PartStore(tmp_path / "parts", {"a": 1, "b": 3})


def test_fingerprint_does_not_see_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


def test_a_file_that_was_cut_off_is_told(tmp_path: Path) -> None:
    path = tmp_path / "states.safetensors"
    path.write_bytes(b"\x00" * 4)
    with pytest.raises(ValueError, match="is cut off or no safetensors file .* Export it again"):
        load_states(path)
