"""Evidence that a server runs the code it should inside of the hardware it should: fetched on the server,
verified on the client before a byte of data leaves it.

Quotes are malleable in parts that no signature covers, so a quote's hash is never an identity: what counts
is the signed report alone. Whatever cannot be verified here is refused.
"""

import hmac
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hf_plugins.tee_split.nitro import NitroError, verify_document
from hf_plugins.tee_split.transcript import canonical

SIMULATED = "SIMULATED - NO HARDWARE PROTECTION"
REPORT_DATA_BYTES = 64
HARDWARE_KINDS = ("sgx", "tdx", "nitro", "sev-snp")
TDX_MEASUREMENTS = ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3")
SGX_DEBUG_BIT = 0x02
# The whole first byte: every bit of it takes a TD out of the trusted base.
TDX_DEBUG_BITS = 0xFF


class AttestationError(Exception):
    """The server could not prove what it is; nothing was sent to it."""


@dataclass(frozen=True)
class Attested:
    """What verified evidence says."""

    kind: str
    hardware: bool
    measurements: dict[str, str]
    """Names and hex values of what was measured."""
    status: str = ""
    """Platform state as the vendor calls it."""
    advisories: tuple[str, ...] = ()

    def label(self) -> str:
        """One line for logs, checkpoints and model cards."""
        what = ", ".join(f"{name}={value[:16]}" for name, value in sorted(self.measurements.items()))
        return f"{self.kind} {self.status} {what}".strip() if self.hardware else SIMULATED


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What the client accepts. Nothing is accepted by default but the kinds that are named.

    Args of the constructor are the fields.
    """

    kinds: tuple[str, ...]
    """Kinds of evidence."""
    measurements: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Accepted hex values by name: mr_enclave or mr_signer (SGX), mr_td and rt_mr0-3 (TDX), pcr0...
    (Nitro)."""
    tcb_statuses: tuple[str, ...] = ("UpToDate",)
    """Accepted states of an Intel platform."""
    collateral: str | None = None
    """DCAP collateral as JSON."""
    root_ca_der: bytes | None = None
    """Another root than the vendor's; for tests of the verification itself."""
    now: float | None = None
    """Unix time of the verification; the clock's by default."""
    allow_simulated: bool = False
    simulator_key: bytes | None = None
    """The only simulator that is accepted; None accepts any."""

    def time(self) -> int:
        """Seconds since 1970 at which certificates must be valid."""
        return int(time.time() if self.now is None else self.now)


class Provider(Protocol):
    """Where a server gets its evidence."""

    kind: str

    def evidence(self, report_data: bytes) -> bytes:
        """Evidence that carries 64 bytes."""


def verify_evidence(kind: str, evidence: bytes, report_data: bytes, policy: Policy) -> Attested:
    """Verify a server's evidence.

    Args:
        kind: What the server says it is.
        evidence: As received.
        report_data: The 64 bytes that it must carry; they bind the handshake.
        policy: What is accepted.

    Returns:
        What the evidence proves.

    Raises:
        AttestationError: If it proves less than the policy asks for; the message says what.
    """
    if len(report_data) != REPORT_DATA_BYTES:
        raise AttestationError(f"report data has {REPORT_DATA_BYTES} bytes; got {len(report_data)}")
    if kind not in policy.kinds:
        raise AttestationError(
            f"evidence of kind {kind!r} is not accepted; accepted are {list(policy.kinds)}"
        )
    if kind == "sim":
        return _verify_simulated(evidence, report_data, policy)
    if kind in ("sgx", "tdx"):
        return _verify_quote(kind, evidence, report_data, policy)
    if kind == "nitro":
        return _verify_nitro(evidence, report_data, policy)
    if kind == "sev-snp":
        raise AttestationError(
            "SEV-SNP reports cannot be verified here: no verifier of them is installed. Use an SGX, TDX or "
            "Nitro host."
        )
    raise AttestationError(
        f"evidence of kind {kind!r} is unknown; known are {', '.join(HARDWARE_KINDS)} and sim"
    )


