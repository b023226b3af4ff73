"""Scoring a model's samples on the rows of a dataset.

`evaluate_dataset` is a pipeline. `prepare_row` (in workers) decodes a row and cuts its windows, `collate` makes a
batch of rows, `sample_batch` samples all windows of a batch at once on the device, and `score_samples` (in workers)
computes the metrics of a row. At most `BATCHES_AHEAD` batches wait between two stages, so memory is bounded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from .data import row_prompt, row_seed
from .data.format import decode_image, decode_masks
from .errors import UserError
from .metrics import OF_ALL_MASKS, slice_collapse, slice_metrics
from .metrics.functional import DILATION_PX, bounding_box, majority_mask, union_mask
from .processing_probabilistic_sam import OUTSIDE_LOGIT
from .thinning import thin_samples
from .workers import InThisProcess, read_ahead

ORACLES = ("oracle:majority", "oracle:readers")
IDENTITY = ["patient_id", "scan_id", "nodule_id", "slice_index", "image_id", "source"]
SELECTION = "the first max_slices of the split in the order of a hash of each slice's identity"
READER_BOX_NOTE = (
    "num_samples samples were generated with each reader's own box, which reveals the answer: dice_max_per_reader, "
    "dice_mean and iou_mean compare a reader only with the samples of their own box; all other metrics score the "
    "union of the samples of all readers, num_samples * readers of them"
)
BATCHES_AHEAD = 2
INDEPENDENT_AT_ONCE = 32  # of independent samples, each of which has its own row in a call of the model
OUTSIDE_PROBABILITY = torch.tensor(OUTSIDE_LOGIT).sigmoid().item()


@dataclass(frozen=True)
class Sampling:
    """What is sampled.

    Args:
        prompt: one of `probabilistic_sam.data.PROMPTS`. With `reader_box`, `num_samples` samples are generated for
            each reader's box, see `slice_metrics(owners=...)`.
        num_samples: masks per prompt.
        seeds: of the samples; the prompt is the same for all of them.
        independent: sample each mask separately. Samples of one call may depend on each other, since a model may
            spread them evenly over the distribution.
        num_candidates: sample this many and keep those that represent them best (`thin_samples`); None keeps all.
    """

    prompt: str = "union_box"
    num_samples: int = 16
    seeds: Sequence[int] = (0,)
    independent: bool = False
    num_candidates: int | None = None


NOT_INPUTS = ("labels", "annotated", "image_indices")  # of the model, in what the processor returns for a row


class PreparedRow(NamedTuple):
    """A decoded row.

    Args:
        columns: of the row, without image and masks.
        bits: the readers' masks (R, H, W), packed, since several batches of rows wait in memory.
        width: W, of the masks.
        windows: for each prompt the reader whose box it is, or None, and the processor's output as arrays. There is
            one window, with `reader_box` one per reader, for an oracle none.
    """

    columns: dict[str, Any]
    bits: np.ndarray
    width: int
    windows: list[tuple[int | None, dict[str, np.ndarray]]]

    @property
    def masks(self) -> np.ndarray:
        """The readers' masks (R, H, W), bool."""
        return np.unpackbits(self.bits, axis=-1, count=self.width).view(bool)


@dataclass
class Batch:
    """Rows that are sampled together.

    Args:
        indices: of the rows in their dataset.
        rows: the decoded rows.
        owners: for each of W windows, the row in this batch, and the reader whose box it is or None.
        inputs: of the model, with W images and one prompt per image.
        places: `windows` (W, 3) and `original_sizes` (W, 2) of the processor.
    """

    indices: Sequence[int]
    rows: list[PreparedRow]
    owners: list[tuple[int, int | None]]
    inputs: dict[str, torch.Tensor]
    places: tuple[torch.Tensor, torch.Tensor]


class WindowSamples(NamedTuple):
    """Samples of one window, cut to the window, since they are empty outside.

    Args:
        rows, columns: the window's part of the image.
        bits: the masks (N, h, w), packed.
        probabilities: (N, h, w), float32.
        iou_scores: (N,) of the model, or None.
    """

    rows: slice
    columns: slice
    bits: np.ndarray
    probabilities: np.ndarray
    iou_scores: np.ndarray | None = None


class ScoredRow(NamedTuple):
    """A row's number in its dataset, its patient, and its scores for each seed."""

    number: int
    patient: str
    scores: list[dict[str, Any]]


