import pytest

from services.evaluation.metrics import balanced_accuracy


def test_the_commoner_label_does_not_count_more() -> None:
    assert balanced_accuracy([True, False, False, False], [False, False, False, False]) == 0.5
    assert balanced_accuracy([True, False, False, False], [True, False, False, True]) == pytest.approx(5 / 6)


def test_one_label_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="normal and anomalous"):
        balanced_accuracy([True], [True])
