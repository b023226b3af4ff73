"""The endpoint handler behind a loopback server: clients, hostile requests, concurrent requests."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import tomllib
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from conftest import ROOT
from endpoint_server import EndpointServer, load_handler
from PIL import Image
from test_cli import png_header
from test_pipeline_probabilistic_sam import BOX, OTHER_BOX, POINTS, TASK, expressive_model, make_image
from tiny import SIZE
from transformers import pipeline

from probabilistic_sam import ProbabilisticSamProcessor

HUB = ROOT / "probabilistic_sam" / "hub"


def file_of(image, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format=kind)
    return file.getvalue()


def encoded(content):
    return base64.b64encode(content).decode()


def decoded(mask):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(mask))))


def post(url, body, kind="application/json"):
    """POST a body; return the status and the answer."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture(scope="module")
def pipe():
    return pipeline(TASK, model=expressive_model(), processor=ProbabilisticSamProcessor(SIZE, 24), device="cpu")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "psam-lidc"
    pipe.save_pretrained(folder)
    shutil.copy(HUB / "handler.py", folder)
    return folder


@pytest.fixture(scope="module")
def url(folder):
    with EndpointServer(load_handler(folder)) as server:
        yield server.url


@pytest.fixture
def client(url, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the server is on loopback
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return huggingface_hub.InferenceClient(model=url, token="hf_test")


REQUEST = {"inputs": encoded(file_of(make_image())), "parameters": {"boxes": [BOX], "num_samples": 6, "seed": 3}}


def answers_well(url):
    status, answer = post(url, REQUEST)
    return status == 200 and [item["label"] for item in answer] == ["mean", "uncertainty"] + [
        f"sample {index}" for index in range(6)
    ]


# ---------------------------------------------------------------------------------------------------------- answers


def test_answer_equals_the_output_of_the_pipeline(url, pipe):
    parameters = {"boxes": [BOX, OTHER_BOX], "num_samples": 6, "seed": 3, "threshold": 0.4, "pixel_spacing_mm": 0.5}
    status, answer = post(url, {"inputs": REQUEST["inputs"], "parameters": parameters})
    assert status == 200 and len(answer) == 2 * (2 + 6)
    for prompt, expected in enumerate(pipe(make_image(), **parameters)):
        mean, uncertainty, *samples = answer[8 * prompt : 8 * prompt + 8]
        assert (mean["label"], uncertainty["label"]) == ("mean", "uncertainty")
        assert {item["prompt"] for item in (mean, uncertainty, *samples)} == {prompt}
        assert np.abs(decoded(mean["mask"]) / 255 - expected["mean"]).max() <= 0.5 / 255 + 1e-6
        assert np.abs(decoded(uncertainty["mask"]) / 255 - expected["uncertainty"]).max() <= 0.5 / 255 + 1e-6
        assert mean["areas"] == expected["areas"].tolist() and mean["area_unit"] == "mm2"
        assert mean["area_quantiles"] == expected["area_quantiles"]
        assert mean["score"] == 1 - expected["empty_share"] and mean["presence"] == expected["presence"]
        assert mean["areas_given_presence"] == expected["areas_given_presence"].tolist()
        assert mean["area_quantiles_given_presence"] == expected["area_quantiles_given_presence"]
        for index, (sample, mask) in enumerate(zip(samples, expected["masks"], strict=True)):
            assert (sample["label"], sample["score"]) == (f"sample {index}", 1 / 6)
            assert np.array_equal(decoded(sample["mask"]), np.where(mask, 255, 0))
            assert sample["area"] == pytest.approx(mask.sum() / 4)


def test_all_forms_of_an_image_give_the_same_answer(url):
    content = file_of(make_image())
    # Without parameters, so the prompt is the centre
    bodies = (
        (content, "image/png"), (content, "application/octet-stream"), ({"inputs": encoded(content)},),
        ({"inputs": "data:image/png;base64," + encoded(content), "parameters": None},),
        ({"inputs": encoded(content), "parameters": {"points": [[30, 24]], "num_samples": 16, "seed": 0}},),
        ({"inputs": encoded(content), "parameters": {"points": [[[30, 24]]], "labels": [[1]]}},),
    )  # fmt: skip
    answers = [post(url, *body) for body in bodies]
    assert all(answer == answers[0] for answer in answers) and answers[0][0] == 200


def test_parameters_next_to_inputs_are_used(url):
    """A prompt outside of `parameters` must not be replaced by the centre of the image."""
    expected = post(url, REQUEST)
    inputs, parameters = REQUEST["inputs"], REQUEST["parameters"]
    assert expected[0] == 200
    for body in (
        {"inputs": inputs, **parameters},
        {"inputs": inputs, "parameters": {"seed": 3, "num_samples": 6}, "boxes": [BOX]},
        {"inputs": inputs, "parameters": parameters, "seed": 3, "threshold": None},
        {"inputs": inputs, "parameters": {**parameters, "threshold": 0.5, "mask_threshold": 0.5}},
        {"inputs": inputs, "mask_threshold": 0.5, **parameters},
        {"inputs": inputs, "parameters": {**parameters, "boxes": [[BOX]]}},  # SAM's nesting
    ):
        assert post(url, body) == expected
    flat = with_parameters(points=[20, 20], num_samples=3)
    assert post(url, flat) == post(url, with_parameters(points=[[[20, 20]]], labels=[[1]], num_samples=3))
    for points in ([POINTS] * 2, [[POINTS] * 2]):
        status, answer = post(url, with_parameters(points=points, num_samples=501))
        assert status == 400 and "each of 2 prompts" in answer["error"]


def test_handler_accepts_bytes_base64_and_pil_images(folder):
    handler = load_handler(folder)
    content = file_of(make_image())
    forms = (content, encoded(content), {"inputs": Image.open(io.BytesIO(content)), "parameters": {}})
    answers = [handler(form) for form in forms]
    assert answers[0] == answers[1] == answers[2]
    deep = handler({"inputs": encoded(file_of(make_image().astype(np.uint16) * 200))})
    assert np.array_equal(decoded(deep[0]["mask"]), decoded(answers[0][0]["mask"]))  # grey values are stretched


def test_inference_client_reads_the_answer(client, tmp_path):
    path = tmp_path / "slice.png"
    path.write_bytes(file_of(make_image()))
    items = client.image_segmentation(path)  # binary
    assert [item.label for item in items] == ["mean", "uncertainty", *(f"sample {index}" for index in range(16))]
    assert all(item.mask.size == (60, 48) and item.mask.mode == "L" for item in items)
    assert items[0].score == 1 - items[0]["empty_share"] and items[1].score is None and items[2].score == 1 / 16
    masks = np.stack([np.asarray(item.mask) for item in items[2:]])
    assert set(np.unique(masks)) == {0, 255}
    wider = client.image_segmentation(str(path), mask_threshold=0.1)  # JSON
    assert [item.label for item in wider] == [item.label for item in items]
    assert (np.stack([np.asarray(item.mask) for item in wider[2:]]) >= masks).all()
    assert wider[0]["areas"] != items[0]["areas"]


def test_inference_client_gets_the_error_message(client, tmp_path):
    (tmp_path / "slice.png").write_bytes(file_of(make_image()))
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as caught:
        client.image_segmentation(tmp_path / "slice.png", subtask="semantic")
    assert caught.value.response.status_code == 400
    assert caught.value.response.json()["error"].startswith("unknown parameter subtask; accepted: boxes, points")


# -------------------------------------------------------------------------------------------------- hostile requests


def with_parameters(**parameters):
    return {"inputs": REQUEST["inputs"], "parameters": parameters}


NESTED: list = []
for _ in range(50):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the input is not an image; accepted: PNG, JPEG"),
        (b"hello", "the input is not an image; accepted: PNG, JPEG"),
        (file_of(make_image())[:-200], "the input cannot be read"),
        (png_header(20_000, 20_000), "20000 x 20000|too large"),
        (png_header(20_000, 900), "the input has 20000 x 900 pixels; accepted: .* at most 8 million pixels"),
        ({"inputs": encoded(png_header(20_000, 20_000))}, "20000 x 20000|too large"),
        ({}, 'the request has no "inputs", only nothing'),
        ({"image": REQUEST["inputs"]}, 'the request has no "inputs", only image; accepted: {"inputs"'),
        ({"inputs": REQUEST["inputs"], "box": BOX}, "unknown key box; accepted: inputs, parameters, boxes, points"),
        ({"inputs": REQUEST["inputs"], "options": {}}, "unknown key options; accepted"),
        ({"inputs": REQUEST["inputs"], "x" * 10**5: 1}, "unknown key x{80}; accepted"),
        ({"inputs": REQUEST["inputs"], "seed": 3, "parameters": {"seed": 4}}, "seed is given twice"),
        (with_parameters(threshold=0.4, mask_threshold=0.5), "threshold and mask_threshold are given with different"),
        (with_parameters(seed="x" * 10**5), r"seed is 'x{1,80}.{1,80}; accepted: a whole"),
        ({"inputs": {"image": "x"}}, "inputs are of type dict; accepted: an image file"),
        ({"inputs": 5}, "inputs are of type int"),
        ([1, 2], "inputs are of type list"),
        ({"inputs": "/etc/passwd"}, "the input is not an image|the input is not valid base64"),
        ({"inputs": "http://127.0.0.1/slice.png"}, "the input is a URL, which is not fetched"),
        ({"inputs": REQUEST["inputs"], "parameters": [1]}, "parameters are of type list; accepted: boxes"),
        (with_parameters(box=BOX), "unknown parameter box; accepted: boxes"),
        (with_parameters(boxes=[BOX], num_samples=10**6), "num_samples is 1000000; accepted: a whole number from 1"),
        (with_parameters(num_samples=0), "num_samples is 0"),
        (with_parameters(num_samples=True), "num_samples is True"),
        (with_parameters(num_samples="16"), "num_samples is '16'"),
        (with_parameters(boxes=[BOX, BOX], num_samples=501), "501 samples for each of 2 prompts .* at most 500"),
        (with_parameters(seed=-1), "seed is -1"),
        (with_parameters(seed=2**63), "seed is 9223372036854775808"),
        (with_parameters(threshold=1.5), "threshold is 1.5; accepted: a number between 0 and 1"),
        (with_parameters(threshold=float("nan")), "threshold is nan"),
        (with_parameters(pixel_spacing_mm=-1), "pixel_spacing_mm is -1"),
        (with_parameters(boxes=[[float("nan"), 1, 2, 3]]), "boxes contain nan; accepted: nested lists of finite"),
        (with_parameters(boxes=[[float("inf"), 1, 2, 3]]), "boxes contain inf"),
        (with_parameters(boxes=[[10**300, 1, 2, 3]]), "boxes contain 1000"),
        (with_parameters(boxes=[]), r"boxes contain \[\]"),
        (with_parameters(boxes=[[]] * 20_000), r"boxes contain \[\]"),
        (with_parameters(boxes=NESTED), r"boxes contain \[\["),
        (with_parameters(boxes="all"), "boxes contain 'all'"),
        (with_parameters(boxes=[[1, 2, 3]]), "a box must be four finite numbers"),
        (with_parameters(boxes=[30, 12, 10, 28]), "has no area"),
        (with_parameters(boxes=[10, 12, 61, 28]), "outside the image of 60 x 48"),
        (with_parameters(boxes=[BOX] * 20_000), "boxes have too many numbers; accepted: at most 10000"),
        (with_parameters(points=[[5, 60]]), "outside the image"),
        (with_parameters(points=POINTS, labels=[1]), "2 points need as many labels"),
        (with_parameters(boxes=[BOX], points=[POINTS, POINTS]), "different numbers of prompts"),
    ],
)
def test_bad_requests_get_a_message_and_the_next_one_an_answer(url, body, message):
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
    status, answer = post(url, body, kind)
    assert status == 400 and list(answer) == ["error"]
    assert "\n" not in answer["error"] and len(answer["error"]) < 600
    assert re.search(message, answer["error"])
    assert answers_well(url)


