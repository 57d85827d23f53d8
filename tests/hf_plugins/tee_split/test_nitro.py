"""Nitro documents under a root of our own: the same code path as with AWS's, with one trusted root
exchanged."""

import datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from hf_plugins.tee_split.attestation import AttestationError, Policy, verify_evidence
from hf_plugins.tee_split.nitro import ROOT_FINGERPRINT, NitroError, read_cbor, verify_document

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
NOW = int(START.timestamp()) + 3600
BOUND = bytes(range(64))


def cbor(value: Any) -> bytes:
    """An encoder for the tests alone."""

    def head(major: int, size: int) -> bytes:
        if size < 24:
            return bytes([major << 5 | size])
        for code, width in ((24, 1), (25, 2), (26, 4), (27, 8)):
            if size < 1 << 8 * width:
                return bytes([major << 5 | code]) + size.to_bytes(width, "big")
        raise OverflowError

    if value is None:
        return b"\xf6"
    if isinstance(value, int):
        return head(0, value) if value >= 0 else head(1, -1 - value)
    if isinstance(value, bytes):
        return head(2, len(value)) + value
    if isinstance(value, str):
        return head(3, len(value.encode())) + value.encode()
    if isinstance(value, list):
        return head(4, len(value)) + b"".join(map(cbor, value))
    return head(5, len(value)) + b"".join(cbor(k) + cbor(v) for k, v in value.items())


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, *, ca: bool
) -> bytes:
    subject, by = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, n)]) for n in (name, issuer))
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(START)
        .not_valid_after(START + datetime.timedelta(hours=3))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    return made.sign(signer, SHA384()).public_bytes(Encoding.DER)


ROOT_KEY, MIDDLE_KEY, LEAF_KEY = (ec.generate_private_key(ec.SECP384R1()) for _ in range(3))
ROOT = certificate("root", ROOT_KEY, "root", ROOT_KEY, ca=True)
MIDDLE = certificate("middle", MIDDLE_KEY, "root", ROOT_KEY, ca=True)
LEAF = certificate("leaf", LEAF_KEY, "middle", MIDDLE_KEY, ca=False)


def document(
    *,
    key: ec.EllipticCurvePrivateKey = LEAF_KEY,
    protected: Any = None,
    signature: bytes | None = None,
    **changes: Any,
) -> bytes:
    pcrs = {number: bytes([number + 1]) * 48 for number in range(3)}
    body = {
        "module_id": "i-1", "digest": "SHA384", "timestamp": 1000 * NOW, "pcrs": pcrs, "certificate": LEAF,
        "cabundle": [ROOT, MIDDLE], "public_key": None, "user_data": BOUND, "nonce": None,
    }  # fmt: skip
    payload = cbor({**body, **changes})
    head = cbor({1: -35} if protected is None else protected)
    signed = b"\x84" + cbor("Signature1") + cbor(head) + cbor(b"") + cbor(payload)
    r, s = decode_dss_signature(key.sign(signed, ec.ECDSA(SHA384())))
    raw = r.to_bytes(48, "big") + s.to_bytes(48, "big")
    return cbor([head, {}, payload, raw if signature is None else signature])


def verified(raw: bytes, **changes: Any) -> Any:
    return verify_document(raw, **{"now": NOW, "root_der": ROOT, **changes})


def test_good_document() -> None:
    found = verified(document())
    assert found.user_data == BOUND
    assert found.pcrs[2] == b"\x03" * 48
    assert found.timestamp == 1000 * NOW
    # As the device writes it: tagged, maps of indefinite length.
    assert verified(b"\xd2" + document()).nonce == b""


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (document(key=MIDDLE_KEY), "the document's signature is wrong"),
        (document(signature=bytes(95)), "not signed with ES384"),
        (document(protected={1: -7}), "not signed with ES384"),
        (document(digest="MD5"), "content is not that of an enclave"),
        (document(certificate=None), "lacks its certificates"),
        (document(cabundle=[]), "the document carries 0 certificates"),
        (document(cabundle=[ROOT] * 9), "the document carries 9 certificates"),
        (document(cabundle=[MIDDLE, ROOT]), "the certificate chain is broken"),
        (
            document(certificate=certificate("leaf", LEAF_KEY, "middle", ROOT_KEY, ca=False)),
            "chain is broken",
        ),
        (document(certificate=b"junk"), "chain is broken"),
        (
            document(cabundle=[ROOT, certificate("middle", MIDDLE_KEY, "root", ROOT_KEY, ca=False)]),
            "is no certificate authority",
        ),
        (document(pcrs={0: b"short"}), "registers are not 48 bytes each"),
        (cbor([1, 2]), "is no COSE_Sign1"),
        (cbor({}), "is no COSE_Sign1"),
    ],
)
def test_bad_documents_are_refused(raw: bytes, words: str) -> None:
    with pytest.raises(NitroError, match=words):
        verified(raw)


