"""Measure the cost of sampling, training and evaluation relative to a reference: a table of ratios and a JSON file.

    python training/report/benchmark.py --output bench.json

Each row compares our code with a reference. Both run in one process, alternating (A, B, A, B, ...) after a warm-up run
of each; the ratio is that of the medians. Peak memory and import times are measured in subprocesses. The machine
should be idle; its load at the start is recorded. `--quick` uses small sizes and few repeats to test the script; its
numbers are meaningless.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder

from probabilistic_sam import ProbabilisticSamConfig, ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.conversion import mobile_sam_config
from probabilistic_sam.data.format import FEATURES, decode_image, decode_masks, encode_png
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.files import write_json
from probabilistic_sam.hub.staging import EXAMPLES
from probabilistic_sam.metrics.functional import ged, iou_matrix
from probabilistic_sam.provenance import provenance
from probabilistic_sam.training.embedding_cache import EmbeddingCache
from probabilistic_sam.training.models import freeze
from probabilistic_sam.training.windows import plain_view, view_pixel_values

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "model_cards" / "psam-lidc"
PACKAGES = ("torch", "transformers", "numpy", "datasets")
NUM_SAMPLES, MANY_SAMPLES, NUM_READERS = 16, 100, 4
COUNTS = (1, 4, 16, 64)  # samples, for the cost of one more
ENERGY_WEIGHT = 200.0  # as in the configurations under training/configs


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file to write (JSON)")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats, to test the script")
    args = parser.parse_args(argv)
    if args.output.is_dir() or not args.output.absolute().parent.is_dir():
        raise UserError(f"--output is {args.output}; accepted: a file in an existing folder")
    return args


# -------------------------------------------------------------------------------------------------------- measuring


def interleave(*ways: Callable[[], Any], repeats: int) -> list[float]:
    """Median seconds of each of several functions that run in turns, after one warm-up turn."""
    times: list[list[float]] = [[] for _ in ways]
    for turn in range(repeats + 1):
        for way, seconds in zip(ways, times, strict=True):
            started = time.perf_counter()
            way()
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


def peak_memory(action: Callable[[], Any]) -> tuple[int, int] | None:
    """Resident bytes of this process before an action and their peak during it; None without Linux's /proc.

    `resource.getrusage(RUSAGE_SELF).ru_maxrss` is not suitable: it counts from the start of the process, so loading
    the model can hide the peak of the action, and a child process inherits the peak of its parent.
    """
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
    return decoder.eval()


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


def image_and_box(model: ProbabilisticSamModel) -> dict[str, torch.Tensor]:
    """Noise (1, 3, S, S) and a centred box of S / 4 pixels per side."""
    size = model.config.vision_config.image_size
    pixel_values = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixel_values, "input_boxes": torch.tensor([[[0.375, 0.375, 0.625, 0.625]]]) * size}


def prompts_of_one_image(model: ProbabilisticSamModel, count: int) -> tuple[torch.Tensor, ...]:
    """Inputs of both decoders: image embeddings, their positions, sparse (1, count, T, C) and dense embeddings."""
    inputs = image_and_box(model)
    with torch.no_grad():
        embedded = model.embed(model.encode(inputs["pixel_values"]), None, None, inputs["input_boxes"], None)
        image, sparse, dense, _ = embedded[3]
        noise = torch.randn(1, count, 1, model.config.latent_dim - 1, generator=torch.Generator().manual_seed(0))
        return image, model.get_image_wide_positional_embeddings(), sparse[:, None] + model.latent_proj(noise), dense


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
def measure_sampling(model: ProbabilisticSamModel, name: str, repeats: int) -> dict:
    """16 samples of an image, compared with one mask of `SamModel`."""
    sam, inputs = plain_sam(model), image_and_box(model)
    ours, other = interleave(
        lambda: model.sample(**inputs, num_samples=NUM_SAMPLES),
        lambda: sam(**inputs, multimask_output=False),
        repeats=repeats,
    )
    return row(f"{NUM_SAMPLES} samples, {name}", "1 mask of SAM", ours / other, seconds=[ours, other])


@torch.no_grad()
def measure_decoding(model: ProbabilisticSamModel, name: str, repeats: int) -> dict:
    """Our mask decoder compared with that of transformers, on the same 16 prompts of one image.

    Logits may differ by 1e-4 times the largest logit, or by 1e-4 if that is below 1: float32 rounds logits of 150 by
    about 1e-4 in either decoder. The difference in float64 is reported too.
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
    )
    what = f"decoding {NUM_SAMPLES} latents, {name}"
    check_same(what, difference <= 1e-4 * max(largest, 1))
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


