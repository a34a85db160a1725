"""Bad input to the op: a clear error that names the argument, in eager mode and while a graph is built."""

import numpy as np
import pytest
import tensorflow as tf

import fusedconvbn

GOOD = {
    "inputs": np.ones([2, 6, 7, 4], np.float32),
    "filters": np.ones([3, 3, 2, 6], np.float32),
    "gamma": np.ones(6, np.float32),
    "beta": np.ones(6, np.float32),
    "moving_mean": np.ones(6, np.float32),
    "moving_variance": np.ones(6, np.float32),
}
RESIDUAL = np.ones([2, 4, 5, 6], np.float32)
BIG = 2**40


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


def tensor(*shape, dtype="float64"):
    return tf.ones(shape, dtype)


# (what is wrong, the arguments that differ from GOOD, words of the message)
SHAPES = [
    ("inputs", {"inputs": ones(6, 7, 4)}, ["rank 4", "6,7,4"]),
    ("inputs", {"inputs": ones(1, 2, 6, 7, 4)}, ["rank 4", "1,2,6,7,4"]),
    ("inputs", {"inputs": np.float32(3)}, ["rank 4"]),
    ("inputs", {"inputs": ones(2, 6, 7, 0)}, ["at least 1 channel", "6, 7, 0"]),
    ("filters", {"filters": ones(3, 2, 6)}, ["rank 4", "3,2,6"]),
    ("filters", {"filters": ones(3, 3, 0, 6)}, ["at least 1", "3, 3, 0, 6"]),
    ("filters", {"filters": ones(0, 3, 4, 6)}, ["at least 1", "0, 3, 4, 6"]),
    ("filters", {"filters": ones(3, 3, 3, 6)}, ["divide", "3, 3, 3, 6"]),
    ("filters", {"filters": ones(3, 3, 8, 6)}, ["divide", "3, 3, 8, 6"]),
    ("filters", {"filters": ones(3, 3, 1, 6)}, ["multiple", "groups", "3, 3, 1, 6"]),
    ("filters", {"filters": ones(9, 3, 2, 6)}, ["larger than", "height 9"]),
    ("filters", {"filters": ones(3, 3, 2, 6), "dilations": (1, 9)}, ["larger than", "dilations (1, 9)"]),
    ("gamma", {"gamma": ones(5)}, ["[6]", "[5]"]),
    ("gamma", {"gamma": ones(1)}, ["[6]", "[1]"]),
    ("gamma", {"gamma": np.float32(1)}, ["[6]", "[]"]),
    ("beta", {"beta": ones(6, 1)}, ["[6]", "[6,1]"]),
    ("moving_mean", {"moving_mean": ones(0)}, ["[6]", "[0]"]),
    ("moving_variance", {"moving_variance": ones(1, 6)}, ["[6]", "[1,6]"]),
    ("residual", {"residual": ones(2, 4, 5, 5)}, ["[2,4,5,6]", "[2,4,5,5]"]),
    ("residual", {"residual": ones(1, 4, 5, 6)}, ["[2,4,5,6]", "[1,4,5,6]"]),
    ("residual", {"residual": ones(6)}, ["[2,4,5,6]", "[6]"]),
    ("training", {"training": np.array([True])}, ["True or False"]),
    ("training", {"training": tf.constant([True, False])}, ["scalar", "[2]"]),
    ("algorithm", {"algorithm": "winograd4"}, ["3x3", "groups", "winograd4"]),
    ("algorithm", {"algorithm": "winograd2"}, ["3x3", "groups", "winograd2"]),
    ("epsilon", {"epsilon": 1e-300}, ["float32", "1e-300"]),
    ("epsilon", {"epsilon": 1e300}, ["float32", "1e+300"]),
    ("momentum", {"momentum": 1 - 1e-9}, ["float32", "0.999999999"]),
    ("padding", {"padding": [(2**57, 0), (0, 0)]}, ["padding"]),
    ("dilations", {"dilations": 2**62}, ["dilations"]),
    ("output", {"padding": [(BIG, 0), (BIG, 0)]}, ["at most 2^"]),
]
VALUES = [
    ("strides", {"strides": 0}, ["positive", "0"]),
    ("strides", {"strides": (1, -2)}, ["positive", "-2"]),
    ("strides", {"strides": (1, 2, 1)}, ["pair", "(1, 2, 1)"]),
    ("strides", {"strides": 1.5}, ["integer", "1.5"]),
    ("dilations", {"dilations": 0}, ["positive", "0"]),
    ("padding", {"padding": "FULL"}, ["SAME", "FULL"]),
    ("padding", {"padding": [(1, -1), (0, 0)]}, ["at least 0", "-1"]),
    ("padding", {"padding": [(1, 1)]}, ["(top, bottom)", "[(1, 1)]"]),
    ("padding", {"padding": 3}, ["SAME", "3"]),
    ("data_format", {"data_format": "NWHC"}, ["NHWC", "NWHC"]),
    ("epsilon", {"epsilon": float("nan")}, ["finite", "nan"]),
    ("epsilon", {"epsilon": -1e-3}, ["at least 0", "-0.001"]),
    ("epsilon", {"epsilon": "small"}, ["number", "small"]),
    ("momentum", {"momentum": 1.5}, ["from 0 to 1", "1.5"]),
    ("momentum", {"momentum": float("nan")}, ["from 0 to 1", "nan"]),
    ("activation", {"activation": "tanh"}, ["relu6", "tanh"]),
    ("activation", {"activation": tf.nn.relu}, ["relu6"]),
    ("algorithm", {"algorithm": "fft"}, ["direct", "fft"]),
    ("save", {"save": "nothing"}, ["conv", "bfloat16", "recompute", "nothing"]),
    ("unbiased_moving_variance", {"unbiased_moving_variance": 1}, ["True or False", "1"]),
    ("training", {"training": 1}, ["True or False", "1"]),
    ("training", {"training": None}, ["True or False", "None"]),
    ("training", {"training": tf.constant(1)}, ["bool"]),
    ("inputs", {"inputs": None}, ["float32", "None"]),
    ("inputs", {"inputs": "image"}, ["float32", "string"]),
    ("inputs", {"inputs": ones(2, 6, 7, 4, dtype=np.int32)}, ["float32", "int32"]),
    ("inputs", {"inputs": tf.ragged.constant([[1.0], [2.0, 3.0]])}, ["float32"]),
    ("filters", {"filters": tensor(3, 3, 2, 6)}, ["float32", "float64"]),
    ("filters", {"filters": tensor(3, 3, 2, 6, dtype="bfloat16")}, ["float32", "bfloat16"]),
    ("gamma", {"gamma": tensor(6)}, ["float32", "float64"]),
    ("moving_variance", {"moving_variance": tensor(6, dtype="float16")}, ["float32", "float16"]),
    ("residual", {"residual": tensor(2, 4, 5, 6, dtype="float16")}, ["float32", "float16"]),
]


