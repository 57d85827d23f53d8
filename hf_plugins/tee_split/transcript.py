"""Handshake and key schedule: HELLO, EVIDENCE, FINISHED of both sides, without any input or output.

The server's evidence signs the hash of the client's HELLO, its own nonce and key share, and the terms it
will work under. Keys come from X25519, or from X25519 and ML-KEM-768 together, through HKDF over the whole
transcript; the client proves who it is inside of the encrypted channel, with Ed25519 or a pre-shared key.
"""

import hashlib
import hmac
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hf_plugins.tee_split.frames import FrameError

LABEL = b"tee-split/1"
NONCE_BYTES = 32
Kem = Literal["x25519", "x25519-mlkem768"]
SHARE_BYTES = {"x25519": (32, 32), "x25519-mlkem768": (32 + 1184, 32 + 1088)}
HELLO_FIELDS = {"version", "nonce", "share", "kem", "tees", "terms", "max_frame"}
EVIDENCE_FIELDS = {"nonce", "share", "kind", "evidence", "terms"}
FINISHED_FIELDS = {"mac", "client", "proof"}


class HandshakeError(FrameError):
    """The handshake failed; the peer is told nothing."""


def canonical(value: Any) -> bytes:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def terms_digest(terms: Mapping[str, Any]) -> bytes:
    """SHA-256 of the terms of a session: model, cut, dtype, mode, and what the server will train."""
    return hashlib.sha256(canonical(terms)).digest()


def report_data(hello: bytes, nonce_s: bytes, share_s: bytes, digest: bytes) -> bytes:
    """The 64 bytes that the hardware must sign: they bind this very handshake, its keys and its terms.

    Args:
        hello: The HELLO message as sent.
        nonce_s: 32 bytes of the server.
        share_s: The server's key share.
        digest: `terms_digest` of the server's terms.
    """
    return hashlib.sha512(LABEL + hashlib.sha256(hello).digest() + nonce_s + share_s + digest).digest()


@dataclass(frozen=True)
class Keys:
    """What both sides derive from one handshake."""

    client_to_server: bytes = field(repr=False)
    server_to_client: bytes = field(repr=False)
    finished_client: bytes = field(repr=False)
    finished_server: bytes = field(repr=False)
    exporter: bytes = field(repr=False)
    session: int
    transcript: bytes
    """SHA-256 over HELLO and EVIDENCE."""


def derive_keys(shared: bytes, hello: bytes, evidence: bytes) -> Keys:
    """Key schedule: HKDF-SHA256 with the transcript's hash as salt."""
    transcript = hashlib.sha256(hashlib.sha256(hello).digest() + hashlib.sha256(evidence).digest()).digest()
    names = ("c2s", "s2c", "finished c", "finished s", "exporter", "session")
    out = {
        name: HKDF(algorithm=SHA256(), length=32, salt=transcript, info=LABEL + b" " + name.encode()).derive(
            shared
        )
        for name in names
    }
    # Session 0 is the clear handshake's.
    session = int.from_bytes(out["session"][:8], "big") or 1
    return Keys(
        out["c2s"], out["s2c"], out["finished c"], out["finished s"], out["exporter"], session, transcript
    )


def _parse(raw: bytes, fields: set[str], what: str) -> dict[str, Any]:
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HandshakeError(f"{what} is no JSON") from error
    if not isinstance(message, dict) or set(message) != fields:
        raise HandshakeError(f"{what} does not have exactly the fields {sorted(fields)}")
    return message


def _hex(message: Mapping[str, Any], name: str, what: str, *, size: int | None = None) -> bytes:
    value = message[name]
    try:
        raw = bytes.fromhex(value) if isinstance(value, str) else None
    except ValueError:
        raw = None
    if raw is None or (size is not None and len(raw) != size):
        raise HandshakeError(f"{what}: {name} must be hex of the length that is due: {size or 'any'}")
    return raw


