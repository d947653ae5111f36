"""Makes one self-contained Python file of a module: everything it uses of this project is copied into it.

An export must load where this project is not installed. Its code is therefore not written twice: a module of
`pipeline.serving.remote` imports masks, connectors and templates as any other module does, and :func:`bundle` replaces
each import by the source of what is imported, and of what that uses in turn.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

PACKAGES = ("pipeline", "data_prep")
REQUIREMENTS = ("numpy", "PIL", "tokenizers", "torch", "transformers", *sys.stdlib_module_names)
"""What the exported files may import: transformers and what it needs anyway."""
SIBLINGS = "pipeline.serving.remote"
"""Modules of this package are shipped beside each other, and import each other relatively."""
PARTS = f"{SIBLINGS}.parts"
"""Definitions of this module are replaced by those of the exported model."""

_NOTICE = "Made by `mma export` from the training code; a change here changes what the model computes."


@dataclass(frozen=True)
class _Statement:
    """A statement at the top of a module."""

    text: str
    node: ast.stmt

    @property
    def uses(self) -> set[str]:
        """Names that running the statement, or what it defines, may look up in its module."""
        return _runtime_names(self.node)


@dataclass(frozen=True)
class _Module:
    """A parsed module."""

    name: str
    docstring: str
    defined: dict[str, _Statement]
    """Name -> the statement that defines it."""
    imported: dict[str, tuple[str, str]]
    """Name -> (module, name there); an empty name imports the module itself."""

    def statements(self) -> Iterator[_Statement]:
        """Yield every definition once, in order."""
        return iter(dict.fromkeys(self.defined.values()))


@dataclass
class _Bundle:
    """The definitions collected so far, in an order in which each follows what it uses."""

    imports: set[tuple[str, str, str]] = field(default_factory=set)
    """(module, name in it or "" for the module itself, name in the file)."""
    texts: list[str] = field(default_factory=list)
    owners: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Name in the file -> where it comes from."""
    parts: Mapping[str, type] = field(default_factory=dict)
    """Names of `PARTS` -> what stands for them in this file."""

    def add(self, module: _Module, name: str, alias: str) -> None:
        """Add what ``name`` means in a module. Raises ValueError where two things share a name."""
        if name in module.imported:
            self._add_imported(*module.imported[name], name)
        elif name in module.defined and self._claim(alias, module.name, name):
            _refuse_late_imports(module.name, module.defined[name].node)
            for used in sorted(module.defined[name].uses - {name}):
                self.add(module, used, used)
            if module.defined[name].text not in self.texts:
                self.texts.append(module.defined[name].text)

    def _add_imported(self, origin: str, name: str, alias: str) -> None:
        if origin == PARTS:
            self._add_part(alias)
        elif origin.startswith(SIBLINGS + "."):
            if self._claim(alias, origin, name):
                self.imports.add((f".{origin.rpartition('.')[2]}", name, alias))
        elif origin.partition(".")[0] not in PACKAGES:
            if origin.partition(".")[0] not in REQUIREMENTS:
                raise ValueError(f"{alias} of {origin} is not among what an export may need: {', '.join(REQUIREMENTS)}")
            if self._claim(alias, origin, name):
                self.imports.add((origin, name, alias))
        elif name != alias or not name:
            raise ValueError(f"{origin}.{name} is imported as {alias}: import definitions by their own names")
        else:
            self.add(_parse(origin), name, alias)

    def _add_part(self, alias: str) -> None:
        if self._claim(alias, PARTS, alias):
            part = self.parts[alias]
            self.add(_parse(part.__module__), part.__name__, part.__name__)
            self.texts.append(f"{alias} = {part.__name__}")

    def _claim(self, alias: str, origin: str, name: str) -> bool:
        """Return whether a name is new. Raises ValueError when it already means something else."""
        known = self.owners.get(alias)
        if known is not None and known != (origin, name):
            raise ValueError(f"{alias} means {'.'.join(known)} and {origin}.{name}: rename one")
        self.owners[alias] = (origin, name)
        return known is None


