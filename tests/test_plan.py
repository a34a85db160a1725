"""Plans and output shapes: pure, printable, forced by arguments and environment variables, right at any size."""

import os
import subprocess
import sys

import numpy as np
import pytest
from cases import op_cases

from fusedconvbn import raw

SHAPE, FILTERS = (2, 9, 9, 16), (3, 3, 16, 32)
HUGE = 2**40


def plan(**options):
    return raw.plan(SHAPE, FILTERS, **options)


def test_is_printable():
    text = str(plan(isa="generic", algorithm="direct"))
    assert "forward_direct_generic" in text
    assert f"workspace {plan(isa='generic', algorithm='direct').workspace_bytes} bytes" in text
    assert text.splitlines()[0] in repr(plan(isa="generic", algorithm="direct"))


def compared(planned):
    return {stage: list(estimates) for stage, estimates in planned.estimates}


@pytest.mark.parametrize("inputs", [(1, 14, 14, 64), (4, 7, 7, 256), (2, 28, 28, 16), (1, 2, 2, 32)], ids=str)
@pytest.mark.parametrize("outputs", [16, 64, 320])
def test_takes_what_it_estimates_to_be_the_fastest(inputs, outputs):
    for direction in ("forward", "backward"):
        shapes = inputs, (3, 3, inputs[3], outputs)
        planned = raw.plan(*shapes, padding="SAME", training=True, direction=direction, isa="avx2")
        taken = dict(name.split("_")[:2] for name in planned.kernels)
        assert {"direct", "winograd2", "winograd4"} == {name for names in compared(planned).values() for name in names}
        assert {stage: names[0] for stage, names in compared(planned).items()}.items() <= taken.items()
        for stage, estimates in planned.estimates:
            assert list(estimates.values()) == sorted(estimates.values())
            assert min(estimates.values()) > 0
            text = ", ".join(f"{name} {microseconds:.1f} us" for name, microseconds in estimates.items())
            assert f"\n  {stage}, estimated on one thread: {text}" in str(planned)


def test_estimates_only_what_competes():
    assert raw.plan((1, 14, 14, 32), (3, 3, 1, 32), padding="SAME").estimates == []  # depthwise
    assert raw.plan((1, 14, 14, 3), (7, 7, 3, 32), isa="avx2").estimates == []  # few channels
    assert raw.plan((1, 14, 14, 64), (1, 1, 64, 64), isa="avx2").estimates == []
    assert raw.plan((1, 14, 14, 64), (3, 3, 64, 64), isa="avx2", strides=2).estimates == []


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("training", [False, True])
def test_is_a_function_of_its_arguments(direction, training):
    first, second = (plan(direction=direction, training=training) for _ in range(2))
    assert (first.kernels, first.workspace_bytes, str(first)) == (second.kernels, second.workspace_bytes, str(second))
    assert plan(direction=direction, training=training, threads=8).kernels == first.kernels


@pytest.mark.parametrize(
    ("pixels", "channels", "threads", "useful"),
    [(1, 8, 64, 1), (49, 32, 2, 1), (196, 256, 2, 2), (3136, 64, 2, 2), (3136, 64, 1, 1), (0, 64, 8, 1)],
)
def test_threads_that_are_of_use(pixels, channels, threads, useful):
    """None is woken for what is done before it has begun."""
    for direction in ("forward", "backward"):
        planned = raw.plan((1, pixels, 1, channels), (1, 1, channels, channels), threads=threads, direction=direction)
        assert planned.useful_threads == useful


def test_large_problems_keep_many_threads_busy():
    planned = raw.plan((64, 56, 56, 64), (3, 3, 64, 64), padding="SAME", threads=200)
    assert planned.useful_threads == 200
    huge = raw.plan((2**20, 2**10, 2**10, 1), (1, 1, 1, 1), threads=1024)
    assert huge.useful_threads == 1024


def test_stages():
    assert [name.split("_")[0] for name in plan().kernels] == ["forward"]
    assert [name.split("_")[0] for name in plan(direction="backward", training=True).kernels] == [
        "reduce", "dgrad", "wgrad",
    ]  # fmt: skip
    assert plan(direction="backward").kernels[0].startswith("forward_")  # z is not saved in inference


