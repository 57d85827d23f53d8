"""The server's checks without a network: allow-lists, terms, requests that make no sense."""

import json
from pathlib import Path

import pytest
import torch

from hf_plugins.tee_split.attestation import SIMULATED, SimProvider
from hf_plugins.tee_split.config import SPFConfig
from hf_plugins.tee_split.model import model_digest, split_model
from hf_plugins.tee_split.peft import apply_spf, spf_tensors
from hf_plugins.tee_split.sealing import SealError
from hf_plugins.tee_split.server import TailServer, _number, read_clients, restore_spf
from hf_plugins.tee_split.tensors import MessageError
from hf_plugins.tee_split.transcript import Credential
from tests.hf_plugins.tee_split.tiny import PSK, arguments, saved_model, tail_config, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    saved_model(folder)
    return folder


def server(
    model: Path, folder: Path, *, spf: float = 0.0, names: tuple[str, ...] = ("alice",), **changes: object
) -> TailServer:
    made = TailServer(
        tail_config(model, folder, **changes),
        SPFConfig(ratio=spf),
        arguments(),
        clients={name: Credential(psk=PSK) for name in names},
    )
    made.cleanup()
    return made


def test_allow_list(tmp_path: Path) -> None:
    (tmp_path / "psk").write_bytes(bytes(32))
    path = tmp_path / "clients.json"
    path.write_text(
        json.dumps({"alice": {"public_key": "ab" * 32}, "bob": {"psk_file": str(tmp_path / "psk")}})
    )
    found = read_clients(path)
    assert found["alice"].public_key == b"\xab" * 32
    assert found["bob"].psk == bytes(32)
    path.write_text("{}")
    with pytest.raises(ValueError, match="without a list anybody could train"):
        read_clients(path)
    for entry in ({"public_key": "ab"}, {"password": "x"}):
        path.write_text(json.dumps({"alice": entry}))
        with pytest.raises(ValueError, match="letters and digits in the name, and public_key"):
            read_clients(path)
    path.write_text(json.dumps({"../alice": {"public_key": "ab" * 32}}))
    with pytest.raises(ValueError, match="letters and digits in the name"):
        read_clients(path)


def test_terms_say_what_will_be_trained(model: Path, tmp_path: Path) -> None:
    terms = server(model, tmp_path, spf=0.1, names=("alice", "bob"), release_to=["bob"]).terms
    assert terms["cut"] == 2
    assert terms["spf"] == 0.1
    assert terms["release_to"] == ["bob"]
    assert terms["training"]["learning_rate"] == "0.01"
    assert terms["model"] == model_digest(model)


def test_digest_tells_models_apart(model: Path, tmp_path: Path) -> None:
    assert model_digest(model) == model_digest(model)
    tiny_model(seed=1).save_pretrained(tmp_path)
    assert model_digest(tmp_path) != model_digest(model)


def test_options_that_do_not_fit(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="release_to names .'bob'., who are no clients"):
        server(model, tmp_path, release_to=["bob"])
    config = tail_config(model, tmp_path, provider="gramine", allow_simulated=False)
    with pytest.raises(ValueError, match="the simulator protects nothing; pass allow_simulated"):
        TailServer(
            config, SPFConfig(), arguments(), clients={"a": Credential(psk=PSK)}, evidence=SimProvider()
        )
    with pytest.raises(FileNotFoundError, match="no sealing key at"):
        TailServer(config, SPFConfig(), arguments(), clients={"a": Credential(psk=PSK)})
    with pytest.raises(ValueError, match="nothing learns: adapter='none' and ratio=0"):
        server(model, tmp_path, adapter="none")._tail()


def test_stream_modes_refuse_several_ranks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Two:
        num_processes, is_main_process = 2, True

    monkeypatch.setattr("hf_plugins.tee_split.server.PartialState", Two)
    with pytest.raises(ValueError, match="Use mode='cache' under accelerate launch"):
        server(model, tmp_path, mode="stream")


def test_label_is_the_simulators(model: Path, tmp_path: Path) -> None:
    made = server(model, tmp_path)
    assert made.label == SIMULATED
    assert made._snapshot()["label"] == SIMULATED


def test_numbers_of_requests() -> None:
    assert _number({"step": 3}, "step") == 3
    for value in (None, -1, 1.0, True, "1", 2**60):
        with pytest.raises(MessageError, match="step.* must be a whole number from 0"):
            _number({"step": value}, "step")


def test_checkpoint_of_other_options_is_refused() -> None:
    model = split_model(tiny_model(), 2, "server")
    apply_spf(model, SPFConfig(ratio=0.5))
    saved = spf_tensors(model)
    restore_spf(model, saved)
    name = next(name for name in saved if name.endswith("spf_rows"))
    other = {**saved, name: saved[name] + 1}
    with pytest.raises(SealError, match="use an empty store for a new run"):
        restore_spf(model, other)
    with pytest.raises(SealError, match="made with other SPF options"):
        restore_spf(model, {})
    with torch.no_grad():
        next(iter(saved.values())).add_(1)
    restore_spf(model, saved)
    assert all(torch.equal(value, spf_tensors(model)[key]) for key, value in saved.items())
