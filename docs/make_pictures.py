"""Draw docs/masks.png and docs/inspect.png again. ``python docs/make_pictures.py``; the page needs Chromium on PATH."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYOUT = "S4 V24 Q8 A5 V24 Q6 A4"
POLICIES = ("causal", "mma", "mma_unclamped")
WINDOW = "1200,1500"


def main() -> int:
    """Draw both pictures; return 2 where Chromium is missing."""
    draw_masks(ROOT / "docs/masks.png")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("docs/inspect.png: Chromium is not on PATH, so the page cannot be photographed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        photograph_page(browser, Path(folder), ROOT / "docs/inspect.png")
    return 0


def draw_masks(target: Path) -> None:
    """Draw three policies side by side."""
    policies = [word for name in POLICIES for word in ("--policy", name)]
    _run(sys.executable, "-m", "pipeline.cli", "mask", LAYOUT, *policies, "--out", str(target))


def photograph_page(browser: str, folder: Path, target: Path) -> None:
    """Photograph the page of ``mma inspect`` on a small demo."""
    page = folder / "rows.html"
    _run(sys.executable, "-m", "data_prep", "demo", "data/demo", "--scenes", "300", "--held-out", "12", cwd=folder)
    _run(sys.executable, "-m", "pipeline.cli", "inspect", "data/demo/packs/sft", "--html", str(page), cwd=folder)
    flags = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WINDOW}", f"--screenshot={target}"]
    _run(browser, *flags, page.as_uri())


def _run(*command: str, cwd: Path = ROOT) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=cwd, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
