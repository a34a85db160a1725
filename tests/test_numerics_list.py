"""What every kernel must hold numerically, an entry a test, for each row of the dispatch table that can run it.

| entry | test |
|---|---|
| variance error at mean / std in {0, 10, 1e2, 1e3, 1e4} at most 3 times stock's | `test_variance_under_a_large_mean` |
| the output under a large mean; the variance of many pixels | `test_output_under_..`, `test_variance_of_a_million_..` |
| an outlier as first row; one huge outlier | `test_variance_with_an_outlier` |
| a constant channel | `test_constant_channel` |
| one element a channel | `test_one_element_a_channel` |
| identities: sum dz = 0, sum dz xhat = 0 | `test_gradient_of_z_is_orthogonal_to_ones_and_to_xhat` |
| odd sizes, partial tiles, asymmetric SAME padding, channels no multiple of 16 or 32 | `test_partial_tiles` |
| unaligned inputs | `test_arrays_one_element_off_alignment` |
| non-finite inputs: the mask of the formula, by transforms whole tiles | `test_non_finite_inputs`, `.._channel_..` |
| non-finite gradients | test_numerics_gradients.py |
| relu(NaN) and all other activations of non-finite numbers as TensorFlow | test_numerics.py |
| the same bits whatever the thread count | test_determinism_raw.py |
| an empty batch | test_fuzz.py, whose draws hold some |
"""

from dataclasses import replace
from functools import cache, lru_cache

import ml_dtypes
import numpy as np
import pytest
from cases import Arrays, Case
from compare import Expected, assert_close
from copies import CHANNELS, SHAPE, copied, copying, copying_runs, inner, nhwc, sources
from fuzz import Run, runs
from raw_problem import Problem
from reference import BLOCK_ROWS

from fusedconvbn import raw

EPS = float(np.finfo(np.float32).eps)
SMALL = (2, 19, 23, CHANNELS)
EXACT = {"direct": 1, "winograd2": 1, "winograd4": 16}  # errors of z, in that of rounding, where pixels are all equal


def normal(mean: float = 0.0, shape=SHAPE) -> np.ndarray:
    return (np.random.default_rng(7).standard_normal(shape) + mean).astype(np.float32)


