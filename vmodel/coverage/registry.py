"""`Programs`: finds the program that a coverage is of, by name and build id, when it is needed."""

from __future__ import annotations

from collections.abc import Callable

from vmodel.coverage.errors import CoverageError
from vmodel.coverage.program import Program

#: Finds a program by name and build id; None: it is unknown.
FindProgram = Callable[[str, str], Program | None]


class Programs:
    """Programs by name and build id, and functions that find more."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, str], Program] = {}
        self._finders: list[FindProgram] = []

    def add(self, program: Program) -> Program:
        """Knows the program from now on; returns the one that is known already if there is one."""
        return self._known.setdefault((program.name, program.build_id), program)

    def add_finder(self, find: FindProgram) -> None:
        """Asks `find` for programs that are not known; it may raise CoverageError."""
        if find not in self._finders:
            self._finders.append(find)

    def find(self, name: str, build_id: str) -> Program:
        """The program.  CoverageError: nobody knows it."""
        known = self._known.get((name, build_id))
        if known is not None:
            return known
        for find in self._finders:
            found = find(name, build_id)
            if found is not None and (found.name, found.build_id) == (name, build_id):
                return self.add(found)
        raise CoverageError(
            f"{name} with build id {build_id or 'none'}: this file is not here, so its functions are unknown"
        )


#: The programs of this process.
programs = Programs()
