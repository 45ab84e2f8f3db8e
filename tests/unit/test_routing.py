"""Host, path and method to function: the more exact route wins, whatever the order."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dayfly_gateway.routing import Match, MethodNotAllowed, Routes, checked
from dayfly_pool.errors import BadInput, FunctionNotFound
from dayfly_pool.models import FunctionId, Route

ONE, TWO, THREE = FunctionId("default/one"), FunctionId("default/two"), FunctionId("default/three")


def route(path: str, *methods: str, host: str = "") -> Route:
    return Route(path=path, host=host, methods=methods)


def found(routes: Routes, path: str, method: str = "GET", host: str = "localhost") -> FunctionId:
    return routes.match(host, path, method).function


# ---- by name ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "function", "below"),
    [
        ("/fn/greet", "default/greet", "/"),
        ("/fn/greet/", "default/greet", "/"),
        ("/fn/greet/a/b", "default/greet", "/a/b"),
        ("/fn/greet//a", "default/greet", "//a"),
        ("/fn/greet/%2e%2e", "default/greet", "/%2e%2e"),
        ("/ns/team/fn/greet", "team/greet", "/"),
        ("/ns/team/fn/greet/a", "team/greet", "/a"),
    ],
)
def test_every_function_answers_at_its_name(path: str, function: str, below: str):
    """The function sees what is behind its name, as it was sent."""
    assert Routes().match("localhost", path, "GET") == Match(FunctionId(function), below)


@pytest.mark.parametrize("path", ["/", "", "/fn", "/fn/", "/fnord", "/ns/team", "/ns/team/greet",
                                  "/ns/team/fn/", "/other", "fn/greet"])  # fmt: skip
def test_a_path_that_names_no_function_is_not_found(path: str):
    with pytest.raises(FunctionNotFound):
        Routes().match("localhost", path, "GET")


# ---- declared -----------------------------------------------------------------------------------


def test_a_declared_route_tells_its_parameters():
    """The function sees the whole path, the route's text and the parameters by name."""
    routes = Routes([(ONE, route("/users/{id}/files/{rest+}", "GET", "POST"))])

    assert routes.match("localhost", "/users/7/files/a/b.txt", "POST") == Match(
        ONE,
        "/users/7/files/a/b.txt",
        "GET,POST /users/{id}/files/{rest+}",
        {"id": "7", "rest": "a/b.txt"},
    )


def test_a_route_for_every_method_is_called_any():
    assert Routes([(ONE, route("/x"))]).match("h", "/x", "PATCH").route == "ANY /x"


EXACT_FIRST = [
    (ONE, route("/users/me")),
    (TWO, route("/users/{id}")),
    (THREE, route("/{rest+}")),
]


@pytest.mark.parametrize("order", list(itertools.permutations(EXACT_FIRST)))
def test_the_more_exact_route_wins_in_every_order_of_declaration(
    order: tuple[tuple[FunctionId, Route], ...],
):
    """Segment by segment: a literal before {one} before {rest+}."""
    routes = Routes(order)

    assert found(routes, "/users/me") == ONE
    assert found(routes, "/users/you") == TWO
    assert found(routes, "/users/you/files") == THREE
    assert found(routes, "/other") == THREE


def test_a_literal_that_leads_nowhere_does_not_hide_a_parameter():
    """The first segment fits both; only one of them goes on."""
    routes = Routes([(ONE, route("/users/list")), (TWO, route("/{kind}/all"))])

    assert found(routes, "/users/all") == TWO


def test_a_route_with_a_host_wins_over_one_without():
    routes = Routes([(ONE, route("/x")), (TWO, route("/x", host="API.example.com"))])

    assert found(routes, "/x", host="api.example.com") == TWO
    assert found(routes, "/x", host="API.EXAMPLE.COM:8080") == TWO
    assert found(routes, "/x", host="other.example.com") == ONE
    assert found(routes, "/x", host="") == ONE


def test_a_host_without_the_path_falls_back_to_routes_for_every_host():
    routes = Routes([(ONE, route("/x")), (TWO, route("/y", host="example.com"))])

    assert found(routes, "/x", host="example.com") == ONE


@pytest.mark.parametrize("host", ["[::1]", "[::1]:8080"])
def test_an_ipv6_host_is_compared_without_its_port(host: str):
    assert found(Routes([(ONE, route("/x", host="[::1]"))]), "/x", host=host) == ONE


@pytest.mark.parametrize("order", [1, -1])
def test_a_route_for_the_method_wins_over_one_for_every_method(order: int):
    """As on AWS, where GET wins over ANY; not the one that was declared first."""
    routes = Routes([(ONE, route("/x")), (TWO, route("/x", "GET"))][::order])

    assert found(routes, "/x", "GET") == TWO
    assert found(routes, "/x", "POST") == ONE


def test_a_declared_route_wins_over_a_name():
    assert found(Routes([(ONE, route("/fn/two"))]), "/fn/two") == ONE


def test_a_method_that_no_route_takes_is_told_which_are():
    """405 with Allow, and not 404: the thing is there."""
    routes = Routes([(ONE, route("/x", "PUT", "GET")), (TWO, route("/x", "POST"))])

    with pytest.raises(MethodNotAllowed) as raised:
        routes.match("localhost", "/x", "DELETE")
    assert raised.value.fields == {"allow": "GET, POST, PUT"}


