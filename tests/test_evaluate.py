"""training/evaluate.py: stub models in process, a tiny Probabilistic SAM from the command line."""

import json
import os
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forked import run_forked

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from tiny import evaluate_rows, load_script

from probabilistic_sam import ProbabilisticSamModel, ProbabilisticSamOutput, ProbabilisticSamProcessor, evaluation
from probabilistic_sam.baselines import EllipseConfig, EllipseModel
from probabilistic_sam.data import make_prompt, row_prompt, row_seed, split_of
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.data.format import decode_masks, encode_png, image_row, load_split
from probabilistic_sam.errors import UserError
from probabilistic_sam.inference import load_model
from probabilistic_sam.metrics import COLUMNS, METRICS, slice_metrics
from probabilistic_sam.workers import default_workers, start_workers

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "training" / "evaluate.py"
SIZE = 32
PATIENTS = [name for name in (f"LIDC-IDRI-{i:04d}" for i in range(1, 200)) if split_of(name) == "validation"][:5]


@pytest.fixture(scope="module")
def script():
    return load_script("evaluate")


def make_rows():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIZE, :SIZE]
    for number, patient in enumerate(PATIENTS):
        for slice_index in range(3):
            radii = rng.uniform(3, 6, size=4) * (rng.random(4) < 0.8)
            radii[0] = 4  # at least one reader annotated
            masks = [encode_png((y - 16) ** 2 + (x - 15) ** 2 < radius**2) for radius in radii]
            image = encode_png(rng.integers(0, 255, size=(SIZE, SIZE), dtype=np.uint8))
            yield image_row(
                image,
                masks,
                "image",
                [f"mask {i}" for i in range(4)],
                patient_id=patient,
                scan_id=number,
                nodule_id=0,
                slice_index=slice_index,
                source="test",
            )


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "lidc"
    write_dataset(make_rows(), path, "Made for a test.")
    return path


@pytest.fixture(scope="module")
def dataset(dataset_dir):
    return load_split(dataset_dir, "validation")


class StubProcessor:
    """The whole image as window, prompts as they are."""

    def __call__(self, images, return_tensors, input_boxes=None, input_points=None, input_labels=None):
        assert return_tensors == "pt"
        assert len(images) == 1
        features = {
            "pixel_values": torch.from_numpy(images[0].astype(np.float32)).expand(1, 3, -1, -1),
            "windows": torch.tensor([[0, 0, SIZE]]),
            "original_sizes": torch.tensor([[SIZE, SIZE]]),
        }
        if input_boxes is not None:
            features["input_boxes"] = torch.tensor(input_boxes)
        if input_points is not None:
            features["input_points"], features["input_labels"] = torch.tensor(input_points), torch.tensor(input_labels)
        return features

    def post_process_logits(self, pred_masks, windows, original_sizes):
        assert pred_masks.shape[-2:] == tuple(original_sizes[0].tolist())
        return list(pred_masks.flatten(0, 1))


class StubModel:
    """Its samples are the prompt's box, each side moved by noise from the generator."""

    noise = 1.5

    def __init__(self):
        self.calls = []

    def sample(self, pixel_values, num_samples, generator, input_boxes=None, input_points=None, input_labels=None):
        assert pixel_values.shape == (len(generator), 3, SIZE, SIZE)
        self.calls.append((input_boxes, input_points, input_labels))
        masks = []
        for index, one in enumerate(generator):
            point = None if input_points is None else input_points[index, 0, 0]
            box = input_boxes[index, 0] if point is None else point.repeat(2) + self.side
            masks.append(self.sample_box(box, num_samples, one))
        return SimpleNamespace(pred_masks=(torch.stack(masks).float() * 8 - 4)[:, None])  # (B, 1, N, H, W)

    def sample_box(self, box, num_samples, generator):
        sides = box + self.noise * torch.randn(num_samples, 4, generator=generator)  # (N, 4)
        centres = torch.arange(SIZE) + 0.5
        in_x = (centres > sides[:, :1]) & (centres < sides[:, 2:3])
        in_y = (centres > sides[:, 1:2]) & (centres < sides[:, 3:])
        return in_y[:, :, None] & in_x[:, None, :]

    side = torch.tensor([-4.0, -4.0, 4.0, 4.0])