def variance_and_z(problem: Problem, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """The variance of the batch, which with momentum 0 is the new moving variance, and z."""
    attributes = {**problem.case.attributes, "momentum": 0.0, **run.forced}
    result = raw.forward(*problem.arguments, **attributes)
    return result.moving_variance, z_of(problem, result, run)


def z_of(problem: Problem, result: raw.ForwardResult, run: Run) -> np.ndarray:
    """z as it is stored or, where it is not, as it was copied."""
    z = nhwc(problem.case, result.conv_out) if run.saved == "conv" else copied(problem)
    return z.astype(np.float64)


def with_known_z(parameters: list) -> list:
    """Those whose z_of() is what the kernel computed: transforms round z, and where it is not stored nobody sees it."""
    runs_of = [(parameter, parameter.values[1]) for parameter in parameters]
    return [parameter for parameter, run in runs_of if run.saved == "conv" or run.transforms == "direct"]


def relative_variance_error(variance: np.ndarray, z: np.ndarray) -> float:
    exact = z.astype(np.float64).var(axis=(0, 1, 2))
    return float(np.max(np.abs(variance - exact) / exact))


@cache
def stock_variance_error(mean: float) -> float:
    tf = pytest.importorskip("tensorflow")
    z, ones = normal(mean), np.ones(CHANNELS, np.float32)
    count = z.size // CHANNELS
    stock = tf.compat.v1.nn.fused_batch_norm(z, ones, ones, is_training=True)[2].numpy() * (count - 1) / count
    return relative_variance_error(stock, z)


FORWARD = pytest.mark.parametrize(("case", "run"), copying_runs("forward"))
KNOWN_Z = pytest.mark.parametrize(("case", "run"), with_known_z(copying_runs("forward")))
BACKWARD = pytest.mark.parametrize(("case", "run"), copying_runs("backward", SMALL))


def for_one_pixel(mark: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Without the rows by moments on AMX, which take 16 pixels and more."""
    names, params = mark.args
    return pytest.mark.parametrize(names, [param for param in params if param.values[1].stores_z])


def test_every_kernel_can_copy():
    met = {name for mark in (FORWARD, BACKWARD) for param in mark.args[1] for name in param.values[1].planned}
    of_bfloat16 = ("_direct_amx", "_moments_amx", "_pairs_avx512_bf16")
    exact = {row.name for row in raw.kernels() if row.available and not row.name.endswith(of_bfloat16)}
    assert exact <= met


def under_means() -> list:
    """Numbers of a large mean that the type can tell apart: bfloat16 rounds those beyond 100 to one."""
    both = with_known_z([*copying_runs("forward"), *copying_runs("forward", data_format="NCHW")])
    return [
        pytest.param(*parameter.values, mean, id=f"{parameter.id}-{mean:g}")
        for parameter in both
        for mean in (0, 10, 1e2, 1e3, 1e4)
        if mean <= 100 or parameter.values[0].dtype != "bf16"
    ]


@pytest.mark.parametrize(("case", "run", "mean"), under_means())
def test_variance_under_a_large_mean(case, run, mean):
    """At most 3 times the error of stock batch normalization."""
    error = relative_variance_error(*variance_and_z(copying(case, normal(mean), run.transforms), run))
    assert error <= max(3 * stock_variance_error(mean), 4 * EPS)


@KNOWN_Z
def test_output_under_a_large_mean(case, run):
    """xhat errs by no more than the rounding of the mean: by eps mean / std."""
    problem = copying(case, normal(100 if case.dtype == "bf16" else 1e4), run.transforms)
    result, gamma = problem.run_forward(**run.forced), problem.arguments.gamma
    z = z_of(problem, result, run)
    xhat = (z - z.mean((0, 1, 2))) / np.sqrt(z.var((0, 1, 2)) + case.epsilon)
    error = np.abs(nhwc(case, result.output) - (gamma * xhat + problem.arguments.beta)) / np.abs(gamma)
    assert np.max(error) <= 2 * max(1e4 * EPS, 8 * float(ml_dtypes.finfo(case.numpy_dtype).eps))


@pytest.mark.parametrize(("case", "run"), with_known_z(copying_runs("forward", (20, 240, 209, 4))))
def test_variance_of_a_million_pixels(case, run):
    z = normal(3.0, (20, 240, 209, 4))
    assert relative_variance_error(*variance_and_z(copying(case, z, run.transforms), run)) <= 8 * EPS


@pytest.mark.parametrize(
    ("position", "size"), [(0, 1e2), (0, 1e4), (0, 1e15), (1, 1e8), (95, 1e4), (96, 1e15), (-1, 1e2), (-1, 1e8)]
)
@KNOWN_Z
def test_variance_with_an_outlier(case, run, position, size):
    """In the first row it would be the shift of a careless shifted sum. The others' squares, all alike, round alike."""
    z = normal()
    z.reshape(-1, CHANNELS)[position] = size
    error = relative_variance_error(*variance_and_z(copying(case, z, run.transforms), run))
    assert error <= BLOCK_ROWS / 2 * EPS


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 1e15])
@FORWARD
def test_constant_channel(case, run, value):
    """Its variance is 0 or next to it, its output beta, and other channels do not notice."""
    z = normal()
    z[..., 5] = value
    problem = copying(case, z, run.transforms)
    variance = variance_and_z(problem, run)[0]
    constant = variance[sources(case) == 5]
    assert ((constant >= 0) & (constant <= (EXACT[run.transforms] * EPS * value) ** 2)).all()
    if abs(value) < 1e4:  # else a bit of the mean is more than sqrt(epsilon)
        problem.check_forward(problem.run_forward(**run.forced))


@pytest.mark.parametrize("value", [0.0, -1234.567])
@BACKWARD
def test_gradient_of_a_constant_channel(case, run, value):
    problem = constant_channel(case, run.transforms, run.start, value)
    problem.check_backward(problem.run_backward(run.saved, **run.forced))


@lru_cache(maxsize=16)
def constant_channel(case: Case, algorithm: str, start: str, value: float) -> Problem:
    z = normal(shape=SMALL)
    z[..., 5] = value
    return copying(case, z, algorithm, start)


@pytest.mark.parametrize("unbiased", [False, True])
@for_one_pixel(FORWARD)
def test_one_element_a_channel(case, run, unbiased):
    problem = single(case, run, unbiased)
    result = problem.run_forward(**run.forced)
    np.testing.assert_array_equal(result.output.ravel(), problem.arguments.beta.astype(case.numpy_dtype))
    problem.check_forward(result)


