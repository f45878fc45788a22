"""A headless chromium for tests: Debian's, with its driver."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@contextmanager
def chromium(profile: Path) -> Iterator["webdriver.Chrome"]:
    """A started browser; skips the test, with the reason, where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield started
    finally:
        started.quit()


def complaints(browser: "webdriver.Chrome") -> list[str]:
    """Returns what the console has said since the last call: errors, warnings, messages."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requested(browser: "webdriver.Chrome") -> list[str]:
    """Addresses asked for since the last call, but for what lies in the page or the browser itself."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "about:", "chrome:"))]


def find(browser: "webdriver.Chrome", what: str) -> Any:
    return browser.find_element("css selector", what)


def texts(browser: "webdriver.Chrome", what: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", what
    )


def names(browser: "webdriver.Chrome") -> list[str]:
    return texts(browser, "#gallery .name")


def choose(browser: "webdriver.Chrome", control: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(find(browser, control)).select_by_value(value)


def active(browser: "webdriver.Chrome") -> str:
    """Returns the element that has the focus: its id, or its class."""
    return browser.execute_script("const a = document.activeElement; return a.id || a.className || a.tagName")


def pixel(node: Any, x: float, y: float) -> np.ndarray:
    """(3,) of what is seen of ``node`` at a share of its width and height."""
    seen = np.asarray(Image.open(io.BytesIO(node.screenshot_as_png)).convert("RGB"), dtype=int)
    return seen[int(y * seen.shape[0]), int(x * seen.shape[1])]
