"""The site in a real browser: sort, filter, links, themes, phone width."""

import json
import shutil

import pytest
from _site import make, measured

from sdebench.report import headline

pytest.importorskip("selenium", reason="pip install -e '.[test]'")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

PROGRAMS = [
    shutil.which("chromium") or shutil.which("chromium-browser"),
    shutil.which("chromedriver"),
]
pytestmark = pytest.mark.skipif(
    not all(PROGRAMS), reason="chromium and chromedriver are not on the PATH"
)
PAGES = [
    "index.html",
    "problem-two_modes-beta-0.1.html",
    "problem-brownian_linear.html",
    "problem-damped_oscillator.html",
    "estimator-reinforce.html",
]


@pytest.fixture(scope="module")
def folder(frame, tmp_path_factory):
    return make(frame, tmp_path_factory)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = PROGRAMS[0]
    for flag in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{flag}")
    logs = {"browser": "ALL", "performance": "ALL"}
    options.set_capability("goog:loggingPrefs", logs)
    driver = webdriver.Chrome(options, webdriver.ChromeService(PROGRAMS[1]))
    yield driver
    driver.quit()


@pytest.fixture
def index(browser, folder):
    """The first page, as it opens for the first time."""
    browser.get("about:blank")
    resize(browser, 1280)
    browser.get((folder / "index.html").as_uri())
    browser.execute_script("try { localStorage.clear() } catch {}")
    return browser


