"""The built site in a real browser: `make book` first; DIFFEDU_SITE names another place to look.

Every page is loaded once at each width; its tests share that load.
"""

import os
import re
import statistics
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import sync_playwright

from browser import FLAGS, HOW_TO_INSTALL, find_browser

SITE = Path(os.environ.get("DIFFEDU_SITE", Path(__file__).parents[2] / "_build" / "html"))
PAGES = [page.stem for page in sorted(SITE.glob("book/*.html"))] or ["tour"]
WIDTHS = (1280, 390)
THEMES = ("light", "dark")
STANDARDS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
COLOUR_RULES = ["color-contrast", "link-in-text-block"]

READY_SECONDS = 0.5
KEY_TO_PICTURE_MS = 16
WEIGHT_BYTES = 1_200_000
ROUNDS = 4  # a busy machine gets that many tries at a time limit

# Presses are timed in the page: from the key's event until the picture is the one that the sentence
# speaks of, laid out anew.
EXPLORER = """
(root) => {
  const visible = () => [...root.querySelectorAll("img")].find((image) => image.offsetWidth > 0);
  const state = () => ({
    picture: visible().src,
    matches: visible().alt === root.querySelector("output").textContent,
  });
  const times = (root.times = []);
  root.state = state;
  let pressed = 0; // a key that changes nothing, such as Home on the first value, has no input event
  root.addEventListener("keydown", () => (pressed = performance.now()));
  root.addEventListener("input", () => {
    const start = pressed;
    const check = () => {
      root.getBoundingClientRect();
      if (state().matches) times.push(performance.now() - start);
      else requestAnimationFrame(check);
    };
    check();
  });
}
"""

# Time from the start of the navigation until a slider, moved, has changed its picture.
READY = """
new MutationObserver((_, observer) => {
  const root = document.querySelector(".de-explorer");
  if (!root || root.querySelector(".de-controls").hidden) return;
  observer.disconnect();
  const input = root.querySelector("input");
  const shown = () => [...root.querySelectorAll("img")].find((image) => image.offsetWidth > 0);
  const before = shown();
  input.value = input.value === input.max ? 0 : Number(input.value) + 1;
  input.dispatchEvent(new Event("input", { bubbles: true }));
  const check = () => {
    if (shown() !== before) window.ready = performance.now();
    else requestAnimationFrame(check);
  };
  check();
}).observe(document, { subtree: true, childList: true, attributes: true });
"""


class Quiet(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def site():
    """The address of the site, served on this machine alone."""
    if not (SITE / "book").is_dir():
        pytest.fail(f"The site is not built: there is no {SITE / 'book'}. Run `make book` first.")
    server = ThreadingHTTPServer(("localhost", 0), partial(Quiet, directory=SITE))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    path = find_browser()
    if not path:
        pytest.fail(HOW_TO_INSTALL)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


def open_page(browser, url, width=1280, script="", **options):
    """Load a page in a fresh profile; return it with all that it asked for and complained of."""
    context = browser.new_context(viewport={"width": width, "height": 900}, **options)
    page = context.new_page()
    seen = SimpleNamespace(page=page, requests=[], responses=[], errors=[])
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("response", lambda response: seen.responses.append(response))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda m: seen.errors.append(m.text) if m.type == "error" else None)
    if script:
        page.add_init_script(script)
    page.goto(url, wait_until="load")
    page.evaluate("window.MathJax?.startup?.promise")
    return seen


@pytest.fixture(scope="module", params=WIDTHS)
def width(request):
    return request.param


# Under pytest-xdist (--dist=loadgroup) the tests of a page stay together.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in PAGES],
)
def visit(request, width, site, browser):
    seen = open_page(browser, f"{site}/book/{request.param}.html", width)
    yield seen
    seen.page.context.close()


@pytest.fixture(scope="session")
def explorer_page():
    """A page with an explorer: the tour, if there is one."""
    found = [name for name in PAGES if "de-explorer" in (SITE / f"book/{name}.html").read_text()]
    assert found, "no page of the site has an explorer"
    return "tour" if "tour" in found else found[0]


def foreign(seen):
    hosts = {urlsplit(url).hostname for url in seen.requests if url.startswith(("http", "ws"))}
    return sorted(hosts - {"localhost"})


# Every page


def test_no_other_host_is_asked(visit):
    assert foreign(visit) == []


def test_nothing_fails(visit):
    assert visit.errors == []
    assert [r.url for r in visit.responses if r.status >= 400] == []


def test_all_mathematics_is_set(visit):
    broken = visit.page.eval_on_selector_all(
        "mjx-merror, [data-mml-node=merror]", "found => found.map((each) => each.textContent)"
    )
    assert broken == []
    unset = visit.page.eval_on_selector_all(
        ".math", "found => found.filter((each) => !each.querySelector('mjx-container')).length"
    )
    assert unset == 0


def test_no_sideways_scroll(visit):
    wide = visit.page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
    assert wide <= 0


def test_every_image_says_what_it_shows(visit):
    silent = visit.page.eval_on_selector_all(
        "main img", "found => found.filter((i) => !i.alt.trim()).map((i) => i.src.slice(0, 99))"
    )
    assert silent == []


def test_the_page_is_light_without_its_frames(visit):
    frames = re.compile(rb"[A-Za-z0-9+/=]{1000,}")
    weights = {}
    for response in visit.responses:
        if response.url.startswith("http") and response.ok:
            body = response.body()
            is_page = response.request.resource_type == "document"
            weights[response.url] = len(frames.sub(b"", body) if is_page else body)
    total = sum(weights.values())
    heaviest = sorted(((size, url.rsplit("/", 1)[1]) for url, size in weights.items()), reverse=True)
    assert total <= WEIGHT_BYTES, f"{total} bytes, most of them in {heaviest[:8]}"


