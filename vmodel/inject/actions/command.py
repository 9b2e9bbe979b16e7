"""Actions on completions, and on requests to an IOMMU."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import model_validator

from vmodel.errors import IommuError
from vmodel.inject.action import Action, Injection
from vmodel.inject.quantity import Number
from vmodel.points import Point


class Complete(Action, name="complete"):
    """Changes the id, status or length of a completion."""

    id: Number | None = None
    status: Number | None = None
    length: Number | None = None
    points: ClassVar[frozenset[Point]] = frozenset((Point.COMPLETION,))

    @model_validator(mode="after")
    def _sound(self) -> Complete:
        if self.id is None and self.status is None and self.length is None:
            raise ValueError("must name a field to change, as complete(status=1)")
        return self

    def run(self, at: Injection) -> bytes:
        event = at.event
        fields = {key: value for key, value in self.model_dump().items() if value is not None}
        at.before = " ".join(f"{key}={getattr(event, key)}" for key in fields)
        at.after = " ".join(f"{key}={value}" for key, value in fields.items())
        return at.proceed(replace(event, **fields))


_ERRORS = {"inval": errno.EINVAL, "range": errno.ERANGE, "noent": errno.ENOENT, "nomem": errno.ENOMEM}


class Fail(Action, name="fail"):
    """The request fails: "nomem" (ENOMEM), "inval" (EINVAL), "range" (ERANGE) or "noent" (ENOENT)."""

    why: Literal["nomem", "inval", "range", "noent"] = "nomem"
    points: ClassVar[frozenset[Point]] = frozenset((Point.IOMMU_MAP, Point.IOMMU_UNMAP))

    def run(self, at: Injection) -> bytes:
        at.result = self.why
        raise IommuError(_ERRORS[self.why], f"by rule {at.rule}")
