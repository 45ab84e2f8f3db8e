"""The combinations of a matrix, as Tekton makes them. Pure.

https://tekton.dev/docs/pipelines/matrix/: the product of all parameters, the last one changing
fastest. An entry of `include` is added to the combinations that agree with it wherever it names one
of the matrix's parameters; if there are none, it is a combination of its own.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

from dayfly_pool.errors import BadInput

COMBINATIONS_MAX: Final = 100_000


def combinations(
    axes: Mapping[str, Sequence[Any]], include: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Every combination, in order. Raises `BadInput` for too many."""
    number = math.prod(map(len, axes.values())) if axes else 0
    if number + len(include) > COMBINATIONS_MAX:
        raise BadInput(
            f"the matrix has {number + len(include)} combinations, {COMBINATIONS_MAX} are allowed"
        )
    plain = [dict(zip(axes, row, strict=True)) for row in product(*axes.values())] if axes else []
    found = [dict(each) for each in plain]
    for entry in include:
        shared = [name for name in entry if name in axes]
        agreeing = [
            n for n, each in enumerate(plain) if all(each[name] == entry[name] for name in shared)
        ]
        for n in agreeing:
            found[n].update(entry)
        if not agreeing:
            found.append(dict(entry))
    return found
