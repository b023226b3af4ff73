"""The transformers pipeline of task `probabilistic-mask-generation`: images and prompts in, sampled masks out."""

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping
from types import GeneratorType
from typing import Any, BinaryIO

import torch
from torch.utils.data import DataLoader
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .modeling_probabilistic_sam import ProbabilisticSamModel
from .processing_probabilistic_sam import ProbabilisticSamProcessor

IMAGE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "WEBP")
MAX_PIXELS = 64_000_000
OF_AN_IMAGE = ("boxes", "points", "labels", "pixel_spacing_mm")  # what an image may bring with it


def open_image(file: str | os.PathLike[str] | BinaryIO, name: str, max_pixels: int = MAX_PIXELS) -> Any:
    """Decode one image; its size is checked before, so that one that would not fit into memory is refused.

    Args:
        file: a path or a binary file.
        name: the subject of error messages, as in "image slice.png".
        max_pixels: its largest width times height.

    Returns:
        `PIL.Image.Image`, upright.

    Raises:
        ValueError: not an image, truncated, several frames, or more than `max_pixels`.
    """
    try:  # only for files; transformers would refuse all remote code where an import outside of `try` is missing
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("image files need Pillow (pip install pillow); arrays and tensors do without") from error
    try:
        # The header says the size
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(file, formats=IMAGE_FORMATS)
        with image:
            frames = getattr(image, "n_frames", 1)
            if image.width * image.height > max_pixels:
                problem = f"has {image.width} x {image.height} pixels"
            elif frames > 1:
                problem = f"holds {frames} frames"
            else:
                return ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        problem = f"is too large ({error})"
    except UnidentifiedImageError:
        problem = "is not an image"
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        problem = f"cannot be read ({error})"
    formats = ", ".join(IMAGE_FORMATS)
    raise ValueError(
        f"{name} {problem}; accepted: {formats} of at most {max_pixels // 10**6} million pixels, one slice a file"
    )


