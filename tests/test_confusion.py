"""Metrics of classification from counts."""

import numpy as np
import pytest

from dpguard import confusion


def test_metrics_from_confusion_counts():
    table = [[50, 10], [5, 35]]
    assert float(confusion.from_confusion(table, "accuracy")) == pytest.approx(0.85)
    assert float(confusion.from_confusion(table, "f1")) == pytest.approx(2 * 35 / (40 + 45))
    expected = (35 * 50 - 10 * 5) / np.sqrt(45.0 * 40 * 60 * 55)
    assert float(confusion.from_confusion(table, "mcc")) == pytest.approx(expected)
    assert float(confusion.from_confusion([[10, 0], [10, 0]], "mcc")) == 0.0
    with pytest.raises(ValueError, match="expected one of"):
        confusion.from_confusion(table, "auc")