@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_no_violation(visit, width, theme):
    page = visit.page
    page.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
    page.add_style_tag(content="* { transition: none !important; }")
    if not page.evaluate("'axe' in window"):
        page.evaluate(AXE_SCRIPT)
    # An article has the same colours at every width, and the same structure in every theme.
    found = axe(page, COLOUR_RULES, exclude=[[".bd-article"]] if width < max(WIDTHS) else [])
    if theme == "light":
        found += axe(page, STANDARDS, rules={rule: {"enabled": False} for rule in COLOUR_RULES})
    problems = [f"{each['id']}, {len(each['nodes'])} times: {describe(each)}" for each in found]
    assert not problems, "\n".join(problems)


def axe(page, run_only, exclude=(), rules=None):
    context = {"include": [["html"]], "exclude": list(exclude)}
    options = {"runOnly": run_only, "rules": rules or {}, "resultTypes": ["violations"]}
    return page.evaluate("([c, o]) => axe.run(c, o).then((r) => r.violations)", [context, options])


def describe(violation):
    node = violation["nodes"][0]
    return f"{node['html'][:200]} {node['failureSummary']}"


def test_every_control_moves_its_picture_by_keyboard(visit):
    page = visit.page
    for explorer in page.query_selector_all(".de-explorer"):
        explorer.evaluate(EXPLORER)
        for control in explorer.query_selector_all("input, select"):
            rounds = []
            for _ in range(ROUNDS):
                rounds.append(press_through(page, explorer, control))
                if rounds[-1] <= KEY_TO_PICTURE_MS:
                    break
            assert min(rounds) <= KEY_TO_PICTURE_MS, rounds


def press_through(page, explorer, control):
    """Step through a control's first values; return the longest time in ms."""
    control.focus()
    page.keyboard.press("Home")
    last = int(control.evaluate("c => c.options ? c.options.length - 1 : Number(c.max)"))
    explorer.evaluate("root => { root.times.length = 0 }")
    pictures = {explorer.evaluate("root => root.state().picture")}
    presses = min(last, 5)
    for k in range(1, presses + 1):
        page.keyboard.press("ArrowDown" if control.evaluate("c => !!c.options") else "ArrowRight")
        page.wait_for_function("([root, k]) => root.times.length >= k", arg=[explorer, k], timeout=2000)
        assert control.input_value() == str(k)
        pictures.add(explorer.evaluate("root => root.state().picture"))
    assert len(pictures) > 1, "the picture never changed"
    return max(explorer.evaluate("root => root.times"))


# One page


def test_a_page_is_ready_in_time(browser, site, explorer_page):
    medians = []
    for _ in range(ROUNDS):
        times = []
        for _ in range(3):
            seen = open_page(browser, f"{site}/book/{explorer_page}.html", script=READY)
            ready = seen.page.wait_for_function("window.ready", timeout=5000)
            times.append(ready.json_value() / 1000)
            seen.page.context.close()
        medians.append(statistics.median(times))
        if medians[-1] <= READY_SECONDS:
            break
    assert min(medians) <= READY_SECONDS, medians


def test_from_a_folder_without_a_server(browser, explorer_page):
    seen = open_page(browser, (SITE / f"book/{explorer_page}.html").resolve().as_uri())
    root = seen.page.query_selector(".de-explorer")
    root.evaluate(EXPLORER)
    assert press_through(seen.page, root, root.query_selector("input, select")) < 1000
    assert foreign(seen) == []
    seen.page.context.close()


def test_without_scripts_a_frame_and_its_sentence_are_there(browser, site, explorer_page):
    url = f"{site}/book/{explorer_page}.html"
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    root = page.locator(".de-explorer").first
    assert root.locator("img:visible").count() == 1
    assert root.locator("output").inner_text().strip() == root.locator("img:visible").get_attribute("alt")
    assert not root.locator(".de-controls").is_visible()
    context.close()


def test_the_theme_button_changes_the_figures_without_a_reload(browser, site, explorer_page):
    seen = open_page(browser, f"{site}/book/{explorer_page}.html", color_scheme="light")
    faces = set()
    for _ in range(3):  # the button goes through light, dark and the system's choice
        seen.page.locator(".theme-switch-button:visible").first.click()
        image = seen.page.locator(".de-explorer img:visible")
        faces.add(
            (seen.page.evaluate("document.documentElement.dataset.theme"), image.first.get_attribute("class"))
        )
    assert faces == {("light", "only-light"), ("dark", "only-dark")}
    seen.page.context.close()


def test_play_runs_and_pauses_and_is_absent_where_motion_is_unwanted(browser, site):
    name = next((n for n in PAGES if 'aria-controls="de-' in (SITE / f"book/{n}.html").read_text()), None)
    if name is None:
        pytest.skip("no explorer of the site plays")
    seen = open_page(browser, f"{site}/book/{name}.html")
    root = seen.page.locator(".de-explorer:has(button)").first
    button = root.get_by_role("button")
    slider = root.locator(f"[id={button.get_attribute('aria-controls')}]")
    slider.evaluate("slider => { slider.value = slider.max; slider.dispatchEvent(new Event('input')) }")
    button.click()
    assert button.inner_text() == "Pause"
    seen.page.wait_for_function("slider => slider.value === '2'", arg=slider.element_handle())
    button.click()
    assert button.inner_text() == "Play"
    seen.page.emulate_media(reduced_motion="reduce")
    assert not button.is_visible()
    assert slider.is_visible()
    seen.page.context.close()
