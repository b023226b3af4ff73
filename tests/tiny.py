"""Tiny models and data for fast tests, and a loader for the scripts in `training`."""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from probabilistic_sam import ProbabilisticSamConfig, ProbabilisticSamModel

SIZE, GRID = 32, 2
TRAINING = Path(__file__).resolve().parent.parent / "training"


def load_script(name):
    """Import a script of `training`, such as `evaluate` or `report/benchmark`, as a module.

    The name of the module has a prefix, since `evaluate` would shadow the library.
    """
    spec = importlib.util.spec_from_file_location(f"training_{Path(name).name}", TRAINING / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate_rows(model, processor, rows, prompt, num_samples, seeds):
    """Scores of `evaluate_dataset` for one batch of rows: a list of rows, each with a list of seeds."""
    from probabilistic_sam import evaluation
    from probabilistic_sam.workers import InThisProcess

    sampling, options = evaluation.Sampling(prompt, num_samples, seeds), (model, processor, prompt)
    prepared = [evaluation.prepare_row(row, *evaluation.prepare_options(*options)) for row in rows]
    batch = evaluation.encode(model, evaluation.collate(range(len(rows)), prepared), "cpu")
    return evaluation.collect(evaluation.score_batch(model, processor, batch, sampling, InThisProcess()))


def sam_parts(image_size=SIZE):
    """Sub-configurations of a SAM with a few thousand weights."""
    vision = {
        "image_size": image_size, "hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "mlp_dim": 32,
        "num_attention_heads": 2, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8,
        "initializer_range": 0.2,
    }  # fmt: skip
    prompt = {"hidden_size": 16, "image_size": image_size, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    return {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}


def tiny_vit_parts(image_size=SIZE):
    """The same as `sam_parts` with a TinyViT encoder."""
    vision = {
        "model_type": "tiny_vit_vision_model", "image_size": image_size, "output_channels": 16, "num_pos_feats": 8,
        "embed_dims": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_sizes": [2, 2, 2, 2],
        "initializer_range": 0.2,
    }  # fmt: skip
    return {**sam_parts(image_size), "vision_config": vision}


def tiny_model(parts=sam_parts, seed=0, **kwargs):
    """A model with random weights."""
    torch.manual_seed(seed)
    # With SAM's usual initializer_range of 0.02, outputs of such a small model hardly differ
    fields = {"latent_dim": 4, "latent_hidden_size": 16, "initializer_range": 0.2, **kwargs}
    return ProbabilisticSamModel(ProbabilisticSamConfig(**parts(), **fields)).eval()


def tiny_inputs():
    """Two images with three boxes each."""
    generator = torch.Generator().manual_seed(1)
    boxes = torch.tensor([[[4.0, 4, 20, 20], [8, 8, 30, 30], [0, 0, 9, 9]]] * 2)
    return {"pixel_values": torch.randn(2, 3, SIZE, SIZE, generator=generator), "input_boxes": boxes}


def tiny_labels():
    """Masks of two readers per box: two squares."""
    labels = torch.zeros(2, 3, 2, 4 * GRID, 4 * GRID)
    labels[:, :, 0, 2:5, 2:5] = labels[:, :, 1, 1:6, 2:6] = 1
    return labels


def tiny_rows(patients_by_split, slices=3, size=SIZE):
    """Rows of a dataset build: discs that four readers annotated with different radii, or not at all."""
    from probabilistic_sam.data import split_of
    from probabilistic_sam.data.format import encode_png, image_row

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    names = [f"LIDC-IDRI-{number:04d}" for number in range(1, 300)]
    for split, count in patients_by_split.items():
        for patient in [name for name in names if split_of(name) == split][:count]:
            for slice_index in range(slices):
                radii = rng.uniform(3, 6, size=4) * (rng.random(4) < 0.8)
                radii[0] = 4  # at least one reader annotated
                centre_y, centre_x = rng.uniform(12, size - 12, size=2)
                distance = np.hypot(y - centre_y, x - centre_x)
                image = 60 * (distance < 5) + rng.integers(0, 100, size=(size, size))
                yield image_row(
                    encode_png(image.astype(np.uint8)), [encode_png(distance < radius) for radius in radii],
                    "image", [f"mask {number}" for number in range(4)],
                    patient_id=patient, scan_id=1, nodule_id=0, slice_index=slice_index, source="test",
                )  # fmt: skip


def card_sizes(card):
    """The first table in the card of a build: patients, scans, nodules and slices of each split."""
    lines = card[card.index("| split | patients | scans | nodules | slices |") :].split("\n\n")[0].splitlines()[2:]
    return {line.split(" | ")[0].lstrip("| "): line.rstrip(" |").split(" | ")[1:] for line in lines}
