"""Networks of `keras.applications` before and after `fuse`, with statistics that fit their weights."""

import keras
import numpy as np
import pytest
from fuse_models import assert_same_model, policy, step
from keras import layers
from layer_peers import assert_close

from fusedconvbn import FusedConvBN
from fusedconvbn.fusing import fuse, unfuse

# name: (size of the images, chains, batch normalizations behind no convolution of its own)
NETWORKS = {
    "MobileNetV2": (64, 52, 0),
    "EfficientNetB0": (64, 49, 0),
    "ResNet50": (64, 53, 0),
    "DenseNet121": (64, 59, 62),
    "Xception": (75, 6, 34),
    "InceptionV3": (75, 94, 0),
    "NASNetMobile": (224, 28, 164),
}
IN_EVERY_RUN = ("MobileNetV2", "EfficientNetB0")
slow_but = [pytest.param(name, marks=[] if name in IN_EVERY_RUN else pytest.mark.slow) for name in NETWORKS]


def network(name: str, dtype: str = "float32") -> tuple[keras.Model, np.ndarray]:
    """A network of random weights, and images."""
    keras.utils.set_random_seed(0)
    size = NETWORKS[name][0]
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None
    )
    scale = 64.0 if name == "EfficientNetB0" else 1.0  # it divides by 255
    images = np.random.default_rng(1).normal(0.0, scale, (4, size, size, 3)).astype(dtype)
    calibrate(model, images)
    return model, images


def calibrate(model: keras.Model, images: np.ndarray) -> None:
    """Statistics near those of a batch, so that outputs depend on inputs however deep the network is."""
    rng = np.random.default_rng(2)
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    model(images, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        variance = layer.moving_variance.numpy()
        layer.moving_variance.assign(variance * rng.uniform(0.8, 1.2, variance.shape))
        layer.moving_mean.assign_add(np.sqrt(variance) * rng.normal(0.0, 0.1, variance.shape))
        layer.beta.assign_add(rng.normal(0.0, 0.1, variance.shape))


@pytest.mark.parametrize("name", slow_but)
def test_inference_and_round_trip(name, tmp_path):
    stock, images = network(name)
    report = []
    fused = fuse(stock, report=report)
    chains, kept = NETWORKS[name][1:]
    assert sum(isinstance(layer, FusedConvBN) for layer in fused.layers) == chains
    assert [entry.into is None for entry in report].count(True) == kept
    expected = stock(images, training=False)
    assert np.ptp(expected, axis=0).min() > 1e-2 * np.abs(expected).max()  # the images are told apart
    assert_close(fused(images, training=False), expected, 1e-4)
    assert_same_model(unfuse(fused), stock)
    fused.save(tmp_path / "fused.keras")
    loaded = keras.models.load_model(tmp_path / "fused.keras")
    np.testing.assert_array_equal(loaded(images, training=False), fused(images, training=False))
    assert_same_model(unfuse(loaded), stock)


@pytest.mark.parametrize("name", ["MobileNetV2", pytest.param("ResNet50", marks=pytest.mark.slow)])
def test_training_step(name):
    """In double precision: some gradients, such as of a beta before another batch norm, are sums that cancel."""
    with policy("float64"):
        stock, images = network(name, "float64")
    fused = fuse(stock)
    before = stock.get_weights()
    (ours, our_loss), (theirs, their_loss) = step(fused, [images]), step(stock, [images])
    assert_close(ours, theirs, 1e-10, "outputs")
    assert_close(our_loss, their_loss, 1e-10, "loss")
    changes = [weight.numpy() - old for weight, old in zip(stock.weights, before, strict=True)]
    scale = np.median([np.abs(change).max() for change in changes])
    for weight, change, old, new in zip(stock.weights, changes, before, unfuse(fused).get_weights(), strict=True):
        np.testing.assert_allclose(new - old, change, rtol=1e-6, atol=1e-8 * scale, err_msg=weight.path)
