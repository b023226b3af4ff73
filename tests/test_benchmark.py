"""training/report/benchmark.py: both sides of each comparison give equal results. No test checks times."""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import load_script, sam_parts, tiny_inputs, tiny_model, tiny_vit_parts

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from transformers import SamConfig, SamModel

from probabilistic_sam import ProbabilisticSamProcessor
from probabilistic_sam.errors import UserError
from probabilistic_sam.metrics.functional import ged

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "training" / "configs" / "accelerate"


@pytest.fixture(scope="module")
def script():
    return load_script("report/benchmark")


def test_functions_run_in_turns_after_a_warm_up(script):
    turns = []
    seconds = script.interleave(lambda: turns.append("a"), lambda: turns.append("b"), repeats=3)
    assert "".join(turns) == "abababab"
    assert len(seconds) == 2


def test_seconds_are_medians_without_the_warm_up(script, monkeypatch):
    # a takes 1, 2, 9 and b 4, 4, 5
    durations, ticks, now = [100, 100, 1, 4, 2, 4, 9, 5], [], 0.0
    for number, duration in enumerate(durations):
        ticks += [now] if number < 2 else [now, now + duration]  # the end of a warm-up is not read
        now += duration
    monkeypatch.setattr(script.time, "perf_counter", iter(ticks).__next__)
    assert script.interleave(lambda: None, lambda: None, repeats=3) == [2, 4]


def test_cuda_is_waited_for_before_and_after_each_timing(script, monkeypatch):
    events = []
    monkeypatch.setattr(script.torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(script.time, "perf_counter", lambda: events.append("clock") or 0.0)
    script.interleave(lambda: events.append("work"), repeats=1, device=torch.device("cuda"))
    assert events == ["wait", "clock", "work", "wait", "wait", "clock", "work", "wait", "clock"]
    events.clear()
    script.interleave(lambda: None, repeats=1)
    assert "wait" not in events


def test_peak_memory_on_cuda_is_that_of_the_allocator_since_its_reset(script, monkeypatch):
    used = {"now": 10, "peak": 99}  # the peak of loading the model

    def sample():
        used.update(now=12, peak=max(used["peak"], 40))

    cuda = script.torch.cuda
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda device: used.update(peak=used["now"]))
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: used["now"])
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: used["peak"])
    assert script.peak_memory(sample, torch.device("cuda")) == (10, 40)


def test_a_row_that_does_not_fit_the_card_has_no_ratio(script, monkeypatch):
    def fail(*ways, **options):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(script, "interleave", fail)
    item = script.measure_sampling(tiny_model(), "tiny", 1, images=2, bf16=True)
    assert item["what"] == "16 samples, tiny, 2 images, bfloat16" and item["ratio"] is None


def test_samples_of_several_images_are_timed_beside_one_mask_of_each(script, monkeypatch):
    shapes = []

    def call(*ways, device, **options):
        masks = [way().pred_masks for way in ways]
        assert torch.is_autocast_enabled("cpu") and device.type == "cpu"
        shapes.extend(tuple(item.shape[:3]) for item in masks)
        return [1.0, 2.0]

    monkeypatch.setattr(script, "interleave", call)
    assert script.measure_sampling(tiny_model(), "tiny", 1, images=3, bf16=True)["ratio"] == 0.5
    assert shapes == [(3, 1, 16), (3, 1, 1)]