class EmbeddingModel(StubModel):
    """The same with an encoder, which is called once per batch."""

    def __init__(self):
        super().__init__()
        self.encoded = []

    def get_image_embeddings(self, pixel_values):
        self.encoded.append(len(pixel_values))
        return pixel_values

    def sample(self, image_embeddings, **kwargs):
        return super().sample(image_embeddings, **kwargs)


def run(script, model, dataset, prompt="union_box", num_samples=4, seeds=(0,), batch_size=4, process=(0, 1), **more):
    state = SimpleNamespace(process_index=process[0], num_processes=process[1], is_main_process=False)
    return evaluation.evaluate_dataset(
        model, StubProcessor(), dataset, prompt, num_samples, seeds, batch_size, state, **more
    )


def geds(run_):
    return [slice_["all"]["ged"] for slice_ in run_]


def test_results_do_not_depend_on_batches_processes_or_encoder(script, dataset):
    patients, (expected,) = run(script, StubModel(), dataset)
    assert patients == [row["patient_id"] for row in dataset]
    assert len(set(geds(expected))) > 10  # the generators differ from row to row

    model = EmbeddingModel()
    assert geds(run(script, model, dataset, batch_size=7)[1][0]) == geds(expected)
    assert model.encoded == [7, 7, 1]

    by_process = [geds(run(script, StubModel(), dataset, process=(index, 2))[1][0]) for index in range(2)]
    assert by_process[0] == geds(expected)[:4] + geds(expected)[8:12]
    assert by_process[1] == geds(expected)[4:8] + geds(expected)[12:]


def test_workers_give_the_same_results_and_their_failures_are_one_line(dataset):
    oracle = evaluation.Oracle("oracle:readers")
    _, (expected,) = run(None, oracle, dataset)
    broken = dict(dataset.with_format("arrow")[0:1].to_pylist()[0])
    broken["masks"] = []
    message = "perhaps for lack of memory; accepted: fewer workers"
    with pytest.raises(UserError, match=message), start_workers(1) as workers:
        assert geds(run(None, oracle, dataset, batch_size=2, workers=workers)[1][0]) == geds(expected)
        with pytest.raises(UserError, match="masks of shapes"):
            workers.submit(evaluation.prepare_row, broken, None, "union_box", False).result()
        assert workers.submit(torch.get_num_threads).result() == 1
        workers.submit(os._exit, 1).result()
    with pytest.raises(KeyError), start_workers(1) as workers:  # an error here does not wait for tasks
        workers.submit(time.sleep, 0.1)
        raise KeyError


def test_default_number_of_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert default_workers("cuda", 1000) == (7, "8 cores beside cuda")
    assert default_workers("cpu", 1000)[0] == 1
    assert default_workers("cuda", 100) == (0, "only 100 slices")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_workers("cuda", 1000)[0] == default_workers("cpu", 1000)[0] == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(128)))
    assert default_workers("cuda", 1000)[0] == 16


def test_truth_is_that_of_the_manifest(script, dataset_dir, tmp_path):
    assert script.read_truth(str(dataset_dir)) == json.loads((dataset_dir / "manifest.json").read_text()).get("truth")
    assert script.read_truth("org/name") is None
    for content, expected in (('{"truth": "pylidc"}', "pylidc"), ('{"splits": {}}', None)):
        (tmp_path / "manifest.json").write_text(content)
        assert script.read_truth(str(tmp_path)) == expected
    for content, message in (("[1]", "not a JSON object"), ("{", "not a JSON object"), ('{"truth": 1}', "truth is 1")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=message):
            script.read_truth(str(tmp_path))


