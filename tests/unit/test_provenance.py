"""What a run says of itself: found by what was observed, the same bytes each time, and signed."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dayfly_pool.errors import BadInput
from dayfly_pool.workflow import provenance
from dayfly_pool.workflow.facts import Artifact
from dayfly_pool.workflow.provenance import Observed, StepSeen, statement

GOLDEN = Path(__file__).parents[1] / "golden" / "provenance.json"
BEGAN = 1_795_441_200.0


def digest(letter: str) -> str:
    return letter * 64


def file(letter: str) -> Artifact:
    return Artifact(f"dayfly://default/file/sha256/{digest(letter)}", digest(letter), 10)


def tree(letter: str) -> Artifact:
    return Artifact(f"dayfly://default/tree/sha256/{digest(letter)}", digest(letter), 10)


def step(key: str, at: float, **given: Any) -> StepSeen:
    """A handler that was asked at *at*, began 10 ms later and took a second."""
    times = {"asked_at": BEGAN + at, "began_at": BEGAN + at + 0.01, "ended_at": BEGAN + at + 1.01}
    return StepSeen(**{"key": key, "body": "handler", **times, **given})


def run(*steps: StepSeen, **given: Any) -> Observed:
    whole = {
        "run": "01a207568a0279867eed885ad4045c47",
        "namespace": "default",
        "workflow": "forecast",
        "definition_sha256": digest("d"),
        "version": "0.1.0",
        "began_at": BEGAN,
        "ended_at": BEGAN + 10,
        "status": "Succeeded",
        "steps": steps,
    }
    return Observed(**{**whole, **given})


PIPELINE = run(
    step(
        "report",
        4,
        inputs={"model": file("2"), "raw": tree("1")},
        outputs={"page": file("3"), "log": file("4")},
        build_outputs=("page",),
        package_sha256=digest("a"),
        environment="science",
        environment_sha256=digest("b"),
        requirements_sha256=digest("c"),
        start="warm",
    ),
    step(
        "train[0]",
        2,
        inputs={"raw": tree("1"), "weights": file("5")},
        outputs={"model": file("2")},
        package_sha256=digest("a"),
        was_cached=True,
        cached_from="01a207568a0279867eed885ad4045c00",
    ),
    step("fetch", 0, body="script", script_sha256=digest("e"), outputs={"raw": tree("1")}),
    by="ada",
    params={"since": "2026-11-01", "rate": 0.5},
    internal={"driver": "linux", "host": {"kernel": "6.1.0", "cpus": 2}},
    logs_sha256=digest("8"),
    history_sha256=digest("9"),
)


def names(resources: Any) -> list[str]:
    return [each.name for each in resources]


def subjects(observed: Observed) -> list[str]:
    return names(statement(observed).subject)


def inputs(observed: Observed) -> list[str]:
    found = statement(observed).predicate.build_definition.resolved_dependencies
    return [each.name for each in found if "/" in each.name]


# ---- the statement ------------------------------------------------------------------------------


def test_a_statement_is_written_as_it_always_was():
    """Whoever signed the old bytes and whoever reads the new ones must mean the same."""
    written = provenance.encode(statement(PIPELINE))

    assert json.loads(written) == json.loads(GOLDEN.read_text())
    assert written == provenance.canonical(json.loads(GOLDEN.read_text()))


def test_what_was_written_is_read_as_it_was():
    written = statement(PIPELINE)

    assert provenance.decode(provenance.encode(written)) == written
    assert written.run["status"] == "Succeeded"


@given(st.permutations(PIPELINE.steps), st.permutations(["since", "rate"]))
@settings(max_examples=10)
def test_the_order_in_which_it_was_observed_changes_no_byte(steps: Any, params: list[str]):
    again = msgspec.structs.replace(
        PIPELINE, steps=tuple(steps), params={name: PIPELINE.params[name] for name in params}
    )

    assert provenance.encode(statement(again)) == provenance.encode(statement(PIPELINE))


# ---- subjects -----------------------------------------------------------------------------------


def test_outputs_that_are_marked_are_the_subjects_and_no_others():
    assert subjects(PIPELINE) == ["report/page"]


def test_without_a_mark_the_subjects_are_what_no_later_step_took_in():
    first = step("first", 0, outputs={"a": file("1"), "b": file("2")})
    second = step("second", 2, inputs={"x": file("1")}, outputs={"c": file("3")})

    assert subjects(run(first, second)) == ["first/b", "second/c"]


def test_the_names_of_outputs_mean_nothing():
    """Tekton Chains finds `*IMAGE_URL`; here an output may be called anything."""
    first = step("first", 0, outputs={"IMAGE_URL": file("1"), "x": file("2")},
                 build_outputs=("x",))  # fmt: skip

    assert subjects(run(first)) == ["first/x"]


def test_a_run_that_left_no_artifact_speaks_of_its_results():
    found = statement(run(step("add", 0), results={"sum": 3}))

    assert names(found.subject) == ["results"]
    assert found.subject != statement(run(step("add", 0), results={"sum": 4})).subject


def test_a_folder_is_not_said_to_be_a_file_of_the_same_digest():
    """The bytes of its manifest, as a file, have that sha256."""
    first = step("first", 0, outputs={"a": tree("1")})
    (subject,) = statement(run(first)).subject

    assert subject.digest == {provenance.TREE_DIGEST: digest("1")}
    assert not provenance.matches(statement(run(first)), {"sha256": digest("1")})
    assert provenance.matches(statement(run(first)), subject.digest)


def test_several_steps_that_leave_the_same_leave_one_subject():
    twins = [step(f"twin[{n}]", 0, outputs={"a": file("1")}) for n in range(3)]

    assert subjects(run(*twins)) == ["twin[0]/a"]


# ---- dependencies -------------------------------------------------------------------------------


def test_what_a_step_made_for_another_is_no_dependency():
    assert inputs(PIPELINE) == ["train[0]/weights"]


def test_what_a_step_passes_on_unchanged_came_from_outside():
    """It is the run's output and its dependency: the digest alone does not say which."""
    same = step("copy", 0, inputs={"x": file("1")}, outputs={"y": file("1")})
    after = step("after", 2, inputs={"z": file("1")}, outputs={"end": file("2")})

    assert inputs(run(same, after)) == ["copy/x"]


