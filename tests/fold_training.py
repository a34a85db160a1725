"""Training graphs of TensorFlow 1 for the tests of folding: is_training says which mode their batch norms run in."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from fold_files import ModelFile, control_flow
from fold_nets import Little, Net, Statistics, Store, channels, conv, facts_of, reference_variable, resource_variable

v1 = tf.compat.v1

_TRAINED = ("kernel", "bias", "gamma", "beta")


@dataclasses.dataclass(frozen=True)
class Choice:
    """How a training graph chooses between the modes."""

    version_2: bool = False  # If operations, not Switch and Merge
    read_inside: bool = False  # variables read in the branches
    default: bool = False  # is_training is false where not fed
    keep_prob_default: bool = False  # keep_prob is 1 where not fed
    store: Store = reference_variable


CHOICES = {
    "switch": Choice(),
    "switch_resource": Choice(store=resource_variable),
    "switch_read_inside": Choice(read_inside=True),
    "switch_default": Choice(default=True),
    "stateless_if": Choice(version_2=True, store=resource_variable),
    "if": Choice(version_2=True, read_inside=True, store=resource_variable),
    "if_default": Choice(version_2=True, default=True, store=resource_variable),
    "if_reference": Choice(version_2=True),
}


class TrainingNet(Net):
    """A net whose batch norms train where the placeholder `is_training` says so."""

    def __init__(self, choice: Choice):
        super().__init__(choice.store)
        self.read_inside = choice.read_inside
        if choice.default:
            self.is_training = v1.placeholder_with_default(False, [], name="is_training")
        else:
            self.is_training = v1.placeholder(tf.bool, [], name="is_training")
        if choice.keep_prob_default:
            self.keep_prob = v1.placeholder_with_default(1.0, [], name="keep_prob")
        else:
            self.keep_prob = v1.placeholder(tf.float32, [], name="keep_prob")

    def update(self, statistics: Statistics, mean: Any, variance: Any) -> None:
        """Move the moving statistics, among the update operations."""
        for moving, batch in ((statistics.mean, mean), (statistics.variance, variance)):
            difference = (moving - batch) * 0.1
            operation = v1.assign_sub(moving, v1.where(self.is_training, difference, tf.zeros_like(difference)))
            v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, operation)

    def norm(self, x: Any, **arguments: bool) -> Any:
        """Two fused batch norms in a conditional."""
        variables = self.statistics(channels(x), **arguments)
        s = variables if self.read_inside else Statistics(*map(tf.convert_to_tensor, variables))

        def train() -> Any:
            return v1.nn.fused_batch_norm(x, s.gamma, s.beta, epsilon=1e-3, is_training=True)

        def infer() -> Any:
            return v1.nn.fused_batch_norm(x, s.gamma, s.beta, s.mean, s.variance, 1e-3, is_training=False)

        y, mean, variance = v1.cond(self.is_training, train, infer)
        self.update(variables, mean, variance)
        return y

    def flat_norm(self, x: Any) -> Any:
        """Moments in a conditional, and tf.nn.batch_normalization outside."""
        s = self.statistics(channels(x))
        moving = (tf.convert_to_tensor(s.mean), tf.convert_to_tensor(s.variance))
        mean, variance = v1.cond(self.is_training, lambda: tf.nn.moments(x, [0]), lambda: moving)
        self.update(s, mean, variance)
        return tf.nn.batch_normalization(x, mean, variance, s.beta, s.gamma, 1e-3)

    def dropout(self, x: Any) -> Any:
        return v1.nn.dropout(x, keep_prob=self.keep_prob)

    def layer_dropout(self, x: Any) -> Any:
        """Dropout in a conditional, as tf.layers writes it."""

        def drop() -> Any:
            return tf.floor(0.75 + v1.random_uniform(tf.shape(x))) * tf.math.divide(x, 0.75)

        return v1.cond(self.is_training, drop, lambda: tf.identity(x))

    def dense(self, x: Any, units: int) -> Any:
        x = tf.reshape(x, [-1, int(np.prod(x.shape[1:]))])
        return tf.nn.bias_add(tf.matmul(x, self.kernel(channels(x), units)), self.bias(units))


def classifier(net: TrainingNet, x: Any) -> Any:
    """Two convolutions and a dense layer, with a batch norm after each."""
    x = tf.nn.relu(net.norm(conv(net, x)))
    x = net.dropout(tf.nn.relu(net.norm(conv(net, x, 5, bias=True, strides=2, padding="VALID"))))
    return net.flat_norm(net.dense(x, 3))


def tagger(net: TrainingNet, x: Any) -> Any:
    """The VGG of musicnn in small: a batch norm of the input, and those after relu, before a maximum and dropout.

    The first one has one channel and folds into a padded convolution; the second one has negative gammas and stays; the
    third one has none and folds through the maximum into the dense layer.
    """
    x = net.norm(tf.expand_dims(x, 3))
    x = tf.nn.max_pool2d(net.norm(tf.nn.relu(conv(net, x, bias=True))), [4, 1], [2, 2], "VALID")
    x = tf.nn.relu(conv(net, net.layer_dropout(x), 5, bias=True))
    x = tf.nn.max_pool2d(net.norm(x, positive=True), 2, 2, "VALID")
    return tf.nn.sigmoid(net.dense(net.layer_dropout(x), 3))


CLASSIFIER = Little(lambda net, x: classifier(net, x), 3, 3)
TAGGER = Little(lambda net, x: tagger(net, x), 3, 2, (None, 15, 8))


def optimized(logits: Any, momentum: bool) -> tuple[Any, Any]:
    """The training step, with the updates before it and summaries beside it, and the labels' placeholder."""
    labels = v1.placeholder(tf.float32, [None, 3], name="labels")
    variables = [v for v in v1.global_variables() if v.name.startswith(_TRAINED)]
    decay = tf.add_n([tf.nn.l2_loss(v) for v in variables])
    loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(labels, logits)) + 1e-4 * decay
    v1.summary.scalar("loss", loss)
    v1.summary.histogram("logits", logits)
    optimizer = v1.train.MomentumOptimizer(0.01, 0.9) if momentum else v1.train.AdamOptimizer(0.001)
    with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
        step = optimizer.minimize(loss, v1.train.get_or_create_global_step(), variables)
    return tf.group(step, v1.summary.merge_all(), name="train"), labels


