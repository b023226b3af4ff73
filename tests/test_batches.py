"""Training windows: dataset, sampler, loader, and resizing in a batch."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import SIZE, tiny_model, tiny_rows, tiny_vit_parts

pytest.importorskip("accelerate")
pytest.importorskip("datasets")

import datasets

from probabilistic_sam import ProbabilisticSamProcessor
from probabilistic_sam.data.build import write_dataset
from probabilistic_sam.data.format import FEATURES, decode_image, decode_masks, encode_png, load_split
from probabilistic_sam.errors import UserError
from probabilistic_sam.training.batches import (
    StepSampler,
    TrainingWindows,
    WindowKey,
    choose_workers,
    collate,
    make_loader,
    next_batch,
    reader_counts,
    resize_windows,
)
from probabilistic_sam.training.config import TrainingConfig
from probabilistic_sam.training.embedding_cache import EmbeddingCache
from probabilistic_sam.training.windows import random_view, view_pixel_values

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("dataset") / "lidc"
    write_dataset(tiny_rows({"train": 4}), path, "Made for a test.")
    return load_split(path, "train")  # 12 rows


@pytest.fixture(scope="module")
def processor():
    return ProbabilisticSamProcessor(SIZE, 24)


def make_config(**changes):
    values = {"image_size": SIZE, "batch_size": 4, "max_steps": 8, "augmentation": {"max_zoom": 0.5}}
    return TrainingConfig(base_model="random", **(values | changes))


def make_sampler(rank=0, world_size=1, readers=(4,) * 12, **changes):
    return StepSampler(np.array(readers), make_config(**changes), rank, world_size)


def rows_of(keys):
    return [key.row for key in keys]


def some_rows(*items):
    """Rows from images and lists of masks, with the required columns alone."""
    made = [
        {
            "image": {"bytes": encode_png(image), "path": None},
            "masks": [{"bytes": encode_png(mask), "path": None} for mask in masks],
        }
        for image, masks in items
    ]
    return datasets.Dataset.from_list(made, features=datasets.Features({name: FEATURES[name] for name in made[0]}))


def square(side=SIZE, low=8, high=20):
    mask = np.zeros((side, side), bool)
    mask[low:high, low:high] = True
    return mask


# --------------------------------------------------------------------------------------------------------- sampler


def test_an_epoch_visits_every_row_once_in_another_order():
    sampler = make_sampler()
    epochs = [sum((rows_of(sampler.keys(step)) for step in range(start, start + 3)), []) for start in (0, 3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12))
    assert epochs[0] != epochs[1]
    assert {key.epoch for key in sampler.keys(2)} == {0} and {key.epoch for key in sampler.keys(3)} == {1}


def test_keys_follow_from_seed_and_step_alone():
    keys = make_sampler().keys(7)
    again = make_sampler()
    again.keys(0)
    assert again.keys(7) == keys and make_sampler(seed=1).keys(7) != keys
    assert len({key.seed for step in range(8) for key in again.keys(step)}) == 32


def test_sampler_starts_at_any_step():
    whole, resumed = list(make_sampler()), make_sampler()
    resumed.start = 5
    assert len(whole) == 8 and list(resumed) == whole[5:]


def test_processes_and_micro_batches_share_the_keys_of_a_step():
    whole = list(make_sampler())
    accumulated = list(make_sampler(gradient_accumulation=2))
    processes = [list(make_sampler(rank, 2)) for rank in (0, 1)]
    both = [list(make_sampler(rank, 2, gradient_accumulation=2)) for rank in (0, 1)]
    for step, keys in enumerate(whole):
        assert accumulated[2 * step] + accumulated[2 * step + 1] == keys
        assert processes[0][step] + processes[1][step] == keys
        assert sum((both[rank][2 * step + part] for rank in (0, 1) for part in (0, 1)), []) == keys
    with pytest.raises(
        UserError, match="batch_size is 4 with 3 processes and gradient_accumulation 1; accepted: a mu"
    ):
        make_sampler(0, 3)
    with pytest.raises(UserError, match="accepted: a multiple of 8"):
        make_sampler(0, 2, gradient_accumulation=4)


def test_windows_of_a_step_have_one_kind_of_prompt_in_the_configured_shares():
    sampler = make_sampler(prompts={"union_box": 3.0, "center_point": 1.0}, max_steps=400)
    kinds = [{key.prompt for key in sampler.keys(step)} for step in range(400)]
    assert all(len(kind) == 1 for kind in kinds)
    assert sum(kind == {"union_box"} for kind in kinds) == pytest.approx(300, abs=30)


def test_weights_make_the_mean_over_all_readers():
    counts = np.arange(1, 13)
    parts = [make_sampler(rank, 2, counts, gradient_accumulation=2) for rank in (0, 1)]
    losses = np.random.default_rng(0).random(12)  # of each row's readers
    for step in range(3):
        rows = rows_of(parts[0].keys(step))
        wanted = (losses[rows] * counts[rows]).sum() / counts[rows].sum()
        # batches of one row: the loss of a micro-batch is that of its row
        weights = parts[0].weights(step) + parts[1].weights(step)
        assert np.mean(np.array(weights) * losses[rows]) == pytest.approx(wanted)
    assert make_sampler(gradient_accumulation=2).weights(0) == [1, 1]


def test_readers_are_counted_without_decoding(monkeypatch):
    rows = some_rows(*((np.zeros((SIZE, SIZE), np.uint8), [square()] * count) for count in (3, 1, 2)))
    monkeypatch.setattr(datasets.Image, "decode_example", lambda *args, **kwargs: pytest.fail("decoded"))
    assert reader_counts(rows.select([2, 0, 1])).tolist() == [2, 3, 1]
    mask = rows.with_format("arrow")[:1].to_pylist()[0]["masks"][0]
    features = datasets.Features({"masks": FEATURES["masks"]})
    gaps = datasets.Dataset.from_dict({"masks": [[mask, None], [None, mask, mask], [None], [mask]]}, features)
    assert reader_counts(gaps).tolist() == [1, 2, 0, 1] and reader_counts(gaps.select([2, 1])).tolist() == [0, 2]


# --------------------------------------------------------------------------------------------------------- windows


def test_window_follows_from_its_key(rows, processor):
    windows = TrainingWindows(rows, processor, make_config())
    key = WindowKey(5, 0, (0, 3, 2, 1), "union_box")
    first, again, other = (windows[k] for k in (key, key, key._replace(seed=(0, 3, 2, 2))))
    assert first.keys() == {"input_boxes", "labels", "annotated", "window"}
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["input_boxes"], other["input_boxes"])
    view = random_view(decode_masks(rows[5]), processor, np.random.default_rng(key.seed), **make_config().augmentation)
    side = first["window"].shape[-1]
    assert first["window"].shape == (1, side, side) and side == min(view.window[2], SIZE)
    expected = view_pixel_values(decode_image(rows[5]), view, processor)
    batch = collate([first, other])
    pixels = processor.normalize(resize_windows(batch["windows"], batch["sides"], SIZE))
    assert torch.allclose(pixels[0], expected, atol=1e-4)


def test_cached_windows_alternate_between_the_views(rows, processor, tmp_path):
    cache = EmbeddingCache(tiny_model(tiny_vit_parts), processor, rows, 2, 0, tmp_path, make_config().augmentation)
    windows = TrainingWindows(rows, processor, make_config(), cache)
    for epoch in range(3):
        item = windows[WindowKey(4, epoch, (0, 3, epoch, 1), "center_point")]
        assert torch.equal(item["image_embeddings"], cache.embedding(4, epoch % 2))
        assert item["input_points"].shape == (2,) and "window" not in item


def nodule_rows(*boxes):
    """Slices of one nodule, each with one square (low, high) that two readers annotated."""
    rows = some_rows(*((np.zeros((SIZE, SIZE), np.uint8), [square(low=low, high=high)] * 2) for low, high in boxes))
    for name, value in {"scan_id": 1, "nodule_id": 2, "pixel_spacing_mm": 0.7, "crop_row": 5, "crop_col": 6}.items():
        rows = rows.add_column(name, [value] * len(rows))
    rows = rows.add_column("patient_id", ["LIDC-IDRI-0001"] * len(rows))
    rows = rows.add_column("z_mm", [2.0 * number for number in range(len(rows))])
    return rows.add_column("slice_thickness_mm", [2.0] * len(rows))


@pytest.mark.parametrize("cached", [False, True])
def test_nodule_box_covers_the_slices_of_the_nodule(processor, tmp_path, cached):
    rows = nodule_rows((4, 8), (14, 20), (6, 12))
    still = {"max_shift": 0.0, "max_zoom": 0.0, "max_gamma": 0.0, "symmetries": "none"}
    config = make_config(prompts={"nodule_box": 1.0}, augmentation=still)
    cache = EmbeddingCache(tiny_model(tiny_vit_parts), processor, rows, 1, 0, tmp_path, still) if cached else None
    item = TrainingWindows(rows, processor, config, cache)[WindowKey(0, 0, (0,), "nodule_box")]
    middle = 6 if cached else 12  # cached windows are cut around the slice's own masks, others around the nodule
    x, y, side = processor.window(SIZE, SIZE, {"input_boxes": torch.tensor([[middle - 1.0] * 2 + [middle + 1.0] * 2])})
    corners = item["input_boxes"].unflatten(0, (2, 2)) * side / SIZE + torch.tensor([x, y])
    # Jitter of at most a tenth of the 16 px and 1.5 px
    assert torch.allclose(corners, torch.tensor([[4.0, 4.0], [20.0, 20.0]]), atol=3.1)
    assert corners[1, 0] - corners[0, 0] > 9 and len(item["labels"]) == 2  # the slice's own box has a side of 4
    assert item["annotated"].tolist() == [True] * 2


def test_nodule_box_needs_nodules(rows, processor):
    with pytest.raises(UserError, match="no nodule of known geometry"):
        TrainingWindows(rows, processor, make_config(prompts={"union_box": 0.5, "nodule_box": 0.5}))


def test_dataset_is_small_when_it_goes_to_a_worker(rows, processor, tmp_path):
    cache = EmbeddingCache(tiny_model(tiny_vit_parts), processor, rows, 8, 0, tmp_path, make_config().augmentation)
    assert cache.embeddings.nbytes > 20_000
    key = WindowKey(4, 1, (0, 3, 1, 1), "union_box")
    for windows in (
        TrainingWindows(rows, processor, make_config(), cache),
        TrainingWindows(rows, processor, make_config()),
    ):
        sent = pickle.dumps(windows)
        assert len(sent) < 20_000  # about 15 kB name the columns, the casts and the files
        item, expected = pickle.loads(sent)[key], windows[key]
        assert all(torch.equal(value, item[name]) for name, value in expected.items())


def test_rows_that_cannot_be_trained_on_are_named(processor):
    image = np.zeros((SIZE, SIZE), np.uint8)
    nobody = some_rows((image, [square()]), (image, [np.zeros((SIZE, SIZE), bool)]))
    wide = some_rows((image, [square()]), (np.zeros((SIZE, SIZE + 1), np.uint8), [square()]))
    for rows, message in (
        (nobody, "row 1 of the training split has no annotated pixel"),
        (wide, "a row: image of 33x32 pixels and masks of 32x32; accepted: one size"),
    ):
        windows = TrainingWindows(rows, processor, make_config(batch_size=2))
        for workers in (0, 1):
            loader = make_loader(windows, make_sampler(readers=(1, 1), batch_size=2), workers, CPU)
            with pytest.raises(UserError, match=f"^{message}") as error:
                next_batch(iter(loader))
            assert "\n" not in str(error.value)


def test_workers_give_the_same_batches(rows, processor):
    augmentation = {"rotation": 20.0, "noise": 0.1, "contrast": 0.2}
    windows = TrainingWindows(rows, processor, make_config(augmentation=augmentation))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers
    both = [list(make_loader(windows, make_sampler(gradient_accumulation=2), workers, CPU)) for workers in (0, 2)]
    torch.set_num_threads(threads)
    assert len(both[0]) == len(both[1]) == 16
    for one, other in zip(*both, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("num_kept", [0, 2, 4])
def test_rows_stay_decoded_until_they_fill_the_memory(processor, monkeypatch, num_kept):
    images = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE), dtype=np.uint8)
    rows = some_rows(*((image, [square(), square(low=10)]) for image in images))
    size = SIZE * SIZE + 2 * SIZE * SIZE // 8  # of a row in bytes: a byte per pixel, and a bit per pixel and mask
    module = TrainingWindows.__module__
    monkeypatch.setattr(f"{module}.KEPT_BYTES", num_kept * size + size - 1)
    windows = TrainingWindows(rows, processor, make_config())
    keys = [WindowKey(row, 0, (row,), "center_box") for row in range(4)]
    first = [windows[key] for key in keys]
    decoded = []
    monkeypatch.setattr(f"{module}.decode_masks", lambda row: decoded.append(1) or decode_masks(row))
    for key, item in zip(keys, first, strict=True):
        again = windows[key]
        assert again.keys() == item.keys() and all(torch.equal(again[name], item[name]) for name in item)
    assert len(decoded) == 4 - num_kept


WORKERS_OF_A_GPU = """
import sys, warnings
import torch
from probabilistic_sam.training.batches import make_loader
class Windows(torch.utils.data.Dataset):
    def __getitem__(self, key):
        imported = "probabilistic_sam.training.loop" in sys.modules  # by the server, before it forked this worker
        return {"labels": torch.tensor([[imported]]), "annotated": torch.tensor([1])}
