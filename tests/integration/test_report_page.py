"""The report page in a real browser."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from fastmsflow.metrics import auroc
from fastmsflow.visualization.html_report import ReportRow, write_report
from tests.helpers.browser import active, choose, chromium, complaints, find, names, pixel, requested, texts
from tests.helpers.report_samples import KINDS, LABELS, NAMES, ROW, SCORES, page, rows

pytestmark = pytest.mark.slow

# The verdict: (label, whether the score is above the threshold).
VERDICTS = {"hit": (1, True), "missed": (1, False), "alarm": (0, True), "correct": (0, False)}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def shown(browser: Chrome, tmp_path: Path) -> Iterator[Callable[..., Chrome]]:
    """Shows a page with the given changes; in the end nothing may have gone wrong or been asked for but the page."""
    path = tmp_path / "report #1 ä.html"

    def show(**changes: Any) -> Chrome:
        write_report(path, page(**changes))
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.get(path.as_uri())
        return browser

    complaints(browser), requested(browser)
    yield show
    assert complaints(browser) == []
    assert requested(browser) == [path.as_uri()]


def counts(browser: Chrome) -> dict[str, int]:
    return {key: int(find(browser, f".count.{key} b").text) for key in VERDICTS}


def expected_counts(threshold: float) -> dict[str, int]:
    return {
        key: int(((label == LABELS) & ((threshold < SCORES) == above)).sum())
        for key, (label, above) in VERDICTS.items()
    }


def expected_names(threshold: float, verdict: str) -> list[str]:
    label, above = VERDICTS[verdict]
    return [NAMES[i] for i in np.flatnonzero((label == LABELS) & ((threshold < SCORES) == above))]


def test_rows_are_the_images(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    assert sorted(names(browser)) == sorted(NAMES)
    assert find(browser, "#shown").text == "40 of 40 images"
    assert find(browser, "#summary").text == "40 images: 16 defective, 24 good"
    assert sorted(texts(browser, "#gallery .score")) == sorted(f"{score:.2f}" for score in SCORES)
    assert browser.title == "parts, test set"


def test_starts_at_the_calibrated_threshold(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    assert counts(browser) == expected_counts(3.0)
    assert float(find(browser, "#threshold").get_property("value")) == 3.0
    assert find(browser, "#note").text == "5% false alarms asked"
    assert not find(browser, "#reset").is_enabled()


@pytest.mark.parametrize("typed", [-1.0, 2.5, SCORES[3], SCORES.max(), 1e6])
def test_typing_a_threshold_counts_again(shown: Callable[..., Chrome], typed: float) -> None:
    browser = shown()
    find(browser, "#threshold").clear()
    find(browser, "#threshold").send_keys(str(typed))
    expected = expected_counts(typed)
    assert counts(browser) == expected
    hit, missed, alarm, correct = (expected[key] for key in VERDICTS)
    rates = [(alarm, alarm + correct), (hit, hit + missed), (hit, hit + alarm), (2 * hit, 2 * hit + alarm + missed)]
    shown_rates = [find(browser, what).text for what in ("#false-alarm-rate", "#recall", "#precision", "#f1")]
    assert shown_rates == [f"{100 * part / whole:.1f}%" if whole else "–" for part, whole in rates]
    find(browser, "#reset").click()
    assert counts(browser) == expected_counts(3.0)


def test_the_slider_counts_again_by_keyboard(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    slider = find(browser, "#slider")
    seen = set()
    for key in (Keys.HOME, Keys.PAGE_UP, Keys.PAGE_UP, Keys.ARROW_RIGHT, Keys.PAGE_UP, Keys.ARROW_LEFT, Keys.END):
        slider.send_keys(key)
        threshold = float(find(browser, "#threshold").get_property("value"))
        seen.add(threshold)
        expected = expected_counts(threshold)
        assert counts(browser) == expected
        said = slider.get_attribute("aria-valuetext")
        assert said.endswith(f"{expected['alarm']} false alarms, {expected['missed']} missed")
    assert len(seen) == 7 and min(seen) < SCORES.min() and max(seen) >= SCORES.max()


def test_line_and_thumb_stand_at_the_same_place(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    for step in (0, 250, 1000):
        apart = browser.execute_script(
            """const slider = document.getElementById("slider");
            slider.value = arguments[0];
            slider.dispatchEvent(new Event("input"));
            const line = document.querySelector(".threshold").getBoundingClientRect();
            const track = slider.getBoundingClientRect();
            return track.left + 8 + (track.width - 16) * arguments[0] / 1000 - line.left - line.width / 2;""",
            step,
        )
        assert abs(apart) <= 1.5


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("high", [NAMES[i] for i in np.argsort(-SCORES, kind="stable")]),
        ("low", [NAMES[i] for i in np.argsort(SCORES, kind="stable")]),
        ("name", NAMES),  # part2 before part10
    ],
)
def test_sorting(shown: Callable[..., Chrome], order: str, expected: list[str]) -> None:
    browser = shown()
    assert names(browser) == [NAMES[i] for i in np.argsort(-SCORES, kind="stable")]
    choose(browser, "#sort", order)
    assert names(browser) == expected


def test_filters(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    choose(browser, "#sort", "name")
    choose(browser, "#kind", "crack")
    assert names(browser) == NAMES[24:33]
    assert find(browser, "#shown").text == "9 of 40 images"
    choose(browser, "#kind", "")
    for verdict in VERDICTS:
        choose(browser, "#verdict", verdict)
        assert names(browser) == expected_names(3.0, verdict)
    choose(browser, "#verdict", "")
    find(browser, "#search").send_keys("PART3")
    assert names(browser) == ["part3.png", *NAMES[30:40]]
    choose(browser, "#kind", "hole")
    assert names(browser) == NAMES[33:40]
    find(browser, "#search").send_keys("no such name")
    assert names(browser) == [] and find(browser, "#shown").text == "0 of 40 images"


def test_filter_by_outcome_follows_the_threshold(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    choose(browser, "#sort", "name")
    find(browser, ".count.missed").click()
    assert find(browser, "#verdict").get_property("value") == "missed"
    assert names(browser) == expected_names(3.0, "missed")
    find(browser, "#threshold").clear()
    find(browser, "#threshold").send_keys("6.5")
    assert names(browser) == expected_names(6.5, "missed") != expected_names(3.0, "missed")
    assert set(texts(browser, "#gallery .tag")) == {"missed"}


def test_tab_reaches_every_control(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    browser.execute_script("setThreshold(2, false)")  # the way back to the calibrated one is open
    controls = ["skip", "slider", "threshold", "reset", "count hit", "count missed", "count alarm", "count correct"]
    controls += ["SUMMARY", "SUMMARY", "sort", "kind", "verdict", "search", "opacity", "card", "card"]
    reached = []
    for _ in controls:
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(active(browser))
    assert reached == controls
    outline = browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


def test_every_control_has_a_name(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    for node in browser.find_elements(
        By.CSS_SELECTOR, "main :is(input, select, summary), .count, li:first-child .card"
    ):
        assert node.accessible_name.strip(), node.get_attribute("outerHTML")
    assert find(browser, ".count.missed").accessible_name == f"{expected_counts(3.0)['missed']} missed"
    top = int(np.argmax(SCORES))
    assert find(browser, ".card").accessible_name == f"{NAMES[top]}, {KINDS[top]}, score {SCORES[top]:.2f}, hit"


def test_enter_enlarges_arrows_turn_escape_closes(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    order = [NAMES[i] for i in np.argsort(-SCORES, kind="stable")]
    dialog = find(browser, "#enlarged")
    assert not dialog.is_displayed()
    find(browser, ".card").send_keys(Keys.ENTER)
    assert dialog.is_displayed() and dialog.accessible_name == order[0]
    assert not find(browser, "#previous").is_enabled()
    assert texts(browser, "#enlarged-facts") == [f"{KINDS[NAMES.index(order[0])]} · score {SCORES.max()} nats · hit"]
    assert len(browser.find_elements(By.CSS_SELECTOR, "#enlarged .pane img")) == 4
    browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert dialog.accessible_name == order[1]
    find(browser, "#next").click()
    assert dialog.accessible_name == order[2]
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert not dialog.is_displayed()
    # A browser tells of the end of a dialog a moment later.
    WebDriverWait(browser, 10).until(lambda _: browser.switch_to.active_element.accessible_name.startswith(order[2]))


def test_heat_is_coloured_by_the_scale_and_laid_over_the_image(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    choose(browser, "#sort", "name")
    find(browser, ".card").click()
    browser.execute_script("for (const node of document.querySelectorAll('.outlines')) node.remove()")
    image, heat, overlay = browser.find_elements(By.CSS_SELECTOR, "#enlarged .pane")
    turbo = (np.array(mpl.colormaps["turbo"]([0.25, 0.75]))[:, :3] * 255).round()
    cold, hot = (0.1, 0.1), (0.6, 0.5)
    # Lossy pictures; turbo is steep.
    assert np.abs(pixel(heat, *cold) - turbo[0]).max() <= 10
    assert np.abs(pixel(heat, *hot) - turbo[1]).max() <= 10
    grey = pixel(image, *hot)
    assert np.abs(grey - 40).max() <= 3
    for place, share, colour in ((cold, 0.25, turbo[0]), (hot, 0.75, turbo[1])):
        opacity = 0.7 * np.sqrt(share)
        assert np.abs(pixel(overlay, *place) - (grey * (1 - opacity) + colour * opacity)).max() <= 10
    find(browser, "#enlarged .opacity").send_keys(Keys.HOME)
    assert np.abs(pixel(overlay, *hot) - grey).max() <= 2
    assert find(browser, ".tools .opacity").get_property("value") == "0"


def test_true_and_found_regions_are_outlined(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    choose(browser, "#kind", "hole")
    find(browser, ".card").click()
    panes = "#enlarged .pane:nth-child"
    for pane in (2, 3):
        for name, (left, top, width, height) in {"mask": (8, 16, 40, 16), "region": (24, 24, 32, 16)}.items():
            box = browser.execute_script(
                "const box = document.querySelector(arguments[0]).getBBox();"
                "return [box.x, box.y, box.width, box.height].map((v) => v / 4)",
                f"{panes}({pane}) path.{name}:not(.halo)",
            )
            assert box == pytest.approx([left, top, width, height], abs=0.5)
    assert not browser.find_elements(By.CSS_SELECTOR, f"{panes}(1) path")
    assert texts(browser, "#heat-legend .entry")[1:] == ["found: above 5", "true defect"]


def test_curves_and_metrics(shown: Callable[..., Chrome]) -> None:
    browser = shown()
    assert find(browser, "#roc-caption").text.endswith(f"area {auroc(LABELS, SCORES):.4f}")
    assert find(browser, "#roc .curve").is_displayed() and find(browser, "#pro .curve").is_displayed()
    assert [find(browser, f"#metrics tr:nth-child({i})").text for i in (1, 2)][1:] == ["AUPRO – –"]
    assert texts(browser, "#metrics tbody tr:first-child td") == ["0.9100", "0.9300"]
    assert find(browser, "#pixel-note").text == "Pixel threshold: 4 nats."
    assert not find(browser, "#corruption").is_displayed() and not find(browser, "#kinds").is_displayed()
    find(browser, ".facts summary").click()
    assert "resnet18" in find(browser, "#settings").text and "64, 64" in find(browser, "#settings").text
    assert texts(browser, "#versions dd") == ["0.1.0", "sha256:1234"]


def test_metrics_stand_beside_both_charts_with_digits_enough_for_rates_of_pixels(shown: Callable[..., Chrome]) -> None:
    browser = shown(metrics={"last": {"SegF1-max (chosen on test)": 0.5, "false pixels, good images": 0.0000494}})
    assert texts(browser, "#metrics td:last-child")[-2:] == ["0.5000", "0.000049"]
    roc, pro, table = (find(browser, f"#{name}-figure").rect for name in ("roc", "pro", "metrics"))
    assert pro["y"] > roc["y"] + 200 and pro["x"] == roc["x"] and table["x"] > roc["x"] + roc["width"]
    assert table["y"] == roc["y"] and table["width"] > 1.5 * roc["width"]


@pytest.mark.parametrize("section", ["corruption", "kinds"])
def test_tables_of_changed_light_and_of_kinds_are_folded_by_checkpoint(
    section: str, shown: Callable[..., Chrome]
) -> None:
    values = {"clean": {"image AUROC": 0.9, "AUPRO": None}, "darker": {"image AUROC": 0.8, "AUPRO": None}}
    browser = shown(**{section: {"last": values, "best on test": {"clean": {"image AUROC": 0.7}}}})
    assert texts(browser, f"#{section} summary") == ["last", "best on test"]
    assert texts(browser, f"#{section} details[open] thead th") == ["clean", "darker"]
    assert texts(browser, f"#{section} details[open] tbody tr:first-child td") == ["0.9000", "0.8000"]
    assert texts(browser, f"#{section} details[open] tbody tr:last-child td") == ["–", "–"]
    browser.find_elements(By.CSS_SELECTOR, f"#{section} summary")[1].click()
    assert find(browser, f"#{section} details:last-child td").is_displayed()


HOSTILE = [
    "<script>document.title='run'</script>",
    "</script><script>document.title='run'<!--.png",
    '"><img src=x onerror="document.title=\'run\'">',
    "two\nlines'&amp;.png",
    b"latin-\xe9.png".decode("utf-8", "surrogateescape"),
]


def test_hostile_names_are_text(shown: Callable[..., Chrome]) -> None:
    pixels, heat = np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8))
    # A slash cannot be in a name, so the kind carries the whole text.
    given = [ReportRow(Path(text), 1, text, float(i), pixels, heat) for i, text in enumerate(HOSTILE)]
    text = HOSTILE[1]
    browser = shown(
        title=text, rows=given, threshold_note=text, heat_caption=text, metrics={text: {text: 0.5}},
        settings={text: [text]}, versions={text: text}, fingerprint=text, licence=text,
    )  # fmt: skip
    assert browser.title == text and find(browser, "h1").text == text
    assert sorted(texts(browser, "#gallery .kind")) == sorted(t.replace("\udce9", "�") for t in HOSTILE)
    assert "two\nlines'&amp;.png" in names(browser)
    find(browser, ".card").click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "script")) == 2 + len(HOSTILE)
    assert find(browser, "#licence").text == text


def test_without_labels_it_counts_above_and_below(shown: Callable[..., Chrome]) -> None:
    unlabelled = (dataclasses.replace(row, label=None, kind="", mask=None) for row in rows())
    browser = shown(rows=unlabelled, metrics={}, pro=None)
    assert [find(browser, f".count.{key} b").text for key in ("flagged", "passed")] == [
        str((SCORES > 3).sum()),
        str((SCORES <= 3).sum()),
    ]
    assert not browser.find_elements(By.CSS_SELECTOR, ".confusion, .count.hit")
    assert not find(browser, "#curves").is_displayed() and not find(browser, "#kind").is_displayed()
    choose(browser, "#verdict", "flagged")
    assert sorted(names(browser)) == sorted(NAMES[i] for i in np.flatnonzero(SCORES > 3))
    assert find(browser, "#slider").get_attribute("aria-valuetext") == f"3 nats: {(SCORES > 3).sum()} above"


def test_without_masks_and_threshold(shown: Callable[..., Chrome]) -> None:
    browser = shown(rows=rows(masks=False), pro=None, threshold=None, threshold_note="too few", region_threshold=None)
    assert counts(browser) == expected_counts(float(np.median(SCORES)))
    assert find(browser, "#note").text == "No threshold is calibrated, so it starts at the median score: too few"
    assert not browser.find_elements(By.CSS_SELECTOR, ".outlines path")
    assert not find(browser, "#pro-figure").is_displayed()
    assert len(texts(browser, "#heat-legend .entry")) == 1


def test_one_image(shown: Callable[..., Chrome]) -> None:
    browser = shown(rows=[ROW], threshold=None)
    assert names(browser) == [NAMES[0]]
    find(browser, "#slider").send_keys(Keys.HOME)
    assert find(browser, ".count.alarm b").text == "1"


def test_pictures_are_made_when_they_come_near_and_nothing_jumps(shown: Callable[..., Chrome]) -> None:
    many = (dataclasses.replace(ROW, image=Path(f"{i}.png"), score=float(i)) for i in range(300))
    browser = shown(rows=many)
    assert len(names(browser)) == 300

    def filled() -> int:
        return browser.execute_script("return document.querySelectorAll('#gallery img').length")

    WebDriverWait(browser, 10).until(lambda _: filled() > 0)
    first = filled()
    assert first < 4 * 150
    # A slow machine paints parts of the page while it is still being built; from here on nothing may move.
    built = browser.execute_script("return performance.now()")
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    WebDriverWait(browser, 10).until(lambda _: filled() > first)
    assert filled() < 4 * 300
    shifts = browser.execute_async_script(
        "const seen = []; const watch = new PerformanceObserver((list) => seen.push(...list.getEntries()));"
        "watch.observe({type: 'layout-shift', buffered: true});"
        "setTimeout(() => arguments[1](seen.filter((s) => s.startTime > arguments[0]).map((s) => s.value)), 100)",
        built,
    )
    assert sum(shifts) < 0.01


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_fits_a_phone_light_and_dark(shown: Callable[..., Chrome], theme: str) -> None:
    browser = shown()
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wide = browser.execute_script(
        "return [...document.querySelectorAll('body *')].filter((node) => node.checkVisibility()"
        " && node.getBoundingClientRect().right > 361 && !node.closest('.skip')).map((node) => node.outerHTML)"
    )
    assert wide == []
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    lightness = np.mean([int(part) for part in ground[4:-1].split(",")])
    assert lightness > 200 if theme == "light" else lightness < 50


def test_the_page_may_not_reach_the_network(browser: Chrome, tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", page())
    browser.get((tmp_path / "report.html").as_uri())
    complaints(browser)
    ended = browser.execute_async_script(
        "fetch('http://127.0.0.1:9/').then(() => arguments[0]('sent'), (error) => arguments[0](String(error)))"
    )
    assert "Failed to fetch" in ended
    assert any("Content Security Policy" in text for text in complaints(browser))
    requested(browser)
