"""Evidence: real SGX and TDX quotes, the simulator, and everything that must be refused before data flow."""

import dataclasses
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hf_plugins.tee_split.attestation import (
    SIMULATED,
    TDX_MEASUREMENTS,
    AttestationError,
    Attested,
    GramineProvider,
    NitroProvider,
    Policy,
    SimProvider,
    TsmProvider,
    provider,
    refuse_debug,
    verify_evidence,
)
from hf_plugins.tee_split.transcript import canonical

dcap_qvl = pytest.importorskip("dcap_qvl", reason="SGX and TDX quotes are verified by dcap-qvl (extra tee)")
DATA = Path(__file__).parent / "data"
NOW = 1750500000
SGX_STATUS = "ConfigurationAndSWHardeningNeeded"
BOUND = bytes(range(64))


def quote(kind: str) -> bytes:
    return (DATA / f"{kind}_quote").read_bytes()


def report(kind: str) -> object:
    return dcap_qvl.Quote.parse(quote(kind)).report


def policy(kind: str, **changes: object) -> Policy:
    names = ("mr_enclave",) if kind == "sgx" else TDX_MEASUREMENTS
    given = {
        "kinds": ("sgx", "tdx"),
        "measurements": {name: (bytes(getattr(report(kind), name)).hex(),) for name in names},
        "tcb_statuses": ("UpToDate", SGX_STATUS),
        "collateral": (DATA / f"{kind}_quote_collateral.json").read_text(),
        "now": NOW,
    }
    return Policy(**{**given, **changes})


def verified(kind: str, **changes: object) -> Attested:
    return verify_evidence(kind, quote(kind), bytes(report(kind).report_data), policy(kind, **changes))


both = pytest.mark.parametrize("kind", ["sgx", "tdx"])


def test_real_quotes_verify_with_the_known_states() -> None:
    sgx, tdx = verified("sgx"), verified("tdx")
    assert (sgx.status, sgx.advisories) == (SGX_STATUS, ("INTEL-SA-00289", "INTEL-SA-00615"))
    assert (tdx.status, tdx.advisories) == ("UpToDate", ())
    assert sgx.hardware
    assert tdx.hardware
    assert set(tdx.measurements) == set(TDX_MEASUREMENTS)
    assert "mr_enclave=" in sgx.label()
    assert SIMULATED not in sgx.label()


def test_expired_collateral_is_refused() -> None:
    with pytest.raises(AttestationError, match="the tdx quote does not verify: .*CrlExpired"):
        verified("tdx", now=1790000000)
    # The clock of today is used when none is given.
    with pytest.raises(AttestationError, match="does not verify"):
        verified("tdx", now=None)


@both
def test_flipped_bits_of_header_report_and_signature_are_refused(kind: str) -> None:
    raw, end = quote(kind), 432 if kind == "sgx" else 632
    expected, accepted = bytes(report(kind).report_data), policy(kind)
    for at in [*range(0, end, 13), end + 10, end + 40]:
        changed = bytearray(raw)
        changed[at] ^= 1
        with pytest.raises(
            AttestationError, match="does not verify|is of another kind|made for another handshake"
        ):
            verify_evidence(kind, bytes(changed), expected, accepted)


@both
def test_report_data_of_another_handshake_is_refused(kind: str) -> None:
    with pytest.raises(AttestationError, match="the evidence was made for another handshake"):
        verify_evidence(kind, quote(kind), BOUND, policy(kind))


