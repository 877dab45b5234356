"""Test the page in a real browser, at two widths and in both color schemes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from semiscale.receipts.report import ReportReceipt

HEADINGS = [
    "Result", "Selection", "Accounting of the pool", "Gallery", "Learning curves", "Learning-rate sweeps", "Time",
    "Notes of the plan", "Accuracy by class", "Confusions", "Parameters",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start the Chromium of this machine, or skip the tests without one."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine: the page is not tested in a browser")
    options = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_playwright() as playwright:
        chromium_browser = playwright.chromium.launch(executable_path=chromium, args=options)
        yield chromium_browser
        chromium_browser.close()


def record_page_events(page: Page) -> list[str]:
    """Return a list that records messages, dialogs and requests of the page."""
    events: list[str] = []
    page.on("console", lambda message: events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    page.on("dialog", lambda dialog: events.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: events.append(f"request: {request.url[:80]}"))
    return events


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_page_loads_without_errors_or_requests(
    written_report: ReportReceipt, browser: Browser, width: int, height: int, scheme: str
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if scheme == "dark" else "light"
    )
    page = context.new_page()
    events = record_page_events(page)
    uri = Path(written_report.report).as_uri()
    page.goto(uri)
    assert [
        event for event in events if event != f"request: {uri[:80]}" and not event.startswith("request: data:")
    ] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("h1").inner_text() == "fruit"
    assert page.locator("h2").all_inner_texts() == HEADINGS
    loaded = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    # Three classes have ranks 1, 10 and the last. The short one has no rank 10.
    assert loaded == [True] * 8
    context.close()
