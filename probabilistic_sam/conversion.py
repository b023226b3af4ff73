"""Conversion of checkpoints: MobileSAM's original state dict, and SAM at another image size.

For MobileSAM on the command line:

    python -m probabilistic_sam.conversion mobile_sam.pt OUTPUT_DIR --image_size 256
"""

import argparse
import re
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import SamConfig, SamModel
from transformers.utils import logging

from .configuration_probabilistic_sam import ProbabilisticSamConfig, TinyViTVisionConfig
from .errors import UserError, run
from .modeling_probabilistic_sam import ProbabilisticSamModel
from .processing_probabilistic_sam import ProbabilisticSamProcessor
from .weights import check_loaded, load_torch_file, save_model

logger = logging.get_logger(__name__)

BATCH_NORM_EPS = 1e-5  # torch's default, which TinyViT keeps

# TinyViT's classifier, which is left over in MobileSAM's file, and indices that follow from the window size
MOBILE_SAM_UNUSED = re.compile(r"image_encoder\.(norm_head|head)\.|.*\.attention_bias_idxs$")
# Regular expressions over MobileSAM's keys, applied in order.
MOBILE_SAM_KEYS = [
    (r"^image_encoder\.", "vision_encoder."),
    (r"patch_embed\.seq\.0\.", "patch_embed.conv1."),
    (r"patch_embed\.seq\.2\.", "patch_embed.conv2."),
    (r"(conv\d|local_conv)\.c\.", r"\1."),
    (r"attn\.norm\.", "attn.layer_norm."),
    (r"mlp\.norm\.", "mlp.layer_norm."),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    (r"prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(output_hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(output_hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(output_hypernetworks_mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"transformer\.layers\.(\d)\.norm(\d)\.", r"transformer.layers.\1.layer_norm\2."),
    (r"transformer\.norm_final_attn\.", "transformer.layer_norm_final_attn."),
]


def load_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the state dict in a `.safetensors` file or a torch file.

    Raises:
        UserError: there is no such file, it cannot be read, or it does not contain a state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: give MobileSAM's mobile_sam.pt or the same tensors as .safetensors")
    try:
        state_dict = load_file(path) if path.suffix == ".safetensors" else load_torch_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error})") from error
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise UserError(f"{path} does not contain a plain state dict (names to tensors)")
    return state_dict


