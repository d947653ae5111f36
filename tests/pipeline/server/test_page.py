"""The web page in headless Chromium, on a real server."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.serving.model import load_model
from tests.browser import Page, browsing, chromium
from tests.pipeline.server.helpers import Served, data_url, make_model, served
from tests.pipeline.serving.helpers import picture, user

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(chromium() is None, reason="Chromium is not on PATH"),
]

KEY = "page-key"
ANSWERED = "!running && document.querySelector('.assistant')"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Served]:
    with served(model_folder, "--name", "tiny", "--max-image-mb", "1", MMA_API_KEY=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with browsing() as page:
        yield page


@pytest.fixture
def page(browser: Page, server: Served) -> Iterator[Page]:
    """The page on a phone, with the key entered."""
    browser.complaints.clear()
    browser.open(server.url, width=400, height=800, phone=True)
    browser.until("document.querySelector('#about').textContent.includes('API key')")
    browser.complaints.clear()  # the 401 of a page that has no key yet
    browser.value(f"$('key').value = {json.dumps(KEY)}; describe()")
    assert browser.value("$('about').textContent") == "mask mma"
    yield browser
    assert browser.complaints == []


def give(page: Page, how: str) -> None:
    """Add a picture by drop, paste, or the file button."""
    page.value(
        f"""(async () => {{
          const blob = Uint8Array.from(
            atob({json.dumps(data_url(picture(1)).split(",")[1])}), (letter) => letter.charCodeAt(0));
          const files = new DataTransfer();
          files.items.add(new File([blob], "one.png", {{ type: "image/png" }}));
          if ({json.dumps(how)} === "drop") document.dispatchEvent(new DragEvent("drop", {{ dataTransfer: files }}));
          if ({json.dumps(how)} === "paste")
            document.dispatchEvent(new ClipboardEvent("paste", {{ clipboardData: files }}));
          if ({json.dumps(how)} === "button") {{
            $("files").files = files.files;
            $("files").dispatchEvent(new Event("change"));
          }}
        }})()"""
    )


def ask(page: Page, text: str) -> None:
    page.value("question.focus()")
    page.type(text)
    page.press_enter()


@pytest.mark.parametrize("how", ["drop", "paste", "button"])
def test_a_question_about_a_picture_is_answered(how: str, page: Page, model_folder: Path) -> None:
    model = load_model(model_folder)
    give(page, how)
    page.until("pictures.length === 1 && document.querySelector('#waiting img').naturalWidth > 0")
    page.value("$('max_tokens').value = 12")
    ask(page, "what colour")
    page.until(ANSWERED)
    wanted = model.generate([model.prompt([user(picture(1), "what colour")])], max_new_tokens=12)[0]
    assert page.value("document.querySelector('.assistant').textContent") == wanted
    assert page.value("messages.map((one) => one.role).join()") == "user,assistant"
    assert page.value("document.querySelector('.note').textContent") == "The answer reached the limit of tokens."
    assert page.value("document.querySelector('.user img').naturalWidth") > 0


def test_stop_keeps_what_was_said_and_the_chat_goes_on(page: Page, server: Served) -> None:
    page.value("$('max_tokens').value = 4000")
    ask(page, "how many")
    page.until("document.querySelector('.assistant').textContent.length > 8")
    page.value("$('stop').click()")
    page.until("!running")
    assert page.value("document.querySelector('.note').textContent") == "Stopped."
    page.value("$('max_tokens').value = 3; $('temperature').value = 1; $('seed').value = 4")
    ask(page, "left")
    page.until("!running && document.querySelectorAll('.assistant').length === 2")
    assert page.value("messages.length") == 4
    page.value("$('new').click()")
    assert page.value("messages.length + document.querySelectorAll('.turn').length") == 0


def test_an_error_is_shown_and_the_question_kept(page: Page) -> None:
    page.value("$('temperature').value = 3")
    ask(page, "how many")
    page.until("document.querySelector('.error')")
    assert "temperature" in page.value("document.querySelector('.error').textContent")
    assert page.value("question.value") == "how many"
    assert page.value("messages.length + document.querySelectorAll('.turn').length") == 0
    page.complaints[:] = [one for one in page.complaints if "400 (Bad Request)" not in one]


def test_what_a_model_says_is_text_never_markup(page: Page) -> None:
    page.value(
        """(() => {
          window.fetch = async () => new Response(
            'data: {"choices":[{"delta":{"content":"<img src=x onerror=alert(1)>"},"finish_reason":null}]}\\n\\n' +
            'data: [DONE]\\n\\n');
        })()"""
    )
    ask(page, "<b>bold</b>")
    page.until(ANSWERED)
    assert page.value("chat.querySelectorAll('.turn img, b').length") == 0
    assert page.value("document.querySelector('.assistant').textContent") == "<img src=x onerror=alert(1)>"


def test_a_connection_that_is_lost_is_no_complete_answer(page: Page) -> None:
    page.value(
        """(() => { window.fetch = async () =>
          new Response('data: {"choices":[{"delta":{"content":"two"},"finish_reason":null}]}\\n\\n'); })()"""
    )
    ask(page, "how many")
    page.until("document.querySelector('.error')")
    assert "connection was lost" in page.value("document.querySelector('.error').textContent")


@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (1200, False)])
def test_nothing_is_cut_off_at_any_width(width: int, dark: bool, browser: Page, server: Served) -> None:
    browser.open(server.url, width=width, height=800, dark=dark)
    browser.value("$('settings').open = true")
    assert browser.value("document.documentElement.scrollWidth") <= width
    outside = """[...document.querySelectorAll("button, input, textarea, summary")].filter((one) => {
      const box = one.getBoundingClientRect();
      return box.width > 1 && !(box.left >= 0 && box.right <= innerWidth + 1);
    }).length"""
    assert browser.value(outside) == 0
    shades = browser.value("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", shades)[0]) < 128) == dark


def test_the_page_may_load_nothing(browser: Page, server: Served) -> None:
    headers = urllib.request.urlopen(server.url, timeout=10).headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    browser.open(server.url, width=400, height=800)
    browser.complaints.clear()
    for attack in (
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'}))",
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x.png'}))",
        "fetch('http://127.0.0.1:9/').catch(() => 0)",
    ):
        browser.value(f"{attack}; 0")
    assert browser.value("window.owned") is None
    browser.value("new Promise((done) => setTimeout(done, 200))")
    for directive in ("script-src", "img-src", "connect-src"):
        assert any("Content Security Policy" in one and directive in one for one in browser.complaints), (
            directive,
            browser.complaints,
        )