def test_each_row_is_scored_with_its_own_readers(dataset):
    """A row of two and a row of four readers in one batch give the scores that each of them gives alone."""
    two, four = (dict(dataset[index]) for index in (0, 1))
    two["masks"] = two["masks"][:2]
    scores = evaluate_rows(StubModel(), StubProcessor(), [two, four], "union_box", 4, [0])
    for row, found in zip((two, four), scores, strict=True):
        masks = decode_masks(row)
        assert found[0]["all"]["readers_annotated"] == masks.any(axis=(1, 2)).sum()
        assert found[0]["all"]["empty_rate_readers"] == 1 - masks.any(axis=(1, 2)).mean()
        alone = evaluate_rows(StubModel(), StubProcessor(), [row], "union_box", 4, [0])[0]
        assert found[0]["all"]["ged"] == alone[0]["all"]["ged"]
    assert scores[0][0]["four_readers"] is None


def test_seeds_are_separate_runs(script, dataset):
    _, both = run(script, EmbeddingModel(), dataset, seeds=(0, 7))
    _, first = run(script, EmbeddingModel(), dataset, seeds=(0,))
    _, second = run(script, EmbeddingModel(), dataset, seeds=(7,))
    assert geds(both[0]) == geds(first[0])
    assert geds(both[1]) == geds(second[0]) != geds(first[0])


class AlternatingModel(StubModel):
    """Half of the samples of one call are the box, half are empty: spread evenly, not independent."""

    noise = 0.0

    def sample_box(self, box, num_samples, generator):
        masks = super().sample_box(box, num_samples, generator)
        spread = (torch.arange(num_samples) + torch.rand(1, generator=generator)) / num_samples
        return masks & (spread <= 0.5)[:, None, None]


def test_independent_samples_are_those_of_a_call_each(script, dataset, monkeypatch):
    _, (together,) = run(script, AlternatingModel(), dataset)
    _, (independent,) = run(script, AlternatingModel(), dataset, independent=True)
    row = dataset[0]
    box = torch.tensor(row_prompt(row, decode_masks(row), "union_box")["input_boxes"])
    generator = torch.Generator().manual_seed(row_seed(row, "samples 0 None"))
    masks = [AlternatingModel().sample_box(box, 1, generator).any().item() for _ in range(4)]
    assert independent[0]["all"]["empty_rate_samples"] == 1 - np.mean(masks)
    assert [item["all"]["ged_unbiased"][1] for item in (together[0], independent[0])] == [0, 1]
    shares = [[slice_["all"]["empty_rate_samples"] for slice_ in slices] for slices in (together, independent)]
    assert set(shares[0]) == {0.5}
    assert len(set(shares[1])) > 2  # random from call to call
    monkeypatch.setattr(evaluation, "INDEPENDENT_AT_ONCE", 3)  # does not divide the samples of a window
    assert geds(run(script, AlternatingModel(), dataset, independent=True)[1][0]) == geds(independent)


class OrderedModel(StubModel):
    """The first quarter of the samples of one call is the box, the others are empty."""

    noise = 0.0

    def sample(self, **kwargs):
        return ProbabilisticSamOutput(pred_masks=super().sample(**kwargs).pred_masks)

    def sample_box(self, box, num_samples, generator):
        masks = super().sample_box(box, num_samples, generator)
        return masks & (torch.arange(num_samples) < num_samples / 4)[:, None, None]


def test_candidates_are_thinned(script, model_dir, dataset_dir, dataset, tmp_path):
    _, (scores,) = run(script, OrderedModel(), dataset, num_candidates=12)
    assert {slice_["all"]["empty_rate_samples"] for slice_ in scores} == {0.75}  # of 3 boxes in 12 samples 1 in 4
    more = ("--num_samples", "2", "--num_candidates", "6", "--max_slices", "2")
    script.main(arguments(model_dir, dataset_dir, tmp_path / "results.json", *more))
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["num_samples"], content["num_candidates"]) == (2, 6)


