"""Plans: TOML and Python are equivalent; each mistake is one line."""

from __future__ import annotations

import json
import textwrap
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.inject.lab import Bench, Lab, fired
from vmodel.errors import ConfigError
from vmodel.inject import ACTIONS, Engine, Event, FaultPlan, Heal, InterruptEvent, Match, Point, Rule, parse_rule
from vmodel.inject.action import Action
from vmodel.inject.action_text import parse
from vmodel.inject.actions import Drop, Flip, Partial
from vmodel.inject.predicate import KEYS
from vmodel.points import EVENTS, ConfigEvent, keys_of

TEXT = """
seed = 7

[[rule]]
name = "torn"
point = "dma.write"
device = "lab"
iova = "0x2000+4K"
nth = 3
do = "partial(8)"

[[rule]]
point = "mmio.read"
device = ["l*", "m"]
register = "PLAIN"
probability = 0.5
after = "2s"
do = { action = "flip", bits = 2 }

[heal]
on = { point = "reset", kind = "FLR" }
"""


def test_toml_and_python_say_the_same() -> None:
    plan = FaultPlan.parse(TEXT, Path("p.toml"))
    by_hand = FaultPlan(
        seed=7,
        rule=(
            Rule(
                name="torn", point=Point.DMA_WRITE, device=("lab",), iova="0x2000-0x2fff", nth=(3,), do=Partial(size=8)
            ),
            Rule.model_validate(
                {
                    "point": "mmio.read",
                    "device": "l*,m",
                    "register": "PLAIN",
                    "probability": 0.5,
                    "after": 2,
                    "do": "flip(2)",
                }
            ),
        ),
        heal=Heal.model_validate({"on": {"point": "reset", "kind": "FLR"}}),
    )
    assert plan.plain() == by_hand.plain()
    assert FaultPlan.model_validate(json.loads(json.dumps(plan.plain()))) == by_hand
    assert plan.rule[0] == parse_rule("dma.write name=torn device=lab iova=0x2000+4K nth=3 do=partial(8)")


#: A plan's text, and what is said of it after "p.toml: ".
WRONG = [
    ("sede = 1", "sede: unknown key: did you mean 'seed'?"),
    ("seed = -1", "seed: -1: input should be greater than or equal to 0"),
    ("x = [", "line 1: 'x = [': is not valid TOML: invalid value"),
    ('[rule]\npoint = "irq"', "must be written [[rule]], in two brackets, as there may be several"),
    ('[[rule]]\npoint = "irq"', 'rule[0] (rule1).do: is missing, as do = "drop"'),
    ('[[rule]]\ndo = "drop"', 'rule[0] (rule1).point: is missing, as point = "dma.write"'),
    ('[[rule]]\nname = "a"\npoint = "irq"\ndo = "drop"\n' * 2, "rule[1] (a).name: 'a' is used twice"),
    ("[heal]", 'heal.after: is missing, as after = "20s"'),
]
#: Lines of a rule at dma.read, and what is said of them.
WRONG_RULES = [
    ('do = "dorp"', "do: 'dorp': there is no action 'dorp': did you mean 'drop'?"),
    ('do = "delay"', "do: 'delay': delay needs 'ms': write delay(ms)"),
    ('do = "delay(5000)"', "do: 'delay(5000)': delay's ms: must be less than or equal to 4000"),
    ('do = "flip(1, 2)"', "flip takes at most 1 arguments: write flip(bits=1)"),
    ('do = "flip(bit=1)"', "flip has no 'bit': write flip(bits=1)"),
    ("do = { bits = 1 }", "a table must name the action, as"),
    ("do = 3", 'do: 3: must be an action, as "drop"'),
    ('do = "ones"', "do: ones does not work at dma.read, only at mmio.read, config.read"),
    ('do = "drop"\nlba = 3', "lba: events at dma.read have no such field: only those at completion do"),
    ('do = "drop"\nnht = 3', "nht: unknown key: did you mean 'nth'?"),
    ('do = "drop"\nnth = 0', "nth: the first event is 1"),
    ('do = "drop"\nevery = 0', "every: 0: input should be greater than or equal to 1"),
    ('do = "drop"\nprobability = 2', "probability: 2: input should be less than or equal to 1"),
    ('do = "drop"\nafter = "2h"', "after: '2h': must be a time, as 1.5 (seconds)"),
    ('do = "drop"\nafter = 3\nuntil = 2', "until: must be later than after"),
    ('do = "drop"\nonce = true\ntimes = 2', "times: once = true means 1"),
    ('do = "drop"\nbetween = "irq"', "between: 'irq': must be two events, as"),
    ('do = "drop"\nphase = "start"', "phase: 'start': input should be 'probe', 'running', 'remove' or 'suspend'"),
    ('do = "drop"\niova = "9-1"', "iova: '9-1': must be a number, \"0x1000-0x1fff\""),
    ('do = "drop"\nrequester = "0:3.0"', "requester: '0:3.0': must be a PCI address"),
]
WRONG += [('[[rule]]\npoint = "dma.wrte"\ndo = "drop"', "'dma.wrte': is not a point: did you mean 'dma.write'? Points")]
WRONG += [(f'[[rule]]\nname = "n"\npoint = "dma.read"\n{text}', said) for text, said in WRONG_RULES]


