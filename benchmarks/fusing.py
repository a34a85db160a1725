"""`python -m benchmarks.fusing`: Keras models as they are and after fusedconvbn.fuse, in training and in inference.

Both models take turns in one process, with the same random images. The models are those of `keras.applications`, with
random weights and calibrated statistics (tests/fold_models.py).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks import machine
from benchmarks.options import positive
from benchmarks.paired import measure_pair, pair_table
from benchmarks.process import Worker, WorkerError, library_environment

EXIT_OK, EXIT_FAILED = 0, 1
MODELS = ("ResNet50", "MobileNetV2", "EfficientNetB0", "DenseNet121", "Xception", "InceptionV3", "NASNetMobile")
JIT = {"auto": "auto", "true": True, "false": False}
_TIMEOUT = 1800.0  # seconds that one model may take
_CLASSES = 10


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fusing",
        description="Times train_on_batch and predict_on_batch of Keras models before and after fusedconvbn.fuse. "
        "Exit code: 0, or 1 if a model failed, 2 for a wrong command line.",
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS[:1], help=f"(default: {MODELS[0]})")
    parser.add_argument("--image", type=positive, default=96, help="pixels (default: 96)")
    parser.add_argument("--batch", type=positive, default=16, help="(default: 16)")
    parser.add_argument("--rounds", type=positive, default=15, help="interleaved (default: 15)")
    parser.add_argument("--threads", type=positive, default=machine.cores(), help="(default: all cores)")
    parser.add_argument("--jit", choices=JIT, default="auto", help="compile()'s jit_compile of both (default: auto)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write everything measured")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json: its folder must exist. Received: {options.json}")
    found = machine.describe()
    try:
        rows = [row for name in options.model for row in _measure(name, options)]
    except WorkerError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return EXIT_FAILED
    if options.json:
        options.json.write_text(json.dumps({"rows": rows, "machine": found}, indent=1) + "\n", encoding="utf-8")
    print("\n".join([*pair_table(rows), machine.in_a_line(found)]))
    return EXIT_OK


def _measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Inference, then training, of one model in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder) / "worker.log"
        arguments = (name, options.image, options.batch, options.threads, JIT[options.jit])
        worker = Worker("benchmarks.fusing:Pair", arguments, log, _TIMEOUT, fresh=library_environment(options.threads))
        worker.wait()
        rows = [worker.call(call, options.rounds) for call in ("predict", "train")]
        worker.close()
    described = {"model": name, "image": options.image, "threads": options.threads, "batch": options.batch}
    return [{**described, **row} for row in rows]


class Pair:
    """A model and the fused one, compiled, and a batch for both."""

    def __init__(self, name: str, image: int, batch: int, threads: int, jit: bool | str):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        import keras

        import fusedconvbn
        from benchmarks.folding_worker import tests_on_path

        tests_on_path()
        from fold_models import calibrate

        keras.utils.set_random_seed(0)
        make = getattr(keras.applications, name)
        model = make(weights=None, input_shape=(image, image, 3), classes=_CLASSES, classifier_activation=None)
        calibrate(model, seed=0, batch=8)
        self._models = (model, fusedconvbn.fuse(model))
        for each in self._models:
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            each.compile(keras.optimizers.SGD(1e-3), loss, jit_compile=jit)
        rng = np.random.default_rng(0)
        self._images = rng.normal(size=(batch, image, image, 3)).astype("float32")
        self._labels = rng.integers(_CLASSES, size=batch)

    def predict(self, rounds: int) -> dict[str, Any]:
        """Their outputs compared, then times."""
        return self._row("predict_on_batch", rounds, self._images)

    def train(self, rounds: int) -> dict[str, Any]:
        """The losses of the first step compared, then times of steps."""
        return self._row("train_on_batch", rounds, self._images, self._labels)

    def _row(self, method: str, rounds: int, *batch: np.ndarray) -> dict[str, Any]:
        from benchmarks.folding_worker import distance

        before, after = (_on_batch(model, method, batch) for model in self._models)
        error = distance(after(), before())
        return {"call": method, "error": error, **measure_pair(before, after, rounds)}


def _on_batch(model: Any, method: str, batch: Sequence[np.ndarray]) -> Callable[[], np.ndarray]:
    call = getattr(model, method)
    return lambda: np.asarray(call(*batch))


if __name__ == "__main__":
    sys.exit(main())
