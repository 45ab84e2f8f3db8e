"""Which shard has which function, by simulation: how evenly, and how many move.

    python -m bench.shards

From 1 to 100 shards and 10,000 functions: one shard joins, one leaves, one is replaced by one of
the same name. The minimum that must move is the functions of the shard that left, or an even share
for the one that came. Every gateway and shard decides for itself: those that see the same must say
the same, so that no function has two shards or none.
"""

import time
from collections import Counter

from bench import harness
from dayfly_pool.cluster.shards import Ring, first, order
from dayfly_pool.models import FunctionId

FUNCTIONS = 10_000
SIZES = (1, 2, 4, 10, 30, 100)


def main() -> None:
    """Simulate and report."""
    report = harness.Report("shards")
    functions = [FunctionId(f"team-{n % 50}/function-{n}") for n in range(FUNCTIONS)]
    joining, leaving, doubles = [], [], 0
    for size in SIZES:
        shards = [f"dayfly-pool-{n}" for n in range(size)]
        more = [*shards, f"dayfly-pool-{size}"]
        homes = {f: first(f, shards) for f in functions}
        wider = {f: first(f, more) for f in functions}
        others = {f: Ring(reversed(shards)).order(f)[0] for f in functions}
        doubles += sum(homes[f] != others[f] or homes[f] not in shards for f in functions)
        counts = Counter(homes.values())
        moved = sum(homes[f] != wider[f] for f in functions)
        its_own = sum(home == more[-1] for home in wider.values())
        joining.append(moved / (FUNCTIONS / len(more)))
        leaving.append(moved / its_own)
        started = time.perf_counter()
        for function in functions[:1000]:
            order(function, shards)
        took_s = time.perf_counter() - started
        report.row(
            f"{size} shards",
            most=round(max(counts.values()) / (FUNCTIONS / size), 3),
            least=round(min(counts.values()) / (FUNCTIONS / size), 3),
            moved_by_joining=moved,
            minimum=round(FUNCTIONS / len(more)),
            order_us=round(took_s * 1000, 2),
        )
    report.bar("functions moved by a joining shard, of the minimum", max(joining), 1.2)
    report.bar("functions moved by a leaving shard, of those it had", max(leaving), 1.2)
    report.bar("functions with two first shards, or none", doubles, 0)
    report.finish()


if __name__ == "__main__":
    main()
