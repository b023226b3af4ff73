"""The Space: the page in Chromium."""

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from chromium import start_chromium
from deep_colour import rgb16_png
from dicom_files import write_slice
from PIL import Image
from space_server import SpaceServer

from probabilistic_sam.errors import UserError
from probabilistic_sam.hub import space
from probabilistic_sam.images import load_slice
from probabilistic_sam.inference import load_model

ROOT = Path(__file__).resolve().parent.parent
PAGE, MODEL = ROOT / "model_cards" / "psam-lidc-space", ROOT / "model_cards" / "psam-lidc"
PHANTOM = space.PACKAGE_DATA / "examples" / "phantom-1.png"
BOX = [53.1, 51.8, 76.5, 75.1]
POINTS = {"points": [[64, 63], [70, 68], [50, 50], [10, 10]], "labels": [1, 1, 0, 0]}  # the last is outside the window


@pytest.fixture(scope="module")
def shipped():
    """The model of the page and its processor."""
    return load_model(MODEL)


@pytest.fixture(scope="module")
def page(request, tmp_path_factory):
    """The staged Space and the shipped model in Chromium, without a network outside this machine."""
    folder = tmp_path_factory.mktemp("space")
    several = {"profile.default_content_setting_values.automatic_downloads": 1}
    driver = start_chromium(folder, "browser", width=1280, preferences=several)
    try:
        try:
            space.stage_space(PAGE, folder / "staged", "org/psam-lidc")
        except UserError as error:
            if "the npm packages cannot be fetched" not in str(error):
                raise  # a package of another hash or without a file
            pytest.skip(f"needs npm and its registry: {error}")
        (folder / "more").mkdir()
        exported = request.getfixturevalue("exported")
        with SpaceServer(folder / "more", folder / "staged", exported) as server:
            driver.set_script_timeout(100)
            yield Page(driver, server, folder)
    finally:
        driver.quit()


class Page:
    """Actions of a visitor."""

    def __init__(self, driver, server, folder):
        self.driver, self.server, self.folder, self.downloads = driver, server, folder, folder / "downloads"
        self.reload()

    def reload(self):
        self.driver.get(self.server.url)
        self.until(lambda: self.words("position").startswith("Box"))

    def until(self, question, seconds=100):
        end = time.monotonic() + seconds
        while not (answer := question()):
            assert time.monotonic() < end, f"not in time: {self.words('status')} {self.words('error')}"
            time.sleep(0.05)
        return answer

    def find(self, name):
        return self.driver.find_element("id", name)

    def words(self, name):
        return self.find(name).get_attribute("textContent")

    def run(self, code, *arguments):
        """Value of an expression of JavaScript; a promise is awaited, an error becomes its message."""
        code = f"""const [...a] = arguments, done = a.pop();
            (async () => ({code}))().then(done, (error) => done("error: " + error.message));"""
        return self.driver.execute_async_script(code, *arguments)

    def open(self, content, name):
        """Open a file; returns its error, or an empty text after the name of the image is shown."""
        path = content if isinstance(content, Path) else self.folder / name
        if path is not content:
            path.write_bytes(content)
        self.driver.execute_script("document.getElementById('name').textContent = ''")
        self.find("file").send_keys(str(path))
        self.until(lambda: self.words("error") or self.words("name"))
        return self.words("error")

    def sample(self, **arguments):
        """`psam.sample` with masks, mean and entropy at the size of the phantoms."""
        lists = "r => ({...r, masks: r.masks.map(m => [...m]), mean: [...r.mean]})"
        result = self.run(f"await psam.sample(a[0]).then({lists})", arguments)
        assert isinstance(result, dict), result
        region = result["region"]
        rows = slice(region["top"], region["top"] + region["height"])
        columns = slice(region["left"], region["left"] + region["width"])
        masks, mean = np.zeros((len(result["masks"]), 128, 128), bool), np.zeros((128, 128))
        masks[:, rows, columns] = np.reshape(result["masks"], (-1, region["height"], region["width"]))
        mean[rows, columns] = np.reshape(result["mean"], (region["height"], region["width"]))
        return SimpleNamespace(**result | {"masks": masks, "mean": mean})


