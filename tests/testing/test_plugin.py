"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# Runs of pytest in this process drop the modules that they import first: classes would exist twice.
import vmodel.devices.edu
import vmodel.experiment
import vmodel.inject
import vmodel.machine
import vmodel.testing.fakes  # noqa: F401
from vmodel.experiment.oracle import Outcome
from vmodel.guest.artifacts import Kernel
from vmodel.guest.served import Served
from vmodel.testing.vm import Vm

pytest_plugins = "pytester"

MODEL = """
    import pytest
    from vmodel.devices.edu import Edu

    @pytest.fixture
    def edu(fake_driver):
        return fake_driver(Edu("edu0"))

    def copied(edu, data):
        for start, end, command in ((edu.memory.alloc(data), 0x40000, 5), (0x40000, back := edu.memory.alloc(64), 7)):
            edu.write("DMA_SRC", start)
            edu.write("DMA_DST", end)
            edu.write("DMA_COUNT", 64)
            edu.write("DMA_CMD", command)
            edu.interrupt()
            edu.write("IRQ_ACK", 0x100)
        return edu.memory.read(back, 64)
"""


MISTAKES = {
    'card.read("STAUS")': "LookupError: edu0 has no register STAUS; did you mean STATUS?",
    'card.write("STATUS", 1 << 32)': "ValueError: 0x100000000 does not fit into STATUS (32 bits)",
    'card.write(EduRegs.STATUS, "1")': "TypeError: STATUS (32 bits): must be a number, not '1'",
    "card.write((0, 0), 1 << 16, 2)": "ValueError: 0x10000 does not fit into 2 bytes (16 bits)",
    "card.interrupt(timeout=0)": "TimeoutError: edu0 has not sent interrupt 0 within 0 s",
    "card.interrupt(7)": "LookupError: edu0 has 1 interrupts enabled: there is no 7",
    "card.wait(lambda: False, timeout=0)": "TimeoutError: the condition was not true within 0 s",
    "card.read((9, 0), 4)": "OSError: [Errno 22] Invalid argument",
    "card.memory.read(1 << 40, 4)": "ValueError: 0x4 bytes at 0x10000000000 are outside the memory",
    'card.call("nothing")': "OutsideError: edu0 has no methods for the outside: a model marks them with @outside",
    "card.read(0x20)": "TypeError: a register is EduRegs.STATUS, a name, or (BAR, offset), not 32",
    'card.client.close() or card.read("STATUS")': "OSError: [Errno 9] Bad file descriptor",
    'inject("dma.read nth=1 do=abrt")': "ConfigError: the rule 'dma.read nth=1 do=abrt': do: 'abrt': there",
    "fake_driver(5)": "TypeError: a device is an instance of a PciDevice, as Edu('edu0'), not 5",
}


def test_mistakes_are_shown_at_the_tests_line(pytester: pytest.Pytester) -> None:
    """Not inside of vmodel: the last line of source that pytest shows is the test's."""
    tests = "".join(f"def test_{n}(card, fake_driver, inject):\n    {line}\n" for n, line in enumerate(MISTAKES))
    pytester.makepyfile(
        "import pytest\nfrom vmodel.devices.edu import Edu, EduRegs\n@pytest.fixture\ndef card(fake_driver):\n"
        f"    return fake_driver(Edu('edu0'))\n{tests}"
    )
    result = pytester.runpytest("--tb=short")
    result.assert_outcomes(failed=len(MISTAKES))
    shown = re.split(r"^_+ test_\d+ _+$", result.stdout.str(), flags=re.MULTILINE)[1:]
    for (line, said), text in zip(MISTAKES.items(), shown, strict=True):
        places = re.findall(r"^(\S+\.py):\d+: in ", text, flags=re.MULTILINE)
        assert places == ["test_mistakes_are_shown_at_the_tests_line.py"], text
        assert f"    {line}\n" in text and said in text, text