class ClientHandshake:
    """The client's half.

    Args:
        terms: What the client expects of the server's terms: every key given must be there with this value.
        tees: Kinds of evidence that the client will look at.
        kem: Key agreement.
        max_frame: Longest plaintext of a frame that the client will read.
    """

    def __init__(
        self,
        terms: Mapping[str, Any],
        *,
        tees: tuple[str, ...],
        kem: Kem = "x25519-mlkem768",
        max_frame: int,
    ) -> None:
        self._terms = dict(terms)
        self._private = X25519PrivateKey.generate()
        self._lattice = MLKEM768PrivateKey.generate() if kem == "x25519-mlkem768" else None
        self._kem = kem
        share = self._private.public_key().public_bytes_raw()
        if self._lattice is not None:
            share += self._lattice.public_key().public_bytes_raw()
        self.hello = canonical(
            {
                "version": 1,
                "nonce": os.urandom(NONCE_BYTES).hex(),
                "share": share.hex(),
                "kem": kem,
                "tees": list(tees),
                "terms": self._terms,
                "max_frame": max_frame,
            }
        )

    def read_evidence(self, raw: bytes) -> tuple[str, bytes, bytes, dict[str, Any]]:
        """Take the server's EVIDENCE apart; nothing of it is trusted until the evidence is verified.

        Args:
            raw: The EVIDENCE message.

        Returns:
            Kind of evidence (any value: verifying it is the next step), its bytes, the report data it must
            carry, the server's terms.

        Raises:
            HandshakeError: If the message is malformed, or the terms differ from what the client needs.
        """
        message = _parse(raw, EVIDENCE_FIELDS, "EVIDENCE")
        nonce = _hex(message, "nonce", "EVIDENCE", size=NONCE_BYTES)
        share = _hex(message, "share", "EVIDENCE", size=SHARE_BYTES[self._kem][1])
        evidence = _hex(message, "evidence", "EVIDENCE")
        terms = message["terms"]
        if not isinstance(terms, dict):
            raise HandshakeError("EVIDENCE: terms must be an object")
        differing = sorted(key for key, value in self._terms.items() if terms.get(key) != value)
        if differing:
            pairs = ", ".join(
                f"{key}: here {self._terms[key]!r}, there {terms.get(key)!r}" for key in differing
            )
            raise HandshakeError(f"the server works under other terms ({pairs}); give both sides one recipe")
        return message["kind"], evidence, report_data(self.hello, nonce, share, terms_digest(terms)), terms

    def keys(self, raw: bytes) -> Keys:
        """Keys of the session; call it after the evidence was verified.

        Args:
            raw: The EVIDENCE message.

        Raises:
            HandshakeError: If the server's key share is degenerate.
        """
        share = bytes.fromhex(json.loads(raw)["share"])
        try:
            shared = self._private.exchange(X25519PublicKey.from_public_bytes(share[:32]))
            if self._lattice is not None:
                shared += self._lattice.decapsulate(share[32:])
        except ValueError as error:
            raise HandshakeError("the server's key share is not valid") from error
        return derive_keys(shared, self.hello, raw)


class ServerHandshake:
    """The server's half for one HELLO.

    Args:
        hello: The message as received.

    Raises:
        HandshakeError: If it is malformed.
    """

    def __init__(self, hello: bytes) -> None:
        self.hello = hello
        message = _parse(hello, HELLO_FIELDS, "HELLO")
        if message["version"] != 1 or message["kem"] not in SHARE_BYTES:
            raise HandshakeError("HELLO asks for a version or key agreement that is not known here")
        _hex(message, "nonce", "HELLO", size=NONCE_BYTES)
        self._share = _hex(message, "share", "HELLO", size=SHARE_BYTES[message["kem"]][0])
        if not isinstance(message["tees"], list) or not isinstance(message["terms"], dict):
            raise HandshakeError("HELLO: tees must be a list and terms an object")
        if type(message["max_frame"]) is not int or message["max_frame"] < 1:
            raise HandshakeError("HELLO: max_frame must be a positive number of bytes")
        self.kem, self.tees, self.max_frame = message["kem"], message["tees"], message["max_frame"]
        self._nonce = os.urandom(NONCE_BYTES)
        self._reply_share, self._shared = self._agree()

    def _agree(self) -> tuple[bytes, bytes]:
        private = X25519PrivateKey.generate()
        share = private.public_key().public_bytes_raw()
        try:
            shared = private.exchange(X25519PublicKey.from_public_bytes(self._share[:32]))
            if self.kem == "x25519-mlkem768":
                secret, sealed = MLKEM768PublicKey.from_public_bytes(self._share[32:]).encapsulate()
                share, shared = share + sealed, shared + secret
        except ValueError as error:
            raise HandshakeError("the client's key share is not valid") from error
        return share, shared

    def report_data(self, terms: Mapping[str, Any]) -> bytes:
        """What the evidence of this handshake must carry."""
        return report_data(self.hello, self._nonce, self._reply_share, terms_digest(terms))

    def answer(self, kind: str, evidence: bytes, terms: Mapping[str, Any]) -> tuple[bytes, Keys]:
        """The EVIDENCE message and the keys of the session."""
        reply = canonical(
            {
                "nonce": self._nonce.hex(),
                "share": self._reply_share.hex(),
                "kind": kind,
                "evidence": evidence.hex(),
                "terms": dict(terms),
            }
        )
        return reply, derive_keys(self._shared, self.hello, reply)


