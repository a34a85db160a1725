"""The kernels of the op on arrays, without TensorFlow: forward, backward, and what would run (`plan`).

Arguments, defaults and results are those of `fusedconvbn.fused_conv_bn`, gradients are explicit. Arrays are NumPy's or
anything `numpy.asarray` takes: float16, bfloat16 (of the package ml_dtypes), float32 or float64; gamma, beta and all
statistics ("stat" below) are float32, or float64 for float64 inputs. Arrays that are not contiguous are copied first.
Results are new arrays. The GIL is released while kernels run.

If `inputs` is on a GPU, a torch tensor or an array with a `__cuda_array_interface__`, all arrays must be, of the same
library and device; results are torch tensors, else CuPy arrays. CUDA kernels are queued on a stream, and nothing waits.
They take "auto" and "direct" for `algorithm`; isa, kernel, threads and packed_filters are to be left out.

Every function raises a `TypeError` or `ValueError` that names the argument, what it got and what is accepted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fusedconvbn import _arguments, _arrays, _gpu_arrays, _load

_PADDINGS = ("VALID", "SAME", "EXPLICIT")  # of `enum class Padding`
_SAVED = ("nothing", "conv", "moments", "bfloat16")  # of `enum class Saved`


class PackedFilters(NamedTuple):
    """What `pack_filters` returns: filters as a kernel reads them."""

    form: tuple  # what decides how they lie: the kernel, shape, groups and dtype of the filters, bytes
    memory: np.ndarray


class ForwardResult(NamedTuple):
    """What `forward` returns: the results of the op, and what `backward` starts from."""

    output: np.ndarray  # dtype and layout of inputs
    moving_mean: np.ndarray  # [K]
    moving_variance: np.ndarray  # [K]
    batch_mean: np.ndarray  # [K]: the mean that was subtracted
    inv_std: np.ndarray  # [K]: 1 / sqrt(variance + epsilon)
    conv_out: np.ndarray | None  # in training: what `backward` starts from, see `forward`


class BackwardResult(NamedTuple):
    """Gradients of the arguments of `forward`; None where not asked for, or where there was no such argument."""

    inputs: np.ndarray | None
    filters: np.ndarray | None
    gamma: np.ndarray
    beta: np.ndarray
    moving_mean: np.ndarray
    moving_variance: np.ndarray
    residual: np.ndarray | None


class KernelInfo(NamedTuple):
    """A row of the dispatch table; `available` is False for instruction sets that may not be used here."""

    name: str
    stage: str
    isa: str
    available: bool


def kernels() -> list[KernelInfo]:
    """All kernels; within a stage the preferred one first. FUSEDCONVBN_ISA limits what is available."""
    return [KernelInfo(*row) for row in _load.core().kernels()]


def out_shape(
    inputs_shape: Any, filters_shape: Any, *, strides: Any = 1, dilations: Any = 1, padding: Any = "VALID",
    data_format: str = "NHWC",
) -> tuple[int, int, int, int]:  # fmt: skip
    """Shape of the output, in the order of `data_format`, for the shapes of inputs and filters [kh,kw,C/groups,K]."""
    params = _params(
        inputs_shape, filters_shape, strides=strides, dilations=dilations, padding=padding, data_format=data_format
    )
    return tuple(params.output_shape)


def plan(
    inputs_shape: Any, filters_shape: Any, *, dtype: Any = "float32", strides: Any = 1, dilations: Any = 1,
    padding: Any = "VALID", data_format: str = "NHWC", activation: str | None = None, residual: bool = False,
    training: bool = False, epsilon: float = 1e-3, momentum: float = 0.99, unbiased_moving_variance: bool = False,
    algorithm: str = "auto", save: str = "conv", direction: str = "forward", saved: str = "conv",
    isa: str | None = None, kernel: str | None = None, threads: int = 1, device: str = "cpu",
) -> Any:  # fmt: skip
    """Which kernels would run, without running them: a printable object.

    Args:
        inputs_shape: [N,H,W,C] or [N,C,H,W], as `data_format` says.
        filters_shape: [kh,kw,C/groups,K].
        direction: "forward" or "backward".
        saved: Backward, in training: what the forward plan's `saved` was, "conv", "bfloat16", "moments" or "nothing".
            With "moments", the output is taken to be at hand.
        isa: The best instruction set that may be used: "generic", "avx2", "avx512", "avx512_bf16" or "amx"; None: the
            machine's best. The environment variable FUSEDCONVBN_ISA lowers what the machine is taken to have.
        kernel: A name that `kernels()` lists, used for the stage that it serves; None: the first of each stage that
            supports the problem. The environment variable FUSEDCONVBN_KERNEL does the same.
        threads: How many threads are to run it.
        device: "cpu", or "gpu", for which isa, kernel and threads are to be left out.
        dtype, strides, ... save: As in `forward`; `residual` says whether there is one.

    Returns:
        An object with `kernels`, a list of names in the order of execution, `workspace_bytes`, `useful_threads`, how
        many of `threads` the op would use (`forward` and `backward` use all), `estimates`, a list of what was compared
        where several algorithms compete, each a stage's name and a dict of microseconds by algorithm (on one thread, as
        if of float32, the portable kernels as if with AVX-512), `str()`, which prints all of this, and, of forward,
        `packed_bytes`, what the op keeps between calls of inference, `conv_out_shape` and `saved`: what it leaves for
        backward in training.
    """
    if saved not in _SAVED:
        _arguments.refuse(ValueError, "saved", "one of " + ", ".join(map(repr, _SAVED)), saved)
    if direction not in ("forward", "backward"):
        _arguments.refuse(ValueError, "direction", "'forward' or 'backward'", direction)
    if device not in ("cpu", "gpu"):
        _arguments.refuse(ValueError, "device", "'cpu' or 'gpu'", device)
    params = _params(
        inputs_shape, filters_shape, dtype=dtype, strides=strides, dilations=dilations, padding=padding,
        data_format=data_format, activation=activation, residual=_arguments.flag("residual", residual),
        training=training, epsilon=epsilon, momentum=momentum, unbiased_moving_variance=unbiased_moving_variance,
        algorithm=algorithm, save=save, saved=saved, has_output=saved == "moments",
    )  # fmt: skip
    planner = _gpu_arrays.plan if device == "gpu" else _arrays.Numpy().plan
    return planner(params, direction == "backward", isa, kernel, threads)


def pack_filters(plan: Any, filters: Any) -> PackedFilters:
    """What a call of `forward` does with its filters first, done once for all calls with the same ones.

    Args:
        plan: What `raw.plan` returned for such a call. It stands for all calls whose plan has the same `packed_form`:
            the same kernel, whatever the images' size, but for Winograd's, which read those for small images otherwise.
        filters: Of the shape and dtype that the plan was made for.

    Raises a `ValueError` if the kernel packs no filters, as the direct one in training of small images: then
    `plan.packed_bytes` is 0.
    """
    if not plan.packed_bytes:
        _arguments.refuse(ValueError, "plan", "of a kernel that packs filters", plan)
    _, shape, _, dtype, _ = plan.packed_form
    arrays = _arrays.Numpy()
    filters = _arrays.array(arrays, "filters", filters, _arrays.DTYPES[dtype], shape=shape)
    memory = arrays.empty((plan.packed_bytes,), "uint8")
    _load.core().pack_filters(plan, filters, memory, None)
    return PackedFilters(plan.packed_form, memory)


def forward(
    inputs: Any, filters: Any, gamma: Any, beta: Any, moving_mean: Any, moving_variance: Any, residual: Any = None, *,
    strides: Any = 1, dilations: Any = 1, padding: Any = "VALID", data_format: str = "NHWC", epsilon: float = 1e-3,
    momentum: float = 0.99, unbiased_moving_variance: bool = False, activation: str | None = None,
    training: bool = False, algorithm: str = "auto", save: str = "conv", isa: str | None = None,
    kernel: str | None = None, threads: int = 1, packed_filters: PackedFilters | None = None, stream: Any = None,
) -> ForwardResult:  # fmt: skip
    """output = activation(gamma * (conv(inputs, filters) - mean) / sqrt(variance + epsilon) + beta + residual).

    Args:
        inputs: [N,H,W,C] or [N,C,H,W].
        filters: [kh,kw,C/groups,K], dtype of inputs.
        gamma, beta, moving_mean, moving_variance: [K], stat.
        residual: Shape and dtype of the output, or None.
        strides, dilations: An int or (height, width).
        padding: "SAME", "VALID" or [(top, bottom), (left, right)].
        training: Whether mean and variance are those of the batch, and moving statistics updated.
        save: What `conv_out` is to hold of the convolution: "conv", "bfloat16" or "recompute", nothing.
        isa, kernel, threads: As in `plan`.
        packed_filters: What `pack_filters` made of `filters`, or None: they are packed by this call. None on a GPU.
        stream: Of arrays on a GPU, where kernels are queued and memory is taken: a stream of CuPy or torch, or its
            address; None: the current one of the arrays' library.

    In training `conv_out` is one of: the convolution, of the output's shape and dtype; its n numbers [N,OH,OW,K] less
    `batch_mean` in bfloat16, two in a float32, [(n + 1) / 2]; the second moments of the inputs, [C + 2, C] (scatter,
    mean, what the mean lost in rounding; of bfloat16 inputs float32 numbers in parts, [2 (C + 2), C]), where backward
    needs no more than these; None.

    Results have the same bits whatever the number of threads.
    """
    data = _arrays.Data(inputs, filters, stream)
    params = _params(
        data.inputs.shape, data.filters.shape, dtype=data.dtype, strides=strides, dilations=dilations,
        padding=padding, data_format=data_format, activation=activation, residual=residual is not None,
        training=training, epsilon=epsilon, momentum=momentum, unbiased_moving_variance=unbiased_moving_variance,
        algorithm=algorithm, save=save,
    )  # fmt: skip
    statistics = data.vectors(gamma=gamma, beta=beta, moving_mean=moving_mean, moving_variance=moving_variance)
    image = params.output_shape
    residual = data.image("residual", residual, image)
    chosen = data.library.plan(params, False, isa, kernel, threads)
    packed = _packed(packed_filters, chosen)
    output = data.empty(image)
    conv_out = data.empty(chosen.conv_out_shape) if chosen.conv_out_shape else None
    results = [data.empty_vector() for _ in range(4)]
    data.library.forward(chosen, data.inputs, data.filters, *statistics, residual, packed, output, *results, conv_out)
    return ForwardResult(output, *results, conv_out)


def backward(
    output_gradient: Any, inputs: Any, filters: Any, gamma: Any, beta: Any, moving_mean: Any, moving_variance: Any,
    residual: Any = None, output: Any = None, batch_mean: Any = None, inv_std: Any = None, conv_out: Any = None, *,
    moving_mean_gradient: Any = None, moving_variance_gradient: Any = None, strides: Any = 1, dilations: Any = 1,
    padding: Any = "VALID", data_format: str = "NHWC", epsilon: float = 1e-3, momentum: float = 0.99,
    unbiased_moving_variance: bool = False, activation: str | None = None, training: bool = False,
    algorithm: str = "auto", save: str = "conv", needs_inputs: bool = True, needs_filters: bool = True,
    isa: str | None = None, kernel: str | None = None, threads: int = 1, stream: Any = None,
) -> BackwardResult:  # fmt: skip
    """Gradients of all arguments of `forward`, which must have had the same ones.

    Args:
        output_gradient: Gradient of the output, of its shape and dtype.
        inputs, ... residual: As in `forward`.
        output: What `forward` returned; required with a residual and an activation of relu, relu6, leaky_relu or elu.
            Without it, these activations make the convolution be recomputed where conv_out holds moments.
        batch_mean, inv_std, conv_out: What `forward` returned; read in training only.
        moving_mean_gradient, moving_variance_gradient: [K], stat: gradients of the returned moving statistics; None: 0.
        needs_inputs, needs_filters: Whether to compute these gradients.
        strides, ... stream: As in `forward`.
    """
    data = _arrays.Data(inputs, filters, stream)
    params = _params(
        data.inputs.shape, data.filters.shape, dtype=data.dtype, strides=strides, dilations=dilations,
        padding=padding, data_format=data_format, activation=activation, residual=residual is not None,
        training=training, epsilon=epsilon, momentum=momentum, unbiased_moving_variance=unbiased_moving_variance,
        algorithm=algorithm, save=save, saved=_saved(conv_out), has_output=output is not None,
    )  # fmt: skip
    image = params.output_shape
    output_gradient = data.image("output_gradient", output_gradient, image, required=True)
    g_mean = data.vector_or_zeros("moving_mean_gradient", moving_mean_gradient)
    g_variance = data.vector_or_zeros("moving_variance_gradient", moving_variance_gradient)
    statistics = data.vectors(gamma=gamma, beta=beta, moving_mean=moving_mean, moving_variance=moving_variance)
    residual = data.image("residual", residual, image)
    output = data.image("output", output, image, required=params.needs_output)
    kept = params.conv_out_shape if save != "recompute" or conv_out is not None else None
    saved = data.saved(kept, batch_mean, inv_std, conv_out) if training else [None, None, None]
    chosen = data.library.plan(params, True, isa, kernel, threads)
    results = BackwardResult(
        data.empty(data.inputs.shape) if _arguments.flag("needs_inputs", needs_inputs) else None,
        data.empty(data.filters.shape) if _arguments.flag("needs_filters", needs_filters) else None,
        *(data.empty_vector() for _ in range(4)),
        residual=None if residual is None else data.empty(image),
    )
    data.library.backward(
        chosen, output_gradient, g_mean, g_variance, data.inputs, data.filters, *statistics, residual, output, *saved,
        *results,
    )  # fmt: skip
    return results


def _params(
    inputs_shape: Any, filters_shape: Any, *, strides: Any, dilations: Any, padding: Any, data_format: Any,
    dtype: Any = "float32", activation: Any = None, residual: bool = False, training: Any = False,
    epsilon: Any = 1e-3, momentum: Any = 0.99, unbiased_moving_variance: Any = False, algorithm: Any = "auto",
    save: Any = "conv", saved: str = "conv", has_output: bool = False,
) -> Any:  # fmt: skip
    """The core's description of the problem, all of it checked."""
    kind, explicit = _arguments.padding(padding)
    return _load.core().Params(
        inputs_shape=_arguments.shape("inputs", inputs_shape, 4),
        filters_shape=_arguments.shape("filters", filters_shape, 4),
        strides=_arguments.pair("strides", strides),
        dilations=_arguments.pair("dilations", dilations),
        padding=_PADDINGS.index(kind),
        explicit_padding=explicit,
        dtype=_arrays.DTYPES.index(_dtype_name(dtype)),
        data_format=_arguments.DATA_FORMATS.index(_arguments.data_format(data_format)),
        activation=_arguments.ACTIVATIONS.index(_arguments.activation(activation)),
        residual=residual,
        training=_arguments.flag("training", training),
        unbiased_moving_variance=_arguments.flag("unbiased_moving_variance", unbiased_moving_variance),
        epsilon=_arguments.epsilon(epsilon),
        momentum=_arguments.momentum(momentum),
        algorithm=_arguments.ALGORITHMS.index(_arguments.algorithm(algorithm)),
        save=_arguments.SAVES.index(_arguments.save(save)),
        saved=_SAVED.index(saved),
        has_output=has_output,
    )


