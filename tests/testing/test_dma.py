"""`--vmodel-dma-report` and `--vmodel-dma-fails`: findings of the DMA sanitizer in tests with guests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vmodel.files import cache_dir

pytest_plugins = "pytester"

#: Runs of pytest have another HOME.
CACHE = cache_dir().parent
EXAMPLE = Path(__file__).parents[2] / "examples" / "dma"
GUESTS = """
    import pytest

    pytestmark = pytest.mark.machine("virtio-iommu.toml")

    def test_leak(vm):
        assert vm.run("modprobe edudma bug=leak && rmmod edudma").status == 0

    def test_right(vm_booted):
        assert vm_booted.run("modprobe edudma && rmmod edudma").status == 0

    def test_direction(experiment):
        assert experiment("modprobe edudma bug=direction && rmmod edudma").status == 0

    @pytest.mark.allow_dma("dma-direction")
    def test_on_purpose(experiment):
        assert experiment("modprobe edudma bug=direction && rmmod edudma").status == 0
"""


@pytest.mark.guest
def test_guests_whose_dma_is_wrong_fail(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    shutil.copytree(EXAMPLE, pytester.path, dirs_exist_ok=True)
    pytester.makepyfile(GUESTS)
    done = pytester.runpytest_subprocess("--vmodel-dma-fails", "error", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=4, errors=2)
    shown = done.stdout.str()
    leak = "error: dma-leak: edu0: 2 mappings of 12 KiB still there, though the driver released the device"
    assert f"the DMA is wrong: {leak}" in shown
    section = shown[shown.index("= DMA =") :]
    assert f"{leak}\n    test_guests_whose_dma_is_wrong_fail.py::test_leak\n" in section
    assert "::test_direction and 1 more\n" in section and "test_right" not in section


@pytest.mark.parametrize("processes", [0, 2])
def test_a_sign_that_is_none_is_one_line(pytester: pytest.Pytester, processes: int) -> None:
    pytester.makepyfile("def test_it(): pass")
    done = pytester.runpytest_subprocess("-n", str(processes), "--vmodel-dma-fails", "dma-leek")
    lines = [line for line in done.stderr.lines if line]
    said = "'dma-leek' is no sign of a DMA finding: did you mean 'dma-leak'?"
    assert (done.ret, lines) == (pytest.ExitCode.USAGE_ERROR, [f"ERROR: --vmodel-dma-fails: {said}"])


def test_without_guests_nothing_is_wrong(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_it(): pass")
    done = pytester.runpytest_subprocess("--vmodel-dma-report")
    assert done.ret == 0 and "nothing is wrong with the DMA of guests whose devices are behind" in done.stdout.str()


def test_a_mark_with_a_sign_that_is_none(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        import pytest

        @pytest.mark.allow_dma("dma-leek")
        def test_it(request):
            request.config.pluginmanager.get_plugin("vmodel-dma").add(request.node, ())
    """)
    done = pytester.runpytest_subprocess("--vmodel-dma-report")
    done.assert_outcomes(failed=1)
    assert "the mark allow_dma: 'dma-leek' is no sign of a DMA finding" in done.stdout.str()