def test_another_route_that_takes_the_method_is_found_behind_one_that_does_not():
    routes = Routes([(ONE, route("/x", "GET")), (TWO, route("/{any}", "POST"))])

    assert found(routes, "/x", "POST") == TWO


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (route("/x"), route("/x")),
        (route("/{a}"), route("/{b}")),
        (route("/{a+}"), route("/{b+}")),
        (route("/x", "GET", "POST"), route("/x", "POST")),
        (route("/x", host="a.b"), route("/x", host="A.B")),
    ],
)
def test_two_functions_cannot_have_the_same_route(first: Route, second: Route):
    """The second is refused by name; the first is not touched."""
    alone, both = Routes([(ONE, first)]), Routes([(ONE, first), (TWO, second)])

    ((function, clash),) = both.clashes
    assert function == TWO
    assert "already belongs to default/one" in clash
    assert alone.clashes == set()
    assert repr(alone._hosts) == repr(both._hosts)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (route("/x", "GET"), route("/x", "POST")),
        (route("/x", host="a.b"), route("/x")),
        (route("/{a}"), route("/{a+}")),
        (route("/x"), route("/x/")),
    ],
)
def test_routes_that_differ_may_belong_to_two_functions(first: Route, second: Route):
    Routes([(ONE, first), (TWO, second)])


def test_one_function_may_declare_a_route_twice():
    assert found(Routes([(ONE, route("/x")), (ONE, route("/x"))]), "/x") == ONE


@pytest.mark.parametrize(
    "path",
    ["/a{b}", "/{}", "/{a", "/a}", "/{a-b}", "/{1a}", "/{a}/{a}", "/{a+}/b", "/{a}{b}", "/{a++}",
     "/x/{a+}/{b+}", "/{a }", "/{a}\n"],
)  # fmt: skip
def test_a_malformed_route_is_refused(path: str):
    with pytest.raises(BadInput, match="route"):
        Routes([(ONE, route(path))])


@pytest.mark.parametrize(
    "path",
    [
        "/invocations",
        "/invocations/",
        "/invocations/{id}",
        "/events",
        "/events/x",
        "/hooks/{name+}",
    ],
)
def test_a_route_where_the_server_itself_answers_is_refused(path: str):
    """On every host: no request would ever reach its function."""
    for host in ("", "example.com"):
        with pytest.raises(BadInput, match="the server's own"):
            checked([route("/x"), route(path, host=host)])


@pytest.mark.parametrize(
    "path", ["/", "/{rest+}", "/{a}/{b}", "/v1/events", "/eventsource", "/fn/x"]
)
def test_a_route_that_only_looks_like_one_of_the_servers_is_none(path: str):
    checked([route(path)])


# ---- odd requests -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/users", "/users/", "/users//", "/users/7/"])
def test_a_parameter_is_one_segment_that_is_not_empty(path: str):
    routes = Routes([(ONE, route("/users/{id}"))])

    with pytest.raises(FunctionNotFound):
        routes.match("localhost", path, "GET")


SEGMENTS = st.lists(st.sampled_from(["a", "b", "{x}", "{y+}"]), min_size=1, max_size=4)


@given(st.lists(SEGMENTS, max_size=6), st.lists(st.sampled_from("abc"), min_size=1, max_size=5))
def test_matching_agrees_with_trying_every_route(paths: list[list[str]], wanted: list[str]):
    """The tree finds what the rules say: the best route by segments, of all that fit."""
    functions: dict[str, list[str]] = {}
    for path in paths:
        names = [
            f"{{p{at}{'+' if '+' in s else ''}}}" if "{" in s else s for at, s in enumerate(path)
        ]
        shape = "/" + "/".join(names)
        is_last = all("+" not in segment for segment in path[:-1])
        if is_last and shape not in functions:
            functions[shape] = path
    declared = [(FunctionId(f"default/f{n}"), route(shape)) for n, shape in enumerate(functions)]
    fitting = [
        (rank, id_)
        for (id_, _), path in zip(declared, functions.values(), strict=True)
        if (rank := fit(path, wanted)) is not None
    ]
    routes = Routes(declared)
    path = "/" + "/".join(wanted)

    if fitting:
        assert found(routes, path) == min(fitting)[1]
    else:
        with pytest.raises(FunctionNotFound):
            found(routes, path)


def fit(path: list[str], wanted: list[str]) -> list[int] | None:
    """How exactly *path* fits, segment by segment, the smaller the better; None if not at all."""
    rank = []
    for at, segment in enumerate(path):
        if at >= len(wanted):
            return None
        if "+" in segment:
            return [*rank, 2]
        if segment not in ("{x}", wanted[at]):
            return None
        rank.append(0 if segment == wanted[at] else 1)
    return rank if len(path) == len(wanted) else None


def test_a_path_as_deep_as_can_be_declared_is_matched():
    """512 segments: the walk must not run out of stack."""
    path = "/a" * 512

    assert found(Routes([(ONE, route(path))]), path) == ONE
