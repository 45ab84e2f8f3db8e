"""Nothing crosses from one function to another: not state, not leftovers, not randomness."""

from collections import Counter

from tests.harness import Server, together


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


def test_no_two_sandboxes_share_a_random_stream_or_a_memory_layout(server: Server):
    """Twelve fingerprints of twelve sandboxes: all different in each."""
    names = [server.deploy("fingerprint", f"finger-{i}") for i in range(12)]

    prints = [reply.json() for reply in together(12, lambda i: server.invoke(names[i]))]

    assert {trait: len({p[trait] for p in prints}) for trait in prints[0]} == dict.fromkeys(
        prints[0], 12
    )
    for name in names:
        server.delete(name)


def test_a_new_version_starts_with_nothing_of_the_old(server: Server):
    """The same function's own leftovers end with the version that left them."""
    name = server.deploy("leaves_things", "evolving")
    server.call(name)
    server.deploy("finds_things", "evolving")

    assert server.invoke(name).json() == []