def identify(rows):
    return [f"{name}-{'-'.join(words)}".replace(" ", "_") for name, _, words in rows]


def check(error, name, words):
    """Shapes are printed with spaces by the core, without by TensorFlow's kernels: spaces do not count."""
    message = str(error.value).replace(" ", "")
    for word in [name, *words]:
        assert word.replace(" ", "") in message, str(error.value)


@pytest.mark.parametrize(("name", "changes", "words"), SHAPES + VALUES, ids=identify(SHAPES + VALUES))
@pytest.mark.parametrize("training", [False, True])
def test_eager(name, changes, words, training):
    with pytest.raises((ValueError, TypeError, tf.errors.InvalidArgumentError)) as error:
        fusedconvbn.fused_conv_bn(**{**GOOD, "training": training, **changes})
    check(error, name, words)


@pytest.mark.parametrize(("name", "changes", "words"), SHAPES + VALUES, ids=identify(SHAPES + VALUES))
def test_while_a_graph_is_built(name, changes, words):
    with pytest.raises((ValueError, TypeError)) as error:
        tf.function(lambda: fusedconvbn.fused_conv_bn(**{**GOOD, **changes}))()
    check(error, name, words)


@pytest.mark.parametrize(("name", "changes", "words"), SHAPES, ids=identify(SHAPES))
def test_when_a_graph_runs(name, changes, words):
    """Shapes that are not known before are checked by the kernel."""
    fed = {k: v for k, v in {**GOOD, **changes}.items() if isinstance(v, (np.ndarray, np.generic, tf.Tensor))}
    fixed = {k: v for k, v in changes.items() if k not in fed}

    @tf.function(input_signature=[{k: tf.TensorSpec(None, v.dtype) for k, v in fed.items()}])
    def call(tensors):
        return fusedconvbn.fused_conv_bn(**tensors, **fixed)

    if name == "training" and "True or False" in words:
        words = ["scalar", "[1]"]
    with pytest.raises((ValueError, tf.errors.InvalidArgumentError)) as error:
        call({k: tf.constant(v) for k, v in fed.items()})
    check(error, name, words)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_vectors_of_the_wrong_type_name_what_is_accepted(dtype):
    wrong, right = ("float32", "float64") if dtype == "float64" else ("float64", "float32")
    arguments = {k: tf.cast(v, dtype if k in ("inputs", "filters") else right) for k, v in GOOD.items()}
    with pytest.raises(TypeError, match=f"`beta` must be of type {right}.* {wrong}"):
        fusedconvbn.fused_conv_bn(**{**arguments, "beta": tf.cast(GOOD["beta"], wrong)})


