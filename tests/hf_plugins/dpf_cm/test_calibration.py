import numpy as np
import pytest

from hf_plugins.dpf_cm.calibration import CalibrationError, calibrate, roc, threshold_for


def test_threshold_by_hand() -> None:
    """100 cosines 0.00 .. 0.99: at 1 % one may lie above, so t is the second largest, 0.98."""
    benign = [i / 100 for i in range(100)]
    assert threshold_for(benign, 0.01) == 0.98
    assert threshold_for(benign, 0.0) == 0.99
    assert threshold_for(benign[:50], 0.01) == 0.49
    assert threshold_for([-0.5], 0.0, lowest=0.2) == 0.2
    for share in (0.0, 0.01, 0.05, 0.33):
        t = threshold_for(benign, share)
        assert np.mean(np.array(benign) > t) <= share
        # A smaller threshold would let one more pass.
        assert np.mean(np.array(benign) >= t) > share


def test_rates_and_promise() -> None:
    found = calibrate([0.1, 0.2, 0.3], [0.9, 0.95], max_fpr=0.0)
    assert found == (0.3, 0.0, 1.0, 3, 2)
    with pytest.raises(
        CalibrationError, match=r"would let 50.0 % of the stored prompts through.*raise max_fpr"
    ):
        calibrate([0.1, 0.92], [0.9, 0.95], max_fpr=0.0)
    assert calibrate([0.1, 0.92], [0.9, 0.95], max_fpr=0.0, min_tpr=0.5).true_positive_rate == 0.5
    with pytest.raises(CalibrationError, match="fixed threshold of 0.8 fires on 50.0.* % of benign prompts"):
        calibrate([0.1, 0.92], [0.99], threshold=0.8)
    assert calibrate([0.1], [0.9], threshold=0.8).threshold == 0.8


def test_equal_cosine_is_no_match() -> None:
    """Strictly above: a stored prompt that scores exactly the threshold slips through and is refused."""
    with pytest.raises(CalibrationError):
        calibrate([0.9], [0.9], max_fpr=0.0)


def test_wrong_use() -> None:
    with pytest.raises(ValueError, match="calibration needs benign prompts; give some hundred"):
        threshold_for([], 0.01)
    with pytest.raises(ValueError, match=r"max_fpr must lie in \[0, 1\); got .*1. Write 0.01 for 1 %"):
        threshold_for([0.1], 1)


def test_area_counts_pairs() -> None:
    """The area is the share of (positive, negative) pairs in the right order, ties half: 3.5 of 4 pairs."""
    fpr, tpr, area = roc([0.9, 0.5], [0.5, 0.1])
    assert area == pytest.approx(3.5 / 4)
    assert fpr[0] == tpr[0] == 0.0
    assert fpr[-1] == tpr[-1] == 1.0
    assert roc([1.0], [0.0])[2] == 1.0
    assert roc([0.0], [1.0])[2] == 0.0
