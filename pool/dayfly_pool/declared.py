"""What all declared data has in common."""

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

Name = Annotated[str, Meta(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")]
Seconds = Annotated[float, Meta(gt=0, le=86400)]


def given(model: Struct, names: Sequence[str]) -> list[str]:
    """Which of its fields *names* are there."""
    return [name for name in names if getattr(model, name) is not None]


class Model(Struct, rename="camel", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Declared data: camelCase outside, unknown fields refused by name."""