def test_what_was_there_at_the_moment_a_step_was_asked_for_was_made_for_it():
    """The fact that ends one step is the fact that asks for the next: their times are equal."""
    first = step("first", 0, outputs={"y": file("1")})
    second = step("second", first.ended_at - BEGAN, inputs={"x": file("1")})

    assert second.asked_at == first.ended_at
    assert inputs(run(first, second)) == []


def test_what_was_made_only_after_it_was_taken_in_came_from_outside():
    early = step("early", 0, inputs={"x": file("1")}, outputs={"y": file("2")})
    late = step("late", 5, inputs={"y": file("2")}, outputs={"x": file("1")})

    assert inputs(run(early, late)) == ["early/x"]


def test_code_environment_and_locked_requirements_are_dependencies():
    found = statement(PIPELINE).predicate.build_definition.resolved_dependencies

    digests = {each.name: each.digest.get("sha256") for each in found}
    assert [digests[name] for name in ("definition", "package", "environment", "requirements")] == [
        digest("d"), digest("a"), digest("b"), digest("c")]  # fmt: skip


def test_a_cached_step_names_the_run_that_did_it():
    found = statement(PIPELINE).predicate.build_definition.resolved_dependencies

    assert [each.uri for each in found if each.name == "cached"] == [
        "dayfly://default/runs/01a207568a0279867eed885ad4045c00"
    ]


@given(st.data())
@settings(max_examples=50)
def test_every_artifact_is_somewhere_in_the_statement(data: st.DataObject):
    """Whatever the graph: each output is a subject or a byproduct, each input came from a step
    that had ended by then or is a dependency."""
    number = data.draw(st.integers(1, 6))
    files = st.sampled_from("0123456789").map(file)
    steps = [
        step(
            f"s{n}",
            data.draw(st.integers(0, 8)),
            inputs=data.draw(st.dictionaries(st.sampled_from("xyz"), files, max_size=2)),
            outputs=data.draw(st.dictionaries(st.sampled_from("uvw"), files, max_size=2)),
        )
        for n in range(number)
    ]
    said = statement(run(*steps))
    definition, details = said.predicate.build_definition, said.predicate.run_details
    left = {each.uri for each in (*said.subject, *details.byproducts)}
    outside = {each.uri for each in definition.resolved_dependencies}

    for each in steps:
        assert {artifact.uri for artifact in each.outputs.values()} <= left
        for artifact in each.inputs.values():
            makers = [s for s in steps if artifact in s.outputs.values()]
            assert artifact.uri in outside or any(s.ended_at <= each.asked_at for s in makers)


