"""The memory of the op's results."""

from pathlib import Path

import pytest
from processes import run_python

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Results that malloc, which TensorFlow uses without oneDNN, takes from the system and gives back at each call.
FAULTS = """
    import os, resource
    os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
    import tensorflow as tf
    import fusedconvbn
    inputs, filters = tf.random.normal([1, 256, 256, 8]), tf.random.normal([1, 1, 8, 256])
    zeros, ones = tf.zeros(256), tf.ones(256)
    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        output = fusedconvbn.fused_conv_bn(inputs, filters, ones, zeros, zeros, ones).output
        assert output.shape == [1, 256, 256, 256]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(min(faults() for _ in range(4)))
"""


@pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="this system has no transparent huge pages"
)
def test_large_results_have_large_pages():
    """64 MiB are 16384 pages of 4 KiB, or 32 of 2 MiB."""
    assert int(run_python(FAULTS)) < 4096