def _check_binding(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise AttestationError(
            "the evidence was made for another handshake: its report data differ. It may be replayed or "
            "relayed."
        )


def _check_measurements(
    found: Mapping[str, str], needed: tuple[tuple[str, ...], ...], policy: Policy
) -> None:
    """At least one of the alternatives in ``needed`` must be fully on the allow-list, and every listed name
    fit."""
    unknown = sorted(set(policy.measurements) - set(found))
    if unknown:
        raise AttestationError(
            f"measurements {unknown} are listed, but this evidence has only {sorted(found)}"
        )
    for name, accepted in policy.measurements.items():
        if not any(hmac.compare_digest(found[name].lower(), value.lower()) for value in accepted):
            raise AttestationError(f"measurement {name}={found[name]} is not on the list of accepted ones")
    if not any(all(name in policy.measurements for name in group) for group in needed):
        alternatives = " or ".join("+".join(group) for group in needed)
        raise AttestationError(
            f"no measurement of the enclave is pinned; list {alternatives}. Without it any code would be "
            "accepted."
        )


def _verify_simulated(evidence: bytes, report_data: bytes, policy: Policy) -> Attested:
    if not policy.allow_simulated:
        raise AttestationError(
            f"{SIMULATED}: the server runs the simulator; pass allow_simulated=True if that is meant"
        )
    try:
        record = json.loads(evidence)
        body, signature = record["body"], bytes.fromhex(record["signature"])
        key = bytes.fromhex(body["key"])
        Ed25519PublicKey.from_public_bytes(key).verify(signature, canonical(body))
        carried = bytes.fromhex(body["report_data"])
        honest = body["hardware"] == "none"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, InvalidSignature) as error:
        raise AttestationError("simulated evidence is malformed or its signature is wrong") from error
    if not honest:
        raise AttestationError("simulated evidence must say hardware: none")
    if policy.simulator_key is not None and not hmac.compare_digest(key, policy.simulator_key):
        raise AttestationError("simulated evidence is signed by another simulator than simulator_key")
    _check_binding(carried, report_data)
    return Attested("sim", hardware=False, measurements={"simulator": key.hex()}, status="none")


def refuse_debug(kind: str, attributes: bytes) -> None:
    """Refuse an enclave whose memory its host may read.

    Args:
        kind: ``sgx`` or ``tdx``.
        attributes: SGX attributes (16 bytes) or TD attributes (8 bytes).

    Raises:
        AttestationError: If the debug bit is set.
    """
    if not attributes or attributes[0] & (SGX_DEBUG_BIT if kind == "sgx" else TDX_DEBUG_BITS):
        raise AttestationError(f"the {kind} enclave runs in DEBUG mode: its host can read its memory")


def _verify_quote(kind: str, evidence: bytes, report_data: bytes, policy: Policy) -> Attested:
    try:
        import dcap_qvl
    except ImportError as error:
        raise AttestationError(
            "SGX and TDX quotes are verified by the package dcap-qvl, which is missing; install the extra: "
            'pip install "mmhf-plugins[tee]"'
        ) from error
    if policy.collateral is None:
        raise AttestationError(
            "a quote is verified against Intel's collateral; give it as JSON with collateral"
        )
    try:
        collateral = dcap_qvl.QuoteCollateralV3.from_json(policy.collateral)
        if policy.root_ca_der is None:
            verified = dcap_qvl.verify(evidence, collateral, policy.time())
        else:
            verified = dcap_qvl.verify_with_root_ca(evidence, collateral, policy.root_ca_der, policy.time())
        quote = dcap_qvl.Quote.parse(evidence)
    except (ValueError, RuntimeError, TypeError) as error:
        raise AttestationError(f"the {kind} quote does not verify: {error}") from error
    if (kind == "sgx") != quote.is_sgx():
        raise AttestationError(f"the server says {kind}, its quote is of another kind")
    report = quote.report
    refuse_debug(kind, bytes(report.attributes if kind == "sgx" else report.td_attributes))
    _check_binding(bytes(report.report_data), report_data)
    if verified.status not in policy.tcb_statuses:
        raise AttestationError(
            f"the platform's state is {verified.status} "
            f"({', '.join(verified.advisory_ids) or 'no advisory'}); accepted "
            f"are {list(policy.tcb_statuses)}. Update its firmware, or accept the state by name."
        )
    names: tuple[str, ...] = ("mr_enclave", "mr_signer")
    needed: tuple[tuple[str, ...], ...] = (("mr_enclave",), ("mr_signer",))
    if kind == "tdx":
        # MRTD is the firmware alone; kernel, command line and root file system are in the run-time registers.
        names, needed = TDX_MEASUREMENTS, (TDX_MEASUREMENTS,)
    measured = {name: bytes(getattr(report, name)).hex() for name in names}
    _check_measurements(measured, needed, policy)
    return Attested(kind, True, measured, verified.status, tuple(verified.advisory_ids))


