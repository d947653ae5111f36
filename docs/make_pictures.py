"""Draw the pictures in docs/ again; pages need Chromium on PATH.

``python docs/make_pictures.py`` draws masks.png and inspect.png. With ``--model DIR --picture FILE --questions TEXT``
it draws serve.png and serve-phone.png: the page of `mma serve` on that model, after these questions.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.browser import Page, browsing
from tests.pipeline.server.helpers import served

LAYOUT = "S4 V24 Q8 A5 V24 Q6 A4"
POLICIES = ("causal", "mma", "mma_unclamped")
WINDOW = "1200,1500"


def main() -> int:
    """Draw the pictures; return 2 where Chromium is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder: photograph the page of mma serve instead")
    parser.add_argument("--picture", type=Path, help="PNG that the first question is about")
    parser.add_argument("--questions", nargs="+", default=["What is shown?"], help="what is asked, in turn")
    options = parser.parse_args()
    if options.model:
        photograph_chat(options.model, options.picture, options.questions)
        return 0
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


def photograph_chat(model: Path, picture: Path | None, questions: list[str]) -> None:
    """Photograph the page of ``mma serve`` on a desktop, and in the dark on a phone."""
    with served(model) as server, browsing() as page:
        for name, width, height, phone in (("serve.png", 1000, 940, False), ("serve-phone.png", 400, 760, True)):
            page.open(server.url, width=width, height=height, phone=phone, dark=phone)
            if picture is not None:
                _attach(page, picture)
            for question in questions:
                page.value("question.focus()")
                page.type(question)
                page.press_enter()
                page.until("!running")
            page.value(f"$('settings').open = {json.dumps(not phone)}; question.blur(); chat.scrollTop = 1e6")
            page.photograph(ROOT / "docs" / name)


def _attach(page: Page, picture: Path) -> None:
    """Paste a picture into the page."""
    data = base64.b64encode(picture.read_bytes()).decode()
    page.value(
        f"""(() => {{
          const bytes = Uint8Array.from(atob({json.dumps(data)}), (letter) => letter.charCodeAt(0));
          const files = new DataTransfer();
          files.items.add(new File([bytes], {json.dumps(picture.name)}, {{ type: "image/png" }}));
          document.dispatchEvent(new ClipboardEvent("paste", {{ clipboardData: files }}));
        }})()"""
    )
    page.until("pictures.length === 1")


def _run(*command: str, cwd: Path = ROOT) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=cwd, env=environment, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
