"""Options: every wrong value is named with its mending, all at once."""

import pytest

from hf_plugins.tee_split.config import PRESETS, ClientConfig, SPFConfig, TailConfig

TAIL = {"model": "m", "cut": 2}
CLIENT = {"model": "m", "cut": 2, "name": "alice", "key_file": "k"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ratio": 5.0}, "write 0.05 for 5 %"),
        ({"ratio": -0.1}, "ratio must lie in"),
        ({"select": "best"}, "select must be 'top', 'bottom' or 'random'; got 'best'"),
        ({"attention": False, "ffn": False}, "turn one on, or set ratio=0"),
    ],
)
def test_spf(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SPFConfig(**changes)


def test_presets() -> None:
    assert {name: SPFConfig.preset(name).ratio for name in PRESETS} == {
        "small": 0.05,
        "medium": 0.1,
        "paper": 0.5,
    }
    with pytest.raises(ValueError, match="SPFConfig has no preset .*huge.*; it has small, medium, paper"):
        SPFConfig.preset("huge")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cut": 0}, "cut must be at least 1"),
        ({"mode": "both"}, "mode must be one of cache, stream, bidirectional"),
        ({"dtype": "float16"}, "dtype must be 'float32' or 'bfloat16'"),
        ({"port": 70000}, "port must lie in"),
        ({"max_frame_mb": 0}, "max_frame_mb must be at least 1"),
        ({"request_timeout": 0.0}, "request_timeout must be positive"),
        ({"frame_bucket": -1}, "frame_bucket must be 0 or positive"),
        ({"provider": "sgx"}, "provider must be sim, gramine, tdx, sev-snp or nitro"),
        ({"provider": "sim"}, "say allow_simulated=True if that is meant"),
        ({"adapter": "ia3"}, "adapter must be 'lora', 'prefix' or 'none'"),
        ({"lora_r": 0}, "lora_r must be at least 1"),
        ({"seal_steps": 0}, "seal_steps must be at least 1"),
        ({"lora_dropout": 1.0}, "lora_dropout must lie in"),
        ({"linger": -1.0}, "linger must be 0 or more seconds"),
    ],
)
def test_tail(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match="TailConfig: .*" + words):
        TailConfig(**{**TAIL, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tees": ["arm"]}, "tees must name sgx, tdx, nitro"),
        ({"tees": []}, "tees must name"),
        ({"tees": ["sim"]}, "tees names 'sim', which protects nothing"),
        ({"kem": "rsa"}, "kem must be"),
        ({"measurements": ["mr_enclave"]}, "measurements must be written name=hex"),
        ({"shard_samples": 0}, "shard_samples must be at least 1"),
        ({"num_retries": -1}, "num_retries must be 0 or more"),
        ({"connect_timeout": 0.0}, "connect_timeout must be positive"),
        ({"heartbeat": 200.0}, "must be shorter than request_timeout"),
    ],
)
def test_client(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match="ClientConfig: .*" + words):
        ClientConfig(**{**CLIENT, **changes})


def test_all_wrong_fields_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match="cut must .* mode must"):
        TailConfig(model="m", cut=0, mode="x")


def test_secure_defaults() -> None:
    """Nothing simulated is accepted, and no measurement: a client must say which enclave it trusts."""
    client, tail = ClientConfig(**CLIENT), TailConfig(**TAIL)
    assert not client.allow_simulated
    assert client.tees == ["sgx", "tdx"]
    assert client.measurements == []
    assert client.tcb_statuses == ["UpToDate"]
    assert tail.provider == "gramine"
    assert client.kem == "x25519-mlkem768"
    assert client.terms() == tail.terms() == {"cut": 2, "dtype": "float32", "mode": "cache"}
