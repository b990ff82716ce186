"""`unet-fast report`: a page that stands alone, and what a browser makes of it on a desktop and on a phone."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from unet_fast import report_page
from unet_fast.cli import main
from unet_fast.errors import UserError

ROOT = Path(__file__).parent.parent
NASTY = "<img src=x onerror=alert(1)>"  # of a file in the fixture `stacks`


@pytest.fixture(scope="module")
def pages(crossval_folder, tmp_path_factory):
    """The page of a run and that of a cross-validation."""
    folder = tmp_path_factory.mktemp("reports")
    made = {"run": folder / "run.html", "crossval": folder / "crossval.html"}
    for name, source in (("run", crossval_folder / "fold0"), ("crossval", crossval_folder)):
        assert main(["report", "--run", str(source), "--output", str(made[name]), "--images", "2"]) == 0
    return made


class Elements(HTMLParser):
    """All elements of a page as (tag, attributes), and its text."""

    def __init__(self, path):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.mark.parametrize("kind", ["run", "crossval"])
def test_a_page_needs_nothing_else(pages, kind):
    page = Elements(pages[kind])
    for tag, attributes in page.found:
        for name in ("src", "href", "srcset", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, attributes)
    text = pages[kind].read_text(encoding="utf-8")
    assert "@import" not in text and "url(" not in text
    assert len(text) < 400_000
    assert len(page.all("script")) == 1 and len(page.all("h1")) == 1 and len(page.all("main")) == 1
    assert all(image["alt"] for image in page.all("img"))
    assert page.all("html")[0]["lang"] == "en"


@pytest.mark.parametrize("kind", ["run", "crossval"])
def test_names_of_files_are_no_html(pages, kind):
    page = Elements(pages[kind])
    assert not any("onerror" in attributes for _, attributes in page.found)
    assert NASTY in page.text or kind == "run", "it is an image of one of the folds"
    assert not any(attributes.get("src") == "x" for attributes in page.all("img"))


def test_what_a_run_page_says(pages, crossval_folder):
    scores = json.loads((crossval_folder / "fold0" / "metrics.json").read_text())
    text = Elements(pages["run"]).text
    for name in ("dice", "soft_dice", "hd95", "nsd", "adapted_rand_error"):
        assert f"{scores[name]:.4f}" in text, name
    for name in ("dice", "iou", "hd95", "nsd"):
        assert all(f"{value:.4f}" in text for value in scores[f"{name}_per_class"])
    assert all(image["name"] in text for image in scores["images"])
    for word in ("--filters", "--eval-every", "TensorFlow", "device", "255 in masks", "Best by Dice", "Worst by Dice"):
        assert word in text
    config = json.loads((crossval_folder / "fold0" / "config.json").read_text())
    assert config["environment"]["tensorflow"] in text and config["environment"]["device"] in text


def test_what_a_crossval_page_says(pages, crossval_folder):
    scores = json.loads((crossval_folder / "metrics.json").read_text())["scores"]
    text = Elements(pages["crossval"]).text
    for name in ("dice", "soft_dice", "hd95"):
        assert f"{scores[name]['mean']:.4f} ± {scores[name]['sd']:.4f}" in text
        assert all(f"{value:.4f}" in text for value in scores[name]["per_fold"])
    assert f"{scores['dice_per_class']['mean'][1]:.4f} ± {scores['dice_per_class']['sd'][1]:.4f}" in text
    assert "Fold 1: classes and curves" in text and "All 8 validation images" in text
    assert "--fold " not in text


def test_pictures_are_what_they_are_called(pages, crossval_folder, stacks):
    """The layers of the worst image: colours of the truth, of the prediction, and of the truth where they differ."""
    page = Elements(pages["run"])
    worst = json.loads((crossval_folder / "fold0" / "metrics.json").read_text())["images"]
    worst = min(worst, key=lambda image: np.mean(image["dice_per_class"]))
    images = page.all("img")
    first = next(i for i, image in enumerate(images) if image["alt"] == worst["name"])
    grey, truth, predicted, errors = (_decoded(image["src"]) for image in images[first : first + 4])
    assert [image.get("class") for image in images[first + 1 : first + 4]] == [
        "layer truth",
        "layer prediction",
        "layer errors",
    ]
    stem, page_number = worst["name"].rsplit("_", 1)
    pixels, mask = (tifffile.imread(stacks / name / f"{stem}.tif")[int(page_number)] for name in ("images", "masks"))
    assert np.abs(grey[..., 0].astype(int) - pixels).mean() < 8
    colours = np.array([[0xD1, 0x49, 0x5B], [0x2A, 0x9D, 0x8F]])
    np.testing.assert_array_equal(truth[..., :3], colours[(mask == 255).astype(int)])
    wrong = errors[..., 3] > 0
    assert (truth[..., 3] == 255).all() and (predicted[..., 3] == 255).all()
    np.testing.assert_array_equal((truth[..., :3] != predicted[..., :3]).any(-1), wrong)
    np.testing.assert_array_equal(errors[wrong], truth[wrong])


def _decoded(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))).convert("RGBA"))


def test_a_run_whose_data_are_gone(crossval_folder, stacks, tmp_path):
    run = shutil.copytree(crossval_folder / "fold0", tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": str(tmp_path / "gone")}))
    assert report_page.write_report(run) == run / "report.html"
    page = Elements(run / "report.html")
    assert "The images are left out" in page.text and str(tmp_path / "gone") in page.text and not page.all("img")
    report_page.write_report(run, data=str(stacks), images=1)
    assert len(Elements(run / "report.html").all("img")) == 8, "renewed"


def test_a_run_that_has_not_finished(crossval_folder, tmp_path):
    run = shutil.copytree(crossval_folder / "fold0", tmp_path / "run")
    scores = json.loads((run / "metrics.json").read_text())
    per_image = (
        "images",
        "hd95",
        "nsd",
        "hd95_per_class",
        "nsd_per_class",
        "adapted_rand_error",
        "voi_split",
        "voi_merge",
    )
    (run / "metrics.json").write_text(json.dumps({key: scores[key] for key in scores if key not in per_image}))
    report_page.write_report(run)
    text = Elements(run / "report.html").text
    assert "Training has not finished: step 6 of 6" in text and f"{scores['dice']:.4f}" in text
    for name in ("metrics.json", "history.csv"):
        (run / name).unlink()
    with pytest.raises(UserError, match="has no results yet"):
        report_page.write_report(run)


def test_mistakes(crossval_folder, tmp_path, capsys):
    there = tmp_path / "there.html"
    there.write_text("precious")
    for arguments, message in (
        (["--run", str(tmp_path / "none")], "expected the folder of a run, found no such folder"),
        (["--run", str(crossval_folder), "--images", "-1"], "expected --images to be at least 0, got -1"),
        (["--run", str(crossval_folder / "fold0"), "--output", str(there)], "the file exists already"),
        (["--run", str(crossval_folder / "fold0"), "--output", str(tmp_path / "no" / "a.html")], "cannot write there"),
    ):
        assert main(["report", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert there.read_text() == "precious"


def test_the_template_is_installed(tmp_path):
    """As part of the package, by what `pip install` runs, less the compiler."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    build = [sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env=environment)
    installed = {file.name for file in (tmp_path / "lib" / "unet_fast" / "templates").iterdir()}
    assert (
        installed
        == {file.name for file in (ROOT / "unet_fast" / "templates").iterdir()}
        >= {"report.html", "report.js"}
    )


