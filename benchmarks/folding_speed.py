"""ResNet-50 as Keras exports it, and folded: both SavedModels loaded and called as a user does."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.paired import measure_pair
from benchmarks.process import Worker, library_environment


def speed_tables(
    folder: str, image: int, batches: Sequence[int], rounds: int, threads: Sequence[int], timeout: float
) -> list[dict[str, Any]]:
    """A row for each number of threads and each batch; each number of threads in a process of its own."""
    log = pathlib.Path(folder) / "speed.log"
    rows = []
    for count in threads:
        worker = Worker("benchmarks.folding_speed:Speed", (count,), log, timeout, fresh=library_environment(count))
        worker.wait()
        if not rows:
            worker.call("make", folder, image)
        rows += [{"threads": count, **worker.call("measure", folder, batch, rounds)} for batch in batches]
        worker.close()
    return rows


class Speed:
    """Writes the two SavedModels, and calls them."""

    def __init__(self, threads: int):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)

    def make(self, folder: str, image: int) -> None:
        import keras

        import fusedconvbn
        from benchmarks.folding_worker import tests_on_path

        tests_on_path()
        from fold_models import calibrate

        keras.utils.set_random_seed(0)
        model = keras.applications.ResNet50(weights=None, input_shape=(image, image, 3), classifier_activation=None)
        calibrate(model, seed=0, batch=8)
        original, folded = _paths(folder)
        model.export(original, verbose=False)
        fusedconvbn.fold(original, folded)

    def measure(self, folder: str, batch: int, rounds: int) -> dict[str, Any]:
        import tensorflow as tf

        from benchmarks.folding_worker import distance

        loaded = [tf.saved_model.load(path) for path in _paths(folder)]
        calls = [_call(each.signatures["serving_default"], batch) for each in loaded]
        before, after = (call() for call in calls)
        image = loaded[0].signatures["serving_default"].structured_input_signature[1].popitem()[1].shape[1]
        return {
            "model": "ResNet-50",
            "call": "serving_default",
            "image": image,
            "batch": batch,
            "error": distance(after, before),
            **measure_pair(*calls, rounds),
        }


def _paths(folder: str) -> tuple[str, str]:
    return str(pathlib.Path(folder) / "original"), str(pathlib.Path(folder) / "folded")


def _call(signature: Any, batch: int) -> Callable[[], np.ndarray]:
    """Calls it with random images."""
    import tensorflow as tf

    (name, spec), *others = signature.structured_input_signature[1].items()
    assert not others
    images = np.random.default_rng(0).normal(size=(batch, *spec.shape[1:])).astype("float32")
    feeds = {name: tf.constant(images)}
    (output,) = signature.structured_outputs
    return lambda: signature(**feeds)[output].numpy()
