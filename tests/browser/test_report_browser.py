"""Reports in headless Chromium, at the widths of a phone and a desktop, light and dark."""

import shutil
import urllib.parse

import numpy as np
import pytest
from playwright.sync_api import sync_playwright
from report_runs import map_and_failures, write_run

from ssl_jax.report import write_comparison

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is on PATH")

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's report and a comparison of it with another run, by name."""
    folder = tmp_path_factory.mktemp("runs")
    workdirs = [write_run(folder / name) for name in ("first run", "second")]
    comparison = write_comparison(workdirs)
    return {"report": workdirs[0] / "report.html", "comparison": comparison}


class Visit:
    """An open page, its errors and its requests."""

    def __init__(self, browser, path, **options):
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.errors, self.requests = [], []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(request.url))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()

    def middle(self, selector, index=0):
        box = self.page.locator(selector).nth(index).bounding_box()
        return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def panel(self):
        return self.page.locator(".panel")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_page_has_no_errors_overflow_or_requests(browser, pages, name, viewport, scheme):
    with Visit(browser, pages[name], viewport=viewport, color_scheme=scheme) as visit:
        page = visit.page
        for details in page.locator("summary").all():
            details.click()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= viewport["width"]
        broken = "[...document.images].filter(i => !i.complete || !i.naturalWidth).length"
        assert page.evaluate(broken) == 0
        # A squeezed or hidden chart has no bounding box.
        for figure in page.locator("svg[role=img]").all():
            box = figure.bounding_box()
            assert box and box["width"] > 250 and box["height"] > 100
        # No text is beyond the edge of the page, except in tables that scroll.
        beyond = page.evaluate(
            "[...document.querySelectorAll('h1, h2, h3, p, dd, td, th, figcaption')]"
            ".filter(e => !e.closest('.wide-table'))"
            ".filter(e => e.getBoundingClientRect().right > innerWidth)"
            ".map(e => e.textContent)"
        )
        assert beyond == []
        assert [url for url in visit.requests if not url.startswith(("file:", "data:"))] == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red = int(background.removeprefix("rgb(").split(",")[0])
        assert (red > 200) == (scheme == "light")
        assert visit.errors == []


def test_pointing_at_the_map_shows_the_image_and_its_neighbors(browser, pages):
    with Visit(browser, pages["report"], viewport=DESKTOP) as visit:
        assert visit.panel().is_hidden()
        visit.page.locator("svg.map").first.scroll_into_view_if_needed()
        visit.page.mouse.move(*visit.middle("svg.map .pt", 4))
        assert visit.panel().is_visible()
        # Class 4 mod 3; its neighbors 5, 6, 7 have the classes 2, 0, 1.
        captions = visit.panel().locator("figcaption").all_inner_texts()
        assert captions == ["dog", "0.90 ✕ lynx", "0.80 ✕ cat", "0.75"]
        drawn = (
            visit.panel()
            .locator(".sprite")
            .first.evaluate(
                """async element => {
                const style = getComputedStyle(element);
                const sheet = new Image();
                sheet.src = style.backgroundImage.slice(5, -2);
                await sheet.decode();
                const canvas = document.createElement('canvas');
                const [x, y] = style.backgroundPosition.split(' ').map(parseFloat);
                const scale = parseFloat(style.backgroundSize) / sheet.width;
                canvas.getContext('2d').drawImage(sheet, x / scale, y / scale);
                return [...canvas.getContext('2d').getImageData(0, 0, 8, 8).data];
            }"""
            )
        )
        shown = np.array(drawn).reshape(8, 8, 4)[..., :3]
        np.testing.assert_array_equal(shown, map_and_failures()["map_images"][4])
        assert visit.page.locator("svg.map .chosen").count() == 1
        assert visit.errors == []


def test_touch_works_on_the_map_and_on_charts(browser, pages):
    phone = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    with Visit(browser, pages["report"], **phone) as visit:
        visit.page.locator("svg.map").first.scroll_into_view_if_needed()
        visit.page.touchscreen.tap(*visit.middle("svg.map .pt", 2))
        assert visit.panel().is_visible()
        panel = visit.panel().bounding_box()
        assert panel["y"] + panel["height"] <= PHONE["height"] + 1  # on the screen
        visit.page.locator("#training").scroll_into_view_if_needed()
        chart = visit.page.locator("section[aria-labelledby=training] svg.figure").first
        chart.scroll_into_view_if_needed()
        box = chart.bounding_box()
        visit.page.touchscreen.tap(box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"])
        assert visit.page.locator(".tip").inner_text() in ("step 90: 4.100", "step 100: 4.000")
        assert visit.errors == []


def test_keyboard_reaches_charts_and_the_map(browser, pages):
    with Visit(browser, pages["report"], viewport=DESKTOP) as visit:
        page = visit.page
        chart = page.locator("section[aria-labelledby=training] svg.figure").first
        chart.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator(".tip").inner_text() == "step 10: 4.900"
        page.keyboard.press("ArrowRight")
        assert page.locator(".tip").inner_text() == "step 20: 4.800"
        page.keyboard.press("Escape")
        assert page.locator(".tip").is_hidden()
        # By the Tab key only, from the top to the map.
        page.locator("h1").click()
        for _ in range(60):
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.matches('svg.map')"):
                break
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid" and visit.panel().is_visible()
        seen = {visit.page.locator(".panel .sprite").first.get_attribute("style")}
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
            page.keyboard.press(key)
            seen.add(visit.page.locator(".panel .sprite").first.get_attribute("style"))
        assert len(seen) > 1 and visit.errors == []


def test_page_is_readable_without_scripts(browser, pages):
    options = {"viewport": DESKTOP, "java_script_enabled": False}
    with Visit(browser, pages["report"], **options) as visit:
        assert visit.page.locator("svg.map").first.is_visible()
        assert visit.panel().is_hidden() and visit.page.locator(".scripted").is_hidden()
        assert visit.errors == []


def test_comparison_links_to_the_single_reports(browser, pages):
    with Visit(browser, pages["comparison"], viewport=DESKTOP) as visit:
        links = visit.page.locator("section[aria-labelledby=runs] a")
        assert links.all_inner_texts() == ["first run", "second"]
        for i, name in enumerate(("first run", "second")):
            address = urllib.parse.urljoin(visit.page.url, links.nth(i).get_attribute("href"))
            assert urllib.parse.unquote(address).endswith(f"/{name}/report.html")
        links.first.click()
        assert visit.page.locator("h1").inner_text() == "SimCLR on digits"
        assert visit.errors == []


@pytest.mark.parametrize("deficiency", ["protanopia", "deuteranopia", "tritanopia"])
def test_classes_differ_by_marks_for_color_blind_readers(browser, pages, deficiency):
    """No two marks of the legend look the same or have the same shape."""
    with Visit(browser, pages["report"], viewport=DESKTOP) as visit:
        session = visit.context.new_cdp_session(visit.page)
        session.send("Emulation.setEmulatedVisionDeficiency", {"type": deficiency})
        marks = visit.page.locator(".legend.marks svg")
        pictures = [marks.nth(i).screenshot() for i in range(marks.count())]
        assert len(pictures) == 3 and len(set(pictures)) == 3
        shapes = visit.page.locator(".legend.marks path").evaluate_all(
            "paths => paths.map(path => path.getAttribute('d'))"
        )
        assert len(set(shapes)) == 3
