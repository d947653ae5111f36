"""Recipe YAML."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.recipe import SHIPPED, load_recipe
from tests.fuzz.files import as_file

DICTIONARY = (
    *(b"&a ", b"*a", b"<<: ", b"!!python/object:os.system", b"!!binary ", b"2001-01-01", b"0o777", b"1_000", b".inf"),
    *(b"\0", b"${HOME}", b"${X:-1}", b"? ", b"- ", b"[" * 2000, b"{a: " * 2000, b"9" * 5000, b"\xed\xa0\x80"),
    *(b"seq_len:", b"corpora:", b"packs:", b"tokenizer:", b"null", b"~", b"true", b"1e400", b"-1", b"\t", b"---\n"),
)


def run(data: bytes) -> None:
    """Load a recipe."""
    load_recipe(str(as_file(data, "recipe.yaml")))


def seeds() -> Iterator[bytes]:
    """Yield the shipped recipes, with their variables set."""
    for path in sorted(SHIPPED.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        for name in ("PT_DIR", "SFT_DIR", "LLM_DIR", "CC12M_DIR", "NLVR_DIR", "OBELICS_DIR", "SMOLLM2_DIR"):
            text = text.replace(f"${{{name}}}", "raw")
        yield text.encode()
