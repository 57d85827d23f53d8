"""Method 1 as exact arithmetic: linear layers computed by an untrusted device on data under a one-time pad.

Values are fixed-point numbers, either in the ring of integers modulo 2^64 (a pad hides perfectly and comes
off exactly) or in a prime field (where a wrong answer of the device is also found with certainty that
counts).
"""

# Shapes: N rows, I inputs, O outputs, R check vectors.
import itertools
import secrets
from typing import Literal, NamedTuple

import numpy as np

Domain = Literal["ring", "prime"]
RING_BITS = 64
# The largest prime below 2^20.5 keeps 4096 products of two residues below 2^53 for a float64 GEMM.
PRIME = 1482907
FLOAT_EXACT = 2**53
MIN_SOUNDNESS_BITS = 40


class MaskError(Exception):
    """A pad would be used twice, a product came back wrong, or numbers do not fit their domain."""


def _modulus(domain: Domain) -> int:
    if domain not in ("ring", "prime"):
        raise ValueError(f"domain must be 'ring' (modulo 2^64) or 'prime'; got {domain!r}")
    return 2**RING_BITS if domain == "ring" else PRIME


def encode(x: np.ndarray, *, fraction_bits: int, domain: Domain) -> np.ndarray:
    """Real numbers as residues of ``round(x * 2^fraction_bits)``.

    Args:
        x: Finite real numbers.
        fraction_bits: Bits behind the point; the rounding error is at most ``2^-(fraction_bits + 1)``.
        domain: ``ring`` or ``prime``.

    Returns:
        uint64 residues, same shape.

    Raises:
        MaskError: If a number is not finite or too large for the domain.
    """
    scaled = np.rint(np.asarray(x, np.float64) * 2.0**fraction_bits)
    bound = _modulus(domain) // 2
    if not np.isfinite(scaled).all() or float(np.abs(scaled).max(initial=0.0)) >= min(bound, FLOAT_EXACT):
        raise MaskError(
            f"a number does not fit: |x| * 2^{fraction_bits} must be below {min(bound, FLOAT_EXACT)}"
        )
    whole = scaled.astype(np.int64)
    return whole.astype(np.uint64) if domain == "ring" else np.mod(whole, PRIME).astype(np.uint64)


