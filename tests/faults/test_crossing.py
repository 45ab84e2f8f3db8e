"""Nothing crosses from one function to another: not state, not leftovers, not randomness."""

from collections import Counter
from typing import Any

from tests.harness import Server, eventually, together


def test_what_one_function_leaves_no_other_finds(server: Server):
    """Planted wherever it can write, and in its interpreter; sought by neighbours, old and new."""
    finder = server.deploy("finds_things")
    assert server.invoke(finder).json() == []
    leaver = server.deploy("leaves_things")

    left = server.call(leaver).body.decode().split(" ")
    while_it_lives = server.invoke(finder).json()
    server.delete(leaver)
    after = server.invoke(server.deploy("finds_things", "finder-2")).json()

    assert "/tmp/left-behind" in left
    assert "abstract" in left
    assert not [path for path in left if path.startswith(("/code", "/packages", "/dayfly", "/var"))]
    assert while_it_lives == []
    assert after == []


def test_a_sandbox_is_one_function_for_all_its_life(server: Server):
    """Also for two functions of the very same code: each instance has served one name only."""
    names = [server.deploy("instance", f"twin-{i}") for i in range(4)]

    instances = {name: {server.call(name).json()["instance"] for _ in range(3)} for name in names}
    counts = Counter(instance for seen in instances.values() for instance in seen)

    assert set(counts.values()) == {1}


LAYOUT = {"hash", "canary", "heap", "stack", "libc", "object"}
"""What the sandboxes of one zygote have in common: its address space and its hash secret."""


def distinct(server: Server, number: int, **spec: Any) -> Counter[str]:
    """How many different values each trait has in that many sandboxes of one namespace."""
    names = [server.deploy("fingerprint", f"finger-{i}", **spec) for i in range(number)]
    prints = [r.json() for r in together(number, lambda i: server.invoke(names[i]))]
    for name in names:
        server.delete(name)
    return Counter({trait: len({p[trait] for p in prints}) for trait in prints[0]})


def test_no_two_started_sandboxes_share_a_random_stream_or_a_memory_layout(server: Server):
    """Twelve fingerprints of twelve sandboxes: all different in each."""
    assert set(distinct(server, 12, isolation="exec").values()) == {12}


def test_forked_sandboxes_share_a_memory_layout_and_no_random_stream(server: Server):
    """What SPECIFICATION.md lists as shared within a tenant, and nothing else."""
    found = distinct(server, 200)

    assert {trait for trait, number in found.items() if number < 200} <= LAYOUT
    assert all(number == 200 for trait, number in found.items() if trait not in LAYOUT)


def test_two_tenants_share_nothing_though_both_fork(server: Server):
    """Each namespace has zygotes of its own: no value of one's is ever the other's."""
    prints: dict[str, list[dict[str, Any]]] = {}
    for where in ("north", "south"):
        names = [server.deploy("fingerprint", f"finger-{i}", namespace=where) for i in range(100)]
        eventually(lambda where=where: server.has_zygote(where))
        found = together(
            100, lambda i, where=where, names=names: server.invoke(names[i], namespace=where)
        )
        prints[where] = [response.json() for response in found]
    for trait in prints["north"][0]:
        north, south = ({p[trait] for p in prints[name]} for name in ("north", "south"))

        assert not north & south, trait
    for where in prints:
        for i in range(100):
            server.ask("DELETE", f"/namespaces/{where}/functions/finger-{i}")


def test_a_new_version_starts_with_nothing_of_the_old(server: Server):
    """The same function's own leftovers end with the version that left them."""
    name = server.deploy("leaves_things", "evolving")
    server.call(name)
    server.deploy("finds_things", "evolving")

    assert server.invoke(name).json() == []
