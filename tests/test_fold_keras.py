"""`fold` on Keras models: layers of every kind, shared ones, models in models, and FusedConvBN itself."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from fold_files import distance
from fold_models import FORMS, application, facts_of_model, keras_images, run_keras

import fusedconvbn
from fusedconvbn import FusedConvBN

layers = keras.layers


def randomize(model: keras.Model, seed: int = 0) -> keras.Model:
    """Other weights than those that batch norms begin with."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        name = weight.name
        if "variance" in name:
            weight.assign(rng.uniform(0.3, 3, weight.shape))
        elif any(part in name for part in ("gamma", "beta", "mean", "bias")):
            weight.assign(rng.normal(size=weight.shape))
    return model


def norm(**arguments):
    return layers.BatchNormalization(**arguments)


def chain(*parts, shape=(9, 8, 4)) -> keras.Model:
    x = inputs = keras.Input(shape)
    for part in parts:
        x = part(x)
    return keras.Model(inputs, x)


def residual() -> keras.Model:
    inputs = keras.Input((9, 8, 4))
    x = norm()(layers.Conv2D(4, 3, padding="same")(inputs))
    y = norm()(layers.Conv2D(4, 1)(layers.ReLU()(x)))
    return keras.Model(inputs, layers.ReLU()(layers.Add()([x, y])))


def concatenated() -> keras.Model:
    inputs = keras.Input((9, 8, 4))
    parts = [layers.Conv2D(3, 1)(inputs), layers.Conv2D(5, 3, padding="same", use_bias=False)(inputs)]
    return keras.Model(inputs, norm()(layers.Concatenate()(parts)))


def nested() -> keras.Model:
    block = chain(layers.Conv2D(4, 3, padding="same"), norm(), layers.ReLU())
    inputs = keras.Input((9, 8, 4))
    return keras.Model(inputs, layers.Conv2D(2, 1)(block(block(inputs))))


def shared_convolution() -> keras.Model:
    """One convolution under two batch norms, and under none."""
    inputs = keras.Input((9, 8, 4))
    conv = layers.Conv2D(4, 3, padding="same")
    outputs = [norm()(conv(inputs)), norm()(conv(layers.ReLU()(inputs))), conv(layers.ELU()(inputs))]
    return keras.Model(inputs, outputs)


def shared_chain() -> keras.Model:
    inputs = keras.Input((9, 8, 4))
    conv, bn = layers.Conv2D(4, 3, padding="same"), norm()
    return keras.Model(inputs, bn(conv(layers.ReLU()(bn(conv(inputs))))))


def before_several() -> keras.Model:
    inputs = keras.Input((9, 8, 4))
    x = norm()(inputs)
    return keras.Model(inputs, [layers.Conv2D(3, 3)(x), layers.Conv2D(2, 1, strides=2, use_bias=False)(x)])


def read_twice() -> keras.Model:
    inputs = keras.Input((9, 8, 4))
    z = layers.Conv2D(4, 3)(inputs)
    return keras.Model(inputs, [norm()(z), layers.ReLU()(z)])


# What to build, how many batch norms fold and how many are kept.
MODELS = {
    "conv": (lambda: chain(layers.Conv2D(5, 3), norm(), layers.ReLU()), 1, 0),
    "conv_no_bias": (lambda: chain(layers.Conv2D(5, 3, use_bias=False), norm(center=False, scale=False)), 1, 0),
    "conv1d": (lambda: chain(layers.Conv1D(5, 3, padding="causal"), norm(), shape=(11, 3)), 1, 0),
    "conv3d": (lambda: chain(layers.Conv3D(5, 2), norm(), shape=(5, 6, 4, 3)), 1, 0),
    "depthwise": (lambda: chain(layers.DepthwiseConv2D(3, depth_multiplier=2), norm()), 1, 0),
    "separable": (lambda: chain(layers.SeparableConv2D(5, 3), norm()), 1, 0),
    "transposed": (lambda: chain(layers.Conv2DTranspose(5, 3, strides=2), norm()), 1, 0),
    "dense": (lambda: chain(layers.Dense(6), norm(), layers.ReLU(), layers.Dense(2), norm(), shape=(7,)), 2, 0),
    "dropouts": (lambda: chain(layers.Conv2D(5, 3), layers.Dropout(0.5), norm(), layers.GaussianNoise(0.3)), 1, 0),
    "average": (lambda: chain(layers.Conv2D(5, 3), layers.AveragePooling2D(2, padding="same"), norm()), 1, 0),
    "maximum": (lambda: chain(layers.Conv2D(5, 3), layers.MaxPooling2D(2), norm(scale=False)), 1, 0),
    "maximum_negative": (lambda: chain(layers.Conv2D(5, 3), layers.MaxPooling2D(2), norm()), 0, 1),
    "global_average": (lambda: chain(layers.Conv2D(5, 3), layers.GlobalAveragePooling2D(), norm()), 1, 0),
    "flatten": (lambda: chain(norm(), layers.Flatten(), layers.Dense(3), shape=(4, 3, 2)), 1, 0),
    "axis_1": (lambda: chain(layers.Conv2D(5, 3), layers.Permute((3, 1, 2)), norm(axis=1)), 1, 0),
    "twice": (lambda: chain(layers.Conv2D(5, 3), norm(), norm()), 2, 0),
    "before": (lambda: chain(norm(), layers.Conv2D(5, 3, strides=2)), 1, 0),
    "before_same": (lambda: chain(norm(), layers.Conv2D(5, 3, padding="same")), 0, 1),
    "before_same_one_channel": (lambda: chain(norm(), layers.Conv2D(5, 3, padding="same"), shape=(6, 5, 1)), 1, 0),
    "activated": (lambda: chain(layers.Conv2D(5, 3, activation="relu"), norm()), 0, 1),
    "zero_padding": (lambda: chain(layers.Conv2D(5, 3), layers.ZeroPadding2D(1), norm()), 0, 1),
    "sequential": (
        lambda: keras.Sequential([keras.Input((9, 8, 4)), layers.Conv2D(5, 3), norm(), layers.ReLU(), norm()]), 1, 1,
    ),
    "residual": (residual, 2, 0),
    "concatenated": (concatenated, 1, 0),
    "nested": (nested, 1, 0),
    "shared_convolution": (shared_convolution, 2, 0),
    "shared_chain": (shared_chain, 1, 0),
    "before_several": (before_several, 1, 0),
    "read_twice": (read_twice, 0, 1),
    "fused": (lambda: chain(FusedConvBN(5, 3, activation="relu"), FusedConvBN(4, 1, use_bias=True, scale=False)), 2, 0),
    "fused_depthwise": (lambda: chain(FusedConvBN(8, 3, groups=4, activation="hard_silu")), 1, 0),
}  # fmt: skip


