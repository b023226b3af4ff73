"""Handler of a Hugging Face Inference Endpoint: takes an image and a prompt, returns sampled masks.

    for item in InferenceClient(model=url).image_segmentation("slice.png"):
        item.label, item.score, item.mask

samples masks for a point at the centre of the image. (To send bytes instead of a path, pass
`headers={"Content-Type": "image/png"}`, or the client sends them as JSON.) Other prompts are sent as JSON:

    {"inputs": base64 of the image file, "parameters": {"boxes": [[52, 50, 78, 80]], "num_samples": 16, "seed": 0}}

This file needs only torch, transformers, numpy, pillow and the files in its folder.
"""

import base64
import io
import reprlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import pipeline

MAX_PIXELS = 2**23  # per image; a CT slice has 512 x 512, a chest X-ray about 2500 x 3000
MAX_MASKS = 1_000  # samples times prompts per request
MAX_MASK_PIXELS = 2**27  # masks times pixels per request, two bytes each (mask and outline)
MAX_NUMBERS = 10_000  # in the boxes, points or labels of a request
MAX_MESSAGE = 500  # characters of an error message
MAX_QUOTED = 80  # characters of a request quoted in an error message
PARAMETERS = ("boxes", "points", "labels", "num_samples", "seed", "threshold", "pixel_spacing_mm")


