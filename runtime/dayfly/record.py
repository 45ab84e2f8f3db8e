"""Typed, keyword-only records for the guest, where a dataclass or a named tuple costs too much.

Importing `dataclasses` brings `inspect` along (15 ms by -X importtime); it and named tuples both
compile code for each class; this does neither.
"""

from __future__ import annotations

TYPE_CHECKING = False  # `typing` costs every sandbox 6 ms; type checkers take this name for its
if TYPE_CHECKING:
    from typing import Any, ClassVar, Self, dataclass_transform
else:

    def dataclass_transform(**_):
        return lambda cls: cls


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=True)
class Record:
    """A record whose fields are its annotations; frozen for the type checker, not at run time."""

    DEFAULTS: ClassVar[dict[str, Any]] = {}

    def __init__(self, **values: Any) -> None:
        fields = self.__dict__
        fields.update(self.DEFAULTS)
        fields.update(values)
        if fields.keys() != self.__annotations__.keys():
            wrong = fields.keys() ^ self.__annotations__.keys()
            raise TypeError(f"{type(self).__name__}: missing or unknown {', '.join(wrong)}")

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Self:
        """The record with exactly *fields*, which the caller has checked."""
        record = cls.__new__(cls)
        record.__dict__ = fields
        return record

    def __init_subclass__(cls) -> None:
        cls.DEFAULTS = {n: cls.__dict__[n] for n in cls.__annotations__ if n in cls.__dict__}

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"
