"""What a Hugging Face Inference Endpoint runs for this repository: an image and a prompt in, sampled masks out.

    for item in InferenceClient(model=url).image_segmentation("slice.png"):
        item.label, item.score, item.mask

draws for a point at the image's centre (bytes in place of a path need `headers={"Content-Type": "image/png"}`, or the
client sends them as JSON). A prompt of one's own goes in JSON:

    {"inputs": base64 of the image file, "parameters": {"boxes": [[52, 50, 78, 80]], "num_samples": 16, "seed": 0}}

It stands alone: torch, transformers, numpy, pillow and the files beside it are all it needs.
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

MAX_PIXELS = 2**23  # of an image; a CT slice has 512 x 512, a chest X-ray some 2500 x 3000
MAX_MASKS = 1_000  # samples times prompts of a request
MAX_MASK_PIXELS = 2**27  # masks times pixels: one byte each is kept
MAX_NUMBERS = 10_000  # of the boxes, points or labels of a request
MAX_MESSAGE = 500  # characters of an error
MAX_QUOTED = 80  # characters of a request that an error repeats
PARAMETERS = ("boxes", "points", "labels", "num_samples", "seed", "threshold", "pixel_spacing_mm")


class EndpointHandler:
    """Answers requests, one at a time, so that what they need of memory does not add up.

    It runs the pipeline of task `probabilistic-mask-generation`; transformers' own `mask-generation` pipeline is not
    supported.

    A request at the limits above takes some 1.3 GB beside the model.

    Args:
        path: the repository's folder.
    """

    def __init__(self, path: str = ""):
        try:
            import probabilistic_sam  # noqa: F401  # it registers the pipeline and its classes

            trusts_the_folder = False
        except ImportError:
            # The code that is trusted lies in the same folder as this file, at the same revision: who runs this file
            # runs nothing that he did not choose together with it, and nothing is fetched.
            trusts_the_folder = True
        folder = str(path or Path(__file__).resolve().parent)
        self.pipe = pipeline("probabilistic-mask-generation", model=folder, trust_remote_code=trusts_the_folder)
        self.lock = threading.Lock()

    def __call__(self, data: Any) -> list[dict[str, Any]]:
        """Answer one request.

        Args:
            data: an image, or `{"inputs": image, "parameters": {...}}`; parameters beside `inputs` are taken as well,
                and every other name is refused. The image is the bytes of a PNG, JPEG, TIFF,
                BMP, PPM or WebP file of at most 8 million pixels, base64 of them (a data URL, too), or a PIL image:
                that is what an endpoint makes of a body of type `image/*`, in 8-bit RGB, so slices of 16 bits must
                come in base64. Parameters, all optional: `boxes` `[x1, y1, x2, y2]` or a list of them, `points`
                `[x, y]`, `[[x, y], ...]` or `[prompt][point][x, y]` with `labels` (1 inside, 0 outside), in pixels of
                the image; `num_samples` (1 to 1000, 16), `seed` (0), `threshold` (0.5; its name in the
                image-segmentation schema, `mask_threshold`, is understood as well), `pixel_spacing_mm`. Without
                boxes and points the prompt is a point at the image's centre.

        Returns:
            The image-segmentation schema, `label`, `score` and `mask` (base64 of a grey 8-bit PNG of the image's
            size), with further fields. For each prompt (field `prompt`, its index):
            "mean": the mean probability, 255 = 1; the score is the share of samples that are not empty; `areas`,
            `area_quantiles`, `area_unit`, `empty_share` as in the pipeline.
            "uncertainty": the entropy of the mean, 255 = 1 bit; no score.
            "sample 0", "sample 1", ...: masks, 255 inside; the score of each is 1 / num_samples, since all are
            equally likely; `area`.

        Raises:
            ValueError: what was wrong and what is accepted, in one line. Inference Endpoints
                (huggingface-inference-toolkit) answer any exception with status 400 and `{"error": its text}`.
        """
        with self.lock:
            try:
                return self.answer(*unpack(data))
            except ValueError as error:
                message = " ".join(str(error).split())
                raise ValueError(message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "...") from None

    def answer(self, inputs: Any, parameters: dict[str, Any]) -> list[dict[str, Any]]:
        """Check all of a request, then draw."""
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
        """The image of a request, its size checked before it is decoded."""
        if not isinstance(inputs, (Image.Image, str, bytes, bytearray)):
            kind = type(inputs).__name__
            raise ValueError(f"inputs are of type {kind}; accepted: an image file, as bytes or in base64")
        return self.pipe.open_image(inputs, "the input", MAX_PIXELS, paths=False)


def unpack(data: Any) -> tuple[Any, dict[str, Any]]:
    """Image and parameters of a request."""
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
    """Arguments of the pipeline, `num_samples` among them; what needs the image is left to the pipeline."""
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
    """Whether it is a finite number; comparing rules NaN out, and integers of any length do not overflow."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 <= value <= 1e9


def leaves(value: Any, depth: int) -> Iterator[Any]:
    """What nested lists hold, down to a depth; an empty list is a leaf, so that their number bounds the work."""
    if isinstance(value, (list, tuple)) and value and depth:
        for item in value:
            yield from leaves(item, depth - 1)
    else:
        yield value


def count_prompts(prompts: Any, depth: int) -> int:
    """Number of prompts in boxes, which as a list of prompts have depth 2, or in points, which then have depth 3."""
    levels: list[Any] = []
    while isinstance(prompts, (list, tuple)) and prompts:
        levels, prompts = [*levels, prompts], prompts[0]
    return len(levels[-depth]) if len(levels) >= depth else 1


def brief(value: Any) -> str:
    """What an error message repeats of a request: at most 80 characters."""
    return reprlib.repr(value)[:MAX_QUOTED]


def entries(prompt: int, result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the answer says about one prompt."""
    yield {
        "label": "mean",
        "score": 1 - result["empty_share"],
        "mask": png(result["mean"]),
        "prompt": prompt,
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