def resize(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def column(browser, key):
    """Return the shown texts of a column."""
    script = """
        const at = [...document.querySelectorAll('#cells thead th')]
            .findIndex(th => th.dataset.key === arguments[0]);
        return [...document.querySelectorAll('#cells tbody tr')]
            .map(tr => tr.cells[at].textContent);"""
    return browser.execute_script(script, key)


def values(browser, key):
    script = """
        const at = [...document.querySelectorAll('#cells thead th')]
            .findIndex(th => th.dataset.key === arguments[0]);
        return [...document.querySelectorAll('#cells tbody tr')]
            .map(tr => tr.cells[at].dataset.v || '');"""
    return browser.execute_script(script, key)


def head(browser, key):
    return browser.find_element(By.CSS_SELECTOR, f"#cells th[data-key='{key}']")


def count(browser):
    """Return how many rows the page says are shown, after checking that they are."""
    words = browser.find_element(By.ID, "count").text.split()
    assert len(column(browser, "estimator")) == int(words[0])
    return int(words[0])


def overflow(browser):
    return browser.execute_script(
        "const page = document.documentElement;"
        "return page.scrollWidth - page.clientWidth"
    )


@pytest.mark.parametrize("name", PAGES)
def test_pages_load_alone_without_errors_and_fit_every_width(browser, folder, name):
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")
    resize(browser, 1280)
    browser.get((folder / name).as_uri())
    assert browser.get_log("browser") == []
    entries = [json.loads(e["message"]) for e in browser.get_log("performance")]
    requests = [
        e["message"]["params"]["request"]["url"]
        for e in entries
        if e["message"]["method"] == "Network.requestWillBeSent"
    ]
    assert [r for r in requests if r.startswith("file:")]
    outside = [r for r in requests if not r.startswith(("file:", "data:", "about:"))]
    assert not outside
    for width in (1280, 360):
        resize(browser, width)
        assert overflow(browser) == 0, width
    known = name != "index.html" and "damped" not in name
    formulas = browser.find_elements(By.CSS_SELECTOR, ".formula math")
    assert len(formulas) == known
    for formula in formulas:
        box = formula.rect
        assert box["width"] > 100
        # Rows of a table stand below each other only if MathML is rendered.
        assert box["height"] > 40
    for picture in browser.find_elements(By.CSS_SELECTOR, "figure svg"):
        assert picture.rect["height"] > 50
        assert picture.get_attribute("aria-label")


def test_the_short_form_opens_first_and_the_switch_shows_every_cell(index, frame):
    measurements = measured(frame)
    assert count(index) == len(headline(measurements))
    assert not head(index, "point").is_displayed()
    index.find_element(By.ID, "all").click()
    assert count(index) == len(measurements)
    assert head(index, "point").is_displayed()
    assert "all=1" in index.current_url


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_sorting_is_by_number_both_ways_and_back(index, by):
    index.find_element(By.ID, "all").click()
    before = column(index, "variance")
    button = head(index, "variance").find_element(By.TAG_NAME, "button")

    def press():
        if by == "mouse":
            button.click()
        else:
            button.send_keys(Keys.ENTER)

    def groups():
        # Relative numbers, then absolute ones, then rows without.
        kinds = [
            0 if v and v[-1] != "a" else 1 if v else 2
            for v in values(index, "variance")
        ]
        assert kinds == sorted(kinds)
        assert {0, 1} <= set(kinds)
        return [float(v) for v in values(index, "variance") if v and v[-1] != "a"]

    press()
    rising = groups()
    assert rising == sorted(rising)
    # As text the order is another one: the test can see the difference.
    assert rising != [float(v) for v in sorted(map(str, rising))]
    assert head(index, "variance").get_attribute("aria-sort") == "ascending"
    press()
    assert groups() == rising[::-1]
    assert head(index, "variance").get_attribute("aria-sort") == "descending"
    press()
    assert column(index, "variance") == before
    assert head(index, "variance").get_attribute("aria-sort") is None


def test_filters_by_text_and_choice_combine_and_clear(index):
    index.find_element(By.ID, "all").click()
    total = count(index)
    search = index.find_element(By.ID, "search")
    search.send_keys("TWO_modes pathwise")
    WebDriverWait(index, 5).until(lambda d: "q=" in d.current_url)
    found = count(index)
    assert 0 < found < total
    assert set(column(index, "problem")) == {"two_modes:beta=0.1"}
    assert set(column(index, "estimator")) == {"pathwise"}
    Select(index.find_element(By.ID, "choose-point")).select_by_value("overshoot")
    assert 0 < count(index) < found
    assert set(column(index, "point")) == {"overshoot"}
    # Choices that would leave nothing are not offered.
    offered = Select(index.find_element(By.ID, "choose-problem")).options
    assert [o.text for o in offered] == ["all", "two_modes:beta=0.1"]
    index.find_element(By.ID, "clear").click()
    assert count(index) == total
    search.send_keys("nothing has this name")
    WebDriverWait(index, 5).until(lambda d: "q=nothing" in d.current_url)
    assert count(index) == 0


@pytest.mark.parametrize(
    "key", ["problem", "estimator", "estimand", "point", "verdict"]
)
def test_every_choice_filters_its_column(index, key):
    index.find_element(By.ID, "all").click()
    total = count(index)
    select = Select(index.find_element(By.ID, f"choose-{key}"))
    names = [o.text for o in select.options][1:]
    assert len(names) > 1
    counts = []
    for i, name in enumerate(names, start=1):
        select.select_by_index(i)  # the others are still offered
        counts.append(count(index))
        assert {t.split(": ")[0] for t in column(index, key)} == {name}
    assert sum(counts) == total


def test_a_view_can_be_linked(index):
    address = index.current_url
    index.find_element(By.ID, "all").click()
    Select(index.find_element(By.ID, "choose-estimator")).select_by_value("reinforce")
    head(index, "variance").find_element(By.TAG_NAME, "button").click()
    head(index, "variance").find_element(By.TAG_NAME, "button").click()
    view, rows = index.current_url, column(index, "variance")
    assert view != address
    index.get("about:blank")
    index.get(view)
    assert column(index, "variance") == rows
    assert index.find_element(By.ID, "all").is_selected()
    assert head(index, "variance").get_attribute("aria-sort") == "descending"


def test_links_lead_to_pages_that_lead_back(index, folder):
    links = index.find_elements(By.CSS_SELECTOR, "main a[href$='.html']")
    targets = {link.get_attribute("href") for link in links}
    assert len(targets) == len(list(folder.glob("*.html"))) - 1
    links[0].click()
    assert index.find_element(By.TAG_NAME, "h1").text == "brownian_linear"
    index.find_element(By.LINK_TEXT, "How to read").click()
    assert index.current_url.endswith("index.html#reading")
    assert "How to read" in index.find_element(By.ID, "reading").text
    # The fragment is a place, not a filter: the table is as it opens.
    assert count(index) > 0


def test_the_theme_follows_the_system_until_it_is_chosen(index):
    def paper():
        script = "return getComputedStyle(document.body).backgroundColor"
        return index.execute_script(script)

    def system(theme):
        feature = {"name": "prefers-color-scheme", "value": theme}
        index.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    system("light")
    assert paper() == "rgb(255, 255, 255)"
    system("dark")
    assert paper() == "rgb(23, 23, 23)"
    button = index.find_element(By.ID, "theme")
    WebDriverWait(index, 5).until(lambda _: button.text == "Light theme")
    button.click()
    assert paper() == "rgb(255, 255, 255)"
    index.refresh()
    WebDriverWait(index, 5).until(
        lambda _: paper() == "rgb(255, 255, 255)"
    )  # remembered
    label = index.find_element(By.CSS_SELECTOR, "figure svg text")
    script = "return getComputedStyle(arguments[0]).fill"
    light = index.execute_script(script, label)
    index.find_element(By.ID, "theme").click()
    assert index.execute_script(script, label) != light
    index.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_everything_can_be_reached_with_the_keyboard(index):
    body = index.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    skip = index.switch_to.active_element
    assert skip.text == "Skip to the content"
    assert skip.rect["x"] >= 0  # it shows itself when it has the focus
    outline = "return getComputedStyle(document.activeElement).outlineStyle"
    assert index.execute_script(outline) == "solid"
    skip.send_keys(Keys.ENTER)
    reached = []
    for _ in range(40):
        index.switch_to.active_element.send_keys(Keys.TAB)
        element = index.switch_to.active_element
        reached.append(element.get_attribute("id") or element.text)
    for name in ("search", "choose-problem", "all", "relative bias", "pathwise"):
        assert name in reached
    regions = index.find_elements(By.CSS_SELECTOR, ".scroll")
    assert all(r.get_attribute("tabindex") == "0" for r in regions)
    assert all(r.get_attribute("aria-label") for r in regions)