def outputs_of(model: keras.Model, images: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(output) for output in keras.tree.flatten(model(images, training=False))]


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    build, folded, kept = MODELS[name]
    model = randomize(build())
    weights = [w.numpy() for w in model.weights]
    images = np.random.default_rng(1).normal(size=(2, *model.input_shape[1:])).astype("float32")
    expected = outputs_of(model, images)
    result, report = fusedconvbn.fold(model)
    for output, other in zip(expected, outputs_of(result, images), strict=True):
        assert distance(other, output) < 1e-5
    assert (len(report.folded), len(report.kept)) == (folded, kept), str(report)
    assert report.verification.verdict == "ok"
    assert type(result) is type(model)
    left = [layer for layer in result._flatten_layers() if isinstance(layer, layers.BatchNormalization)]
    assert len(left) == kept
    assert not any(isinstance(layer, (FusedConvBN, layers.Dropout)) for layer in result._flatten_layers())
    for before, after in zip(weights, model.weights, strict=True):
        np.testing.assert_array_equal(before, after.numpy())


def test_result_is_saved_and_loaded(tmp_path):
    model = randomize(chain(layers.Conv2D(5, 3, use_bias=False), norm(), layers.ReLU()))
    path, _ = fusedconvbn.fold(model, tmp_path / "new" / "folded.keras")
    images = np.random.default_rng(1).normal(size=(2, 9, 8, 4)).astype("float32")
    loaded = keras.models.load_model(path)
    assert distance(outputs_of(loaded, images)[0], outputs_of(model, images)[0]) < 1e-5


@pytest.mark.parametrize("kind", ["saved_model", "frozen", "checkpoint"])
def test_to_another_kind(kind, tmp_path):
    model = randomize(chain(FusedConvBN(5, 3, activation="relu"), layers.Conv2D(4, 1), norm()))
    path, report = fusedconvbn.fold(model, tmp_path / ("folded.pb" if kind == "frozen" else "folded"), to=kind)
    assert len(report.folded) == 2
    assert len(fusedconvbn.inspect(path).folded) == 0


@pytest.mark.parametrize("form", ["keras", "h5", "saved_model", "pb", "checkpoint"])
def test_every_form_of_mobilenet(form, tmp_path):
    model = application("MobileNetV2")
    file = FORMS[form](model, facts_of_model(model, keras_images(model, 2, seed=5)), tmp_path)
    _check_form(file, tmp_path, form)


def _check_form(file, folder, form):
    from test_fold_sources import ends, run_folded

    arguments = {} if file.kind == "keras" else ends(file)
    suffix = {"keras": ".keras", "h5": ".h5", "model": ".keras", "pb": ".pb", "pbtxt": ".pbtxt"}.get(form, "")
    path, report = fusedconvbn.fold(file.path, folder / f"folded{suffix}", **arguments)
    assert len(report.folded) == file.foldable
    assert len(report.kept) == file.batch_norms - file.foldable
    if file.kind == "keras":
        found = run_keras(keras.models.load_model(path, compile=False))(file.images)
    else:
        found = run_folded(file, path)
    for name, expected in file.expected.items():
        assert distance(found[name], expected) < 1e-4


APPLICATIONS = ["ResNet50", "EfficientNetB0", "DenseNet121", "Xception", "InceptionV3", "NASNetMobile"]


@pytest.mark.parametrize("name", APPLICATIONS)
def test_application(name, tmp_path):
    """In the form that is made fastest; test_application_in_every_form has the others."""
    model = application(name)
    file = FORMS["pb"](model, facts_of_model(model, keras_images(model, 2, seed=5)), tmp_path)
    _check_form(file, tmp_path, "pb")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["model", "keras", "h5", "saved_model", "pbtxt", "checkpoint"])
@pytest.mark.parametrize("name", APPLICATIONS)
def test_application_in_every_form(name, form, tmp_path):
    model = application(name)
    file = FORMS[form](model, facts_of_model(model, keras_images(model, 2, seed=5)), tmp_path)
    _check_form(file, tmp_path, form)