@pytest.mark.parametrize("unbiased", [False, True])
@for_one_pixel(BACKWARD)
def test_gradient_of_one_element_a_channel(case, run, unbiased):
    problem = single(case, run, unbiased)
    problem.check_backward(problem.run_backward(run.saved, **run.forced))


def single(case: Case, run: Run, unbiased: bool) -> Problem:
    one = replace(case, batch=1, height=case.kernel[0], width=case.kernel[1], unbiased=unbiased)
    return copying(one, normal(shape=(1, 1, 1, CHANNELS)), run.transforms, run.start)


@pytest.mark.parametrize("mean", [0, 100])
@pytest.mark.parametrize(
    ("case", "run"),
    [run for a in (None, "relu", "silu") for run in copying_runs("backward", SMALL, epsilon=0.0, activation=a)],
)
def test_gradient_of_z_is_orthogonal_to_ones_and_to_xhat(case, run, mean):
    """With epsilon 0 a shift and a scale of z change nothing. The gradient by a channel is that of all its copies."""
    problem = with_mean(case, run.transforms, run.start, mean)
    copies = np.eye(CHANNELS)[sources(case)]
    dz = inner(case, nhwc(case, problem.run_backward(run.saved, **run.forced).inputs).astype(np.float64))
    x = inner(case, nhwc(case, problem.arguments.inputs).astype(np.float64))
    xhat = (x - x.mean((0, 1, 2))) / x.std((0, 1, 2))
    dy = nhwc(case, problem.upstream[0]).astype(np.float64)
    size = (np.abs(problem.arguments.gamma) * np.abs(dy)).sum((0, 1, 2)) @ copies
    bound = 4 * float(ml_dtypes.finfo(case.numpy_dtype).eps) * (1 + mean) * size
    assert np.abs(dz).max() > 0.1
    assert np.all(np.abs(dz.sum((0, 1, 2))) <= bound)
    if run.saved == "bfloat16":  # of xhat as it was rounded; each rounds for itself
        bound = 4 * 2**-8 * np.sqrt(((problem.arguments.gamma * dy) ** 2).sum((0, 1, 2)) @ copies)
    assert np.all(np.abs((dz * xhat).sum((0, 1, 2))) <= bound)


@lru_cache(maxsize=16)
def with_mean(case: Case, algorithm: str, start: str, mean: float) -> Problem:
    """Without gradients of the moving statistics, which are not orthogonal to z."""
    problem = copying(case, normal(mean, SMALL), algorithm, start)
    problem.upstream = (problem.upstream[0], *np.zeros((2, case.out_channels), np.float32))
    return problem


ODD = Case(height=14, width=38, in_channels=33, out_channels=47, residual=True, training=True, activation="gelu")
PARTIAL = [
    replace(ODD, height=26, width=58, strides=(2, 2)),  # SAME pads behind only
    replace(ODD, height=13, width=29, padding=((0, 2), (1, 0))),
    replace(ODD, kernel=(1, 1), in_channels=31, out_channels=97, height=1, width=97),
    replace(ODD, in_channels=33, out_channels=33, groups=33, strides=(2, 2)),
    replace(ODD, in_channels=17, out_channels=51, groups=17, kernel=(5, 4)),
]
PARTIAL = [replace(case, data_format=f) for case in PARTIAL for f in ("NHWC", "NCHW")]
PARTIAL += [replace(case, dtype="bf16") for case in PARTIAL]


def each(cases: list[Case]) -> list:
    return [
        pytest.param(case, run, id=f"{case}-{run.direction}-{run.kernel}-{run.save}-{run.saved}")
        for case in cases
        for run in runs(case)
    ]


@pytest.mark.parametrize(("case", "run"), each(PARTIAL))
def test_partial_tiles(case, run):
    """Odd sizes and channels that fill no vector and no tile, padded on one side more than on the other."""
    problem = Problem(replace(case, algorithm=run.transforms), start=run.start)
    if run.direction == "forward":
        problem.check_forward(problem.run_forward(**run.forced))
    else:
        problem.check_backward(problem.run_backward(run.saved, **run.forced))