@pytest.mark.parametrize(("device", "changes"), [("cuda", []), ("cpu", ["mixed_precision=no"])])
def test_training_speed_is_that_of_the_log_after_its_first_line(script, monkeypatch, tmp_path, device, changes):
    def train(processes, given_device, name, *arguments):
        given = [str(item) for item in arguments]
        assert (processes, given_device, name) == (1, device, "train.py") and "encoder=trained" in given
        assert [item for item in given if item.startswith("mixed_precision")] == changes
        folder = Path(given[given.index("--output_dir") + 1])
        (folder / "training_config.yaml").write_text("base_model: random\nbatch_size: 64\n")
        lines = [
            {"step": 100, "loss": 1.0, "seconds": 30.0},  # with the start of the workers
            {"step": 200, "loss": 1.0, "seconds": 34.0},
            {"step": 300, "loss": 1.0, "seconds": 40.0},
            {"step": 300, "validation/all/ged": 0.3},
        ]
        (folder / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(script, "start", train)
    speed = script.training_speed(tmp_path, device, "psam_lidc_gpu.yaml", "trained", 300)
    assert speed == 64 * 200 / 10


def test_rows_on_cuda_are_those_of_the_page(script, monkeypatch):
    monkeypatch.setattr(
        script, "measure_memory", lambda model, name: script.row(f"peak memory, 100 samples, {name}", "", 1)
    )
    monkeypatch.setattr(script, "training_speed", lambda *arguments: 1.0)
    monkeypatch.setattr(script, "evaluation_speed", lambda *arguments: 1.0)
    monkeypatch.setattr(script, "interleave", lambda *ways, **options: [1.0] * len(ways))
    models = {"ViT-B at 1024": tiny_model(), "shipped at 256": tiny_model(tiny_vit_parts)}
    monkeypatch.setattr(script, "example_inputs", lambda processor: tiny_inputs())
    measured = [item["what"] for item in script.cuda_rows(models, None, 1)]
    cuda = SimpleNamespace(device=torch.device("cuda"))
    measured += script.measure_speeds(cuda, None, Path("data"), 1, 1)
    assert sorted(measured) == sorted(load_script("report/make_card").CUDA_ROWS)


def test_two_processes_are_compared_with_one(script, monkeypatch, tmp_path):
    started = []

    def evaluate(processes, device, name, *arguments):
        started.append((processes, device, name))
        Path(arguments[-1]).write_text('{"num_slices": 30, "seconds": 2.0}')

    monkeypatch.setattr(script, "start", evaluate)
    monkeypatch.setattr(script, "training_speed", lambda *arguments, processes: 6.0 * processes)
    alone = {"training, encoder cached": 8.0, "evaluation": 10.0}
    rows = script.measure_processes(alone, tmp_path / "data", 2, 30)
    assert started == [(2, "cpu", "evaluate.py")] and [item["ratio"] for item in rows] == [1.5, 1.5]
    assert rows[0]["what"] == "training, encoder cached, 2 processes (speed-up)"
    assert rows[1]["per_second"] == [15.0, 10.0]


def test_the_card_is_named(script, monkeypatch):
    monkeypatch.setattr(script.torch.cuda, "get_device_name", lambda device: "Card")
    assert script.describe_machine(torch.device("cuda"))["gpu"] == "Card"
    assert "gpu" not in script.describe_machine(torch.device("cpu"))


def test_evaluation_is_timed_after_a_first_one(script, monkeypatch):
    calls = []

    def evaluate(model, processor, rows, prompt, num_samples, seeds, batch_size, state, device, workers):
        calls.append((len(rows), prompt, num_samples, batch_size, device.type))

    monkeypatch.setattr(script, "evaluate_dataset", evaluate)
    monkeypatch.setattr(script, "load_split", lambda data, split: script.reader_rows(5, 16))
    assert script.evaluation_speed(tiny_model(), None, Path("data"), 3) > 0
    assert calls == [(3, "union_box", 16, 8, "cpu")] * 2


def test_line_by_hand(script):
    # Means 2 and 3; sum of (x - 2)(y - 3) = 1 + 0 + 2 = 3 over sum of (x - 2)^2 = 2, so 1.5 x + 0
    assert script.fit_line([1, 2, 3], [2, 2, 5]) == pytest.approx((1.5, 0.0))


def test_double_loop_equals_our_ged(script):
    assert script.loop_ged(*np.array([[[[True, False]]], [[[False, True]]]])) == 2
    for seed in range(2):
        samples, readers = (masks[:9] for masks in script.disc_slice(seed, 32))
        assert not samples.any(axis=(1, 2)).all()  # empty masks too
        assert script.loop_ged(samples, readers) == pytest.approx(ged(samples, readers).ged, abs=1e-6)


@pytest.mark.parametrize("parts", [sam_parts, tiny_vit_parts], ids=["vit", "tiny_vit"])
def test_both_decoders_give_the_same_masks(script, parts):
    item = script.measure_decoding(tiny_model(parts), "tiny", repeats=1)
    assert item["largest_difference"] <= 1e-4 and item["largest_difference_float64"] <= 1e-12
    assert item["largest_logit"] > 1e-3  # not all zero


def test_comparison_stops_when_the_weights_differ(script, monkeypatch):
    other = script.SamMaskDecoder(tiny_model().config.mask_decoder_config)
    monkeypatch.setattr(script, "plain_decoder", lambda model: other.eval())
    with pytest.raises(UserError, match="decoding 16 latents, tiny: results differ from those of the reference"):
        script.measure_decoding(tiny_model(), "tiny", repeats=1)


def test_plain_sam_is_the_sam_of_transformers(script):
    model, inputs = tiny_model(), tiny_inputs()
    sam = SamModel(SamConfig(**sam_parts())).eval()
    sam.load_state_dict({key: value for key, value in model.state_dict().items() if key in sam.state_dict()})
    with torch.no_grad():
        expected = sam(**inputs, multimask_output=False).pred_masks
        assert torch.equal(script.plain_sam(model)(**inputs, multimask_output=False).pred_masks, expected)


def test_a_hundred_samples_in_chunks_are_the_same(monkeypatch):
    from probabilistic_sam import modeling_probabilistic_sam as modeling

    model, inputs = tiny_model(), tiny_inputs()

    def sample():
        return model.sample(**inputs, num_samples=100, generator=torch.Generator().manual_seed(0)).pred_masks

    chunked = sample()
    monkeypatch.setattr(modeling, "MAX_DECODED", 10_000)
    assert torch.allclose(chunked, sample(), atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_includes_freed_memory(script):
    def touch_new_pages() -> None:
        # 64 MiB from the kernel, freed on return. An allocation of that size may come from the heap, where earlier
        # tests leave free memory that is resident already.
        with mmap.mmap(-1, 64 * 2**20) as pages:
            pages[:: mmap.PAGESIZE] = b"1" * (64 * 2**20 // mmap.PAGESIZE)

    # three times, since the kernel may take back other pages of this process meanwhile
    measured = [script.peak_memory(touch_new_pages) for _ in range(3)]
    assert 60 * 2**20 < max(peak - before for before, peak in measured) < 200 * 2**20
    before, peak = script.peak_memory(lambda: None)
    assert peak - before < 8 * 2**20


def test_cache_encodes_once_and_has_the_computed_size(script):
    item = script.measure_cache(tiny_model(), ProbabilisticSamProcessor(32, 32), 3, repeats=1)
    assert item["encoded_first"] == 4 and item["encoded_second"] == 0  # one of them encoded twice, for the shape
    assert item["bytes"] == item["computed_bytes"] == 128 + 3 * (16 + 16) * 2 * 2 * 2


def test_training_steps_change_a_copy_and_only_the_reference_encodes(script):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours, reference = script.training_steps(model, 4)
    ours()
    reference()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.energy_weight == 0


def test_operations_by_hand(script):
    assert script.count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 2 * 2 * 3 * 5


def test_a_further_sample_costs_less_where_cells_outnumber_tokens(script):
    def parts():
        wide = sam_parts(128)  # 64 cells of 64 channels; the 2 heads x 7 tokens are fewer than the 32 of a projection
        wide["vision_config"] |= {"output_channels": 64, "num_pos_feats": 32}
        wide["prompt_encoder_config"]["hidden_size"] = wide["mask_decoder_config"]["hidden_size"] = 64
        return wide

    flops = script.arithmetic(tiny_model(parts))
    assert flops["decoder_each_other_sample"] < flops["decoder_first_sample"]
    assert flops["decoder_each_other_sample"] < flops["sam_decoder_each_prompt"]


def test_all_rows_of_tiny_models(script, monkeypatch, capsys):
    ready = script.row("import probabilistic_sam", "from transformers import SamModel", 1.0)
    monkeypatch.setattr(script, "measure_imports", lambda repeats: ready)
    monkeypatch.setattr(script, "measure_memory", lambda model, name: script.row(f"memory, {name}", "", None))
    speeds = [script.row(what, "1 process", 1.5) for what in ("training", "evaluation")]
    monkeypatch.setattr(script, "measure_processes", lambda *arguments: speeds)
    monkeypatch.setattr(script, "measure_speeds", lambda *arguments: {"evaluation": 3.0})
    monkeypatch.setattr(script, "start", lambda *arguments: None)  # the build of phantom slices
    monkeypatch.setattr(script, "mobile_sam_config", lambda size: tiny_model(tiny_vit_parts).config)
    small = tiny_model(tiny_vit_parts)
    monkeypatch.setattr(script, "example_inputs", lambda processor: script.image_and_box(small))
    content = script.measure_all(
        {"ViT-B at 32": tiny_model(), "shipped at 32": small}, ProbabilisticSamProcessor(32, 32), repeats=1,
        num_nodules=1, num_steps=1, eval_slices=1, image_sizes=(32,), num_rows=2, num_slices=2, loop_slices=1,
    )  # fmt: skip
    recorded = json.loads((ROOT / "training" / "results" / "bench.json").read_text())["rows"]
    assert len(content["rows"]) == len(recorded) == 15 and content["flops"].keys() == {"ViT-B at 32", "shipped at 32"}
    assert {item["against"] for item in recorded} > {
        item["against"]
        for item in content["rows"]
        if not item["what"].startswith(("memory", "training", "evaluation"))
    }
    json.dumps(content, allow_nan=False)
    assert len(capsys.readouterr().out.splitlines()) >= len(content["rows"])


@pytest.mark.slow
def test_memory_is_measured_in_processes(script):
    item = script.measure_memory(tiny_model(), "tiny")
    assert item["ratio"] is None or min(item["mebibytes"]) > 0


def test_output_must_have_a_folder(script, tmp_path):
    with pytest.raises(UserError, match="accepted: a file in an existing folder"):
        script.parse_args(["--output", str(tmp_path / "absent" / "bench.json")])


@pytest.mark.parametrize(("name", "processes"), [("multi_gpu", 8), ("multi_node", 16), ("cpu_two_processes", 2)])
def test_accelerate_reads_the_configurations(name, processes):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.distributed_type == DistributedType.MULTI_GPU
    assert config.num_processes == processes and processes % config.num_machines == 0
    assert config.use_cpu == name.startswith("cpu")
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"multi_gpu", "multi_node", "cpu_two_processes"}


@pytest.mark.slow
def test_accelerate_starts_two_processes_without_a_gpu(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from accelerate import Accelerator\nstate = Accelerator().state\n"
        "text = f'process {state.process_index} of {state.num_processes} on {state.device.type}'\n"
        "print(text + '\\n', end='', flush=True)\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command = [*launcher, "--config_file", str(CONFIGS / "cpu_two_processes.yaml"), str(program)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert sorted(done.stdout.split("\n"))[-2:] == ["process 0 of 2 on cpu", "process 1 of 2 on cpu"]