def test_memory_of_a_request_is_bounded(url):
    image = encoded(file_of(np.zeros((400, 500), np.uint8)))
    status, answer = post(url, {"inputs": image, "parameters": {"boxes": [BOX], "num_samples": 672}})
    assert status == 400 and "at most 671 for this request" in answer["error"]  # 2^27 / (400 * 500)


def test_eight_concurrent_requests_are_answered_as_one_by_one(url):
    requests = [
        {
            "inputs": encoded(file_of(make_image(index, 40 + index, 60))),
            "parameters": {"boxes": [BOX], "num_samples": 3 + index, "seed": index},
        }
        for index in range(7)
    ]
    requests.insert(3, {"inputs": "broken"})
    one_by_one = [post(url, request) for request in requests]
    assert [status for status, _ in one_by_one] == [200] * 3 + [400] + [200] * 4
    gate = threading.Barrier(len(requests))

    def wait_and_post(request):
        gate.wait()
        return post(url, request)

    with ThreadPoolExecutor(len(requests)) as pool:
        assert list(pool.map(wait_and_post, requests)) == one_by_one


def test_requests_are_answered_one_at_a_time(folder, monkeypatch):
    handler, running, most = load_handler(folder), [], []

    def slow_answer(inputs, parameters):
        running.append(inputs)
        time.sleep(0.05)  # long enough for the other requests to arrive
        most.append(len(running))
        running.remove(inputs)
        return []

    monkeypatch.setattr(handler, "answer", slow_answer)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(handler, ["a", "b", "c", "d"])) == [[]] * 4
    assert most == [1] * 4


