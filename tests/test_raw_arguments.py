"""What `raw` refuses, and how: errors name the argument, what is accepted and what was received."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fusedconvbn import raw

SHAPE, FILTERS = (2, 5, 6, 4), (3, 3, 2, 8)


def arguments(dtype: Any = np.float32, stat: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    vectors = {name: rng.uniform(0.5, 1, 8).astype(stat) for name in names}
    return {
        "inputs": rng.standard_normal(SHAPE).astype(dtype), "filters": rng.standard_normal(FILTERS).astype(dtype),
        **vectors,
    }  # fmt: skip


def of_shape(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(2).standard_normal(shape).astype(dtype)


BAD = [
    # rank
    ("inputs", {"inputs": of_shape(5, 6, 4)}, ValueError, r"`inputs` must be an array of rank 4.*shape \(5, 6, 4\)"),
    ("filters", {"filters": of_shape(3, 2, 8)}, ValueError, r"`filters` must be an array of rank 4.*\(3, 2, 8\)"),
    ("gamma", {"gamma": of_shape(8, 1)}, ValueError, r"`gamma` must be an array of shape \(8,\).*\(8, 1\)"),
    # dtype
    ("inputs", {"inputs": of_shape(*SHAPE).astype(np.int32)}, TypeError, r"`inputs` must be .* float32.*int32"),
    ("inputs", {"inputs": of_shape(*SHAPE).astype(">f4")}, TypeError, r"`inputs` must be .* float32"),
    ("inputs", {"inputs": None}, TypeError, r"`inputs` must be an array.*object"),
    ("filters", {"filters": of_shape(*FILTERS, dtype=np.float64)}, TypeError, r"`filters` .*float32.*float64"),
    ("filters", {"filters": None}, TypeError, r"`filters` must be an array.*None"),
    ("gamma", {"gamma": of_shape(8, dtype=np.float64)}, TypeError, r"`gamma` .*dtype float32.*float64"),
    ("gamma", {"gamma": None}, TypeError, r"`gamma` must be an array.*None"),
    ("beta", {"beta": of_shape(8, dtype=np.float16)}, TypeError, r"`beta` .*dtype float32.*float16"),
    ("moving_mean", {"moving_mean": list("12345678")}, TypeError, r"`moving_mean` .*dtype float32"),
    # channels, groups
    ("filters", {"filters": of_shape(3, 3, 3, 8)}, ValueError, r"filters\.shape\[2\] must divide .*4 channels"),
    ("filters", {"filters": of_shape(3, 3, 5, 8)}, ValueError, r"filters\.shape\[2\] must divide"),
    ("filters", {"filters": of_shape(3, 3, 2, 7)}, ValueError, r"filters\.shape\[3\] must be a multiple .* 2\."),
    ("filters", {"filters": of_shape(3, 0, 2, 8)}, ValueError, r"filters must be .* each at least 1.*\[3, 0, 2, 8\]"),
    ("inputs", {"inputs": of_shape(2, 5, 6, 0)}, ValueError, r"inputs must have at least 1 channel.*\[2, 5, 6, 0\]"),
    # vectors of the wrong length
    ("gamma", {"gamma": of_shape(7)}, ValueError, r"`gamma` must be an array of shape \(8,\).*shape \(7,\)"),
    ("beta", {"beta": of_shape(9)}, ValueError, r"`beta` must be an array of shape \(8,\)"),
    ("moving_mean", {"moving_mean": of_shape(1)}, ValueError, r"`moving_mean` must be an array of shape \(8,\)"),
    ("moving_variance", {"moving_variance": of_shape(0)}, ValueError, r"`moving_variance` must be .* \(8,\)"),
    # residual
    ("residual", {"residual": of_shape(2, 3, 4, 7)}, ValueError, r"`residual` .*\(2, 3, 4, 8\).*\(2, 3, 4, 7\)"),
    ("residual", {"residual": of_shape(8)}, ValueError, r"`residual` must be an array of shape \(2, 3, 4, 8\)"),
    ("residual", {"residual": of_shape(2, 3, 4, 8, dtype=np.float16)}, TypeError, r"`residual` .*dtype float32"),
    # attributes
    ("strides", {"strides": 0}, ValueError, r"`strides` must be a positive integer.*strides=0"),
    ("strides", {"strides": (1, -2)}, ValueError, r"`strides` must be .*strides=\(1, -2\)"),
    ("strides", {"strides": (1, 1, 1)}, ValueError, r"`strides` must be .* pair"),
    ("strides", {"strides": 1.0}, TypeError, r"`strides` must be .*strides=1\.0"),
    ("strides", {"strides": True}, TypeError, r"`strides` must be .*strides=True"),
    ("strides", {"strides": 2**70}, ValueError, r"`strides` must be"),
    ("dilations", {"dilations": 0}, ValueError, r"`dilations` must be a positive integer.*dilations=0"),
    ("dilations", {"dilations": (2**49, 1)}, ValueError, r"dilations must be .*562949953421312"),
    ("dilations", {"dilations": 2**62}, ValueError, r"dilations"),
    ("dilations", {"dilations": 9}, ValueError, r"filters must not be larger than .* inputs.*dilations \(9, 9\)"),
    ("padding", {"padding": "FULL"}, ValueError, r"`padding` must be \"SAME\", \"VALID\".*'FULL'"),
    ("padding", {"padding": 1}, TypeError, r"`padding` must be .*padding=1"),
    ("padding", {"padding": [(0, 0), (0, -1)]}, ValueError, r"`padding` must be .*-1"),
    ("padding", {"padding": [(0, 0), (0, 0.5)]}, TypeError, r"`padding` must be .*0\.5"),
    ("padding", {"padding": [(0, 0)]}, ValueError, r"`padding` must be"),
    ("padding", {"padding": [(2**62, 2**62), (0, 0)]}, ValueError, r"padding must be .*4611686018427387904"),
    ("padding", {"padding": [(2**63 - 1, 2**63 - 1), (0, 0)]}, ValueError, r"padding must be .*9223372036854775807"),
    ("data_format", {"data_format": "NHCW"}, ValueError, r"`data_format` must be .*'NHCW'"),
    ("activation", {"activation": "swishy"}, ValueError, r"`activation` must be one of None, 'relu'.*'swishy'"),
    ("activation", {"activation": len}, TypeError, r"`activation` must be one of"),
    ("epsilon", {"epsilon": math.nan}, ValueError, r"`epsilon` must be a finite number.*nan"),
    ("epsilon", {"epsilon": math.inf}, ValueError, r"`epsilon` must be a finite number.*inf"),
    ("epsilon", {"epsilon": -1e-3}, ValueError, r"`epsilon` must be a finite number, at least 0.*-0\.001"),
    ("epsilon", {"epsilon": "1e-3"}, TypeError, r"`epsilon` must be a finite number"),
    ("momentum", {"momentum": 1.5}, ValueError, r"`momentum` must be a number from 0 to 1.*1\.5"),
    ("momentum", {"momentum": math.nan}, ValueError, r"`momentum` must be a number from 0 to 1.*nan"),
    ("training", {"training": 1}, TypeError, r"`training` must be True or False.*training=1"),
    ("unbiased", {"unbiased_moving_variance": None}, TypeError, r"`unbiased_moving_variance` must be True or False"),
    ("algorithm", {"algorithm": "fft"}, ValueError, r"`algorithm` must be one of 'auto'.*'fft'"),
    ("algorithm", {"algorithm": "winograd4", "strides": 2}, ValueError, r"unless the filters are 3x3.*winograd4"),
    ("algorithm", {"algorithm": "winograd2", "strides": 2}, ValueError, r"unless the filters are 3x3.*winograd2"),
    ("save", {"save": "nothing"}, ValueError, r"`save` must be one of 'conv', 'bfloat16', 'recompute'.*'nothing'"),
    ("isa", {"isa": "sse9"}, ValueError, r"`isa` must be None or one of 'generic'.*'sse9'"),
    ("kernel", {"kernel": "no_such"}, ValueError, r"kernel must be one of .*forward_direct_.*no_such"),
    ("kernel", {"kernel": 3}, TypeError, r"`kernel` must be None or a name.*kernel=3"),
    ("threads", {"threads": 0}, ValueError, r"`threads` must be an integer from 1 to .*threads=0"),
    ("threads", {"threads": 1.5}, TypeError, r"`threads` must be an integer"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"), [row[1:] for row in BAD], ids=[f"{i}-{row[0]}" for i, row in enumerate(BAD)]
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_refused(direction, changes, error, message):
    call = {**arguments(), **changes}
    if direction == "backward":
        call["output_gradient"] = of_shape(2, 3, 4, 8)
    with pytest.raises(error, match=message) as caught:
        getattr(raw, direction)(**call)
    assert "Received: " in str(caught.value)


GRADIENTS = [
    ({"output_gradient": None}, TypeError, r"`output_gradient` must be an array.*None"),
    ({"output_gradient": of_shape(2, 3, 4, 1)}, ValueError, r"`output_gradient` .*\(2, 3, 4, 8\)"),
    ({"output_gradient": of_shape(2, 3, 4, 8, dtype=np.float64)}, TypeError, r"`output_gradient` .*float32"),
    ({"moving_mean_gradient": of_shape(3)}, ValueError, r"`moving_mean_gradient` .*\(8,\).*\(3,\)"),
    ({"moving_variance_gradient": of_shape(8, dtype=np.float64)}, TypeError, r"`moving_variance_gradient` .*float32"),
    ({"training": True}, TypeError, r"`batch_mean` must be an array.*None"),
    ({"training": True, "batch_mean": of_shape(8), "inv_std": of_shape(8)}, TypeError, r"`conv_out` must be .*None"),
    ({"residual": of_shape(2, 3, 4, 8), "activation": "relu"}, TypeError, r"`output` must be an array.*None"),
    ({"output": of_shape(2, 3, 8)}, ValueError, r"`output` must be an array of shape \(2, 3, 4, 8\)"),
    ({"needs_inputs": 2}, TypeError, r"`needs_inputs` must be True or False"),
]


@pytest.mark.parametrize(("changes", "error", "message"), GRADIENTS, ids=range(len(GRADIENTS)))
def test_refused_by_backward(changes, error, message):
    call = {"output_gradient": of_shape(2, 3, 4, 8), **arguments(), **changes}
    with pytest.raises(error, match=message) as caught:
        raw.backward(**call)
    assert "Received: " in str(caught.value)


@pytest.mark.parametrize("stat", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_statistics_have_the_right_type(dtype, stat):
    call = arguments(dtype, stat)
    if (dtype == np.float64) != (stat == np.float64):
        with pytest.raises(TypeError, match="`gamma` must be an array of dtype"):
            raw.forward(**call)
    else:
        assert raw.forward(**call).output.dtype == dtype


@pytest.mark.parametrize(
    ("ours", "normal"),
    [
        ({"strides": np.int64(2)}, {"strides": (2, 2)}),
        ({"strides": np.array([2, 1])}, {"strides": (2, 1)}),
        ({"padding": "same"}, {"padding": "SAME"}),
        ({"padding": np.array([[1, 0], [2, 1]])}, {"padding": [(1, 0), (2, 1)]}),
        ({"epsilon": np.float32(0.25)}, {"epsilon": 0.25}),
        ({"momentum": 1}, {"momentum": 1.0}),
        ({"training": np.True_}, {"training": True}),
    ],
)
def test_numpy_numbers_are_accepted(ours, normal):
    for a, b in zip(raw.forward(**arguments(), **ours), raw.forward(**arguments(), **normal), strict=True):
        np.testing.assert_array_equal(a, b)


def test_arguments_are_not_written_to():
    call = arguments()
    before = {name: array.copy() for name, array in call.items()}
    for array in call.values():
        array.flags.writeable = False
    raw.forward(**call, training=True)
    raw.backward(of_shape(2, 3, 4, 8), **call)
    for name, array in call.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inputs_shape", [(0, 5, 6, 4), (2, 2, 6, 4), (0, 2, 6, 4)])
@pytest.mark.parametrize("kernel", [None, "reference"])
def test_empty_output(inputs_shape, training, kernel):
    """No pixels: empty output, moving statistics as they were, all gradients zero but those handed through."""
    call = {**arguments(), "inputs": of_shape(*inputs_shape), "training": training}
    forced = [kernel and f"{direction}_{kernel}" for direction in ("forward", "backward")]
    result = raw.forward(**call, kernel=forced[0])
    assert result.output.size == 0
    assert result.output.shape == raw.out_shape(inputs_shape, FILTERS)
    for name in ("moving_mean", "moving_variance"):
        np.testing.assert_array_equal(getattr(result, name), call[name])
    np.testing.assert_array_equal(result.batch_mean, call["moving_mean"])
    np.testing.assert_allclose(result.inv_std, 1 / np.sqrt(call["moving_variance"] + 1e-3), rtol=1e-6)
    upstream = {"moving_mean_gradient": of_shape(8), "moving_variance_gradient": of_shape(8) + 3}
    saved = {"batch_mean": result.batch_mean, "inv_std": result.inv_std, "conv_out": result.conv_out}
    gradient = raw.backward(result.output, **call, **upstream, **saved, kernel=forced[1])
    np.testing.assert_array_equal(gradient.moving_mean, upstream["moving_mean_gradient"])
    np.testing.assert_array_equal(gradient.moving_variance, upstream["moving_variance_gradient"])
    assert gradient.inputs.shape == inputs_shape
    for array in (gradient.inputs, gradient.filters, gradient.gamma, gradient.beta):
        assert not array.any()


BIG = 2**40
ONE = np.ones((1, 1, 1, 1), np.float32)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("size", "filters", "attributes", "expected"),
    [
        ((1, 1), ONE, {"padding": [(BIG, 0), (0, 0)], "strides": (BIG, 1)}, [1.0, 3.0]),  # a pad, then the pixel
        ((2, 1), np.ones((2, 1, 1, 1)), {"padding": [(BIG, 0), (0, 0)], "dilations": (BIG, 1)}, [3.0, 3.0]),
        ((3, 2), ONE, {"strides": BIG}, [3.0]),
        ((2, 2), np.ones((3, 3, 1, 1)), {"strides": BIG, "padding": "SAME"}, [9.0]),
        ((1, 1), np.ones((3, 3, 1, 1)), {"dilations": 2**22, "padding": "SAME"}, [3.0]),
    ],
    ids=["padding-strides", "padding-dilations", "strides", "strides-same", "dilations-same"],
)
def test_huge_steps(size, filters, attributes, expected, direction):
    """They reach for pixels far away, and cost nothing."""
    inputs, filters = np.full((1, *size, 1), 2, np.float32), np.float32(filters)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    arguments = (inputs, filters, one, one, zero, one)
    output = raw.forward(*arguments, **attributes, epsilon=0.0).output
    assert output.ravel().tolist() == expected
    if direction == "backward":
        gradient = raw.backward(np.ones_like(output), *arguments, **attributes, epsilon=0.0)
        assert gradient.beta == len(expected)
        assert 2 * gradient.inputs.sum() == sum(expected) - len(expected)
        assert gradient.filters.sum() == gradient.inputs.sum() * 2


@pytest.mark.parametrize(
    ("inputs", "filters", "attributes"),
    [
        ((1, 2**23, 2**23, 1), (1, 1, 1, 1), {}),
        ((1, 1, 1, 1), (1, 1, 1, 2**46), {}),
        ((1, 1, 1, 1), (1, 1, 1, 1), {"padding": [(2**23, 0), (2**23, 0)]}),
        ((1, 1, 1, 1), (3, 3, 1, 1), {"padding": [(2**46, 0), (1, 1)], "algorithm": "winograd2"}),
    ],
    ids=["inputs", "filters", "output", "winograd"],
)
def test_more_than_memory_holds(inputs, filters, attributes):
    """More bytes than there are addresses: refused when arrays are made, before anything is computed."""
    with pytest.raises(MemoryError, match=r"Unable to allocate .* shape"):
        raw.forward(
            np.broadcast_to(np.float32(1), inputs), np.broadcast_to(np.float32(1), filters),
            *[np.broadcast_to(np.float32(1), filters[3])] * 4, **attributes,
        )  # fmt: skip


def test_isa_that_the_machine_lacks(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_ISA", "generic")
    with pytest.raises(ValueError, match=r"`isa` must be one that this machine has .*generic\. Received: avx2"):
        raw.forward(**arguments(), isa="avx2")


def planned(**changes: Any) -> Any:
    return raw.plan(SHAPE, FILTERS, **{"kernel": "forward_direct_generic", **changes})


def test_filters_of_another_kernel_than_they_were_packed_for():
    given = arguments()
    packed = raw.pack_filters(planned(), given["filters"])
    with pytest.raises(ValueError, match=r"`packed_filters` must be of .*forward_reference.* Received: .*_direct_"):
        raw.forward(**given, kernel="forward_reference", packed_filters=packed)
    with pytest.raises(TypeError, match="`packed_filters` must be None or what pack_filters"):
        raw.forward(**given, packed_filters=packed.memory)


@pytest.mark.parametrize(
    ("plan", "filters", "error", "message"),
    [
        ({}, of_shape(*FILTERS[:3], 9), ValueError, r"`filters` must be an array of shape .*Received: shape .*9\)"),
        ({}, of_shape(*FILTERS, dtype=np.float64), TypeError, "`filters` must be an array of dtype float32.*float64"),
        ({"kernel": "forward_reference"}, of_shape(*FILTERS), ValueError, "`plan` must be of a kernel that packs"),
        ({"kernel": None, "direction": "backward"}, of_shape(*FILTERS), ValueError, "`plan` must be of a kernel that"),
    ],
)
def test_filters_that_cannot_be_packed(plan, filters, error, message):
    with pytest.raises(error, match=message):
        raw.pack_filters(planned(**plan), filters)
