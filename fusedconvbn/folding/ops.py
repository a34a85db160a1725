"""The small intermediate form that every format is read into: what each op does to a per-channel affine map.

An op answers two questions. `pull`: a map is to be applied to one of its outputs; what must be applied to its inputs,
or changed in the op, for the same result? `push`: a map, so far applied to one of its inputs, no longer is; what must
be changed, and what is to be applied to its outputs? Either raises `Blocked` where there is no exact answer. They
change nothing: the change is a function in the answer, called once all of a search has succeeded.

Axes of channels are counted from the end: -1 is the last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from fusedconvbn.folding.affine import AffineMap, Blocked, Weights

Channels = tuple[AffineMap, int]
"""A map and the axis of the channels that it is for."""


@dataclass
class Answer:
    """What `pull` and `push` return.

    Attributes:
        maps: For each index of an input (`pull`) or output (`push`), what is to be applied there.
        change: Changes the op itself.
        absorbs: Whether the op is linear and took the map up.
    """

    maps: dict[int, Channels] = field(default_factory=dict)
    change: Callable[[], None] | None = None
    absorbs: bool = False


@dataclass
class Op:
    """An op about which nothing is known, and the base of the others.

    Attributes:
        name: In the source's terms.
        kind: The same: the op's type or the layer's class.
        inputs: Names of the tensors that it reads; constants are not among them.
        outputs: Names of the tensors that it makes.
    """

    name: str
    kind: str
    inputs: list[str]
    outputs: list[str]

    def __str__(self) -> str:
        return f"the model's input {self.name!r}" if self.is_input else f"{self.kind} {self.name!r}"

    @property
    def is_input(self) -> bool:
        """Whether it is where the model's input comes in."""
        return self.kind in ("InputLayer", "Placeholder", "PlaceholderWithDefault")

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """See the module."""
        raise Blocked(f"{self} takes up no scale and shift")

    def push(self, index: int, m: AffineMap, axis: int) -> Answer:
        """See the module."""
        raise Blocked(f"{self} takes up no scale and shift")


@dataclass
class Linear(Op):
    """A convolution, transposed convolution or matrix product with constant weights.

    Attributes:
        weights: In the common form.
        axis: Of the channels, of input and output.
        pads: The zeros around each axis of the input, `[(before, after), ...]`; None where they cannot be told.
        uniform: Whether every output is a sum over all taps (but for zeros): not so for transposed convolutions.
        activation: What it applies to its result, in words, or None.
        pad_value: What to pad with; anything but 0 needs an op of its own.
        changed: Whether `weights` are not the source's any more.
    """

    weights: Weights
    axis: int = -1
    pads: Sequence[tuple[int, int]] | None = None
    uniform: bool = True
    activation: str | None = None
    pad_value: float = 0.0
    changed: bool = False

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """Takes `m` up."""
        self._check_axis(axis)
        if self.activation is not None:
            raise Blocked(f"the {self.activation} of {self} is in between")
        if m.channels not in (1, self.weights.outputs):
            raise Blocked(f"{self} has {self.weights.outputs} output channels, not {m.channels}")
        return Answer(change=lambda: self._replace(self.weights.followed_by(m), self.pad_value), absorbs=True)

    def push(self, index: int, m: AffineMap, axis: int) -> Answer:
        """Takes `m` up; where the op pads with zeros and `m` shifts, it pads with what `m` maps to zero."""
        self._check_axis(axis)
        if m.channels not in (1, self.weights.inputs):
            raise Blocked(f"{self} has {self.weights.inputs} input channels, not {m.channels}")
        if m.shift.any() and not self.uniform:
            raise Blocked(f"{self} overlaps its results unevenly, so a shift before it is no bias behind it")
        pad_value = self.pad_value
        if not (m(pad_value) == pad_value).all():
            if self.pads is None:
                raise Blocked(f"the zeros that {self} pads with cannot be written out, and the batch norm shifts")
            if any(sum(pad) for pad in self.pads):
                pad_value = m.preimage(pad_value)
        return Answer(change=lambda: self._replace(self.weights.preceded_by(m), pad_value), absorbs=True)

    def _replace(self, weights: Weights, pad_value: float) -> None:
        self.weights, self.pad_value, self.changed = weights, pad_value, True

    def _check_axis(self, axis: int) -> None:
        if axis != self.axis:
            raise Blocked(f"the channels of {self} are on another axis")


@dataclass
class Affine(Op):
    """A batch norm in inference, a bias, a scaling: one map for each channel.

    Attributes:
        map: What it computes; None if that is not constant.
        axis: Of the channels.
        batch_norm: Whether it counts as one.
        why_not: Why it cannot fold, whatever is around it; None where it might.
        changed: Whether `map` is not the source's any more.
        removed: Whether its output is now its input.
    """

    map: AffineMap | None
    axis: int = -1
    batch_norm: bool = False
    why_not: str | None = None
    changed: bool = False
    removed: bool = False

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """m(a x + b) = a (s x) + (s b + t): the shift stays here, the scale moves on."""
        self._own(axis)
        return Answer({0: (m.scaling(), axis)}, lambda: self._shift(m, axis))

    def push(self, index: int, m: AffineMap, axis: int) -> Answer:
        """a (s x + t) + b = s (a x + b) + (a t + b - s b)."""
        own = self._own(axis)
        return Answer({0: (AffineMap(m.scale, own(m.shift) - m.scale * own.shift), axis)})

    def _own(self, axis: int) -> AffineMap:
        if self.batch_norm:
            raise Blocked(f"the batch norm {self.name!r}, which is kept, is in between")
        if self.map is None or (self.axis != axis and self.map.channels > 1):
            raise Blocked(f"{self} is in between")
        return self.map

    def _shift(self, m: AffineMap, axis: int) -> None:
        """Maps the shift as it is by now: one search may come here by several ways."""
        self.map = AffineMap(self.map.scale, m(self.map.shift))
        self.axis, self.changed = axis, True

    @property
    def is_bias(self) -> bool:
        """Whether it only shifts."""
        return self.map is not None and bool((self.map.scale == 1).all())