# In a browser.

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("needs Chromium and its chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser, page, size, scheme="light"):
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    if folder := os.environ.get("UNET_FAST_SCREENSHOTS"):  # for those who want to look
        content = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (Path(folder) / f"{page.stem}-{size}-{scheme}.png").write_bytes(base64.b64decode(content["data"]))


def shown(browser):
    """Which layers of the first picture are seen."""
    return browser.execute_script("""
        const layers = document.querySelector(".picture").querySelectorAll(".layer");
        return [...layers].filter((l) => l.checkVisibility() && l.naturalWidth > 0).map((l) => l.classList[1]);""")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["run", "crossval"])
def test_a_browser_shows_it(browser, pages, kind, size):
    browser.get_log("performance")
    opened(browser, pages[kind], size)
    for details in browser.find_elements("tag name", "details"):
        details.find_element("tag name", "summary").click()
    assert browser.get_log("browser") == []
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("data:")} == {pages[kind].as_uri()}
    width = browser.execute_script("return document.documentElement.scrollWidth")
    assert width <= SIZES[size][0], "the page scrolls sideways"
    broken = "return [...document.images].filter((i) => !i.complete || i.naturalWidth == 0).length"
    assert browser.execute_script(broken) == 0
    small = browser.execute_script("""
        return [...document.querySelectorAll(".chart > svg text")].map((t) => t.getBoundingClientRect().height)""")
    assert min(small) > 10, "texts of charts can be read"


