"""`fold` on random Keras models: what it computes, tells and leaves, whatever the model."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from fold_random_keras import RandomModel, random_model
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import fusedconvbn

TOLERANCES = {"float64": 1e-9, "float32": 3e-4}

few = settings(max_examples=12, derandomize=True, deadline=None, database=None,
               suppress_health_check=[*HealthCheck])  # fmt: skip
many = settings(few, max_examples=400)


def drawn(data: st.DataObject, steps: int = 8) -> RandomModel:
    """A model, which is told of where it fails."""
    made = random_model(data.draw, steps)
    note(repr(made))
    return made


def outputs(model: keras.Model, images: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(x) for x in keras.tree.flatten(model(images, training=False))]


def difference(expected: np.ndarray, found: np.ndarray) -> float:
    """Relative to the maximum."""
    assert expected.shape == found.shape
    assert expected.dtype == found.dtype
    largest = np.abs(expected).max(initial=0)
    return float(np.abs(expected - found).max(initial=0) / max(largest, 1e-2))


def inputs(model: keras.Model) -> list[str]:
    """The names of its input layers."""
    return [layer.name for layer in model._flatten_layers() if isinstance(layer, keras.layers.InputLayer)]


def norms(model: keras.Model) -> list[str]:
    """The names of its batch norms."""
    kinds = (keras.layers.BatchNormalization, fusedconvbn.FusedConvBN)
    return sorted(layer.name for layer in model._flatten_layers() if isinstance(layer, kinds))


def check(made: RandomModel) -> None:
    """All properties, but for those of the comparison that `fold` itself makes."""
    weights = [value.copy() for value in made.model.get_weights()]
    config = made.model.to_json()
    expected = outputs(made.model, made.images)
    folded, report = fusedconvbn.fold(made.model, verify=False)
    assert made.model.to_json() == config
    assert all(np.array_equal(x, y) for x, y in zip(weights, made.model.get_weights(), strict=True))
    found = outputs(folded, made.images)
    for i, (x, y) in enumerate(zip(expected, found, strict=True)):
        assert difference(x, y) < TOLERANCES[str(made.images.dtype)], (i, str(report))
    assert type(folded) is type(made.model)
    assert inputs(folded) == inputs(made.model)
    assert len(report.folded) + len(report.kept) == made.batch_norms, str(report)
    assert len(norms(folded)) == len(report.kept), str(report)
    again, second = fusedconvbn.fold(folded, verify=False)
    assert not second.folded, str(second)
    assert norms(again) == norms(folded)
    assert all(np.array_equal(x, y) for x, y in zip(found, outputs(again, made.images)))


def check_verified(made: RandomModel) -> None:
    """What `fold` compares is equal too."""
    given_images = {tensor.name: made.images for tensor in made.model.inputs}
    _, report = fusedconvbn.fold(made.model, verify=given_images)
    assert report.verification.verdict in ("ok", "inconclusive")


@few
@given(st.data())
def test_model(data):
    check(drawn(data))


@settings(few, max_examples=5)
@given(st.data())
def test_model_verified(data):
    check_verified(drawn(data))


@pytest.mark.slow
@many
@given(st.data())
def test_model_slow(data):
    check(drawn(data, steps=12))


@pytest.mark.slow
@settings(many, max_examples=60)
@given(st.data())
def test_model_verified_slow(data):
    check_verified(drawn(data, steps=12))
