"""What a model's card says: its results in tables and words, how the model is used, and the card of a training run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UserError

HUB_NAME = "org/psam-lidc"  # stands in a card for the name that a push puts in its place
TAGS = ["uncertainty", "segment-anything", "probabilistic-segmentation"]
TABLE = {  # metric -> how a reader of the table knows it
    "ged": "GED ↓", "cross_distance": "cross distance ↓", "sample_diversity": "sample diversity",
    "reader_diversity": "reader diversity", "hm_iou": "HM-IoU ↑", "dice_max_per_reader": "best Dice a reader ↑",
    "dice_mean": "Dice of the mean ↑", "ece": "ECE ↓", "empty_ece": "ECE of emptiness ↓",
    "empty_correlation": "correlation of emptiness ↑",
}  # fmt: skip
COLUMNS = ("all", "four_readers", "shape")
BREAKDOWN = {  # of `metrics.breakdown`: (column, metric) -> title
    ("all", "ged"): "GED `all`", ("all", "ged_share"): "share of it", ("all", "cross_distance"): "cross distance",
    ("all", "sample_diversity"): "sample diversity", ("all", "reader_diversity"): "reader diversity",
    ("shape", "ged"): "GED `shape`", ("shape", "ged_share"): "share of it",
    ("all", "empty_rate_samples"): "empty samples", ("all", "empty_rate_readers"): "empty readers",
}  # fmt: skip

SPLIT = """\
Patients are split by
`int(sha256(patient_id).hexdigest(), 16) % 100`: below 70 train, 70-79 validation, 80 and above test."""

PROTOCOL = """\
A slice is scored when at least one reader drew on it. The prompt comes from the readers' masks by rule, never from the
one that is scored: `union_box` is the box around all of them, each side moved by up to 10 % and 1.5 pixels, seeded by
the slice, so that every model is given the same box. The samples are compared with the masks of all readers at the
slice's own size, empty masks included. GED is the squared generalised energy distance with d = 1 - IoU (two empty
masks: 0), HM-IoU the IoU of the best balanced matching. Even an exact model does not reach 0 with finitely many
samples and readers."""

CITATION = """\
```bibtex
@article{ward2025probabilistic,
  title = {A Probabilistic Segment Anything Model for Ambiguity-Aware Medical Image Segmentation},
  author = {Ward, Tyler and Imran, Abdullah},
  journal = {arXiv preprint arXiv:2509.05809},
  year = {2025}
}
```"""

RUN_CARD = """\
# {title}: a Probabilistic SAM

One image and one prompt (box, points or mask) give a *distribution* of masks: each sample is the outline that one more
expert might have drawn, or no outline at all. The model is Segment Anything with a latent space after Ward and Imran
(arXiv 2509.05809).

**For research only. It is no medical device and must not be used for diagnosis.**

This card was made by `training/push_to_hub.py` from the files of a training run. It says what they say; intended use,
limits, the origin of the data and the licence of the weights are for the owner of the run to add.

## Use

{usage}

## Training data

{data}

## Training

```yaml
{training}
```

## Results

{results}

## Licence and citation

The code in this repository is Apache-2.0 (`LICENSE`). The licence of the weights is what their owner says it is. The
images in `examples` are phantom: real readers' contours from LIDC-IDRI (Armato et al. 2011, CC BY 3.0) on simulated
pixels.

{citation}
"""


def usage(example: Mapping[str, Any], name: str = HUB_NAME) -> str:
    """How the model is used in each of its four ways, on an image of its own folder.

    Args:
        example: an entry of `examples/examples.json`.
        name: of the repository on the Hub.
    """
    image, box = f"examples/{example['image']}", [round(value, 1) for value in example["box"]]
    return f"""\
An image to begin with, one of `examples`:

```python
from huggingface_hub import hf_hub_download
from PIL import Image

image = Image.open(hf_hub_download("{name}", "{image}"))
box = {box}  # x1, y1, x2, y2 in pixels
```

