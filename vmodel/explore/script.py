"""The script of a guest for each run of a search: loads the driver, does the workload, and removes the driver.

So each run has the driver's probe, its work and its removal, and the next run in the same guest begins without it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

#: Seconds to wait for what the workload needs after the driver has been loaded.
_APPEARS = 5
_SUSPEND = """\
if [ -w /sys/power/pm_test ]; then
    echo 0 > /sys/module/suspend/parameters/pm_test_delay
    echo devices > /sys/power/pm_test
    vmodel-host suspend begin
    echo freeze > /sys/power/state || status=$?
    vmodel-host suspend end
    echo none > /sys/power/pm_test
else
    echo "this kernel cannot suspend for a test"
fi"""


def cycle(drivers: Sequence[str], workload: str, *, wait_for: str = "", suspend: bool = False) -> str:
    """The script: `workload` between the loading of the modules `drivers`, in this order, and their removal.

    `wait_for`: a path that must be there before the workload begins.  `suspend`: between two runs of the workload, all
    devices are suspended and resumed, by the kernel's own test of that.  Its exit status is that of the part that
    failed first.
    """
    names = [shlex.quote(driver) for driver in drivers]
    lines = ["status=0"]
    lines += [f"modprobe {name} || status=$?" for name in names]
    if wait_for:
        path = shlex.quote(wait_for)
        lines.append(
            f"n=0; while [ $status = 0 ] && [ ! -e {path} ] && [ $n -lt {_APPEARS * 10} ];"
            " do sleep 0.1; n=$((n + 1)); done"
        )
        lines.append(f"[ $status != 0 ] || [ -e {path} ] || status=1")
    work = f"if [ $status = 0 ]; then (\n{workload}\n)\nstatus=$?; fi"
    lines.append(work)
    if suspend:
        lines += [_SUSPEND, work]
    # The removal of one may have removed another that it depends on.
    lines += [
        f"[ ! -d /sys/module/{name} ] || modprobe -r {name} || [ $status != 0 ] || status=1" for name in reversed(names)
    ]
    return "\n".join([*lines, "exit $status"]) + "\n"
