"""Large pages: of the op's results, and of the filters that it keeps."""

from pathlib import Path

import pytest
from processes import run_python

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_large_pages = pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="this system has no transparent huge pages"
)

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


@needs_large_pages
def test_large_results_have_large_pages():
    """64 MiB are 16384 pages of 4 KiB, or 32 of 2 MiB."""
    assert int(run_python(FAULTS)) < 4096


# Filters of 590 KB each, of which a large page holds three.
LARGE_PAGES = """
    import re
    import tensorflow as tf
    import fusedconvbn
    zeros, ones, inputs = tf.zeros(128), tf.ones(128), tf.ones([1, 8, 8, 128])
    many = [tf.Variable(1 * tf.random.normal([3, 3, 128, 128])) for _ in range(32)]
    def large():
        return 1024 * sum(map(int, re.findall(r"AnonHugePages: *(\\d+) kB", open("/proc/self/smaps").read())))
    call = tf.function(lambda: [
        fusedconvbn.fused_conv_bn(inputs, filters, ones, zeros, zeros, ones, algorithm="direct").output
        for filters in many
    ])
    call()
    before = large()
    call()
    print(large() - before)
"""


@needs_large_pages
def test_packed_filters_have_large_pages():
    """18 MiB side by side; a large page or two of its own for each would be 64 MiB."""
    assert 8 << 20 < int(run_python(LARGE_PAGES)) < 40 << 20
