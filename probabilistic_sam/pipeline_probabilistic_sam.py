"""The transformers pipeline of task `probabilistic-mask-generation`: images and prompts in, sampled masks out."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Pipeline
from transformers.pipelines.pt_utils import PipelineDataset, PipelineIterator

from .modeling_probabilistic_sam import ProbabilisticSamModel
from .processing_image_files import open_image, shorten
from .processing_probabilistic_sam import MISTAKEN, MISTAKEN_WITH_POINTS, ProbabilisticSamProcessor

OF_AN_IMAGE = ("boxes", "points", "labels", "pixel_spacing_mm")  # may be given per image
SAMPLED = ("pred_masks", "outline_masks", "presence")  # of the model's output; some models have pred_masks only
OF_A_CALL = ("num_samples", "seed", "threshold", "batch_size", "num_workers")


class ProbabilisticMaskGenerationPipeline(Pipeline):
    r"""Samples masks for prompts in images, each a plausible annotation by one reader.

    ```python
    pipe = transformers.pipeline("probabilistic-mask-generation", model="org/psam-lidc")
    (result,) = pipe("slice.png", boxes=[[52, 50, 78, 80]], num_samples=16, seed=0)
    result["masks"]  # (16, H, W)
    ```

    Without the package, `trust_remote_code=True` is needed. Keyword arguments of a call may also be given to
    `transformers.pipeline`; they then apply to all calls. transformers' own `mask-generation` pipeline is not
    supported.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    model: ProbabilisticSamModel
    processor: ProbabilisticSamProcessor
    open_image = staticmethod(open_image)  # for users of remote code, who do not have the package

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
        **unknown: Any,
    ) -> Any:
        """Sample masks.

        Args:
            images: one image or several (a list, tuple, dataset, column of a dataset or generator). An image is a
                path, bytes, binary file, base64 of a file (or a data URL), PIL image, tensor or array `(H, W)`,
                `(H, W, 3)` or `(3, H, W)`; or a dictionary with such an `image` and its own `boxes`, `points`,
                `labels` and `pixel_spacing_mm`, which take precedence over those below. Other keys are ignored, but
                keys that look like a prompt or an argument of this call, such as `box`, `input_boxes` or `seed`, are
                refused.
            boxes: `[x1, y1, x2, y2]` or `[prompt][x1, y1, x2, y2]`, in image pixels, measured at pixel edges; the same
                for all images. Several images with boxes of their own are given as dictionaries.
            points: `[x, y]`, `[point][x, y]` or `[prompt][point][x, y]`. With boxes, each prompt has a box and points.
            labels: labels of the points: 1 inside, 0 outside, -1 or -10 padding; all inside by default.
            pixel_spacing_mm: side of a pixel, one number or one per prompt; areas are then in mm^2.
            num_samples: N, masks per prompt, 16 by default.
            seed: of the noise, 0 by default. Each image gets its own noise from this seed, so its samples do not
                depend (up to rounding) on `batch_size` or on the other images.
            threshold: probability above which a pixel belongs to a mask, 0.5 by default.
            batch_size: images that are prepared at a time, and windows in one forward pass, 1 by default. If the
                processor has a `crop_size`, each prompt has its own window.
            num_workers: processes that prepare images, none by default; not used for generators and streaming
                datasets.
            **unknown: refused.

        Returns:
            For one image a list with one dictionary per prompt. Of readers who annotate: their share `presence`, N
            masks `outlines (N, H, W)` boolean, `areas_given_presence (N,)`, `area_quantiles_given_presence` by level
            (None, without outlines, if the presence is less than 1 %). Of all readers: `masks (N, H, W)` boolean,
            `mean (H, W)` probability averaged over the samples, `uncertainty (H, W)` the entropy of `mean` in bits,
            `areas (N,)`, `area_quantiles` by level, `empty_share` of the samples. `area_unit` is "px" or "mm2"; arrays
            are NumPy arrays.

            For a list or tuple a list of such lists; for a dataset, a column or a generator an iterator over them,
            which holds one batch in memory at a time.

        Raises:
            ValueError: not an image, no prompt, a prompt outside its image, a number out of range, or a key of a
                dictionary that is refused.
            TypeError: an unknown argument.
        """
        refuse_unknown(unknown)
        is_image = isinstance(images, (str, bytes, bytearray, os.PathLike, Mapping))
        is_image = is_image or any(hasattr(images, name) for name in ("ndim", "getbands", "read"))  # array, PIL, file
        is_single = is_image or not (hasattr(images, "__iter__") or hasattr(images, "__getitem__"))
        if is_single:
            images = [images]  # so that `batch_size` applies to its windows
        elif isinstance(images, tuple):
            images = list(images)
        elif isinstance(images, Sequence) or hasattr(images, "__getitems__"):  # the latter for `datasets.Dataset`
            images = images if isinstance(images, (list, Dataset)) else Items(images)
        elif hasattr(images, "__iter__") and not isinstance(images, GeneratorType):
            images = (image for image in images)  # which transformers would treat as one image
        if images == []:  # which transformers does not accept
            return []
        results = super().__call__(
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
        return results[0] if is_single else results

    def _sanitize_parameters(
        self,
        boxes=None,
        points=None,
        labels=None,
        pixel_spacing_mm=None,
        num_samples=None,
        seed=None,
        threshold=None,
        **unknown,
    ):
        refuse_unknown(unknown)
        of_an_image = {"boxes": boxes, "points": points, "labels": labels, "pixel_spacing_mm": pixel_spacing_mm}
        stages = (of_an_image, {"num_samples": num_samples, "seed": seed}, {"threshold": threshold})
        return tuple({name: value for name, value in stage.items() if value is not None} for stage in stages)

    def preprocess(self, inputs: Any, **defaults: Any) -> dict[str, Any]:
        """Features of one image and its prompts from the processor, and the pixel spacing."""
        row = inputs if isinstance(inputs, Mapping) else {"image": inputs}
        if row.get("image") is None:
            raise ValueError(f"a dictionary must hold an image, got {shorten(', '.join(map(str, row)) or 'nothing')}")
        check_keys(row)
        given = defaults | {name: row[name] for name in OF_AN_IMAGE if row.get(name) is not None}
        prompts = {f"input_{name}": given[name] for name in ("boxes", "points", "labels") if name in given}
        try:
            features = self.processor(images=[row["image"]], **prompts)
        except ValueError as error:  # in the words of this call
            words = re.sub(r"input_(boxes|points|labels)", r"\1", str(error)).replace(" or input_masks", "")
            raise ValueError(words) from error
        return {"features": dict(features), "pixel_spacing_mm": given.get("pixel_spacing_mm")}

    def _forward(self, images: list[dict], batch_size: int, num_samples: int = 16, seed: int = 0) -> list[dict]:
        """Add `pred_masks`, `outline_masks` and `presence` to the outputs of `preprocess` for several images."""
        windows = []  # features of one window, generator of its image
        for image in images:
            generator, features = torch.Generator().manual_seed(seed), image["features"]
            for index in range(len(features["windows"])):
                windows.append(({name: value[index : index + 1] for name, value in features.items()}, generator))

        # Batches have windows of equal shapes, since padding to a common number of points would change the samples
        samples: list[dict[str, torch.Tensor]] = []  # of one window each
        for _, group in itertools.groupby(windows, key=lambda window: {n: v.shape for n, v in window[0].items()}):
            members = list(group)
            for start in range(0, len(members), batch_size):
                parts, generators = zip(*members[start : start + batch_size], strict=True)
                inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
                output = self.model.sample(**inputs, num_samples=num_samples, generator=generators)
                fields = {name: output[name].split(1) for name in SAMPLED if name in output}
                samples += [dict(zip(fields, parts, strict=True)) for parts in zip(*fields.values(), strict=True)]
        sampled = iter(samples)
        for image in images:
            of_image = list(itertools.islice(sampled, len(image["features"]["windows"])))
            image |= {name: torch.cat([window[name] for window in of_image]) for name in of_image[0]}
        return images

    def postprocess(self, outputs: dict[str, Any], threshold: float = 0.5) -> list[dict[str, Any]]:
        """One dictionary per prompt of one image, see `__call__`."""
        results = self.processor.post_process_samples(
            windows=outputs["features"]["windows"],
            original_sizes=outputs["features"]["original_sizes"],
            pixel_spacing_mm=outputs["pixel_spacing_mm"],
            threshold=threshold,
            **{name: outputs[name] for name in SAMPLED if name in outputs},
        )
        for result in results:
            result["uncertainty"] = result.pop("entropy")
            result.update({n: value.numpy() for n, value in result.items() if isinstance(value, torch.Tensor)})
        return results

    def get_iterator(
        self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[list[dict[str, Any]]]:
        """Results image by image; a batch has one item per window, not per image as in transformers."""
        if hasattr(inputs, "__len__"):
            dataset = PipelineDataset(inputs, self.preprocess, preprocess_params)
        else:  # every worker process would run through all images
            dataset, num_workers = PipelineIterator(inputs, self.preprocess, preprocess_params), 0
        for images in DataLoader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list):
            for outputs in self.forward(images, batch_size=batch_size, **forward_params):
                yield self.postprocess(outputs, **postprocess_params)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write a repository that works without the package: weights, configuration, processor and their code."""
        self.model.config.include_code()
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.include_code()
        self.processor.save_pretrained(save_directory)


class Items(Dataset):
    """A dataset or column of `datasets` as one of PyTorch, which transformers does not take for a single image."""

    def __init__(self, items: Any):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def refuse_unknown(unknown: Mapping[str, Any]) -> None:
    """Raise `TypeError` for unknown arguments."""
    for name in unknown:
        raise TypeError(f"the pipeline does not take {name}; accepted: {', '.join(OF_AN_IMAGE + OF_A_CALL)}")


def check_keys(row: Mapping[str, Any]) -> None:
    """Raise `ValueError` for keys that are misspelled prompts or arguments of the call."""
    points = row.get("points") is not None
    for name in (str(key) for key, value in row.items() if key not in ("image", *OF_AN_IMAGE) and value is not None):
        if name in OF_A_CALL:
            raise ValueError(f"a dictionary holds {name}, which is the same for all images; accepted: as an argument")
        if MISTAKEN.fullmatch(name) or (points and MISTAKEN_WITH_POINTS.fullmatch(name)):
            accepted = ", ".join(("image", *OF_AN_IMAGE))
            raise ValueError(f"a dictionary holds {shorten(name)}, which is not read; accepted: {accepted}")


__all__ = ["ProbabilisticMaskGenerationPipeline"]
