"""What the tests of files share."""

from functools import partial

import pytest
from calls import fail


@pytest.fixture
def failing(monkeypatch):
    """``failing(fault, names)``: each call of these names first calls `fault` with its name."""
    yield partial(fail, monkeypatch)
    monkeypatch.undo()
