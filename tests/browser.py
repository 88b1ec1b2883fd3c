"""What the tests of the pages share: a headless Chromium, a page that records its trouble, the accessibility checker.

Chromium or Chrome from the PATH (`bash setup.sh browser` finds or installs it). The fixtures are in conftest.py.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"phone": (390, 844), "desktop": (1280, 900)}


@contextmanager
def launched() -> Iterator:
    """A browser; where there is none, the test that asked is skipped."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on the PATH; bash setup.sh browser installs one")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in a context of its own, and everything that it said or did which it should not."""

    def __init__(self, browser, path: Path, size: str = "desktop", scheme: str = "light", **context):
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **context)
        self.page = self.context.new_page()
        self.trouble: list[str] = []
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.trouble.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.on("request", self._request)
        self.page.goto(path.resolve().as_uri())

    def _request(self, request) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.trouble.append(f"asked for {request.url}")

    def close(self) -> None:
        self.context.close()
        assert self.trouble == []


def violations(page) -> list[tuple[str, str]]:
    """What axe finds (WCAG A and AA, headings, landmarks, contrast): rule and element. Needs a page with bypass_csp."""
    from axe_playwright_python.sync_playwright import Axe

    return [(each["id"], each["nodes"][0]["html"]) for each in Axe().run(page).response["violations"]]


def overflow(page) -> int:
    """Pixels by which the page is wider than its window."""
    return max(0, page.evaluate("document.documentElement.scrollWidth - innerWidth"))