def measure_memory(folder: Path, name: str) -> dict:
    """Peak memory of 100 samples compared with 16, each measured in a new process.

    The ratio is that of the memory in excess of the loaded model, which is stricter than that of whole processes. Both
    include the first use of each library.
    """
    what, against = f"peak memory, {MANY_SAMPLES} samples, {name}", f"{NUM_SAMPLES} samples"
    needed, whole = [], []
    for count in (MANY_SAMPLES, NUM_SAMPLES):
        command = [sys.executable, str(Path(__file__).resolve()), "--memory", str(folder), str(count)]
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


def report_memory(folder: str, num_samples: int) -> None:
    """The subprocess of `measure_memory`: print the result of `peak_memory`."""
    model = ProbabilisticSamModel.from_pretrained(folder)
    inputs = image_and_box(model)
    print(json.dumps(peak_memory(lambda: model.sample(**inputs, num_samples=num_samples))))


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
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            generator = torch.Generator().manual_seed(0)
            return model.sample(**inputs, num_samples=NUM_SAMPLES, generator=generator).pred_masks

    pairs = zip(*((sample(bf16) > 0).flatten(0, 2).numpy() for bf16 in (True, False)), strict=True)
    ious = [float(iou_matrix(half[None], full[None])[0, 0]) for half, full in pairs]
    ours, other = interleave(lambda: sample(True), lambda: sample(False), repeats=repeats)
    return row(
        f"{NUM_SAMPLES} samples in bfloat16, {name}", "float32", ours / other, seconds=[ours, other],
        mean_iou=statistics.mean(ious), least_iou=min(ious),
    )  # fmt: skip