def test_prompts_reach_the_model_in_its_shapes(script, dataset):
    model = StubModel()
    run(script, model, dataset.select([0]), prompt="center_box")
    run(script, model, dataset.select([0]), prompt="center_point")
    (boxes, _, _), (_, points, labels) = model.calls
    assert boxes.shape == (1, 1, 4)
    assert points.shape == (1, 1, 1, 2)
    assert labels.tolist() == [[[1]]]


def test_reader_box_scores_readers_with_samples_of_their_own_box(script, dataset):
    # Without noise each sample fills the box of its reader, so the Dice is that of a disc and its own tight box. The
    # union box would be too large for all readers but the one with the largest disc.
    model = StubModel()
    model.noise = 0.0
    index = next(i for i, row in enumerate(dataset) if row["num_nonempty"] == 4)
    (slice_,) = run(script, model, dataset.select([index]), prompt="reader_box")[1][0]
    assert [len(boxes) for boxes, _, _ in model.calls] == [4]
    masks = decode_masks(dataset[index])
    expected = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = np.zeros_like(mask)
        box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        expected.append(2 * (box & mask).sum() / (box.sum() + mask.sum()))
    assert slice_["four_readers"]["dice_mean"] == pytest.approx(np.mean(expected))
    assert slice_["four_readers"]["dice_max_per_reader"] == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("prompt", ["union_box", "center_point"])
def test_prompt_follows_from_the_identity_of_the_row(dataset, prompt):
    row = dataset[0]
    masks = decode_masks(row)
    expected = make_prompt(masks, prompt, np.random.default_rng(row_seed(row, prompt)))
    assert row_prompt(row, masks, prompt) == expected != row_prompt(dataset[1], masks, prompt)


def test_samples_that_cannot_be_scored_are_refused(script, dataset):
    model = StubModel()
    model.sample = lambda **kwargs: SimpleNamespace(pred_masks=torch.zeros(4, 1, 1, SIZE, SIZE))
    with pytest.raises(UserError, match="returned 1 masks instead of 4"):
        run(script, model, dataset)
    model.sample = lambda **kwargs: SimpleNamespace(pred_masks=torch.full((4, 1, 4, SIZE, SIZE), torch.nan))
    with pytest.raises(UserError, match="not finite"):
        run(script, model, dataset)


def test_latent_state_does_not_change_the_samples(script, model_dir, dataset):
    model, processor = ProbabilisticSamModel.from_pretrained(model_dir), ProbabilisticSamProcessor(32, 24)
    rows = [dataset[index] for index in range(2)]
    (first, second), _ = evaluate_rows(model.eval(), processor, rows, "union_box", 3, (0, 1))
    assert "collapse" not in second  # only the noise of the reconstructions would differ
    state = first.pop("collapse")
    assert state["kl"].shape == state["posterior_mean"].shape == (4, 3)
    assert state["annotated"].tolist() == decode_masks(rows[0]).any(axis=(1, 2)).tolist()
    assert len(state["iou"]) == state["annotated"].sum()

    (leaking,), _ = evaluate_rows(model, processor, rows, "reader_box", 3, (0,))
    assert "collapse" not in leaking
    del model.posterior
    (alone, _), _ = evaluate_rows(model, processor, rows, "union_box", 3, (0, 1))
    assert "collapse" not in alone
    assert alone["all"].pop("calibration").tolist() == first["all"].pop("calibration").tolist()
    assert alone["all"] == first["all"]