@torch.no_grad()
def in_pytorch(model, processor, noise, box=None, points=None, labels=None):
    """Masks, mean, presence and areas given presence for a prompt of the first phantom and noise (S, L)."""
    prompt = {"input_boxes": [[box]]} if box else {"input_points": [[points]], "input_labels": [[labels]]}
    inputs = processor(images=PHANTOM, **prompt)
    windows, sizes = inputs.pop("windows"), inputs.pop("original_sizes")
    prior = model(**inputs)
    latents = prior.prior_mean[:, :, None] + prior.prior_log_std.exp()[:, :, None] * torch.from_numpy(noise)
    output = model(**inputs, latents=latents)
    given = {"outline_masks": output.outline_masks, "presence": output.presence}
    (result,) = processor.post_process_samples(output.pred_masks, windows, sizes, **given)
    arrays = {name: result[name].numpy() for name in ("masks", "mean", "areas_given_presence")}
    return SimpleNamespace(**arrays, presence=result["presence"])


def noise_of(samples, size):
    noise = np.random.default_rng(0).normal(size=(samples, size)).astype(np.float32)
    noise[0, 0], noise[1, 0] = -5, 5  # an empty sample, and one that is not
    return noise


def overlap(a, b):
    """IoU of each pair of masks (S, H, W), 1 for two empty ones."""
    union = (a | b).sum((1, 2))
    return np.where(union, (a & b).sum((1, 2)) / np.maximum(union, 1), 1.0)


@pytest.mark.slow
def test_page_is_isolated_and_labelled(page):
    assert page.run("[crossOriginIsolated, document.getElementById('error').hidden]") == [True, True]
    unlabelled = """[...document.querySelectorAll('button, input, canvas, select')].filter(e => !e.hidden &&
        !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.id)"""
    assert [name for name in page.run(unlabelled) if name not in ("mean", "entropy")] == []
    assert "severe" not in str(page.driver.get_log("browser")).lower()


def check_masks(page, model, processor, **prompt):
    """The page's samples for given noise are PyTorch's."""
    noise = noise_of(6, model.config.latent_dim)
    expected = in_pytorch(model, processor, noise, **prompt)
    result = page.sample(**prompt, noise=noise.tolist())
    assert overlap(result.masks, expected.masks).min() >= 0.99
    assert expected.masks[1].any() and not expected.masks[0].any() and result.areasGivenPresence[0] > 0
    assert result.areas == result.masks.sum((1, 2)).tolist()
    assert result.areasGivenPresence == pytest.approx(expected.areas_given_presence, rel=0.01, abs=1)
    pairs = zip(result.areas, result.areasGivenPresence, strict=True)
    assert all(area == if_present for area, if_present in pairs if area)
    assert np.abs(result.mean - expected.mean).max() < 1e-3
    assert result.presence == pytest.approx(expected.presence, abs=1e-3)
    assert result.device.startswith("WebAssembly, ")  # headless Chromium has no WebGPU adapter


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [{"box": BOX}, POINTS, {"box": [1, 2, 30.5, 20.25]}])
def test_masks_equal_pytorchs_for_the_same_noise(page, shipped, prompt):
    check_masks(page, *shipped, **prompt)


@pytest.mark.slow
def test_areas_given_presence_are_of_outlines_unless_presence_is_below_one_percent(page):
    summarise = """(await import('./processing.js')).summarise(
        [[-30, -30, -30, -30], [5, 5, -5, -5]], [[5, 5, 5, 5], [5, 5, -5, -5]], a[0],
        {x: 0, y: 0, side: 2}, {width: 2, height: 2})"""
    often, rarely = (page.run(summarise, presence) for presence in (0.01, 0.0099))
    assert often["areas"] == rarely["areas"] == [0, 2]
    assert often["areasGivenPresence"] == [4, 2] and rarely["areasGivenPresence"] == []