With the package `probabilistic_sam` no code of this repository runs. After `import probabilistic_sam`, `AutoModel`,
`AutoModelForMaskGeneration` and `AutoProcessor` know the classes as well.

```python
from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor

model = ProbabilisticSamModel.from_pretrained("{name}")
processor = ProbabilisticSamProcessor.from_pretrained("{name}")
```

Without the package, with transformers alone, the code in this repository does the same:

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
```

`trust_remote_code=True` downloads the Python files of this repository and runs them on your machine, with your rights.
Read them first (they import torch, numpy, transformers and, to open image files, Pillow), and pin the commit that you
have read with `revision="..."`: otherwise the next call runs whatever is here then. With the package the argument is
never needed. Samples, in either case:

```python
import torch

inputs = processor(image, input_boxes=[[box]])
samples = model.sample(**inputs, num_samples=16, generator=torch.Generator().manual_seed(0))
result = processor.post_process_samples(samples.pred_masks, inputs["windows"], inputs["original_sizes"])[0]
print(result["area_quantiles"], result["empty_share"])  # result["masks"], ["mean"], ["entropy"] are maps
```

As a pipeline, from image and box to masks; after `import probabilistic_sam` leave `trust_remote_code` out. The task is
`probabilistic-mask-generation`; transformers' own `mask-generation` pipeline is not supported.

```python
from transformers import pipeline

pipe = pipeline("probabilistic-mask-generation", model="{name}", trust_remote_code=True)
(result,) = pipe(image, boxes=[box], num_samples=16, seed=0)  # "masks", "mean", "uncertainty", "areas"
```

As an Inference Endpoint, which runs `handler.py` (Hugging Face's serverless inference runs no repository with code of
its own); `ENDPOINT` is its address:

```python
from huggingface_hub import InferenceClient

client = InferenceClient(model=ENDPOINT, headers={{"Content-Type": "image/png"}})
for item in client.image_segmentation("slice.png"):  # the prompt is the image's centre
    print(item.label, item.score, item.mask)  # "mean", "uncertainty", "sample 0", ...
