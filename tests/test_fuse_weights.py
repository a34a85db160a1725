"""`load_weights`: files of the model without FusedConvBN, read into the one with it."""

import h5py
import keras
import numpy as np
import pytest
from fuse_models import chain, conv, images_for, model_of, norm, outputs
from keras import layers

from fusedconvbn.fusing import fuse, load_weights, unfuse


def body(x, filters=6):
    y = layers.ReLU()(layers.Add()([x, chain(x, name="1")]))
    y = norm("b2")(layers.DepthwiseConv2D(3, depth_multiplier=2, name="c2")(y))
    return layers.Dense(3)(chain(layers.Dropout(0.5)(y), layers.ReLU(), name="3", filters=filters))


def legacy_file(model: keras.Model, path) -> None:
    """As Keras 2 wrote weights: a group for each layer, with their order in attributes."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name for layer in model.layers]
        for layer in model.layers:
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = [weight.path for weight in layer.weights]
            for weight in layer.weights:
                group[weight.path] = weight.numpy()


@pytest.fixture
def stock():
    return model_of(body)


@pytest.fixture
def fused():
    return fuse(model_of(body, seed=5))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
def test_values_are_those_of_the_file(stock, fused, tmp_path, suffix, compiled):
    file = tmp_path / f"model{suffix}"
    if compiled:
        stock.compile("adam", "mse", metrics=["mae"])
    stock.save_weights(file) if suffix == ".weights.h5" else legacy_file(stock, file)
    load_weights(fused, file)
    for ours, theirs in zip(unfuse(fused).get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    images = images_for(stock)
    np.testing.assert_array_equal(outputs(fused, images), outputs(fuse(stock), images))


def test_nested_models(tmp_path):
    def nested(x):
        y = keras.Input(x.shape[1:])
        return layers.Dense(2)(keras.Model(y, body(y), name="sub")(x))

    stock, fused = model_of(nested), fuse(model_of(nested, seed=5))
    stock.save_weights(tmp_path / "model.weights.h5")
    load_weights(fused, str(tmp_path / "model.weights.h5"))
    for ours, theirs in zip(unfuse(fused).get_weights(), stock.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:Skipping nested container")
@pytest.mark.parametrize("other", [
    lambda x: chain(body(x), name="4"),  # more layers
    lambda x: chain(x, name="1"),  # fewer
    lambda x: body(x, filters=8),  # other shapes
    lambda x: layers.Dense(3)(chain(norm("b2")(conv("c2")(x)))),  # another kind
])  # fmt: skip
@pytest.mark.parametrize("suffix", [".weights.h5", ".h5"])
def test_a_file_of_another_model_changes_nothing(fused, tmp_path, other, suffix):
    model, file = model_of(other), tmp_path / f"other{suffix}"
    model.save_weights(file) if suffix == ".weights.h5" else legacy_file(model, file)
    before = fused.get_weights()
    with pytest.raises(ValueError, match=r"(?s)`file` must hold the weights .*`unfuse\(fused\)`.*Received: file='"):
        load_weights(fused, file)
    for ours, old in zip(fused.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, old)


def test_bad_files(fused, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"`file` must be an existing file\. Received: file='.*none.weights.h5'"
    ):
        load_weights(fused, tmp_path / "none.weights.h5")
    with pytest.raises(ValueError, match=r"`file` must be one that ends in \.weights\.h5, .*Received: file='"):
        load_weights(fused, "model.ckpt")
    with pytest.raises(TypeError, match=r"`file` must be a path\. Received: file=3"):
        load_weights(fused, 3)
    with pytest.raises(TypeError, match="`fused` must be a Keras model"):
        load_weights("model", __file__)
    (tmp_path / "text.weights.h5").write_text("no HDF5")
    with pytest.raises(ValueError, match="`file` must hold the weights"):
        load_weights(fused, tmp_path / "text.weights.h5")
