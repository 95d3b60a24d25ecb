"""Live views of a store's keys, values and pairs, with the set operations that a dict's views have.

In them as in the store a str stands for its bytes in UTF-8: `db.keys() & {"btc"}` is `{b"btc"}` or empty.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Set, ValuesView
from typing import Any, TypeVar

V = TypeVar("V")
_MISSING = object()


def as_bytes(thing: object) -> object:
    """A str in UTF-8, anything else as it is."""
    return thing.encode() if isinstance(thing, str) else thing


class _View:
    _mapping: Any

    def __repr__(self) -> str:
        return f"<{type(self).__name__.lower()} of {self._mapping!r}>"


class _SetView(_View, Set[Any]):
    """A set's operations, with the other side's elements as the store would hold them."""

    @classmethod
    def _from_iterable(cls, elements: Iterable[Any]) -> Any:
        return set(elements)

    @abstractmethod
    def _as_stored(self, element: Any) -> Any: ...

    def _operand(self, other: Any) -> Any:
        if isinstance(other, _View) or not isinstance(other, Iterable):
            return other
        elements = [self._as_stored(element) for element in other]
        try:
            return set(elements)
        except TypeError:       # pairs with values that are in no set, of a codec
            return other if isinstance(other, Set) else elements

    def isdisjoint(self, other: Iterable[Any]) -> bool:
        return super().isdisjoint(self._operand(other))

    def __and__(self, other: Any) -> Any:
        return super().__and__(self._operand(other))

    def __or__(self, other: Any) -> Any:
        return super().__or__(self._operand(other))

    def __sub__(self, other: Any) -> Any:
        return super().__sub__(self._operand(other))

    def __xor__(self, other: Any) -> Any:
        return super().__xor__(self._operand(other))

    __rand__, __ror__, __rxor__ = __and__, __or__, __xor__

    def __rsub__(self, other: Any) -> Any:
        if not isinstance(other, Iterable):
            return NotImplemented
        return {element for element in self._operand(other) if element not in self}

    def __eq__(self, other: Any) -> Any:
        return super().__eq__(self._operand(other) if isinstance(other, Set) else other)

    def __le__(self, other: Any) -> Any:
        return super().__le__(self._operand(other) if isinstance(other, Set) else other)

    def __lt__(self, other: Any) -> Any:
        return super().__lt__(self._operand(other) if isinstance(other, Set) else other)

    def __ge__(self, other: Any) -> Any:
        return super().__ge__(self._operand(other) if isinstance(other, Set) else other)

    def __gt__(self, other: Any) -> Any:
        return super().__gt__(self._operand(other) if isinstance(other, Set) else other)

    __hash__ = None         # type: ignore[assignment]


class Keys(_SetView, KeysView[bytes]):
    """The keys, in no particular order."""

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._mapping)

    def _as_stored(self, element: Any) -> Any:
        return as_bytes(element)


class Values(_View, ValuesView[V]):
    """The values."""

    def __iter__(self) -> Iterator[V]:
        iterator: Iterator[V] = self._mapping._iterate(1)
        return iterator

    def __contains__(self, value: object) -> bool:
        wanted = self._mapping._as_stored(value)
        return any(stored == wanted for stored in self)


class Items(_SetView, ItemsView[bytes, V]):
    """The pairs."""

    def __iter__(self) -> Iterator[tuple[bytes, V]]:
        iterator: Iterator[tuple[bytes, V]] = self._mapping._iterate(2)
        return iterator

    def _as_stored(self, element: Any) -> Any:
        if not isinstance(element, tuple) or len(element) != 2:
            return element
        return as_bytes(element[0]), self._mapping._as_stored(element[1])

    def __contains__(self, item: object) -> bool:
        if not isinstance(item, tuple) or len(item) != 2:
            return False
        return bool(self._mapping.get(item[0], _MISSING) == self._mapping._as_stored(item[1]))
