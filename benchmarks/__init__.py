"""Timings of `fusedconvbn` against stock TensorFlow, results checked first: `python -m benchmarks.run --help`."""
