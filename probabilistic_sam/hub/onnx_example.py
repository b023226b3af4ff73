"""Sample masks in a grey image with onnxruntime, NumPy and Pillow only: python onnx_example.py [IMAGE X1 Y1 X2 Y2]."""

import json
import math
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import onnxruntime
from PIL import Image

folder = Path(__file__).resolve().parent
example = json.loads((folder / "examples" / "examples.json").read_text())["images"][0]
path, *numbers = sys.argv[1:] or [folder / "examples" / example["image"], *example["box"]]
settings = json.loads((folder / "processor_config.json").read_text())
size, box = settings["image_size"], np.array(numbers, dtype=np.float32)
image = np.asarray(Image.open(path).convert("F"))

# Window: a square around the box, with its grey values stretched
centre, extent = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]).max()
side = max(settings["crop_size"], math.ceil(extent / 0.75))
x, y = (round(float(middle) - side / 2) for middle in centre)
inside = image[max(y, 0) : y + side, max(x, 0) : x + side]
low, high = np.percentile(inside, settings["stretch_percentiles"])
window = np.full((side, side), inside.min())
top, left = max(-y, 0), max(-x, 0)
window[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
stretched = Image.fromarray(255 * np.clip((window - low) / max(high - low, 1e-6), 0, 1).astype(np.float32))
grey = np.asarray(stretched.resize((size, size), Image.Resampling.BILINEAR))[None]
mean, std = np.array([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]], dtype=np.float32)[..., None, None]
pixel_values = ((grey - mean) / std)[None]

# Latin hypercube noise: in each coordinate one sample lies in each of N intervals of equal probability
encoder, decoder = (onnxruntime.InferenceSession(folder / f"onnx/{n}.onnx") for n in ("vision_encoder", "box_decoder"))
num_samples = 16
(latent_dim,) = [item.shape[-1] for item in decoder.get_inputs() if item.name == "noise"]
random = np.random.default_rng(0)
order = random.permuted(np.tile(np.arange(num_samples)[:, None], latent_dim), axis=0)
noise = np.vectorize(NormalDist().inv_cdf)((order + random.uniform(1e-9, 1 - 1e-9, order.shape)) / num_samples)

(embeddings,) = encoder.run(None, {"pixel_values": pixel_values})
boxes = ((box - [x, y, x, y]) * size / side).astype(np.float32)[None, None]
inputs = {"image_embeddings": embeddings, "input_boxes": boxes, "noise": noise.astype(np.float32)[None, None]}
logits, presence = decoder.run(["pred_masks", "presence"], inputs)

# Back to the image: 0 is a probability of one half
masks = np.zeros((num_samples, *image.shape), dtype=bool)
height, width = inside.shape
for mask, sample in zip(masks, logits[0, 0], strict=True):
    pasted = np.asarray(Image.fromarray(sample).resize((side, side), Image.Resampling.BILINEAR)) > 0
    mask[max(y, 0) : y + side, max(x, 0) : x + side] = pasted[top : top + height, left : left + width]
np.savez_compressed("masks.npz", masks=masks)
print(f"presence {presence[0, 0]:.2f}, areas {masks.sum(axis=(1, 2)).tolist()} px; wrote masks.npz")
