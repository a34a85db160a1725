#!/bin/sh
# Builds, tests and sanitizes the CUDA kernels on a machine with a GPU: tools/gpu_check.sh [FOLDER]. It needs nvcc and,
# of Python, cmake, cupy, ml_dtypes, numpy, pybind11, pytest and scipy, to measure rich and torch; not TensorFlow. PYTHON
# says which Python, MEASURE what benchmarks.gpu is to measure, ARCHITECTURES what to compile for, STEPS which steps to
# run (build, tests, ops, measure, memcheck, racecheck, synccheck). A table comes last; what each step printed is in FOLDER
# (artifacts/gpu). Fails if a step does. With artifacts/gpu_bundle (tools/gpu_bundle.sh) the ops' registered kernels are
# tested, too. What is built lies in the package, without the TensorFlow ops: `make build` brings them back.

cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
FOLDER=${1:-artifacts/gpu}
SANITIZED='test_gradients_that_nobody_asks_for or test_the_same_bits_again' # some of each kind of problem
mkdir -p "$FOLDER" && : > "$FOLDER/table.txt" || exit 1
failed=0

step() { # step NAME COMMAND ..: runs it, and adds a line to the table
  name=$1 && shift
  case " ${STEPS:-$name} " in *" $name "*) ;; *) return ;; esac
  echo "== $name: $*"
  begin=$(date +%s)
  if "$@" > "$FOLDER/$name.log" 2>&1; then result=passed; else result=FAILED failed=1; fi
  last=$(grep -v '^$' "$FOLDER/$name.log" | tail -1 | cut -c1-80)
  printf '%-12s %-7s %4d s  %s\n' "$name" "$result" "$(($(date +%s) - begin))" "$last" >> "$FOLDER/table.txt"
}

sanitize() { # sanitize TOOL
  step "$1" compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$PYTHON" -m pytest -p no:cacheprovider tests/test_cuda_gpu.py -k "$SANITIZED"
}

export FUSEDCONVBN_CMAKE_ARGS="-DFUSEDCONVBN_TF=OFF -DFUSEDCONVBN_CUDA=AUTO \
  -DCMAKE_CUDA_ARCHITECTURES=${ARCHITECTURES:-native} $FUSEDCONVBN_CMAKE_ARGS"
step device nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
step build "$PYTHON" setup.py --quiet build_ext --inplace
step tests "$PYTHON" -m pytest -p no:cacheprovider tests/test_cuda_gpu.py
if [ -d artifacts/gpu_bundle ]; then
  gunzip -kf artifacts/gpu_bundle/*.gz
  export FUSEDCONVBN_GPU_BUNDLE="$PWD/artifacts/gpu_bundle"
  step ops "$PYTHON" -m pytest -p no:cacheprovider tests/test_op_cuda_gpu.py
fi
step measure "$PYTHON" -m benchmarks.gpu --json "$FOLDER/measured.json" ${MEASURE:---dtype float16}
sanitize memcheck
sanitize racecheck
sanitize synccheck
echo && cat "$FOLDER/table.txt"
exit $failed
