import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_plugins.autodp.screening import (
    fit_logistic,
    fit_screener,
    precision_recall,
    roc_auc,
    threshold_for_recall,
)
from tests.hf_plugins.autodp import reference


def two_kinds(n: int = 400, gap: float = 2.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    y = (generator.random(n) < 0.3).astype(int)
    return generator.normal(size=(n, 3)) + gap * y[:, None], y


def test_logistic_by_hand() -> None:
    """Without a slope (a constant feature) the bias is the log odds: log(3 / 1)."""
    weights = fit_logistic(np.zeros((4, 1)), np.array([1, 1, 1, 0]))
    assert weights == pytest.approx([0, np.log(3)], abs=1e-5)


def test_logistic_gradient_is_zero_at_the_solution() -> None:
    x, y = two_kinds(gap=1.0)
    w = fit_logistic(x, y, l2=0.5)
    p = 1 / (1 + np.exp(-(x @ w[:-1] + w[-1])))
    assert x.T @ (p - y) + 0.5 * w[:-1] == pytest.approx(np.zeros(3), abs=1e-5)
    assert (p - y).sum() == pytest.approx(0, abs=1e-5)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1)), min_size=2, max_size=25))
def test_auc_against_all_pairs(pairs: list[tuple[int, int]]) -> None:
    scores, labels = zip(*pairs, strict=True)
    found = roc_auc(np.array(scores, float), np.array(labels))
    expected = reference.auc(list(scores), list(labels)) if len(set(labels)) == 2 else 0.5
    assert found == pytest.approx(expected, abs=1e-12)


def test_threshold_reaches_the_recall_and_no_more() -> None:
    """20 dirty rows, recall .95: the 19th largest of their scores."""
    scores, y = np.arange(40) / 40, np.array([0, 1] * 20)
    threshold = threshold_for_recall(scores, y)
    assert threshold == 3 / 40
    assert (scores[y == 1] >= threshold).mean() == 0.95
    assert (0.95, threshold) in [(round(r, 4), t) for t, _, r in precision_recall(scores, y)]
    with pytest.raises(ValueError, match="at least one row labelled dirty"):
        threshold_for_recall(scores, np.zeros(40))


def test_a_good_classifier_is_calibrated_and_finds_the_dirty_rows() -> None:
    x, y = two_kinds()
    screener = fit_screener(x, y)
    assert screener.usable
    fresh, truth = two_kinds(4000, seed=1)
    p = screener.probability(fresh)
    assert roc_auc(p, truth) > 0.97
    assert screener.dirty(fresh)[truth == 1].mean() > 0.88
    assert screener.dirty(fresh).mean() < 0.6
    assert p.mean() == pytest.approx(truth.mean(), abs=0.06)
    assert len(screener.curve) == 80


def test_a_useless_classifier_is_not_used() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(300, 3)), generator.integers(0, 2, 300)
    screener = fit_screener(x, y)
    assert screener.auc < 0.65
    assert screener.dirty(x).all()


@pytest.mark.parametrize("ones", [0, 1, 40])
def test_a_kind_too_rare_falls_back(ones: int) -> None:
    screener = fit_screener(
        np.random.default_rng(0).normal(size=(40, 2)), np.array([1] * ones + [0] * (40 - ones))
    )
    assert not screener.usable


def test_labels_must_pair() -> None:
    with pytest.raises(ValueError, match="one label 0 or 1 a row"):
        fit_screener(np.zeros((3, 2)), np.array([0, 1, 2]))
