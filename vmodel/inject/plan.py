"""Plans: a seed and rules.  A rule has a point, a predicate, a schedule and an action.

```toml
seed = 7

[[rule]]
name = "torn"
point = "dma.write"
device = "edu0"
nth = 3
do = "partial(8)"

[heal]
after = "20s"
```
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SkipValidation,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from vmodel.config_file import parse_toml, read_text
from vmodel.errors import ConfigError
from vmodel.inject.action import Action
from vmodel.inject.action_text import parse
from vmodel.inject.actions import ACTIONS
from vmodel.inject.predicate import Match
from vmodel.inject.quantity import Flag, Number, Numbers, Seconds
from vmodel.inject.schedule import Schedule
from vmodel.mistakes import explain
from vmodel.points import Point


def _do_schema() -> dict[str, Any]:
    tables = []
    for name, kind in sorted(ACTIONS.items()):
        schema = kind.model_json_schema()
        properties = {"action": {"const": name}, **schema.get("properties", {})}
        tables.append({**schema, "properties": properties, "required": ["action", *schema.get("required", [])]})
    text = "one of " + ", ".join(kind.usage() for _, kind in sorted(ACTIONS.items()))
    return {"anyOf": [{"type": "string", "description": text}, *tables]}


Do = Annotated[
    SkipValidation[Action],
    BeforeValidator(parse),
    PlainSerializer(str),
    WithJsonSchema(_do_schema()),
]


def _match(value: object) -> object:
    """An event of `between` or `on`: a table, or only the point's name."""
    return {"point": value} if isinstance(value, str) else value


def _also_text(schema: dict[str, Any]) -> None:
    """Adds the short form to a JSON schema: an event as its point's name."""
    schema["anyOf"] += [{"type": "string"}, {"type": "array", "items": {"type": ["string", "object"]}}]


def _pair(value: object) -> object:
    if isinstance(value, str) and value.startswith("["):  # what `Rule.text` writes of events with keys
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    elif isinstance(value, str):
        first, dots, second = value.partition("..")
        value = (first, second) if dots else value
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError('must be two events, as [{ point = "irq" }, { point = "reset" }] or "irq..reset"')
    return tuple(_match(part) for part in value)


class Rule(Match):
    """One rule of a plan: `Match` selects events, the schedule selects among those, and `do` is the action."""

    name: str = Field(default="", examples=['"torn"'], max_length=60, description="for the log; seeds its generator")
    do: Do = Field(examples=['"drop"'], description="the action")

    nth: Numbers | None = Field(default=None, examples=["3"], description="only these events, counted from 1")
    every: Annotated[Number | None, Field(ge=1)] = Field(
        default=None, examples=["10"], description="only each event whose number is a multiple of it"
    )
    first: Annotated[Number | None, Field(ge=1)] = Field(
        default=None, examples=["5"], description="only this many events, the first ones"
    )
    probability: float | None = Field(
        default=None, ge=0, le=1, examples=["0.01"], description="of each event, from 0 to 1"
    )
    after: Seconds = Field(default=0.0, examples=['"2s"'], description="since the plan was armed")
    until: Seconds | None = Field(default=None, examples=['"10s"'], description="since the plan was armed")
    between: Annotated[tuple[Match, Match] | None, BeforeValidator(_pair)] = Field(
        default=None,
        examples=['["irq", "reset"]'],
        description="only after the first event and before the second",
        json_schema_extra=_also_text,
    )
    once: Flag = Field(default=False, examples=["true"], description="at most one time")
    times: Annotated[Number | None, Field(ge=1)] = Field(default=None, examples=["3"], description="at most")
    duration: Seconds | None = Field(
        default=None, examples=['"5s"'], description="since it first fired; then the rule ends"
    )

    @model_validator(mode="after")
    def _sound(self) -> Rule:
        if self.point not in self.do.points:
            known = ", ".join(point.value for point in Point if point in self.do.points)
            raise ValueError(f"do: {self.do.name} does not work at {self.point.value}, only at {known}")
        if self.nth is not None and 0 in self.nth:
            raise ValueError("nth: the first event is 1")
        if self.until is not None and self.until <= self.after:
            raise ValueError("until: must be later than after")
        if self.once and self.times not in (None, 1):
            raise ValueError("times: once = true means 1")
        return self

    @property
    def schedule(self) -> Schedule:
        """The rule's schedule: at which of the matching events it fires."""
        return Schedule(
            self.nth or (),
            self.every,
            self.first,
            self.probability,
            self.after,
            self.until,
            1 if self.once else self.times,
            self.duration,
            self.between is not None,
        )

    def plain(self) -> dict[str, Any]:
        """The rule as plain data, for TOML or JSON."""
        return self.model_dump(mode="json", exclude_defaults=True, by_alias=True)

    def text(self) -> str:
        """The rule on one line, in the command line's form where that can express it."""
        keys = self.plain()
        point = keys.pop("point")
        keys.pop("name", None)
        events = keys.get("between", ())
        if events and all(event.keys() == {"point"} for event in events):
            keys["between"] = "..".join(event["point"] for event in events)
        parts = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in keys.items()]
        return " ".join([point, *parts])