@dataclass
class Commuting(Op):
    """An op that commutes with affine maps of the axes that it leaves apart: an identity, a pooling, a transposition.

    Attributes:
        axes: For each axis of the input along which maps commute, that of the output; None: all, unchanged.
        positive: Whether it takes positive scales only (a maximum).
    """

    axes: dict[int, int] | None = None
    positive: bool = False

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """Lets `m` through."""
        return Answer({0: self._through(m, axis, self.axes and {new: old for old, new in self.axes.items()})})

    def push(self, index: int, m: AffineMap, axis: int) -> Answer:
        """Lets `m` through."""
        return Answer({0: self._through(m, axis, self.axes)})

    def _through(self, m: AffineMap, axis: int, axes: dict[int, int] | None) -> Channels:
        if self.positive and not (m.scale > 0).all():
            raise Blocked(f"{self} is in between, and a scale is not positive")
        if axes is None:
            return m, axis
        if axis not in axes:
            if m.channels > 1:
                raise Blocked(f"{self} combines the channels")
            return m, -1
        return m, axes[axis]


@dataclass
class Reshape(Op):
    """Other sizes, the same elements in the same order.

    Attributes:
        before, after: Sizes of all axes but the first, None where unknown; None for all where the first axis changes.
    """

    before: Sequence[int | None] | None = None
    after: Sequence[int | None] | None = None

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """Moves the channels to where they were."""
        return Answer({0: self._moved(m, axis, self.after, self.before)})

    def push(self, index: int, m: AffineMap, axis: int) -> Answer:
        """Moves the channels to where they come to be."""
        return Answer({0: self._moved(m, axis, self.before, self.after)})

    def _moved(
        self, m: AffineMap, axis: int, before: Sequence[int | None] | None, after: Sequence[int | None] | None
    ) -> Channels:
        if m.channels == 1:
            return m, -1
        if before is None or after is None:
            raise Blocked(f"{self} is in between")
        if axis == -1 and before and after and before[-1] == after[-1] == m.channels:
            return m, -1
        if None in before or None in after:
            raise Blocked(f"{self} has a size that is not known")
        return m.reshaped(axis, before, after)


@dataclass
class Pad(Op):
    """Puts a value around the axes of space.

    Attributes:
        axes: Those that it pads, or else touches.
        value: What with.
        pads: Whether it puts it anywhere.
        fixed: Whether the value cannot be another one.
        changed: Whether `value` is not the source's any more.
    """

    axes: frozenset[int] = frozenset()
    value: float = 0.0
    pads: bool = True
    fixed: bool = False
    changed: bool = False

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """Pads with what `m` makes of the value."""
        return Answer({0: (m, axis)}, self._with(axis, m.image(self.value) if self.pads else self.value))

    def push(self, index: int, m: AffineMap, axis: int) -> Answer:
        """Pads with what `m` maps to the value."""
        return Answer({0: (m, axis)}, self._with(axis, m.preimage(self.value) if self.pads else self.value))

    def _with(self, axis: int, value: float) -> Callable[[], None] | None:
        if axis in self.axes:
            raise Blocked(f"{self} works along the channels")
        if value == self.value:
            return None
        if self.fixed:
            raise Blocked(f"{self} pads with zeros, and the batch norm shifts")

        def change() -> None:
            self.value, self.changed = value, True

        return change


@dataclass
class _Parts(Op):
    """What has parts along an axis: the tensors that it joins, or that it makes.

    Attributes:
        axis: Along which.
        sizes: Of the parts along it, None where unknown.
    """

    axis: int = -1
    sizes: Sequence[int | None] = ()

    def _each(self, m: AffineMap, axis: int) -> Answer:
        """To each part that of its channels."""
        if axis != self.axis or m.channels == 1:
            return Answer(dict.fromkeys(range(len(self.sizes)), (m, axis)))
        return Answer({i: (m.part(b, e), axis) for i, (b, e) in enumerate(pairwise(self._ends()))})

    def _whole(self, part: int, m: AffineMap, axis: int) -> Answer:
        """To all parts together, of which the others stay as they are."""
        if axis != self.axis and m.channels > 1:
            raise Blocked(f"{self} has other parts along another axis")
        ends = self._ends()
        return Answer({0: (m.over(ends[part], ends[part + 1], ends[-1]), self.axis)})

    def _ends(self) -> list[int]:
        """Where parts begin and end: one number more than there are parts."""
        if None in self.sizes:
            raise Blocked(f"{self} has parts whose sizes are not known")
        return [0, *accumulate(self.sizes)]


@dataclass
class Concat(_Parts):
    """Tensors one after the other along an axis."""

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """To each input its channels' part."""
        return self._each(m, axis)

    def push(self, index: int, m: AffineMap, axis: int) -> Answer:
        """To the output."""
        return self._whole(index, m, axis)


@dataclass
class Split(_Parts):
    """Parts of a tensor along an axis."""

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """To the input."""
        return self._whole(output, m, axis)

    def push(self, index: int, m: AffineMap, axis: int) -> Answer:
        """To each output its channels' part."""
        return self._each(m, axis)


@dataclass
class Sum(Op):
    """The sum of tensors of one shape."""

    def pull(self, output: int, m: AffineMap, axis: int) -> Answer:
        """s (x + y) + t = (s x + t) + s y."""
        return Answer({i: (m if i == 0 else m.scaling(), axis) for i in range(len(self.inputs))})