@pytest.mark.parametrize("size", SIZES)
def test_what_is_shown_on_the_images_can_be_chosen(browser, pages, size):
    from selenium.webdriver.common.keys import Keys

    opened(browser, pages["run"], size)
    assert shown(browser) == ["prediction"]
    before = _pixels(browser)
    for view, layers in (("truth", ["truth"]), ("errors", ["errors"]), ("image", [])):
        browser.find_element("css selector", f"label:has(#view-{view})").click()
        assert shown(browser) == layers
        after = _pixels(browser)
        assert (before != after).any()
        before = after
    # By the keyboard: the choice is one stop of the tab key, and arrows go through it.
    chosen = browser.switch_to.active_element
    assert chosen.get_attribute("id") == "view-image"
    for view in ("truth", "prediction", "errors"):
        browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
        assert shown(browser) == [view]
    browser.switch_to.active_element.send_keys(Keys.TAB)
    slider = browser.switch_to.active_element
    assert slider.get_attribute("id") == "strength"

    def opacity():
        return float(browser.execute_script("return getComputedStyle(document.querySelector('.errors')).opacity"))

    assert opacity() == pytest.approx(0.55)
    slider.send_keys(Keys.END)
    assert opacity() == 1
    slider.send_keys(Keys.HOME)
    assert opacity() == 0


def _pixels(browser):
    picture = browser.find_element("class name", "picture")
    return np.asarray(Image.open(io.BytesIO(picture.screenshot_as_png)).convert("RGB"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["run", "crossval"])
def test_texts_stand_out(browser, pages, kind, scheme):
    """A contrast of 4.5 to 1 at least, WCAG 2's level AA, of every text to what is behind it."""
    opened(browser, pages[kind], "desktop", scheme)
    found = browser.execute_script("""
        const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
        const behind = (e) => {
          for (; e; e = e.parentElement) {
            const colour = numbers(getComputedStyle(e).backgroundColor);
            if (colour.length < 4 || colour[3] > 0) return colour;
          }
        };
        document.querySelectorAll("details").forEach((d) => (d.open = true));
        const texts = [...document.querySelectorAll("body *")].filter((e) => e.tagName != "SCRIPT" &&
          [...e.childNodes].some((n) => n.nodeType == 3 && n.textContent.trim()) && e.checkVisibility());
        return texts.map((e) => {
          const style = getComputedStyle(e);
          return [e.textContent.trim(), numbers(e.closest("svg") ? style.fill : style.color), behind(e)];
        });""")
    assert len(found) > 60

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(colour[:3]) / 255]
        return np.dot(linear, [0.2126, 0.7152, 0.0722])

    for text, colour, back in found:
        low, high = sorted((luminance(colour), luminance(back)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, colour, back)
    assert (luminance(found[0][2]) < 0.1) == (scheme == "dark")


def test_every_control_has_a_name(browser, pages):
    opened(browser, pages["crossval"], "phone")
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    roles = {}
    for node in tree:
        if not node.get("ignored"):
            roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert roles["radio"] == ["Image", "Truth", "Prediction", "Errors"]
    assert re.match("Colours", roles["slider"][0])
    for role in ("image", "region", "DisclosureTriangle", "heading", "link", "button"):
        assert all(roles.get(role, [])), role
    assert any(name.startswith("Prediction: class 0") for name in roles["image"]), "what is shown on an image is told"
