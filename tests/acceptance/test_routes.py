"""Ways in that functions declare for themselves, besides /fn/NAME."""

from tests.harness import Server


def routed(server: Server, name: str, *routes: dict[str, object]) -> str:
    """A function that echoes, behind *routes*."""
    return server.deploy("echo", name, routes=routes)


def test_a_route_leads_to_its_function_with_the_parameters_of_the_path(server: Server):
    """`{one}` is one segment, `{rest+}` is all that follows."""
    routed(server, "books", {"path": "/books/{id}"}, {"path": "/files/{where+}"})

    book = server.ask("GET", "/books/7?x=1", plane="http").json()["event"]
    file = server.ask("GET", "/files/a/b/c", plane="http").json()["event"]

    assert book["pathParameters"] == {"id": "7"}
    assert book["rawPath"] == "/books/7"
    assert book["routeKey"] == "ANY /books/{id}"
    assert file["pathParameters"] == {"where": "a/b/c"}
    assert server.ask("GET", "/books/7/8", plane="http").status == 404


def test_the_more_exact_route_wins(server: Server):
    """A literal before a parameter, a host before none."""
    routed(server, "any", {"path": "/shop/{id}"})
    routed(server, "exact", {"path": "/shop/new"})
    routed(server, "hosted", {"path": "/shop/{id}", "host": "shop.test"})

    def function(path: str, host: str = "") -> str:
        headers = {"Host": host} if host else {}
        reply = server.ask("GET", path, headers=headers, plane="http").json()
        return str(reply["context"]["function_name"])

    assert function("/shop/1") == "any"
    assert function("/shop/new") == "exact"
    assert function("/shop/1", "shop.test") == "hosted"
    assert function("/shop/1", "SHOP.test:8080") == "hosted"


def test_a_method_that_a_route_does_not_take_is_405_and_says_which_it_does(server: Server):
    """With an Allow header, as RFC 9110 wants it."""
    routed(server, "methods", {"path": "/only", "methods": ["GET", "PUT"]})

    refused = server.ask("DELETE", "/only", plane="http")

    assert server.ask("GET", "/only", plane="http").status == 200
    assert refused.status == 405
    assert set(refused.headers["Allow"].replace(" ", "").split(",")) == {"GET", "PUT"}
    assert refused.headers["Content-Type"] == "application/problem+json"


def test_a_route_that_another_function_has_is_refused_and_nothing_changes(server: Server):
    """The first keeps it; the second is not deployed."""
    routed(server, "owner", {"path": "/mine/{x}"})
    whole = server.describe("owner")["spec"] | {"env": {}}

    refused = server.ask("PUT", "/namespaces/default/functions/thief", whole)

    assert refused.status == 400
    assert "owner" in refused.json()["detail"]
    assert server.ask("GET", "/namespaces/default/functions/thief").status == 404
    reply = server.ask("GET", "/mine/1", plane="http").json()
    assert reply["context"]["function_name"] == "owner"


def test_a_route_where_the_server_itself_answers_is_refused_and_nothing_is_deployed(
    server: Server,
):
    """It would never be called, and nobody would know why."""
    routed(server, "plain", {"path": "/plain"})
    spec = server.describe("plain")["spec"] | {"env": {}, "routes": [{"path": "/invocations/{id}"}]}

    refused = server.ask("PUT", "/namespaces/default/functions/shadowed", spec)

    assert refused.status == 400
    assert "/invocations is the server's own" in refused.json()["detail"]
    assert server.ask("GET", "/namespaces/default/functions/shadowed").status == 404


def test_the_routes_of_a_deleted_function_lead_nowhere(server: Server):
    """And are free for another."""
    routed(server, "gone", {"path": "/for-now"})
    server.delete("gone")

    assert server.ask("GET", "/for-now", plane="http").status == 404
    routed(server, "next", {"path": "/for-now"})
    assert server.ask("GET", "/for-now", plane="http").status == 200
