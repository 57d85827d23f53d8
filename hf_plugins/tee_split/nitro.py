"""AWS Nitro attestation documents: COSE_Sign1 with ES384 over CBOR, verified up to a root certificate.

The reader takes the small part of CBOR that such a document needs (definite and indefinite maps and lists,
byte and text strings, integers, null) and refuses everything else.
"""

import datetime
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256, SHA384

ROOT_FINGERPRINT = "641a0321a3e244efe456463195d606317ed7cdcc3c1756e09893f3c68f79bb5b"
"""SHA-256 of the DER of AWS's root for Nitro enclaves, as AWS publishes it; the certificate itself travels in
each document."""
MAX_BYTES = 32 * 1024
MAX_DEPTH = 8
MAX_CERTIFICATES = 8


class NitroError(Exception):
    """The document is malformed or does not verify."""


class NitroDocument(NamedTuple):
    """The signed content that matters."""

    pcrs: dict[int, bytes]
    user_data: bytes
    nonce: bytes
    timestamp: int
    """Milliseconds since 1970."""


class _Reader:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, count: int) -> bytes:
        if count > len(self.raw) - self.at:
            raise NitroError("the CBOR data end too early")
        self.at += count
        return self.raw[self.at - count : self.at]

    def value(self, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise NitroError("the CBOR data are nested too deeply")
        first = self.take(1)[0]
        major, small = first >> 5, first & 31
        if first == 0xF6:
            return None
        if small == 31 and major in (4, 5):
            return self._items(major, None, depth)
        if small > 27:
            raise NitroError("the CBOR data use an encoding that no document has")
        number = small if small < 24 else int.from_bytes(self.take(1 << (small - 24)), "big")
        if major == 0:
            return number
        if major == 1:
            return -1 - number
        if major == 2:
            return self.take(number)
        if major == 3:
            return self._text(number)
        if major in (4, 5):
            return self._items(major, number, depth)
        if major == 6 and number == 18:
            return self.value(depth + 1)
        raise NitroError("the CBOR data hold a type that no document has")

    def _text(self, size: int) -> str:
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError as error:
            raise NitroError("a text in the CBOR data is not UTF-8") from error

    def _items(self, major: int, count: int | None, depth: int) -> Any:
        found: list[Any] = []
        while count is None or len(found) < count * (major - 3):
            if count is None and self.raw[self.at : self.at + 1] == b"\xff":
                self.at += 1
                break
            found.append(self.value(depth + 1))
        if major == 4:
            return found
        keys, values = found[::2], found[1::2]
        if len(keys) != len(values) or not all(isinstance(key, (int, str)) for key in keys):
            raise NitroError("a CBOR map has keys that no document has")
        if len(set(keys)) != len(keys):
            raise NitroError("a CBOR map has the same key twice")
        return dict(zip(keys, values, strict=True))


def read_cbor(raw: bytes) -> Any:
    """One CBOR value that fills ``raw`` exactly.

    Raises:
        NitroError: If it does not, or uses more of CBOR than documents need.
    """
    if len(raw) > MAX_BYTES:
        raise NitroError(f"a document has at most {MAX_BYTES} bytes; got {len(raw)}")
    reader = _Reader(raw)
    value = reader.value()
    if reader.at != len(raw):
        raise NitroError("bytes follow the CBOR value")
    return value


def _cbor_bytes(raw: bytes) -> bytes:
    size = len(raw)
    head = (
        bytes([0x40 | size])
        if size < 24
        else bytes([0x58, size])
        if size < 256
        else b"\x59" + size.to_bytes(2, "big")
    )
    return head + raw


def _check_chain(leaf: bytes, bundle: list[bytes], now: int, root_der: bytes | None) -> x509.Certificate:
    """The leaf, after every signature and validity from the root down was checked."""
    if not 1 <= len(bundle) <= MAX_CERTIFICATES:
        raise NitroError(f"the document carries {len(bundle)} certificates; 1 to {MAX_CERTIFICATES} are read")
    try:
        chain = [x509.load_der_x509_certificate(der) for der in [*bundle, leaf]]
        for issuer, subject in zip([chain[0], *chain], chain, strict=False):
            # Checks the name and the signature; raises if either is wrong.
            subject.verify_directly_issued_by(issuer)
        for certificate in chain[:-1]:
            if not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                raise NitroError("a certificate that issued another one is no certificate authority")
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise NitroError("the certificate chain is broken") from error
    if (root_der is None and chain[0].fingerprint(SHA256()).hex() != ROOT_FINGERPRINT) or (
        root_der is not None and bundle[0] != root_der
    ):
        raise NitroError("the certificate chain does not start at the trusted root")
    moment = datetime.datetime.fromtimestamp(now, datetime.UTC)
    for certificate in chain:
        if not certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc:
            raise NitroError("a certificate of the chain is not valid at this time")
    return chain[-1]


def verify_document(raw: bytes, *, now: int, root_der: bytes | None = None) -> NitroDocument:
    """Verify a document.

    Args:
        raw: COSE_Sign1 as the enclave's device gives it.
        now: Unix time at which the certificates must be valid.
        root_der: Another trusted root than AWS's.

    Returns:
        What it says.

    Raises:
        NitroError: If it does not verify.
    """
    outer = read_cbor(raw)
    if (
        not isinstance(outer, list)
        or len(outer) != 4
        or not all(isinstance(outer[i], bytes) for i in (0, 2, 3))
    ):
        raise NitroError("the document is no COSE_Sign1")
    protected, _, payload, signature = outer
    # 1: algorithm, -35: ES384.
    if read_cbor(protected) != {1: -35} or len(signature) != 96:
        raise NitroError("the document is not signed with ES384")
    body = read_cbor(payload)
    if not isinstance(body, dict) or body.get("digest") != "SHA384":
        raise NitroError("the document's content is not that of an enclave")
    leaf, bundle, pcrs = body.get("certificate"), body.get("cabundle"), body.get("pcrs")
    if (
        not isinstance(leaf, bytes)
        or not isinstance(bundle, list)
        or not all(isinstance(x, bytes) for x in bundle)
    ):
        raise NitroError("the document lacks its certificates")
    key = _check_chain(leaf, bundle, now, root_der).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise NitroError("the signing key is not on P-384")
    signed = b"\x84" + b"\x6aSignature1" + _cbor_bytes(protected) + b"\x40" + _cbor_bytes(payload)
    r, s = int.from_bytes(signature[:48], "big"), int.from_bytes(signature[48:], "big")
    try:
        key.verify(encode_dss_signature(r, s), signed, ec.ECDSA(SHA384()))
    except InvalidSignature as error:
        raise NitroError("the document's signature is wrong") from error
    if not isinstance(pcrs, dict) or not all(isinstance(v, bytes) and len(v) == 48 for v in pcrs.values()):
        raise NitroError("the document's registers are not 48 bytes each")
    return NitroDocument(
        pcrs, body.get("user_data") or b"", body.get("nonce") or b"", body.get("timestamp") or 0
    )
