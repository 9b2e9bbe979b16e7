"""The parameters of an NVMe controller in a machine file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from vmodel.device import Params
from vmodel.devices.nvme.regs import MAX_STRIDE, QUEUE_PAIRS
from vmodel.span import MiB, number

#: Sizes of logical blocks, in bytes, in the order of the LBA formats.
LBA_SIZES = (512, 4096)
#: Most namespaces of a controller.
MAX_NAMESPACES = 32


def _printable(value: str) -> str:
    if not value.isascii() or not value.isprintable() or value != value.strip() or not value:
        raise ValueError("must be printable ASCII characters without blanks around them")
    return value


def _size(value: object) -> int:
    size = number(value)
    if not size or size % LBA_SIZES[-1]:
        raise ValueError(f'must be a multiple of {LBA_SIZES[-1]} bytes and not 0, as "256M"')
    if size > 1 << 60:
        raise ValueError("must be at most 2**60 bytes")
    return size


Size = Annotated[int, BeforeValidator(_size), WithJsonSchema({"type": ["integer", "string"]})]


class NamespaceParams(Params):
    """One of `namespaces`: in memory, in a file that is created if it does not exist, or a read-only image."""

    memory: Size | None = Field(default=None, examples=['"256M"'], description="size of a namespace in memory")
    path: Path | None = Field(default=None, examples=['"disk.img"'], description="file that holds the blocks")
    size: Size | None = Field(default=None, examples=['"1G"'], description="size of the file")
    read_only: bool = Field(default=False, examples=["true"], description="an image that is there and is not changed")
    lba: Literal[512, 4096] = Field(default=512, examples=["4096"], description="size of a logical block in bytes")

    @field_validator("path", mode="after")
    @classmethod
    def _from_base(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        """Makes a relative path relative to the machine file's directory."""
        if value is not None and ("\0" in str(value) or not value.name):
            raise ValueError("is not the path of a file")
        base = (info.context or {}).get("base")
        return base / value if value is not None and base is not None else value

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if (self.memory is None) == (self.path is None):
            raise ValueError('a namespace needs either memory = "256M" or path = "disk.img"')
        if self.memory is not None and (self.size is not None or self.read_only):
            raise ValueError("size and read_only go with path, not with memory")
        if self.read_only and self.size is not None:
            raise ValueError("size does not go with read_only: the image has one")
        return self


class NvmeParams(Params):
    """Parameters of nvme."""

    serial: Annotated[str, Field(min_length=1, max_length=20), AfterValidator(_printable)] | None = Field(
        default=None, examples=['"VM0001"'], description="serial number; without it, the device's name"
    )
    product: Annotated[str, Field(min_length=1, max_length=40), AfterValidator(_printable)] = Field(
        default="vmodel NVMe", examples=['"vmodel NVMe"'], description="model number"
    )
    firmware: Annotated[str, Field(min_length=1, max_length=8), AfterValidator(_printable)] = Field(
        default="1.0", examples=['"1.0"'], description="firmware revision"
    )
    queues: int = Field(
        default=16, ge=1, le=QUEUE_PAIRS - 1, strict=True, examples=["16"], description="I/O queue pairs"
    )
    queue_entries: int = Field(
        default=1024, ge=2, le=65536, strict=True, examples=["1024"], description="most entries of an I/O queue"
    )
    interrupts: Literal["msix", "msi"] = Field(
        default="msix", examples=['"msi"'], description="msi: needed where the device is to be unplugged"
    )
    doorbell_stride: int = Field(
        default=0, ge=0, le=MAX_STRIDE, strict=True, examples=["0"], description="doorbells are 4 << n bytes apart"
    )
    max_page_shift: int = Field(
        default=16, ge=12, le=16, strict=True, examples=["16"], description="largest page size is 1 << n bytes"
    )
    max_transfer: Annotated[int, BeforeValidator(number), WithJsonSchema({"type": ["integer", "string"]})] = Field(
        default=2 * MiB, examples=['"2M"'], description="largest transfer of one command in bytes"
    )
    shadow_doorbells: bool = Field(
        default=True, strict=True, examples=["false"], description="offer Doorbell Buffer Config"
    )
    subsystem_reset: bool = Field(
        default=False, strict=True, examples=["true"], description="offer a reset of the subsystem by register NSSR"
    )
    fast_path: bool = Field(
        default=True, strict=True, examples=["false"], description="false: every command by way of Python"
    )
    capacity: Size | None = Field(
        default=None, examples=['"1G"'], description="space in memory for namespaces that the guest makes"
    )
    namespaces: list[NamespaceParams] = Field(
        default_factory=list,
        max_length=MAX_NAMESPACES,
        examples=['[ { memory = "256M" } ]'],
        description="the namespaces, from id 1 on",
    )

    @field_validator("max_transfer", mode="after")
    @classmethod
    def _power(cls, value: int) -> int:
        if not 4096 <= value <= 16 * MiB or value & (value - 1):
            raise ValueError('must be a power of two from "4K" to "16M"')
        return value

    @model_validator(mode="after")
    def _paths_differ(self) -> Self:
        paths = [str(n.path) for n in self.namespaces if n.path is not None and not n.read_only]
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"two namespaces have the file {path!r}")
        return self
