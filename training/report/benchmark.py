"""Measure the cost of sampling, training and evaluation relative to a reference: a table of ratios and a JSON file.

    python training/report/benchmark.py --output bench.json --device cpu
    python training/report/benchmark.py --output bench_cuda.json --device cuda

Each row compares our code with a reference. Both run in one process, alternating (A, B, A, B, ...) after a warm-up run
of each; the ratio is that of the medians. Peak memory and import times are measured in subprocesses. The slices per
second of training and evaluation are those of `training/train.py` and of `evaluation.evaluate_dataset` on phantom
slices, which need pylidc but no download. Large batches are measured on CUDA only; what does not depend on the device,
the embedding cache and several processes are measured on the CPU only. The machine should be idle; its load at the
start is recorded. `--quick` uses small sizes and few repeats to test the script; its numbers are meaningless.
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder

from probabilistic_sam import ProbabilisticSamConfig, ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.conversion import mobile_sam_config
from probabilistic_sam.data.format import FEATURES, decode_image, decode_masks, encode_png, load_split
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.evaluation import evaluate_dataset
from probabilistic_sam.files import write_json
from probabilistic_sam.hub.staging import EXAMPLES
from probabilistic_sam.inference import choose_device
from probabilistic_sam.metrics.functional import ged, iou_matrix
from probabilistic_sam.provenance import provenance
from probabilistic_sam.training.config import read_config
from probabilistic_sam.training.embedding_cache import EmbeddingCache
from probabilistic_sam.training.models import freeze
from probabilistic_sam.training.windows import plain_view, view_pixel_values
from probabilistic_sam.workers import default_workers, start_workers

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "model_cards" / "psam-lidc"
CONFIGS = ROOT / "training" / "configs"
CPU = torch.device("cpu")
PACKAGES = ("torch", "transformers", "numpy", "datasets")
NUM_SAMPLES, MANY_SAMPLES, NUM_READERS = 16, 100, 4
COUNTS = (1, 4, 16, 64)  # samples, for the cost of one more
ENERGY_WEIGHT = 200.0  # as in the configurations under training/configs
IMAGES_AT_ONCE = (1, 16)  # on CUDA
ENCODERS = {  # configuration of each device, and how its encoder is used
    "cpu": ("psam_lidc.yaml", ("cached",)),
    "cuda": ("psam_lidc_gpu.yaml", ("frozen", "trained")),
}
CPU_SIZES: dict[str, Any] = {
    "repeats": 5, "num_rows": 64, "num_slices": 2000, "loop_slices": 20, "image_sizes": (128, 256, 512, 1024),
    "num_nodules": 64, "num_steps": 11, "eval_slices": 80,
}  # fmt: skip
CUDA_SIZES: dict[str, Any] = {"repeats": 20, "num_nodules": 256, "num_steps": 1000, "eval_slices": 1000}
QUICK_SIZES: dict[str, Any] = {
    "repeats": 1, "num_rows": 4, "num_slices": 4, "loop_slices": 2, "image_sizes": (64, 128), "num_nodules": 24,
    "num_steps": 2, "eval_slices": 2,
}  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write (JSON)")
    parser.add_argument("--device", choices=tuple(ENCODERS), help="by default cuda if available, otherwise cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats, to test the script")
    args = parser.parse_args(argv)
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise UserError(f"--output is {args.output}; accepted: a file in an existing folder")
    return args


# -------------------------------------------------------------------------------------------------------- measuring


def wait_for(device: torch.device) -> None:
    """Wait until a CUDA device has done all its work, which is queued; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(*ways: Callable[[], Any], repeats: int, device: torch.device = CPU) -> list[float]:
    """Median seconds of each of several functions that run in turns on a device, after one warm-up turn."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, seconds in zip(ways, times, strict=True):
            wait_for(device)
            started = time.perf_counter()
            way()
            wait_for(device)
            if turn:
                seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in times]


def row(what: str, against: str, ratio: float | None, **context: Any) -> dict:
    """One line of the table.

    Args:
        what: what is measured; "(speed-up)" marks ratios of speeds, all others are ratios of times or sizes.
        against: the reference.
        ratio: of the two, or None if it cannot be measured on this machine.
        context: seconds and other numbers that explain the ratio.
    """
    return {"what": what, "against": against, "ratio": ratio, **context}


def check_same(what: str, same: bool) -> None:
    """Stop if both sides of a comparison give different results.

    Raises:
        UserError: they do.
    """
    if not same:
        raise UserError(f"{what}: results differ from those of the reference, so their costs cannot be compared")


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def peak_memory(action: Callable[[], Any], device: torch.device = CPU) -> tuple[int, int] | None:
    """Bytes in use before an action and their peak during it.

    On CUDA, those that PyTorch's allocator has handed out. Otherwise the resident bytes of this process, or None
    without Linux's /proc. `resource.getrusage(RUSAGE_SELF).ru_maxrss` is not suitable: it counts from the start of the
    process, so loading the model can hide the peak of the action, and a child process inherits the peak of its parent.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        action()
        return allocated, torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = memory_field(status, "VmRSS")
        action()
        return before, memory_field(status, "VmHWM")
    except OSError:
        return None


