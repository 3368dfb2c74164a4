#!/usr/bin/env python3
"""Compare what megatron-core needs of Transformer Engine with the sources of its releases, file by file.

python tools/compare_transformer_engine.py REPOSITORY REF…     # a git clone of NVIDIA's or AMD's, branches or commits

Prints each need that one of them lacks, with the releases and what they lack; the last line counts those that lack
nothing. It reads the sources alone: nothing is built, imported or run. docs/transformer_engine.md is written from it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from megatron_rocm.platform.transformer_engine import NEEDS, PACKAGE, USES, Need

Definition = ast.FunctionDef | ast.ClassDef | ast.expr


@dataclass(frozen=True)
class Found:
    """What a dotted name is in a source tree: a module (no node), or a definition within one; neither if it is
    another package's, of which the sources say nothing."""

    module: str = ""
    node: Definition | None = None


class Sources:
    """The package's modules at one state of a repository."""

    def __init__(self, repository: str, ref: str) -> None:
        self._git = ("git", "-C", repository)
        self._ref = ref
        self._files = set(self._say("ls-tree", "-r", "--name-only", ref, PACKAGE).split())
        self._modules: dict[str, dict[str, Any] | None] = {}
        self.version = Version(self._say("show", f"{ref}:build_tools/VERSION.txt").strip())

    def _say(self, *words: str) -> str:
        return subprocess.run([*self._git, *words], capture_output=True, text=True, check=True).stdout

    def module(self, name: str) -> dict[str, Any] | None:
        """Top-level name → where it comes from, or None for no module of this package."""
        if name not in self._modules:
            stem = name.replace(".", "/")
            path = next((file for file in (f"{stem}/__init__.py", f"{stem}.py") if file in self._files), None)
            within = name if path == f"{stem}/__init__.py" else name.rpartition(".")[0]
            tree = ast.parse(self._say("show", f"{self._ref}:{path}")) if path else None
            self._modules[name] = dict(_names(tree.body, within)) if tree else None
        return self._modules[name]

    def find(self, name: str) -> Found | None:
        """What a dotted name is, through imports and base classes; None where there is none."""
        if self.module(name) is not None:
            return Found(name)
        above, _, last = name.rpartition(".")
        place = self.find(above) if above else None
        if place is None or place.node is None and not place.module:
            return place
        if isinstance(place.node, ast.ClassDef):
            return self.member(place, last)
        names = self.module(place.module) if place.node is None else {}
        source = (names or {}).get(last)
        if isinstance(source, str):  # imported
            return self.find(source) if source.split(".")[0] == PACKAGE else Found()
        if source is None:
            stars = (self.find(f"{star}.{last}") for star in (names or {}) if (names or {})[star] is ...)
            return next(filter(None, stars), None)
        if isinstance(source, (ast.Name, ast.Attribute)):  # another name for something of the same module
            return self.find(f"{place.module}.{ast.unparse(source)}") or Found(place.module, source)
        return Found(place.module, source)

    def member(self, place: Found, name: str) -> Found | None:
        """A method or attribute of a class, or of what it inherits from."""
        assert isinstance(place.node, ast.ClassDef)
        for line in place.node.body:
            if name in _defined(line):
                return Found(place.module, line if isinstance(line, ast.FunctionDef) else ast.Constant(None))
        bases = (self.find(f"{place.module}.{ast.unparse(base)}") for base in place.node.bases)
        inherited = (self.member(base, name) for base in bases if base and isinstance(base.node, ast.ClassDef))
        return next(filter(None, inherited), None)

    def lacks(self, need: Need) -> str:
        """What is missing of a need, "" where nothing is, or where megatron-core asks later versions alone for it."""
        if self.version < Version(need.since or "0"):
            return ""
        found = self.find(need.name)
        if found is None:
            return "missing"
        without = [f"no .{name}" for name in need.members if self.find(f"{need.name}.{name}") is None]
        arguments = self._arguments(found)
        if arguments is None:
            return ", ".join(without)
        positional, keywords = arguments
        without += [f"no {name}=" for name in need.keywords if name not in keywords]
        if need.positional > len(positional):
            without.append(f"{len(positional)} arguments")
        return ", ".join(without)

    def _arguments(self, found: Found) -> tuple[list[str], set[str]] | None:
        """Arguments by position, and all names; None where any will do or nothing is known."""
        node, own = found.node, 0
        if isinstance(node, ast.ClassDef):
            if any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
                fields = [name for line in node.body if isinstance(line, ast.AnnAssign) for name in _defined(line)]
                return fields, set(fields)
            init = self.member(found, "__init__")
            node, own = (init.node if init else None), 1
        if not isinstance(node, ast.FunctionDef) or node.args.kwarg or node.args.vararg:
            return None
        positional = [one.arg for one in (*node.args.posonlyargs, *node.args.args)][own:]
        return positional, {*positional, *(one.arg for one in node.args.kwonlyargs)}


def _names(body: Iterable[ast.stmt], package: str) -> Iterator[tuple[str, Any]]:
    """Top-level names, those under conditions too, each with its definition or the dotted name that it is imported
    from. A star import is its module's name with an ellipsis."""
    for line in body:
        if isinstance(line, (ast.FunctionDef, ast.ClassDef)):
            yield line.name, line
        elif isinstance(line, (ast.Assign, ast.AnnAssign)):
            yield from ((name, line.value) for name in _defined(line))
        elif isinstance(line, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - line.level + 1] if line.level else []
            module = ".".join([*above, *filter(None, [line.module])])
            yield from (
                (module, ...) if one.name == "*" else (one.asname or one.name, f"{module}.{one.name}")
                for one in line.names
            )
        elif isinstance(line, ast.Import):
            yield from ((one.asname or one.name.split(".")[0], one.name) for one in line.names)
        else:
            for part in ("body", "orelse", "finalbody"):
                yield from _names(getattr(line, part, ()), package)
            for handler in getattr(line, "handlers", ()):
                yield from _names(handler.body, package)


def _defined(line: ast.stmt) -> list[str]:
    if isinstance(line, ast.FunctionDef):
        return [line.name]
    targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    repository, *refs = arguments
    states = {ref: Sources(repository, ref) for ref in refs}
    complete = set(refs)
    for need in NEEDS:
        told = {ref: said for ref, sources in states.items() if (said := sources.lacks(need))}
        if told:
            complete -= set(told) if USES[need.use].ours else set()
            where = "; ".join(f"{ref}: {said}" for ref, said in told.items())
            print(f"{need.name.removeprefix(f'{PACKAGE}.')} ({need.use}): {where}")
    print(f"{len(complete)} of {len(refs)} lack nothing that our runs can come to: {' '.join(sorted(complete))}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
