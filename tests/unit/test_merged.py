"""What a gateway makes of what several shards say."""

from typing import Any

from dayfly_gateway.proxy import lies_in_one, merged_triggers


def view(name: str, **status: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "default", "name": name}, "status": status}


def test_a_trigger_is_shown_as_the_shard_says_that_runs_it():
    """Whichever was asked first."""
    runs = view("t", source="nats", updated=7.5, up=True, lag=None, lastError="", fetched=3)
    other = view("t", source="nats", updated=7.5)

    assert merged_triggers([[runs], [other]]) == [runs]
    assert merged_triggers([[other], [runs]]) == [runs]


def test_what_was_sent_to_several_shards_is_added_up():
    told = [
        [view("hook", source="webhook", fetched=2)],
        [view("hook", source="webhook", fetched=5)],
    ]

    assert merged_triggers(told) == [view("hook", source="webhook", fetched=7)]


def test_what_only_one_shard_has_heard_of_is_there():
    told = [[view("b", up=True)], [], [view("a"), view("b")]]

    assert merged_triggers(told) == [view("a"), view("b", up=True)]


def test_a_failure_is_shown_though_the_other_shard_knows_of_none():
    told = [[view("c", fired=0, lastError="")], [view("c", fired=4, lastError="no such function")]]

    assert merged_triggers(told) == [view("c", fired=4, lastError="no such function")]


def test_an_artifact_is_looked_for_in_every_shard_and_a_run_is_not():
    """Runs, and whatever else is declared or written down, every shard knows."""
    assert lies_in_one("/namespaces/default/artifacts/file/0123")
    assert not lies_in_one("/namespaces/artifacts/runs/artifacts")
    assert not lies_in_one("/namespaces/default/functions/artifacts")
