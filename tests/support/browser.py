"""A headless Chromium, and what it has to say about a page."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Seen:
    """What a browser made of a page."""

    console: list[str] = field(default_factory=list)
    """Errors and warnings."""
    requests: list[str] = field(default_factory=list)
    """Addresses other than the page itself and what is inside it."""
    text: str = ""
    images: list[tuple[int, int]] = field(default_factory=list)
    """Width and height as drawn; (0, 0) = broken."""
    overflow: int = 0
    """Pixels by which the page is wider than the window."""


def look_at(page_path: Path, screenshot: Path, width: int = 1200) -> Seen:
    """Open a page. Skips where there is no browser."""
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser: one of {', '.join(BROWSERS)} is needed to look at reports")
    from playwright.sync_api import sync_playwright

    seen = Seen()
    address = page_path.resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: seen.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: seen.console.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(address)
        page.wait_for_load_state("networkidle")
        seen.text = page.inner_text("body")
        seen.images = [
            tuple(size)
            for size in page.evaluate(
                "[...document.images].map(image => [image.naturalWidth, image.naturalHeight])"
            )
        ]
        seen.overflow = page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        page.screenshot(path=str(screenshot), full_page=True)
        browser.close()
    outside = [url for url in seen.requests if url != address and not url.startswith("data:")]
    seen.requests = outside
    return seen
