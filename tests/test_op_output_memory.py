"""The memory of the op's results in inference: whose it is, that it is used again, and how much of it is kept."""

import threading

import numpy as np
import pytest
from processes import run_python
from test_op_memory import needs_large_pages

tf = pytest.importorskip("tensorflow")
fusedconvbn = pytest.importorskip("fusedconvbn")

CHANNELS = 64
IDENTITY = np.eye(CHANNELS, dtype=np.float32)[None, None]
ZEROS, ONES = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)


def images(seed: int, size: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, size, size, CHANNELS)).astype(np.float32)


def identity(inputs):
    """The inputs, bit by bit."""
    return fusedconvbn.fused_conv_bn(inputs, IDENTITY, ONES, ZEROS, ZEROS, ONES, epsilon=0.0).output


def address(tensor) -> int:
    return np.frombuffer(memoryview(tensor), np.uint8).ctypes.data


def test_a_result_is_nobody_elses_as_long_as_it_lives():
    """Sizes on both sides of the bounds; half of them given back on the way."""
    kept = {}
    for seed in range(60):
        size = (8, 11, 16, 32, 45, 130)[seed % 6]
        kept[seed] = size, identity(images(seed, size))
        if seed % 4 == 3:
            del kept[seed - 1], kept[seed - 2]
    for seed, (size, output) in kept.items():
        np.testing.assert_array_equal(output, images(seed, size))


def test_results_of_threads_do_not_meet():
    wrong = []

    def work(first: int) -> None:
        for seed in range(first, first + 25):
            inputs = images(seed, 16)
            outputs = [identity(inputs), identity(-inputs)]
            wrong.extend(seed for sign, y in zip((1, -1), outputs, strict=True) if (sign * y.numpy() != inputs).any())

    threads = [threading.Thread(target=work, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("size", [16, 32, 64])
def test_what_was_given_back_last_is_taken_first(size):
    inputs = images(1, size)
    held, first, last = identity(inputs), identity(inputs), identity(inputs)
    before, there = address(first), address(last)
    assert there % 64 == 0
    assert len({address(held), before, there}) == 3
    del first
    del last
    again = identity(inputs)
    assert address(again) == there
    assert address(identity(inputs)) == before  # `again` holds the other one
    np.testing.assert_array_equal(held, inputs)


def test_of_large_results_what_was_given_back_first_is_taken_first():
    """26 MB, which go past the caches: lines that are still there would be in the way."""
    inputs = images(1, 320)
    first, last = identity(inputs), identity(inputs)
    before, there = address(first), address(last)
    del first
    del last
    again = identity(inputs)
    assert address(again) == before
    assert address(identity(inputs)) == there
    np.testing.assert_array_equal(again, inputs)


# 1 MiB each.
RESULTS = """
    import re
    import tensorflow as tf
    import fusedconvbn
    zeros, ones, filters = tf.zeros(64), tf.ones(64), tf.random.normal([1, 1, 64, 64])
    inputs = tf.random.normal([1, 64, 64, 64])
    def call():
        return fusedconvbn.fused_conv_bn(inputs, filters, ones, zeros, zeros, ones).output
    def size(what, file):
        return sum(map(int, re.findall(what + r":\\s*(\\d+) kB", open("/proc/self/" + file).read()))) >> 10
    call()
"""


@pytest.mark.parametrize(
    ("size", "count", "most_grown", "least_left", "most_left"),
    [(64, 200, 260, 0, 80), (320, 26, 720, 150, 320)],
    ids=["200 of 1 MB, of which 32 MB are kept, in blocks of 16", "26 of 25 MB, of which 256 are kept"],
)
def test_little_is_kept_of_what_is_given_back(size, count, most_grown, least_left, most_left):
    grown, left = run_python(
        RESULTS.replace("[1, 64, 64, 64]", f"[1, {size}, {size}, 64]")
        + f"""
    before = size("VmRSS", "status")
    outputs = [call() for _ in range({count})]
    grown = size("VmRSS", "status") - before
    del outputs
    print(grown, size("VmRSS", "status") - before)
"""
    ).split()
    assert count * size * size // 4096 * 0.95 <= int(grown) <= most_grown
    assert least_left <= int(left) <= most_left


@needs_large_pages
def test_results_have_large_pages():
    """Side by side: a large page of its own for each would be 80 MB."""
    large = run_python(
        RESULTS
        + """
    before = size("AnonHugePages", "smaps")
    outputs = [call() for _ in range(40)]
    print(size("AnonHugePages", "smaps") - before)
"""
    )
    assert 24 <= int(large) <= 60