def decode(residues: np.ndarray, *, fraction_bits: int, domain: Domain) -> np.ndarray:
    """Residues as real numbers; the upper half of the domain is negative.

    Args:
        residues: uint64.
        fraction_bits: Of the residues; a product has the sum of its factors'.
        domain: ``ring`` or ``prime``.

    Returns:
        float64.
    """
    if domain == "ring":
        signed = residues.astype(np.int64)
    else:
        signed = residues.astype(np.int64)
        signed = np.where(signed > _modulus(domain) // 2, signed - PRIME, signed)
    return signed.astype(np.float64) / 2.0**fraction_bits


def product(x_NI: np.ndarray, w_OI: np.ndarray, *, domain: Domain) -> np.ndarray:
    """``x @ w.T`` in the domain, exactly.

    Args:
        x_NI: uint64 residues.
        w_OI: uint64 residues.
        domain: ``ring`` or ``prime``.

    Returns:
        (N, O) uint64 residues.
    """
    if domain == "ring":
        # Unsigned arithmetic wraps modulo 2^64, which is the ring.
        return x_NI @ w_OI.T
    step = max(1, FLOAT_EXACT // (PRIME - 1) ** 2)
    total = np.zeros((x_NI.shape[0], w_OI.shape[0]), np.uint64)
    for start in range(0, x_NI.shape[1], step):
        # float64 keeps sums below 2^53 exact, and has a fast GEMM on every device.
        part = x_NI[:, start : start + step].astype(np.float64) @ w_OI[:, start : start + step].T.astype(
            np.float64
        )
        total = (total + part.astype(np.uint64) % np.uint64(PRIME)) % np.uint64(PRIME)
    return total


def uniform(shape: tuple[int, ...], *, domain: Domain) -> np.ndarray:
    """Uniform residues from the system's random source: a pad that hides perfectly."""
    count = int(np.prod(shape))
    if domain == "ring":
        return np.frombuffer(bytearray(secrets.token_bytes(8 * count)), np.uint64).reshape(shape)
    found = np.empty(0, np.uint64)
    limit = np.uint64(2**64 // PRIME * PRIME)
    while found.size < count:
        drawn = np.frombuffer(secrets.token_bytes(8 * (count - found.size)), np.uint64)
        # Rejection keeps the residues uniform.
        found = np.concatenate([found, drawn[drawn < limit] % np.uint64(PRIME)])
    return found.reshape(shape)


def subtract(a: np.ndarray, b: np.ndarray, *, domain: Domain) -> np.ndarray:
    """``a - b`` in the domain."""
    return a - b if domain == "ring" else (a + np.uint64(PRIME) - b) % np.uint64(PRIME)


def add(a: np.ndarray, b: np.ndarray, *, domain: Domain) -> np.ndarray:
    """``a + b`` in the domain."""
    return a + b if domain == "ring" else (a + b) % np.uint64(PRIME)


def freivalds(
    x_NI: np.ndarray, w_OI: np.ndarray, y_NO: np.ndarray, *, domain: Domain, num_checks: int | None = None
) -> bool:
    """Whether ``y = x @ w.T``, checked with random vectors instead of a second product.

    A wrong y passes with probability at most ``p^-num_checks`` in the prime field, and ``2^-num_checks`` in
    the ring, which has zero divisors.

    Args:
        x_NI: Residues.
        w_OI: Residues.
        y_NO: The device's answer.
        domain: ``ring`` or ``prime``.
        num_checks: Random vectors; by default as many as bring the error to ``2^-40``.

    Raises:
        ValueError: If fewer checks are asked for than that.
    """
    per_check = 1.0 if domain == "ring" else np.log2(PRIME)
    needed = int(np.ceil(MIN_SOUNDNESS_BITS / per_check))
    num_checks = needed if num_checks is None else num_checks
    if num_checks < needed:
        raise ValueError(
            f"num_checks={num_checks} leaves a wrong product undetected too often; take {needed} or more"
        )
    s_RO = uniform((num_checks, y_NO.shape[1]), domain=domain)
    ws_RI = product(s_RO, np.ascontiguousarray(w_OI.T), domain=domain)
    return bool((product(y_NO, s_RO, domain=domain) == product(x_NI, ws_RI, domain=domain)).all())


class Mask(NamedTuple):
    """A pad and its image under the layer, drawn before the data are there."""

    r_NI: np.ndarray
    hr_NO: np.ndarray
    serial: int


class MaskedLinear:
    """A frozen affine layer whose product an untrusted device computes.

    Args:
        weight_OI: Real weight.
        bias_O: Real bias, or None; it is added inside of the enclave and never passes through the device.
        fraction_bits: Fixed-point bits of inputs and weight.
        domain: ``ring`` or ``prime``.

    Source: arXiv 2401.09796, method 1, with the bias added after unmasking (``h(E + r) - h(r)`` would cancel
        it) and with an integrity check that the paper lacks.
    """

    def __init__(
        self,
        weight_OI: np.ndarray,
        bias_O: np.ndarray | None = None,
        *,
        fraction_bits: int = 12,
        domain: Domain = "ring",
    ) -> None:
        self.fraction_bits, self.domain = fraction_bits, domain
        self.w_OI = encode(weight_OI, fraction_bits=fraction_bits, domain=domain)
        self._bias_O = (
            None if bias_O is None else encode(bias_O, fraction_bits=2 * fraction_bits, domain=domain)
        )
        self._serials, self._used = itertools.count(), set[int]()

    def draw(self, num_rows: int) -> Mask:
        """Draw a pad and push it through the layer; inside of the enclave, ahead of time.

        This costs the enclave as many operations as the layer itself: the pad moves work to another time, it
        saves none.
        """
        r_NI = uniform((num_rows, self.w_OI.shape[1]), domain=self.domain)
        return Mask(r_NI, product(r_NI, self.w_OI, domain=self.domain), next(self._serials))

    def mask(self, x_NI: np.ndarray, mask: Mask) -> np.ndarray:
        """What the device gets: the encoded input under the pad.

        Raises:
            MaskError: If the pad was used before: the difference of two messages would be that of the inputs.
        """
        if mask.serial in self._used:
            raise MaskError("this pad was used before; draw a new one for every call")
        self._used.add(mask.serial)
        encoded = encode(x_NI, fraction_bits=self.fraction_bits, domain=self.domain)
        return add(encoded, mask.r_NI, domain=self.domain)

    def device(self, masked_NI: np.ndarray) -> np.ndarray:
        """What an honest device does."""
        return product(masked_NI, self.w_OI, domain=self.domain)

    def unmask(self, masked_NI: np.ndarray, answer_NO: np.ndarray, mask: Mask) -> np.ndarray:
        """Check the device's answer and take the pad off.

        Args:
            masked_NI: What was sent.
            answer_NO: What came back.
            mask: The pad.

        Returns:
            (N, O) float64, equal to the integer product bit by bit.

        Raises:
            MaskError: If the answer is not the product.
        """
        if not freivalds(masked_NI, self.w_OI, answer_NO, domain=self.domain):
            raise MaskError("the device returned a wrong product; its results cannot be used")
        y_NO = subtract(answer_NO, mask.hr_NO, domain=self.domain)
        if self._bias_O is not None:
            y_NO = add(y_NO, np.broadcast_to(self._bias_O, y_NO.shape), domain=self.domain)
        return decode(y_NO, fraction_bits=2 * self.fraction_bits, domain=self.domain)


def masked_scores(q_NI: np.ndarray, k_NI: np.ndarray, *, domain: Domain) -> tuple[np.ndarray, int]:
    """``q @ k.T`` through a device that sees both under pads of their own.

    ``QK' = Qm Km' - Qm rk' - rq Km' + rq rk'``: three products stay in the enclave to save one, which is why
    attention is better computed inside of it.

    Args:
        q_NI: Residues.
        k_NI: Residues.
        domain: ``ring`` or ``prime``.

    Returns:
        The product's residues, and how many products of that size the enclave computed itself.
    """
    rq_NI, rk_NI = (uniform(x.shape, domain=domain) for x in (q_NI, k_NI))
    qm_NI, km_NI = add(q_NI, rq_NI, domain=domain), add(k_NI, rk_NI, domain=domain)
    answer = product(qm_NI, km_NI, domain=domain)
    if not freivalds(qm_NI, km_NI, answer, domain=domain):
        raise MaskError("the device returned a wrong product; its results cannot be used")
    own = [
        product(qm_NI, rk_NI, domain=domain),
        product(rq_NI, km_NI, domain=domain),
        product(rq_NI, rk_NI, domain=domain),
    ]
    out = subtract(subtract(answer, own[0], domain=domain), own[1], domain=domain)
    return add(out, own[2], domain=domain), len(own)