PAYS = ((2, 28, 28, 64), (3, 3, 64, 96), {"padding": "SAME"})


@pytest.mark.parametrize(
    ("inputs", "filters", "attributes", "expected"),
    [
        (*PAYS, "winograd4"),
        (*PAYS[:2], {"padding": "SAME", "algorithm": "winograd2"}, "winograd2"),
        (*PAYS[:2], {"padding": "SAME", "algorithm": "winograd4"}, "winograd4"),
        (*PAYS[:2], {"padding": "SAME", "algorithm": "direct"}, "direct"),
        (*PAYS[:2], {"padding": "SAME", "dtype": "bfloat16"}, "winograd4"),
        (*PAYS[:2], {"padding": "SAME", "strides": (1, 2)}, "direct"),
        (*PAYS[:2], {"padding": "SAME", "dilations": 2}, "direct"),
        ((2, 14, 14, 64), (3, 3, 32, 40), {"padding": "SAME"}, "direct"),  # two groups
        ((2, 14, 14, 32), (3, 1, 32, 40), {"padding": "SAME"}, "direct"),
        ((2, 14, 14, 32), (5, 5, 32, 40), {"padding": "SAME"}, "direct"),
        ((2, 14, 14, 40), (3, 3, 40, 15), {"padding": "SAME"}, "direct"),  # too few channels for it to pay
        ((2, 14, 14, 3), (3, 3, 3, 40), {"padding": "SAME", "algorithm": "winograd2"}, "winograd2"),
        ((1, 2, 2, 64), (3, 3, 64, 64), {"padding": "SAME"}, "direct"),  # too few pixels
        ((32, 2, 2, 64), (3, 3, 64, 64), {"padding": "SAME"}, "winograd2"),  # most of 4x4 tiles would be empty
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_algorithm(inputs, filters, attributes, expected, direction):
    kernels = raw.plan(inputs, filters, training=True, direction=direction, isa="generic", **attributes).kernels
    algorithms = {name.split("_")[0]: name.split("_")[1] for name in kernels}
    gradients = {"reduce": "direct", "dgrad": expected, "wgrad": expected}
    wanted = {"forward": expected} if direction == "forward" else gradients
    assert algorithms.items() >= wanted.items()


@pytest.mark.parametrize(
    ("inputs", "filters", "stage", "expected"),
    [
        ((1, 7, 7, 256), (3, 3, 256, 768), "dgrad", "direct"),  # filters beyond L2, for few windows
        ((1, 7, 7, 512), (3, 3, 512, 512), "dgrad", "direct"),
        ((1, 14, 14, 64), (3, 3, 64, 256), "dgrad", "winograd4"),
        ((4, 14, 14, 256), (3, 3, 256, 64), "dgrad", "winograd4"),
        ((16, 21, 21, 16), (3, 3, 16, 48), "dgrad", "winograd4"),  # panels of 16 columns waste as many in gradients
        ((4, 6, 6, 256), (3, 3, 256, 256), "wgrad", "winograd2"),  # no windows of two outputs there
        ((4, 14, 14, 832), (3, 3, 832, 16), "forward", "direct"),  # less elsewhere: half of Winograd's panel is empty
        ((4, 14, 14, 832), (3, 3, 832, 32), "forward", "winograd2"),
        ((1, 7, 7, 1024), (3, 3, 1024, 512), "forward", "direct"),  # reads the filters where they lie
    ],
)
def test_choice_by_size(inputs, filters, stage, expected):
    direction = "forward" if stage == "forward" else "backward"
    kernels = raw.plan(inputs, filters, padding="SAME", direction=direction, training=True, isa="generic").kernels
    assert f"{stage}_{expected}_generic" in kernels


AMX = pytest.mark.isa("amx")


@AMX
@pytest.mark.parametrize(
    ("pixels", "channels", "outputs", "expected"),
    [
        (3136, 256, 256, True),  # products limit
        (3136, 256, 16, False),  # half of each tile would be empty
        (3136, 16, 256, False),
        (441, 512, 512, True),
        (196, 1024, 256, False),  # filters that networks keep beyond L2, for few pixels
        (196, 128, 256, True),
        (49, 2048, 512, False),
        (784, 2048, 512, False),  # a block of windows leaves no room in L2
    ],
)
def test_inference_in_thirds(pixels, channels, outputs, expected):
    planned = raw.plan((1, pixels, 1, channels), (1, 1, channels, outputs))
    assert ("thirds" in planned.kernels[0]) == expected
    assert compared(planned)["forward"][0] == ("thirds" if expected else "direct")


@AMX
@pytest.mark.parametrize(
    ("pixels", "channels", "residual", "expected"),
    [(50176, 64, False, True), (50176, 64, True, False), (3136, 64, True, True), (50176, 128, True, True)],
)
def test_residuals_from_memory_need_depth_to_hide_behind(pixels, channels, residual, expected):
    [kernel] = raw.plan((1, pixels, 1, channels), (1, 1, channels, 4 * channels), residual=residual).kernels
    assert ("thirds" in kernel) == expected


@AMX
@pytest.mark.parametrize(
    ("inputs", "size", "stride", "outputs", "expected"),
    [
        ((1, 32, 32, 320), 3, 2, 112, "thirds"),
        ((2, 16, 16, 728), 3, 2, 112, "direct"),  # filters whose thirds are far more than L2
        ((1, 14, 14, 144), 1, 1, 640, "direct"),  # thirds and their windows that about fill it
    ],
)
def test_input_gradient_in_thirds(inputs, size, stride, outputs, expected):
    shapes = inputs, (size, size, inputs[3], outputs)
    kernels = raw.plan(*shapes, padding="SAME", strides=stride, training=True, direction="backward").kernels
    assert any(name.startswith(f"dgrad_{expected}") for name in kernels)


@AMX
@pytest.mark.parametrize(
    ("pixels", "channels", "outputs", "expected"),
    [
        (3136, 256, 64, ["reduce", "dgrad", "wgrad"]),
        (3136, 64, 128, ["backward"]),  # the gradient of z is more than products in thirds save
        (50176, 128, 128, ["backward"]),
        (50176, 256, 128, ["reduce", "dgrad", "wgrad"]),
    ],
)
def test_backward_in_one_row_or_in_thirds(pixels, channels, outputs, expected):
    shapes = (1, pixels, 1, channels), (1, 1, channels, outputs)
    kernels = raw.plan(*shapes, training=True, direction="backward").kernels
    assert [name.split("_")[0] for name in kernels] == expected
    assert ("wgrad_thirds_amx" in kernels) == (len(expected) > 1)
    assert "thirds" not in str(raw.plan(*shapes, training=True, direction="backward", isa="avx512"))
    assert "thirds" not in str(raw.plan(*shapes, training=True, direction="backward", algorithm="direct"))


@AMX
@pytest.mark.parametrize(("pixels", "moments"), [(3136, False), (50176, True)])
def test_moments_or_thirds(pixels, moments):
    [kernel] = raw.plan((1, pixels, 1, 128), (1, 1, 128, 512), training=True).kernels
    assert kernel == ("forward_moments_thirds_amx" if moments else "forward_thirds_amx")


@pytest.mark.parametrize(("channels", "expected"), [(3, "columns"), (15, "columns"), (16, "direct")])
def test_few_input_channels(channels, expected):
    kernels = raw.plan((2, 14, 14, channels), (5, 5, channels, 40), direction="backward").kernels
    assert [name.split("_")[1] for name in kernels if name.startswith("dgrad")] == [expected]


@pytest.mark.parametrize(("strict", "expected"), [("1", "winograd2"), ("0", "winograd4"), ("", "winograd4")])
def test_strict_mode(strict, expected, monkeypatch):
    """It binds "auto" alone."""
    monkeypatch.setenv("FUSEDCONVBN_STRICT", strict)
    common = {"padding": "SAME", "isa": "generic"}
    assert f"_{expected}_" in raw.plan(*PAYS[:2], **common).kernels[0]
    assert f"_{expected}_" in raw.plan(*PAYS[:2], **common, direction="backward", training=True).kernels[1]
    assert "_winograd4_" in raw.plan(*PAYS[:2], **common, algorithm="winograd4").kernels[0]


def test_strict_mode_is_checked(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_STRICT", "yes")
    with pytest.raises(ValueError, match=r"FUSEDCONVBN_STRICT must be 0 or 1\. Received: yes"):
        plan()


def test_direction_is_checked():
    with pytest.raises(ValueError, match=r"`direction` must be 'forward' or 'backward'.*sideways"):
        plan(direction="sideways")


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_isa(isa):
    assert all(name.endswith(isa) for name in plan(isa=isa, direction="backward").kernels)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16", "amx"])
def test_isa_by_environment(isa, monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_ISA", isa)
    planned = plan(direction="backward", training=True, dtype="bfloat16").kernels
    allowed = ("avx512_bf16", "avx512") if isa == "avx512_bf16" else isa  # which has not all stages
    assert all(name.endswith(allowed) for name in planned)
    order = ("generic", "avx2", "avx512", "avx512_bf16", "amx")
    available = set(order[: order.index(isa) + 1]) - ({"avx512_bf16"} if isa == "amx" else set())
    assert {row.isa for row in raw.kernels() if row.available} == available


@pytest.mark.isa("avx512_bf16")
def test_products_of_pairs_are_chosen_where_they_apply():
    def chosen(inputs, filters, **options):
        return raw.plan(
            inputs, filters, **{"dtype": "bfloat16", "padding": "SAME", "isa": "avx512_bf16"} | options
        ).kernels

    pairs = ["forward_pairs_avx512_bf16"]
    pointwise = (2, 14, 14, 64), (1, 1, 64, 64)
    assert chosen(*pointwise) == chosen(*pointwise, training=True) == pairs
    assert chosen((2, 14, 14, 64), (3, 3, 16, 64), strides=2) == pairs  # groups
    assert chosen(*pointwise, dtype="float32") == chosen(*pointwise, dtype="float16") == ["forward_direct_avx512"]
    assert chosen((2, 14, 14, 63), (1, 1, 63, 64)) == ["forward_direct_avx512"]
    assert chosen((2, 64, 14, 14), (1, 1, 64, 64), data_format="NCHW") == ["forward_direct_avx512"]
    assert chosen((16, 28, 28, 128), (3, 3, 128, 128)) == ["forward_winograd4_avx512"]  # in float32, and still faster
    assert chosen((16, 28, 28, 128), (3, 3, 128, 128), algorithm="direct") == pairs
    backward = {"training": True, "direction": "backward"}
    assert "dgrad_pairs_avx512_bf16" in chosen(*pointwise, **backward)
    assert "dgrad_direct_avx512" in chosen(*pointwise, direction="backward")  # its gradient of z is not to be rounded


def test_environment_limits_the_argument(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_ISA", "generic")
    with pytest.raises(ValueError, match=r"`isa` must be one that this machine has.*: generic\. Received: avx2"):
        plan(isa="avx2")


def test_unknown_isa_in_the_environment(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_ISA", "mmx")
    with pytest.raises(
        ValueError, match=r"FUSEDCONVBN_ISA must be one of generic, avx2, avx512, avx512_bf16, amx\. Received: mmx"
    ):
        plan()


@pytest.mark.parametrize("name", ["forward_reference", "forward_direct_generic"])
def test_kernel_by_environment(name, monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_KERNEL", name)
    assert plan().kernels == [name]
    assert plan(kernel="forward_direct_generic").kernels == ["forward_direct_generic"]  # the argument goes first


def test_unknown_kernel_in_the_environment(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_KERNEL", "forward_magic")
    with pytest.raises(ValueError, match=r"kernel must be one of .*forward_reference.* Received: forward_magic"):
        plan()


def test_kernel_of_an_isa_that_is_not_allowed():
    with pytest.raises(ValueError, match="forward_direct_avx2"):
        plan(kernel="forward_direct_avx2", isa="generic")


@pytest.mark.parametrize("case", op_cases()[::5], ids=str)
def test_out_shape(case):
    assert raw.out_shape(case.inputs_shape, case.filters_shape, **case.convolution) == case.output_shape


@pytest.mark.parametrize(
    ("inputs", "filters", "attributes", "expected"),
    [
        ((1, 2, 9, 1), (3, 3, 1, 1), {}, (1, 0, 7, 1)),  # a window one row too large: empty, as in TensorFlow
        ((HUGE, 1, 1, 1), (1, 1, 1, 1), {}, (HUGE, 1, 1, 1)),
        ((1, HUGE, 1, 1), (3, 1, 1, 1), {"padding": "SAME", "strides": (7, 1)}, (1, -(-HUGE // 7), 1, 1)),
        ((1, 2**20, 2**20, 1), (5, 5, 1, 3), {"padding": "SAME"}, (1, 2**20, 2**20, 3)),
        ((1, 1, 1, 2**20), (1, 1, 1, 2**28), {}, (1, 1, 1, 2**28)),
        ((1, 1, 1, 1), (1, 1, 1, 1), {"strides": HUGE, "padding": [(HUGE, 0), (0, 5)]}, (1, 2, 1, 1)),
        ((1, 1, 1, 1), (1, 1, 1, 1), {"padding": [(HUGE, 7), (0, 0)]}, (1, HUGE + 8, 1, 1)),
        ((1, HUGE, 1, 1), (2, 1, 1, 1), {"dilations": (HUGE - 1, 1)}, (1, 1, 1, 1)),
    ],
)
def test_out_shape_at_the_edges(inputs, filters, attributes, expected):
    assert raw.out_shape(inputs, filters, **attributes) == expected


@pytest.mark.parametrize(
    ("inputs", "filters", "attributes", "message"),
    [
        ((HUGE, HUGE, 1, 1), (1, 1, 1, 1), {}, r"at most 2\^48 elements.*1099511627776"),
        ((2**62, 2**62, 2**62, 1), (1, 1, 1, 1), {}, r"inputs"),
        ((1, 2**62, 1, 1), (1, 1, 1, 1), {"padding": [(2**62, 2**62), (0, 0)]}, r"padding|inputs"),
        ((1, 1, 1, 1), (1, 1, 1, 1), {"padding": [(HUGE, 0), (HUGE, 0)]}, r"at most 2\^48 elements"),
        ((1, 2**63 - 1, 1, 1), (1, 1, 1, 1), {"strides": 2**28, "padding": "SAME"}, r"inputs must have .* over 2\^48"),
        ((1, 8, 8, 1), (HUGE, 1, 1, 1), {}, r"filters must not be larger than the padded inputs.*1099511627776"),
        ((1, -1, 8, 1), (1, 1, 1, 1), {}, r"`inputs` must be of rank 4.*at least 0.*-1"),
        ((1, 2**64, 8, 1), (1, 1, 1, 1), {}, r"`inputs` must be of rank 4"),
        ((8, 8, 1), (1, 1, 1, 1), {}, r"`inputs` must be of rank 4.*\(8, 8, 1\)"),
    ],
)
def test_sizes_that_are_refused(inputs, filters, attributes, message):
    with pytest.raises(ValueError, match=message):
        raw.out_shape(inputs, filters, **attributes)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("data_format", ["NHWC", "NCHW"])
@pytest.mark.parametrize("shape", [(HUGE, 1, 1, 1), (1, 2**20, 2**20, 1), (1, HUGE, 1, 1), (2**20, 1, 2**20, 1)])
def test_plans_of_huge_problems(shape, data_format, direction):
    """In no time and no memory: nothing of a plan grows with the batch but the number that says how much it needs."""
    if data_format == "NCHW":
        shape = (shape[0], shape[3], *shape[1:3])
    planned = raw.plan(shape, (1, 1, 1, 1), data_format=data_format, direction=direction, training=True)
    assert 0 <= planned.workspace_bytes < 2**50


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", np.float32, np.dtype(np.float64)])
def test_dtypes(dtype):
    assert plan(dtype=dtype).kernels


@pytest.mark.parametrize("dtype", ["int8", np.int32, "complex64", object(), None])
def test_unknown_dtypes(dtype):
    with pytest.raises(TypeError, match=r"`dtype` must be one of 'float32'"):
        plan(dtype=dtype)


def test_raw_needs_no_tensorflow():
    """Neither `import fusedconvbn.raw` nor its use imports TensorFlow."""
    script = (
        "import sys; sys.modules['tensorflow'] = None\n"
        "import numpy as np; from fusedconvbn import raw\n"
        "v = np.ones(2, np.float32)\n"
        "print(raw.forward(np.ones((1, 3, 3, 1), np.float32), np.ones((3, 3, 1, 2), np.float32), v, v, v, v).output)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert result.returncode == 0, result.stderr
    assert "8.99" in result.stdout  # (9 - 1) / sqrt(1 + 1e-3) + 1
