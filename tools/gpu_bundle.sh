#!/bin/sh
# Gathers what a machine with a GPU and without TensorFlow needs to run the ops' registered kernels:
# tools/gpu_bundle.sh [FOLDER] (artifacts/gpu_bundle), where TensorFlow is installed and `make build` has run. PYTHON says
# which Python. tools/gpu_check.sh uses the folder where it finds it.

cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
FOLDER=${1:-artifacts/gpu_bundle}
mkdir -p "$FOLDER" || exit 1
FOLDER=$(cd "$FOLDER" && pwd)

set -e
"$PYTHON" -m cmake --log-level=NOTICE -S . -B build/bundle -DPython_EXECUTABLE="$(command -v "$PYTHON")" \
  -DFUSEDCONVBN_TF=ON -DFUSEDCONVBN_CUDA=OFF -DFUSEDCONVBN_OUTPUT="$FOLDER"
"$PYTHON" -m cmake --build build/bundle --target kernel_harness
rm -f "$FOLDER/_build_info.py"
cp fusedconvbn/_ops.so "$FOLDER"
cp -L "$("$PYTHON" -c 'import tensorflow as tf; print(tf.sysconfig.get_lib())')/libtensorflow_framework.so.2" "$FOLDER"
strip "$FOLDER/libtensorflow_framework.so.2"
gzip -f "$FOLDER/libtensorflow_framework.so.2"
ls -l "$FOLDER"