def bundle(module_name: str, parts: Mapping[str, type] | None = None) -> str:
    """Return the source of a module of this project with everything it uses of the project copied in.

    Args:
        module_name: a module whose runtime imports are standard, from the file's requirements, or of this project.
        parts: classes that replace those of `PARTS`, by name.

    Returns:
        Python source without an import of this project, except of its siblings (relatively).

    Raises:
        ValueError: two different definitions have one name, or a function imports a module of this project when it
            runs.
    """
    module, made = _parse(module_name), _Bundle(parts=parts or {})
    for statement in module.statements():
        for name in [name for name, own in module.defined.items() if own is statement]:
            made.add(module, name, name)
    head = f'"""{module.docstring.strip()}\n\n{_NOTICE}\n"""'
    sections = [head, "from __future__ import annotations", _import_lines(made.imports), *made.texts]
    return "\n\n".join(section for section in sections if section) + "\n"


def _import_lines(imports: set[tuple[str, str, str]]) -> str:
    """Write imports, one line for each module."""
    lines = [f"import {_renamed(origin, alias)}" for origin, name, alias in sorted(imports) if not name]
    names: dict[str, list[str]] = {}
    for origin, name, alias in sorted(imports):
        if name:
            names.setdefault(origin, []).append(_renamed(name, alias))
    return "\n".join([*lines, *(f"from {origin} import {', '.join(listed)}" for origin, listed in names.items())])


@lru_cache(maxsize=64)
def _parse(name: str) -> _Module:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name
    source = Path(spec.origin).read_text(encoding="utf-8")
    tree = ast.parse(source)
    module = _Module(name, ast.get_docstring(tree) or "", {}, {})
    for position, node in enumerate(tree.body):
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            module.imported.update({one.asname or one.name: (node.module or "", one.name) for one in node.names})
        elif isinstance(node, ast.Import):
            module.imported.update({one.asname or one.name.partition(".")[0]: (one.name, "") for one in node.names})
        elif names := _defined_names(node):
            last = _with_docstring(tree.body, position)
            statement = _Statement(_text(source, node, last), node)
            module.defined.update(dict.fromkeys(names, statement))
    return module


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]


def _with_docstring(body: list[ast.stmt], position: int) -> ast.stmt:
    """Return the last statement that belongs to a definition: an attribute may be followed by its docstring."""
    after = body[position + 1] if position + 1 < len(body) else None
    is_text = (
        isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    )
    return after if is_text and isinstance(body[position], ast.Assign | ast.AnnAssign) and after else body[position]


def _text(source: str, first: ast.stmt, last: ast.stmt) -> str:
    start = min([first.lineno, *(one.lineno for one in getattr(first, "decorator_list", []))])
    return "\n".join(source.splitlines()[start - 1 : last.end_lineno])


def _runtime_names(node: ast.stmt) -> set[str]:
    """Return the names of a statement outside annotations, which are never evaluated."""
    found: set[str] = set()
    todo: list[ast.AST] = [node]
    while todo:
        one = todo.pop()
        if isinstance(one, ast.Name):
            found.add(one.id)
        skipped = [getattr(one, key, None) for key in ("annotation", "returns")]
        if isinstance(one, ast.AnnAssign) and ast.unparse(one.annotation).startswith("ClassVar"):
            found.add("ClassVar")  # dataclasses look it up by name
        todo += [child for child in ast.iter_child_nodes(one) if child not in skipped]
    return found


def _refuse_late_imports(module: str, node: ast.stmt) -> None:
    for one in ast.walk(node):
        if isinstance(one, ast.ImportFrom) and (one.module or "").partition(".")[0] in PACKAGES:
            raise ValueError(f"{module} imports {one.module} inside a function: import it at the top")


def _renamed(name: str, alias: str) -> str:
    return name if name == alias else f"{name} as {alias}"
