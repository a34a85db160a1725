"""The ops' kernels on a GPU, without TensorFlow: FUSEDCONVBN_GPU_BUNDLE is what tools/gpu_bundle.sh made elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import cuda_core
import op_harness
import pytest
from op_cuda_suite import *  # noqa: F403

from fusedconvbn import _load

if not cuda_core.has_gpu():
    pytest.skip("this machine has no GPU", allow_module_level=True)
if "FUSEDCONVBN_GPU_BUNDLE" not in os.environ:
    pytest.skip("FUSEDCONVBN_GPU_BUNDLE names no folder", allow_module_level=True)
pytest.importorskip("cupy")


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    bundle = Path(os.environ["FUSEDCONVBN_GPU_BUNDLE"])
    ops = op_harness.beside(tmp_path_factory.mktemp("ops"), bundle / "_ops.so", _load.CUDA_LIBRARY)
    framework, library = bundle / "libtensorflow_framework.so.2", bundle / "libkernel_harness.so"
    with op_harness.process(framework=framework, library=library, ops=ops, gpu=True) as process:
        yield process
