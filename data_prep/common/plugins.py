"""Extensions from other packages: one registry per extension point, filled by built-in entries and entry points.

A package adds an entry with the entry point of the registry's group, under the entry's own name::

    [project.entry-points."mma.policies"]
    my_policy = "my_package:MY_POLICY"

Nothing is imported before its name is asked for, or the registry is listed. A broken plug-in never stops a command
that does not name it: listing skips it with a warning. Installed packages are trusted, as any import is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from data_prep.common.errors import UserError, one_line

log = logging.getLogger(__name__)

T = TypeVar("T")
GROUPS = ("mma.policies", "mma.corpora", "mma.connectors", "mma.families", "mma.metrics")
"""Entry-point groups, one per extension point."""


@dataclass(frozen=True, order=True)
class Plugin:
    """An entry of another package that this process uses."""

    group: str
    name: str
    package: str
    version: str
    """Of the package."""


_IN_USE: set[Plugin] = set()


def plugins_in_use(*groups: str) -> list[dict[str, Any]]:
    """Return the plug-ins of some groups that this process has looked up by name, as JSON-ready records in order."""
    return [asdict(plugin) for plugin in sorted(_IN_USE) if plugin.group in (groups or GROUPS)]


class NotOurs(Exception):  # noqa: N818 - no error: another registry of the same group takes the entry
    """Raised by the ``accept`` of a registry that shares its group: the entry belongs to another registry."""


class Registry(Mapping[str, T], Generic[T]):
    """Entries by name: those of this project, then those of other packages.

    Lookups and ``in`` raise UserError, in one line, when the named plug-in cannot be loaded, is not what the registry
    holds, or has the name of another entry. Iteration skips such plug-ins with a warning.
    """

    def __init__(self, group: str, what: str, built_in: Mapping[str, T], accept: Callable[[str, object], T]) -> None:
        """Describe a registry.

        Args:
            group: entry-point group.
            what: an entry in messages, such as ``mask policy``.
            built_in: the project's own entries.
            accept: checks a loaded object of this name and returns the entry. Raises UserError saying what it has to
                be, or NotOurs.
        """
        assert group in GROUPS, group
        self.group, self.what, self.built_in = group, what, dict(built_in)
        self._accept = accept
        self._loaded: dict[str, T | None] = {}

    def __getitem__(self, name: str) -> T:
        points = _points(self.group).get(name, ())
        if name in self.built_in:
            if points:
                raise UserError(f"{self.what} '{name}' is built in, and {_owner(points[0])} brings another: {_REMOVE}")
            return self.built_in[name]
        found = self._load(name, points) if points else None
        if found is None:
            raise KeyError(name)
        _IN_USE.add(_record(points[0]))
        return found

    def __contains__(self, name: object) -> bool:
        try:
            self[name]  # type: ignore[index]  # anything else is not in, or not hashable, as in a dictionary
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        yield from self.built_in
        for name, points in _points(self.group).items():
            try:
                found = None if name in self.built_in and self[name] else self._load(name, points)
            except UserError as problem:
                _warn_once(f"{problem} (skipped)")
                continue
            if found is not None:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def identity(self, name: str) -> str:
        """Return the name; of a plug-in with its package and version, whose results another version must not reuse."""
        points = () if name in self.built_in else _points(self.group).get(name, ())
        return f"{name} of {_owner(points[0])}" if points else name

    def _load(self, name: str, points: tuple[EntryPoint, ...]) -> T | None:
        """Return the entry of a plug-in, None if another registry takes it. Raises UserError."""
        if name not in self._loaded:
            self._loaded[name] = self._read(name, points)
        return self._loaded[name]

    def _read(self, name: str, points: tuple[EntryPoint, ...]) -> T | None:
        if len(points) > 1:
            owners = " and ".join(map(_owner, points))
            raise UserError(f"{self.what} '{name}' is in {owners}: {_REMOVE}")
        try:
            return self._accept(name, points[0].load())
        except NotOurs:
            return None
        except (Exception, SystemExit) as error:  # whatever the package's own code raises
            raise UserError(
                f"{self.what} '{name}' of {_owner(points[0])} cannot be used "
                f"({type(error).__name__}: {one_line(error)}): repair or uninstall the package"
            ) from error


_REMOVE = "uninstall one of the packages, or rename its entry"


def must_be(kind: type[T], name_of: str = "name") -> Callable[[str, object], T]:
    """Return an ``accept`` for objects of exactly one class whose attribute ``name_of`` is the entry's name."""

    def accept(name: str, found: object) -> T:
        if not isinstance(found, kind):
            raise UserError(f"it is a {type(found).__name__}, not a {kind.__name__}")
        return same_name(name, found, name_of)

    return accept


def must_subclass(kind: type[T], name_of: str = "") -> Callable[[str, object], type[T]]:
    """Return an ``accept`` for subclasses of a class; their attribute ``name_of``, if given, is the entry's name."""

    def accept(name: str, found: object) -> type[T]:
        if not isinstance(found, type) or not issubclass(found, kind):
            raise UserError(f"it is no subclass of {kind.__name__}")
        return same_name(name, found, name_of) if name_of else found

    return accept


def same_name(name: str, found: T, name_of: str) -> T:
    """Return the entry if its own name is that of its entry point. Raises UserError."""
    if (own := getattr(found, name_of, None)) != name:
        raise UserError(f"its {name_of} is {own!r}, its entry point's name is {name!r}: make them equal")
    return found


@lru_cache(maxsize=len(GROUPS))
def _points(group: str) -> dict[str, tuple[EntryPoint, ...]]:
    """Return the installed entry points of a group by name, from the packages' metadata; nothing is imported."""
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, _owner(point))):
        found[point.name] = (*found.get(point.name, ()), point)
    return found


def _record(point: EntryPoint) -> Plugin:
    package, version = (point.dist.name, point.dist.version) if point.dist else ("", "")
    return Plugin(point.group, point.name, package, version)


def _owner(point: EntryPoint) -> str:
    return f"package {point.dist.name} {point.dist.version}" if point.dist else f"an unnamed package ({point.value})"


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    log.warning(message)
