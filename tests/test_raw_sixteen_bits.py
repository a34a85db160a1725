"""16-bit numbers without AMX: rows that are converted a tile at a time, results that go from registers to memory."""

from dataclasses import replace

import numpy as np
import pytest
from cases import Case
from raw_problem import Problem

ISAS = ["generic", "avx2", "avx512"]
POINTWISE = {"kernel": (1, 1), "activation": "relu"}


def depthwise(channels: int, multiplier: int = 1) -> dict[str, int]:
    return {"in_channels": channels, "out_channels": channels * multiplier, "groups": channels}


CASES = {
    # Several blocks and panels, the last ones in part; inputs that fill no whole vectors.
    "panels": Case(height=21, width=20, in_channels=72, out_channels=134, **POINTWISE),
    "whole_vectors": Case(height=20, width=21, in_channels=64, out_channels=192, residual=True, **POINTWISE),
    "strided": Case(batch=3, height=15, width=17, in_channels=40, out_channels=64, strides=(2, 2), **POINTWISE),
    "padded": Case(height=6, width=7, in_channels=24, out_channels=64, padding=((2, 1), (0, 3)), **POINTWISE),
    "groups": Case(height=11, width=13, in_channels=99, out_channels=210, groups=3, kernel=(1, 1), activation="relu6"),
    # All positions at once, and filters by parts.
    "parts": Case(height=14, width=14, in_channels=1040, out_channels=128, residual=True, **POINTWISE),
    # Results of more than 4 MiB go past the caches.
    "streamed": Case(batch=2, height=97, width=99, in_channels=16, out_channels=128, **POINTWISE),
    "few_channels": Case(height=40, width=50, in_channels=3, out_channels=64, kernel=(7, 7), strides=(2, 2)),
    "channels_first": Case(data_format="NCHW", height=9, width=11, in_channels=35, out_channels=48, **POINTWISE),
    "channels_first_taps": Case(data_format="NCHW", height=16, width=16, in_channels=32, out_channels=40),
    "strided_taps": Case(height=13, width=12, in_channels=48, out_channels=80, strides=(2, 2), activation="elu"),
    # Depthwise: lines read in pairs, the last one alone; windows that share no lines; strips; lines staged in a ring.
    "depthwise": Case(batch=2, height=15, width=13, activation="relu6", **depthwise(80)),
    "depthwise_strided": Case(height=23, width=18, strides=(2, 2), residual=True, **depthwise(48)),
    "depthwise_apart": Case(height=19, width=17, strides=(1, 2), **depthwise(32)),
    "depthwise_dilated": Case(height=16, width=14, dilations=(3, 1), **depthwise(32)),
    "depthwise_strips": Case(height=9, width=203, padding=((2, 0), (1, 0)), **depthwise(32)),
    "depthwise_odd": Case(height=12, width=11, activation="relu", **depthwise(41)),
    "depthwise_5x5": Case(height=14, width=9, strides=(2, 2), kernel=(5, 5), **depthwise(64)),
    "depthwise_spread": Case(height=10, width=12, **depthwise(16, 3)),
    "depthwise_planes": Case(data_format="NCHW", height=13, width=12, **depthwise(32)),
    "windows": Case(height=12, width=11, in_channels=80, out_channels=136, activation="relu"),
}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_inference(name, dtype, isa):
    problem = Problem(replace(CASES[name], dtype=dtype, isa=isa))
    one, many = (problem.run_forward(threads=threads) for threads in (1, 7))
    problem.check_forward(one)
    assert one.output.tobytes() == many.output.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "streamed"])
def test_training(name, dtype, isa):
    problem = Problem(replace(CASES[name], dtype=dtype, isa=isa, training=True))
    problem.check_forward(problem.run_forward())
    one, many = (problem.run_backward(threads=threads) for threads in (1, 7))
    problem.check_backward(one)
    assert one.filters.tobytes() == many.filters.tobytes()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF], ids=hex)
def test_any_nan_stays_one(bits, dtype, isa):
    """Whatever its sign and payload: rounding carries into neither."""
    problem = Problem(Case(dtype=dtype, isa=isa, height=9, width=8, in_channels=32, out_channels=64, **POINTWISE))
    bad = np.array([3, 17, 50])
    problem.arguments.beta[bad] = np.array(bits, np.uint32).view(np.float32)
    output = problem.run_forward().output.astype(np.float32)
    assert np.isnan(output[..., bad]).all()
    assert np.isfinite(np.delete(output, bad, axis=-1)).all()


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)], ids=str)
def test_nonfinite_inputs_stay_in_their_windows(strides, dtype):
    """Of depthwise convolutions, whose windows share lines and columns, and whose padding is zeros and never read."""
    sizes = {"height": 11, "width": 10, "kernel": (3, 3), "padding": ((1, 1), (1, 1)), "strides": strides}
    problem = Problem(Case(dtype=dtype, isa="avx512", **sizes, **depthwise(48)))
    problem.arguments.inputs[0, 4, 0, 5] = np.nan
    problem.arguments.inputs[0, 10, 9, 40] = np.inf
    output = problem.run_forward().output.astype(np.float32)
    reached = np.zeros(output.shape, bool)
    for h, w, channel in ((4, 0, 5), (10, 9, 40)):
        lines = [i for i in range(output.shape[1]) if abs(i * strides[0] - h) <= 1]
        columns = [i for i in range(output.shape[2]) if abs(i * strides[1] - w) <= 1]
        reached[0][np.ix_(lines, columns, [channel])] = True
    np.testing.assert_array_equal(~np.isfinite(output), reached)