@pytest.mark.parametrize("shipped", [False, True])
def test_latent_space_counts_masks_that_vanish_in_the_window(script, model_dir, shipped):
    # Tiny: 24 pixels of the image become 8. Shipped: a lesion of 100 pixels needs a window wider than the 64 of a mask
    size, first, last = (160, 30, 130) if shipped else (SIZE, 12, 20)
    folder = ROOT / "model_cards" / "psam-lidc" if shipped else model_dir
    masks = np.zeros((3, size, size), bool)
    masks[0, first:last, first:last] = masks[1, last - 5, last - 5] = True  # a single pixel is lost
    row = image_row(
        encode_png(np.eye(size, dtype=np.uint8)), [encode_png(mask) for mask in masks], "image", ["mask"] * 3,
        patient_id=PATIENTS[0], scan_id=0, nodule_id=0, slice_index=0, source="test",
    )  # fmt: skip
    model = ProbabilisticSamModel.from_pretrained(folder).eval()
    processor = ProbabilisticSamProcessor.from_pretrained(folder) if shipped else ProbabilisticSamProcessor(32, 24)
    ((scores,),) = evaluate_rows(model, processor, [row], "union_box", 2, (0,))
    assert scores["collapse"]["annotated"].tolist() == [True, True, False] and len(scores["collapse"]["iou"]) == 2
    assert np.isfinite(scores["collapse"]["iou"]).all()


def test_max_slices_takes_a_fixed_subset(script, dataset):
    def choose(rows, count):
        return rows.select(evaluation.choose_rows(rows, count, "evaluated slices"))

    def identity(chosen):
        return [(row["patient_id"], row["slice_index"]) for row in chosen]

    few, more = (identity(choose(dataset, count)) for count in (4, 8))
    assert (len(few), len(more)) == (4, 8)
    assert set(few) < set(more)  # more slices include the fewer
    assert more == [item for item in identity(dataset) if item in more]  # in the order of the file
    assert more != identity(dataset)[:8]
    assert evaluation.choose_rows(dataset, 100, "") == evaluation.choose_rows(dataset, None, "") == list(range(15))
    shuffled = dataset.select(range(len(dataset) - 1, -1, -1))
    assert set(identity(choose(shuffled, 4))) == set(few)


# ---------------------------------------------------------------------------------------------- from the command line


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    from probabilistic_sam import ProbabilisticSamConfig

    torch.manual_seed(0)
    config = ProbabilisticSamConfig(
        vision_config={
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "output_channels": 16,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
            "num_pos_feats": 8,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 32, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 16,
            "mlp_dim": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
        },
        latent_dim=3,
        latent_hidden_size=8,
    )
    path = tmp_path_factory.mktemp("model")
    ProbabilisticSamModel(config).save_pretrained(path)
    ProbabilisticSamProcessor(image_size=32, crop_size=24).save_pretrained(path)
    return path


def arguments(model_dir, dataset_dir, output, *more):
    return ["--model", str(model_dir), "--dataset", str(dataset_dir), "--output", str(output), *more]


