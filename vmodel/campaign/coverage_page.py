"""The coverage of a campaign on its page: for each build of the code, the sections of `vmodel.coverage.sections`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vmodel.campaign.coverage import BuildCoverage, CampaignCoverage
from vmodel.coverage.sections import VIEW, Sections, asset, sections
from vmodel.coverage.sources import Sources

#: The most builds on a page, those with the most runs; JSON has all.
_BUILDS = 4


@dataclass(frozen=True)
class CoveragePart:
    """What the page of a campaign gets."""

    builds: Sequence[tuple[BuildCoverage, Sections]]
    notes: Sequence[str]
    style: Markup
    view: Markup
    script: Markup


def coverage_part(
    coverage: CampaignCoverage, rules: Mapping[str, Sequence[str]], sources: Sources
) -> CoveragePart | None:
    """The part; None: the campaign has no coverage.  `rules`: of each plan, in the command line's form."""
    if not coverage:
        return None
    builds = sorted(coverage.builds, key=lambda build: -len(build.new))[:_BUILDS]
    notes = list(coverage.notes)
    if len(coverage.builds) > len(builds):
        notes.append(f"{len(coverage.builds) - len(builds)} more builds of the code are in the JSON")
    made = [
        sections(
            build.comparison,
            sources,
            prefix=f"c{n}-",
            level=4,
            box="wide tall",
            rules=rules,
            first=build.first,
            facts={f"runs, {build.clean_runs:,} without faults": len(build.new)},
        )
        for n, build in enumerate(builds, 1)
    ]
    return CoveragePart(list(zip(builds, made, strict=True)), notes, asset("sections.css"), VIEW, asset("sections.js"))