def test_what_is_injected_is_kept_when_a_test_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        MODEL
        + """
    @pytest.mark.parametrize("good", [True, False])
    def test_a(edu, inject, good):
        inject("dma.write nth=1 do=corrupt(ab)")
        assert copied(edu, bytes(64)) == b"\\xab" * 64
        assert [record["point"] for record in inject.log] == ["dma.write"]
        assert [rule["fired"] for rule in inject.rules] == [1]
        inject.heal()
        assert copied(edu, bytes(64)) == bytes(64)
        assert good
    """
    )
    result = pytester.runpytest()
    result.assert_outcomes(passed=1, failed=1)
    (kept,) = (pytester.path / "artifacts").iterdir()
    assert kept.name == "test_what_is_injected_is_kept_when_a_test_fails.py_test_a_False"
    (record,) = map(json.loads, (kept / "injections-1.jsonl").read_text().splitlines())
    assert (record["device"], record["after"]) == ("edu0", "ab" * 64)
    result.stdout.fnmatch_lines([f"logs will be in {kept}"])


def test_another_folder_for_what_is_kept(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_a(artifacts): artifacts.mkdir(); (artifacts / 'x').touch(); assert 0")
    pytester.runpytest("--vmodel-artifacts", "kept/here").assert_outcomes(failed=1)
    assert (pytester.path / "kept/here").is_dir() and not (pytester.path / "artifacts").exists()


def test_the_seed(pytester: pytest.Pytester) -> None:
    """It decides what a plan without one does."""
    pytester.makepyfile(
        MODEL
        + """
    def test_a(edu, inject, vmodel_seed):
        inject("dma.write nth=1 do=flip(5)")
        print("seed", vmodel_seed, copied(edu, bytes(64)).hex())
    """
    )
    lines = []
    for seed in ("5", "5", "6"):
        result = pytester.runpytest("-s", "--vmodel-seed", seed)
        result.stdout.fnmatch_lines([f"vmodel: seed {seed}"])
        lines.append(next(line for line in result.outlines if f"seed {seed} " in line).split()[-1])
    assert lines[0] == lines[1] != lines[2]


def test_guests_are_marked(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
    def test_vm(vm): pass
    def test_vm_booted(vm_booted): pass
    def test_experiment(experiment): pass
    def test_machine(fake_driver): pass
    """
    )
    result = pytester.runpytest("-m", "not guest")
    result.assert_outcomes(passed=1, deselected=3)


def test_each_kernel(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_vm(vm): pass\ndef test_other(fake_memory): pass")
    result = pytester.runpytest("--collect-only", "-q", "--vmodel-kernel", "stable", "--vmodel-kernel", "/boot/vmlinuz")
    assert [line.partition("::")[2] for line in result.outlines if "::" in line] == [
        "test_vm[stable]",
        "test_vm[boot_vmlinuz]",
        "test_other",
    ]


def test_the_qemu(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMODEL_QEMU", raising=False)
    pytester.makepyfile(
        """
    import pytest
    from vmodel.guest.artifacts import ArtifactError, find_qemu
    def test_a():
        with pytest.raises(ArtifactError, match="no-qemu-here cannot be run"):
            find_qemu()
    """
    )
    pytester.runpytest("--vmodel-qemu", "no-qemu-here").assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ("def test_a(machine): pass", '*needs a machine, as @pytest.mark.machine("edu.toml")'),
        ("@pytest.mark.machine('no.toml')\ndef test_a(machine): pass", "*no.toml: cannot be read: No such file*"),
        (
            "@pytest.mark.machine('edu.toml')\n@pytest.mark.guest(module=['x'])\ndef test_a(vm): pass",
            "*guest(module): arguments are allow_reboot, append, cpus, extra_modules, files, *",
        ),
        ("def test_a(inject): inject('dma.write do=nothing')", "*do: *"),
        *(
            (f"@pytest.mark.{mark}\ndef test_a(vm): pass", f"*{said}")
            for mark, said in (
                ("guest(tools='pciutils:lspci')", "guest(tools='pciutils:lspci'): must be a list of texts"),
                ("guest(modules=[5])", "guest(modules=*): must be a list of texts"),
                ("guest(timeout=float('nan'))", "guest(timeout=nan): must be a number of seconds"),
                ("guest(cpus=0)", "guest(cpus=0): must be a number from 1 to 64"),
                ("guest('driver/')", "guest('driver/'): arguments have names, as modules=*"),
                ("machine(None)", 'machine takes a file, as machine("edu.toml")'),
                ("machine()", 'machine takes a file, as machine("edu.toml")'),
            )
        ),
    ],
)
def test_mistakes(pytester: pytest.Pytester, test: str, said: str) -> None:
    (pytester.path / "edu.toml").write_text((Path(__file__).parents[2] / "examples" / "edu.toml").read_text())
    pytester.makepyfile(f"import pytest\n{test}")
    result = pytester.runpytest()
    assert result.ret != 0
    (result.stderr if result.ret == pytest.ExitCode.USAGE_ERROR else result.stdout).fnmatch_lines([said])


@pytest.mark.machine("../../examples/edu.toml")
def test_the_machine_of_a_mark(machine, inject) -> None:  # type: ignore[no-untyped-def]
    assert list(machine.devices) == ["edu0"]
    inject("mmio.read device=edu0 do=ones")
    assert [rule["state"] for rule in inject.rules] == ["armed"]


@pytest.mark.parametrize(
    ("mark", "table", "cpus"),
    [
        ({}, "", ["2"]),
        ({}, "cpus = 1", ["1", "1"]),
        ({"cpus": 3}, "cpus = 1", ["1", "3"]),
        ({"qemu_args": ["-smp", "4"]}, "", ["4"]),
        ({}, 'qemu_args = ["-smp", "4,sockets=2"]', ["4,sockets=2"]),
    ],
)
def test_two_cpus_by_default(tmp_path: Path, mark: dict[str, Any], table: str, cpus: list[str]) -> None:
    """The mark comes before the machine file, and QEMU's own argument before both; the last one counts for QEMU."""
    (tmp_path / "m.toml").write_text(f'[machine]\nname = "m"\n[guest]\n{table}\n')
    kernel = Kernel("6.12.0-mine", tmp_path / "bzImage", None)
    with Served(tmp_path / "m.toml") as served:
        args = [*Vm(served, kernel, mark, tmp_path).spec("true").qemu_args]
    assert [args[n + 1] for n, arg in enumerate(args) if arg == "-smp"] == cpus


@pytest.mark.slow
def test_side_by_side(pytester: pytest.Pytester) -> None:
    """pytest-xdist: each worker has sockets and folders of its own."""
    pytester.makepyfile(
        MODEL
        + """
    @pytest.mark.parametrize("n", range(12))
    def test_a(edu, inject, n):
        inject("dma.write nth=1 do=corrupt(ab)")
        assert copied(edu, bytes(64)) == b"\\xab" * 64
        assert n != 7
    """
    )
    pytester.runpytest_subprocess("-n", "2").assert_outcomes(passed=11, failed=1)
    assert [path.name for path in (pytester.path / "artifacts").iterdir()] == ["test_side_by_side.py_test_a_7"]


def test_it_costs_no_import() -> None:
    """Whoever has vmodel installed and tests something else does not wait for it."""
    code = "import sys, vmodel.testing.plugin; print([m for m in sys.modules if m.startswith(('vmodel.', 'pydantic'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "['vmodel.testing', 'vmodel.testing.plugin']\n"


def test_the_page_names_what_there_is(pytester: pytest.Pytester) -> None:
    """Each fixture, mark and option of docs/testing.md, and each that is there."""
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    fixtures = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    found = pytester.runpytest("--fixtures", "-q").outlines
    ours = {
        line.split()[0]
        for line in found
        if "vmodel/testing/plugin.py" in line and not line.startswith(("vmodel_", "pytester"))
    }
    assert fixtures - {"vmodel_seed"} == ours
    said = "\n".join(pytester.runpytest("--help").outlines)
    assert set(re.findall(r"`(--vmodel-[\w-]+)", page)) == set(re.findall(r"^  (--vmodel-[\w-]+)", said, re.MULTILINE))
    marks = "\n".join(pytester.runpytest("--markers").outlines)
    for mark in re.findall(r"^\| `(\w+)\(", page, re.MULTILINE):
        assert f"@pytest.mark.{mark}(" in marks


def test_the_outcomes_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()
    assert set(Outcome) <= set(re.findall(r"^\| ([a-z ]+) \|", page, re.MULTILINE))


BROKEN = """
    import pytest
    from vmodel.device import PciDevice
    from vmodel.pci.bar import MmioBar
    from vmodel.regs import Reg32, RegisterBank, on_write

    class Regs(RegisterBank, size=8):
        A = Reg32(0x0)
        B = Reg32(0x4)

    class Card(PciDevice):
        vendor_id, device_id, class_code = 0x1234, 0x5678, 0x058000
        bar0 = MmioBar(0, size=4096)
        regs = bar0.bank(Regs)

        @on_write(Regs.B)
        def _b(self, new):
            return {}[new]

        def on_timer(self):
            raise ValueError("late")
"""


def test_a_model_that_raises_fails_the_test(pytester: pytest.Pytester) -> None:
    """By name of the register, and with the user's own line; however green the test is otherwise."""
    pytester.makepyfile(
        BROKEN
        + """
    def test_a(fake_driver):
        card = fake_driver(Card("card0"))
        card.write(Regs.B, 7)
        card.device.defer(card.device.on_timer)
        assert card.read(Regs.A) == 0

    @pytest.mark.allow_model_errors
    def test_b(fake_driver):
        fake_driver(Card("card0")).write(Regs.B, 7)

    def test_c(fake_driver):
        fake_driver(Card("card0")).write(Regs.A, 7)
    """
    )
    result = pytester.runpytest()
    result.assert_outcomes(passed=3, errors=1)
    name = "test_a_model_that_raises_fails_the_test.py"
    lines = Path(pytester.path / name).read_text().splitlines()
    key, late = (1 + next(n for n, line in enumerate(lines) if word in line) for word in ("{}[new]", '"late"'))
    result.stdout.fnmatch_lines(
        [
            f"the model failed: card0: a write of regs.B: KeyError: 7 ({name} line {key})",
            f"card0: a callback: ValueError: late ({name} line {late})",
        ]
    )


def test_a_machines_model_that_raises_fails_the_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(card=BROKEN)
    (pytester.path / "m.toml").write_text(
        '[machine]\nname = "m"\n[[device]]\nname = "c0"\nmodel = "card.py:Card"\naddress = "0000:00:03.0"\n'
    )
    pytester.makepyfile(
        """
    import pytest, threading

    @pytest.mark.machine("m.toml")
    def test_a(machine):
        card, done = machine.devices["c0"], threading.Event()
        card.defer(card.on_timer)
        card.defer(done.set)
        assert done.wait(60)
    """
    )
    result = pytester.runpytest()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["the model failed: c0: a callback: ValueError: late (card.py line *)"])


RIG = """
    import pytest
    from pathlib import Path
    from vmodel.errors import ConfigError
    from vmodel.guest.artifacts import Kernel

    class Busy:
        def run(self, case, folder):
            raise ConfigError("disk.img is in use by another server") from BlockingIOError("deep inside")

    @pytest.fixture
    def vmodel_rig():
        return Busy()

    @pytest.fixture
    def guest_kernel():
        return Kernel("6.12.1", Path("vmlinuz"), None)
"""


def test_a_mistake_that_an_experiment_finds_has_no_traceback_through_vmodel(pytester: pytest.Pytester) -> None:
    (pytester.path / "edu.toml").write_text((Path(__file__).parents[2] / "examples" / "edu.toml").read_text())
    pytester.makeconftest(RIG)
    pytester.makepyfile(
        """
    import pytest

    @pytest.mark.machine("edu.toml")
    def test_a(experiment):
        experiment("true")
    """
    )
    said = pytester.runpytest().stdout
    said.fnmatch_lines(
        [">       experiment(*", "E       vmodel.errors.ConfigError: disk.img is in use by another server"]
    )
    said.no_fnmatch_line("*deep inside*")
    said.no_fnmatch_line("*vmodel/testing*")


def test_a_mistake_is_said_once(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.machine('no.toml')\ndef test_a(machine): pass")
    said = pytester.runpytest().stdout
    said.no_fnmatch_line("During handling*")