def shifted(array: np.ndarray | None) -> np.ndarray | None:
    """A copy that begins one element behind an address that is a multiple of 64."""
    if array is None:
        return None
    memory = np.empty(array.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + array.itemsize
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    assert copy.ctypes.data % 64 == array.itemsize
    return copy


@pytest.mark.parametrize(("case", "run"), each([*PARTIAL[:10:2], *PARTIAL[10::2], replace(PARTIAL[2], dtype="f64")]))
def test_arrays_one_element_off_alignment(case, run):
    """The same bits, wherever the arguments begin."""
    problem = Problem(replace(case, algorithm=run.transforms))
    moved = Problem(problem.case, Arrays(*map(shifted, problem.arguments)))
    moved.saved = {name: shifted(array) for name, array in problem.saved.items()}
    moved.upstream = tuple(map(shifted, problem.upstream))
    results = (
        p.run_forward(**run.forced) if run.direction == "forward" else p.run_backward(run.saved, **run.forced)
        for p in (problem, moved)
    )  # fmt: skip
    for aligned, unaligned in zip(*results, strict=True):
        assert (aligned is None) == (unaligned is None)
        assert aligned is None or aligned.tobytes() == unaligned.tobytes()


NON_FINITE = [
    Case(batch=2, height=9, width=11, in_channels=5, out_channels=19),
    Case(batch=2, height=9, width=11, in_channels=5, out_channels=40, kernel=(1, 1)),
    Case(batch=2, height=9, width=11, in_channels=5, out_channels=72),
    Case(batch=2, height=9, width=11, in_channels=5, out_channels=64, kernel=(1, 1), residual=True),
    Case(batch=2, height=9, width=11, in_channels=19, out_channels=19, groups=19),
    Case(batch=2, height=9, width=11, in_channels=5, out_channels=10, groups=5, strides=(2, 1)),
]
NON_FINITE = [replace(case, dtype=dtype, activation="relu") for case in NON_FINITE for dtype in ("f32", "bf16", "f64")]


@pytest.mark.parametrize(("case", "run"), [p for p in each(NON_FINITE) if p.values[1].direction == "forward"])
def test_non_finite_inputs(case, run):
    """NaN and infinities come out exactly where the formula says so; what transforms lose besides is whole tiles."""
    finite = Problem(replace(case, algorithm=run.transforms))
    inputs = finite.arguments.inputs.copy()
    inputs[0, 0, 0, 0], inputs[0, 4, 5, 1], inputs[1, 8, 10, 4], inputs[1, 4, 4, 2] = np.nan, np.inf, -np.inf, np.nan
    problem = Problem(finite.case, replace(finite.arguments, inputs=inputs))
    with np.errstate(all="ignore"):
        result, formula = problem.run_forward(**run.forced), problem.forward.output.value
        if run.transforms == "direct":
            return problem.check_forward(result)
    output = result.output.astype(np.float64)
    assert np.isnan(output[np.isnan(formula)]).all()
    assert not np.isfinite(output[np.isinf(formula)]).any()
    kept = ~tiles_that_read(~np.isfinite(inputs.astype(np.float64)).all(-1), int(run.transforms[-1]))
    expected = finite.forward.output
    assert_close(output[kept], Expected(expected.value[kept], expected.tolerance[kept]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@FORWARD
def test_non_finite_channel_in_training(case, run, bad):
    """It makes the statistics of its own channel non-finite, and of no other; a dense z mixes channels (0 * NaN)."""
    z = normal()
    z[1, 3, 5, 7] = bad
    result = copying(replace(case, activation="relu"), z, run.transforms).run_forward(**run.forced)
    lost = sources(case) == 7 if case.groups > 1 else np.full(case.out_channels, True)
    np.testing.assert_array_equal(~np.isfinite(result.batch_mean), lost)
    np.testing.assert_array_equal(np.isnan(result.moving_variance), lost)
    assert np.isnan(result.output[..., lost].astype(np.float32)).all()
    assert np.isfinite(result.output[..., ~lost].astype(np.float32)).all()


def tiles_that_read(bad: np.ndarray, size: int) -> np.ndarray:
    """The tiles of an output [N,H,W] that read one of the marked pixels, by 3x3 filters and SAME padding."""
    lost = np.zeros_like(bad)
    for n, h, w in np.argwhere(bad):
        rows, columns = (slice(max(0, (at - 1) // size * size), (at + 1) // size * size + size) for at in (h, w))
        lost[n, rows, columns] = True  # tile t reads pixels size t - 1 to size t + size
    return lost
