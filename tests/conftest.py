"""What tests share: the ISAs of this machine, a convolution by a variable."""

import pytest


@pytest.fixture(scope="session")
def available_isas() -> set[str]:
    from fusedconvbn import raw

    return {row.isa for row in raw.kernels() if row.available}


@pytest.fixture(params=["eager", "function"])
def call(request):
    """(a function of nothing that convolves by `filters`, filters)"""
    import packed
    import tensorflow as tf

    filters = packed.variable()
    convolve = lambda: packed.output(filters)  # noqa: E731
    return (tf.function(convolve) if request.param == "function" else convolve), filters
