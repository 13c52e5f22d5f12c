"""Parity with TRL, where it is installed; it is no dependency."""

import pytest

pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
import trl_parity


@pytest.mark.slow
def test_gradients_are_those_of_trl_but_where_the_two_differ_on_purpose(tmp_path):
    for name, measure in trl_parity.comparisons(trl_parity.Bench(tmp_path)):
        found = measure()
        assert found > 0.05 if name.startswith("differs") else found < 2e-5, (name, found)