if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of memory that cannot be pinned without a GPU
    loader = make_loader(Windows(), [[0], [1]], 2, torch.device("cuda"))
    print(loader.multiprocessing_context.get_start_method(), [bool(batch["labels"]) for batch in loader])
"""


def test_workers_beside_a_gpu_do_not_import_for_themselves(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS_OF_A_GPU)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "forkserver [True, True]\n", done.stderr


def test_number_of_workers(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert choose_workers(3, cuda, 1) == (3, "num_workers of the configuration")
    assert choose_workers(-1, CPU, 1)[0] == 0 and choose_workers(-1, cuda, 1)[0] == 15
    assert choose_workers(-1, cuda, 4)[0] == 3 and choose_workers(-1, cuda, 16)[0] == 1


# --------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "colour"])
def test_windows_of_a_batch_are_resized_as_the_processor_resizes_each(channels):
    processor = ProbabilisticSamProcessor(256, 64)
    rng = np.random.default_rng(0)
    windows = [
        torch.from_numpy(rng.uniform(0, 255, (channels, side, side)).astype(np.float32))
        for side in (2, 31, 64, 73, 128, 255, 256, 300)
    ]
    sent = [processor.resize(window) if window.shape[-1] > 256 else window for window in windows]
    reader = {"labels": torch.zeros(1, 64, 64), "annotated": torch.ones(1), "input_boxes": torch.zeros(4)}
    batch = collate([reader | {"window": window} for window in sent])
    assert batch["windows"].shape == (8, channels, 256, 256) and batch["sides"].tolist()[-2:] == [256, 256]
    resized = resize_windows(batch["windows"], batch["sides"], 256)
    for window, result in zip(windows, resized, strict=True):
        assert torch.allclose(result, processor.resize(window), atol=1e-4)  # of 255
    # From the image to the model's input, in one batch
    image = torch.from_numpy(rng.uniform(0, 4000, (channels, 128, 128)).astype(np.float32))
    places = [(10, 20, 64), (-30, 90, 71), (0, 0, 128)]
    batch = collate([reader | {"window": processor.stretch(image, place)} for place in places])
    pixels = processor.normalize(resize_windows(batch["windows"], batch["sides"], 256))
    for place, result in zip(places, pixels, strict=True):
        assert torch.allclose(result, processor.pixel_values(image, place), atol=1e-5)


def test_batch_has_the_shapes_of_the_model(processor):
    grey, colour = np.zeros((SIZE, SIZE), np.uint8), np.zeros((SIZE, SIZE, 3), np.uint8)
    colour[..., 1] = square() * 200
    windows = TrainingWindows(some_rows((grey, [square()] * 2), (colour, [square()] * 3)), processor, make_config())
    items = [windows[WindowKey(row, 0, (0, row), "union_box")] for row in (0, 1)]
    batch = collate(items)
    assert batch["input_boxes"].shape == (2, 1, 4)
    assert batch["labels"].shape == (2, 1, 3, 8, 8) and batch["labels"].dtype == torch.bool
    assert batch["labels"][0, 0].any(dim=(1, 2)).tolist() == [True, True, False]  # the third reader is absent
    assert batch["reader_mask"][:, 0].tolist() == [[True, True, False], [True, True, True]]
    side = max(item["window"].shape[-1] for item in items)
    assert batch["windows"].shape == (2, 3, side, side)
    assert torch.equal(batch["windows"][0, 0], batch["windows"][0, 2])  # grey in three channels
    points = collate([windows[WindowKey(row, 0, (0, row), "center_point")] for row in (0, 1)])
    assert points["input_points"].shape == (2, 1, 1, 2)


def test_batch_tells_who_annotated_before_masks_are_resized(processor):
    pixel = np.zeros((SIZE, SIZE), bool)
    pixel[12, 12] = True
    image = np.zeros((SIZE, SIZE), np.uint8)
    rows = some_rows((image, [square(), pixel]), (image, [square(), pixel, np.zeros((SIZE, SIZE), bool)]))
    still = {"max_shift": 0.0, "max_zoom": 0.0, "max_gamma": 0.0, "symmetries": "none"}
    windows = TrainingWindows(rows, processor, make_config(augmentation=still))
    batch = collate([windows[WindowKey(row, 0, (0, row), "union_box")] for row in (0, 1)])
    assert batch["annotated"].shape == (2, 1, 3) and batch["annotated"].dtype == torch.bool
    assert batch["annotated"][:, 0].tolist() == [[True, True, False]] * 2  # the third is absent, or empty
    assert batch["labels"].flatten(3).any(dim=-1)[:, 0].tolist() == [[True, False, False]] * 2  # the pixel is lost
