"""Same-sign merging: the paper's rule, its invariants, its numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plugins.gradpruner import merging
from hf_plugins.gradpruner.merging import Donor, merge_block, merge_difference, merge_module, same_sign
from tests.hf_plugins.gradpruner import reference


def factors_of(importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose F is the given matrix: one row of steps each, left an indicator, right its root."""
    rows = importance.shape[0]
    left = torch.eye(rows).unsqueeze(2)
    return left, importance.sqrt().unsqueeze(1) * rows**0.5


def donor(weight: torch.Tensor, importance: torch.Tensor) -> Donor:
    return Donor(weight, *factors_of(importance))


RECEIVER = torch.tensor([[1.0, -2.0, 0.0, 4.0]])
DONOR = torch.tensor([[3.0, 1.0, 5.0, -1.0]])
IMPORTANCE = torch.tensor([[4.0, 3.0, 2.0, 1.0]])


def merged(receiver: torch.Tensor, donors: list[Donor], **options: object) -> torch.Tensor:
    result = receiver.clone()
    merge_module(result, donors, **options)  # type: ignore[arg-type]
    return result


def test_numbers_of_the_paper_by_hand() -> None:
    """Acceptance fact 5. keep .5 keeps the entries with F 4 and 3; of these only 3 has its receiver's sign:
    1 + 3."""
    assert merged(RECEIVER, [donor(DONOR, IMPORTANCE)], keep=0.5).tolist() == [[4.0, -2.0, 0.0, 4.0]]
    assert torch.equal(merged(RECEIVER, [donor(RECEIVER, IMPORTANCE)], keep=1.0), 2 * RECEIVER)
    assert torch.equal(merged(RECEIVER, [donor(DONOR, IMPORTANCE)], keep=0.0), RECEIVER)


def test_counts() -> None:
    """keep .5 of 4 entries: 2 inside the mask, 1 of them with the receiver's sign."""
    counts = merge_module(RECEIVER.clone(), [donor(DONOR, IMPORTANCE)], keep=0.5)
    assert tuple(counts) == (4, 2, 1)


def test_weighted_by_importance() -> None:
    """Receiver F three times the donor's: the donor's 3 counts a quarter, 1 + 0.75."""
    own = factors_of(3 * IMPORTANCE)
    got = merged(RECEIVER, [donor(DONOR, IMPORTANCE)], keep=0.5, weighting="importance", receiver_factors=own)
    torch.testing.assert_close(got, torch.tensor([[1.75, -2.0, 0.0, 4.0]]))
    with pytest.raises(ValueError, match="needs the receiver's gradient factors"):
        merged(RECEIVER, [donor(DONOR, IMPORTANCE)], weighting="importance")


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="only layers of one shape can"):
        merged(RECEIVER, [donor(DONOR.T, IMPORTANCE.T)])


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.floats(0, 1), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_against_loops(m: int, n: int, num_donors: int, keep: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    receiver = torch.randint(-2, 3, (m, n), generator=generator).float()
    weights = [torch.randn(m, n, generator=generator) for _ in range(num_donors)]
    lefts = [torch.randn(2, m, 2, generator=generator) for _ in range(num_donors)]
    rights = [torch.randn(2, 2, n, generator=generator) for _ in range(num_donors)]
    f = [merging.importance_rows(left, right, 0, m) for left, right in zip(lefts, rights, strict=True)]
    masks = [reference.donor_mask(matrix, keep) for matrix in f]
    got = merged(receiver, [Donor(*parts) for parts in zip(weights, lefts, rights, strict=True)], keep=keep)
    torch.testing.assert_close(got.double(), reference.merge(receiver, weights, masks), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_invariants(dtype: torch.dtype) -> None:
    """Acceptance fact 4: signs stay, magnitudes never fall, zeros stay zero, donor order does not matter."""
    generator = torch.Generator().manual_seed(1)
    receiver = torch.randn(40, 30, generator=generator).to(dtype)
    receiver[receiver.abs() < 0.2] = 0
    donors = [
        Donor(
            torch.randn(40, 30, generator=generator).to(dtype),
            torch.randn(3, 40, 2, generator=generator),
            torch.randn(3, 2, 30, generator=generator),
        )
        for _ in range(3)
    ]
    got = merged(receiver, donors)
    assert torch.equal(got.sign(), receiver.sign())
    assert (got.abs() >= receiver.abs()).all()
    union = torch.zeros(40, 30, dtype=torch.bool)
    for one in donors:
        union |= reference.donor_mask(merging.importance_rows(one.left_TMR, one.right_TRN, 0, 40), 0.2)
    assert not ((got != receiver) & ~union).any()
    turned = merged(receiver, donors[::-1])
    torch.testing.assert_close(turned.float(), got.float(), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_share_of_changed_entries() -> None:
    """Acceptance fact 6: with independent signs 1 - (1 - .2 / 2)^3 = 0.271; 3 sigma of 90,000 entries is
    0.0045."""
    generator = torch.Generator().manual_seed(2)
    receiver = torch.randn(300, 300, generator=generator)
    donors = [
        Donor(
            torch.randn(300, 300, generator=generator),
            torch.randn(40, 300, 4, generator=generator),
            torch.randn(40, 4, 300, generator=generator),
        )
        for _ in range(3)
    ]
    changed = float((merged(receiver, donors) != receiver).double().mean())
    assert changed == pytest.approx(0.271, abs=0.0045)


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    receiver = torch.randn(23, 11, generator=generator)
    one = Donor(
        torch.randn(23, 11, generator=generator),
        torch.ones(1, 23, 1),  # every entry of a column ties
        torch.randn(1, 1, 11, generator=generator),
    )
    whole = merged(receiver, [one], keep=0.37)
    monkeypatch.setattr(merging, "BLOCK_ENTRIES", 30)
    assert torch.equal(merged(receiver, [one], keep=0.37), whole)


def test_signs_survive_products_that_underflow() -> None:
    """2^-24 * 2^-24 is 0 in fp16, but the two do have one sign."""
    tiny = torch.tensor([[2.0**-24, -(2.0**-24), 0.0]], dtype=torch.float16)
    assert (tiny * tiny == 0).all()
    assert same_sign(tiny, tiny).tolist() == [[True, True, False]]
    assert not same_sign(tiny, -tiny).any()


def test_sum_is_fp32_until_the_end() -> None:
    """bf16 holds 256 and 258 but not 257: 256 + 1 + 1 is 258 only if nothing is rounded on the way."""
    receiver, one = torch.tensor([[256.0]], dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert merge_block(receiver, [one, one], [mask, mask], [None, None]).bfloat16() == 258


def test_laco_difference_by_hand() -> None:
    """R + (D1 - R) + (D2 - R) with R = 1, D1 = 4, D2 = 10: 13; a running receiver would give 10, the last
    donor."""
    receiver = torch.tensor([[1.0, 1.0]])
    merge_difference(receiver, [torch.tensor([[4.0, 1.0]]), torch.tensor([[10.0, 1.0]])])
    assert receiver.tolist() == [[13.0, 1.0]]
    bias = torch.tensor([1.0, 2.0])
    merge_difference(bias, [torch.tensor([3.0, 2.0])])
    assert bias.tolist() == [3.0, 2.0]
