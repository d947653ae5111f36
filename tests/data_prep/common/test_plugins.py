"""Registries: what other packages add, and what they get wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from data_prep.common import plugins
from data_prep.common.errors import UserError
from data_prep.common.plugins import NotOurs, Registry, must_be, plugins_in_use

MODULE = """
from tests.data_prep.common.test_plugins import Thing
class Other: pass
good, twice, renamed, built = Thing("good"), Thing("twice"), Thing("else"), Thing("built")
"""


class Thing:
    """What the registry holds."""

    def __init__(self, name: str) -> None:
        self.name = name


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of installed packages, and caches that forget."""
    monkeypatch.syspath_prepend(tmp_path)
    plugins._points.cache_clear()
    plugins._warn_once.cache_clear()
    monkeypatch.setattr(plugins, "_IN_USE", set())
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("acme_")]:
        del sys.modules[name]
    plugins._points.cache_clear()


def install(site: Path, package: str, points: Mapping[str, str], module: str = MODULE) -> None:
    """Write a package as an installer leaves it: a module and its metadata."""
    name = package.replace("-", "_")
    (site / f"{name}.py").write_text(module)
    info = site / f"{name}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    lines = [f"{entry} = {name}:{what}" for entry, what in points.items()]
    (info / "entry_points.txt").write_text("[mma.policies]\n" + "\n".join(lines) + "\n")


def registry() -> Registry[Thing]:
    return Registry("mma.policies", "mask policy", {"built": Thing("built")}, must_be(Thing))


def test_a_plug_in_is_found_by_name_and_recorded(site: Path) -> None:
    install(site, "acme-things", {"good": "good"})
    things = registry()
    assert plugins_in_use() == []
    assert "good" in things and things["good"].name == "good" and list(things) == ["built", "good"]
    assert plugins_in_use() == [{"group": "mma.policies", "name": "good", "package": "acme-things", "version": "1.5"}]
    assert things.identity("good") == "good of package acme-things 1.5" and things.identity("built") == "built"
    assert "bad" not in things and len(things) == 2


def test_nothing_is_imported_before_it_is_named(site: Path) -> None:
    install(site, "acme-lazy", {"good": "good"}, "raise RuntimeError('imported')")
    things = registry()
    assert things["built"].name == "built" and "acme_lazy" not in sys.modules
    with pytest.raises(UserError, match=r"mask policy 'good' of package acme-lazy 1.5 .*RuntimeError: imported"):
        things["good"]


BROKEN = {
    "missing": ({"good": "nowhere"}, "", "good", r"of package acme-b 1.5 cannot be used \(AttributeError: .*nowhere"),
    "syntax": ({"good": "good"}, "def (", "good", r"SyntaxError"),
    "exits": ({"good": "good"}, "raise SystemExit(3)", "good", r"SystemExit: 3"),
    "wrong-kind": ({"good": "Other"}, MODULE, "good", "it is a type, not a Thing.*repair or uninstall the package"),
    "wrong-name": ({"good": "renamed"}, MODULE, "good", "its name is 'else', its entry point's name is 'good'"),
    "built-in": ({"built": "built"}, MODULE, "built", "'built' is built in, and package acme-b 1.5 brings another"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plug_in_is_one_line_when_named_and_a_warning_when_listed(
    case: str, site: Path, caplog: pytest.LogCaptureFixture
) -> None:
    points, module, name, words = BROKEN[case]
    install(site, "acme-b", points, module)
    things = registry()
    with pytest.raises(UserError, match=words) as caught:
        things[name]
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError):
        assert name in things
    assert [other for other in things if other != "built"] == [] and "acme-b" in caplog.text


def test_two_packages_with_one_name_are_both_named(site: Path) -> None:
    install(site, "acme-one", {"twice": "twice"})
    install(site, "acme-two", {"twice": "twice"})
    with pytest.raises(UserError, match=r"'twice' is in package acme-one 1.5 and package acme-two 1.5: uninstall one"):
        registry()["twice"]


def test_registries_that_share_a_group_take_their_own(site: Path) -> None:
    install(site, "acme-shared", {"good": "good"})

    def refuse(name: str, found: object) -> Thing:
        raise NotOurs

    assert list(Registry("mma.policies", "tower", {}, refuse)) == [] and list(registry()) == ["built", "good"]


def test_every_group_has_a_registry() -> None:
    code = (
        "from data_prep.common.plugins import GROUPS\n"
        "from data_prep.corpora import CORPORA\nfrom pipeline.evaluation.registry import BENCHMARKS\n"
        "from pipeline.masks import POLICIES\nfrom pipeline.model.connectors import CONNECTORS\n"
        "from pipeline.model.families.registry import LLM_FAMILIES, VISION_FAMILIES\n"
        "made = (POLICIES, CORPORA, CONNECTORS, LLM_FAMILIES, VISION_FAMILIES, BENCHMARKS)\n"
        "assert {each.group for each in made} == set(GROUPS)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