# ---- limits -------------------------------------------------------------------------------------


def test_a_long_parameter_is_there_by_its_digest():
    said = statement(run(params={"text": "x" * provenance.PARAM_BYTES_MAX}))
    params = said.predicate.build_definition.external_parameters["params"]

    assert params["text"]["bytes"] == provenance.PARAM_BYTES_MAX + 2
    assert len(params["text"]["sha256"]) == 64


def test_steps_that_are_too_many_are_there_by_their_digest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "STEPS_MAX", 2)
    steps = [step(f"s{n}", n) for n in range(4)]
    said = statement(run(*steps))
    other = statement(run(*steps[:3], step("s3", 3, state="failed")))

    assert [each["key"] for each in said.run["steps"]] == ["s0", "s1"]
    assert said.run["stepsLeftOut"] == 2
    assert said.run == other.run
    assert said != other


def test_artifacts_between_steps_that_are_too_many_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "BYPRODUCTS_MAX", 1)
    said = statement(run(step("s", 0, outputs={n: file(n) for n in "abc"}, build_outputs=("a",))))
    found = {each.name: each for each in said.predicate.run_details.byproducts}

    assert found["artifacts"].annotations == {"number": 2}


def test_a_statement_that_is_too_large_is_refused_and_not_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(provenance, "STATEMENT_BYTES_MAX", 2000)
    said = statement(run(step("s", 0, outputs={n: file(n) for n in "abcdef"})))

    with pytest.raises(BadInput, match="isBuild"):
        provenance.encode(said)


@pytest.mark.parametrize(
    ("observed", "what"),
    [
        (run(definition_sha256=""), "definition: '' is no sha256"),
        (run(definition_sha256="D" * 64), "no sha256 in lower-case"),
        (run(logs_sha256="x"), "logs"),
        (run(step("s", 0, package_sha256="a" * 63)), "step 's': package"),
        (run(step("s", 0, script_sha256="a" * 64 + "\n")), "step 's': script"),
        (run(step("s", 0, outputs={"o": Artifact("x:y", "zz")})), "step 's': o"),
        (
            run(step("s", 0, outputs={"o": Artifact(file("1").uri, digest("2"))})),
            "is not of the digest",
        ),
        (run(step("s", 0, build_outputs=("o",))), "'o' is marked"),
        (run(step("s", 0), step("s", 1)), "same key"),
        (run(run=""), "run has 1 to"),
        (run(workflow="x" * 5000), "workflow has 1 to"),
        (run(began_at=-1.0), "Unix seconds"),
        (run(step("s", float("nan"))), "Unix seconds"),
        (run(ended_at=1e300), "Unix seconds"),
    ],
)
def test_what_cannot_be_true_is_refused_and_named(observed: Observed, what: str):
    with pytest.raises(BadInput, match=what):
        statement(observed)


def test_text_that_is_none_is_refused_where_it_is_written():
    """A lone surrogate has no UTF-8."""
    with pytest.raises(BadInput, match="written down"):
        provenance.encode(statement(run(by="\ud800")))


@pytest.mark.parametrize(
    "payload",
    [b"", b"{}", b"[]", b"\xff", b'{"_type":1}', b"[" * 100_000, b"nul", GOLDEN.name.encode()],
)
def test_what_is_no_statement_is_refused(payload: bytes):
    with pytest.raises(BadInput, match="no statement"):
        provenance.decode(payload)


def test_a_statement_of_another_kind_is_not_taken_for_provenance():
    said = json.loads(provenance.encode(statement(PIPELINE)))

    for name in ("_type", "predicateType"):
        with pytest.raises(BadInput, match=r"only https://"):
            provenance.decode(json.dumps({**said, name: "https://example.org/v1"}).encode())


def test_fields_of_a_later_version_are_passed_over():
    said = json.loads(provenance.encode(statement(PIPELINE)))

    assert provenance.decode(json.dumps({**said, "more": 1}).encode()) == statement(PIPELINE)