def test_key_of_another_curve_is_refused() -> None:
    small = ec.generate_private_key(ec.SECP256R1())
    leaf = certificate("leaf", small, "middle", MIDDLE_KEY, ca=False)
    with pytest.raises(NitroError, match="the signing key is not on P-384"):
        verified(document(certificate=leaf))


def test_time_and_root_count() -> None:
    with pytest.raises(NitroError, match="not valid at this time"):
        verified(document(), now=NOW + 4 * 3600)
    with pytest.raises(NitroError, match="not valid at this time"):
        verified(document(), now=NOW - 4 * 3600)
    with pytest.raises(NitroError, match="does not start at the trusted root"):
        verified(document(), root_der=None)
    with pytest.raises(NitroError, match="does not start at the trusted root"):
        verified(document(), root_der=MIDDLE)
    assert len(bytes.fromhex(ROOT_FINGERPRINT)) == 32


def test_every_flipped_byte_of_the_payload_is_refused() -> None:
    raw = document()
    for at in range(0, len(raw), 29):
        changed = bytearray(raw)
        changed[at] ^= 1
        with pytest.raises(NitroError):
            verified(bytes(changed))


def test_cbor_reader_reads_what_documents_hold_and_no_more() -> None:
    value = {"a": [1, -35, b"x" * 300, "text", None], 5: {}}
    assert read_cbor(cbor(value)) == value
    assert read_cbor(b"\xbf\x61a\x9f\x01\xff\xff") == {"a": [1]}
    for raw, words in [
        (b"", "end too early"),
        (b"\x58\xff", "end too early"),
        (b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff", "end too early"),
        (b"\x81" * 12 + b"\x01", "nested too deeply"),
        (b"\xf9\x00\x00", "a type that no document has"),
        (b"\x5f\xff", "an encoding that no document has"),
        (b"\x61\xff", "is not UTF-8"),
        (b"\xa1\x80\x01", "keys that no document has"),
        (b"\xa2\x01\x01\x01\x02", "the same key twice"),
        (b"\x01\x01", "bytes follow the CBOR value"),
        (bytes(40_000), "a document has at most .*32768 bytes"),
    ]:
        with pytest.raises(NitroError, match=words):
            read_cbor(raw)


def policy(**changes: Any) -> Policy:
    pinned = {f"pcr{n}": ((bytes([n + 1]) * 48).hex(),) for n in range(3)}
    return Policy(**{"kinds": ("nitro",), "measurements": pinned, "now": NOW, "root_ca_der": ROOT, **changes})


def test_policy_over_documents() -> None:
    assert verify_evidence("nitro", document(), BOUND, policy()).kind == "nitro"
    with pytest.raises(AttestationError, match="made for another handshake"):
        verify_evidence("nitro", document(), bytes(64), policy())
    with pytest.raises(AttestationError, match="is not on the list"):
        verify_evidence("nitro", document(), BOUND, policy(measurements={"pcr0": ("00" * 48,)}))
    with pytest.raises(AttestationError, match="list pcr0.pcr1.pcr2"):
        verify_evidence("nitro", document(), BOUND, policy(measurements={}))
    zero = {n: bytes(48) for n in range(3)}
    with pytest.raises(AttestationError, match="the nitro enclave runs in DEBUG mode"):
        verify_evidence("nitro", document(pcrs=zero), BOUND, policy())
