"""`save="bfloat16"`: z - mean rounded to bfloat16 for backward; what it costs the gradients, and nothing else."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from cases import ACTIVATIONS, Case, op_cases
from copies import CHANNELS, case_of, copied, copying
from raw_problem import Problem, centered, planned
from reference import ACTIVATIONS as FORMULAS

from fusedconvbn import raw

SAVED = ("output", "batch_mean", "inv_std", "conv_out")
JUMPS = [name for name in ACTIVATIONS if FORMULAS[name].kinks]
ISAS = list(dict.fromkeys(row.isa for row in raw.kernels() if row.available and row.isa != "amx"))


def gradients(problem: Problem, forward: raw.ForwardResult, **options) -> raw.BackwardResult:
    return raw.backward(
        problem.upstream[0], *problem.arguments, **{name: getattr(forward, name) for name in SAVED},
        moving_mean_gradient=problem.upstream[1], moving_variance_gradient=problem.upstream[2],
        **problem.case.attributes, **options,
    )  # fmt: skip


def normal(mean: float = 0.0, shape=(2, 19, 23, CHANNELS)) -> np.ndarray:
    return (np.random.default_rng(7).standard_normal(shape) + mean).astype(np.float32)


def with_constant_channel() -> np.ndarray:
    z = normal()
    z[..., 5] = -12.34
    return z


def with_outlier(size: float) -> np.ndarray:
    z = normal()
    z[0, 0, 0] = size
    return z


DATA = {
    "normal": normal(), "mean": normal(1e3), "constant": with_constant_channel(), "outlier": with_outlier(1e4),
    "huge outlier": with_outlier(-1e15),
}  # fmt: skip


def size_of_gamma_terms(problem: Problem) -> np.ndarray:
    """The root of the sum of the squares of du * xhat."""
    given, case = problem.arguments, problem.case
    z = copied(problem).astype(np.float64)
    xhat = (z - z.mean((0, 1, 2))) / np.sqrt(z.var((0, 1, 2)) + case.epsilon)
    u = given.gamma * xhat + given.beta + (0 if given.residual is None else given.residual)
    return np.linalg.norm(problem.upstream[0] * FORMULAS[case.activation].slope(u) * xhat)


@pytest.mark.parametrize(
    ("activation", "residual"), [*((name, False) for name in ACTIVATIONS), ("relu", True), ("silu", True)]
)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", ["pointwise", "dense", "depthwise"])
def test_gradients_err_by_less_than_the_unit_of_bfloat16(kind, data, activation, residual):
    """Against float64 from the formulas: by 2^-8 of their size; of gamma's, which its terms may nearly cancel, by 2^-8
    of the size that it would have of independent terms.
    """
    case = case_of(kind, DATA[data].shape, activation=activation, residual=residual)
    problem = copying(case, DATA[data], "direct", start="again")
    forward = problem.run_forward(save="bfloat16")
    assert forward.conv_out.shape == ((forward.output.size + 1) // 2,)
    for name, ours, exact in zip(raw.BackwardResult._fields, gradients(problem, forward), problem.backward):
        if exact is not None:
            size = size_of_gamma_terms(problem) if name == "gamma" else np.linalg.norm(exact.value)
            assert np.linalg.norm(ours.astype(np.float64) - exact.value) <= 2**-8 * size, name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("activation", JUMPS)
def test_no_number_crosses_a_jump_of_the_derivative(activation, data_format, isa):
    """Were all rounded to the nearest, the derivative of many would be that of the other side, and err by its jump."""
    kink = FORMULAS[activation].kinks[-1]
    z = normal(shape=(2, 89, 97, CHANNELS))
    case = case_of("pointwise", z.shape, activation=activation, data_format=data_format)
    problem = copying(case, z, "direct")
    arguments = replace(
        problem.arguments, gamma=np.ones(CHANNELS, np.float32), beta=np.full(CHANNELS, kink + 1, np.float32)
    )
    problem = Problem(problem.case, arguments)
    forward = problem.run_forward(save="bfloat16", isa=isa)
    exact = (z - forward.batch_mean).astype(np.float64)
    kept = centered(case, forward.conv_out)

    def side(number: np.ndarray) -> np.ndarray:
        return number * forward.inv_std + kink + 1 > kink

    assert np.array_equal(side(kept), side(exact))
    assert (side(exact.astype(ml_dtypes.bfloat16).astype(np.float64)) != side(exact)).sum() > 20


CASES = [case for case in op_cases() if case.training][::5]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_changes_no_result_of_forward(case):
    problem = Problem(case)
    for name, rounding, saving in zip(
        raw.ForwardResult._fields, problem.run_forward(save="bfloat16"), problem.run_forward()
    ):
        if name != "conv_out" or case.dtype != "f32":
            np.testing.assert_array_equal(rounding, saving, name)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f64"])
def test_other_types_are_saved_as_they_are(dtype):
    case = Case(dtype=dtype, training=True)
    assert planned(case, "forward", save="bfloat16").saved == "conv"
    assert planned(case, "forward", save="bfloat16").conv_out_shape == list(case.output_shape)
    assert planned(replace(case, training=False), "forward", save="bfloat16").saved == "nothing"
    with pytest.raises(ValueError, match="conv_out must be"):
        planned(case, "backward", saved="bfloat16")


def test_moments_are_saved_where_they_serve():
    case = Case(batch=4, height=56, width=56, in_channels=64, out_channels=256, kernel=(1, 1), training=True)
    assert planned(case, "forward", save="bfloat16").saved == "moments"
    assert planned(replace(case, in_channels=256), "forward", save="bfloat16").saved == "bfloat16"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    z = normal()
    z[1, 3, 5, 7] = bad
    problem = copying(case_of("depthwise", z.shape, activation="relu"), z, "direct")
    kept = centered(problem.case, problem.run_forward(save="bfloat16").conv_out)
    assert np.isfinite(np.delete(kept, 7, -1)).all()
    assert not np.isfinite(kept[..., 7]).any()


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_same_bits_for_any_threads(threads):
    case = Case(batch=3, height=29, width=31, in_channels=17, out_channels=43, training=True, activation="relu")
    problem = Problem(case)
    alone = problem.run_forward(save="bfloat16")
    shared = problem.run_forward(save="bfloat16", threads=threads)
    pairs = [*zip(alone, shared), *zip(gradients(problem, alone), gradients(problem, shared, threads=threads))]
    assert all(one is other is None or one.tobytes() == other.tobytes() for one, other in pairs)