def _verify_nitro(evidence: bytes, report_data: bytes, policy: Policy) -> Attested:
    try:
        document = verify_document(evidence, now=policy.time(), root_der=policy.root_ca_der)
    except NitroError as error:
        raise AttestationError(f"the Nitro document does not verify: {error}") from error
    _check_binding(document.user_data, report_data)
    measured = {f"pcr{number}": value.hex() for number, value in document.pcrs.items()}
    # A debug enclave has all registers zero.
    if not any(document.pcrs.get(0, b"")):
        raise AttestationError("the nitro enclave runs in DEBUG mode: its host can read its console")
    _check_measurements(measured, (("pcr0", "pcr1", "pcr2"),), policy)
    return Attested("nitro", True, measured, "valid")


@dataclass(frozen=True)
class SimProvider:
    """Signed evidence that says itself that there is no hardware. For tests, demos and first steps."""

    signing_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate, repr=False)
    kind: str = "sim"

    def evidence(self, report_data: bytes) -> bytes:
        """Evidence that carries ``report_data``."""
        key = self.signing_key.public_key().public_bytes_raw().hex()
        body = {"hardware": "none", "warning": SIMULATED, "report_data": report_data.hex(), "key": key}
        return canonical({"body": body, "signature": self.signing_key.sign(canonical(body)).hex()})


@dataclass(frozen=True)
class GramineProvider:
    """SGX quotes through Gramine's pseudo-files."""

    device: Path = Path("/dev/attestation")
    kind: str = "sgx"

    def evidence(self, report_data: bytes) -> bytes:
        """A DCAP quote that carries ``report_data``.

        Raises:
            AttestationError: Outside of an enclave with remote attestation.
        """
        try:
            kind = (self.device / "attestation_type").read_text(encoding="ascii").strip()
            if kind != "dcap":
                raise AttestationError(
                    f"Gramine offers attestation {kind!r}; set sgx.remote_attestation = 'dcap'"
                )
            (self.device / "user_report_data").write_bytes(report_data)
            return (self.device / "quote").read_bytes()
        except OSError as error:
            raise AttestationError(
                f"no SGX quote from {self.device}: run the server under gramine-sgx ({error})"
            ) from error


@dataclass(frozen=True)
class TsmProvider:
    """TDX quotes and SEV-SNP reports through the kernel's configfs-tsm (Linux 6.7 or later)."""

    kind: str = "tdx"
    root: Path = Path("/sys/kernel/config/tsm/report")

    def evidence(self, report_data: bytes) -> bytes:
        """Evidence that carries ``report_data``.

        Raises:
            AttestationError: Outside of a confidential guest, or if another process raced for the entry.
        """
        entry = self.root / f"tee-split-{os.getpid()}-{time.monotonic_ns()}"
        try:
            entry.mkdir()
            try:
                (entry / "inblob").write_bytes(report_data)
                before = (entry / "generation").read_text(encoding="ascii")
                quote = (entry / "outblob").read_bytes()
                if (entry / "generation").read_text(encoding="ascii") != before:
                    raise AttestationError("another process used the same configfs entry; ask again")
            finally:
                entry.rmdir()
        except OSError as error:
            raise AttestationError(
                f"no {self.kind} evidence from {self.root}: not a confidential guest ({error})"
            ) from error
        return quote


@dataclass(frozen=True)
class NitroProvider:
    """AWS Nitro enclaves; their device needs a helper that is not part of this suite."""

    device: Path = Path("/dev/nsm")
    kind: str = "nitro"

    def evidence(self, report_data: bytes) -> bytes:
        """Not available.

        Raises:
            AttestationError: Always: a document is asked for through an ioctl that needs AWS's library.
        """
        raise AttestationError(
            f"documents of {self.device} are asked for with AWS's aws-nitro-enclaves-nsm-api; "
            f"{len(report_data)} bytes of user data wait. This suite verifies such documents, it does not "
            "fetch them."
        )


def provider(name: str, *, sim_key: Ed25519PrivateKey | None = None) -> Provider:
    """Provider by its option's name: sim, gramine, tdx, sev-snp, nitro.

    Raises:
        ValueError: If there is none of that name.
    """
    made: dict[str, Any] = {
        "sim": lambda: SimProvider(sim_key or Ed25519PrivateKey.generate()),
        "gramine": GramineProvider,
        "tdx": TsmProvider,
        "sev-snp": lambda: TsmProvider(kind="sev-snp"),
        "nitro": NitroProvider,
    }
    if name not in made:
        raise ValueError(f"there is no evidence provider {name!r}; there are {', '.join(made)}")
    return made[name]()