def test_unlisted_or_missing_measurements_are_refused() -> None:
    with pytest.raises(AttestationError, match="is not on the list of accepted ones"):
        verified("sgx", measurements={"mr_enclave": ("00" * 32,)})
    with pytest.raises(
        AttestationError, match="no measurement of the enclave is pinned; list .*mr_enclave or mr_signer"
    ):
        verified("sgx", measurements={})
    with pytest.raises(
        AttestationError, match="measurements .'mr_td'. are listed, but this evidence has only"
    ):
        verified("sgx", measurements={"mr_td": ("00",)})
    alone = {"mr_td": policy("tdx").measurements["mr_td"]}
    with pytest.raises(AttestationError, match="list mr_td.rt_mr0.rt_mr1.rt_mr2.rt_mr3"):
        verified("tdx", measurements=alone)
    signer = {"mr_signer": (bytes(report("sgx").mr_signer).hex().upper(),)}
    assert verified("sgx", measurements=signer).kind == "sgx"


def test_outdated_platform_is_refused() -> None:
    with pytest.raises(AttestationError, match="the platform's state is .*HardeningNeeded .INTEL-SA-00289"):
        verified("sgx", tcb_statuses=("UpToDate",))


def test_quote_of_the_other_kind_is_refused() -> None:
    with pytest.raises(AttestationError, match="the server says sgx, its quote is of another kind"):
        verify_evidence("sgx", quote("tdx"), bytes(64), policy("tdx"))


def test_another_root_is_refused() -> None:
    with pytest.raises(AttestationError, match="does not verify"):
        verified("tdx", root_ca_der=b"0" * 100)


def test_garbage_and_missing_collateral_are_refused() -> None:
    with pytest.raises(AttestationError, match="give it as JSON with collateral"):
        verified("tdx", collateral=None)
    with pytest.raises(AttestationError, match="does not verify"):
        verified("tdx", collateral="{}")
    for raw in (b"", b"garbage", quote("sgx")[:300]):
        with pytest.raises(AttestationError, match="does not verify"):
            verify_evidence("sgx", raw, bytes(64), policy("sgx"))


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [("sgx", b"\x07" + bytes(15)), ("tdx", b"\x01" + bytes(7)), ("tdx", b"\x80" + bytes(7)), ("sgx", b"")],
)
def test_debug_enclaves_are_refused(kind: str, attributes: bytes) -> None:
    with pytest.raises(AttestationError, match="runs in DEBUG mode"):
        refuse_debug(kind, attributes)


