"""Copies of Keras layers: of their configuration, of what they learned, of how a model is compiled."""

from __future__ import annotations

import warnings

import keras


def copy_layer(layer: keras.Operation) -> keras.Operation:
    """A layer of the same class and configuration, not built: `copy_state` is for what it learned.

    Raises:
        ValueError: Its class cannot make it from its configuration.
    """
    try:
        if type(layer) is keras.layers.Lambda:
            return _copy_lambda(layer)
        return type(layer).from_config(layer.get_config())
    except (NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(
            "`model` must consist of layers that their classes can make from `layer.get_config()` by `from_config`. "
            f"Received: a layer {layer.name!r} of {type(layer).__name__}, for which this raises {error!r}"
        ) from error


def _copy_lambda(layer: keras.layers.Lambda) -> keras.layers.Lambda:
    """Safe, for the code is that of this process; the function itself, for what it refers to is in no configuration."""
    copy = keras.layers.Lambda.from_config(layer.get_config(), safe_mode=False)
    copy.function = layer.function
    return copy


def copy_state(source: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Assigns the values of all variables, those of sublayers and random seeds included, and whether they train."""
    if len(source.variables) != len(target.variables):
        raise ValueError(
            "`model` must consist of layers whose variables follow from `layer.get_config()` and the shapes of their "
            f"inputs. Received: a layer {source.name!r} of {type(source).__name__} with {len(source.variables)} "
            f"variables, which made anew has {len(target.variables)}"
        )
    for theirs, ours in zip(source.variables, target.variables, strict=True):
        ours.assign(theirs)
        if ours.trainable != theirs.trainable:
            ours.trainable = theirs.trainable
    if hasattr(target, "finalize_state"):  # of layers that adapt: keep constants made from their variables
        target.finalize_state()


def compile_like(model: keras.Model, original: keras.Model) -> None:
    """Compiles `model` as `original` is, if it is: as `keras.models.clone_model` does, the optimizer starts anew.

    What cannot be made from its configuration, such as a loss that is a function unknown to Keras, is a warning.
    """
    if not original.compiled:
        return
    try:
        model.compile_from_config(original.get_compile_config())
    except (NotImplementedError, TypeError, ValueError) as error:
        warnings.warn(f"The new model is not compiled: call `compile`. The original's arguments: {error}", stacklevel=3)
