"""Reads and writes of a namespace."""

from __future__ import annotations

from tests.nvme.driver import Driver, Pair, name, prps

WRITE, READ = 0x01, 0x02


def write(driver: Driver, pair: Pair, nsid: int, slba: int, data: bytes) -> str:
    driver.memory.write(driver.page, data)
    blocks = len(data) >> driver.device.inventory.attached(nsid).lba_shift
    return name(pair.send(WRITE, nsid=nsid, cdw10=slba, cdw12=blocks - 1, dptr=prps(driver.page)))


def read(driver: Driver, pair: Pair, nsid: int, slba: int, size: int) -> bytes:
    blocks = size >> driver.device.inventory.attached(nsid).lba_shift
    done = pair.send(READ, nsid=nsid, cdw10=slba, cdw12=blocks - 1, dptr=prps(driver.page))
    assert done.status == 0, name(done)
    return driver.memory.read(driver.page, size)
