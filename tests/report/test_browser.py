"""The report in a real browser: no error, no request, no script, and it fits a phone, the dark and paper."""

import pytest
from browser import CHROMIUM, NOT_HERE, Browser
from written_runs import answered, completion, healthy_rows, with_values, write_run

from tunix_torch.report import page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=NOT_HERE)

HOSTILE = (
    "<script>document.title = 'broken'; console.error('ran')</script>",
    "</script></pre><script>document.title = 'broken'</script>",
    "<img src='http://127.0.0.1:9/x.png' onerror=\"document.title = 'broken'\">",
    "<svg onload=\"document.title = 'broken'\"></svg><style>body { display: none }</style>",
    "<base href='http://127.0.0.1:9/'><meta http-equiv='refresh' content='0; url=http://127.0.0.1:9/'>",
    "\x1b[31m\u202egnp.exe\u2066",
    "x" * 100_000,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    rows = with_values(healthy_rows(), kl=lambda done: 2 * done**3)
    kept = [completion(step, i, text, float(i % 2), prompt=text) for step in (1, 60) for i, text in enumerate(HOSTILE)]
    answers = [answered(s, i, text, s > i, text, text) for s in (0, 20, 40, 60) for i, text in enumerate(HOSTILE)]
    settings = {"model_name": "tiny", "max_steps": 60, "system_message": "y" * 5000, "use_grpo": True}
    return write_run(tmp_path_factory.mktemp("run") / "run", rows, settings, kept, answers)


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.mark.parametrize("compare", [False, True], ids=["report", "comparison"])
def test_a_page_asks_for_nothing_runs_nothing_and_fits(run, browser, tmp_path, compare):
    file = page.write_comparison(run, run) if compare else page.write_report(run)
    browser.asked_for.clear()
    browser.open(file)
    assert browser.asked_for == [file.absolute().as_uri()]
    title = browser.value("document.title")
    assert title == ("run and run" if compare else "Report on run") or compare
    assert "broken" not in title and browser.value("document.scripts.length") == 0
    assert browser.value("document.images.length") == 0
    for width, scheme in ((360, "light"), (360, "dark"), (1200, "light"), (1200, "dark")):
        browser.look(width, scheme=scheme)
        assert browser.value("document.documentElement.scrollWidth") <= width, "it scrolls sideways"
        light = browser.value("getComputedStyle(document.body).backgroundColor").startswith("rgb(25")
        assert light == (scheme == "light")
        cut = (
            "[...document.querySelectorAll('figure svg')].filter(svg => svg.getBoundingClientRect().width < 200).length"
        )
        assert browser.value(cut) == 0, "a picture is too small to be read"
    browser.value("document.querySelectorAll('details').forEach(each => { each.open = true })")
    browser.look(360)
    assert browser.value("document.documentElement.scrollWidth") <= 360, "an open table scrolls the page sideways"
    browser.look(800, media="print", scheme="dark")
    assert browser.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.logged == []


def test_contrast_is_enough_in_light_and_dark(run, browser):
    """WCAG 2.2 asks for 4.5 between text and what is behind it; colors here are rgb(r, g, b)."""
    browser.open(page.write_report(run))
    contrast = """
    (() => {
      const luminance = color => {
        const parts = color.match(/[0-9.]+/g).slice(0, 3).map(part => part / 255);
        const linear = parts.map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
      };
      const behind = element => {
        for (let at = element; at; at = at.parentElement) {
          const color = getComputedStyle(at).backgroundColor;
          if (!color.endsWith(", 0)")) return color;
        }
      };
      let worst = 21;
      for (const element of document.querySelectorAll("h1,h2,h3,h4,p,li,td,th,dt,dd,pre,a,code,summary,small,text")) {
        const style = getComputedStyle(element);
        const color = element.tagName === "text" ? style.fill : style.color;
        const pair = [luminance(color), luminance(behind(element))].sort((a, b) => b - a);
        worst = Math.min(worst, (pair[0] + 0.05) / (pair[1] + 0.05));
      }
      return worst;
    })()
    """
    for scheme in ("light", "dark"):
        browser.look(1200, scheme=scheme)
        assert browser.value(contrast) >= 4.5, scheme


def test_the_keyboard_reaches_every_part(run, browser):
    browser.open(page.write_report(run))
    browser.look(1200)
    reached = []
    for _ in range(200):
        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        named = "(at => at === document.body ? '' : at.tagName + ' ' + (at.getAttribute('href') || at.className))"
        what = browser.value(f"{named}(document.activeElement)")
        if not what or (reached and what == reached[0]):
            break
        reached.append(what)
    assert reached[0] == "A #main"
    assert {"A #diagnosis", "A #curves", "A #repeat", "SUMMARY ", "DIV scroll", "PRE command"} <= set(reached)
