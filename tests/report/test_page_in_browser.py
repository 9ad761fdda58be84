"""The report as a reader sees it: opened from disk in Chromium, without network; light, dark, on a phone, on paper."""

import base64
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from making_runs import by_geneval, by_rewards, evaluation, not_evaluated, with_suites, write_run, write_sweep
from reading_pages import HOSTILE, hostile_sweep
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from agsm_rl.report.page import write_report
from agsm_rl.report.texts import signed

CHARTS = "svg.plot"
PHONE = 390


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Two variants over two seeds at two guidances, with rewards, cosines and images."""
    folder = tmp_path_factory.mktemp("sweeps") / "study"
    scores = {1.0: (0.3, 0.45), 2.0: (0.4, 0.5)}
    variants = {"agsm and ddpo": {"scores": scores}, "agsm": {"scores": scores, "terms": ("agsm",), "rank": 4}}
    write_report([write_sweep(folder, variants, [0, 1], {"agsm-seed1": "failed"})], folder / "report.html")
    return folder / "report.html"


def show(browser, file: Path, *, width: int = 1200, scheme: str = "light", ready: str = "#pictures-grid > *"):
    """Open the file, at a width and in a colour scheme; what the last test left in the log is dropped."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(file.absolute().as_uri())
    WebDriverWait(browser, 30).until(lambda opened: opened.find_elements(By.CSS_SELECTOR, ready))


def complaints(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def keep(browser, name: str) -> bytes:
    """A screenshot of the whole page; kept in the folder that AGSM_RL_SCREENSHOTS names, to be looked at."""
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    data = base64.b64decode(shot["data"])
    if folder := os.environ.get("AGSM_RL_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(data)
    return data


def paper(browser) -> str:
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, PHONE])
def test_it_shows_every_chart_without_a_complaint(browser, report, scheme, width):
    show(browser, report, width=width, scheme=scheme)
    assert complaints(browser) == []
    for section in ("picture", "scores", "differences", "guidance", "training", "over-optimisation", "gradients"):
        assert browser.find_elements(By.CSS_SELECTOR, f"#{section} {CHARTS}"), section
    assert browser.find_elements(By.CSS_SELECTOR, "#pictures-grid img[src^='data:image/png']")
    overflow = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert browser.execute_script(overflow) <= 0
    assert len(keep(browser, f"{scheme}-{width}")) > 20_000


