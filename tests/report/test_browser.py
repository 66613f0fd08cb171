"""The page in a real browser: read without script, in both colour schemes, on a phone, by keyboard, and on paper."""

import base64
import itertools
import json
import re
import subprocess
from dataclasses import replace

import pytest

from dpguard.report.render import render
from tests.report.browser import Browser, find
from tests.report.made_up_study import POLICIES, sample

pytestmark = pytest.mark.skipif(find() is None, reason="no Chromium here (Debian: apt install chromium)")

CONTRAST = """
(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (css) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = css;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [R, G, B]) => [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
  const light = (c) => {
    const [r, g, b] = c.map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    const layers = [];
    for (; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((under, layer) => over(layer, under), [255, 255, 255, 1]);
  };
  // what is painted under a text of a picture: the last filled shape before it that holds its middle
  const beneath = (text, back) => {
    const box = text.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
    for (const shape of text.closest("svg").querySelectorAll("path, rect")) {
      if (!(shape.compareDocumentPosition(text) & Node.DOCUMENT_POSITION_FOLLOWING)) break;
      const style = getComputedStyle(shape), r = shape.getBoundingClientRect();
      if (style.fill === "none" || x < r.left || x > r.right || y < r.top || y > r.bottom) continue;
      const [red, green, blue, alpha] = rgba(style.fill);
      back = over([red, green, blue, alpha * style.fillOpacity * style.opacity], back);
    }
    return back;
  };
  const worst = {};
  let counted = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement, style = getComputedStyle(e);
    if (!walker.currentNode.data.trim() || !e.checkVisibility({ visibilityProperty: true })) continue;
    if (e.closest(".hidden, script, style, title, desc, .skip")) continue;
    const picture = e.namespaceURI.endsWith("svg"), back = picture ? beneath(e, behind(e)) : behind(e);
    const ink = over(rgba(picture ? style.fill : style.color), back);
    const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    counted++;
    if (ratio < 4.5) worst[e.tagName + "." + e.className + ": " + walker.currentNode.data.trim().slice(0, 30)] = ratio;
  }
  return { worst, counted };
})()
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return render(sample(12), tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="module")
def browser():
    with Browser(find()) as browser:
        yield browser


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    browser.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    return browser


def test_nothing_is_asked_for_and_nothing_complains(browser, page):
    browser.open(page)
    assert browser.requests == [page.resolve().as_uri()]
    assert browser.console == []
    assert browser.evaluate("document.title") == "sample – dpguard report"


def test_the_security_policy_stops_a_script_that_is_not_ours(browser, page, tmp_path):
    altered = tmp_path / "altered.html"
    text = page.read_text("utf-8")
    altered.write_text(text.replace("</main>", "<script>document.title = 'taken'</script><img src='x.png'></main>"))
    browser.open(altered)
    assert browser.evaluate("document.title") == "sample – dpguard report"
    refused = [line for line in browser.console if "Content Security Policy" in line]
    assert any("script" in line for line in refused)
    assert any("x.png" in line for line in refused)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_all_text_is_enough(browser, page, scheme):
    for width in (1200, 400):
        browser.open(page, width=width, scheme=scheme)
        browser.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
        found = browser.evaluate(CONTRAST)
        assert found["counted"] > 500
        assert found["worst"] == {}


def test_the_two_schemes_differ_and_paper_is_light(browser, page):
    colour = "getComputedStyle(document.body).backgroundColor"
    browser.open(page, scheme="light")
    day = browser.evaluate(colour)
    browser.media("dark")
    assert browser.evaluate(colour) != day
    browser.media("dark", "print")
    assert browser.evaluate(colour) == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.querySelector('.readout')).display") == "none"
    assert browser.evaluate("getComputedStyle(document.querySelector('svg.wide')).display") == "block"


@pytest.mark.parametrize("width", [400, 320, 1200])
def test_nothing_scrolls_sideways_but_tables_in_their_boxes(browser, page, width):
    browser.open(page, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach((part) => (part.open = true))")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility()"
        " && !e.closest('.scroll, pre, .hidden, .skip, svg')"
        f" && e.getBoundingClientRect().right > {width} + 1).map((e) => e.tagName + e.className)"
    )
    assert browser.evaluate(outside) == []


def test_on_a_phone_a_policy_s_card_has_the_number_that_the_pictures_name_it_by(browser, page):
    before = "getComputedStyle(document.querySelectorAll('.frontier tbody th')[2], '::before').content"
    browser.open(page, width=390)
    assert "3" in browser.evaluate(before)
    assert not browser.evaluate("document.querySelector('.frontier tbody td').checkVisibility()")
    browser.open(page, width=1200)
    assert browser.evaluate(before) == "none"


def test_headings_come_in_order_and_every_picture_has_a_name(opened):
    levels = opened.evaluate("[...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].map((h) => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    named = opened.evaluate(
        "[...document.querySelectorAll('svg')].map((s) => s.getAttribute('aria-label') || "
        "(document.getElementById(s.getAttribute('aria-labelledby')) || {}).textContent)"
    )
    assert len(named) > 6
    assert all(named)
    assert opened.evaluate("[...document.querySelectorAll('svg')].every((s) => ['img', 'group'].includes(s.role))")
    nodes = opened.call("Accessibility.getFullAXTree")["nodes"]
    links = [n for n in nodes if n.get("role", {}).get("value") == "link" and not n.get("ignored")]
    assert len(links) > len(POLICIES)
    assert all(n["name"]["value"] for n in links)


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(browser, page):
    browser.open(page)
    seen = []
    for _ in range(60):
        browser.press("Tab")
        seen.append(
            browser.evaluate(
                "(() => { const e = document.activeElement, r = e.getBoundingClientRect(); return [e.tagName, "
                "e.getAttribute('href') || e.id || e.className.baseVal || String(e.className), "
                "[...document.querySelectorAll('*')].indexOf(e), e.matches(':focus-visible')]; })()"
            )
        )
    assert seen[0][1] == "#main"
    places = [place for _, _, place, _ in seen]
    assert places == sorted(places)
    assert len(set(places)) == len(places)
    assert all(visible for _, _, _, visible in seen)
    assert any(tag == "a" and target.startswith("#policy-") for tag, target, _, _ in seen), "points of the trade-off"
    assert any("metric-1" in target for _, target, _, _ in seen)


def test_focus_on_a_point_shows_its_table_without_script(browser, page):
    browser.open(page, script=False)
    shown = (
        "[...document.querySelectorAll('.readout > div')].filter((e) => e.checkVisibility()).map((e) => e.innerText)"
    )
    assert browser.evaluate(shown) == []
    browser.evaluate("document.querySelector('.alt-1 svg.wide .mark[data-policy=\"3\"]').focus()")
    [told] = browser.evaluate(shown)
    assert "dp-sgd noise=0.6" in told
    assert "clip: 1, noise: 0.6" in told
    label = browser.evaluate("document.activeElement.querySelector('title').textContent")
    assert re.match(r"dp-sgd noise=0\.6: leakage \d\.\d\d .*accuracy .*epsilon 6\.31", label)


def test_another_metric_can_be_picked_without_script(browser, page):
    browser.open(page, script=False)
    shown = "[...document.querySelectorAll('.alt')].filter((e) => e.checkVisibility()).map((e) => e.className)"
    assert browser.evaluate(shown) == ["alt alt-1"]
    browser.evaluate("document.getElementById('metric-2').click()")
    assert browser.evaluate(shown) == ["alt alt-2"]


def test_the_decision_and_what_is_missing_are_on_the_first_screen(browser, page):
    browser.open(page, height=900, script=False)
    top = "document.querySelector({}).getBoundingClientRect().top"
    assert browser.evaluate(top.format("'.notice.warn'")) < 400
    assert browser.evaluate(top.format("'#decision'")) < 600
    assert "out of memory" in browser.evaluate("document.querySelector('.notice.warn').innerText")


def test_the_script_sorts_opens_and_reveals(browser, page):
    browser.open(page)
    browser.evaluate(
        "[...document.querySelectorAll('.frontier .sort')].find((b) => b.textContent === 'epsilon').click()"
    )
    cells = browser.evaluate("[...document.querySelectorAll('.frontier tbody tr')].map((r) => r.cells[5].textContent)")
    finite = [float(text.replace(",", "")) for text in cells if text != "∞"]
    assert finite == sorted(finite)
    assert cells[-1] == "∞"
    assert browser.evaluate("document.querySelector('[aria-sort]').ariaSort") == "ascending"
    browser.evaluate("location.hash = '#policy-1'")
    assert browser.evaluate("document.getElementById('policy-1').closest('details').open")
    browser.evaluate("[...document.querySelectorAll('button')].find((b) => b.textContent.startsWith('Open')).click()")
    assert browser.evaluate("[...document.querySelectorAll('details.policy')].every((d) => d.open)")


def test_evidence_is_closed_until_it_is_opened(browser, page):
    browser.open(page, script=False)
    assert browser.evaluate("[...document.querySelectorAll('details.evidence')].length") > 0
    assert not browser.evaluate("[...document.querySelectorAll('details.evidence')].some((d) => d.open)")
    assert not browser.evaluate("document.querySelector('.diff mark').checkVisibility({ contentVisibilityAuto: true })")


def test_printed_pages_are_numbered_and_show_the_closed_parts(browser, page, tmp_path):
    browser.open(page)
    made = browser.call("Page.printToPDF", {"preferCSSPageSize": True, "printBackground": True})
    (tmp_path / "report.pdf").write_bytes(base64.b64decode(made["data"]))
    try:
        done = subprocess.run(
            ["pdftotext", "-layout", tmp_path / "report.pdf", "-"], check=True, capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("no pdftotext here (Debian: apt install poppler-utils)")
    pages = done.stdout.split("\f")[:-1]
    assert all(f"{number} / {len(pages)}" in text for number, text in enumerate(pages, 1))
    assert "dpguard report: sample" in pages[0]
    assert "To reproduce it" in done.stdout
    assert done.stdout.count("The guarantee") >= len(POLICIES)


def test_hostile_text_runs_nothing(browser, tmp_path):
    study = sample(4)
    evil = "<script>document.title='taken'</script><img src=x onerror=document.title='taken'>\u202e" + "w" * 10_000
    told = {**study.study, "name": evil, "question": evil}
    records = [replace(r, cell=replace(r.cell, policy=evil)) if r.cell.policy == "prune" else r for r in study.records]
    spec = {**study.spec, "policies": []}
    browser.open(render(replace(study, study={**told, "spec": spec}, records=records), tmp_path), width=400)
    assert not browser.evaluate("document.title").startswith("taken")
    assert browser.evaluate("document.images.length") == 0
    assert browser.requests == [(tmp_path / "report.html").resolve().as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    assert json.dumps(browser.console) == "[]"
