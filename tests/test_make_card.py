"""The card, the table in the README and the page of costs: their numbers come from results files."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import load_script

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.configuration_probabilistic_sam import ProbabilisticSamConfig
from probabilistic_sam.hub import model_card

ROOT = Path(__file__).resolve().parent.parent
make_card = load_script("report/make_card")


def entry(mean):
    return {"mean": mean, "ci95": [None, None] if mean is None else [mean - 0.01, mean + 0.01]}


@pytest.fixture
def result():
    metrics = {name: entry(0.25) for name in model_card.TABLE}
    columns = {name: {"count": 1234, **metrics} for name in model_card.COLUMNS}
    columns["shape"]["ece"] = entry(None)
    return {
        "split": "validation", "prompt": "union_box", "num_samples": 16, "seed": [0, 1], "num_slices": 1740,
        "num_patients": 98, "dataset": "lidc", "sampling": "together",
        "commit": "abc", "command": "python training/evaluate.py", "results": columns,
        "calibration": {"pixels": [[0.0, 8.0], [0.0, 7.6], [0.0, 6.8]]},  # count, predicted, observed by bin
    }  # fmt: skip


def test_table_has_means_with_intervals_and_empty_cells_for_missing_values(result):
    lines = model_card.results_table(result).splitlines()
    assert lines[0] == "| | `all` (1,234) | `four_readers` (1,234) | `shape` (1,234) |"
    assert lines[2] == "| GED ↓ | 0.250 [0.240, 0.260] | 0.250 [0.240, 0.260] | 0.250 [0.240, 0.260] |"
    assert lines[2 + list(model_card.TABLE).index("ece")].endswith("| 0.250 [0.240, 0.260] |  |")
    assert lines[-1].endswith("|  |  |")  # empty masks are scored in `all` only


def test_table_has_scores_of_single_samples_where_the_file_has_them(result):
    for column in result["results"].values():
        column["rank_correlation"] = entry(0.5)
    lines = model_card.results_table(result).splitlines()
    assert lines[-1] == "| rank correlation of IoU scores ↑ | 0.500 [0.490, 0.510] |  |  |"
    for column in result["results"].values():
        column["rank_correlation"] = entry(None)  # a model without IoU scores
    assert "rank correlation" not in model_card.results_table(result)
    del result["results"]["all"]["ged"]
    with pytest.raises(KeyError):  # not a whole results file
        model_card.results_table(result)


def test_evaluation_seeds_are_named_for_each_row(result):
    one = result | {"seed": 0}
    results = {"public": one, "probabilistic_unet_seed0": result, "probabilistic_unet_seed1": result, "ellipse": one}
    titles = {"public": "**Ours**", "probabilistic_unet": "U-Net", "ellipse": "ellipses"}
    assert make_card.evaluation_seeds(results, titles) == "Evaluation seeds: 0, 1 for U-Net. 0 for all other rows."
    results["probabilistic_unet_seed1"] = one
    assert make_card.evaluation_seeds(results, titles) == (
        "Evaluation seeds: 0, 1 for U-Net, training seed 0. 0 for all other rows."
    )
    assert make_card.evaluation_seeds({"public": one}, titles) == "Evaluation seeds: 0."


def test_slices_are_counted_from_the_log_of_a_run():
    assert make_card.slices_seen(make_card.RELEASED_RUN) == 385_280  # 3,010 steps of 128


def test_checkpoints_before_the_end_of_a_run_are_named():
    assert make_card.early_checkpoints() == (  # of 2,000 steps of 64: step 1,500 and step 1,000
        "Best checkpoints before the end of their run: prior without the prompt (96,000 slices); input of 512 px "
        "instead of 256 px (64,000 slices)."
    )


def test_runs_of_the_comparison_have_one_budget():
    logs = sorted((ROOT / "training" / "results" / "comparison").glob("*.jsonl"))
    reference = make_card.read_config(logs[0].with_suffix(".yaml"))
    for log in logs:
        assert make_card.slices_seen(f"comparison/{log.name}") == 128_000
        config = make_card.read_config(log.with_suffix(".yaml"))
        assert config.prompts == reference.prompts and config.augmentation == reference.augmentation
        assert config.crop_size == reference.crop_size
        assert config.image_size == (512 if log.stem == "ablation_image_size_512" else reference.image_size)


def test_truth_is_one_of_the_conditions(result):
    assert "truth" not in model_card.conditions(result)
    assert "98 patients, truth `pylidc`, prompt `union_box`" in model_card.conditions(result | {"truth": "pylidc"})


def test_thinning_is_one_of_the_conditions(result):
    assert "chosen" not in model_card.conditions(result | {"num_candidates": None})
    assert model_card.conditions(result | {"num_candidates": 48}).endswith(" and chosen from 48 (`thin_samples`)")


def test_breakdown_has_one_row_per_group(result):
    scores = dict.fromkeys([metric for _, metric in model_card.BREAKDOWN], 0.25) | {"count": 1200}
    nothing = dict.fromkeys(scores, None) | {"count": 0}
    result["breakdown"] = {
        "readers_annotated": {"1": {"all": scores, "shape": nothing}},
        "reader_area": {"below 25": {"all": scores, "shape": scores}},
    }
    one, small = model_card.breakdown_section(result, "r.json").splitlines()[-2:]
    assert one == "| readers who annotated: 1 | 1,200 | 0.250 | 25% | 0.250 | 0.250 | 0.250 |  |  | 0.250 | 0.250 |"
    assert small.startswith("| mean area in pixels: below 25 | 1,200 |") and small.count("25%") == 2


def test_card_validates_and_names_every_condition_of_its_numbers(result):
    section = model_card.results_section(result, "results/validation.json")
    independent = {"ged": {"mean": 0.1931}, "hm_iou": {"mean": 0.6524}}
    published = make_card.beside_published({"public_independent": {"results": {"all": independent}}})
    card = make_card.card(result, section, "Trained.", {"image": "phantom-1.png", "box": [1, 2, 3, 4]}, published)
    for part in (
        "pipeline_tag: mask-generation",
        "1,740 slices of 98 patients",
        "seeds 0, 1",
        "`union_box`",
        "CC BY",
        "base_model: ",
        "datasets:",
        "bibtex",
        "box = [1, 2, 3, 4]",
        "trust_remote_code",
        "pipeline(",
        "independent samples | 2026 | 0.193 |  | 0.652 | own | `union_box` |",
    ):
        assert part in card.content
    assert [item.metric_value for item in card.data.eval_results] == [0.25, 0.25, 0.25]


def test_comparison_has_one_row_per_model_with_paired_differences(result):
    result["ged_by_patient"] = {name: {"a": [1, 0.2], "b": [1, 0.4]} for name in ("all", "shape")}
    worse = result | {"ged_by_patient": {name: {"a": [1, 0.3], "b": [1, 0.5]} for name in ("all", "shape")}}
    results = {"dropout_unet": worse, "probabilistic_sam": result}
    lines = make_card.comparison_table(results, make_card.COMPARED, "probabilistic_sam").splitlines()
    assert (
        len(lines) == 4
        and lines[2].startswith("| **Probabilistic SAM**, same budget as the baselines |")
        and lines[2].endswith("|  |  |")
    )
    assert lines[3] == (
        "| Dropout U-Net | 0.250 | 0.250 | 0.250 | 0.250 | 0.250 | +0.100 [+0.100, +0.100] | +0.100 [+0.100, +0.100] |"
    )


def test_several_training_seeds_are_one_row(result):
    result["ged_by_patient"] = {name: {"a": [1, 0.2], "b": [1, 0.4]} for name in ("all", "shape")}
    second = copy.deepcopy(result)
    second["results"]["all"]["ged"] = entry(0.35)
    second["ged_by_patient"]["all"] = {"a": [1, 0.4], "b": [1, 0.6]}
    results = {"public": result, "probabilistic_sam_seed0": result, "probabilistic_sam_seed1": second}
    table = make_card.comparison_table(results, make_card.COMPARED, make_card.OURS)
    first, ours = table.splitlines()[2:]
    assert ours.startswith(
        "| **Probabilistic SAM**, same budget as the baselines | 0.300 (0.250-0.350) | 0.250 (0.250-0.250) |"
    )
    assert ours.endswith("|  |  |")  # the reference of the differences, not the released weights
    assert first.endswith("| -0.100 [-0.100, -0.100] | +0.000 [+0.000, +0.000] |")


@pytest.mark.parametrize(("field", "value"), [("num_samples", 4), ("num_slices", 4), ("truth", "pylidc")])
def test_rows_of_a_table_must_share_one_protocol(result, field, value):
    result["ged_by_patient"] = {name: {"a": [1, 0.2], "b": [1, 0.4]} for name in ("all", "shape")}
    pylidc = result | {"truth": "pylidc"}
    results = {make_card.OURS: result | {"truth": "public"}, "dropout_unet": result}  # old files name no truth
    results |= {"validation": pylidc, f"pylidc_{make_card.OURS}": pylidc}
    assert "Dropout U-Net" in make_card.comparison_section(results)
    results["dropout_unet"] = result | {field: value}
    with pytest.raises(make_card.UserError, match=f"results differ in {field}: "):
        make_card.comparison_section(results)


def test_prompts_that_leak_have_no_distance(result):
    many = copy.deepcopy(result) | {"num_samples": 100}
    many["results"]["all"]["ged"] = entry(0.175)
    text = make_card.uses_section({"validation": result, "reader_box": result, "samples_100": many})
    leaking = next(line for line in text.splitlines() if "reader_box" in line)
    assert leaking.endswith("(leaks the answer) |  |  |  |  |  | 0.250 | 0.250 |")
    assert "the Dice of the mean is 0.250 with the reader's own box and 0.250 with `union_box`" in text
    assert "With 100 samples per slice, sampled together, GED is 0.175 (`all`), 0.250 (`four_readers`)" in text


def test_ablations_show_the_latent_space(result):
    old = {"active_outline_units": 1, "kl_per_dimension": [0.6, 0.06, 0.02, 0.5], "posterior_iou": 0.7}
    new = {"active_outline_units": 0, "kl_per_dimension": [0.6, 0.0, 0.0, 0.05], "posterior_iou": 0.5}
    results = {
        "probabilistic_sam_seed0": result | {"collapse": old},
        "cpu_reference_recipe": result | {"collapse": new},
    }
    ours, ablated = (line for line in make_card.ablation_section(results).splitlines()[4:] if line.startswith("|"))
    assert ours.endswith("| 2.0 | 0.700 |") and ablated.endswith("| 0.0 | 0.500 |")  # without the presence coordinate


@pytest.fixture
def nodules():
    column = {metric: entry(0.2) for metric in model_card.NODULE_TABLE} | {"count": 297}
    return {
        "level": "nodule", "split": "validation", "prompt": "nodule_box", "truth": "pylidc", "noise": "shared",
        "sampling": "together", "seed": 0, "num_samples": 100, "num_nodules": 297, "num_left_out": 0,
        "num_slices": 1740,
        "num_patients": 98, "commit": "abc", "command": "python training/evaluate.py --level nodule",
        "results": {"samples": column, "mean_mask": column | {"ged_3d": entry(0.5), "volume_crps": entry(0.6)}},
    }  # fmt: skip


def test_nodules_have_one_row_per_model_and_the_number_of_samples_of_each_metric(nodules):
    few = copy.deepcopy(nodules) | {"num_samples": 16}
    few["results"]["samples"]["ged_3d"] = entry(0.21)
    results = {"nodule_shared_100": nodules, "nodule_shared_16": few, "nodule_ellipse_100": nodules}
    text = make_card.nodules_section(results)
    head, _, *rows = (line for line in text.splitlines() if line.startswith("|"))
    assert head.startswith("|  | GED in 3D ↓ (N = 16) | volume CRPS ↓ (N = 100) | coverage")
    assert rows[0].startswith(
        "| **shared noise**: one simulated reader per sample | 0.210 [0.200, 0.220] | 0.200 [0.190, 0.210] |"
    )
    assert rows[1].startswith("| mean mask: a single volume | 0.500 [0.490, 0.510] | 0.600 [")
    assert (
        rows[2].startswith("| no image: ellipses of random size |  | 0.200 [0.190, 0.210] | 0.200 [")
        and len(rows) == 3
    )
    assert "Change in volume CRPS with shared noise: -67% against the mean mask." in text  # 0.2 and 0.6
    assert "hold 20% of the annotating readers' volumes; those of a perfect model would hold 88%." in text
    assert "The intervals are too narrow." in text
    worse = copy.deepcopy(nodules)
    worse["results"]["samples"]["volume_crps"] = entry(0.25)
    text = make_card.nodules_section(results | {"nodule_independent_100": worse})
    assert "-67% against the mean mask, -20% against independent noise." in text
    assert "297 nodules (1,740 slices) of 98 patients" in text and "figures/volumes.png" in text
    assert make_card.nodules_section({"nodule_shared_16": few}) == ""
    with pytest.raises(make_card.UserError, match="nodule results differ in truth: .'public', 'pylidc'."):
        make_card.nodules_section(results | {"nodule_ellipse_16": few | {"truth": "public"}})


def test_card_of_a_run_shows_results_of_nodules(nodules, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "volumes.json").write_text(json.dumps(nodules))
    card = model_card.run_card(tmp_path, "org/run", {"image": "a.png", "box": [1, 2, 3, 4]})
    assert "297 nodules of 98 patients, prompt `nodule_box`, 100 samples per nodule, shared noise" in card.content
    assert "| GED in 3D ↓ | 0.200 [0.190, 0.210] | 0.500 [0.490, 0.510] |" in card.content


def test_public_truth_has_its_own_table(result):
    result["results"]["all"]["ged_unbiased"] = result["results"]["shape"]["ged_unbiased"] = entry(0.0224)
    result |= {"truth": "public"}
    text = make_card.public_section(dict.fromkeys(("public", "public_independent", "public_center_point"), result))
    assert "(truth `public`)" in text and "whose expectation does not depend on their number, is 0.022 (`all`)" in text
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    assert rows == [
        "| `union_box`, sampled together (Latin hypercube)",
        "| `union_box`, sampled independently",
        "| `center_point`: one click",
    ]
    assert "unbiased" not in make_card.public_section({"public": result})


def test_readme_has_five_rows_and_four_metrics(result):
    result["results"]["all"]["ged"] = entry(0.1234)
    results = dict.fromkeys((*make_card.COMPARED_PYLIDC, *make_card.COMPARED), result)
    head, _, *rows = (line for line in make_card.readme_section(results).splitlines() if line.startswith("|"))
    assert head == "|  | GED `all` ↓ | GED `shape` ↓ | HM-IoU ↑ | ECE ↓ |"
    assert [row.split(" | ")[0] for row in rows] == [
        "| **Probabilistic SAM, released weights**", "| **Probabilistic SAM**, same budget as the baselines",
        "| Probabilistic U-Net",
        "| SAM, fine-tuned from the released weights, jittered boxes", "| MobileSAM, not fine-tuned, jittered boxes",
    ]  # fmt: skip
    assert rows[0].endswith(" | 0.123 | 0.250 | 0.250 | 0.250 |")
    last = make_card.readme_section(results).splitlines()[-1]
    for part in (
        "1,740 slices of 98 patients",
        "`union_box`",
        "16 samples per slice",
        "validation.json",
        "[model card]",
        "saw 128,000 slices (every visit counted) on one H200, the released weights 385,280.",
        "and saw 25,600 more slices on one CPU core",
        "GED is 0.123 and 0.250 for the released weights, 0.123 and 0.250 for all training seeds of the U-Net",
    ):
        assert part in last


def test_a_page_is_filled_between_its_markers():
    begin, end = "<!-- results:begin (training/report/make_card.py) -->", "<!-- results:end -->"
    assert make_card.fill_page(f"a\n{begin}\nold\n{end}\nb\n", "new") == f"a\n{begin}\nnew\n{end}\nb\n"
    with pytest.raises(make_card.UserError, match="README.md lacks the markers"):
        make_card.fill_page("no markers", "new")


def test_costs_have_one_line_per_comparison():
    line = {"against": "other", "ratio": 0.5, "seconds": [1.0, 2.0]}
    rows = [
        line | {"what": "decoding", "largest_difference_float64": 2e-13},
        line | {"what": "memory", "ratio": 1.5, "mebibytes": [30, 20]},
        line | {"what": "bf16", "ratio": 1.4, "mean_iou": 0.997, "least_iou": 0.976},
        line | {"what": "steps", "ratio": 2.0, "per_second": [8.0, 4.0]},
        line | {"what": "absent", "ratio": None},
    ]
    parts = {"encoder": 5e9, "decoder_each_other_sample": 1e8, "sam_decoder_each_prompt": 2e8}
    growth = {"prompts": {"1": 0.1}, "readers": {"4": 0.2}, "image_size": {"128": 0.5}}
    text = make_card.cost_section(
        {
            "rows": rows,
            "repeats": 5,
            "num_threads": 2,
            "flops": {"tiny": parts},
            "growth_seconds": growth,
            "commit": "abc",
            "command": "python training/report/benchmark.py",
        }  # fmt: skip
    )
    lines = text.splitlines()
    assert lines[0] == "|  | compared with | ratio | ours / other |"
    assert lines[2] == "| decoding | other | 0.5 | 1 s / 2 s |"
    assert lines[3] == "| memory | other | 1.5 | 30 MiB / 20 MiB |"
    assert lines[5] == "| steps | other | 2 | 8 per second / 4 per second |"
    assert "absent" not in text and "| tiny | 5 | 0.1 | 0.2 |" in lines
    assert "by image size in pixels: 128: 0.5 s" in text and "2e-13" in text
    assert "(IoU: mean 0.997, minimum 0.976) and takes 1.4 times as long" in text


def test_speed_on_a_gpu_is_a_table_once_it_is_measured():
    text = make_card.cuda_section(None)
    assert "has not been measured on a GPU yet" in text and "benchmark.py --device cuda" in text and "|" not in text
    result = {
        "rows": [
            {"what": "16 samples, ViT-B at 1024", "against": "SAM", "ratio": 1.1234, "seconds": [0.11, 0.1]},
            {"what": "16 samples, ViT-B at 1024, 16 images", "against": "SAM", "ratio": None},  # no memory
        ],
        "slices_per_second": {"training, encoder frozen": 2345.6, "evaluation": 99.44}, "repeats": 20, "gpu": "Card",
        "cuda": "13.0", "versions": {"torch": "2.13.0"}, "commit": "abc", "command": "python x.py",
    }  # fmt: skip
    lines = make_card.cuda_section(result).splitlines()[2:]
    assert lines[2] == "| training, encoder frozen |  | at least 2,000 slices/s | 2,346 slices/s |  |"
    assert lines[4] == "| evaluation |  | at least 100 slices/s | 99.4 slices/s |  |"
    assert lines[5] == "| 16 samples, ViT-B at 1024 | SAM | at most 1.15 | 1.12 | 0.11 s / 0.1 s |"
    assert lines[7] == "| 16 samples, ViT-B at 1024, 16 images |  | at most 1.15 | not measured |  |"
    assert "20 alternating repeats on one Card, PyTorch 2.13.0, CUDA 13.0." in "\n".join(lines)


def test_onnx_section_has_masks_sizes_and_times():
    parity = {"different_pixels": 2e-5, "iou": 0.99951, "smallest_iou": 0.9, "ged_difference": -1e-4}
    result = {
        "parity": {"float32": {"box": parity | {"meets_target": True}, "point": parity | {"meets_target": False}}},
        "bytes": {"float32": {"vision_encoder": 25_940_000, "box_decoder": 20_610_000}},
        "seconds": {"encode_s": {"torch": 0.3, "float32": 0.1}, "decode_16_samples_s": {"torch": 0.27, "float32": 0}},
        "num_slices": 50, "split": "validation", "num_samples": 16, "prompt": "union_box", "repeats": 20, "threads": 2,
        "cpus": 2, "load_at_start": 0.1, "commit": "abc", "command": "python training/report/bench_onnx.py",
        "targets": {
            "float32": {"different_pixels": 1e-4}, "float16": {"iou": 0.99}, "int8": {"iou": 0.97},
            "ged_difference": 0.002,
        },
    }  # fmt: skip
    lines = make_card.onnx_section(result).splitlines()
    assert "| float32, box | 2.0e-05 | 0.9995 | 0.90 | -0.0001 | yes |" in lines
    assert "| float32, point | 2.0e-05 | 0.9995 | 0.90 | -0.0001 | no |" in lines
    assert "|  | vision encoder, MB | box decoder, MB |" in lines and "| float32 | 25.9 | 20.6 |" in lines
    assert "|  | encode, s | decode 16 samples, s |" in lines and "| torch | 0.300 | 0.270 |" in lines
    assert (
        "50 validation slices, 16 samples per slice" in "".join(lines)
        and "python training/report/bench_onnx.py" in lines
    )


def test_space_section_has_times_and_megabytes():
    result = {
        "num_samples": 16, "device": "WebAssembly, 2 threads", "browser": "Chromium 1, headless",
        "bytes": {"vendor/ort.wasm": 11_000_000, "onnx/vision_encoder.onnx": 25_150_000},
        "seconds": {"first_mask": 3.0, "encoder": 0.5, "per_sample": 0.0214},
        "ranges": {"first_mask": [2.9, 3.2], "encoder": [0.4, 0.6], "per_sample": [0.02, 0.03]},
        "repeats": 5, "cpus": 2, "load_at_start": 0.1, "commit": "abc", "command": "python bench_space.py",
    }  # fmt: skip
    text = make_card.space_section(result)
    assert "| first visit, from the click to one mask on the page | 3.000 | 2.900 to 3.200 |" in text.splitlines()
    assert "| each sample, of 16 | 0.021 | 0.020 to 0.030 |" in text.splitlines()
    assert "WebAssembly, 2 threads" in text and "loads 36.1 MB" in text


def test_thinned_samples_stand_beside_as_many_others(result):
    results = {"public": result, "public_of_48": result, "probabilistic_unet_seed1_of_48": result}
    lines = make_card.thinned_section(results).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ") and "---" not in line][1:] == [
        "| **Probabilistic SAM, released weights**, 16 samples",
        "| **Probabilistic SAM, released weights**, 16 of 48",
        "| Probabilistic U-Net, training seed 1, 16 of 48",
    ]
    assert make_card.thinned_section({}) == ""


def test_scan_section_has_times():
    result = {
        "num_slices": 10, "seconds": {"16 samples": 1.234}, "ranges": {"16 samples": [1.2, 1.3]}, "repeats": 5,
        "threads": 2, "cpus": 2, "load_at_start": 0.1, "commit": "abc", "command": "python bench_scan.py",
    }  # fmt: skip
    text = make_card.scan_section(result)
    assert "| 16 samples | 1.234 | 1.200 to 1.300 |" in text.splitlines() and "A nodule of 10 slices" in text


def test_gallery_of_the_card_shows_its_figures(result):
    card = make_card.card(result, "", "", {"image": "phantom-1.png", "box": [1, 2, 3, 4]}, {})
    assert card.data.widget[0] == {
        "text": "phantom-1.png, box [1, 2, 3, 4]: readers, samples, mean and entropy", "output": {"url": "demo.png"},
    }  # fmt: skip
    folder = ROOT / "model_cards" / "psam-lidc"
    assert all((folder / item["output"]["url"]).is_file() for item in card.data.widget) and "<Gallery />" in card.text


def test_exported_weights_are_half_precision_and_load_as_float32(tmp_path):
    from tiny import tiny_model

    model = tiny_model()
    source, output = tmp_path / "run", tmp_path / "card"
    model.save_pretrained(source)
    ProbabilisticSamProcessor(32, 24).save_pretrained(source)
    output.mkdir()
    make_card.export_weights(str(source), output)
    assert (output / "model.safetensors").stat().st_size < 0.6 * (source / "model.safetensors").stat().st_size
    loaded = ProbabilisticSamModel.from_pretrained(output)
    assert loaded.dtype == torch.float32 and isinstance(loaded.config, ProbabilisticSamConfig)
    state = loaded.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value.half().float()), name
    assert ProbabilisticSamProcessor.from_pretrained(output).crop_size == 24


def test_check_passes_for_the_project_and_fails_for_an_outdated_text(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["make_card.py", "--check"])
    make_card.main()
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is up to date"
        for name in (
            "model_cards/psam-lidc/README.md",
            "README.md",
            "training/results/README.md",
            "training/OWN_DATA.md",
        )  # fmt: skip
    ]
    outdated = make_card.costs_page
    monkeypatch.setattr(make_card, "costs_page", lambda *results: outdated(*results) + "changed")
    with pytest.raises(make_card.UserError, match="training/results/README.md is out of date; run python"):
        make_card.main()


def test_shipped_weights_are_small_and_whole():
    folder = ROOT / "model_cards" / "psam-lidc"
    assert (folder / "model.safetensors").stat().st_size <= 30 * 2**20
    model, info = ProbabilisticSamModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == torch.float32
    result = json.loads((folder / "results" / "validation.json").read_text())
    assert result["split"] == "validation" and result["num_samples"] == 16
