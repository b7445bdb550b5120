"""A store, and what makes it fail."""

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from sclong_ds.tracking import client as client_module
from sclong_ds.tracking import sender as mlflow_store
from sclong_ds.tracking import tracker as tracking


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}"


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The test's own log; a healthy store must leave no warning in it."""
    with caplog.at_level(logging.WARNING, logger="sclong_ds"):
        yield caplog
    assert not [r for r in caplog.records if r.name.startswith("sclong_ds")]


class FlakyClient:
    """The real client, whose calls fail while `switch.down` is set."""

    def __init__(self, client: Any, switch: SimpleNamespace) -> None:
        self._client = client
        self._switch = switch

    def __getattr__(self, name: str) -> Any:
        if self._switch.down:
            self._switch.refused += 1
            raise ConnectionError("the server is down")
        return getattr(self._client, name)


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    state = SimpleNamespace(down=False, refused=0)
    real = client_module.new_client
    monkeypatch.setattr(mlflow_store, "new_client", lambda uri, **_: FlakyClient(real(uri), state))
    monkeypatch.setattr(tracking, "_RETRY_AFTER_S", 0.0)
    return state