def fold_batch_norm(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fold batch norms into convolutions: weight w g / s and bias b - m g / s with s = sqrt(var + eps).

    `x.c.weight` and `x.bn.*` become `x.c.weight` and `x.c.bias`.
    """
    folded = {key: value for key, value in state_dict.items() if ".bn." not in key}
    for name in (key.removesuffix(".bn.weight") for key in state_dict if key.endswith(".bn.weight")):
        parts = ("weight", "bias", "running_mean", "running_var")
        gain, bias, mean, variance = (state_dict[f"{name}.bn.{part}"].double() for part in parts)
        scale = gain / torch.sqrt(variance + BATCH_NORM_EPS)
        folded[f"{name}.c.weight"] = (state_dict[f"{name}.c.weight"].double() * scale[:, None, None, None]).float()
        folded[f"{name}.c.bias"] = (bias - mean * scale).float()
    return folded


def convert_mobile_sam_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """MobileSAM's original state dict with the keys of `ProbabilisticSamModel`, in float32."""
    converted = {}
    for key, value in fold_batch_norm(state_dict).items():
        if MOBILE_SAM_UNUSED.match(key):
            continue
        for pattern, replacement in MOBILE_SAM_KEYS:
            key = re.sub(pattern, replacement, key)
        converted[key] = value.float()
    # SAM's positional matrix is stored under two names
    positions = converted.get("shared_image_embedding.positional_embedding")
    if positions is not None:
        converted["prompt_encoder.shared_embedding.positional_embedding"] = positions
    return converted


def mobile_sam_config(image_size: int = 1024, **kwargs) -> ProbabilisticSamConfig:
    """Configuration of MobileSAM at `image_size` pixels; `kwargs` are fields of `ProbabilisticSamConfig`."""
    return ProbabilisticSamConfig(
        vision_config=TinyViTVisionConfig(image_size=image_size).to_dict(),
        prompt_encoder_config={"image_size": image_size},
        mask_decoder_config={"layer_norm_eps": 1e-5},  # the original SAM's
        **kwargs,
    )


def with_new_latents(config: ProbabilisticSamConfig, state_dict: dict, origin: str) -> ProbabilisticSamModel:
    """A float32 model with the weights of `state_dict`; the detail and latent networks are new.

    Raises:
        UserError: other weights are missing, unexpected or of another shape; the message names them.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # suppresses a long report of missing weights, which are expected
    try:
        model, info = ProbabilisticSamModel.from_pretrained(
            None, config=config, state_dict=state_dict, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)
    new = ProbabilisticSamModel.new_modules
    check_loaded(info, origin, new)
    logger.warning(f"{origin}: all weights were loaded; new and untrained: {', '.join(new)}")
    return model


def convert_mobile_sam(path: str | Path, image_size: int = 1024, **kwargs) -> ProbabilisticSamModel:
    """A `ProbabilisticSamModel` with MobileSAM's weights and new detail and latent networks.

    Raises:
        UserError: the file is not a MobileSAM checkpoint; the message names the keys.
    """
    state_dict = convert_mobile_sam_state_dict(load_state_dict(path))
    return with_new_latents(mobile_sam_config(image_size, **kwargs), state_dict, f"MobileSAM checkpoint {path}")


def interpolate_vit_positions(
    state_dict: dict[str, torch.Tensor], grid: int, global_layers: Collection[int]
) -> dict[str, torch.Tensor]:
    """Interpolate SAM's ViT to `grid` x `grid` patches: absolute positions bicubically, relative ones linearly.

    Layers other than `global_layers` keep their positions, since they attend in windows of the same size.
    """
    result = dict(state_dict)
    for key, value in state_dict.items():
        if key == "vision_encoder.pos_embed" and value.shape[1] != grid:
            channels_first = value.permute(0, 3, 1, 2).float()
            resized = F.interpolate(
                channels_first, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False
            )
            result[key] = resized.permute(0, 2, 3, 1).contiguous().to(value.dtype)
        layer = re.fullmatch(r"vision_encoder\.layers\.(\d+)\.attn\.rel_pos_[hw]", key)
        if layer and int(layer[1]) in global_layers and len(value) != 2 * grid - 1:
            resized = F.interpolate(value.float().T[None], size=2 * grid - 1, mode="linear", align_corners=False)
            result[key] = resized[0].T.contiguous().to(value.dtype)
    return result


def convert_sam(directory: str | Path, image_size: int | None = None, **kwargs) -> ProbabilisticSamModel:
    """A `ProbabilisticSamModel` with the weights of a `SamModel` (directory or Hub name) at `image_size`, in float32.

    Only the detail and latent networks are new. By default the image size is that of the checkpoint.

    Raises:
        OSError: transformers finds no model.
        UserError: it is another model, or its weights are not those of a SAM.
    """
    kind = SamConfig.get_config_dict(directory)[0].get("model_type")
    if kind != SamConfig.model_type:
        raise UserError(f"{directory} is a model of type {kind!r}; accepted: {SamConfig.model_type!r}")
    config_dict = SamConfig.from_pretrained(directory).to_dict()
    for key in ("model_type", "architectures", "dtype", "transformers_version"):
        config_dict.pop(key, None)
    if image_size is not None:
        config_dict["vision_config"]["image_size"] = image_size
        config_dict["prompt_encoder_config"]["image_size"] = image_size
        config_dict["prompt_encoder_config"].pop("image_embedding_size", None)  # would override the new size
    config = ProbabilisticSamConfig(**{**config_dict, **kwargs})
    sam, info = SamModel.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    check_loaded(info, f"SAM {directory}")  # transformers fills missing weights with random numbers
    state_dict = sam.state_dict()
    state_dict = interpolate_vit_positions(
        state_dict, config.prompt_encoder_config.image_embedding_size, config.vision_config.global_attn_indexes
    )
    return with_new_latents(config, state_dict, f"SAM {directory}")


def main() -> None:
    """Convert a MobileSAM checkpoint and write it with a processor."""
    parser = argparse.ArgumentParser(description="Convert MobileSAM's original checkpoint to a ProbabilisticSamModel.")
    parser.add_argument("checkpoint", help="mobile_sam.pt, or the same tensors as .safetensors")
    parser.add_argument("output", help="directory to write")
    parser.add_argument("--image_size", type=int, default=256, help="side of the model's input, default 256 px")
    parser.add_argument("--crop_size", type=int, default=64, help="window around the prompt, default 64 image px")
    arguments = parser.parse_args()
    try:
        processor = ProbabilisticSamProcessor(arguments.image_size, arguments.crop_size)
    except ValueError as error:
        raise UserError(str(error)) from error
    save_model(convert_mobile_sam(arguments.checkpoint, arguments.image_size), processor, arguments.output)
    print(f"wrote {arguments.output}: MobileSAM at {arguments.image_size} pixels, latent networks untrained")


if __name__ == "__main__":
    run(main)
