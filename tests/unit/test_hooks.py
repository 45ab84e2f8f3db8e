"""What user code asks to be called around a fork: kept in order, and its functions left as is."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

import dayfly
from dayfly import hooks
from dayfly.__main__ import _run
from dayfly.loader import LoadFailure

CODE = "/code"
REGISTER: list[tuple[Callable[[Any], Any], list[Callable[[], Any]]]] = [
    (dayfly.before_zygote, hooks.before),
    (dayfly.after_fork, hooks.after),
]


@pytest.fixture(autouse=True)
def none_before() -> Iterator[None]:
    """The lists are the process's."""
    assert (hooks.before, hooks.after) == ([], [])
    yield
    hooks.before.clear()
    hooks.after.clear()


@pytest.mark.parametrize(("register", "registered"), REGISTER, ids=["before", "after"])
def test_hooks_are_called_in_the_order_of_their_registration(
    register: Callable[[Any], Any], registered: list[Callable[[], Any]]
):
    """And one that is registered twice is called twice: nobody counts them."""
    called: list[int] = []
    first, second = lambda: called.append(1), lambda: called.append(2)
    for hook in (first, second, first):
        register(hook)
    _run(registered, CODE)

    assert called == [1, 2, 1]
    assert hooks.before + hooks.after == registered


@pytest.mark.parametrize(("register", "registered"), REGISTER, ids=["before", "after"])
def test_registering_calls_nothing_and_leaves_the_function_what_it_was(
    register: Callable[[Any], Any], registered: list[Callable[[], Any]]
):
    """So that it can be a decorator of what is called by others too."""
    called: list[int] = []

    @register
    def hook() -> None:
        called.append(1)

    assert called == []
    assert registered == [hook]
    hook()
    assert called == [1]


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(1), KeyboardInterrupt("no")])
def test_a_hook_that_raises_is_told_as_an_import_that_failed(error: BaseException):
    """With its traceback, and what comes after it is not called."""
    called: list[int] = []

    def broken() -> None:
        raise error

    with pytest.raises(LoadFailure) as raised:
        _run([lambda: called.append(1), broken, lambda: called.append(3)], CODE)

    assert raised.value.kind == "ImportFailed"
    assert type(error).__name__ in raised.value.message
    assert called == [1]


def test_what_a_function_imports_of_dayfly_is_what_the_guest_calls():
    """Not a copy: user code finds `dayfly` in the interpreter that runs it."""
    module: ModuleType = sys.modules["dayfly"]

    assert module.before_zygote is hooks.before_zygote
    assert module.after_fork is hooks.after_fork
    assert {"before_zygote", "after_fork"} <= set(module.__all__)