def automatic_name(n: int) -> str:
    """What the log and `vmodel inject list` call rule `n` of a plan, counted from 0, if it has no name of its own."""
    return f"rule{n + 1}"


def keyed(rule: Rule) -> str:
    """The text that seeds a rule's generators: its name, or its content."""
    return rule.name or json.dumps(rule.plain(), sort_keys=True)


class Heal(BaseModel):
    """`[heal]`: from this time or event on no rule fires, and held events are carried out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    after: Seconds | None = Field(default=None, examples=['"20s"'], description="since the plan was armed")
    on: Annotated[Match | None, BeforeValidator(_match)] = Field(
        default=None,
        examples=['{ point = "reset" }'],
        description="after that event",
        json_schema_extra=_also_text,
    )

    @model_validator(mode="after")
    def _sound(self) -> Heal:
        if self.after is None and self.on is None:
            raise ValueError('after: is missing, as after = "20s", or on = { point = "reset" } instead')
        return self


class FaultPlan(BaseModel):
    """A plan: seed, rules and an optional end (`heal`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = Field(
        default=0, examples=["7"], description="the same seed injects the same faults"
    )
    rule: tuple[Rule, ...] = Field(default=())
    heal: Heal | None = Field(default=None, examples=['{ after = "20s" }'], description="when all faults end")

    @property
    def file(self) -> Path | None:
        """The file that it was read from, or None."""
        return self._file

    @property
    def base(self) -> Path:
        """The folder that paths in the plan are relative to."""
        return Path() if self._file is None else self._file.parent

    _file: Path | None = None
    _in_file: int = 0

    def place(self, n: int) -> tuple[Path | None, str]:
        """The place of rule `n`, for errors: its file and key, or None and the text of a rule from the command line."""
        rule = self.rule[n]
        if n < self._in_file:
            return self._file, f"rule[{n}] ({rule.name or automatic_name(n)})"
        return None, rule.text()

    @model_validator(mode="after")
    def _names(self) -> FaultPlan:
        names: set[str] = set()
        for n, rule in enumerate(self.rule):
            if rule.name in names:
                raise ValueError(f"rule[{n}].name: {rule.name!r} is used twice: names must differ")
            names |= {rule.name} - {""}
        return self

    def plain(self) -> dict[str, Any]:
        """The plan as plain data, for TOML or JSON; the inverse is `FaultPlan.model_validate`."""
        content = self.model_dump(mode="json", exclude_defaults=True, by_alias=True, exclude={"rule"})
        return {**content, "rule": [rule.plain() for rule in self.rule]}

    def extended(self, rules: Iterable[Rule], seed: int | None = None) -> FaultPlan:
        """A copy with `rules` after its own, and with `seed` if given.  ConfigError: two rules have the same name."""
        try:
            plan = FaultPlan(seed=self.seed if seed is None else seed, rule=(*self.rule, *rules), heal=self.heal)
        except ValidationError as error:
            raise ConfigError("\n".join(map(str, explain(error, "", FaultPlan)))) from error
        plan._file, plan._in_file = self._file, self._in_file
        return plan

    def placed(self, file: Path | None) -> FaultPlan:
        """A copy as if it had been read from `file`: paths in it are relative to that file's folder."""
        plan = self.extended(())
        plan._file, plan._in_file = file, 0 if file is None else len(self.rule)
        return plan

    @classmethod
    def load(cls, path: Path) -> FaultPlan:
        """Reads a plan from a TOML file.  ConfigError (PlanErrors): one line for each mistake."""
        return cls.parse(read_text(path), path)

    @classmethod
    def parse(cls, text: str, file: Path) -> FaultPlan:
        """Parses the text of a plan file; `file` is for errors and relative paths.  ConfigError (PlanErrors)."""
        raw = parse_toml(text, file)
        try:
            plan = cls.model_validate(raw)
        except ValidationError as error:
            raise PlanErrors(error, raw, file) from error
        plan._file, plan._in_file = file, len(plan.rule)
        return plan


class PlanErrors(ConfigError):
    """The mistakes of one plan; str() has a line for each: file, rule, key, and how to fix it."""

    def __init__(self, error: ValidationError, raw: Any, file: Path | str) -> None:
        self.errors = [_placed(one, raw) for one in explain(error, file, FaultPlan)]
        super().__init__("\n".join(map(str, self.errors)))


def _placed(error: ConfigError, raw: Any) -> ConfigError:
    """The error with the rule's name in its key.  (A validator of the whole rule puts the key before its text.)"""
    text = str(error).removeprefix(f"{error.file}: ").removeprefix(f"{error.key}: ")
    key = error.key
    prefix, bracket, rest = key.partition("]")
    number = prefix.removeprefix("rule[")
    rules = raw.get("rule") if isinstance(raw, dict) else None
    if bracket and number.isdigit() and isinstance(rules, list) and isinstance(rules[int(number)], dict):
        name = rules[int(number)].get("name")
        key = f"{prefix}] ({name if isinstance(name, str) and name else automatic_name(int(number))}){rest}"
    return ConfigError(text, file=error.file, key=key)
