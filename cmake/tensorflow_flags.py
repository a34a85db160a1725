"""What tensorflow.cmake asks of the Python environment that it builds for.

`key` prints what changes when another TensorFlow is installed, nothing where there is none.
`flags` prints a CMake list: version; include folder; other compile flags; link flags.
"""

import importlib.util
import os
import sys


def key() -> str:
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or spec.origin is None:
        return ""
    return f"{spec.origin} {os.stat(spec.origin).st_mtime_ns}"


def flags() -> str:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    include = tf.sysconfig.get_include()
    compile_flags = [flag for flag in tf.sysconfig.get_compile_flags() if flag != f"-I{include}"]
    return ";".join([tf.__version__, include, " ".join(compile_flags), " ".join(tf.sysconfig.get_link_flags())])


if __name__ == "__main__":
    print({"key": key, "flags": flags}[sys.argv[1]]())