def test_output_that_no_memory_holds():
    """2^40 elements: refused by the allocator, before anything is computed."""
    with pytest.raises(tf.errors.ResourceExhaustedError, match="OOM"):
        fusedconvbn.fused_conv_bn(**GOOD, padding=[(2**19, 0), (2**18, 0)])


def test_empty_batch_of_huge_images():
    output = fusedconvbn.fused_conv_bn(**{**GOOD, "inputs": ones(0, 2**20, 2**19, 4)}, training=True).output
    assert output.shape == [0, 2**20 - 2, 2**19 - 2, 6]


ATTRIBUTES = {
    "strides": [1, 1, 1, 1], "padding": "VALID", "explicit_paddings": [], "data_format": "NHWC",
    "dilations": [1, 1, 1, 1], "epsilon": 1e-3, "momentum": 0.9, "unbiased_moving_variance": False,
    "activation": "none", "algorithm": "auto", "save": "conv",
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("strides", {"strides": [2, 1, 1, 1]}),
        ("strides", {"strides": [1, 1, 1, 2]}),
        ("strides", {"strides": [1, 1, 1]}),
        ("dilations", {"dilations": [1, 1, 1, 2]}),
        ("explicit_paddings", {"explicit_paddings": [0, 0, 1, 1, 1, 1, 0, 0]}),
        ("explicit_paddings", {"padding": "EXPLICIT"}),
        ("explicit_paddings", {"padding": "EXPLICIT", "explicit_paddings": [1, 0, 1, 1, 1, 1, 0, 0]}),
        ("epsilon", {"epsilon": float("nan")}),
        ("momentum", {"momentum": -1.0}),
        ("activation", {"activation": "tanh"}),
        ("padding", {"padding": "FULL"}),
    ],
    ids=str,
)  # fmt: skip
def test_attributes_of_a_graph_from_elsewhere(name, attributes):
    """Nothing of this package's Python checks a GraphDef; the op does."""
    from fusedconvbn import _load

    with pytest.raises(tf.errors.InvalidArgumentError, match=name):
        _load.ops().fused_conv_bn(**GOOD, residual=[], training=True, **{**ATTRIBUTES, **attributes})


def test_a_graph_with_two_residuals():
    from fusedconvbn import _load

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"num_residual must be 0 or 1.*2"):
        _load.ops().fused_conv_bn(**GOOD, residual=[RESIDUAL, RESIDUAL], training=True, **ATTRIBUTES)


def gradient_arguments(**changes):
    vector, empty = GOOD["gamma"], ones(0, 0, 0, 0)
    return {
        "output_gradient": RESIDUAL, "moving_mean_gradient": vector, "moving_variance_gradient": vector, **GOOD,
        "residual": [], "output": [], "batch_mean": vector, "inv_std": vector, "conv_out": empty, "training": False,
        "num_residual_gradient": 0, **ATTRIBUTES, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("output_gradient", {"output_gradient": ones(2, 4, 5, 5)}),
        ("moving_mean_gradient", {"moving_mean_gradient": ones(5)}),
        ("inputs", {"inputs": ones(6, 7, 4)}),
        ("conv_out", {"training": True, "conv_out": np.zeros((2, 3, 4, 5), np.float32)}),
        ("conv_out", {"training": True, "conv_out": np.zeros(119, np.float32)}),
        ("batch_mean", {"batch_mean": ones(7)}),
        ("training", {"training": [False]}),
        ("num_output", {"output": [RESIDUAL]}),
        ("num_residual", {"has_residual": True, "activation": "silu"}),
        ("output", {"has_residual": True, "activation": "relu", "output": [ones(2, 4, 5, 1)]}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_gradient(name, changes):
    from fusedconvbn import _load

    _load.ops().fused_conv_bn_grad(**gradient_arguments())
    with pytest.raises(tf.errors.InvalidArgumentError, match=name):
        _load.ops().fused_conv_bn_grad(**gradient_arguments(**changes))
