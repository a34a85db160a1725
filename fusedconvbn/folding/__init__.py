"""Merges batch norms into the convolutions of models that exist.

`affine` is the algebra, `ops` the intermediate form, `planning` decides what folds into what. Graphs are read into that
form by `reading` and written back by `writing`, with `pipeline` around them; Keras models by `keras_models`. `frozen`,
`saved_model` and `checkpoint` are the files.
"""
