"""Headless Chromium for tests of pages."""

import shutil

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def start_chromium(folder, log, height=1600, width=1400, preferences=None):
    """A driver of Chromium with its profile in `folder`, where downloads go as well; to be quit by the caller.

    Args:
        folder: of this browser.
        log: name of the log that is kept, "browser" or "performance".
        height: of the window.
        width: of the window.
        preferences: besides the folder of downloads.
    """
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="drives Chromium, extra [test]")
    (folder / "downloads").mkdir()
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Chromium's background services are off, so that the log contains the page's requests only
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
    ):  # fmt: skip
        options.add_argument(argument)
    downloads = {"download.default_directory": str(folder / "downloads")}
    options.add_experimental_option("prefs", downloads | (preferences or {}))
    options.set_capability("goog:loggingPrefs", {log: "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