@contextlib.contextmanager
def trained(
    choice: Choice, little: Little = CLASSIFIER, momentum: bool = True, steps: int = 2
) -> Iterator[tuple[Any, ModelFile]]:
    """A session with a training graph after a few steps, and what its inference is to return."""
    with control_flow(choice.version_2), tf.Graph().as_default(), v1.Session() as session:
        net = TrainingNet(choice)
        x = v1.placeholder(tf.float32, little.shape, name="input")
        logits = little.build(net, x)
        tf.identity(logits, name="output")
        step, labels = optimized(logits, momentum)
        session.run(v1.global_variables_initializer())
        images = net.rng.normal(size=(4, *little.shape[1:]))
        feeds = {x: images, labels: np.eye(3)[[0, 1, 2, 0]], net.is_training: True, net.keep_prob: 0.8}
        for _ in range(steps):
            session.run(step, feeds)
        yield session, facts_of(session, little, _constants(choice, little))


def _constants(choice: Choice, little: Little) -> dict[str, np.ndarray]:
    """What inference feeds beside images."""
    is_training = {} if choice.default else {"is_training:0": np.array(False)}
    fixed = choice.keep_prob_default or little is TAGGER
    return is_training if fixed else {**is_training, "keep_prob:0": np.array(1, "float32")}


def set_shapes(node: Any, count: int, size: int) -> None:
    """The attribute that TensorFlow 1 wrote, with this many shapes of one dimension."""
    del node.attr["_output_shapes"].list.shape[:]
    for _ in range(count):
        node.attr["_output_shapes"].list.shape.add().dim.add().size = size


def bad_count(node: Any) -> None:
    """Fewer shapes than the gradient of a batch norm has outputs, as it once had fewer of them."""
    set_shapes(node, 3, 6)


def bad_shapes(node: Any) -> None:
    """Other shapes than are inferred today: TensorFlow 1 took the last two for as long as the others."""
    set_shapes(node, 5, 64)


def bad_sizes(node: Any) -> None:
    """Sizes that none can be."""
    set_shapes(node, 1, -7)


def damage_nodes(operations: tuple[str, ...], bad: Callable[[Any], None]) -> Callable[[Any], None]:
    """What does `bad` to all nodes of these operations in a MetaGraphDef."""

    def damage(meta: Any) -> None:
        chosen = [node for node in meta.graph_def.node if node.op in operations]
        assert chosen
        for node in chosen:
            bad(node)

    return damage


GRADIENTS = ("FusedBatchNormGrad", "FusedBatchNormGradV2", "FusedBatchNormGradV3")