def choose_rows(dataset: datasets.Dataset, count: int | None, purpose: str) -> list[int]:
    """Indices of the first `count` rows in the order of a hash, ascending; all rows where `count` is None.

    Args:
        dataset: rows of a split; their order does not change the choice.
        count: how many.
        purpose: part of what is hashed, so that rows are chosen independently for different purposes.
    """
    keys = [row_seed(row, purpose) for row in dataset.select_columns(IDENTITY)]
    return sorted(sorted(range(len(keys)), key=keys.__getitem__)[:count])


def evaluate_dataset(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    prompt: str,
    num_samples: int,
    seeds: Sequence[int],
    batch_size: int,
    state: Any,
    device: torch.device | str = "cpu",
    independent: bool = False,
    workers: Executor | None = None,
    num_candidates: int | None = None,
) -> tuple[list[str], list[list[dict]]]:
    """Score a dataset with all processes.

    Whole batches are distributed among the processes. A batch therefore holds the same rows whatever the number of
    processes, and the floating-point results are identical.

    Args:
        model: has `sample(pixel_values, input_boxes, num_samples, generator)`, where `generator` is a list with one
            per image; with `get_image_embeddings` also `sample(image_embeddings=...)`; with `posterior` takes `labels`
            like `ProbabilisticSamModel`. Or an `Oracle`, which uses neither processor nor prompt.
        processor: `ProbabilisticSamProcessor`, or one with the same arguments and outputs.
        dataset: rows to score.
        prompt: see `Sampling`, also for the other arguments that are not explained here.
        num_samples: see there.
        seeds: see there.
        batch_size: rows per batch.
        state: of the processes; a `PartialState` or an `Accelerator`.
        device: of the model.
        independent: see there.
        workers: prepare inputs and compute metrics; by default this process does.
        num_candidates: see `Sampling`.

    Returns:
        The patient of each row, and for each seed what `slice_metrics` returns for all rows, in the order of the
        dataset. The first seed also has `collapse`, what `slice_collapse` returns, if the model has a `posterior` and
        the prompt is not `reader_box`.

    Raises:
        UserError: a row that cannot be decoded, or the model returns another number of masks, or logits that are not
            finite.
    """
    sampling = Sampling(prompt, num_samples, seeds, independent, num_candidates)
    workers = workers or InThisProcess()
    batches = read_batches(model, processor, dataset, sampling, batch_size, state, workers)
    scored = []
    with tqdm(total=len(dataset), unit="slice", desc="evaluate", disable=not state.is_main_process) as progress:
        for row in score_batches(model, processor, batches, sampling, device, workers):
            scored.append(row)
            # The other processes are about as far
            progress.update(min(state.num_processes, len(dataset) - progress.n))
    return gather(scored, seeds)


# --------------------------------------------------------------------------------------------------------------- input


def prepare_options(model: Any, processor: Any, prompt: str) -> tuple[Any, str, bool]:
    """The arguments of `prepare_row` that follow `row`."""
    return None if isinstance(model, Oracle) else processor, prompt, has_latent_state(model, prompt)


def has_latent_state(model: Any, prompt: str) -> bool:
    """Whether the state of the latent space is part of the scores."""
    return hasattr(model, "posterior") and prompt != "reader_box"


def prepare_row(row: Mapping[str, Any], processor: Any, prompt: str, with_readers: bool) -> PreparedRow:
    """Decode a row and cut its windows.

    Args:
        row: of a dataset build, images encoded or decoded.
        processor: see `evaluate_dataset`; without one there are no windows.
        prompt: see `Sampling`.
        with_readers: the windows get the readers' masks, too.
    """
    masks = decode_masks(row)
    windows: list[tuple[int | None, dict[str, np.ndarray]]] = []
    if processor is not None:
        image, readers = decode_image(row, masks.shape[1:]), {"segmentation_maps": [masks]} if with_readers else {}
        for reader in range(len(masks)) if prompt == "reader_box" else [None]:
            given = nest_prompt(row_prompt(row, masks, prompt, reader)) | readers
            features = processor(images=[image], return_tensors="pt", **given)
            windows.append((reader, {name: value.numpy() for name, value in features.items()}))
    columns = {name: value for name, value in row.items() if name not in ("image", "masks")}
    return PreparedRow(columns, np.packbits(masks, axis=-1), masks.shape[-1], windows)


def nest_prompt(prompt: Mapping[str, Any]) -> dict[str, list]:
    """One prompt as the processor takes it: a list of images, of prompts, and for points of points."""
    if "input_boxes" in prompt:
        return {"input_boxes": [[prompt["input_boxes"]]]}
    return {"input_points": [[[prompt["input_points"]]]], "input_labels": [[[prompt["input_labels"]]]]}