@pytest.mark.parametrize(("text", "said"), WRONG)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        FaultPlan.parse(text, Path("p.toml"))
    (line,) = str(error.value).splitlines()
    assert said in line and line.startswith("p.toml: ")
    if 'name = "n"' in text:
        assert line.startswith("p.toml: rule[0] (n).")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a point and key=value pairs"),
        ("nth=3 do=drop", "must be a point and key=value pairs"),
        ("irq drop", "'drop': must be a point and key=value pairs"),
        ("irq do=drop do=drop", "do is given twice"),
        ("irq do=drop nht=3", "nht: unknown key: did you mean 'nth'?"),
        ("irq nth=x do=drop", "nth: 'x': must be a number"),
        ("irq nth=3", 'do: is missing, as do = "drop"'),
    ],
)
def test_terse_mistakes(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_rule(text)
    assert str(error.value).startswith(f"--fault {text!r}") and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("irq device=lba do=drop", "irq device=lba do=drop: device: no device is called 'lba': did you mean 'lab'?"),
        ("irq device=zzz do=drop", ": device: no device is called 'zzz': devices are lab"),
        ("mmio.read register=PLANE do=ones", ": register: no register is called 'PLANE': did you mean 'PLAIN'?"),
        ("config.read register=PLAIN do=ones", ": register: no register is called 'PLAIN'"),
        (
            "config.read do=hide(msx)",
            ": do: 'hide(capability=msx)': no capability is called 'msx': capabilities are msi, msix, pcie, pm",
        ),
        ("connection do=no-bar(3)", ": do: 'no-bar(bar=3)': none of these devices has a BAR3"),
        ("irq when=no.py:f do=drop", ": when: 'no.py:f': there is no file 'no.py'"),
        ("irq when=f do=drop", ": when: 'f': must be \"path/file.py:function\""),
        ("irq name=n between=irq..reset device=q do=drop", ": device: no device is called 'q'"),
    ],
)
def test_names_that_no_device_has(rule: str, said: str) -> None:
    lab = Lab()
    with pytest.raises(ConfigError) as error:
        Engine(FaultPlan(rule=(parse_rule(rule),)), [lab])
    assert said in str(error.value) and "\n" not in str(error.value)
    plan = FaultPlan.parse('[[rule]]\nname = "n"\npoint = "irq"\ndevice = "q"\ndo = "drop"', Path("p.toml"))
    with pytest.raises(ConfigError, match=r"^p.toml: rule\[0\] \(n\)\.device: no device is called 'q'"):
        Engine(plan, [lab])
    lab.close()


def test_each_action_is_read_as_it_is_written() -> None:
    examples = {
        "late": "late(5)", "delay": "delay(5)", "partial": "partial(8)", "torn": "torn(8)", "value": "value(1)",
        "vector": "vector(1)", "complete": "complete(status=3)", "hide": "hide(msix)", "cut": "cut(msix)",
        "no-bar": "no-bar(1)", "aer": "aer(ecrc)",
    }  # fmt: skip
    for name, kind in ACTIONS.items():
        action = parse(examples.get(name, name))
        assert type(action) is kind and parse(str(action)) == action
        assert kind.usage().startswith(name) and (kind.__doc__ or "").strip().endswith(".")
        assert kind.points


@given(st.integers(1, 64), st.booleans())
def test_actions_by_text_and_table(bits: int, by_name: bool) -> None:
    text = f"flip(bits={bits})" if by_name else f"flip({bits})"
    assert parse(text) == parse({"action": "flip", "bits": bits}) == Flip(bits=bits)
    assert parse("drop") == parse("drop()") == Drop()


def test_a_function_of_the_users(lab: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checks.py").write_text(
        textwrap.dedent(
            """
            from pathlib import Path

            ran = Path(__file__).with_name("ran")
            ran.write_text(ran.read_text() + "x" if ran.exists() else "x")

            def odd(event):
                return event.address % 8 == 4
            """
        )
    )
    rule = '[[rule]]\npoint = "mmio.read"\nwhen = "checks.py:odd"\ndo = "ones"\n'
    plan = FaultPlan.parse(rule + rule.replace("ones", "drop"), tmp_path / "p.toml")
    with Engine(plan, [lab.lab]):
        assert [lab.get(0), lab.get(4)][0] != 0xFFFF_FFFF and lab.get(0x28) == 0xCAFE
        assert lab.get(4) == 0xFFFF_FFFF
    assert (tmp_path / "ran").read_text() == "x"  # once, although two rules name it

    def third(event: InterruptEvent) -> bool:
        return event.vector == 3

    def broken(event: Event) -> bool:
        raise RuntimeError("a bug of the user's")

    with Engine(FaultPlan(rule=(Rule(point=Point.MMIO_READ, when=broken, do=Drop()),)), [lab.lab]):
        assert lab.get(0) != 0xFFFF_FFFF
        assert "a bug of the user's" in caplog.text

    with Engine(FaultPlan(rule=(Rule(point=Point.IRQ, when=third, do=Drop()),)), [lab.lab]):
        lab.put(0x1000, 3)
        lab.put(0x1000, 2)
        assert (lab.raised(3), lab.raised(2)) == (0, 1)


