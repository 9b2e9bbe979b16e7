"""Ctrl-C while a library is at work that replaces exceptions by its own."""

from __future__ import annotations

import os
import signal
import time

import pytest
from pydantic import BaseModel, field_serializer

from vmodel.interrupts import interruptible
from vmodel.patience import patience


class Content(BaseModel):
    """Ctrl-C comes while it is serialized, in Python code that pydantic calls, as that of a path's text."""

    path: str

    @field_serializer("path")
    def _interrupted(self, value: str) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(patience(10))
        return value


def test_an_interrupt_that_pydantic_replaces_is_raised_as_itself() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), interruptible():
            Content(path="a").model_dump(mode="json")
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_errors_stay_what_they_are_whatever_they_say() -> None:
    with pytest.raises(ValueError, match="KeyboardInterrupt"), interruptible():
        raise ValueError("KeyboardInterrupt")
