"""The page in a real Chromium, with a real pool whose workers are killed under its eyes.

``nox -s browser`` runs these; they leave screenshots in ``build/screenshots``.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from page_app import Wanted
from page_helpers import LIMIT, Application, serving

pytestmark = pytest.mark.browser

SHOTS = Path(__file__).parent.parent.parent.parent / "build" / "screenshots"
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = (1280, 1000), (390, 844)
HOSTILE = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"
ALL = ("pause", "resume", "scale", "restart")
COLOURS = ("light", "dark")


class Browser:
    """A Chromium in the hands of a test."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def look(self, size: tuple[int, int], colours: str = "light") -> None:
        """Have a screen of this size, in pixels, and these colours."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        self._tell("Emulation.setDeviceMetricsOverride", {**metrics, "mobile": width < 500})
        feature = {"name": "prefers-color-scheme", "value": colours}
        self._tell("Emulation.setEmulatedMedia", {"features": [feature]})

    def _tell(self, command: str, arguments: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def open(self, url: str, *, scripts: bool = True) -> None:
        self._tell("Emulation.setScriptExecutionDisabled", {"value": not scripts})
        self.driver.get(url)
        if scripts:
            self.wait(lambda: self.run("return document.body.dataset.sequence"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, is_reached: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.wait import WebDriverWait

        return WebDriverWait(self.driver, LIMIT).until(lambda _: is_reached())

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).innerText", selector).strip()

    def rows(self) -> list[list[str]]:
        """Return the texts of the table's rows."""
        return self.run(
            "return [...document.querySelectorAll('#table tbody tr')]"
            ".map(row => [...row.cells].map(cell => cell.textContent))"
        )

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def shoot(self, name: str) -> Any:
        """Keep a screenshot, and return its pixels."""
        from PIL import Image

        SHOTS.mkdir(parents=True, exist_ok=True)
        data = self.driver.get_screenshot_as_png()
        (SHOTS / f"{name}.png").write_bytes(data)
        return Image.open(io.BytesIO(data)).convert("RGB")

    def complaints(self) -> list[str]:
        """Return what the browser has complained about, such as breaches of the policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture
def browser() -> Iterator[Browser]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    folder = tempfile.mkdtemp(prefix="page")  # a short name: it holds sockets
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for switch in (*SWITCHES, f"--user-data-dir={folder}/profile"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = Service(shutil.which("chromedriver"), env={**os.environ, "TMPDIR": folder})
    try:
        driver = webdriver.Chrome(options, service)
        try:
            yield Browser(driver)
        finally:
            driver.quit()
    finally:
        service.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def pool() -> Iterator[Application]:
    """An application with a pool of three workers, whose visitors may do everything."""
    with serving(Wanted(num_workers=3, authorized=ALL, interval=0.25)) as application:
        application.wait_running()
        yield application


def test_a_kill_is_seen_live(browser, pool):
    """The slot comes back before the eyes of the visitor, and the incident is there to be read."""
    browser.look(DESKTOP)
    browser.open(pool.url)
    browser.wait(lambda: len(browser.rows()) == 3)
    before = int(browser.rows()[1][6])
    os.kill(int(browser.rows()[1][9]), signal.SIGKILL)
    browser.wait(lambda: int(browser.rows()[1][6]) > before)
    browser.wait(lambda: browser.rows()[1][1] == "running")
    browser.wait(lambda: "SIGKILL" in browser.text("#list"))
    assert browser.text("#state") == "running"
    browser.wait(lambda: browser.run("return document.querySelector('.curve').getAttribute('d')"))
    browser.shoot("a killed worker is back")
    assert browser.complaints() == []


def test_text_of_a_worker_is_text(browser, pool):
    """Nothing that it writes becomes an element or runs, live and after a reload."""
    browser.look(DESKTOP)
    browser.open(pool.url)
    pool.command("fail", text=HOSTILE, worker=2)
    browser.wait(lambda: HOSTILE in browser.text("#list"))
    for _ in range(2):
        browser.find("#list details").click()
        browser.wait(lambda: f"{HOSTILE} on standard error" in browser.text("#list"))
        assert browser.driver.title == "keisei"
        assert browser.run("return document.querySelectorAll('img, main script').length") == 0
        browser.shoot("hostile text is text")
        browser.open(pool.url)
    assert browser.complaints() == []


def test_the_buttons_steer_the_pool_by_mouse_and_keyboard(browser, pool):
    """Pause, resume, scale and restart do what they say, and the page shows it."""
    from selenium.webdriver.common.keys import Keys

    browser.look(DESKTOP)
    browser.open(pool.url)
    browser.find("form[action='actions/pause'] button").click()
    browser.wait(lambda: browser.text("#state") == "paused")
    browser.shoot("paused")
    browser.wait(lambda: browser.find("form[action='actions/resume'] button").is_enabled())
    browser.find("form[action='actions/resume'] button").send_keys(Keys.ENTER)
    browser.wait(lambda: browser.text("#state") == "running")
    size = browser.find("input[name='num_workers']")
    size.send_keys(Keys.CONTROL, "a")
    size.send_keys("2", Keys.ENTER)
    browser.wait(lambda: len(browser.rows()) == 2)
    browser.wait(lambda: browser.text("[data-tile='ready']") == "2 of 2")
    before = int(browser.rows()[0][6])
    browser.find("[aria-label='Restart worker 0']").send_keys(Keys.SPACE)
    browser.wait(lambda: int(browser.rows()[0][6]) == before + 1)
    browser.wait(lambda: browser.run("return !document.getElementById('notice').hidden"))
    assert pool.act("scale", num_workers=3).status_code == 200
    assert browser.complaints() == []


def test_it_is_used_by_keyboard_alone(browser, pool):
    """The first stop leads to the table, curves are read with the arrow keys, focus is visible."""
    from selenium.webdriver.common.keys import Keys

    browser.look(DESKTOP)
    browser.open(pool.url)
    browser.wait(lambda: browser.run("return document.querySelector('.curve').getAttribute('d')"))
    browser.find("body").send_keys(Keys.TAB)
    active = "return document.activeElement"
    assert browser.run(f"{active}.textContent") == "Skip to the workers"
    browser.find("#charts svg").send_keys(Keys.HOME)
    browser.wait(lambda: " at " in browser.text("#charts .readout"))
    assert browser.run(f"{active}.getAttribute('role')") == "img"
    assert browser.run(f"{active}.getAttribute('aria-label')").startswith("Steps/s over time")
    assert browser.run(f"return getComputedStyle({active[7:]}).outlineStyle") == "solid"
    stops = set()
    for _ in range(30):
        browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        stops.add(browser.run(f"{active}.tagName + ' ' + ({active[7:]}.textContent || '').trim()"))
    assert {"BUTTON Restart"} <= stops


@pytest.mark.parametrize("colours", COLOURS)
@pytest.mark.parametrize(("name", "size"), [("desktop", DESKTOP), ("phone", PHONE)])
def test_it_fits_the_screen_in_light_and_dark(browser, pool, name, size, colours):
    """Nothing is wider than the screen, and what is drawn has the colours that were asked for."""
    browser.look(size, colours)
    browser.open(pool.url)
    browser.wait(lambda: browser.run("return document.querySelector('.curve').getAttribute('d')"))
    assert browser.run("return document.documentElement.scrollWidth") == size[0]
    for heading in ("Worker", "State", "Phase", "Age", "Lag", "Restarts"):
        assert heading in browser.text("#table thead")
    pixels = browser.shoot(f"{name} {colours}")
    assert pixels.size == size
    brightness = sum(pixels.getpixel((2, 2))) / 3
    assert brightness > 230 if colours == "light" else brightness < 40
    curve = (0x24, 0x58, 0xD3) if colours == "light" else (0x7B, 0xA6, 0xFF)
    assert sum(count for count, colour in pixels.getcolors(1 << 24) if colour == curve) > 50
    box = browser.run(
        "const box = document.querySelector('.scroll').getBoundingClientRect();"
        "return [document.querySelector('.scroll').scrollWidth, box.width]"
    )
    assert box[0] <= box[1] + 1, "the table is cut off"
    if name == "phone":
        height = browser.run("return document.documentElement.scrollHeight")
        browser.look((size[0], height), colours)
        browser.shoot(f"phone {colours}, whole")


def test_it_works_without_javascript(browser, pool):
    """The table is there and is loaded anew, and the buttons are plain forms."""
    browser.look(DESKTOP)
    browser.open(pool.url, scripts=False)
    headings = browser.driver.find_elements("css selector", "#table tbody tr")
    assert len(headings) == 3
    assert "running" in browser.find("#table tbody").text
    assert browser.driver.find_elements("css selector", "noscript meta[http-equiv='refresh']")
    browser.find("form[action='actions/pause'] button").click()
    browser.wait(lambda: browser.find("#state").text == "paused")
    browser.shoot("without javascript")
    browser.find("form[action='actions/resume'] button").click()
    browser.wait(lambda: browser.find("#state").text == "running")


def test_a_thousand_workers_do_not_freeze_it(browser):
    """A hundred rows at a time, a square for each slot, and the page goes on drawing."""
    with serving(Wanted(fake=True, num_workers=1000)) as application:
        browser.look(DESKTOP)
        browser.open(application.url)
        browser.wait(lambda: len(browser.rows()) == 100)
        assert "1–100 of 1000" in browser.text("#table-tools")
        assert browser.run("return document.querySelectorAll('#overview i').length") == 1000
        browser.find("[aria-label='Later workers']").click()
        assert browser.rows()[0][0] == "100"
        first = int(browser.run("return document.body.dataset.sequence"))
        longest = browser.driver.execute_async_script(
            "const done = arguments[arguments.length - 1]; let last = performance.now();"
            "let longest = 0; const until = last + 6000;"
            "const turn = () => { const now = performance.now();"
            "longest = Math.max(longest, now - last); last = now;"
            "if (now < until) setTimeout(turn, 0); else done(longest); }; turn();"
        )
        assert int(browser.run("return document.body.dataset.sequence")) > first
        assert longest < 500, "milliseconds in which the page did nothing else"
        browser.shoot("a thousand workers")
        assert browser.complaints() == []


def test_visitors_of_a_page_that_only_shows_have_no_buttons(browser):
    """Without an authorize hook there is nothing to press, and the filter is still there."""
    with serving(Wanted(fake=True)) as application:
        browser.look(DESKTOP)
        browser.open(application.url)
        assert browser.driver.find_elements("css selector", "form") == []
        assert browser.rows()[0][:2] == ["0", "running"]


def test_an_open_page_does_not_hold_the_server_up_and_finds_it_again(browser):
    """The server ends at once although the page is open, and the visitor is told so."""
    with serving(Wanted(fake=True)) as application:
        browser.look(DESKTOP)
        browser.open(application.url)
        application.end(signal.SIGINT)
        assert application.ending_took < 5.0
        browser.wait(lambda: browser.text("#link").startswith("not connected"))
        browser.shoot("not connected")
