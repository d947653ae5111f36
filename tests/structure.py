"""The shape of the source: sizes, docstrings, imports between rooms. ``python -m tests.structure`` prints the table.

A room is a package of `pipeline` or `data_prep`, or a module at their top. CONTRIBUTING.md lists which room may import
which; that table is the rule, and this file reads it.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_prep", "pipeline")
MAX_FILE, MEDIAN_FILE = 600, 200
MAX_FUNCTION, MEDIAN_FUNCTION, P90_FUNCTION = 80, 12, 40
MIN_TEST_SHARE = 0.6
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file, parsed."""

    path: Path
    """Relative to the repository."""
    lines: int
    tree: ast.Module

    @property
    def name(self) -> str:
        """Dotted name."""
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")

    def functions(self) -> Iterator[Function]:
        """Yield every function and method."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))


def modules(*folders: str) -> list[Module]:
    """Parse all Python files below these folders."""
    files = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in files]
    return [
        Module(path.relative_to(ROOT), text.count("\n"), ast.parse(text))
        for path, text in zip(files, texts, strict=True)
    ]


def room(module: str) -> str:
    """Return the room a module lies in: ``pipeline.masks`` for ``pipeline.masks.proof``."""
    return ".".join(module.split(".")[:2])


def imports() -> dict[str, set[str]]:
    """Return which rooms each room imports, wherever in a file the import stands."""
    found: dict[str, set[str]] = defaultdict(set)
    for module in modules(*PACKAGES):
        own = room(module.name)
        found[own].update(room(name) for name in _imported(module.tree) if room(name) != own)
    found.pop("pipeline", None)
    found.pop("data_prep", None)
    return dict(found)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES)


def allowed_imports() -> dict[str, set[str]]:
    """Return the tables of CONTRIBUTING.md: room -> rooms it imports; rows stand in order, lowest room first.

    A short name is a room of the same package.
    """
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `((?:pipeline|data_prep)[.\w]*)` \|[^|]*\|([^|]*)\|$", text, re.M)
    return {
        name: {
            short if "." in short else f"{name.split('.')[0]}.{short}" for short in re.findall(r"`([.\w]+)`", listed)
        }
        for name, listed in rows
    }


@dataclass(frozen=True)
class Sizes:
    """What the style guide limits, measured."""

    source_lines: int
    test_lines: int
    files: Mapping[str, int]
    """Lines of each file."""
    functions: Mapping[str, int]
    """Lines of each function."""
    undocumented: tuple[str, ...]
    """Public modules, classes and functions without a docstring."""
    public: int
    unannotated: tuple[str, ...]
    """Functions without a return annotation."""

    @classmethod
    def measure(cls) -> Sizes:
        """Measure the tree."""
        source = modules(*PACKAGES)
        functions = {
            f"{module.path}:{node.lineno} {node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
            for module in source
            for node in module.functions()
        }
        bare = [
            f"{module.path}:{node.lineno} {node.name}"
            for module in source
            for node in module.functions()
            if node.returns is None
        ]
        public = [item for module in source for item in _public(module)]
        return cls(
            source_lines=sum(module.lines for module in source),
            test_lines=sum(module.lines for module in modules("tests")),
            files={str(module.path): module.lines for module in source if module.lines > 1},
            functions=functions,
            undocumented=tuple(name for name, documented in public if not documented),
            public=len(public),
            unannotated=tuple(bare),
        )

    def rows(self) -> Iterator[tuple[str, str, str, bool]]:
        """Yield (what, measured, limit, whether it holds)."""
        files, functions = sorted(self.files.values()), sorted(self.functions.values())
        p90 = functions[len(functions) * 9 // 10]
        share = self.test_lines / self.source_lines
        documented = 1 - len(self.undocumented) / self.public
        median_file, median_function = statistics.median(files), statistics.median(functions)
        yield "source lines", f"{self.source_lines:,} in {len(files)} files", "", True
        yield "test lines / source lines", f"{share:.2f}", f">= {MIN_TEST_SHARE}", share >= MIN_TEST_SHARE
        yield "file, median lines", f"{median_file:g}", f"<= {MEDIAN_FILE}", median_file <= MEDIAN_FILE
        yield "file, most lines", f"{files[-1]}", f"<= {MAX_FILE}", files[-1] <= MAX_FILE
        yield (
            "function, median lines",
            f"{median_function:g}",
            f"<= {MEDIAN_FUNCTION}",
            median_function <= MEDIAN_FUNCTION,
        )
        yield "function, 90th percentile", f"{p90}", f"<= {P90_FUNCTION}", p90 <= P90_FUNCTION
        yield "function, most lines", f"{functions[-1]}", f"<= {MAX_FUNCTION}", functions[-1] <= MAX_FUNCTION
        yield "public docstrings", f"{documented:.1%}", "100%", not self.undocumented
        yield "return annotations", f"{len(self.unannotated)} missing", "0", not self.unannotated

    def offenders(self) -> list[str]:
        """Return what lies beyond a limit, by name."""
        return [
            *(f"{name}: {lines} lines" for name, lines in self.files.items() if lines > MAX_FILE),
            *(f"{name}: {lines} lines" for name, lines in self.functions.items() if lines > MAX_FUNCTION),
            *(f"{name}: no docstring" for name in self.undocumented),
            *(f"{name}: no return annotation" for name in self.unannotated),
        ]


def _public(module: Module) -> Iterator[tuple[str, bool]]:
    """Yield each public module, class and function at the top of a module or class, and whether it has a docstring."""
    yield str(module.path), ast.get_docstring(module.tree) is not None
    for node in module.tree.body:
        yield from _public_in(node, str(module.path))


def _public_in(node: ast.stmt, where: str) -> Iterator[tuple[str, bool]]:
    if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
        return
    overload = any("overload" in ast.dump(decorator) for decorator in node.decorator_list)
    yield f"{where}:{node.lineno} {node.name}", overload or ast.get_docstring(node) is not None
    if isinstance(node, ast.ClassDef):
        for inner in node.body:
            yield from _public_in(inner, where)


def main() -> int:
    """Print the table; return 1 where a limit is passed."""
    sizes = Sizes.measure()
    rows = list(sizes.rows())
    width = max(len(what) for what, *_ in rows)
    for what, measured, limit, holds in rows:
        print(f"{what:{width}}  {measured:>20}  {limit:>8}  {'' if holds else '<- beyond the limit'}".rstrip())
    for line in sizes.offenders():
        print(line, file=sys.stderr)
    return 0 if all(holds for *_, holds in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