@pytest.mark.parametrize(
    ("predicate", "hit"),
    [
        ("device=lab", True),
        ("device=l*,lab", True),
        ("iova=0x2008", True),
        ("iova=0x2010-0x2fff", False),
        ("iova=0x1000-0x2000", True),
        ("gpa=0x2000", True),
        ("gpa=0x2001-0x3000", False),
        ("size=16", True),
        ("size=1-15", False),
        ("pasid=1", False),
        ("group=0", False),
        ("requester=0x18", False),
        ("domain=*", False),
        ("phase=running", True),
        ("phase=probe", False),
    ],
)
def test_predicates_of_dma(lab: Bench, predicate: str, hit: bool) -> None:
    with Engine(FaultPlan(rule=(parse_rule(f"dma.write {predicate} do=drop"),)), [lab.lab]) as engine:
        lab.lab.dma.write(0x2000, bytes(range(16)))
        assert bool(fired(engine)) is hit
        assert (lab.target(16) == bytes(16)) is hit


@pytest.mark.parametrize(
    ("predicate", "hit"),
    [
        ("bar=0", True),
        ("bar=1", False),
        ("offset=4", False),
        ("offset=0-3", True),
        ("register=PLAIN", True),
        ("register=regs.PLAIN", True),
        ("register=HOOKED", False),
        ("size=4", True),
        ("size=8", False),
    ],
)
def test_predicates_of_registers(lab: Bench, predicate: str, hit: bool) -> None:
    with Engine(FaultPlan(rule=(parse_rule(f"mmio.read {predicate} do=ones"),)), [lab.lab]):
        assert (lab.get(0) == 0xFFFF_FFFF) is hit


def test_the_list_of_actions_has_all() -> None:
    def below(kind: type[Action]) -> set[type[Action]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    assert {kind for kind in below(Action) if kind.name and kind.__module__.startswith("vmodel.")} == set(
        ACTIONS.values()
    )


@pytest.mark.parametrize("point", Point)
def test_each_point_has_a_class_of_events_whose_fields_keys_ask_about(point: Point) -> None:
    """A key of a plan is accepted only where the point's class has a field for it; an error names those points."""
    kind = EVENTS[point]
    assert [other for other in set(EVENTS.values()) if point in other.points] == [kind]
    values: dict[str, Any] = {"direction": "write", "register": "STATUS", "domain": "x", "kind": "x"}
    asked = {key: values.get(key, 1) for key in KEYS}
    fitting = set()
    for key, value in asked.items():
        try:
            Match.model_validate({"point": point.value, key: value})
        except ValidationError as error:
            known = ", ".join(p.value for p in Point if p in KEYS[key])
            assert f"{key}: events at {point.value} have no such field: only those at {known}" in str(error)
        else:
            fitting.add(key)
    names = {field.name for field in fields(kind)}
    assert fitting == set(keys_of(kind)) and set(keys_of(kind).values()) <= names
    # Of the fields without a key, nothing is asked: what is written, what says of whom the event is, what no rule gets.
    unasked = {"point", "device", "others", "phase", "data", "refused", "id", "length", "blocks"}
    if kind is ConfigEvent:
        unasked.add("region")
    assert names - set(keys_of(kind).values()) <= unasked


def test_keys_are_about_fields() -> None:
    """Each key of a rule's match asks about a field of some class, but for those about all events."""
    about_all = {"point", "device", "phase", "when"}
    assert {field.alias or name for name, field in Match.model_fields.items()} == set(KEYS) | about_all


@pytest.mark.parametrize(
    "text",
    [
        "irq do=drop between=mmio.read..reset",
        'irq do=drop between=[{"point": "mmio.read", "register": "STATUS"}, {"point": "reset"}]',
    ],
)
def test_the_text_of_a_rule_can_be_given_to_fault(text: str) -> None:
    rule = parse_rule(text)
    assert rule.text() == text and parse_rule(rule.text()) == rule


@pytest.mark.parametrize("events", ["[", "[1]", "[" * 100_000, '["irq"]', "[1, 2]"])
def test_between_that_is_no_pair(events: str) -> None:
    with pytest.raises(ConfigError, match="between"):
        parse_rule(f"irq do=drop between={events}")
