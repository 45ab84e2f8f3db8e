"""A workflow run here and now, in one process: for its author's tests, and nothing durable.

Steps run one after the other, each once: retries, timeouts, caches and isolation are the
server's. Timers are over at once. Scripts, tasks, functions, callbacks and approvals need a server,
and say so.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import tempfile

from dayfly import calls, graphs, steps
from dayfly.graphs import Condition, Each, Graph, Handle, Node, Text
from dayfly.steps import OUTPUT, GraphError, Workflow

TYPE_CHECKING = False  # see `record`
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any


class _Skipped(Exception):
    """A value is not there, for its step was skipped."""


def run(flow: Workflow, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the workflow's function returns, with the values in place of handles.

    None stands for what skipped steps would have left. Outputs lie in a temporary folder, which is
    left for the test to look into.
    """
    import inspect

    bound = inspect.signature(flow.func).bind(*args, **kwargs)
    bound.apply_defaults()
    return _Rehearsal(calls.graph_of(flow), bound.arguments).run()


class _Rehearsal:
    def __init__(self, graph: Graph, params: Mapping[str, Any]) -> None:
        self.graph, self.params = graph, params
        self.folder = tempfile.mkdtemp(prefix="dayfly-")
        self.values: dict[Node, Any] = {}
        self.outputs: dict[Node, Any] = {}
        self.failed = False

    def run(self) -> Any:
        """All steps, then those of finally, then what was returned."""
        try:
            self._run([node for node in self.graph.nodes if not node.is_final])
        except BaseException:
            self.failed = True
            raise
        finally:
            self._run([node for node in self.graph.nodes if node.is_final])
        return self._returned(self.graph.returned)

    def _returned(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._returned(item) for key, item in value.items()}
        try:
            return self.resolve(value)
        except _Skipped:
            return None

    def _run(self, waiting: list[Node]) -> None:
        done = {node for node in self.graph.nodes if node not in waiting}
        while waiting:
            ready = next((n for n in waiting if self._needed(n) <= done), None)
            if ready is None:
                raise GraphError(
                    f"steps wait for one another: {', '.join(n.name for n in waiting)}"
                )
            self._step(ready)
            done.add(ready)
            waiting.remove(ready)

    def _needed(self, node: Node) -> set[Node]:
        handles = [*graphs.handles([node.params, node.inputs, node.matrix])]
        handles += [handle for condition in node.when for handle in _taken(condition)]
        needed = {handle._node for handle in handles if handle._node is not None}
        return needed | {other for other in node.after if isinstance(other, Node)}

    def _step(self, node: Node) -> None:
        try:
            if not all(_condition(given).holds(self.resolve) for given in node.when):
                return
            given = {**self.resolve(node.params), **self._inputs(node), **self._workspaces(node)}
            if not node.matrix:
                self.values[node], self.outputs[node] = self._call(node, given, "0")
                return
            matrix = self.resolve(node.matrix)
            runs = calls.combinations(matrix.get("params", {}), matrix.get("include", ()))
            ends = [self._call(node, {**given, **r}, str(n)) for n, r in enumerate(runs)]
            self.values[node] = [value for value, _ in ends]
            names = ends[0][1] if ends else {}
            self.outputs[node] = {name: [outputs[name] for _, outputs in ends] for name in names}
        except _Skipped:
            return
        except Exception:
            if node.options.get("onError") != "continue":
                raise

    def _inputs(self, node: Node) -> dict[str, Any]:
        over = node.matrix.get("params", {})
        return self.resolve({k: v for k, v in node.inputs.items() if k not in over})  # type: ignore[no-any-return]

    def _workspaces(self, node: Node) -> dict[str, Any]:
        from pathlib import Path

        found = {name: Path(self.folder, "workspaces", of) for name, of in node.workspaces.items()}
        for path in found.values():
            path.mkdir(parents=True, exist_ok=True)
        return found

    def _call(
        self, node: Node, given: Mapping[str, Any], number: str
    ) -> tuple[Any, dict[str, Any]]:
        """(what it returned, its outputs by name)."""
        if "wait" in node.body and "timer" in node.body["wait"]:
            return None, {}
        if isinstance(node.local, Workflow):
            return run(node.local, (), given), {}
        if node.local is None:
            raise GraphError(
                f"step {node.name!r} is a {next(iter(node.body))}, which needs a server: test the "
                "steps by themselves, or run the workflow with `dayfly run start`"
            )
        folder, before = os.path.join(self.folder, node.name, number), dict(steps._folders)
        os.makedirs(folder)
        steps._folders["out"] = folder
        try:
            value = node.local(**given)
            if hasattr(value, "__await__"):
                value = asyncio.run(_awaited(value))
            if node.is_artifact and os.path.abspath(value) != (at := os.path.join(folder, OUTPUT)):
                shutil.move(value, at)
            outputs = {name: steps.out(name) for name in node.outputs or ()}
        finally:
            steps._folders.clear()
            steps._folders.update(before)
        return value, outputs

    def resolve(self, value: Any) -> Any:
        """*value* with what its handles stand for."""
        if isinstance(value, Each):
            return self.resolve(value.handle)
        if isinstance(value, Handle):
            return self._resolved(value)
        if isinstance(value, Text):
            return self._text(value)
        if isinstance(value, dict):
            return {key: self.resolve(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.resolve(item) for item in value]
        return value

    def _text(self, value: Text) -> Any:
        written = "".join([part for part in value.parts if isinstance(part, str)])
        if re.search(graphs.REFERENCE, written):
            raise GraphError(f"text({written!r}): references in text need a server: give handles")
        resolved = [self.resolve(part) for part in value.parts]
        return "".join([p if isinstance(p, str) else graphs._json(p) for p in resolved])

    def _resolved(self, handle: Handle) -> Any:
        node, pieces = handle._node, handle._pieces
        if node is None and handle._field == "status":
            return "Failed" if self.failed else "Succeeded"
        if node is None:
            value, pieces = self.params[pieces[0]], pieces[1:]
        elif handle._field == "status":
            return "Succeeded" if node in self.values else "None"
        elif node not in self.values:
            raise _Skipped
        elif handle._field == "outputs":
            name, pieces = handle._named_piece(node)
            value = self.outputs[node][name]
        else:
            value = self.values[node]
            if pieces[:1] == (graphs.RESULT,) and not node.is_named:
                pieces = pieces[1:]
            if node.matrix and pieces and isinstance(pieces[0], str):
                value, pieces = [each[pieces[0]] for each in value], pieces[1:]
        for piece in pieces:
            value = value[piece]
        return value


def _condition(given: Any) -> Condition:
    if not isinstance(given, Condition):
        raise GraphError(f"the condition {given!r} needs a server: compare handles")
    return given


def _taken(condition: Any) -> Iterator[Handle]:
    if isinstance(condition, Condition):
        yield from _taken(condition.left)
        yield from _taken(condition.right)
    else:
        yield from graphs.handles(condition)


async def _awaited(value: Any) -> Any:
    return await value