# --------------------------------------------------------------------------------------------------------- the folder


def real_png(width, height):
    """A valid PNG of one grey value, 1000 times smaller than its pixels."""
    content = png_header(width, height)
    start = content.index(b"IDAT") - 4
    compressor = zlib.compressobj(9)
    rows = b"".join(compressor.compress(bytes(width + 1)) for _ in range(height)) + compressor.flush()
    chunk = b"IDAT" + rows
    head, tail = content[:start], content[-12:]
    return head + len(rows).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + tail


@pytest.mark.slow
def test_folder_works_without_the_package_and_a_decompression_bomb_uses_no_memory(folder, url, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("endpoint_server.py")), str(folder)]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            alone = process.stdout.readline().strip()
            assert post(alone, REQUEST) == post(url, REQUEST)

            def peak():
                with urllib.request.urlopen(alone, timeout=60) as response:
                    return json.load(response)

            before = peak()
            bomb = real_png(10_000, 10_000)  # 100 MB of pixels, for which PIL only warns
            assert len(bomb) < 200_000
            for body in (bomb, {"inputs": encoded(bomb)}):
                kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
                status, answer = post(alone, body, kind)
                assert status == 400 and "10000 x 10000 pixels" in answer["error"]
            assert peak() - before < 30  # MiB
            assert answers_well(alone)
        finally:
            process.terminate()


def test_requirements_match_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = (HUB / "requirements.txt").read_text().split()
    assert {line.split(">=")[0] for line in wanted} == {"numpy", "pillow", "torch", "transformers"}
    assert set(wanted) < set(project["dependencies"])
