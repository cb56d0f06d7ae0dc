"""The benchmark of shared cores: its processes end in order, with a time for each step."""

import pytest

from evaluations.benchmarks import sharing


@pytest.mark.parametrize(("processes", "quantizer"), [(1, "vq"), (2, "ema")])
def test_processes_train_and_end(processes, quantizer):
    times = sharing._steps(processes, 64, quantizer, 16, 3)
    assert len(times) == 3
    assert min(times) > 0