def _mac(key: bytes, transcript: bytes) -> str:
    return hmac.new(key, transcript, hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Identity:
    """Who a client is: a name, and an Ed25519 key or a pre-shared key of at least 16 bytes.

    Raises:
        ValueError: If not exactly one of the two is given, or the pre-shared key is short.
    """

    name: str
    signing_key: Ed25519PrivateKey | None = field(default=None, repr=False)
    psk: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.signing_key is None) == (self.psk is None):
            raise ValueError(f"client {self.name!r} needs a signing key or a pre-shared key, and not both")
        if self.psk is not None and len(self.psk) < 16:
            raise ValueError(
                f"a pre-shared key has at least 16 bytes; got {len(self.psk)}. Take 32 random ones."
            )

    def prove(self, keys: Keys) -> str:
        """Proof of identity for one session, in hex."""
        statement = LABEL + b" client " + self.name.encode() + b"\0" + keys.transcript + keys.exporter
        if self.signing_key is not None:
            return self.signing_key.sign(statement).hex()
        assert self.psk is not None, "checked in __post_init__"
        return hmac.new(self.psk, statement, hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Credential:
    """What the server knows of a client: its public key, or the pre-shared key."""

    public_key: bytes | None = None
    psk: bytes | None = field(default=None, repr=False)

    def accepts(self, name: str, proof: bytes, keys: Keys) -> bool:
        """Whether a proof is this client's; compared in constant time."""
        statement = LABEL + b" client " + name.encode() + b"\0" + keys.transcript + keys.exporter
        if self.public_key is not None:
            try:
                Ed25519PublicKey.from_public_bytes(self.public_key).verify(proof, statement)
            except (InvalidSignature, ValueError):
                return False
            return True
        if self.psk is None:
            return False
        return hmac.compare_digest(hmac.new(self.psk, statement, hashlib.sha256).digest(), proof)


def client_finished(keys: Keys, identity: Identity) -> bytes:
    """The client's FINISHED: its MAC over the transcript, its name, the proof."""
    return canonical(
        {
            "mac": _mac(keys.finished_client, keys.transcript),
            "client": identity.name,
            "proof": identity.prove(keys),
        }
    )


def check_client_finished(raw: bytes, keys: Keys, allowed: Mapping[str, Credential]) -> str:
    """Who the client is.

    Args:
        raw: The client's FINISHED.
        keys: Keys of the session.
        allowed: Credentials by client name.

    Returns:
        The client's name.

    Raises:
        HandshakeError: If the MAC, the name or the proof is wrong.
    """
    message = _parse(raw, FINISHED_FIELDS, "FINISHED")
    if not all(isinstance(value, str) for value in message.values()):
        raise HandshakeError("FINISHED: every field must be text")
    expected = _mac(keys.finished_client, keys.transcript).encode()
    if not hmac.compare_digest(expected, message["mac"].encode("utf-8", "replace")):
        raise HandshakeError("the client saw another handshake than the server")
    credential = allowed.get(message["client"])
    proof = _hex(message, "proof", "FINISHED")
    if credential is None or not credential.accepts(message["client"], proof, keys):
        raise HandshakeError("the client is not on the list, or its proof is wrong")
    return message["client"]


def server_finished(keys: Keys) -> bytes:
    """The server's FINISHED."""
    return canonical({"mac": _mac(keys.finished_server, keys.transcript)})


def check_server_finished(raw: bytes, keys: Keys) -> None:
    """Check the server's FINISHED.

    Raises:
        HandshakeError: If it does not fit.
    """
    message = _parse(raw, {"mac"}, "FINISHED")
    expected = _mac(keys.finished_server, keys.transcript).encode()
    if not isinstance(message["mac"], str) or not hmac.compare_digest(
        expected, message["mac"].encode("utf-8", "replace")
    ):
        raise HandshakeError("the server saw another handshake than the client")
