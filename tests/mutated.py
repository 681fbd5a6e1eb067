"""A pytest plugin that plants the mistake named by `VARACCEL_MUTANT` in the library while it is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

from tests.mutants import MUTANTS, Mutant


class MutatedLoader(SourceFileLoader):
    """Compiles the changed source; nothing is written, and no cached bytecode is read."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(mutant.module, str(mutant.path))
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.mutant.source(), self.path, "exec", dont_inherit=True)


class MutatedFinder(MetaPathFinder):
    """Finds the one module that is changed."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.mutant.module:
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None
        spec.loader = MutatedLoader(self.mutant)
        return spec


if chosen := os.environ.get("VARACCEL_MUTANT"):
    sys.meta_path.insert(0, MutatedFinder(MUTANTS[chosen]))
