"""Under tf.distribute: against Keras's layers, and synchronized statistics against one replica with the whole batch."""

import json

import numpy as np
import pytest
from processes import run_python


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Computed in a process of its own: logical devices must be there before TensorFlow starts."""
    path = tmp_path_factory.mktemp("distribution") / "results.json"
    run_python("import sys, layer_distribution; layer_distribution.main(sys.argv[1])", path)
    return json.loads(path.read_text())


@pytest.mark.parametrize("synchronized", ["False", "True"])
def test_fit_on_two_replicas_against_keras(results, synchronized):
    ours, theirs = results["fits"][synchronized]
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-5)
    for mine, expected in zip(ours["weights"], theirs["weights"], strict=True):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_synchronization_makes_a_difference(results):
    separate, together = (results["fits"][key][0]["losses"] for key in ("False", "True"))
    assert not np.allclose(separate, together, rtol=1e-4)


def assert_same(results, call, name, tolerance):
    ours, single = (np.asarray(result[name]) for result in results["calls"][call])
    np.testing.assert_allclose(ours, single, rtol=0, atol=tolerance * np.abs(single).max())


@pytest.mark.parametrize("name", ["output", "gradient", "moving_mean", "moving_variance"])
@pytest.mark.parametrize("call", ["True", "False", "tensor True", "tensor False"])
def test_synchronized_replicas_compute_what_one_would(results, call, name):
    """Replicas have 7 and 3 images."""
    assert_same(results, call, name, 1e-5)


@pytest.mark.parametrize("name", ["output", "moving_mean", "moving_variance"])
def test_synchronized_statistics_under_a_large_mean(results, name):
    assert_same(results, "True large mean", name, 1e-4)