FAULTS = """
    const done = arguments[arguments.length - 1];
    axe.run(document, { resultTypes: ["violations"] }).then((found) => done(found.violations.flatMap(
        (fault) => fault.nodes.map((node) => `${fault.id}: ${node.html.slice(0, 120)}: ${node.failureSummary}`))));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, PHONE])
def test_axe_finds_no_fault_of_contrast_names_or_keyboard(browser, axe, report, scheme, width):
    show(browser, report, width=width, scheme=scheme)
    # One variant hidden and all that folds open, so that these are looked at as well.
    browser.execute_script("document.querySelectorAll('.chip')[1].click()")
    browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    browser.execute_script("document.querySelectorAll('.chip')[1].focus()")
    browser.execute_script(axe)
    assert browser.execute_async_script(FAULTS) == []


def test_what_scrolls_can_be_reached_by_the_keyboard_and_nothing_else_stops_there(browser, report):
    show(browser, report, width=PHONE)
    reachable = """return [...document.querySelectorAll('.scroll')]
        .filter(box => box.checkVisibility()).map(box => [box.scrollWidth > box.clientWidth, box.tabIndex === 0])"""
    boxes = browser.execute_script(reachable)
    assert all(scrolls == stops for scrolls, stops in boxes) and any(scrolls for scrolls, _ in boxes)


@pytest.fixture(scope="module")
def long_report(tmp_path_factory):
    """As wide as it gets: long names, five seeds each."""
    folder = tmp_path_factory.mktemp("sweeps") / "wide"
    names = [f"agsm plus ddpo with {kind}" for kind in ("soft tokens", "low rank", "both of them", "nothing else")]
    variants = {name: {"rank": rank, "steps": 12} for rank, name in enumerate(names, start=1)}
    write_report([write_sweep(folder, variants, range(5))], folder / "report.html")
    return folder / "report.html"


def test_the_tables_fit_a_screen_of_1280_pixels_and_chips_wrap(browser, long_report):
    show(browser, long_report, width=1280)
    overflow = "const box = document.querySelector(arguments[0]); return box.scrollWidth - box.clientWidth"
    for box in ("#scores-table", "#differences-table", "#chips"):
        assert browser.execute_script(overflow, box) <= 0, box
    assert "by seed" in browser.find_element(By.CSS_SELECTOR, "#differences-table thead").text
    show(browser, long_report, width=PHONE)
    assert browser.execute_script(overflow, "#chips") <= 0
    tops = "return new Set([...document.querySelectorAll('.chip')].map(chip => chip.offsetTop)).size"
    assert browser.execute_script(tops) > 1


def test_a_variant_of_several_runs_is_one_line_with_a_band(browser, report):
    show(browser, report)
    opened = Select(browser.find_element(By.ID, "choose-metric-select")).first_selected_option.text
    assert opened == "ddpo/reward/shapes", "the trained reward itself, not the weighted sum of several"
    choose(browser, "metric", "agsm/loss")
    lines = "return document.querySelectorAll('#training-chart g[stroke-opacity] path').length"
    bands = "return document.querySelectorAll('#training-chart g[fill-opacity] path').length"
    assert (browser.execute_script(lines), browser.execute_script(bands)) == (2, 1)
    choose(browser, "lines", "a line for each run")
    assert (browser.execute_script(lines), browser.execute_script(bands)) == (3, 0)


def test_the_band_reaches_from_the_lowest_to_the_highest_run(browser, report):
    show(browser, report)
    line = lambda *ys: [{"x": x, "y": y} for x, y in enumerate(ys)]  # noqa: E731
    found = browser.execute_script("return together([...arguments])", line(0, 2, 4), line(2, 4), [])
    assert [(point["y"], point["low"], point["high"], point["runs"]) for point in found] == [
        (1, 0, 2, 2),
        (3, 2, 4, 2),
        (4, 4, 4, 1),
    ]


@pytest.fixture(scope="module")
def suites_report(tmp_path_factory):
    """A run of two suites, verdicts and rewards, which kept sixteen pictures of each."""
    folder = tmp_path_factory.mktemp("suites")
    world = evaluation([f"a drawing of number {number}" for number in range(24)], {1.0: (0.3, 0.5)}, 0)
    run = with_suites(write_run(folder / "mine", images=16), {"world": [world], "own": [by_rewards(prompts=20)]})
    shutil.copytree(run / "samples/eval/guidance-1", run / "samples/eval/own/guidance-1")
    write_report([run], folder / "report.html")
    return folder / "report.html"


def test_another_suite_is_chosen_and_its_largest_gains_are_shown(browser, axe, suites_report):
    show(browser, suites_report)
    choose(browser, "suite", "own (rewards)")
    (row,) = rows_of(browser, "differences-table")
    assert row[0] == "mine" and float(row[2].split("\n")[0]) > 0.1 and float(row[3].split("\n")[0]) > 80  # wins, %
    choose(browser, "pictures", "mine: largest gains")
    changes = (
        "return [...document.querySelectorAll('.prompt')].map(one => one.querySelectorAll('.verdict')[1].innerText)"
    )
    shown = [float(re.search(r"\(\+(.*)\)", text)[1]) for text in browser.execute_script(changes)]
    assert len(shown) > 3 and shown == sorted(shown, reverse=True)
    assert "among the 16 of 40 images" in browser.find_element(By.ID, "pictures-note").text
    browser.execute_script(axe)
    assert browser.execute_async_script(FAULTS) == []
    choose(browser, "suite", "world (shapes)")
    assert "points" in browser.find_element(By.CSS_SELECTOR, "#differences-chart").text
    assert complaints(browser) == []


def test_without_an_evaluation_it_shows_what_there_is_without_a_complaint(browser, tmp_path):
    write_report([not_evaluated(write_run(tmp_path / "mine"))], tmp_path / "a.html")
    show(browser, tmp_path / "a.html", ready="#training-chart > *")
    assert complaints(browser) == []
    shown = [one.get_attribute("id") for one in browser.find_elements(By.TAG_NAME, "section") if one.is_displayed()]
    assert shown == ["training", "gradients", "sheets", "recipes", "runs"]


def test_of_geneval_it_shows_every_chart_without_a_complaint(browser, tmp_path):
    write_report([by_geneval(write_run(tmp_path / "mine"), trained=0.8)], tmp_path / "a.html")
    show(browser, tmp_path / "a.html")
    assert complaints(browser) == []
    assert browser.find_elements(By.CSS_SELECTOR, "#pictures-grid img[src^='data:image/png']")


def test_dark_and_light_follow_the_reader(browser, report):
    show(browser, report, scheme="light")
    light = paper(browser)
    show(browser, report, scheme="dark")
    assert sum(map(int, light[4:-1].split(", "))) > 600 > 150 > sum(map(int, paper(browser)[4:-1].split(", ")))


def test_it_asks_for_nothing_over_the_network(browser, report):
    show(browser, report)
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [one["params"]["request"]["url"] for one in sent if one["method"] == "Network.requestWillBeSent"]
    assert asked and {url.partition(":")[0] for url in asked} <= {"file", "data"}
    assert [url for url in asked if url.startswith("file:")] == [report.absolute().as_uri()]


def test_a_dark_reader_prints_on_white_paper(browser, report):
    show(browser, report, scheme="dark")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(printed["data"])
    if folder := os.environ.get("AGSM_RL_SCREENSHOTS"):
        (Path(folder) / "print.pdf").write_bytes(pdf)
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") > 1
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})
    assert paper(browser) == "rgb(255, 255, 255)"
    assert browser.execute_script("return getComputedStyle(document.querySelector('h1')).color") == "rgb(27, 31, 36)"


def choose(browser, name: str, text: str) -> None:
    Select(browser.find_element(By.ID, f"choose-{name}-select")).select_by_visible_text(text)


def rows_of(browser, table: str) -> list[list[str]]:
    script = """return [...document.querySelectorAll(arguments[0] + ' tbody tr')]
        .map(row => [...row.children].map(cell => cell.innerText))"""
    return browser.execute_script(script, f"#{table}")


def data_of(browser) -> dict:
    return json.loads(browser.find_element(By.ID, "data").get_attribute("textContent"))["suites"][0]


def test_the_tables_show_the_datas_figures_for_what_is_chosen(browser, report):
    show(browser, report)
    data = data_of(browser)
    choose(browser, "view", "guidance 2")
    choose(browser, "score", "right (lenient)")
    choose(browser, "minus", "agsm and ddpo")
    wanted = [one for one in data["estimates"] if (one["score"], one["guidance"]) == ("correct", 2)]
    rows = rows_of(browser, "scores-table")
    assert [row[0] for row in rows] == [one["model"] for one in wanted] == ["base", "agsm and ddpo", "agsm"]
    for row, one in zip(rows, wanted, strict=True):
        value, low, high = (f"{100 * part:.1f}" for part in one["overall"])
        assert row[3].split("\n") == [value, f"[{low}, {high}]"]
    # Differences are kept in one direction; the other is shown turned round.
    (kept,) = [
        one
        for one in data["differences"]
        if (one["score"], one["guidance"], one["model"], one["minus"]) == ("correct", 2, "agsm and ddpo", "agsm")
    ]
    (row,) = [row for row in rows_of(browser, "differences-table") if row[0] == "agsm"]
    value, low, high = (signed(-kept["overall"][place]) for place in (0, 2, 1))
    assert row[1] == "1" and row[2].split("\n") == [value, f"[{low}, {high}]"]
    assert complaints(browser) == []


def test_runs_are_picked_and_variants_hidden(browser, report):
    show(browser, report)
    choose(browser, "metric", "agsm/grad_norm")
    choose(browser, "axis", "images sampled")
    choose(browser, "run", "agsm-seed0")
    assert "no cosine" in browser.find_element(By.ID, "cosines-chart").text
    chip = next(one for one in browser.find_elements(By.CSS_SELECTOR, ".chip") if one.text == "agsm")
    browser.execute_script("arguments[0].click()", chip)
    assert chip.get_attribute("aria-pressed") == "false"
    assert [row[0] for row in rows_of(browser, "scores-table")] == ["base", "agsm and ddpo"]
    browser.execute_script("document.getElementById('only-different').click()")
    marks = """return [...document.querySelectorAll('.prompt')]
        .map(prompt => new Set([...prompt.querySelectorAll('figure')].map(shot => shot.className)).size)"""
    assert all(size > 1 for size in browser.execute_script(marks))
    assert complaints(browser) == []


def test_only_what_learns_from_a_reward_stands_against_it(browser, report):
    show(browser, report)
    titles = [title.text for title in browser.find_elements(By.CSS_SELECTOR, "#gap-charts h3")]
    assert titles and all(title.startswith("agsm and ddpo") for title in titles)


def test_a_narrower_window_draws_narrower_charts(browser, report):
    show(browser, report, width=1200)
    width = "return document.querySelector('#guidance-chart svg.plot').getBoundingClientRect().width"
    wide = browser.execute_script(width)
    metrics = {"width": PHONE, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    WebDriverWait(browser, 10).until(lambda opened: opened.execute_script(width) != wide)
    assert browser.execute_script(width) < PHONE < wide


def test_a_single_run_without_rewards_images_or_curves_is_shown_all_the_same(browser, tmp_path):
    run = write_run(tmp_path / "mine", terms=("agsm",), images=0)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        (run / name).unlink()
    write_report([run], tmp_path / "report.html")
    show(browser, tmp_path / "report.html")
    assert complaints(browser) == []
    assert "kept no single images" in browser.find_element(By.ID, "pictures-grid").text


def test_hostile_names_and_prompts_are_shown_and_do_not_run(browser, tmp_path):
    write_report([hostile_sweep(tmp_path)], tmp_path / "report.html")
    show(browser, tmp_path / "report.html")
    assert browser.execute_script("return window.hacked") is None
    assert HOSTILE in browser.find_element(By.CSS_SELECTOR, "#scores-table").text
    assert f"{HOSTILE} 0" in browser.find_element(By.ID, "pictures-grid").text
    assert complaints(browser) == []


def test_without_scripts_the_main_figures_are_still_there(browser, report):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(report.absolute().as_uri())
        text = browser.find_element(By.TAG_NAME, "noscript").text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert "minus base, points" in text and "agsm and ddpo" in text