def memory_field(status: Path, name: str) -> int:
    """A field of /proc/PID/status in bytes."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def count_flops(action: Callable[[], Any]) -> int:
    """Floating-point operations of matrix products and convolutions; a multiply-add counts as two.

    Attention uses the unfused kernel, because the counter does not support the fused CPU kernel.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------- models, inputs


def vit_b(image_size: int) -> ProbabilisticSamModel:
    """SAM's ViT-B with random weights at any image size.

    SAM's default `initializer_range` of the vision encoder is 1e-10, which gives the same embeddings for all images.
    """
    torch.manual_seed(0)
    vision, prompt = {"image_size": image_size, "initializer_range": 0.02}, {"image_size": image_size}
    return ProbabilisticSamModel(ProbabilisticSamConfig(vision_config=vision, prompt_encoder_config=prompt)).eval()


def plain_decoder(model: ProbabilisticSamModel) -> SamMaskDecoder:
    """The mask decoder of transformers with the weights of the mask decoder of a model."""
    decoder = SamMaskDecoder(model.config.mask_decoder_config)
    decoder.load_state_dict(model.mask_decoder.state_dict())
    return decoder.to(model.device).eval()


def plain_sam(model: ProbabilisticSamModel) -> SamModel:
    """The `SamModel` of transformers with the encoders of a model and `plain_decoder`."""
    config = SamConfig(
        prompt_encoder_config=model.config.prompt_encoder_config.to_dict(),
        mask_decoder_config=model.config.mask_decoder_config.to_dict(),
    )
    with torch.device("meta"):
        sam = SamModel(config)
    for name in ("shared_image_embedding", "vision_encoder", "prompt_encoder"):
        setattr(sam, name, getattr(model, name))
    sam.mask_decoder = plain_decoder(model)
    return sam.eval()


def image_and_box(model: ProbabilisticSamModel, images: int = 1) -> dict[str, torch.Tensor]:
    """Noise (images, 3, S, S), and for each a centred box of S / 4 pixels per side, on the device of a model."""
    size = model.config.vision_config.image_size
    pixel_values = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[0.375, 0.375, 0.625, 0.625]]]).expand(images, -1, -1) * size
    return {"pixel_values": pixel_values.to(model.device), "input_boxes": boxes.to(model.device)}


def prompts_of_one_image(model: ProbabilisticSamModel, count: int) -> tuple[torch.Tensor, ...]:
    """Inputs of both decoders: image embeddings, their positions, sparse (1, count, T, C) and dense embeddings."""
    inputs = image_and_box(model)
    with torch.no_grad():
        embedded = model.embed(model.encode(inputs["pixel_values"]), None, None, inputs["input_boxes"], None)
        image, sparse, dense, *_ = embedded[3]
        noise = torch.randn(1, count, 1, model.config.latent_dim - 1, generator=torch.Generator().manual_seed(0))
        sparse = sparse[:, None] + model.latent_proj(noise.to(model.device))
        return image, model.get_image_wide_positional_embeddings(), sparse, dense


