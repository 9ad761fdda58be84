"""A headless Chromium that has no network, and axe-core, for the tests that look at a report as a reader does."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from making_runs import write_sweep

REQUIRE_ALL = os.environ.get("AGSM_RL_REQUIRE_ALL") == "1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def passed_over(missing: str) -> None:
    """Skip the test for want of something, or fail where all is required."""
    if REQUIRE_ALL:
        pytest.fail(f"{missing}, but AGSM_RL_REQUIRE_ALL=1 wants every test to run")
    pytest.skip(missing)


@pytest.fixture(scope="session")
def axe() -> str:
    """The script of axe-core, which finds faults of contrast, names and keyboard access; a package brings it along."""
    package = find_spec("selenium_axe_python")
    if package is None or package.origin is None:
        passed_over("axe-core is not installed (pip install selenium-axe-python)")
    return (Path(package.origin).parent / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def browser():
    """Selenium's driver of an installed Chromium; without one the test is skipped, or fails where all is required."""
    found, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if not found or not driver:
        passed_over("no Chromium with its chromedriver is installed (apt-get install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = found
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    opened.execute_cdp_cmd("Network.enable", {})
    opened.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield opened
    opened.quit()


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """Two variants over two seeds at two guidances, one cell failed and one running. Read only."""
    low, high = {1.0: (0.3, 0.4), 2.0: (0.4, 0.45)}, {1.0: (0.3, 0.6), 2.0: (0.4, 0.55)}
    variants = {"weak": {"scores": low, "terms": ("agsm",)}, "strong": {"scores": high, "rank": 4}}
    states = {"weak-seed2": "failed", "strong-seed2": "running"}
    return write_sweep(tmp_path_factory.mktemp("sweeps") / "study", variants, range(3), states)
