"""The chat page in a real browser: what a person sees and does. `make browser`; needs Chromium or Chrome, and fails without."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

import httpx
import pytest
from live_server import CONFIG, MODEL, LiveServer, serve, wait_until
from tiny_llama import CPU

from serving.loader import Checkpoint
from serving.model import Model
from serving.runner import TorchRunner

pytestmark = pytest.mark.browser
KEY = "secret"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    assert found is not None, "no browser: install Debian's package chromium, or Chrome"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def guarded(tiny_model: Model, tiny_checkpoint: Checkpoint) -> Iterator[LiveServer]:
    runner = TorchRunner(tiny_model, CONFIG.num_pages, CONFIG.page_size, CPU)
    with serve(runner, tiny_checkpoint, CONFIG, api_key=KEY) as live:
        yield live


@pytest.fixture
def page(browser, tiny_server: LiveServer) -> Iterator:
    """Opened; a message in the browser's console, an exception, or a request to anywhere else is a failure."""
    page, complaints, foreign = browser.new_page(), [], []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: None if "status of 400" in message.text else complaints.append(message.text))
    page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((tiny_server.url, "data:")) else None)
    page.goto(tiny_server.url)
    yield page
    page.close()
    assert (complaints, foreign) == ([], [])
    tiny_server.runner.delay = 0.0
    tiny_server.check_idle()


def ask(page, text: str = "hi", **settings: str) -> None:
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.fill("#input", text)
    page.press("#input", "Enter")


def holds(page, condition: str) -> None:
    """Wait for it. (Playwright's own way would need `eval`, which the page's policy forbids.)"""
    wait_until(lambda: page.evaluate(condition))


def last_answer(page):
    return page.locator("article.assistant").last


def test_an_answer_streams_and_is_measured(page, tiny_server: LiveServer) -> None:
    holds(page, f"document.title === '{MODEL}'")
    assert "200 tokens of context" in page.inner_text("#context")
    tiny_server.runner.delay = 0.03
    ask(page, max_tokens="40", temperature="0.9", seed="5", system="Be odd.")
    texts = set()
    while page.locator("article.running").count():
        texts.add(page.evaluate("document.querySelector('article.assistant p').textContent"))
    assert len(texts) > 5  # it grew
    note = last_answer(page).locator("small").inner_text()
    speed, first, count = re.fullmatch(
        r"([\d.]+) tokens/s · first token after (\d+) ms · (\d+) tokens( · cut .*)?", note
    ).groups()[:3]
    assert 5 < float(speed) < 34 and int(first) >= 30 and 2 <= int(count) <= 40
    body = {
        "model": MODEL, "temperature": 0.9, "seed": 5, "max_tokens": 40,
        "messages": [{"role": "system", "content": "Be odd."}, {"role": "user", "content": "hi"}],
    }  # fmt: skip
    reply = httpx.post(f"{tiny_server.url}/v1/chat/completions", json=body, timeout=60).json()
    shown = page.evaluate("document.querySelector('article.assistant p').textContent")
    assert shown == reply["choices"][0]["message"]["content"].replace("\r\n", "\n")
    assert int(count) == reply["usage"]["completion_tokens"]


def test_stop_gives_the_place_back_and_the_chat_goes_on(page, tiny_server: LiveServer) -> None:
    tiny_server.runner.delay = 0.05
    ask(page, max_tokens="150", temperature="0")
    holds(page, "document.querySelector('article.assistant p').textContent.length > 5")
    page.click("#stop")
    page.wait_for_selector("article.running", state="detached")
    assert last_answer(page).locator("small").inner_text().endswith(" · stopped")
    wait_until(lambda: not tiny_server.engine.has_work, 2.0)  # far less than the rest would take
    tiny_server.runner.delay = 0.0
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "more", max_tokens="5")
    page.wait_for_selector("article.running", state="detached")
    roles = [message["role"] for message in sent.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"] and page.locator("article").count() == 4
    page.click("#clear")
    assert page.locator("article").count() == 0


def test_what_is_written_is_text(page) -> None:
    ask(page, "<b>x</b><script>alert(1)</script>", max_tokens="2")
    page.wait_for_selector("article.running", state="detached")
    assert page.locator("article.user p").inner_text() == "<b>x</b><script>alert(1)</script>"
    assert page.locator("article b, article script").count() == 0


def test_mistakes_are_told_and_the_question_comes_back(page) -> None:
    ask(page, "x" * 300)
    page.wait_for_selector("article.error")
    assert "this model's context holds 200 tokens" in page.inner_text("article.error")
    assert page.input_value("#input") == "x" * 300
    assert page.locator("article.assistant").count() == 0
    assert page.evaluate("messages.length") == 0
    page.fill("#temperature", "7")
    page.press("#input", "Enter")
    assert page.locator("article.user").count() == 1  # the browser asks for another temperature first


def test_colours(page) -> None:
    def background() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="dark")
    dark = background()
    page.emulate_media(color_scheme="light")
    light = background()
    page.select_option("#scheme", "dark")
    assert background() == dark != light
    page.reload()
    assert background() == dark
    page.select_option("#scheme", "light dark")
    page.set_viewport_size({"width": 400, "height": 700})
    assert not page.is_visible("#system")
    page.click("#settings")
    assert page.is_visible("#system")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_a_server_with_a_key(browser, guarded: LiveServer) -> None:
    page = browser.new_page()
    page.goto(guarded.url)
    page.wait_for_selector("article.error")
    assert "wants its key" in page.inner_text("article.error")
    page.fill("#key", KEY)
    page.press("#key", "Tab")
    holds(page, f"document.title === '{MODEL}'")
    assert page.locator("article.error").count() == 0
    ask(page, max_tokens="5")
    page.wait_for_selector("article.running", state="detached")
    assert page.locator("article.error").count() == 0
    page.reload()
    holds(page, f"document.title === '{MODEL}'")  # the key is kept as long as the tab
    page.close()