def no_details(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of an untrained detail network (zeros) at the decoder's two finer resolutions, from (B, C, g, g)."""
    batch, channels, grid, _ = image.shape
    middle, fine = (batch, channels // 4, 2 * grid, 2 * grid), (batch, channels // 8, 4 * grid, 4 * grid)
    return image.new_zeros(middle), image.new_zeros(fine)


def reader_rows(count: int, size: int = 128) -> datasets.Dataset:
    """Rows with the columns that the embedding cache reads: noise, and discs of four readers."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    distance = np.hypot(y - size / 2, x - size / 2)
    masks = [encode_png(distance < size / 16 + reader) for reader in range(NUM_READERS)]
    images = [encode_png(rng.integers(0, 255, size=(size, size)).astype(np.uint8)) for _ in range(count)]
    features = datasets.Features({name: FEATURES[name] for name in ("image", "masks")})
    return datasets.Dataset.from_dict({"image": images, "masks": [masks] * count}, features=features)


# ------------------------------------------------------------------------------------------------------------- rows


@torch.no_grad()
def measure_sampling(
    model: ProbabilisticSamModel, name: str, repeats: int, images: int = 1, bf16: bool = False
) -> dict:
    """16 samples of each of several images, compared with one mask of `SamModel`."""
    what, against = f"{NUM_SAMPLES} samples, {name}", "1 mask of SAM"
    what += (f", {images} images" if images > 1 else "") + (", bfloat16" if bf16 else "")
    sam, inputs = plain_sam(model), image_and_box(model, images)
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            ours, other = interleave(
                lambda: model.sample(**inputs, num_samples=NUM_SAMPLES),
                lambda: sam(**inputs, multimask_output=False),
                repeats=repeats,
                device=model.device,
            )
    except torch.OutOfMemoryError:  # of a small GPU; the other rows are still measured
        return row(what, against, None)
    return row(what, against, ours / other, seconds=[ours, other])


@torch.no_grad()
def measure_decoding(model: ProbabilisticSamModel, name: str, repeats: int) -> dict:
    """Our mask decoder compared with that of transformers, on the same 16 prompts of one image.

    In float64, logits may differ by 1e-9 times the largest logit, or by 1e-9 if that is below 1. The difference in
    float32 is reported only: it depends on the device, whose convolutions may use TF32.
    """
    decoder, embeddings = plain_decoder(model), prompts_of_one_image(model, NUM_SAMPLES)
    details = no_details(embeddings[0])
    difference, largest = decoder_difference(model.mask_decoder, decoder, embeddings)
    exact = [copy.deepcopy(item).double() for item in (model.mask_decoder, decoder)]
    exact_difference, _ = decoder_difference(*exact, [item.double() for item in embeddings])
    ours, other = interleave(
        lambda: model.mask_decoder(*embeddings, *details),
        lambda: decoder(*embeddings, multimask_output=False),
        repeats=repeats,
        device=model.device,
    )
    what = f"decoding {NUM_SAMPLES} latents, {name}"
    check_same(what, exact_difference <= 1e-9 * max(largest, 1))
    return row(
        what, "SamMaskDecoder", ours / other, seconds=[ours, other], largest_difference=difference,
        largest_difference_float64=exact_difference, largest_logit=largest,
    )  # fmt: skip


def decoder_difference(ours: Any, other: SamMaskDecoder, embeddings: Sequence[torch.Tensor]) -> tuple[float, float]:
    """Largest difference of masks and scores of both decoders, and the largest logit."""
    masks, scores = ours(*embeddings, *no_details(embeddings[0]))
    expected, expected_scores = other(*embeddings, multimask_output=False)
    pairs = ((masks, expected[:, :, 0]), (scores, expected_scores[:, :, 0]))
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs), float(expected.abs().max())


def measure_memory(model: ProbabilisticSamModel, name: str) -> dict:
    """Peak memory of 100 samples compared with 16, each measured in a new process on the device of the model.

    The ratio is that of the memory in excess of the loaded model, which is stricter than that of whole processes. Both
    include the first use of each library.
    """
    what, against = f"peak memory, {MANY_SAMPLES} samples, {name}", f"{NUM_SAMPLES} samples"
    needed, whole = [], []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for count in (MANY_SAMPLES, NUM_SAMPLES):
            arguments = ("--memory", folder, str(count), str(model.device))
            command = [sys.executable, str(Path(__file__).resolve()), *arguments]
            answer = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            if answer is None:
                return row(what, against, None)
            needed.append(answer[1] - answer[0])
            whole.append(answer[1])
    return row(
        what, against, needed[0] / needed[1],
        mebibytes=[round(item / 2**20, 1) for item in needed],
        process_mebibytes=[round(item / 2**20, 1) for item in whole], process_ratio=whole[0] / whole[1],
    )  # fmt: skip


def report_memory(folder: str, num_samples: int, device: torch.device) -> None:
    """The subprocess of `measure_memory`: print the result of `peak_memory`."""
    model = ProbabilisticSamModel.from_pretrained(folder).to(device)
    inputs = image_and_box(model)
    print(json.dumps(peak_memory(lambda: model.sample(**inputs, num_samples=num_samples), device)))


def training_steps(model: ProbabilisticSamModel, readers: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """Our training step (all readers, cached embeddings) and the reference (encoder pass, one reader).

    Both train the same copy of the model on one image. Our loss includes the energy distance, which decodes additional
    masks; the loss of the reference does not.
    """
    model = copy.deepcopy(model).train()
    freeze(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    inputs = image_and_box(model)
    pixel_values, boxes = inputs["pixel_values"], inputs["input_boxes"]
    cached = model.get_image_embeddings(pixel_values).half()
    side = 4 * model.config.prompt_encoder_config.image_embedding_size
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    distance = torch.hypot(y - side / 2, x - side / 2)
    labels = torch.stack([distance < side * (0.1 + 0.01 * reader) for reader in range(readers)])[None, None]

    def step(embeddings: torch.Tensor, labels: torch.Tensor, energy_weight: float) -> None:
        model.config.energy_weight = energy_weight
        model(image_embeddings=embeddings, input_boxes=boxes, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return (
        lambda: step(cached.float(), labels, ENERGY_WEIGHT),
        lambda: step(model.get_image_embeddings(pixel_values), labels[:, :, :1], 0.0),
    )


def measure_training(model: ProbabilisticSamModel, name: str, repeats: int) -> dict:
    """Images x readers per second of our training step, compared with the reference."""
    ours, other = interleave(*training_steps(model, NUM_READERS), repeats=repeats)
    return row(
        f"training step, {NUM_READERS} readers, cached embeddings, {name} (speed-up)",
        "encoder pass and 1 reader per step", NUM_READERS * other / ours, seconds=[ours, other],
        images_readers_per_second=[NUM_READERS / ours, 1 / other],
    )  # fmt: skip


def measure_cache(model: ProbabilisticSamModel, processor: Any, num_rows: int, repeats: int) -> dict:
    """Building the embedding cache, compared with encoding the same windows; its size, and that it is reused."""
    rows = reader_rows(num_rows)
    encoded = 0

    def count(module: Any, args: tuple, output: Any) -> None:
        nonlocal encoded
        encoded += len(args[0])

    def encode_all() -> None:
        for start in range(0, num_rows, 16):
            pixels = []
            for index in range(start, min(start + 16, num_rows)):
                view = plain_view(decode_masks(rows[index]), processor)
                pixels.append(view_pixel_values(decode_image(rows[index]), view, processor))
            model.get_image_embeddings(torch.stack(pixels))

    folders = itertools.count()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):

        def build() -> EmbeddingCache:
            return EmbeddingCache(model, processor, rows, 0, 0, Path(folder) / str(next(folders)))

        ours, other = interleave(build, encode_all, repeats=repeats)
        with model.vision_encoder.register_forward_hook(count):
            built = build()
            first, encoded = encoded, 0
            again = EmbeddingCache(model, processor, rows, 0, 0, built.path.parent)
            np.array(again.embeddings)  # reads all of them, as an epoch does
            second = encoded
        size, header = built.path.stat().st_size, 128  # bytes, padded by numpy
        expected = built.embeddings.size * 2 + header
    return row(
        f"building the embedding cache, {num_rows} images", "encoding alone", ours / other, seconds=[ours, other],
        bytes=size, computed_bytes=expected, encoded_first=first, encoded_second=second,
    )  # fmt: skip


def loop_ged(samples: np.ndarray, readers: np.ndarray) -> float:
    """GED of masks (N, H, W) and (M, H, W) by a double loop over pairs, the straightforward implementation."""

    def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
        total = 0.0
        for one in a:
            for other in b:
                union = np.logical_or(one, other).sum()
                total += 1 - np.logical_and(one, other).sum() / union if union else 0.0
        return total / (len(a) * len(b))

    return 2 * mean_distance(samples, readers) - mean_distance(samples, samples) - mean_distance(readers, readers)


def disc_slice(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """100 samples and 4 readers of a slice: discs the size of a lesion, a fifth of them empty."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    count = MANY_SAMPLES + NUM_READERS
    radii = rng.uniform(size / 32, size / 8, size=count) * (rng.random(count) < 0.8)
    centres = rng.uniform(0.45 * size, 0.55 * size, size=(count, 2))
    masks = np.hypot(y - centres[:, 0, None, None], x - centres[:, 1, None, None]) < radii[:, None, None]
    return masks[:MANY_SAMPLES], masks[MANY_SAMPLES:]


def measure_ged(num_slices: int, loop_slices: int, repeats: int, size: int = 128) -> dict:
    """Our GED compared with the double loop on the first `loop_slices`, and ours alone on all `num_slices`.

    The time of the double loop is proportional to the number of slices, so it is not run on all of them.
    """
    slices = [disc_slice(seed, size) for seed in range(loop_slices)]
    difference = max(abs(ged(*item).ged - loop_ged(*item)) for item in slices)
    ours, other = interleave(
        lambda: [ged(*item) for item in slices], lambda: [loop_ged(*item) for item in slices], repeats=repeats
    )
    total = 0.0
    for seed in range(num_slices):
        item = disc_slice(seed, size)
        started = time.perf_counter()
        ged(*item)
        total += time.perf_counter() - started
    what = f"GED, {MANY_SAMPLES} samples, {NUM_READERS} readers (speed-up)"
    check_same(what, difference <= 1e-6)
    return row(
        what, "NumPy double loop over pairs", other / ours,
        seconds=[ours, other], slices=loop_slices, largest_difference=difference,
        all_slices=num_slices, seconds_all_slices=total,
    )  # fmt: skip


def measure_imports(repeats: int) -> dict:
    """`import probabilistic_sam` compared with importing SAM alone, in new processes, start of Python included."""
    what, against = "import probabilistic_sam", "from transformers import SamModel"
    ours, other = interleave(
        *(
            lambda code=code: subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
            for code in (what, against)
        ),
        repeats=repeats,
    )
    return row(what, against, ours / other, seconds=[ours, other])


@torch.no_grad()
def measure_one_more_sample(model: ProbabilisticSamModel, name: str, repeats: int) -> dict:
    """Slope of the time of N samples of an encoded image, compared with an encoder pass."""
    inputs = image_and_box(model)
    embeddings, boxes = model.get_image_embeddings(inputs["pixel_values"]), inputs["input_boxes"]
    ways = [
        lambda count=count: model.sample(image_embeddings=embeddings, input_boxes=boxes, num_samples=count)
        for count in COUNTS
    ]
    *seconds, encoder = interleave(*ways, lambda: model.get_image_embeddings(inputs["pixel_values"]), repeats=repeats)
    slope, intercept = fit_line(COUNTS, seconds)
    return row(
        f"one more sample, {name}", "one encoder pass", slope / encoder, counts=list(COUNTS),
        seconds=[slope, encoder], seconds_by_count=seconds, slope=slope, intercept=intercept,
    )  # fmt: skip


@torch.no_grad()
def measure_bf16(model: ProbabilisticSamModel, inputs: dict[str, torch.Tensor], name: str, repeats: int) -> dict:
    """Sampling under bfloat16 autocast compared with float32: time, and IoU of masks with the same seed."""

    def sample(bf16: bool) -> torch.Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            generator = torch.Generator().manual_seed(0)
            return model.sample(**inputs, num_samples=NUM_SAMPLES, generator=generator).pred_masks

    inputs = {key: value.to(model.device) for key, value in inputs.items()}
    pairs = zip(*((sample(bf16) > 0).flatten(0, 2).cpu().numpy() for bf16 in (True, False)), strict=True)
    ious = [float(iou_matrix(half[None], full[None])[0, 0]) for half, full in pairs]
    ours, other = interleave(lambda: sample(True), lambda: sample(False), repeats=repeats, device=model.device)
    return row(
        f"{NUM_SAMPLES} samples in bfloat16, {name}", "float32", ours / other, seconds=[ours, other],
        mean_iou=statistics.mean(ious), least_iou=min(ious),
    )  # fmt: skip


def measure_speeds(
    model: ProbabilisticSamModel, processor: Any, data: Path, num_steps: int, eval_slices: int
) -> dict[str, float]:
    """Slices per second of training and evaluation on the device of the released model, by what is measured."""
    device = model.device.type
    config, encoders = ENCODERS[device]
    speeds = {f"training, encoder {name}": training_speed(data, device, config, name, num_steps) for name in encoders}
    return speeds | {"evaluation": evaluation_speed(model, processor, data, eval_slices)}


def training_speed(data: Path, device: str, config: str, encoder: str, num_steps: int, processes: int = 1) -> float:
    """Slices per second of `training/train.py`, which starts from the released weights.

    The time is that of the run's log, from its first line to its last, so it includes neither the start nor
    validation. To write a line, the run waits for its device.
    """
    energy = {"energy_start_step": 0, "energy_ramp_steps": 0}  # its full cost from the first step
    rare = {"eval_every": num_steps, "eval_slices": 2, "checkpoint_every": num_steps}
    log_every = max(1, num_steps // 10)
    fields = {"base_model": SHIPPED, "encoder": encoder, "num_views": 1, "log_every": log_every, **energy, **rare}
    if device == "cpu":
        fields["mixed_precision"] = "no"  # bfloat16 is many times slower on CPUs that do not compute in it
    with tempfile.TemporaryDirectory() as folder:
        start(
            processes, device, "train.py", "--config", CONFIGS / config, "--dataset", data, "--output_dir", folder,
            "--cache_dir", data.parent / "cache", "--max_steps", num_steps,
            *(f"{key}={value}" for key, value in fields.items()),
        )  # fmt: skip
        batch_size = read_config(Path(folder) / "training_config.yaml").batch_size
        lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "loss" in line]
    return batch_size * (last["step"] - first["step"]) / (last["seconds"] - first["seconds"])


def evaluation_speed(model: ProbabilisticSamModel, processor: Any, data: Path, num_slices: int) -> float:
    """Slices per second of `evaluate_dataset`, with as many workers and slices per batch as `training/evaluate.py`.

    The workers are started by a first evaluation, whose time does not count.
    """
    rows = load_split(str(data), "train")
    rows = rows.select(range(min(num_slices, len(rows))))
    on_cpu = model.device.type == "cpu"
    state, batch_size = PartialState(cpu=on_cpu), 8 if on_cpu else 64
    num_workers, _ = default_workers(model.device, len(rows))
    with start_workers(num_workers) as workers:
        (seconds,) = interleave(
            lambda: evaluate_dataset(
                model, processor, rows, "union_box", NUM_SAMPLES, (0,), batch_size, state, model.device,
                workers=workers,
            ),
            repeats=1,
            device=model.device,
        )  # fmt: skip
    return len(rows) / seconds


def measure_processes(alone: dict[str, float], data: Path, num_steps: int, eval_slices: int) -> list[dict]:
    """Training and evaluation of the released model by two processes, compared with one process with as many threads.

    Args:
        alone: what `measure_speeds` returns on the CPU.
        data: see there, also for the arguments that follow.
        num_steps: see there.
        eval_slices: see there.
    """
    config, (encoder,) = ENCODERS["cpu"]
    scores = data.parent / "scores.json"
    options = ("--dataset", data, "--split", "train", "--max_slices", eval_slices, "--device", "cpu")
    start(2, "cpu", "evaluate.py", *options, "--model", SHIPPED, "--output", scores)
    content = json.loads(scores.read_text())
    training, evaluation = alone
    together = {
        training: training_speed(data, "cpu", config, encoder, num_steps, processes=2),
        evaluation: content["num_slices"] / content["seconds"],
    }
    return [
        row(
            f"{what}, 2 processes (speed-up)",
            "1 process, same number of threads",
            together[what] / speed,
            per_second=[together[what], speed],
        )
        for what, speed in alone.items()
    ]


def start(processes: int, device: str, script: str, *arguments: Any) -> None:
    """Run a script of `training` in several processes that share the threads."""
    command = [sys.executable]
    if processes > 1:
        launcher = CONFIGS / "accelerate" / "cpu_two_processes.yaml"
        command += ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", str(launcher)]
    command += [str(ROOT / "training" / script), *map(str, arguments)]
    environment = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    environment |= {"ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{script} with {processes} processes failed: {(done.stderr.strip() or '?').splitlines()[-1]}")


# ------------------------------------------------------------------------------------------------ FLOPs and scaling


def arithmetic(model: ProbabilisticSamModel) -> dict[str, int]:
    """Floating-point operations of the parts, which bound the ratios."""
    model = copy.deepcopy(model).requires_grad_(False)  # the counter fails under no_grad
    inputs = image_and_box(model)
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    one, two = (prompts_of_one_image(model, count) for count in (1, 2))
    details, decoder = no_details(one[0]), plain_decoder(model).requires_grad_(False)
    first, both = (count_flops(lambda item=item: model.mask_decoder(*item, *details)) for item in (one, two))
    parts = model.embed(embeddings, None, None, inputs["input_boxes"], None)
    return {
        "encoder": count_flops(lambda: model.encode(inputs["pixel_values"])),
        "prompt_and_details": count_flops(lambda: model.embed(embeddings, None, None, inputs["input_boxes"], None)),
        "prior": count_flops(lambda: model.prior(parts[1], parts[2])),
        "decoder_first_sample": first,
        "decoder_each_other_sample": both - first,
        "sam_decoder_each_prompt": count_flops(lambda: decoder(*one, multimask_output=False)),
    }


def growth(model: ProbabilisticSamModel, image_sizes: Sequence[int], repeats: int) -> dict[str, dict[int, float]]:
    """Seconds by number of prompts, by number of readers in a training step, and by image size.

    With 16 samples per prompt. The image is already encoded, except in the times by image size.
    """
    inputs = image_and_box(model)
    embeddings, boxes = model.get_image_embeddings(inputs["pixel_values"]), inputs["input_boxes"]
    several = (1, 2, 4, 8)
    sampling = [
        lambda count=count: model.sample(
            image_embeddings=embeddings, input_boxes=boxes.expand(-1, count, -1), num_samples=NUM_SAMPLES
        )
        for count in several
    ]
    steps = [training_steps(model, count)[0] for count in several]
    models = [ProbabilisticSamModel(mobile_sam_config(size)).eval() for size in image_sizes]
    whole = [lambda item=item: item.sample(**image_and_box(item), num_samples=NUM_SAMPLES) for item in models]
    return {
        "prompts": dict(zip(several, interleave(*sampling, repeats=repeats), strict=True)),
        "readers": dict(zip(several, interleave(*steps, repeats=repeats), strict=True)),
        "image_size": dict(zip(image_sizes, interleave(*whole, repeats=repeats), strict=True)),
    }


# -------------------------------------------------------------------------------------------------------------- all


def example_inputs(processor: ProbabilisticSamProcessor) -> dict[str, torch.Tensor]:
    """The example images and their boxes as inputs of `sample`."""
    from PIL import Image

    examples = json.loads((EXAMPLES / "examples.json").read_text(encoding="utf-8"))["images"]
    images = [np.asarray(Image.open(EXAMPLES / item["image"])) for item in examples]
    return dict(processor(images=images, input_boxes=[[item["box"]] for item in examples], return_tensors="pt"))


def cpu_rows(
    models: dict[str, ProbabilisticSamModel],
    processor: ProbabilisticSamProcessor,
    repeats: int,
    num_rows: int,
    num_slices: int,
    loop_slices: int,
) -> Iterator[dict]:
    """The rows of the CPU; for the arguments see `measure_all`."""
    large, small = models
    yield measure_imports(repeats)
    yield measure_ged(num_slices, loop_slices, repeats)
    for name, model in models.items():
        yield measure_sampling(model, name, repeats)
        yield measure_decoding(model, name, repeats)
        yield measure_memory(model, name)
    yield measure_training(models[large], large, repeats)
    for name, model in models.items():
        yield measure_one_more_sample(model, name, repeats)
    yield measure_cache(models[small], processor, num_rows, repeats)
    yield measure_bf16(models[small], example_inputs(processor), small, repeats)


def cuda_rows(
    models: dict[str, ProbabilisticSamModel], processor: ProbabilisticSamProcessor, repeats: int
) -> Iterator[dict]:
    """The rows of CUDA; for the arguments see `measure_all`."""
    _, small = models
    for name, model in models.items():
        for images, bf16 in itertools.product(IMAGES_AT_ONCE, (False, True)):
            yield measure_sampling(model, name, repeats, images, bf16)
        yield measure_decoding(model, name, repeats)
        yield measure_memory(model, name)
    yield measure_bf16(models[small], example_inputs(processor), small, repeats)


def measure_all(
    models: dict[str, ProbabilisticSamModel],
    processor: ProbabilisticSamProcessor,
    repeats: int,
    num_nodules: int,
    num_steps: int,
    eval_slices: int,
    image_sizes: Sequence[int] = (),
    **of_cpu: int,
) -> dict[str, Any]:
    """All rows of the table and all speeds; on the CPU also FLOPs and scaling.

    Args:
        models: ViT-B with random weights and the released model, by name and on their device.
        processor: of the released model.
        repeats: number of turns of each comparison.
        num_nodules: of the phantom slices.
        num_steps: see `training_speed`.
        eval_slices: number of slices that are evaluated.
        image_sizes: see `growth`; only on the CPU, like all that follow.
        of_cpu: `num_rows`, images in the embedding cache; `num_slices` and `loop_slices`, see `measure_ged`.
    """
    small = list(models.values())[-1]
    on_cpu = small.device.type == "cpu"
    rows = shown(cpu_rows(models, processor, repeats, **of_cpu) if on_cpu else cuda_rows(models, processor, repeats))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        jobs = ("--num-nodules", num_nodules, "--num-proc", torch.get_num_threads())
        start(1, "cpu", "build_dataset.py", "phantom", "--output", data, *jobs)
        speeds = measure_speeds(small, processor, data, num_steps, eval_slices)
        print("\n".join(f"{what:<105} {speed:.4g} slices/s" for what, speed in speeds.items()), flush=True)
        if on_cpu:
            rows += shown(measure_processes(speeds, data, num_steps, eval_slices))
    content: dict[str, Any] = {"rows": rows, "slices_per_second": speeds}
    if on_cpu:
        content["flops"] = {name: arithmetic(model) for name, model in models.items()}
        content["growth_seconds"] = growth(small, image_sizes, repeats)
    return content


def shown(rows: Iterable[dict]) -> list[dict]:
    """Rows, each printed when it is measured."""
    result = []
    for item in rows:
        print(format_rows([item]), flush=True)
        result.append(item)
    return result


def format_rows(rows: Sequence[dict]) -> str:
    """Rows as text: ratios with seconds or sizes."""
    lines = []
    for item in rows:
        ratio = "-" if item["ratio"] is None else f"{item['ratio']:.3g} x"
        context = " / ".join(f"{seconds:.4g} s" for seconds in item.get("seconds", ()))
        if "mebibytes" in item:
            context = " / ".join(f"{size:g} MiB" for size in item["mebibytes"])
        line = f"{item['what']:<70} {item['against']:<34} {ratio:>9} {context}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all measurements and write the file."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--memory"]:  # the subprocess of `measure_memory`
        report_memory(argv[1], int(argv[2]), torch.device(argv[3]))
        return
    args = parse_args(argv)
    device = choose_device(args.device)
    origin, load = provenance(ROOT, PACKAGES), os.getloadavg()
    if load[0] > 0.5:
        print(f"the machine is not idle (load {load[0]:.1f}); the times will be unreliable", file=sys.stderr)
    sizes = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
    if args.quick:
        sizes = {name: QUICK_SIZES[name] for name in sizes}
    large, small = vit_b(64 if args.quick else 1024), ProbabilisticSamModel.from_pretrained(SHIPPED).eval()
    models = {
        f"{name} at {model.config.vision_config.image_size}": model.to(device)
        for name, model in (("ViT-B", large), ("shipped", small))
    }
    content = measure_all(models, ProbabilisticSamProcessor.from_pretrained(SHIPPED), **sizes)
    write_json(
        args.output,
        {"quick": args.quick, **sizes, **content, **origin, **describe_machine(device), "load_average": load[0]},
    )
    print(f"wrote {args.output}: {len(content['rows'])} rows")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What is measured on: threads and vector instructions of the CPU, on CUDA also the card and the CUDA version."""
    machine = {"num_threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return machine


if __name__ == "__main__":
    run(main)