def read_batches(
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    sampling: Sampling,
    batch_size: int,
    state: Any,
    workers: Executor,
) -> Iterator[Batch]:
    """The batches of this process, see `evaluate_dataset`; workers prepare the next ones meanwhile."""
    rows, options = dataset.with_format("arrow"), prepare_options(model, processor, sampling.prompt)

    def submitted() -> Iterator[tuple[Sequence[int], list[Future]]]:
        for start in range(0, len(dataset), batch_size)[state.process_index :: state.num_processes]:
            indices = range(start, min(start + batch_size, len(dataset)))
            encoded = rows[start : indices.stop].to_pylist()  # decoded by the workers
            yield indices, [workers.submit(prepare_row, row, *options) for row in encoded]

    for indices, futures in read_ahead(submitted(), BATCHES_AHEAD):
        yield collate(indices, [future.result() for future in futures])


def collate(indices: Sequence[int], rows: list[PreparedRow]) -> Batch:
    """A batch from its rows."""
    owners = [(index, reader) for index, row in enumerate(rows) for reader, _ in row.windows]
    windows = [features for row in rows for _, features in row.windows]
    names = [name for name in (windows[0] if windows else ()) if name not in NOT_INPUTS]
    tensors = {name: torch.cat([torch.from_numpy(window[name]) for window in windows]) for name in names}
    places = (tensors.pop("windows"), tensors.pop("original_sizes")) if windows else (torch.empty(0),) * 2
    return Batch(indices, rows, owners, tensors, places)


@torch.inference_mode()
def encode(model: Any, batch: Batch, device: torch.device | str) -> Batch:
    """A batch with its inputs on the device, and image embeddings in place of pixels if the model has them."""
    inputs = {name: value.to(device, non_blocking=True) for name, value in batch.inputs.items()}
    if "pixel_values" in inputs and hasattr(model, "get_image_embeddings"):
        inputs["image_embeddings"] = model.get_image_embeddings(inputs.pop("pixel_values"))
    return replace(batch, inputs=inputs)


# ------------------------------------------------------------------------------------------------------------- samples


def score_batches(
    model: Any,
    processor: Any,
    batches: Iterable[Batch],
    sampling: Sampling,
    device: torch.device | str,
    workers: Executor,
) -> Iterator[ScoredRow]:
    """Score the rows of batches; for the arguments see `evaluate_dataset`."""
    submitted = (
        (batch, score_batch(model, processor, encode(model, batch, device), sampling, workers)) for batch in batches
    )
    for batch, futures in read_ahead(submitted, BATCHES_AHEAD):
        for index, row, scores in zip(batch.indices, batch.rows, collect(futures), strict=True):
            yield ScoredRow(index, row.columns["patient_id"], scores)


def gather(scored: list[ScoredRow], seeds: Sequence[int]) -> tuple[list[str], list[list[dict]]]:
    """Patients, and for each seed the scores, of the rows of all processes in the order of the dataset."""
    gathered = sorted(gather_object(scored), key=lambda row: row.number)
    return [row.patient for row in gathered], [[row.scores[i] for row in gathered] for i in range(len(seeds))]


def score_batch(
    model: Any, processor: Any, batch: Batch, sampling: Sampling, workers: Executor
) -> list[list[tuple[Future, dict[str, Any]]]]:
    """For each row and each seed, its metrics to come, and what else belongs to its scores."""
    result: list[list[tuple[Future, dict[str, Any]]]] = [[] for _ in batch.rows]
    for number, seed in enumerate(sampling.seeds):
        if isinstance(model, Oracle):
            for row, by_seed in zip(batch.rows, result, strict=True):
                row_seed_ = row_seed(row.columns, f"samples {seed} None")
                arguments = (model, row.masks, sampling.num_samples, row_seed_, sampling.independent)
                by_seed.append((workers.submit(score_oracle, *arguments), {}))
            continue
        # A seed for each row and reader, so that results do not depend on batches or processes
        seeds = [row_seed(batch.rows[index].columns, f"samples {seed} {reader}") for index, reader in batch.owners]
        generators = [torch.Generator().manual_seed(value) for value in seeds]
        samples = cut_samples(processor, *sample_batch(model, batch.inputs, sampling, generators), batch)
        states: list[dict[str, Any]] = [{} for _ in batch.rows]
        if has_latent_state(model, sampling.prompt) and number == 0:
            # After sampling, whose noise must not depend on it
            states = [{"collapse": state} for state in latent_states(model, batch, generators)]
        for row, by_seed, windows, state in zip(batch.rows, result, samples, states, strict=True):
            by_reader = sampling.prompt == "reader_box"
            by_seed.append((workers.submit(score_samples, windows, row.masks, by_reader, sampling.independent), state))
    return result


