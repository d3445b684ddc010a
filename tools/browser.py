"""Find the browser that the site's tests drive."""

import shutil
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOW_TO_INSTALL = """No Chromium found, which the tests of the site drive. Install one of
    apt-get install chromium              (Debian, Ubuntu; with sudo where needed)
    .venv/bin/playwright install chromium (elsewhere)
or leave the browser out: make test-fast"""


def find_browser() -> str:
    """The path of a Chromium: the system's, or the one that playwright installed; empty for none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else ""
