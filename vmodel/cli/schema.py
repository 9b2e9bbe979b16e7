"""vmodel schema."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer
from pydantic import BaseModel

from vmodel.campaign.schema import CampaignFile
from vmodel.config_schema import json_schema
from vmodel.inject import FaultPlan
from vmodel.machine.schema import MachineFile


class FileKind(StrEnum):
    """The TOML files that users write."""

    MACHINE = "machine"
    PLAN = "plan"
    CAMPAIGN = "campaign"


SCHEMAS: dict[FileKind, type[BaseModel]] = {
    FileKind.MACHINE: MachineFile,
    FileKind.PLAN: FaultPlan,
    FileKind.CAMPAIGN: CampaignFile,
}


def schema(kind: Annotated[FileKind, typer.Argument(help="The kind of file.", show_default=False)]) -> None:
    """Print the JSON Schema of a kind of file, for editors."""
    print(json.dumps(json_schema(SCHEMAS[kind]), indent=2))