def _saved(conv_out: Any) -> str:
    """What this array, a result of `forward`, holds: each kind has a rank of its own."""
    return "nothing" if conv_out is None else {1: "bfloat16", 2: "moments"}.get(np.ndim(conv_out), "conv")


def _packed(packed_filters: Any, plan: Any) -> np.ndarray | None:
    """The memory of packed filters, if it lies as the plan's kernel reads it."""
    if packed_filters is None:
        return None
    if not isinstance(packed_filters, PackedFilters):
        _arguments.refuse(TypeError, "packed_filters", "None or what pack_filters() returns", packed_filters)
    if packed_filters.form != plan.packed_form:
        accepted = f"of the kernel, filters' shape, groups, dtype and bytes {plan.packed_form}"
        _arguments.refuse(ValueError, "packed_filters", accepted, packed_filters.form)
    return packed_filters.memory


def _dtype_name(dtype: Any) -> str:
    """The name of a dtype: of a string, a NumPy dtype or type, ml_dtypes.bfloat16."""
    try:
        name = dtype if isinstance(dtype, str) or dtype is None else np.dtype(dtype).name
    except TypeError:
        name = None
    if name not in _arrays.DTYPES:
        _arguments.refuse(TypeError, "dtype", "one of " + ", ".join(map(repr, _arrays.DTYPES)), dtype)
    return name