def measure_processes(num_nodules: int, num_steps: int) -> list[dict]:
    """Training and evaluation of the shipped model by two processes, compared with one process with as many threads.

    The commands are those of a user, on phantom slices. Their own times, which exclude loading, are used.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start(1, threads, "build_dataset.py", "phantom", "--output", folder / "data", "--num-nodules", num_nodules)
        config = yaml.safe_load((ROOT / "training" / "configs" / "psam_lidc.yaml").read_text(encoding="utf-8"))
        config |= {
            "base_model": str(SHIPPED), "num_views": 1, "max_steps": num_steps, "energy_start_step": 0,
            "energy_ramp_steps": 0, "warmup_steps": 1, "log_every": 1, "eval_every": num_steps, "eval_slices": 2,
            "checkpoint_every": num_steps,
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        steps, slices = {}, {}
        for processes in (1, 2):
            run_folder, scores = folder / f"run-{processes}", folder / f"scores-{processes}.json"
            data = ("--dataset", folder / "data")
            start(
                processes, threads, "train.py", *data, "--config", folder / "config.yaml", "--output_dir", run_folder,
                "--cache_dir", folder / "cache",
            )  # fmt: skip
            lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
            seconds = [line["seconds"] for line in lines if "loss" in line]
            steps[processes] = (len(seconds) - 1) / (seconds[-1] - seconds[0])  # the first step is a warm-up
            start(processes, threads, "evaluate.py", *data, "--model", SHIPPED, "--output", scores)
            content = json.loads(scores.read_text())
            slices[processes] = content["num_slices"] / content["seconds"]
    return [
        row(
            f"{what}, 2 processes (speed-up)",
            "1 process, same number of threads",
            speed[2] / speed[1],
            per_second=[speed[2], speed[1]],
        )  # fmt: skip
        for what, speed in (("training steps per second", steps), ("slices evaluated per second", slices))
    ]


def start(processes: int, threads: int, script: str, *arguments: Any) -> None:
    """Run a script of `training` in several processes that share the threads."""
    command = [sys.executable]
    if processes > 1:
        launcher = ROOT / "training" / "configs" / "accelerate" / "cpu_two_processes.yaml"
        command += ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", str(launcher)]
    command += [str(ROOT / "training" / script), *map(str, arguments)]
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(max(1, threads // processes))}
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


def measure_all(
    large: ProbabilisticSamModel,
    small: ProbabilisticSamModel,
    processor: ProbabilisticSamProcessor,
    inputs: dict[str, torch.Tensor],
    repeats: int,
    num_rows: int,
    num_slices: int,
    loop_slices: int,
    image_sizes: Sequence[int],
    num_nodules: int,
    num_steps: int,
) -> dict[str, Any]:
    """All rows of the table, with FLOPs and scaling.

    Args:
        large: ViT-B with random weights.
        small: the shipped model.
        processor: of the shipped model.
        inputs: of the shipped model, from the example images.
        repeats: number of turns of each comparison.
        num_rows: number of images in the embedding cache.
        num_slices: see `measure_ged`.
        loop_slices: see `measure_ged`.
        image_sizes: see `growth`.
        num_nodules: see `measure_processes`.
        num_steps: see `measure_processes`.
    """
    models = {"ViT-B": large, "shipped": small}
    names = {key: f"{key} at {model.config.vision_config.image_size}" for key, model in models.items()}
    rows: list[dict] = []

    def add(*items: dict) -> None:
        for item in items:
            rows.append(item)
            print(format_rows([item]), flush=True)

    add(measure_imports(repeats), measure_ged(num_slices, loop_slices, repeats))
    for key in models:
        add(measure_sampling(models[key], names[key], repeats))
        add(measure_decoding(models[key], names[key], repeats))
        with tempfile.TemporaryDirectory() as folder:
            models[key].save_pretrained(folder)
            add(measure_memory(Path(folder), names[key]))
    add(measure_training(large, names["ViT-B"], repeats))
    for key in models:
        add(measure_one_more_sample(models[key], names[key], repeats))
    add(measure_cache(small, processor, num_rows, repeats), measure_bf16(small, inputs, names["shipped"], repeats))
    add(*measure_processes(num_nodules, num_steps))
    return {
        "rows": rows,
        "flops": {names[key]: arithmetic(model) for key, model in models.items()},
        "growth_seconds": growth(small, image_sizes, repeats),
    }


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
        report_memory(argv[1], int(argv[2]))
        return
    args = parse_args(argv)
    origin, load = provenance(ROOT, PACKAGES), os.getloadavg()
    if load[0] > 0.5:
        print(f"the machine is not idle (load {load[0]:.1f}); the times will be unreliable", file=sys.stderr)
    processor = ProbabilisticSamProcessor.from_pretrained(SHIPPED)
    sizes: dict[str, Any] = {"repeats": 5, "num_rows": 64, "num_slices": 2000, "loop_slices": 20}
    sizes |= {"num_nodules": 64, "num_steps": 11}
    if args.quick:
        sizes = {"repeats": 1, "num_rows": 4, "num_slices": 4, "loop_slices": 2, "num_nodules": 24, "num_steps": 2}
    sizes["image_sizes"] = (64, 128) if args.quick else (128, 256, 512, 1024)
    content = measure_all(
        vit_b(64 if args.quick else 1024),
        ProbabilisticSamModel.from_pretrained(SHIPPED).eval(),
        processor,
        example_inputs(processor),
        **sizes,
    )
    machine = {"num_threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    write_json(args.output, {"quick": args.quick, **sizes, **content, **origin, **machine, "load_average": load[0]})
    print(f"wrote {args.output}: {len(content['rows'])} rows")


if __name__ == "__main__":
    run(main)