@pytest.mark.slow
def test_same_seed_gives_same_masks_and_evenly_spread_noise(page):
    noise = page.run("[...(await import('./processing.js')).spreadNoise(200, 9, 7)]")
    ordered = np.sort(np.reshape(noise, (200, 9)), axis=0)
    levels = torch.special.ndtr(torch.from_numpy(ordered)) * 200
    assert (levels.floor() == torch.arange(200)[:, None]).all()  # one sample per interval, in each coordinate
    first, again, other = (page.sample(box=BOX, numSamples=2, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.masks, again.masks) and first.areasGivenPresence == again.areasGivenPresence
    assert first.areasGivenPresence != other.areasGivenPresence


@pytest.mark.slow
def test_visitor_samples_and_saves(page):
    for name, value in {"count": "3", "spacing": "0.5"}.items():
        page.driver.execute_script("document.getElementById(arguments[0]).value = arguments[1]", name, value)
    page.find("sample").click()
    page.until(lambda: "3 samples in" in page.words("status"))
    assert page.find("results").is_displayed() and page.find("error").get_attribute("hidden")
    tiles = page.find("gallery").find_elements("tag name", "button")
    labels = [tile.get_attribute("aria-label") for tile in tiles]
    for name in ("save-masks", "save-mean", "save-json"):
        page.find(name).click()
    names = ("sample-00.png", "sample-01.png", "sample-02.png", "mean.png", "result.json")
    page.until(lambda: all((page.downloads / name).is_file() for name in names))
    numbers = json.loads((page.downloads / "result.json").read_text())
    *masks, mean = (np.asarray(Image.open(page.downloads / name)) for name in names[:-1])
    areas = [int((mask > 0).sum()) for mask in masks]
    assert [set(np.unique(mask)) <= {0, 255} and mask.shape for mask in masks] == [(128, 128)] * 3
    assert numbers["area_px"]["samples"] == areas and numbers["area_mm2"]["samples"] == [area / 4 for area in areas]
    assert numbers["prompt"] == {"box": BOX} and numbers["model"] == "org/psam-lidc" and numbers["seed"] == 0
    given_presence = numbers["area_px_given_presence"]
    quantiles = np.quantile(given_presence["samples"], [0.05, 0.25, 0.5, 0.75, 0.95])
    assert list(given_presence["quantiles"].values()) == pytest.approx(quantiles, abs=1e-3)
    assert mean.shape == (128, 128) and mean.max() > 255  # 16 bits
    assert [label.split(": ")[1].split()[0] for label in labels] == [
        "empty" if not area else f"{area / 4:.{0 if area >= 400 else 1}f}" for area in areas
    ]


@pytest.mark.slow
def test_prompt_by_keyboard(page):
    page.driver.find_element("css selector", "#examples button").click()
    page.until(lambda: page.words("position").startswith("Box"))
    page.find("clear").click()
    from selenium.webdriver.common.keys import Keys

    canvas = page.find("canvas")
    canvas.send_keys(Keys.ARROW_RIGHT)  # the cursor appears beside the centre
    assert page.words("position") == "Cursor 65, 64"
    canvas.send_keys(Keys.ENTER, Keys.SHIFT + Keys.ARROW_RIGHT + Keys.ARROW_DOWN + Keys.NULL, Keys.ENTER)
    assert page.words("position") == "Box 65.0, 64.0, 75.0, 74.0"
    canvas.send_keys(Keys.ESCAPE)
    assert page.words("position") == "No prompt"
    page.find("sample").click()
    page.until(lambda: page.words("error"))
    assert page.words("error") == "no prompt yet; accepted: a box, or at least one point inside the lesion"


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""
    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + b"IHDR" + header + bytes(4) + bytes(4) + b"IDAT" + bytes(4)


@pytest.mark.slow
def test_broken_and_huge_files_are_one_line(page):
    huge = page.folder / "huge.png"
    with huge.open("wb") as file:
        file.truncate(65 * 2**20)
    jpeg = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(jpeg, "JPEG")
    dicom = b"\0" * 128 + b"DICM" + b"junk" * 40
    turned, exif = io.BytesIO(), Image.Exif()
    exif[0x112] = 6  # turned by a quarter
    Image.effect_noise((64, 64), 90).save(turned, "PNG", exif=exif)
    expected = {
        "text.png": (b"hello", "is not an image of a known kind"),
        "cut.png": (PHANTOM.read_bytes()[:4000], "is a (damaged|truncated) PNG"),
        "cut.jpg": (jpeg.getvalue()[:200], "is a (damaged|truncated) JPEG"),
        "half.jpg": (jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "is a truncated JPEG"),
        "cut.dcm": (dicom, "is DICOM that is not read: "),
        "wide.png": (png_header(2**31, 2), "has 2147483648 x 2 pixels"),
        "empty.png": (png_header(4096, 4096), "is a (damaged|truncated) PNG"),
        "huge.png": (huge, "has 65 MB"),
        "turned.png": (turned.getvalue(), "is turned or mirrored by its EXIF orientation"),
        "deep.png": (rgb16_png(), "has more than 8 bits per channel in colour or with transparency"),
    }
    for name, (content, problem) in expected.items():
        message = page.open(content, name)
        assert message.startswith(f"{name} ") and message.endswith("at most 64 MB and 16 million pixels"), message
        assert "\n" not in message and re.search(problem, message), message
    assert page.open(PHANTOM, PHANTOM.name) == ""


@pytest.mark.slow
def test_grey_values_are_those_of_the_package(page, tmp_path):
    gdcm = pytest.importorskip("gdcm", reason="writes compressed DICOM, extra [dicom-jpeg]")
    random = np.random.default_rng(0)
    paths = [tmp_path / name for name in ("16.png", "colour.png", "palette.png")]
    Image.fromarray(random.integers(0, 65535, (33, 47)).astype(np.uint16)).save(paths[0])
    Image.fromarray(random.integers(0, 255, (33, 47, 3), dtype=np.uint8)).save(paths[1])
    Image.open(paths[1]).convert("P").save(paths[2])
    hu = random.integers(-1000, 1000, (33, 47))
    paths.append(write_slice(tmp_path / "plain.dcm", hu, "1.2", 0.0, "1.3", PixelSpacing=[0.5, 0.5]))
    for name in ("RLELossless", "JPEGLosslessProcess14_1", "JPEGLSLossless", "JPEG2000Lossless"):
        reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
        reader.SetFileName(str(paths[3]))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
        change.SetInput(reader.GetImage())
        assert change.Change()
        paths.append(tmp_path / f"{name}.dcm")
        writer.SetFileName(str(paths[-1]))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    for path in paths:
        read = """await import('./images.js').then(({readImage}) => readImage(new File(
            [Uint8Array.from(atob(a[0]), c => c.charCodeAt(0))], 'x'))).then(i => ({...i, data: [...i.data]}))"""
        image = page.run(read, base64.b64encode(path.read_bytes()).decode())
        expected, spacing = load_slice(path)
        assert isinstance(image, dict), (path.name, image)
        shape = (image["channels"], image["height"], image["width"])
        values = np.moveaxis(np.reshape(image["data"], shape), 0, -1)
        if path.name == "palette.png":
            expected = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(values, expected.reshape(values.shape)), path.name
        assert image["spacing"] == spacing


@pytest.mark.slow
def test_nothing_is_sent_elsewhere(page):
    """Neither the page nor a worker may contact another origin. A worker from a URL would not obey the policy."""
    with SpaceServer(page.folder / "more") as elsewhere:
        (page.folder / "more" / "probe.js").write_text(
            f"fetch('{elsewhere.url}/x', {{mode: 'no-cors'}}).then(() => 'sent', () => 'refused').then(postMessage);"
        )
        fetched = page.run(
            f"await fetch('{elsewhere.url}/x', {{mode: 'no-cors'}}).then(() => 'sent', () => 'refused')"
        )
        probe = """await import('./images.js').then(({startWorker}) => new Promise(resolve => {
            startWorker(new URL('./probe.js', location.href), 'module').onmessage = ({data}) => resolve(data); }))"""
        assert (fetched, page.run(probe), elsewhere.requests) == ("refused", "refused", [])


@pytest.mark.slow
def test_cancelled_sampling_leaves_the_page_ready(page):
    page.driver.find_element("css selector", "#examples button").click()
    page.until(lambda: page.words("position").startswith("Box"))
    click = "document.getElementById('%s').click()"
    page.driver.execute_script("document.getElementById('count').value = 64")
    page.run(f"({click % 'sample'}, await new Promise(setTimeout), {click % 'cancel'})")
    page.until(lambda: page.words("status") == "Cancelled")
    assert page.words("error") == "" and not page.find("results").is_displayed() and page.find("sample").is_enabled()
    assert page.sample(box=BOX, numSamples=1).masks.shape == (1, 128, 128)


@pytest.mark.slow
def test_a_hard_reload_samples_without_the_service_worker(page):
    page.driver.execute_cdp_cmd("Page.reload", {"ignoreCache": True})
    page.until(lambda: page.run("document.readyState") == "complete" and page.words("position").startswith("Box"))
    assert page.run("navigator.serviceWorker.controller") is None
    assert page.sample(box=BOX, numSamples=1).masks.shape == (1, 128, 128)
    page.reload()
    assert page.run("navigator.serviceWorker.controller !== null")


@pytest.mark.slow
def test_an_image_of_the_visitor_is_not_replaced_by_an_example_that_arrives_later(page):
    late = """const asked = fetch; window.fetch = async (...given) => {
        await new Promise((resolve) => setTimeout(resolve, 500)); return asked(...given); };"""
    page.driver.execute_script(late)
    page.driver.execute_script("document.querySelector('#examples button').click()")
    assert page.open(PHANTOM, PHANTOM.name) == ""
    mine = page.words("name")
    time.sleep(1)
    assert page.words("name") == mine and page.words("position") == "No prompt"
    # Of two examples the one that was chosen last, although the first arrives later
    slow_first = """const asked = window.fetch; let number = 0; window.fetch = async (...given) => {
        await new Promise((resolve) => setTimeout(resolve, number++ ? 0 : 700)); return asked(...given); };"""
    page.driver.execute_script(slow_first)
    page.driver.execute_script("document.querySelectorAll('#examples button').forEach((one) => one.click())")
    page.until(lambda: page.words("name").startswith("phantom-3"))
    time.sleep(1.5)
    assert page.words("name").startswith("phantom-3")
    page.reload()


@pytest.mark.slow
def test_another_model_replaces_the_kept_one_and_samples_offline(page, shipped, exported):
    """Graphs with int8 weights take the place of those in float32. Runs last because it stops the server."""
    other = page.folder / "other"
    (other / "onnx").mkdir(parents=True)
    for graph in ("vision_encoder", "box_decoder"):
        shutil.copyfile(exported / "onnx" / f"{graph}_quantized.onnx", other / "onnx" / f"{graph}.onnx")
    full = page.sample(box=BOX, numSamples=2)
    page.server.folders = (page.folder / "more", other, *page.server.folders)
    page.reload()
    int8 = page.sample(box=BOX, numSamples=2)
    assert int8.presence != full.presence and int8.presence == pytest.approx(full.presence, abs=0.05)
    page.server.shutdown()
    page.server.server_close()
    page.reload()
    offline = page.sample(box=BOX, numSamples=2)
    assert offline.presence == int8.presence and np.array_equal(offline.masks, int8.masks)
