"""What the layer refuses: at construction, when built, when called; each error names the argument and what it got."""

import keras
import numpy as np
import pytest

from fusedconvbn import FusedConvBN

CONSTRUCTOR = [
    ({"filters": 0}, ValueError, "filters"),
    ({"filters": 2.5}, TypeError, "filters"),
    ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size"),
    ({"kernel_size": 0}, ValueError, "kernel_size"),
    ({"strides": -1}, ValueError, "strides"),
    ({"dilation_rate": 0}, ValueError, "dilation_rate"),
    ({"padding": "causal"}, ValueError, "padding"),
    ({"padding": ((1, 1), (-1, 1))}, ValueError, "padding"),
    ({"padding": 1}, TypeError, "padding"),
    ({"data_format": "NHWC"}, ValueError, "data_format"),
    ({"groups": 0}, ValueError, "groups"),
    ({"filters": 5, "groups": 2}, ValueError, "filters.*groups=2"),
    ({"activation": "unheard_of"}, ValueError, "activation"),
    ({"use_bias": "yes"}, TypeError, "use_bias"),
    ({"momentum": 1.5}, ValueError, "momentum"),
    ({"epsilon": float("nan")}, ValueError, "epsilon"),
    ({"epsilon": -1e-3}, ValueError, "epsilon"),
    ({"center": None}, TypeError, "center"),
    ({"synchronized": "on"}, TypeError, "synchronized"),
    ({"batch_norm_trainable": 1}, TypeError, "batch_norm_trainable"),
    ({"algorithm": "fastest"}, ValueError, "algorithm"),
    ({"save": "nothing"}, ValueError, "save"),
    ({"kernel_initializer": "unheard_of"}, ValueError, "unheard_of"),
    ({"renorm": True}, ValueError, "renorm"),
    ({"renorm_clipping": {"rmax": 3.0}}, ValueError, "renorm_clipping"),
    ({"renorm_momentum": 0.5}, ValueError, "renorm_momentum"),
    ({"lora_rank": 4}, ValueError, "lora_rank"),
    ({"axis": 1}, ValueError, "axis"),
    ({"axis": -1, "data_format": "channels_first"}, ValueError, "axis"),
    ({"mask": None}, ValueError, "mask"),
    ({"variable_transforms": [abs]}, TypeError, "variable_transforms"),
    ({"variable_transforms": {"gama": abs}}, ValueError, "variable_transforms.*'gamma'.*'gama'"),
    ({"variable_transforms": {"bias": abs}}, ValueError, "variable_transforms.*'bias'"),
    ({"variable_transforms": {"beta": abs}, "center": False}, ValueError, "variable_transforms.*'beta'"),
    ({"variable_transforms": {"gamma": 2.0}}, TypeError, r"variable_transforms\['gamma'\].*2.0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CONSTRUCTOR, ids=lambda v: str(v)[:40])
def test_constructor(arguments, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        FusedConvBN(**{"filters": 4, "kernel_size": 3, **arguments})


@pytest.mark.parametrize("arguments", [
    {"axis": -1}, {"axis": 3}, {"axis": 1, "data_format": "channels_first"}, {"renorm": False, "renorm_clipping": None},
    {"renorm_momentum": 0.99}, {"lora_rank": None}, {"padding": "SAME"}, {"data_format": "Channels_Last"},
])  # fmt: skip
def test_keras_arguments_without_effect_are_accepted(arguments):
    assert "axis" not in FusedConvBN(4, 3, **arguments).get_config()


@pytest.mark.parametrize(("shape", "arguments", "message"), [
    ((None, 8, 8, None), {}, "input_shape.*None, 8, 8, None"),
    ((None, 8, 8, 3), {"groups": 2}, "input_shape.*groups=2"),
    ((None, 2, 8, 3), {}, "zero or negative"),
    ((None, 2, 8, 3), {"dilation_rate": 2, "padding": ((1, 1), (0, 0))}, "zero or negative"),
])  # fmt: skip
def test_build(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        FusedConvBN(4, 3, **arguments).build(shape)


def call(*shapes, layer=None, **arguments):
    layer = layer or FusedConvBN(4, 3)
    return layer(*(np.ones(shape, "float32") for shape in shapes), **arguments)


def test_rank():
    with pytest.raises(ValueError, match="expected ndim=4, found ndim=3"):
        call((8, 8, 3))


def test_other_number_of_channels():
    layer = FusedConvBN(4, 3)
    call((1, 8, 8, 3), layer=layer)
    with pytest.raises(ValueError, match=r"axis -1 .* value 3"):
        call((1, 8, 8, 5), layer=layer)


def test_residual_of_another_shape_in_a_functional_model():
    x, residual = keras.Input((8, 8, 3)), keras.Input((8, 8, 4))
    with pytest.raises(ValueError, match=r"residual.*\(None, 6, 6, 4\).*\(None, 8, 8, 4\)"):
        FusedConvBN(4, 3)(x, residual)


def test_residual_of_another_shape_when_called():
    with pytest.raises(Exception, match="residual"):
        call((1, 8, 8, 3), (1, 6, 6, 1))


def test_mask_argument():
    with pytest.raises(TypeError, match="mask"):
        call((1, 8, 8, 3), mask=np.ones((1, 8, 8), bool))


def test_training_of_another_type():
    with pytest.raises(TypeError, match="training"):
        call((1, 8, 8, 3), training=keras.ops.convert_to_tensor(1))


def test_transform_that_changes_the_shape():
    layer = FusedConvBN(4, 3, variable_transforms={"gamma": lambda v: v[:2]})
    with pytest.raises(Exception, match="gamma"):
        call((1, 8, 8, 3), layer=layer)


def test_setting_batch_norm_trainable_to_no_bool():
    layer = FusedConvBN(4, 3)
    with pytest.raises(TypeError, match="batch_norm_trainable"):
        layer.batch_norm_trainable = None


def test_another_backend(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with pytest.raises(RuntimeError, match=r"KERAS_BACKEND=tensorflow.*Received: backend='jax'"):
        FusedConvBN(4, 3)