class ProbabilisticMaskGenerationPipeline(Pipeline):
    r"""Draws masks for prompts in images: what several experts might have drawn.

    ```python
    pipe = transformers.pipeline("probabilistic-mask-generation", model="org/psam-lidc")
    (result,) = pipe("slice.png", boxes=[[52, 50, 78, 80]], num_samples=16, seed=0)
    result["masks"]  # (16, H, W)
    ```

    Without the package `trust_remote_code=True` is needed. transformers' own `mask-generation` pipeline is not
    supported. What a call takes by name may be given to
    `transformers.pipeline` as well, for all calls.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    model: ProbabilisticSamModel
    processor: ProbabilisticSamProcessor
    open_image = staticmethod(open_image)  # for who has the pipeline from a repository and the package not

    def __call__(
        self,
        images: Any,
        *,
        boxes: Any = None,
        points: Any = None,
        labels: Any = None,
        pixel_spacing_mm: Any = None,
        num_samples: int | None = None,
        seed: int | None = None,
        threshold: float | None = None,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> Any:
        """Draw masks.

        Args:
            images: a path, PIL image, array `(H, W)`, `(H, W, 3)` or `(3, H, W)`, or tensor; or a dictionary with such
                an `image` and `boxes`, `points`, `labels`, `pixel_spacing_mm` of its own, which go before those
                below; other keys are left alone. A list or tuple of them, a column or all of a dataset, or a
                generator.
            boxes: one box `[x1, y1, x2, y2]`, or `[prompt][x1, y1, x2, y2]`, in pixels of the image, measured at the
                pixels' edges; the same for all images.
            points: `[point][x, y]`, or `[prompt][point][x, y]`. With boxes as well, a prompt has both.
            labels: of the points: 1 inside, 0 outside; all inside when left out.
            pixel_spacing_mm: side of a pixel, one number or one a prompt; areas are then in mm^2.
            num_samples: N, masks a prompt, 16 by default.
            seed: of the noise, 0 by default. Every image has noise of its own from this seed: what is drawn for it
                depends, up to rounding, neither on `batch_size` nor on the other images.
            threshold: probability above which a pixel belongs to a mask, 0.5 by default.
            batch_size: images that are prepared, and windows that the model sees, at a time, 1 by default. A prompt
                has a window of its own when the processor has a `crop_size`.
            num_workers: processes that prepare the images, none by default.

        Returns:
            For one image a list with a dictionary a prompt: `masks (N, H, W)` boolean, `mean (H, W)` probability
            averaged over the samples, `uncertainty (H, W)` the entropy of that mean in bits, `areas (N,)`,
            `area_quantiles` by level, `area_unit` ("px" or "mm2"), `empty_share` of the samples; all arrays are
            numpy's. For a list or tuple a list of such lists; for a dataset, a column or a generator an iterator
            over them, which holds one batch at a time.

        Raises:
            ValueError: not an image, no prompt, a prompt outside of its image, a number out of range.
        """
        is_image = isinstance(images, (str, os.PathLike, Mapping)) or hasattr(images, "ndim")
        is_image = is_image or hasattr(images, "getbands")  # PIL
        if isinstance(images, tuple):
            images = list(images)
        elif not is_image and not isinstance(images, (list, GeneratorType)) and hasattr(images, "__iter__"):
            images = (image for image in images)  # a dataset or its column, which transformers would take for an image
        return super().__call__(
            images,
            boxes=boxes,
            points=points,
            labels=labels,
            pixel_spacing_mm=pixel_spacing_mm,
            num_samples=num_samples,
            seed=seed,
            threshold=threshold,
            batch_size=batch_size,
            num_workers=num_workers,
        )

    def _sanitize_parameters(
        self,
        boxes=None,
        points=None,
        labels=None,
        pixel_spacing_mm=None,
        num_samples=None,
        seed=None,
        threshold=None,
    ):
        of_an_image = {"boxes": boxes, "points": points, "labels": labels, "pixel_spacing_mm": pixel_spacing_mm}
        stages = (of_an_image, {"num_samples": num_samples, "seed": seed}, {"threshold": threshold})
        return tuple({name: value for name, value in stage.items() if value is not None} for stage in stages)

    def preprocess(self, inputs: Any, **defaults: Any) -> dict[str, Any]:
        """What the processor makes of one image and its prompts, and the pixel spacing."""
        row = inputs if isinstance(inputs, Mapping) else {"image": inputs}
        if row.get("image") is None:
            raise ValueError(f"a dictionary must hold an image, got {', '.join(map(str, row)) or 'nothing'}")
        image, given = row["image"], dict(defaults)
        given |= {name: row[name] for name in OF_AN_IMAGE if row.get(name) is not None}
        if isinstance(image, (str, os.PathLike)):
            image = open_image(image, f"image {image}")
        prompts: dict[str, Any] = {
            f"input_{name}": [given[name]] for name in ("boxes", "points", "labels") if name in given
        }
        features = self.processor(images=[image], **prompts)
        return {"features": dict(features), "pixel_spacing_mm": given.get("pixel_spacing_mm")}

    def _forward(self, images: list[dict], batch_size: int, num_samples: int = 16, seed: int = 0) -> list[dict]:
        """Adds `pred_masks` to what `preprocess` gave for some images."""
        windows = []  # features of one window, noise of its image
        for image in images:
            generator, features = torch.Generator().manual_seed(seed), image["features"]
            for index in range(len(features["windows"])):
                windows.append(({name: value[index : index + 1] for name, value in features.items()}, generator))

        # Padding to a common number of points would change what is drawn: only windows of equal shapes ride together
        masks = []
        for _, group in itertools.groupby(windows, key=lambda window: {n: v.shape for n, v in window[0].items()}):
            members = list(group)
            for start in range(0, len(members), batch_size):
                parts, generators = zip(*members[start : start + batch_size], strict=True)
                inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
                pred_masks = self.model.sample(**inputs, num_samples=num_samples, generator=generators).pred_masks
                assert pred_masks is not None  # always there; the output's fields are optional for mypy
                masks += pred_masks.split(1)
        drawn = iter(masks)
        for image in images:
            image["pred_masks"] = torch.cat(list(itertools.islice(drawn, len(image["features"]["windows"]))))
        return images

    def postprocess(self, outputs: dict[str, Any], threshold: float = 0.5) -> list[dict[str, Any]]:
        """One dictionary a prompt of one image, see `__call__`."""
        results = self.processor.post_process_samples(
            outputs["pred_masks"],
            outputs["features"]["windows"],
            outputs["features"]["original_sizes"],
            pixel_spacing_mm=outputs["pixel_spacing_mm"],
            threshold=threshold,
        )
        for result in results:
            result["uncertainty"] = result.pop("entropy")
            result.update({n: value.numpy() for n, value in result.items() if isinstance(value, torch.Tensor)})
        return results

    def get_iterator(
        self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[list[dict[str, Any]]]:
        """Results image by image; transformers' own batches have one item an image, ours one a window."""
        sized = hasattr(inputs, "__len__")
        dataset = (PipelineDataset if sized else PipelineIterator)(inputs, self.preprocess, preprocess_params)
        for images in DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list):
            for outputs in self.forward(images, batch_size=batch_size, **forward_params):
                yield self.postprocess(outputs, **postprocess_params)

    def run_single(self, inputs, *params) -> list[dict[str, Any]]:
        """Result of one image."""
        (result,) = self.get_iterator([inputs], 0, 1, *params)
        return result

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a repository that works without the package: weights, configuration, processor and the code of all."""
        self.model.config.include_code()
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.include_code()
        self.processor.save_pretrained(save_directory)


__all__ = ["ProbabilisticMaskGenerationPipeline"]
