"""The op in programs that XLA compiles: against the oracle, and the same bits as outside of XLA in every mode."""

import threading
from dataclasses import replace

import cases
import keras
import numpy as np
import op_problems
import processes
import pytest
import reference
import tensorflow as tf
from op_problems import FROZEN, HALF, MODES, NCHW, TRAINING, arguments, assert_same_bits, function_of, upstream
from under_xla import jitted, program, under_xla, with_a_switch

import fusedconvbn
from fusedconvbn import _load

layers = keras.layers


@pytest.fixture(scope="module", autouse=True)
def library():
    """Its absence would let stock ops pass all that follows."""
    assert _load.xla() is None


@pytest.mark.parametrize("case", cases.op_cases(), ids=str)
def test_results_and_gradients(case):
    op_problems.assert_as_the_oracle(under_xla, case)


@pytest.mark.parametrize("case", cases.op_cases()[::3], ids=str)
def test_in_ops_of_xla(case, monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_XLA", "hlo")
    op_problems.assert_as_the_oracle(under_xla, case)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", MODES, ids=str)
def test_in_ops_of_xla_with_training_at_run_time(case, training, monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_XLA", "hlo")
    run = with_a_switch(case)
    call = function_of(fusedconvbn.fused_conv_bn, case, training=training)
    expected = op_problems.results_and_gradients(call, arguments(case), upstream(case))
    found = run(tf.constant(training), arguments(case), upstream(case))
    op_problems.assert_close(found, expected, 1e-5 if case.dtype == "f32" else 2**-7)


@pytest.mark.parametrize("case", [TRAINING, FROZEN, NCHW, HALF], ids=str)
def test_an_empty_batch_in_ops_of_xla(case, monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_XLA", "hlo")
    case = replace(case, batch=0)
    call = function_of(fusedconvbn.fused_conv_bn, case)
    expected = op_problems.results_and_gradients(call, arguments(case), upstream(case))
    assert_same_bits(under_xla(call, arguments(case), upstream(case)), expected)


def test_ops_of_xla_are_what_is_asked_for(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_XLA", "hlo")
    text = program(TRAINING)
    assert "fusedconvbn" not in text
    assert text.count(" convolution(") == 3


@pytest.mark.parametrize("case", MODES, ids=str)
@pytest.mark.parametrize("algorithm_and_save", [("auto", "recompute"), ("auto", "bfloat16"), ("direct", "conv")])
def test_the_bits_of_the_op(case, algorithm_and_save):
    algorithm, save = algorithm_and_save
    call = function_of(fusedconvbn.fused_conv_bn, case, algorithm=algorithm, save=save)
    expected = op_problems.results_and_gradients(call, arguments(case), upstream(case))
    assert_same_bits(under_xla(call, arguments(case), upstream(case)), expected)


EXPANDING = replace(TRAINING, kernel=(1, 1), in_channels=8, out_channels=32, strides=(1, 1), residual=False)


def test_moments_saved_for_the_gradient(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_KERNEL", "forward_moments_generic")
    call = function_of(fusedconvbn.fused_conv_bn, EXPANDING)
    expected = op_problems.results_and_gradients(call, arguments(EXPANDING), upstream(EXPANDING))
    assert_same_bits(under_xla(call, arguments(EXPANDING), upstream(EXPANDING)), expected)
    assert "f32[10,8]" in program(EXPANDING)  # [C + 2, C]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", MODES, ids=str)
def test_training_at_run_time(case, training):
    run = with_a_switch(case)
    call = function_of(fusedconvbn.fused_conv_bn, case, training=training)
    expected = op_problems.results_and_gradients(call, arguments(case), upstream(case))
    assert_same_bits(run(tf.constant(training), arguments(case), upstream(case)), expected)


def test_programs_hold_calls_of_our_kernels():
    text = program(TRAINING)
    assert text.count('custom_call_target="fusedconvbn_forward"') == 1
    assert text.count('custom_call_target="fusedconvbn_backward"') == 1
    assert " convolution(" not in text


def test_a_large_mean():
    case = replace(TRAINING, activation=None, residual=False)
    inputs, *rest = arguments(case)
    tensors = [inputs * 1e-2 + 1e3, *rest]
    call = function_of(fusedconvbn.fused_conv_bn, case)
    expected = reference.forward(*[t.numpy() for t in tensors], None, **case.attributes)
    found = under_xla(call, tensors, upstream(case))
    op_problems.assert_close(found[:3], [e.value for e in expected[:3]], 2e-2)
    assert_same_bits(found, op_problems.results_and_gradients(call, tensors, upstream(case)))


def test_functions_traced_before():
    tensors = arguments(FROZEN)
    call = tf.function(function_of(fusedconvbn.fused_conv_bn, FROZEN))
    expected = call(*tensors)
    concrete = call.get_concrete_function(*tensors)
    assert_same_bits(tf.function(lambda *t: call(*t), jit_compile=True)(*tensors), expected)
    assert_same_bits(tf.function(lambda *t: concrete(*t), jit_compile=True)(*tensors), expected)


def test_gradients_of_functions_traced_before():
    call = tf.function(function_of(fusedconvbn.fused_conv_bn, TRAINING))
    expected = op_problems.results_and_gradients(call, arguments(TRAINING), upstream(TRAINING))
    assert_same_bits(under_xla(call, arguments(TRAINING), upstream(TRAINING)), expected)


def test_second_order_gradients():
    case = replace(TRAINING, dtype="f64", residual=False, activation="silu")
    call = function_of(fusedconvbn.fused_conv_bn, case)

    def curvature(tensors):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            with tf.GradientTape() as inner:
                inner.watch(tensors)
                loss = tf.reduce_sum(call(*tensors).output ** 2)
            first = inner.gradient(loss, tensors[:3])
            total = sum(tf.reduce_sum(g**2) for g in first)
        return outer.gradient(total, tensors[:3])

    tensors = arguments(case)
    op_problems.assert_close(tf.function(curvature, jit_compile=True)(tensors), curvature(tensors), 1e-9)


def residual_step(case):
    """The op as a body of loops: from [N,H,W,C] to the same."""
    _, filters, *vectors = arguments(case)
    return lambda x: fusedconvbn.fused_conv_bn(x, filters, *vectors, padding="SAME", training=True).output


LOOPED = cases.Case(batch=2, in_channels=6, out_channels=6, training=True)


def test_while_loop():
    x, step = arguments(LOOPED)[0], residual_step(LOOPED)
    body = lambda i, x: (i + 1, step(x))  # noqa: E731
    looped = tf.function(lambda x, n: tf.while_loop(lambda i, _: i < n, body, (0, x))[1], jit_compile=True)
    assert_same_bits([looped(x, tf.constant(3))], [step(step(step(x)))])


@pytest.mark.parametrize("map_function", [tf.map_fn, tf.vectorized_map])
def test_mapped(map_function):
    x, step = arguments(LOOPED)[0], residual_step(LOOPED)
    batches = tf.stack([x, 2 * x, -x])
    found = tf.function(lambda b: map_function(step, b), jit_compile=True)(batches)
    assert_same_bits(list(found), [step(b) for b in batches])


def test_saved_model_of_any_batch(tmp_path):
    _, filters, *vectors = arguments(LOOPED)
    module = tf.Module()
    module.call = tf.function(
        lambda x: fusedconvbn.fused_conv_bn(x, filters, *vectors, padding="SAME").output,
        input_signature=[tf.TensorSpec([None, None, None, 6])],
    )
    tf.saved_model.save(module, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    for batch in (1, 3):
        x = tf.random.normal([batch, 9, 7, 6])
        assert_same_bits([tf.function(loaded.call, jit_compile=True)(x)], [module.call(x)])


def network():
    keras.utils.set_random_seed(7)
    x = inputs = keras.Input((12, 12, 3))
    x = fusedconvbn.FusedConvBN(8, 3, strides=2, activation="relu", padding="same")(x)
    shortcut = x
    x = fusedconvbn.FusedConvBN(8, 3, activation="relu", padding="same")(x)
    x = fusedconvbn.FusedConvBN(8, 1, activation="relu")(x, shortcut)
    return keras.Model(inputs, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def test_keras_fit_and_predict():
    rng = np.random.default_rng(3)
    images, labels = rng.normal(size=(48, 12, 12, 3)).astype("float32"), rng.integers(0, 4, 48)
    results = []
    for jit_compile in (False, True):
        model = network()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss, jit_compile=jit_compile)
        assert model.jit_compile is jit_compile
        history = model.fit(images, labels, batch_size=16, epochs=3, shuffle=False, verbose=0)
        results.append([*history.history["loss"], *model.get_weights(), model.predict(images, verbose=0)])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert results[0][0] > results[0][2]


def test_keras_jits_models_with_the_layer_where_it_does_so_by_itself():
    assert all(layer.supports_jit for layer in network().layers)


RESIDENT = """
    import tensorflow as tf
    import fusedconvbn

    filters, v = tf.Variable(tf.random.normal([1, 1, 4096, 4096])), tf.ones([4096])
    x = tf.random.normal([1, 4, 4, 4096])
    call = tf.function(lambda: fusedconvbn.fused_conv_bn(x, filters, v, v, v, v).output, jit_compile=True)

    def resident():
        return next(int(line.split()[1]) >> 10 for line in open("/proc/self/status") if line.startswith("VmRSS"))

    call()
    before = resident()
    [call() for _ in range(3)]
    print(resident() - before)
"""


@pytest.mark.parametrize(("megabytes", "least", "most"), [(512, 60, 90), (0, -10, 10)])
def test_packed_filters_are_kept(megabytes, least, most, monkeypatch):
    """64 MB of them. That they are never out of date, test_op_packed_updates.py tests."""
    monkeypatch.setenv("FUSEDCONVBN_PACKED_MEGABYTES", str(megabytes))
    assert least <= int(processes.run_python(RESIDENT)) <= most


def test_a_limit_of_packed_filters_that_is_none(monkeypatch):
    monkeypatch.setenv("FUSEDCONVBN_PACKED_MEGABYTES", "many")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"FUSEDCONVBN_PACKED_MEGABYTES must .*Received: many"):
        under_xla(function_of(fusedconvbn.fused_conv_bn, FROZEN), arguments(FROZEN), upstream(FROZEN))


def test_auto_clustering(monkeypatch):
    """Also that the library may come after TensorFlow has run, and that the same process runs the op outside of XLA."""
    text = """
        import tensorflow as tf
        print(float(tf.reduce_sum(tf.ones([2, 2]))))
        import fusedconvbn
        x, w, v = tf.random.normal([2, 8, 8, 4]), tf.random.normal([3, 3, 4, 4]), tf.ones([4])
        def step(x):
            y = fusedconvbn.fused_conv_bn(tf.nn.relu(x * 2 + 1), w, v, v, v, v, training=True).output
            return tf.reduce_sum(tf.tanh(y) * y, 0)
        outside = step(x)
        clustered = tf.function(step)(x)
        jitted = tf.function(step, jit_compile=True)(x)
        assert float(tf.reduce_max(tf.abs(outside - jitted))) < 1e-4
        assert float(tf.reduce_max(tf.abs(outside - clustered))) < 1e-4
        print("same")
    """
    flags = "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit --tf_xla_min_cluster_size=1"
    monkeypatch.setenv("TF_XLA_FLAGS", flags)
    output = processes.run_python(text)
    assert output.split() == ["4.0", "same"]


def test_many_threads_and_branches():
    """Pools of few threads, calls of many: whoever waits for a helper that does not come would hang."""
    step = residual_step(replace(LOOPED, height=24, width=24))
    x = tf.random.normal([2, 24, 24, 6])
    branches = tf.function(lambda x: tf.add_n([step(x * (i + 1.0)) for i in range(12)]), jit_compile=True)
    expected = branches(x).numpy()
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(branches(x).numpy() for _ in range(8)), daemon=True)
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(results) == 48
    assert all(np.array_equal(result, expected) for result in results)


def test_a_plan_that_changes_after_the_compilation(monkeypatch):
    call = function_of(fusedconvbn.fused_conv_bn, EXPANDING)
    compiled = jitted(call)
    compiled(arguments(EXPANDING), upstream(EXPANDING))
    monkeypatch.setenv("FUSEDCONVBN_KERNEL", "forward_moments_generic")
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"FUSEDCONVBN_KERNEL.*when XLA compiled"):
        compiled(arguments(EXPANDING), upstream(EXPANDING))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("gamma", [1]), ("moving_variance", [5]), ("residual", [1, 4, 5, 6]), ("filters", [9, 3, 4, 6])],
)
def test_shapes_that_do_not_fit(name, shape):
    good = {
        "inputs": [2, 6, 7, 4], "filters": [3, 3, 2, 6], "gamma": [6], "beta": [6], "moving_mean": [6],
        "moving_variance": [6], "residual": [2, 4, 5, 6],
    }  # fmt: skip
    tensors = {key: tf.random.normal(size) for key, size in (good | {name: shape}).items()}
    unknown = [tf.TensorSpec(None if key == name else t.shape, t.dtype) for key, t in tensors.items()]

    @tf.function(jit_compile=True, input_signature=unknown)
    def run(*values):
        return fusedconvbn.fused_conv_bn(**dict(zip(tensors, values)))

    with pytest.raises(tf.errors.InvalidArgumentError, match=f"{name} must .*Received: "):
        run(*tensors.values())


def test_sizes_that_xla_does_not_know():
    _, filters, *vectors = arguments(LOOPED)

    @tf.function(jit_compile=True)
    def run(x, keep):
        return fusedconvbn.fused_conv_bn(tf.boolean_mask(x, keep), filters, *vectors).output

    with pytest.raises(tf.errors.OpError, match="sizes XLA learns at run time only"):
        run(arguments(LOOPED)[0], tf.constant([True, False]))


@pytest.mark.parametrize("case", [TRAINING, FROZEN, NCHW, HALF], ids=str)
def test_an_empty_batch(case):
    case = replace(case, batch=0)
    call = function_of(fusedconvbn.fused_conv_bn, case)
    expected = op_problems.results_and_gradients(call, arguments(case), upstream(case))
    assert_same_bits(under_xla(call, arguments(case), upstream(case)), expected)