def test_debug_check_is_run_on_a_verified_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are no debug enclaves: take their harmless attribute bits for the debug bits."""
    monkeypatch.setattr("hf_plugins.tee_split.attestation.SGX_DEBUG_BIT", 0x04)
    with pytest.raises(AttestationError, match="the sgx enclave runs in DEBUG mode"):
        verified("sgx")


def sim_policy(**changes: object) -> Policy:
    return Policy(**{"kinds": ("sim",), "allow_simulated": True, **changes})


def test_simulator_is_labelled_and_refused_unless_allowed() -> None:
    evidence = SimProvider().evidence(BOUND)
    found = verify_evidence("sim", evidence, BOUND, sim_policy())
    assert not found.hardware
    assert found.label() == SIMULATED == "SIMULATED - NO HARDWARE PROTECTION"
    assert json.loads(evidence)["body"]["hardware"] == "none"
    with pytest.raises(AttestationError, match="pass allow_simulated=True if that is meant"):
        verify_evidence("sim", evidence, BOUND, sim_policy(allow_simulated=False))
    with pytest.raises(AttestationError, match="evidence of kind .*sim.* is not accepted; accepted are"):
        verify_evidence("sim", evidence, BOUND, Policy(kinds=("sgx",), allow_simulated=True))


def test_simulated_evidence_is_bound_signed_and_pinned() -> None:
    key = Ed25519PrivateKey.generate()
    made = SimProvider(key)
    pinned = sim_policy(simulator_key=key.public_key().public_bytes_raw())
    assert verify_evidence("sim", made.evidence(BOUND), BOUND, pinned).kind == "sim"
    with pytest.raises(AttestationError, match="signed by another simulator"):
        verify_evidence("sim", SimProvider().evidence(BOUND), BOUND, pinned)
    with pytest.raises(AttestationError, match="made for another handshake"):
        verify_evidence("sim", made.evidence(bytes(64)), BOUND, pinned)
    forged = json.loads(made.evidence(BOUND))
    forged["body"]["warning"] = ""
    with pytest.raises(AttestationError, match="malformed or its signature is wrong"):
        verify_evidence("sim", canonical(forged), BOUND, pinned)
    claims = {**json.loads(made.evidence(BOUND))["body"], "hardware": "sgx"}
    lie = canonical({"body": claims, "signature": key.sign(canonical(claims)).hex()})
    with pytest.raises(AttestationError, match="must say hardware: none"):
        verify_evidence("sim", lie, BOUND, pinned)
    for raw in (b"", b"[]", b"{}", b'{"body": 1, "signature": ""}'):
        with pytest.raises(AttestationError, match="malformed"):
            verify_evidence("sim", raw, BOUND, pinned)


def test_what_cannot_be_verified_is_refused() -> None:
    with pytest.raises(AttestationError, match="SEV-SNP reports cannot be verified here"):
        verify_evidence("sev-snp", b"", BOUND, Policy(kinds=("sev-snp",)))
    with pytest.raises(AttestationError, match="evidence of kind 'magic.* is unknown; known are"):
        verify_evidence("magic", b"", BOUND, Policy(kinds=("magic",)))
    with pytest.raises(AttestationError, match="report data has .* bytes; got 3"):
        verify_evidence("sim", b"", b"abc", sim_policy())
    with pytest.raises(AttestationError, match="the Nitro document does not verify"):
        verify_evidence("nitro", b"\x80", BOUND, Policy(kinds=("nitro",)))


def test_missing_verifier_is_refused_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dcap_qvl", None)
    with pytest.raises(AttestationError, match="verified by the package dcap-qvl, which is missing"):
        verify_evidence("sgx", b"", BOUND, dataclasses.replace(sim_policy(), kinds=("sgx",)))


def test_providers_without_their_hardware_say_so(tmp_path: Path) -> None:
    with pytest.raises(AttestationError, match="run the server under gramine-sgx"):
        GramineProvider().evidence(BOUND)
    with pytest.raises(AttestationError, match="not a confidential guest"):
        TsmProvider(root=tmp_path / "none").evidence(BOUND)
    with pytest.raises(AttestationError, match="does not fetch them"):
        NitroProvider().evidence(BOUND)
    with pytest.raises(ValueError, match="there is no evidence provider .*sgx2"):
        provider("sgx2")
    kinds = {name: provider(name).kind for name in ("sim", "gramine", "tdx", "sev-snp", "nitro")}
    assert kinds == {"sim": "sim", "gramine": "sgx", "tdx": "tdx", "sev-snp": "sev-snp", "nitro": "nitro"}


def test_gramine_files_are_written_and_read(tmp_path: Path) -> None:
    """The pseudo-files of Gramine, as plain files."""
    (tmp_path / "quote").write_bytes(b"quote")
    (tmp_path / "attestation_type").write_text("none")
    with pytest.raises(AttestationError, match="set sgx.remote_attestation = 'dcap'"):
        GramineProvider(tmp_path).evidence(BOUND)
    (tmp_path / "attestation_type").write_text("dcap\n")
    assert GramineProvider(tmp_path).evidence(BOUND) == b"quote"
    assert (tmp_path / "user_report_data").read_bytes() == BOUND


def test_configfs_race_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """configfs makes the files of an entry; here a plain folder does, with a generation that moves."""
    generations = iter(["1", "1", "1", "2"])
    made = []

    def mkdir(self: Path) -> None:
        made.append(self)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", lambda self: made.remove(self))
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: len(data))
    monkeypatch.setattr(Path, "read_bytes", lambda self: b"tdx quote")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: next(generations))
    assert TsmProvider(root=tmp_path).evidence(BOUND) == b"tdx quote"
    with pytest.raises(AttestationError, match="another process used the same configfs entry"):
        TsmProvider(root=tmp_path).evidence(BOUND)
    assert made == []