```

A prompt of your own goes in JSON: `{{"inputs": "base64 of the image file", "parameters": {{"boxes": [{box}],
"num_samples": 16, "seed": 0}}}}`."""


def results_table(result: dict) -> str:
    """Markdown table of one results file, means with 95 % intervals."""
    columns = result["results"]
    lines = ["| | " + " | ".join(f"`{name}` ({columns[name]['count']:,})" for name in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 1) + "|")
    for metric, title in TABLE.items():
        cells = []
        for name in COLUMNS:
            entry = columns[name][metric]
            skip = entry["mean"] is None or (metric.startswith("empty") and name != "all")
            cells.append("" if skip else f"{entry['mean']:.3f} [{entry['ci95'][0]:.3f}, {entry['ci95'][1]:.3f}]")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def results_section(result: dict, name: str) -> str:
    """Table and the words without which its numbers mean nothing."""
    spread = " drawn together (Latin hypercube)" if result["sampling"] == "together" else ", independent"
    seeds = result["seed"] if isinstance(result["seed"], list) else [result["seed"]]
    chose = " These patients chose the checkpoint; they were not trained on."
    return (
        f"{result['split'].capitalize()} split, {result['num_slices']:,} slices of {result['num_patients']} patients, "
        f"prompt `{result['prompt']}`, {result['num_samples']} samples{spread}, mean over evaluation seeds "
        f"{', '.join(map(str, seeds))}; in brackets 95 % intervals from a bootstrap over patients."
        f"{chose if result['split'] == 'validation' else ''}\n\n"
        f"{results_table(result)}\n\n"
        "`all`: at least one reader drew. `four_readers`: all four drew. `shape`: at least two drew, non-empty masks "
        "only. "
        f"From `{name}`, commit `{result['commit'][:12]}`, written by\n\n```\n{result['command']}\n```"
    )


def breakdown_section(result: dict, name: str) -> str:
    """Where the error of one results file lies: `metrics.breakdown` as a table, a row a group of slices."""
    titles = {
        "readers_annotated": "readers who annotated: {}",
        "readers_drew": "readers who annotated: {}",  # the name in files of version 0.1
        "reader_area": "mean area in pixels: {}",
    }
    lines = ["| | slices | " + " | ".join(BREAKDOWN.values()) + " |", "|---" * (len(BREAKDOWN) + 2) + "|"]
    for way, groups in result["breakdown"].items():
        for label, group in groups.items():
            values = [(metric, group[column][metric]) for column, metric in BREAKDOWN]
            cells = ["" if x is None else f"{x:.0%}" if metric == "ged_share" else f"{x:.3f}" for metric, x in values]
            lines.append(f"| {titles[way].format(label)} | {group['all']['count']:,} | {' | '.join(cells)} |")
    return f"Where the error of `{name}` lies, its slices grouped in two ways:\n\n" + "\n".join(lines)


def eval_results(result: dict, dataset_name: str, dataset_type: str) -> list[EvalResult]:
    """The main numbers of one results file, for the card's model-index."""
    shown = (("GED, all", "ged", "all"), ("GED, shape", "ged", "shape"), ("HM-IoU, all", "hm_iou", "all"))
    return [
        EvalResult(
            task_type="mask-generation",
            dataset_name=dataset_name,
            dataset_type=dataset_type,
            dataset_split=result["split"],
            metric_type=metric,
            metric_name=title,
            metric_value=round(result["results"][column][metric]["mean"], 4),
            metric_args={name: result[name] for name in ("prompt", "num_samples", "sampling")},
        )
        for title, metric, column in shown
        if result["results"][column][metric]["mean"] is not None
    ]


def run_card(run: Path, name: str, example: Mapping[str, Any]) -> ModelCard:
    """The card of a run folder of `training/train.py`: nothing that its files do not say.

    Args:
        run: with `training_config.yaml`, `data.json`, `best.json` and `results/*.json` of `training/evaluate.py`, each
            as far as it is there.
        name: of the repository on the Hub.
        example: an entry of `examples/examples.json`.

    Raises:
        UserError: a file of the run does not hold what it should.
    """
    sections: list[str] = []
    evaluated: list[EvalResult] = []
    for path in sorted((run / "results").glob("*.json")):
        result = read_json(path)
        try:
            sections.append(results_section(result, f"results/{path.name}"))
            if "breakdown" in result:  # files of earlier versions have none
                sections.append(breakdown_section(result, f"results/{path.name}"))
            evaluated += eval_results(result, Path(result["dataset"]).name, Path(result["dataset"]).name)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"{path} is no results file of training/evaluate.py ({error!r})") from error
    best = read_json(run / "best.json")
    if sections:
        sections.append(PROTOCOL)
    elif "all/ged" in best:
        sections.append(
            f"No results of `training/evaluate.py` came with these weights. On the validation slices that chose them "
            f"their GED was {best['all/ged']:.3f}: too good by what the choice made of chance."
        )
    counts = [
        f"- {split}: {item['slices']:,} slices of {item['patients']:,} patients, source {', '.join(item['sources'])}"
        for split, item in read_json(run / "data.json").items()
    ]
    config = run / "training_config.yaml"
    title = name.split("/")[-1]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="mask-generation",
        tags=TAGS,
        model_name=title,
        eval_results=evaluated or None,
    )
    text = RUN_CARD.format(
        title=title,
        usage=usage(example, name),
        data="\n".join([*counts, "", SPLIT] if counts else ["The run does not say on what it was trained."]),
        training=config.read_text().strip() if config.is_file() else "# the run holds no training_config.yaml",
        results="\n\n".join(sections) or "None came with these weights.",
        citation=CITATION,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def read_json(path: Path) -> dict:
    """A file of a run; an empty dictionary when it is not there.

    Raises:
        UserError: the file does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not open as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; accepted: what training/train.py and evaluate.py write")
    return content
