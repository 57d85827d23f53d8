"""Handshake: both sides agree on keys, nobody else does, and every malformed or dishonest message is
refused."""

import hashlib
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hf_plugins.tee_split.transcript import (
    ClientHandshake,
    Credential,
    HandshakeError,
    Identity,
    Keys,
    ServerHandshake,
    canonical,
    check_client_finished,
    check_server_finished,
    client_finished,
    derive_keys,
    report_data,
    server_finished,
    terms_digest,
)

TERMS = {"cut": 2, "model": "ab"}


def shake(kem: str = "x25519-mlkem768") -> tuple[ClientHandshake, ServerHandshake, bytes, Keys, Keys]:
    client = ClientHandshake(TERMS, tees=("sim",), kem=kem, max_frame=1000)
    server = ServerHandshake(client.hello)
    raw, keys = server.answer("sim", b"evidence", {**TERMS, "more": 1})
    return client, server, raw, client.keys(raw), keys


@pytest.mark.parametrize("kem", ["x25519", "x25519-mlkem768"])
def test_both_sides_derive_the_same_keys(kem: str) -> None:
    client, server, raw, ours, theirs = shake(kem)
    assert ours == theirs
    assert len({ours.client_to_server, ours.server_to_client, ours.exporter, ours.finished_client}) == 4
    kind, evidence, data, terms = client.read_evidence(raw)
    assert (kind, evidence, terms) == ("sim", b"evidence", {**TERMS, "more": 1})
    assert data == server.report_data({**TERMS, "more": 1})
    assert data != server.report_data({**TERMS, "more": 2})


def test_two_handshakes_share_nothing() -> None:
    first, second = shake()[3], shake()[3]
    assert first.client_to_server != second.client_to_server
    assert first.session != second.session


def test_report_data_by_hand() -> None:
    """SHA-512("tee-split/1" || SHA-256(HELLO) || nonce || share || digest)."""
    digest = hashlib.sha256(b'{"a":1}').digest()
    assert terms_digest({"a": 1}) == digest
    expected = hashlib.sha512(
        b"tee-split/1" + hashlib.sha256(b"hello").digest() + b"n" * 32 + b"s" * 32 + digest
    )
    assert report_data(b"hello", b"n" * 32, b"s" * 32, digest) == expected.digest()


def test_keys_depend_on_every_byte_of_the_transcript() -> None:
    base = derive_keys(b"s" * 32, b"hello", b"evidence")
    assert derive_keys(b"s" * 32, b"hellO", b"evidence").client_to_server != base.client_to_server
    assert derive_keys(b"s" * 32, b"hello", b"evidencE").client_to_server != base.client_to_server
    assert derive_keys(b"t" * 32, b"hello", b"evidence").client_to_server != base.client_to_server
    assert "client_to_server" not in repr(base)


@pytest.mark.parametrize("signed", [True, False])
def test_client_is_known_by_its_key(signed: bool) -> None:
    keys = shake()[3]
    key = Ed25519PrivateKey.generate()
    identity = Identity("alice", signing_key=key) if signed else Identity("alice", psk=bytes(32))
    credential = (
        Credential(public_key=key.public_key().public_bytes_raw()) if signed else Credential(psk=bytes(32))
    )
    raw = client_finished(keys, identity)
    assert check_client_finished(raw, keys, {"alice": credential}) == "alice"
    others = [{}, {"bob": credential}, {"alice": Credential()}]
    others += [{"alice": Credential(public_key=bytes(32))}, {"alice": Credential(psk=bytes(31) + b"1")}]
    for allowed in others:
        with pytest.raises(HandshakeError, match="the client is not on the list, or its proof is wrong"):
            check_client_finished(raw, keys, allowed)