def collect(futures: list[list[tuple[Future, dict[str, Any]]]]) -> list[list[dict]]:
    """The scores of each row and seed, when they are there."""
    return [[future.result() | more for future, more in by_seed] for by_seed in futures]


@torch.inference_mode()
def sample_batch(
    model: Any, inputs: Mapping[str, torch.Tensor], sampling: Sampling, generators: Sequence[torch.Generator]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Samples for W windows of one prompt each, with one generator each.

    Independent samples are those of N calls with one sample each. They are N copies of a window in one call, since
    the copies read their noise from its generator one after the other.

    Returns:
        Logits (W, 1, N, h, w), and IoU scores (W, 1, N) if the model has them.

    Raises:
        UserError: see `evaluate_dataset`.
    """
    count, generators = sampling.num_samples, list(generators)
    if sampling.independent:
        copies = torch.arange(len(generators)).repeat_interleave(count).split(INDEPENDENT_AT_ONCE)
        parts = [
            model.sample(
                **{name: value[part.to(value.device)] for name, value in inputs.items()},
                num_samples=1,
                generator=[generators[index] for index in part.tolist()],
            )
            for part in copies
        ]
        pred_masks = torch.cat([part.pred_masks for part in parts]).unflatten(0, (-1, count)).flatten(1, 3)[:, None]
        scores = [score for part in parts if (score := getattr(part, "iou_scores", None)) is not None]
        iou_scores = torch.cat(scores).reshape(-1, 1, count) if scores else None
    else:
        output = model.sample(**inputs, num_samples=sampling.num_candidates or count, generator=generators)
        if sampling.num_candidates:
            output = thin_samples(output, count)
        pred_masks, iou_scores = output.pred_masks, getattr(output, "iou_scores", None)
    if pred_masks.shape[2] != count:
        raise UserError(f"sample() returned {pred_masks.shape[2]} masks instead of {count}")
    if not torch.isfinite(pred_masks).all():
        raise UserError("sample() returned logits that are not finite; the model's training may have diverged")
    return pred_masks, iou_scores


@torch.inference_mode()
def cut_samples(
    processor: Any, pred_masks: torch.Tensor, iou_scores: torch.Tensor | None, batch: Batch
) -> list[list[WindowSamples]]:
    """The samples of each row, by window, at the image's resolution."""
    result: list[list[WindowSamples]] = [[] for _ in batch.rows]
    parts = cut_windows(processor, pred_masks, *batch.places)
    scores = [None] * len(batch.owners) if iou_scores is None else iou_scores[:, 0].float().cpu().numpy()
    for (index, _), (rows, columns, logits), score in zip(batch.owners, parts, scores, strict=True):
        bits = np.packbits((logits > 0).cpu().numpy())
        result[index].append(WindowSamples(rows, columns, bits, logits.sigmoid().cpu().numpy(), score))
    return result


def cut_windows(
    processor: Any, pred_masks: torch.Tensor, windows: torch.Tensor, original_sizes: torch.Tensor
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """For each of W windows its rows and columns of the image, and the logits (N, h, w) there, in float32.

    One window at a time, since logits at the resolution of the image are larger by far.

    Args:
        processor: see `evaluate_dataset`.
        pred_masks: (W, 1, N, h, w).
        windows: (W, 3) of the processor.
        original_sizes: (W, 2) of the processor.
    """
    places = zip(pred_masks, windows.tolist(), original_sizes.tolist(), strict=True)
    for masks, (x, y, side), (height, width) in places:
        rows, columns = slice(max(y, 0), min(y + side, height)), slice(max(x, 0), min(x + side, width))
        # As if the window's part were the image
        window = torch.tensor([[x - columns.start, y - rows.start, side]])
        size = torch.tensor([[rows.stop - rows.start, columns.stop - columns.start]])
        (logits,) = processor.post_process_logits(masks[None], window, size)
        yield rows, columns, logits.float()


@torch.inference_mode()
def latent_states(model: Any, batch: Batch, generators: Sequence[torch.Generator]) -> list[dict[str, Any]]:
    """What `slice_collapse` returns for each row, whose readers are those of its only window.

    Rows with equal numbers of readers share a call of the model; a generator per row is the source of its noise.
    """
    by_readers: dict[int, list[int]] = {}
    for index, row in enumerate(batch.rows):
        by_readers.setdefault(len(row.bits), []).append(index)
    result: dict[int, dict[str, Any]] = {}
    for indices in by_readers.values():
        windows = [batch.rows[index].windows[0][1] for index in indices]
        labels = torch.from_numpy(np.concatenate([window["labels"] for window in windows])).bool()  # (G, 1, R, h, w)
        annotated = torch.from_numpy(np.concatenate([window["annotated"] for window in windows]))  # (G, 1, R)
        inputs = {name: value[indices] for name, value in batch.inputs.items()}
        device = next(iter(inputs.values())).device
        output = model(
            **inputs,
            labels=labels.to(device),
            annotated=annotated.to(device),
            generator=[generators[index] for index in indices],
        )
        arrays = [
            item[:, 0].cpu().numpy()
            for item in (output.kl_divergence, output.posterior_mean, output.reconstructed_masks > 0)
        ]
        for index, *of_row in zip(indices, *arrays, labels[:, 0].numpy(), annotated[:, 0].numpy(), strict=True):
            result[index] = slice_collapse(*of_row)
    return [result[index] for index in range(len(batch.rows))]


# -------------------------------------------------------------------------------------------------------------- scores


def score_samples(
    windows: Sequence[WindowSamples], masks: np.ndarray, by_reader: bool, independent: bool
) -> dict[str, Any]:
    """What `slice_metrics` returns for the samples of a row and the readers' masks (R, H, W).

    Args:
        windows: samples of the row.
        masks: (R, H, W) bool.
        by_reader: there is a window per reader, with the samples for their own box.
        independent: see `slice_metrics`.
    """
    # Of windows and readers: outside this part of the image all masks are empty, and images may be large
    seen = union_mask(masks)
    for window in windows:
        seen[window.rows, window.columns] = True
    part = bounding_box(seen, DILATION_PX)
    readers = masks[:, *part]
    samples: list[np.ndarray] = []
    probabilities: list[np.ndarray] = []
    for window in windows:
        shape = window.probabilities.shape
        rows, columns = (
            slice(cut.start - whole.start, cut.stop - whole.start)
            for cut, whole in zip((window.rows, window.columns), part, strict=True)
        )
        size = (len(window.probabilities), *readers.shape[1:])
        samples.append(np.zeros(size, dtype=bool))
        samples[-1][:, rows, columns] = np.unpackbits(window.bits, count=prod(shape)).reshape(shape)
        probabilities.append(np.full(size, OUTSIDE_PROBABILITY, dtype=np.float32))
        probabilities[-1][:, rows, columns] = window.probabilities
    owners = np.repeat(np.arange(len(masks)), len(samples[0])) if by_reader else None
    scores = [window.iou_scores for window in windows if window.iou_scores is not None]
    iou_scores = np.concatenate(scores) if scores and not by_reader else None
    outside = (seen.size - readers[0].size, OUTSIDE_PROBABILITY)
    return slice_metrics(
        np.concatenate(samples), np.concatenate(probabilities), readers, owners, independent, iou_scores, outside
    )


class Oracle:
    """A source of samples that sees the readers' masks, and bounds what a model can reach.

    Args:
        kind: one of `ORACLES`.
    """

    def __init__(self, kind: str):
        self.kind = kind

    def sample(self, masks: np.ndarray, num_samples: int, generator: torch.Generator) -> np.ndarray:
        """Samples (N, H, W) for readers' masks (R, H, W), both boolean.

        `oracle:majority` returns the pixels of strictly more than half of the readers, as in the metrics;
        `oracle:readers` chooses readers at random with replacement.
        """
        if self.kind == "oracle:majority":
            return np.repeat(majority_mask(masks)[None], num_samples, axis=0)
        return masks[torch.randint(len(masks), (num_samples,), generator=generator).numpy()]


def score_oracle(
    oracle: Oracle, masks: np.ndarray, num_samples: int, seed: int, independent: bool = False
) -> dict[str, Any]:
    """What `slice_metrics` returns for an oracle and readers' masks (R, H, W).

    In the column `shape`, which leaves out empty masks, the oracle sees the other readers only. The majority of all
    readers would often be empty there.
    """

    def score(readers: np.ndarray) -> dict[str, Any]:
        samples = oracle.sample(readers, num_samples, torch.Generator().manual_seed(seed))
        return slice_metrics(samples, samples.astype(float), readers, independent=independent)

    scores = score(masks)
    if scores["shape"] is not None:
        rates = {name: scores["shape"][name] for name in OF_ALL_MASKS}
        scores["shape"] = score(masks[masks.any(axis=(-2, -1))])["shape"] | rates
    return scores