class EndpointHandler:
    """Answers requests one at a time, which bounds the memory in use.

    It runs the pipeline of task `probabilistic-mask-generation`; transformers' own `mask-generation` pipeline is not
    supported. A request at the limits above takes about 1.4 GB in addition to the model.

    Args:
        path: folder of the repository, by default the folder of this file.
    """

    def __init__(self, path: str = ""):
        try:
            import probabilistic_sam  # noqa: F401  # registers the pipeline and its classes

            trust_remote_code = False
        except ImportError:
            # The trusted code is in the same folder and revision as this file, and nothing is downloaded.
            trust_remote_code = True
        folder = str(path or Path(__file__).resolve().parent)
        self.pipe = pipeline("probabilistic-mask-generation", model=folder, trust_remote_code=trust_remote_code)
        self.lock = threading.Lock()

    def __call__(self, data: Any) -> list[dict[str, Any]]:
        """Answer one request.

        Args:
            data: an image, or `{"inputs": image, "parameters": {...}}`. Parameters may also be given next to `inputs`.
                Unknown names are errors.

                The image is a PNG, JPEG, TIFF, BMP, PPM or WebP file of at most 8 million pixels, as bytes, base64 or
                a data URL, or a PIL image. Endpoints convert a body of type `image/*` to 8-bit RGB, so send 16-bit
                slices as base64.

                Parameters, all optional, with coordinates in pixels of the image: `boxes` (`[x1, y1, x2, y2]` or a
                list of boxes); `points` (`[x, y]`, `[[x, y], ...]` or `[prompt][point][x, y]`) with `labels` (1
                inside, 0 outside); `num_samples` (1 to 1000, default 16); `seed` (default 0); `threshold` (default
                0.5; also accepted as `mask_threshold`, its name in the image-segmentation schema);
                `pixel_spacing_mm`. Without boxes and points, the prompt is a point at the centre of the image.

        Returns:
            A list in the image-segmentation schema: `label`, `score` and `mask` (base64 of a grey 8-bit PNG with the
            size of the image), and the index of the prompt as `prompt`. For each prompt:

            - "mean": mean probability, 255 = 1. The score is the share of non-empty samples. Also `presence`,
              `areas_given_presence`, `area_quantiles_given_presence`, `areas`, `area_quantiles`, `area_unit` and
              `empty_share` as in the pipeline.
            - "uncertainty": entropy of the mean probability, 255 = 1 bit. No score.
            - "sample 0", "sample 1", ...: masks, 255 inside. Each has the score 1 / num_samples, because samples are
              equally likely. Also `area`.

        Raises:
            ValueError: one line that says what was wrong and what is accepted. Inference Endpoints
                (huggingface-inference-toolkit) answer any exception with status 400 and `{"error": text}`.
        """
        with self.lock:
            try:
                return self.answer(*unpack(data))
            except ValueError as error:
                message = " ".join(str(error).split())
                raise ValueError(message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "...") from None

    def answer(self, inputs: Any, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        """Check the whole request, then sample."""
        given = check_parameters(parameters)
        image = self.read_image(inputs)
        if "boxes" not in given and "points" not in given:
            given["points"] = [[image.width / 2, image.height / 2]]
        prompts = max(count_prompts(given.get("boxes"), 2), count_prompts(given.get("points"), 3))
        most = min(MAX_MASKS, MAX_MASK_PIXELS // (image.width * image.height)) // prompts
        if given["num_samples"] > most:
            raise ValueError(
                f"{given['num_samples']} samples for each of {prompts} prompts in {image.width} x {image.height} "
                f"pixels are too many; accepted: num_samples of at most {most} for this request"
            )
        return [entry for index, item in enumerate(self.pipe(image, **given)) for entry in entries(index, item)]

    def read_image(self, inputs: Any) -> Image.Image:
        """Open the image of a request; its size is checked before it is decoded."""
        if not isinstance(inputs, (Image.Image, str, bytes, bytearray)):
            kind = type(inputs).__name__
            raise ValueError(f"inputs are of type {kind}; accepted: an image file, as bytes or in base64")
        return self.pipe.open_image(inputs, "the input", MAX_PIXELS, paths=False)


def unpack(data: Any) -> tuple[Any, dict[str, Any]]:
    """Split a request into its image and its parameters."""
    if not isinstance(data, dict):
        return data, {}
    if data.get("inputs") is None:
        got = ", ".join(map(str, list(data)[:9])) or "nothing"
        raise ValueError(f'the request has no "inputs", only {got}; accepted: {{"inputs": image, "parameters": ...}}')
    parameters = data.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError(f"parameters are of type {type(parameters).__name__}; accepted: {', '.join(PARAMETERS)}")
    inside = {name: value for name, value in (parameters or {}).items() if value is not None}
    for name, value in data.items():
        if name in ("inputs", "parameters") or value is None:
            continue
        if name not in (*PARAMETERS, "mask_threshold"):
            accepted = ", ".join(("inputs", "parameters", *PARAMETERS))
            raise ValueError(f"the request has an unknown key {str(name)[:MAX_QUOTED]}; accepted: {accepted}")
        if inside.setdefault(name, value) != value:
            raise ValueError(f"{name} is given twice, inside and beside parameters; accepted: one value")
    return data["inputs"], inside


def check_parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the pipeline, including `num_samples`. Checks that need the image are left to the pipeline."""
    given = {name: value for name, value in parameters.items() if value is not None}
    if "mask_threshold" in given:
        threshold = given.pop("mask_threshold")
        if given.setdefault("threshold", threshold) != threshold:
            raise ValueError("threshold and mask_threshold are given with different values; accepted: one of them")
    unknown = sorted(map(str, given.keys() - set(PARAMETERS)))
    if unknown:
        raise ValueError(f"unknown parameter {unknown[0][:MAX_QUOTED]}; accepted: {', '.join(PARAMETERS)}")
    given.setdefault("num_samples", 16)
    for name, low, high in (("num_samples", 1, MAX_MASKS), ("seed", 0, 2**63 - 1)):
        value = given.get(name, low)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"{name} is {brief(value)}; accepted: a whole number from {low} to {high}")
    for name, high in (("threshold", 1), ("pixel_spacing_mm", 1000)):
        value = given.get(name, 0.5)
        if not is_number(value) or not 0 < value < high:
            raise ValueError(f"{name} is {brief(value)}; accepted: a number between 0 and {high}")
    for name in ("boxes", "points", "labels"):
        if name in given:
            for count, value in enumerate(leaves(given[name], depth=4), start=1):
                if count > MAX_NUMBERS:
                    raise ValueError(f"{name} have too many numbers; accepted: at most {MAX_NUMBERS}")
                if not is_number(value):
                    raise ValueError(f"{name} contain {brief(value)}; accepted: nested lists of finite numbers")
    return given


def is_number(value: Any) -> bool:
    """Whether a value is a finite number. The comparison is false for NaN and does not overflow for huge integers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 <= value <= 1e9


def leaves(value: Any, depth: int) -> Iterator[Any]:
    """Values in nested lists down to a depth. An empty list counts as a value, which bounds the work."""
    if isinstance(value, (list, tuple)) and value and depth:
        for item in value:
            yield from leaves(item, depth - 1)
    else:
        yield value


def count_prompts(prompts: Any, depth: int) -> int:
    """Number of prompts. `depth` is that of a list with several prompts: 2 for boxes, 3 for points."""
    levels: list[Any] = []
    while isinstance(prompts, (list, tuple)) and prompts:
        levels, prompts = [*levels, prompts], prompts[0]
    return len(levels[-depth]) if len(levels) >= depth else 1


def brief(value: Any) -> str:
    """Quote a value in an error message, with at most 80 characters."""
    return reprlib.repr(value)[:MAX_QUOTED]


def entries(prompt: int, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Entries of the answer for one prompt."""
    yield {
        "label": "mean",
        "score": 1 - result["empty_share"],
        "mask": png(result["mean"]),
        "prompt": prompt,
        "presence": result["presence"],
        "areas_given_presence": result["areas_given_presence"].tolist(),
        "area_quantiles_given_presence": result["area_quantiles_given_presence"],
        "areas": result["areas"].tolist(),
        "area_quantiles": result["area_quantiles"],
        "area_unit": result["area_unit"],
        "empty_share": result["empty_share"],
    }
    yield {"label": "uncertainty", "mask": png(result["uncertainty"]), "prompt": prompt}
    for index, (mask, area) in enumerate(zip(result["masks"], result["areas"].tolist(), strict=True)):
        score = 1 / len(result["masks"])
        yield {"label": f"sample {index}", "score": score, "mask": png(mask), "prompt": prompt, "area": area}


def png(values: np.ndarray) -> str:
    """Base64 of a grey PNG of values (H, W) in 0..1."""
    file = io.BytesIO()
    Image.fromarray(np.round(values * 255.0).astype(np.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
