"""What another job has to do so that one is complete which is over without that. Pure."""

from typing import Any, Final

import msgspec

from dayfly_pool.batch.indices import TEXT_CHARACTERS_MAX, IndexSet, parse
from dayfly_pool.batch.model import JobSpec, SuccessRule
from dayfly_pool.errors import BadInput

RETRIABLE: Final = ("Failed", "Cancelled")


def spec_of(spec: JobSpec, left: IndexSet, succeeded: IndexSet) -> JobSpec:
    """*spec* for the indices *left* alone, when those that *succeeded* need not be done again.

    Its limits are no more than what is left can reach. Raises `BadInput` for a list of indices
    that is too long.
    """
    text = left.text()
    if len(text) > TEXT_CHARACTERS_MAX:
        raise BadInput(f"the {len(left)} indices left are too scattered for one list of them")
    most, policy = spec.max_failed_indexes, spec.success_policy
    plain: dict[str, Any] = msgspec.to_builtins(spec) | {
        "size": None,
        "indices": text,
        "suspend": False,
        "minCount": min(spec.min_count, len(left)),
        "maxFailedIndexes": None if most is None else min(most, len(left)),
    }
    if policy is not None:
        plain["successPolicy"] = {"rules": [_rule(r, left, succeeded) for r in policy.rules]}
    try:
        return msgspec.convert(plain, JobSpec)
    except msgspec.ValidationError as error:
        raise BadInput(f"what is left cannot be one job: {error}") from None


def _rule(rule: SuccessRule, left: IndexSet, succeeded: IndexSet) -> dict[str, Any]:
    """What is still to succeed for *rule* to be met."""
    if rule.succeeded_indexes is None:
        assert rule.succeeded_count is not None
        return {"succeededCount": rule.succeeded_count - len(succeeded)}
    wanted = parse(rule.succeeded_indexes)
    needed = len(wanted) if rule.succeeded_count is None else rule.succeeded_count
    done = sum(index in succeeded for index in wanted)
    here = IndexSet(max(wanted))
    for index in wanted:
        if index in left:
            here.add(index)
    return {"succeededIndexes": here.text(), "succeededCount": needed - done}
