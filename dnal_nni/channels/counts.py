"""Numbers that a forward computes with, and where each of them is from.

A forward reads the sizes of tensors (``B, N, C = x.shape``) and numbers of its module (``self.num_heads``), and asks
for shapes in terms of them. While a model is traced these are ints that know their source (:mod:`.counting` makes
them). So what a cut must keep equal (the width of ``x``, and that of another tensor which is reshaped to it), and which
attributes must follow it, is read, and not guessed from numbers that happen to be the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class StoredSize:
    """A number that a forward passed to an operation, and the channels that it counts.

    Attributes:
        path: the module whose forward it was, or that has the attribute.
        sizes: the number; all of them, where it is one of a list of sizes.
        position: where in that list; None for a number by itself.
        ids: channel ids, an axis for each axis of the tensor; ``axis`` is the one counted.
        attribute: where the forward read the number; None: not known, any attribute of that value may be it.
    """

    path: str
    sizes: tuple[int, ...]
    position: int | None
    ids: Tensor
    axis: int
    attribute: str | None = None


@dataclasses.dataclass(frozen=True)
class Attribute:
    """A number that a module keeps: ``sizes[position]`` of a list of them, or the only one.

    Attributes:
        path: of the module.
        name: of the attribute.
    """

    path: str
    name: str
    sizes: tuple[int, ...]
    position: int | None

    @property
    def number(self) -> int:
        """Its value."""
        return self.sizes[self.position or 0]

    def counting(self, ids: Tensor, axis: int) -> StoredSize:
        """That it counts the channels ``ids`` along one of their axes."""
        return StoredSize(self.path, self.sizes, self.position, ids, axis, self.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Size:
    """How many channels a tensor has along an axis.

    Attributes:
        ids: these channels, int64 ``[n]``.
        call: in which call of a module it was read.
        sizes: are told of attributes that it is compared with, as an assertion about an input's width does.
    """

    ids: Tensor
    call: int
    sizes: Sizes

    @property
    def number(self) -> int:
        """Its value."""
        return len(self.ids)


Source = Attribute | Size


class Count(int):
    """A number and its sources; ``plain`` where it is the number of its only source, and not computed from it.

    One without sources is of a tensor whose channels lie along several axes.
    """

    sources: tuple[Source, ...]
    plain: bool

    @classmethod
    def of(cls, number: int, sources: Sequence[Source], plain: bool = False) -> Count:
        """``number``, which is from there."""
        made = cls(number)
        made.sources, made.plain = tuple(dict.fromkeys(sources)), plain
        return made

    def __eq__(self, other: object) -> bool:
        equal = super().__eq__(other)
        if equal is True and isinstance(other, Count) and self.plain and other.plain:
            mine, theirs = self.sources[0], other.sources[0]
            for size, attribute in ((mine, theirs), (theirs, mine)):
                if isinstance(size, Size) and isinstance(attribute, Attribute):
                    size.sizes.stored.append(attribute.counting(size.ids, 0))
        return equal

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return NotImplemented if equal is NotImplemented else not equal

    __hash__ = int.__hash__

    def __mul__(self, other: Any) -> Any:
        result = super().__mul__(other)
        if type(result) is not int:
            return result
        return Count.of(result, self.sources + (other.sources if isinstance(other, Count) else ()))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:  # what C // heads is a part of, and not that there are heads somewhere
        result = super().__floordiv__(other)
        return result if type(result) is not int else Count.of(result, self.sources)

    def __neg__(self) -> Count:  # counted from the end
        return Count.of(int.__neg__(self), self.sources, self.plain)

    def __int__(self) -> int:  # Python leaves no choice but an int that knows nothing
        for size in (source for source in self.sources if isinstance(source, Size)):
            size.sizes.forgotten(self, size.call)
        return int.__int__(self)

    def __reduce__(self) -> Any:
        return int, (int.__int__(self),)  # what is copied or saved of it is any number


def runs(number: Count, place: int, shape: Sequence[int]) -> Iterator[tuple[Source, int, int]]:
    """Where in a shape that was asked for the sources of one of its numbers are: each, with the axes ``[start, end)``.

    Of ``reshape(B, N, heads, C // heads)`` the last two axes are C channels.
    """
    if number.plain:
        yield number.sources[0], place, place + 1
        return
    for source in number.sources:
        spans = [(a, b) for a in range(place + 1) for b in range(place + 1, len(shape) + 1)]
        for start, end in sorted(spans, key=lambda span: span[1] - span[0]):
            if math.prod(shape[start:end]) == source.number:
                yield source, start, end
                break


@dataclasses.dataclass(frozen=True)
class Equal:
    """That a tensor was given as many positions along an axis as another tensor has channels.

    Attributes:
        line: these channels, int64 ``[n]``.
        ids: channel ids of the tensor, an axis for each of its axes; ``axis`` is the one counted.
        why: why a channel stays whose partner is fixed.
    """

    line: Tensor
    ids: Tensor
    axis: int
    why: str


class Sizes:
    """The numbers that forwards hand to operations, as far as they count channels that can go.

    Args:
        frame: path and class name of the module whose forward is running.
        running: the numbers of the calls of modules that are running.
        why: a reason, with the place where the forward is.

    Attributes:
        stored: attributes, and numbers that may be attributes.
        equal: what must be as many as what else.
        given: the numbers among the arguments of the call of torch that is running, as the forward gave them.
    """

    def __init__(
        self,
        frame: Callable[[], tuple[str, str]],
        running: Callable[[], Collection[int]],
        why: Callable[[str], str],
    ) -> None:
        self._frame, self._running, self._why = frame, running, why
        self.stored: list[StoredSize] = []
        self.equal: list[Equal] = []
        self.given: tuple[int, ...] = ()
        self._forgotten: dict[tuple[int, int], list[Count]] = defaultdict(list)  # by the call of a module, and value

    def forgotten(self, count: Count, call: int) -> None:
        """A forward has made a plain int of a number, by ``int(x.shape[1])``; it may compare that with an attribute."""
        number = int.__int__(count)
        self._forgotten[call, number].append(count)
        if count.plain and isinstance(size := count.sources[0], Size):
            self.stored.append(StoredSize(self._frame()[0], (number,), None, size.ids, 0))

    def known(self, number: int, call: int) -> int:
        """A number that a forward gives; of a plain one the sources of those, of the same value, that were forgotten.

        It may be another one: then more goes together than needs to.
        """
        counts = () if isinstance(number, Count) else self._forgotten.get((call, number), ())
        if len(counts) < 2:
            return counts[0] if counts else number
        return Count.of(number, [source for count in counts for source in count.sources])

    def note(self, numbers: Iterable[Any], array: Tensor, shape: Sequence[int]) -> None:
        """Numbers among the arguments of an operation count labelled positions of ``array``.

        Where the forward got such a number is known, if it gave it as it was; of one that it has computed, any
        attribute of the same value may be what is behind it.
        """
        wanted = {n for n in numbers if isinstance(n, int)}
        for axis in (i for i, n in enumerate(array.shape) if n > 1):
            if shape[axis] in wanted:
                self.counts(shape[axis], array, axis)

    def counts(self, number: int, array: Tensor, axis: int) -> None:
        """A number of this value counts the positions of ``array`` along an axis, as for :meth:`note`."""
        counts = [n for n in self.given if isinstance(n, Count) and abs(n) == number and self._valid(n)]
        for count in counts:
            if count.plain:
                self._counts(count.sources[0], array, array.shape, axis, axis + 1)
        if not counts and (number in self.given or -number in self.given):
            self.stored.append(StoredSize(self._frame()[0], (number,), None, array, axis))

    def listed(self, sizes: tuple[int, ...], position: int, array: Tensor, axis: int) -> None:
        """A number of a list that an operation was given counts the positions of ``array`` along an axis."""
        listed = self.given[: len(sizes)]  # ahead of the axis
        number = listed[position] if listed == sizes else sizes[position]
        if isinstance(number, Count) and self._valid(number):
            if number.plain:
                self._counts(number.sources[0], array, array.shape, axis, axis + 1)
        else:
            self.stored.append(StoredSize(self._frame()[0], (sizes[position],), None, array, axis))
            self.stored.append(StoredSize(self._frame()[0], sizes, position, array, axis))

    def shaped(
        self,
        array: Tensor,
        shape: Sequence[int],
        numbers: Sequence[int],
        before: Sequence[Tensor],
        old: Sequence[int],
    ) -> None:
        """A tensor got the shape that the forward asked for: as for :meth:`note`, place by place.

        Args:
            array: its labels.
            shape: its shape.
            numbers: what the operation was given, -1 included.
            before: labels of what it was made of.
            old: the shape of that.
        """
        varying = [i for i, n in enumerate(array.shape) if n > 1]
        places = dict(self._places(shape))
        for place, count in places.items():
            for source, start, end in runs(count, place, shape):
                if any(start <= axis < end for axis in varying):
                    self._counts(source, array, shape, start, end)
            if place in varying and not count.plain:
                self._repeated(count, array, place)
        if not places:
            self.note(numbers, array, shape)
            for axis in varying:
                self.stored.append(StoredSize(self._frame()[0], tuple(numbers), axis, array, axis))
            computed = {size for axis in varying if (size := shape[axis]) in self.given}
            for entering in before if computed else ():  # and often of the size of the axis that is split
                for axis in (i for i, n in enumerate(entering.shape) if n > 1):
                    self.stored.append(StoredSize(self._frame()[0], (old[axis],), None, entering, axis))

    def _repeated(self, count: Count, array: Tensor, place: int) -> None:
        """A source counts channels that lie on an axis several times over: of ``batch * heads`` rows each has heads."""
        for source in (s for s in count.sources if array.shape[place] % s.number == 0):
            times = array.unflatten(place, (-1, source.number))
            once = times.select(place, 0)
            every = bool((times == once.unsqueeze(place)).all())
            if every and once.unique().numel() == once.numel() and 1 < source.number < array.shape[place]:
                self._counts(source, once, once.shape, place, place + 1)

    def _places(self, shape: Sequence[int]) -> Iterator[tuple[int, Count]]:
        """The places in a shape for which the forward gave numbers of known sources."""
        given, start = self.given, 0
        if given and len(given) != len(shape):  # unflatten: an axis, and its parts
            given = given[1:]
            start = self.given[0] if self.given[0] >= 0 else self.given[0] + len(shape) - len(given) + 1
        if any(n not in (size, -1) for n, size in zip(given, shape[start:])):
            return
        for place, number in enumerate(given, start):
            if isinstance(number, Count) and self._valid(number):
                yield place, number

    def line(self, number: int, reserve: Callable[[int], Tensor]) -> Tensor | None:
        """The channels that a number counts, where its source is known; of an attribute new ones, which it counts."""
        if not isinstance(number, Count) or not number.plain or not self._valid(number):
            return None
        source = number.sources[0]
        if isinstance(source, Size):
            return source.ids
        line = reserve(source.number)
        self.stored.append(source.counting(line, 0))
        return line

    def _valid(self, count: Count) -> bool:
        """Whether a number is of this forward, or of one around or inside of it: a cache may hold older ones."""
        path, running = self._frame()[0], self._running()
        return all(
            source.call in running if isinstance(source, Size) else _nested(path, source.path)
            for source in count.sources
        )

    def _counts(self, source: Source, array: Tensor, shape: Sequence[int], start: int, end: int) -> None:
        """A source counts the positions along the axes ``[start, end)`` of a tensor together."""
        sizes = [*array.shape[:start], *shape[start:end], *array.shape[end:]]
        merged = array.expand(sizes).flatten(start, end - 1)
        if isinstance(source, Attribute):
            self.stored.append(source.counting(merged, start))
        else:
            what = "a size is taken from a tensor whose channels are fixed"
            self.equal.append(Equal(source.ids, merged, start, self._why(what)))


def _nested(path: str, other: str) -> bool:
    """Whether one of two modules contains the other, by their paths."""
    return not path or not other or f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")