def test_proof_of_one_session_is_none_in_another() -> None:
    identity, allowed = Identity("alice", psk=bytes(32)), {"alice": Credential(psk=bytes(32))}
    first, second = shake()[3], shake()[3]
    with pytest.raises(HandshakeError, match="the client saw another handshake"):
        check_client_finished(client_finished(first, identity), second, allowed)
    forged = json.loads(client_finished(second, identity))
    forged["proof"] = json.loads(client_finished(first, identity))["proof"]
    with pytest.raises(HandshakeError, match="its proof is wrong"):
        check_client_finished(canonical(forged), second, allowed)


def test_server_finished() -> None:
    keys, other = shake()[3], shake()[3]
    check_server_finished(server_finished(keys), keys)
    with pytest.raises(HandshakeError, match="the server saw another handshake"):
        check_server_finished(server_finished(other), keys)
    with pytest.raises(HandshakeError, match="the server saw another handshake"):
        check_server_finished(canonical({"mac": "\u00e4"}), keys)


def changed(raw: bytes, **fields: object) -> bytes:
    return canonical({**json.loads(raw), **fields})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"version": 2}, "version or key agreement"),
        ({"kem": "rsa"}, "version or key agreement"),
        ({"nonce": "00"}, "HELLO: nonce must be hex of the length that is due"),
        ({"nonce": 5}, "HELLO: nonce must be hex of the length that is due"),
        ({"share": "zz"}, "share must be hex of the length that is due: 1216"),
        ({"tees": "sim"}, "tees must be a list"),
        ({"terms": []}, "terms an object"),
        ({"max_frame": True}, "max_frame must be a positive"),
        ({"max_frame": 0}, "max_frame must be a positive"),
        ({"extra": 1}, "does not have exactly the fields"),
    ],
)
def test_malformed_hello_is_refused(fields: dict, words: str) -> None:
    hello = ClientHandshake(TERMS, tees=("sim",), max_frame=1).hello
    with pytest.raises(HandshakeError, match=words):
        ServerHandshake(changed(hello, **fields))


def test_hello_that_is_no_json() -> None:
    for raw in (b"", b"[", b"[" * 60_000, b"\xff", b"1" * 5000):
        with pytest.raises(HandshakeError, match="HELLO"):
            ServerHandshake(raw)


def test_degenerate_shares_are_refused() -> None:
    hello = ClientHandshake(TERMS, tees=("sim",), kem="x25519", max_frame=1).hello
    with pytest.raises(HandshakeError, match="the client's key share is not valid"):
        ServerHandshake(changed(hello, share=bytes(32).hex()))
    client, _, raw, *_ = shake("x25519")
    with pytest.raises(HandshakeError, match="the server's key share is not valid"):
        client.keys(changed(raw, share=bytes(32).hex()))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"terms": {"cut": 3, "model": "ab"}}, "works under other terms .cut: here 2, there 3"),
        ({"terms": {}}, "works under other terms"),
        ({"terms": 4}, "terms must be an object"),
        ({"nonce": "00"}, "EVIDENCE: nonce must be hex of the length that is due"),
        ({"evidence": "x"}, "evidence must be hex of the length"),
        ({"share": ""}, "share must be hex of the length that is due: 1120"),
    ],
)
def test_malformed_or_unwanted_evidence_is_refused(fields: dict, words: str) -> None:
    client, _, raw, *_ = shake()
    with pytest.raises(HandshakeError, match=words):
        client.read_evidence(changed(raw, **fields))


def test_finished_with_wrong_fields() -> None:
    keys = shake()[3]
    with pytest.raises(HandshakeError, match="every field must be text"):
        check_client_finished(canonical({"mac": 1, "client": "a", "proof": "00"}), keys, {})
    with pytest.raises(HandshakeError, match="FINISHED is no JSON"):
        check_server_finished(b"{", keys)


def test_identity_needs_one_good_key() -> None:
    with pytest.raises(ValueError, match="and not both"):
        Identity("alice")
    with pytest.raises(ValueError, match="a pre-shared key has at least .*got 3"):
        Identity("alice", psk=b"123")
    assert "\\x00" not in repr(Identity("alice", psk=bytes(32)))
