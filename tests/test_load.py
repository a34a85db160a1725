"""Importing the package, and what it says when its libraries do not fit or are not there."""

import shutil
from types import SimpleNamespace

import pytest
import tensorflow as tf
from processes import run_python

import fusedconvbn
from fusedconvbn import _load


@pytest.mark.parametrize("statement", ["import fusedconvbn", "import fusedconvbn.raw", "from fusedconvbn import raw"])
def test_import_does_not_load_tensorflow(statement):
    loaded = "[m in sys.modules for m in ('tensorflow', 'keras')]"
    assert run_python(f"{statement}\nimport sys\nprint({loaded})") == "[False, False]"


@pytest.mark.parametrize("order", [["fusedconvbn", "tensorflow"], ["tensorflow", "fusedconvbn"]], ids="-".join)
def test_import_registers_the_ops(order):
    """In whichever order, so that a SavedModel of a user who imports both can be loaded."""
    looks = "\nimport importlib.util; importlib.util.find_spec('tensorflow')\n"  # and does not import it
    script = looks.join(f"import {module}" for module in order) + (
        "\nfrom tensorflow.python.framework import op_def_registry, ops"
        "\nfor name in ('FusedConvBN', 'FusedConvBNGrad'):"
        "\n    print(op_def_registry.get(name) is not None, ops.gradient_registry.lookup(name) is not None)"
    )
    assert run_python(script).split() == ["True"] * 4


def test_version_is_that_of_the_build():
    assert fusedconvbn.__version__ == _load._build_info().VERSION


def test_exports():
    assert set(fusedconvbn.__all__) <= set(dir(fusedconvbn))
    for name in fusedconvbn.__all__:
        assert getattr(fusedconvbn, name) is getattr(fusedconvbn, name)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fusedconvbn.no_such_thing


@pytest.fixture
def fresh(monkeypatch):
    """The function that opens the library, as before it was first called."""
    monkeypatch.setattr(tf, "load_op_library", lambda path: pytest.fail(f"{path} was opened"))
    return _load.ops.__wrapped__


@pytest.mark.parametrize("built_for", ["2.20.1", "2.22.0", "3.21.0"])
def test_other_minor_version(fresh, monkeypatch, built_for):
    monkeypatch.setattr(_load, "_build_info", lambda: SimpleNamespace(TENSORFLOW_VERSION=built_for))
    with pytest.raises(ImportError) as error:
        fresh()
    for words in (built_for, tf.__version__, "pip install --no-build-isolation --force-reinstall --no-deps"):
        assert words in str(error.value)


def test_other_patch_version_is_opened(monkeypatch):
    major, minor = tf.__version__.split(".")[:2]
    monkeypatch.setattr(_load, "_build_info", lambda: SimpleNamespace(TENSORFLOW_VERSION=f"{major}.{minor}.99"))
    monkeypatch.setattr(tf, "load_op_library", lambda path: path)
    assert _load.ops.__wrapped__() == str(_load.LIBRARY)


@pytest.mark.parametrize("missing", ["library", "build information", "TensorFlow when it was built"])
def test_not_built(fresh, monkeypatch, tmp_path, missing):
    if missing == "library":
        monkeypatch.setattr(_load, "LIBRARY", tmp_path / "_ops.so")
    elif missing == "build information":
        monkeypatch.setattr(_load, "_built", lambda module: False)
    else:
        monkeypatch.setattr(_load, "_build_info", lambda: SimpleNamespace(TENSORFLOW_VERSION=None))
    with pytest.raises(ImportError, match=r"not built.*make build.*pip install"):
        fresh()


def test_core_not_built(monkeypatch):
    monkeypatch.setattr(_load, "_built", lambda module: False)
    with pytest.raises(ImportError, match=r"extension module.*not built.*make build"):
        _load.core.__wrapped__()


def test_library_that_does_not_fit_leaves_tensorflow_alone(tmp_path):
    """TensorFlow imports; the error is for whoever calls the op."""
    package = tmp_path / "fusedconvbn"
    shutil.copytree(_load.LIBRARY.parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / "_build_info.py").write_text('VERSION = "0"\nTENSORFLOW_VERSION = "1.15.0"\n')
    (package / "_ops.so").write_bytes(b"no library")
    script = """
        import fusedconvbn
        import tensorflow as tf
        try:
            fusedconvbn.fused_conv_bn(*[tf.ones([1, 1, 1, 1])] * 2, *[tf.ones(1)] * 4)
        except ImportError as error:
            print(fusedconvbn.__file__, error)
    """
    message = run_python(script, folder=tmp_path)
    assert str(tmp_path) in message
    assert "built for TensorFlow 1.15.0" in message


def test_second_copy_of_the_library(tmp_path):
    """Two copies of the package in one process: the second is refused or works, and the first keeps working."""
    copy = shutil.copy(_load.LIBRARY, tmp_path / "_copy.so")
    script = """
        import sys
        import tensorflow as tf
        import fusedconvbn
        def call(size):
            arguments = [tf.ones([size, 1, 1, 1]), tf.ones([1, 1, 1, 1]), *[tf.ones(1)] * 4]
            return fusedconvbn.fused_conv_bn(*arguments, epsilon=0.0).output
        call(1)
        tf.load_op_library(sys.argv[1])
        print(float(tf.reduce_sum(call(1))), float(tf.reduce_sum(tf.function(call)(3))))
    """
    assert run_python(script, copy) == "1.0 3.0"
