"""Every example in the client's docstrings, run against a live server."""

import asyncio
import doctest
import importlib
import pkgutil
from collections.abc import Iterator

import pytest
from fake_server import Fake, serving

import errata.client
from errata.client import Errata

MODULES = [
    "errata.client",
    *(f"errata.client.{module.name}" for module in pkgutil.iter_modules(errata.client.__path__)),
]


def _examples() -> Iterator[doctest.DocTest]:
    for name in MODULES:
        found = doctest.DocTestFinder().find(importlib.import_module(name))
        yield from (test for test in found if test.examples)


EXAMPLES = {test.name: test for test in _examples()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_does_what_it_says(name: str, astana: object, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Fake()) as address, Errata(address) as client:
        test = EXAMPLES[name]
        public = {each: getattr(errata.client, each) for each in errata.client.__all__}
        test.globs = {**test.globs, **public, "client": client, "server": address, "astana": astana, "asyncio": asyncio}
        runner = doctest.DocTestRunner()
        runner.run(test, clear_globs=False)
    assert runner.failures == 0, capsys.readouterr().out
    assert runner.tries == len(test.examples)


def test_both_clients_and_what_they_return_have_examples() -> None:
    owners = {name.rpartition(".")[2] for name in EXAMPLES}
    assert {"Errata", "AsyncErrata", "Operation", "TextStream", "edit", "trace", "evaluate", "generate"} <= owners


def test_everything_public_is_exported_once_and_in_order() -> None:
    assert errata.client.__all__ == sorted(set(errata.client.__all__))