def test_results_file(script, model_dir, dataset_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training/evaluate.py", "--as", "called"])
    output = tmp_path / "new" / "results.json"
    more = ("--num_samples", "3", "--seeds", "0", "1", "--max_slices", "6", "--device", "cpu", "--independent")
    script.main(arguments(model_dir, dataset_dir, output, *more))
    content = json.loads(output.read_text())
    assert content["model"] == str(model_dir)
    assert content["split"] == "validation"
    assert content["prompt"] == "union_box"
    assert (content["num_samples"], content["sampling"], content["seed"]) == (3, "independent", [0, 1])
    assert (content["num_slices"], content["max_slices"]) == (6, 6)
    assert (content["num_workers"], content["batch_size"]) == (0, 8) and "truth" in content
    assert 1 < content["num_patients"] <= len(PATIENTS)
    assert "hash" in content["slice_selection"]
    assert content["command"] == "python training/evaluate.py --as called"
    assert set(content["versions"]) >= {"python", "torch", "transformers"}
    assert content["commit"]
    assert content["date"].endswith("+00:00")
    for results in (content["results"], *content["per_seed"].values()):
        assert list(results) == list(COLUMNS)
        for column in results.values():
            assert set(column) == {"count", "num_patients", *METRICS}
    means = [content["per_seed"][seed]["all"]["ged"]["mean"] for seed in ("0", "1")]
    assert content["results"]["all"]["ged"]["mean"] == pytest.approx(np.mean(means), abs=2e-6)
    assert len(content["collapse"]["kl_per_dimension"]) == 3  # latent_dim
    assert list(output.parent.iterdir()) == [output]  # nothing temporary is left
    printed = capsys.readouterr().out
    assert "four_readers (" in printed
    assert printed.startswith("0 workers for inputs and metrics (only 6 slices), 8 slices per batch\n")
    assert content["results"]["all"]["ged_unbiased"]["count"] == 6  # independent samples
    assert f"wrote {output}: 6 slices" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split", "test"], "has no split 'test'; accepted: validation"),
        (["--dataset", "nowhere"], "nowhere: no such directory"),
        (["--model", "no/such/model"], "no model directory at no/such/model; accepted: "),
        (["--num_samples", "0"], "--num_samples is 0; accepted: 1 or more"),
        (["--batch_size", "-1"], "--batch_size is -1"),
        (["--num_workers", "-1"], "--num_workers is -1; accepted: 0 to 256"),
        (["--seeds", "1", "1"], "accepted: different numbers"),
        (["--num_candidates", "15"], "--num_candidates is 15; accepted: --num_samples (16"),
        (["--num_candidates", "48", "--independent"], "--num_candidates is given with --independent; accepted"),
        (["--num_candidates", "48", "--model", "oracle:readers"], "given with --model oracle:readers; accepted"),
        (["--num_candidates", "48", "--level", "nodule"], "--num_candidates is given with --level nodule; accepted"),
        (["--device", "abacus"], "--device is 'abacus'"),
        (["--output", "."], "is a directory"),
        (["--runtime", "onnx"], "has no onnx/"),
        (["--runtime", "onnx", "--model", "oracle:majority"], "--runtime is onnx, but oracle:majority is no model"),
    ],
)
def test_wrong_arguments(script, model_dir, dataset_dir, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        script.main(arguments(model_dir, dataset_dir, tmp_path / "results.json", *more))
    assert not (tmp_path / "results.json").exists()


def test_incomplete_weights_are_refused(script, model_dir, dataset_dir, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "model"
    broken.mkdir()
    for file in model_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    lost = sorted(name for name in tensors if name.startswith("prior"))[0]
    del tensors[lost]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 tensors, such as {lost}: its weights are incomplete"):
        script.main(arguments(broken, dataset_dir, tmp_path / "results.json"))

    content = (model_dir / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        script.main(arguments(broken, dataset_dir, tmp_path / "results.json"))


def test_baselines_open_only_where_they_are_asked_for(tmp_path):
    model = EllipseModel(EllipseConfig(image_size=SIZE))
    torch.nn.init.constant_(model.log_scale_mean, 0.25)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no processor_config.json"):
        load_model(tmp_path, baselines=True)
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(tmp_path)
    opened, processor = load_model(tmp_path, baselines=True)
    assert isinstance(opened, EllipseModel) and not opened.training and processor.crop_size == 24
    assert opened.log_scale_mean.item() == 0.25
    with pytest.raises(UserError, match="is of type 'ellipse', not a Probabilistic SAM; accepted: "):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="is of type 'bert', neither a Probabilistic SAM nor one of its baselines"):
        load_model(tmp_path, baselines=True)


def test_shipped_model_opens_for_evaluation():
    model, processor = load_model(ROOT / "model_cards" / "psam-lidc", torch.device("cpu"), baselines=True)
    assert isinstance(model, ProbabilisticSamModel) and model.dtype == torch.float32
    assert processor.image_size == model.config.vision_config.image_size == 256


@pytest.mark.slow
@pytest.mark.parametrize("level", ["slice", "nodule"])
def test_onnxruntime_gives_the_same_results(script, exported, tmp_path, level):
    """Of the shipped architecture, on phantoms; test_onnx.py compares the masks themselves."""
    from probabilistic_sam.data.lidc.phantom import demo_nodules, phantom_row

    rows = [phantom_row(nodule, index) for nodule in demo_nodules(1) for index in range(len(nodule.z_mm))]
    write_dataset(rows, tmp_path / "phantom", "Made for a test.")
    found = {}
    for runtime in ("torch", "onnx"):
        output = tmp_path / f"{runtime}.json"
        limit = ["--max_slices", "3"] if level == "slice" else ["--max_nodules", "1"]
        script.main(
            ["--model", str(exported), "--dataset", str(tmp_path / "phantom"), "--level", level, "--num_samples", "3",
             "--num_workers", "0", "--output", str(output), "--runtime", runtime, *limit]
        )  # fmt: skip
        found[runtime] = json.loads(output.read_text())
        assert found[runtime]["runtime"] == runtime
    columns = [item["results"]["all" if level == "slice" else "samples"] for item in found.values()]
    name = "ged" if level == "slice" else "ged_3d"
    assert columns[1][name]["mean"] == pytest.approx(columns[0][name]["mean"], abs=2e-3)


def test_two_processes_give_the_same_results(model_dir, dataset_dir, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    results = {}
    for count in (1, 2):
        output = tmp_path / f"{count}.json"
        command = [SCRIPT, *arguments(model_dir, dataset_dir, output, "--num_samples", "3", "--batch_size", "2")]
        finished = run_forked(*command, environment=environment, processes=count)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("wrote ") == 1
        content = json.loads(output.read_text())
        assert content["num_processes"] == count
        results[count] = content["results"] | {"collapse": content["collapse"]}
    assert results[1] == results[2]
    assert results[1]["all"]["count"] == 3 * len(PATIENTS)


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    finished = run_forked(SCRIPT, *arguments("m", tmp_path / "nowhere", tmp_path / "results.json"))
    assert finished.returncode == 2
    assert finished.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "nowhere: no such directory" in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("corner", [(40, 60), (-7, -5), (150, 170)])
@pytest.mark.parametrize("kind", ["some", "empty samples", "one reader"])
def test_scores_of_a_part_of_the_image_are_those_of_the_whole(corner, kind):
    rng, size, (y, x), side = np.random.default_rng(0), (180, 200), corner, 40
    rows, columns = slice(max(y, 0), min(y + side, size[0])), slice(max(x, 0), min(x + side, size[1]))
    probabilities = np.full((5, *size), evaluation.OUTSIDE_PROBABILITY, np.float32)
    shape = probabilities[:, rows, columns].shape
    probabilities[:, rows, columns] = rng.random(shape) * (0.4 if kind == "empty samples" else 1)
    masks = np.zeros((4, *size), bool)
    masks[: 1 if kind == "one reader" else 3, 90:99, 80:91] = True
    masks[1:, 95:97] &= rng.random((3, 2, size[1])) < 0.5
    samples = probabilities > 0.5
    inside = probabilities[:, rows, columns]
    window = evaluation.WindowSamples(rows, columns, np.packbits(inside > 0.5), inside, np.arange(5.0))
    found = evaluation.score_samples([window], masks, by_reader=False, independent=True)
    expected = slice_metrics(samples, probabilities, masks, independent=True, iou_scores=np.arange(5.0))
    assert found.keys() == expected.keys()
    for column, scores in expected.items():
        assert (found[column] is None) == (scores is None)
        for name, value in (scores or {}).items():
            np.testing.assert_allclose(found[column][name], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_memory_of_scores_does_not_grow_with_the_image():
    masks = np.zeros((1, 3000, 3000), bool)
    masks[0, 1000:1060, 1500:1570] = True
    inside = np.full((16, 128, 128), 0.7, np.float32)
    window = evaluation.WindowSamples(slice(960, 1088), slice(1470, 1598), np.packbits(inside > 0.5), inside, None)
    tracemalloc.start()
    evaluation.score_samples([window], masks, by_reader=False, independent=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 150 * 2**20  # whole images would take 16 x 9 million pixels x 5 bytes
