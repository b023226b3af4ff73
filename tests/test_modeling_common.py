"""What transformers requires of a model: weights, attention, outputs, checkpointing, precision, compile, export."""

import copy
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny import SIZE, sam_parts, tiny_inputs, tiny_labels, tiny_model, tiny_vit_parts
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel, SamConfig, SamModel, SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from probabilistic_sam import ProbabilisticSamConfig, ProbabilisticSamModel

SHIPPED = Path(__file__).resolve().parent.parent / "model_cards" / "psam-lidc"
PARTS = {"vit": sam_parts, "tiny_vit": tiny_vit_parts}


@pytest.fixture(params=PARTS)
def parts(request):
    return PARTS[request.param]


@pytest.fixture
def model(parts):
    return tiny_model(parts)


@pytest.fixture
def inputs():
    return tiny_inputs()


@pytest.fixture
def latents():
    values = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    return values.abs()  # no sample is empty


def loss_of(model):
    return model(**tiny_inputs(), labels=tiny_labels(), generator=torch.Generator().manual_seed(0)).loss


# --------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("parts", "origin"), [(sam_parts, "nothing"), (sam_parts, "sam"), (tiny_vit_parts, "nothing")]
)
def test_missing_weights_are_initialised_as_by_the_constructor(monkeypatch, parts, origin):
    initialise = PreTrainedModel._init_weights

    def seeded(self, module):
        torch.manual_seed(0)
        initialise(self, module)

    monkeypatch.setattr(PreTrainedModel, "_init_weights", seeded)
    given = {}
    if origin == "sam":
        given = {name: value + 1 for name, value in SamModel(SamConfig(**parts())).state_dict().items()}
    fresh = tiny_model(parts)
    loaded, info = ProbabilisticSamModel.from_pretrained(
        None, config=fresh.config, state_dict=dict(given), output_loading_info=True
    )
    # One of two tied names is enough
    assert info["missing_keys"] - set(fresh.all_tied_weights_keys) <= set(fresh.state_dict()) - set(given)
    own = loaded.state_dict()
    assert own.keys() == fresh.state_dict().keys()
    for name, value in fresh.state_dict().items():
        assert own[name].device.type == "cpu", name
        assert torch.equal(own[name], given.get(name, value)), name
    for projection in ("coarse_out", "middle_out", "fine_out"):
        assert not own[f"detail_network.{projection}.weight"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_weights_come_back_bit_equal_in_their_own_precision(tmp_path, model, dtype):
    model.to(dtype).save_pretrained(tmp_path, max_shard_size="500KB")
    shards = list(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "model.safetensors.index.json").exists()
    loaded, info = ProbabilisticSamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == dtype and not loaded.training
    own = loaded.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_device_map_places_every_weight(tmp_path, model, inputs, latents):
    model.save_pretrained(tmp_path)
    loaded = ProbabilisticSamModel.from_pretrained(tmp_path, device_map="cpu")
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    with torch.no_grad():
        given = {**inputs, "latents": latents}
        assert torch.allclose(loaded(**given).pred_masks, model(**given).pred_masks, atol=1e-6)


def test_the_positional_matrix_is_one_tensor_with_two_names(tmp_path, model):
    shared, prompt = "shared_image_embedding", "prompt_encoder.shared_embedding"
    names = {f"{prompt}.positional_embedding": f"{shared}.positional_embedding"}
    assert model.all_tied_weights_keys == names
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len({*names, *names.values()} & set(file.keys())) == 1
    loaded = ProbabilisticSamModel.from_pretrained(tmp_path)
    assert loaded.get_submodule(shared).positional_embedding is loaded.get_submodule(prompt).positional_embedding


def test_weights_of_another_shape_are_refused_or_initialised(tmp_path):
    model = tiny_model(latent_dim=4)
    model.save_pretrained(tmp_path)
    config = tiny_model(latent_dim=5).config
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ProbabilisticSamModel.from_pretrained(tmp_path, config=config)
    loaded, info = ProbabilisticSamModel.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    heads = {"prior.lin2.weight", "prior.lin2.bias", "posterior.lin2.weight", "posterior.lin2.bias"}
    assert {name for name, *_ in info["mismatched_keys"]} == {*heads, "latent_proj.0.weight"}
    assert loaded.prior.lin2.weight.shape == (10, 16)
    assert loaded.prior.lin2.weight.std().item() == pytest.approx(0.2, rel=0.3)
    assert not loaded.prior.lin2.bias.any()


def test_every_tensor_is_a_parameter_so_a_model_can_be_built_on_the_meta_device(parts):
    with torch.device("meta"):
        model = ProbabilisticSamModel(ProbabilisticSamConfig(**parts()))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert not list(model.buffers())
    for name, module in model.named_modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)], name


def test_configuration_survives_json_copy_and_pickle(model):
    config = model.config
    for other in (
        ProbabilisticSamConfig.from_dict(json.loads(config.to_json_string())),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(other.vision_config) is type(config.vision_config)
        assert other.to_dict() == config.to_dict()


def test_attributes_that_other_libraries_read(model):
    assert list(inspect.signature(model.forward).parameters)[0] == model.main_input_name == "pixel_values"
    assert model.get_input_embeddings() is model.vision_encoder.patch_embed
    assert model.get_output_embeddings() is None and not model.can_generate()
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    trained = model.num_parameters(only_trainable=True)
    model.vision_encoder.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == trained - model.vision_encoder.num_parameters()


@pytest.mark.parametrize("origin", ["new", "saved", "sam", "with_info"])
def test_every_trainable_weight_gets_a_gradient_however_the_model_was_made(tmp_path, parts, origin):
    model = tiny_model(parts, energy_weight=1.0)
    if origin != "new":
        if origin == "sam" and parts is sam_parts:
            SamModel(SamConfig(**parts())).save_pretrained(tmp_path)
        else:
            model.save_pretrained(tmp_path)
        loaded = ProbabilisticSamModel.from_pretrained(tmp_path, output_loading_info=origin == "with_info")
        model = loaded[0] if origin == "with_info" else loaded
    loss_of(model.train()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert all(name.startswith(("shared_image", "prompt_encoder", "mask_decoder.")) for name in frozen)
    assert not any(name.startswith(("mask_decoder.transformer", "mask_decoder.upscale")) for name in frozen)


# --------------------------------------------------------------------------------------------------------- outputs


def test_dropout_in_training_mode_but_not_in_evaluation_mode(model, inputs, latents):
    given = {**inputs, "latents": latents}
    assert torch.equal(model(**given).prior_mean, model(**given).prior_mean)
    model.train()
    assert not torch.equal(model(**given).prior_mean, model(**given).prior_mean)


def test_every_output_of_an_image_is_the_same_alone_and_in_a_batch(model, inputs, latents):
    batch = model(**inputs, latents=latents)
    for index in range(2):
        alone = model(**{name: value[index : index + 1] for name, value in {**inputs, "latents": latents}.items()})
        for name, value in alone.items():
            assert torch.allclose(value[0], batch[name][index], atol=1e-5), name


def test_tuple_and_dictionary_hold_the_same(model, inputs, latents):
    given = {**inputs, "latents": latents}
    expected = model(**given)
    names = ["pred_masks", "iou_scores", "latents", "prior_mean", "prior_log_std", "outline_masks", "presence"]
    assert list(expected) == names
    plain = model(**given, return_dict=False)
    model.config.return_dict = False
    for output in (plain, model(**given)):
        assert type(output) is tuple and len(output) == 7
        assert all(torch.equal(*pair) for pair in zip(output, expected.to_tuple(), strict=True))
    assert model.sample(**inputs, num_samples=3).pred_masks.shape == (2, 3, 3, 8, 8)


SAMS_OWN = (
    "multimask_output",
    "attention_similarity",
    "target_embedding",
    "output_attentions",
    "output_hidden_states",
)


@pytest.mark.parametrize("name", SAMS_OWN)
def test_arguments_of_sam_without_effect_are_refused(inputs, name):
    model = tiny_model()
    value = torch.ones(1) if name in ("attention_similarity", "target_embedding") else True
    for call in (model, model.sample):
        with pytest.raises(ValueError, match=rf"^{name} is not supported: .*\.$"):
            call(**inputs, **{name: value})
    with pytest.raises(ValueError, match="multimask_output .* num_samples"):
        model(**inputs, multimask_output=True)


def test_every_argument_of_sam_is_known(inputs):
    names = set(inspect.signature(SamModel.forward).parameters) - {"self", "kwargs"}
    own = set(inspect.signature(ProbabilisticSamModel.forward).parameters)
    assert names - own == {"multimask_output", "attention_similarity", "target_embedding"}


def test_code_written_for_sam_and_its_processor_gets_the_same_samples(model, inputs):
    expected = model.sample(**inputs, num_samples=2, generator=torch.Generator().manual_seed(0)).pred_masks
    off = dict.fromkeys(SAMS_OWN, None) | dict.fromkeys(("multimask_output", "output_attentions"), False)
    sizes = dict.fromkeys(("original_sizes", "reshaped_input_sizes", "windows"), torch.tensor([[SIZE, SIZE]] * 2))
    with torch.no_grad():
        for call in (model, model.sample):
            output = call(**inputs, **off, **sizes, num_samples=2, generator=torch.Generator().manual_seed(0))
            assert torch.equal(output.pred_masks, expected)


def test_the_shipped_model_accepts_the_inputs_of_sam_and_its_processor():
    model = ProbabilisticSamModel.from_pretrained(SHIPPED)
    assert not model.prompt_encoder.mask_embed.conv1.weight.requires_grad
    sizes = {"size": {"longest_edge": 256}, "mask_size": {"longest_edge": 64}}
    pads = {"pad_size": {"height": 256, "width": 256}, "mask_pad_size": {"height": 64, "width": 64}}
    processor = SamProcessor(SamImageProcessorPil(**sizes, **pads))
    image = np.random.default_rng(0).integers(0, 255, size=(128, 96, 3)).astype(np.uint8)
    given = {"input_points": [[[40, 50], [0, 0]]], "input_labels": [[1, -1]], "input_boxes": [[[20.0, 30, 60, 80]]]}
    inputs = processor(image, **given, return_tensors="pt")
    with torch.no_grad():
        masks = model(
            **inputs, multimask_output=False, num_samples=3, generator=torch.Generator().manual_seed(0)
        ).pred_masks
    results = processor.post_process_masks(masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])
    assert masks.shape == (1, 1, 3, 64, 64) and results[0].shape == (1, 3, 128, 96)
    own = {  # the image is resized to twice its size
        "pixel_values": inputs["pixel_values"], "input_boxes": torch.tensor([[[40.0, 60, 120, 160]]]),
        "input_points": torch.tensor([[[[80.0, 100], [7, 9]]]]), "input_labels": torch.tensor([[[1, -1]]]),
    }  # fmt: skip
    expected = model.sample(**own, num_samples=3, generator=torch.Generator().manual_seed(0)).pred_masks
    assert torch.allclose(masks, expected, atol=1e-3)


@pytest.mark.parametrize("name", ["num_items_in_batch", "nonsense"])
def test_unknown_arguments_are_refused_by_name(inputs, name):
    model = tiny_model()
    for call in (model, model.sample):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call(**inputs, **{name: None})


def test_the_vision_encoder_returns_hidden_states_and_attentions(parts, inputs):
    encoder = ProbabilisticSamModel._from_config(tiny_model(parts).config, attn_implementation="eager").vision_encoder
    output = encoder(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    plain = encoder(inputs["pixel_values"], return_dict=False)
    assert type(plain) is tuple and torch.equal(plain[0], output.last_hidden_state)
    # Patches, then a state per layer of the ViT or per stage of the TinyViT; its first stage has no attention
    assert (len(output.hidden_states), len(output.attentions)) == ((3, 2) if parts is sam_parts else (5, 3))
    first, weights = output.hidden_states[0], output.attentions[0]
    assert torch.allclose(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    first.retain_grad(), weights.retain_grad()
    output.last_hidden_state.square().sum().backward()
    assert first.grad.any() and weights.grad is not None


# ------------------------------------------------------------------------------------- attention and checkpointing


def test_attention_of_the_encoder_takes_the_fused_kernel():
    encoder = tiny_model(tiny_vit_parts).vision_encoder
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.inference_mode():  # raises if the kernel refuses the mask
        encoder(tiny_inputs()["pixel_values"])


def test_eager_and_sdpa_attention_are_equal_and_can_be_chosen(tmp_path, model, inputs, latents):
    if hasattr(model.vision_encoder.layers[1], "attn"):
        for layer in model.vision_encoder.layers:
            torch.nn.init.normal_(layer.attn.rel_pos_h), torch.nn.init.normal_(layer.attn.rel_pos_w)
    else:
        for layer in model.vision_encoder.layers[1:]:
            torch.nn.init.normal_(layer.blocks[0].attn.attention_biases)
    model.save_pretrained(tmp_path)
    outputs = {}
    for name in ("eager", "sdpa"):
        loaded = ProbabilisticSamModel.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == loaded.vision_encoder.config._attn_implementation == name
        weights = loaded.vision_encoder(inputs["pixel_values"], output_attentions=True).attentions
        assert bool(weights) == (name == "eager")  # the fused kernel returns none
        outputs[name] = loaded(**inputs, latents=latents)
    for name in ("pred_masks", "prior_mean"):
        assert torch.allclose(outputs["eager"][name], outputs["sdpa"][name], atol=1e-5)


def test_attention_of_a_tiny_vit_can_be_set_later(inputs):
    encoder = tiny_model(tiny_vit_parts).vision_encoder
    assert not encoder(inputs["pixel_values"], output_attentions=True).attentions
    encoder.set_attn_implementation("eager")
    assert len(encoder(inputs["pixel_values"], output_attentions=True).attentions) == 3


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "nonsense"])
def test_other_attention_is_refused(tmp_path, model, name):
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not support|is not supported"):
        ProbabilisticSamModel.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(ValueError, match="does not support|is not supported"):
        model.set_attn_implementation(name)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(parts):
    model = tiny_model(parts, latent_dropout=0.0).train()
    block = model.vision_encoder.layers[1] if parts is sam_parts else model.vision_encoder.layers[1].blocks[0]
    calls = []
    block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for enable in (False, True):
        (model.gradient_checkpointing_enable if enable else model.gradient_checkpointing_disable)()
        assert model.is_gradient_checkpointing == enable
        model.zero_grad()
        loss_of(model).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert len(calls) == 3  # once without, twice with
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name


# -------------------------------------------------------------------------------------- precision, compile, export


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(model, inputs, latents, dtype):
    # As in SAM's checkpoints; a newly initialised matrix is wide, so that rounding would change the phases
    torch.nn.init.normal_(model.shared_image_embedding.positional_embedding)
    expected = model(**inputs, latents=latents)
    given = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
    output = model.to(dtype)(**given, latents=latents)
    assert output.pred_masks.dtype == output.prior_mean.dtype == torch.float32
    for name in ("pred_masks", "prior_mean"):
        error = (output[name] - expected[name]).abs().mean() / expected[name].abs().mean()
        assert torch.isfinite(output[name]).all() and error < (0.1 if dtype == torch.bfloat16 else 0.02)
    loss = model.train()(**given, labels=tiny_labels()).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.slow
def test_sampling_compiles_into_one_graph(model, inputs):
    torch.compiler.reset()
    compiled = torch.compile(model.sample, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    masks = compiled(**inputs, num_samples=4).pred_masks
    torch.manual_seed(0)
    assert torch.allclose(masks, model.sample(**inputs, num_samples=4).pred_masks, atol=1e-5)


class Sampler(torch.nn.Module):
    """The exported part of a model: image and boxes to five samples."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_boxes):
        output = self.model(pixel_values=pixel_values, input_boxes=input_boxes, num_samples=5)
        return output.pred_masks, output.iou_scores


@pytest.mark.slow
def test_sampler_exports_for_several_numbers_of_images(model, inputs):
    sampler, batch = Sampler(model), torch.export.Dim("batch", min=1, max=4)
    with torch.no_grad():
        program = torch.export.export(
            sampler, tuple(inputs.values()), dynamic_shapes={name: {0: batch} for name in inputs}
        ).module()
        for count in (1, 2, 3):
            pixels = torch.randn(count, 3, SIZE, SIZE)
            boxes = inputs["input_boxes"][:1].expand(count, -1, -1)
            torch.manual_seed(0)
            masks, scores = program(pixels, boxes)
            torch.manual_seed(0)
            expected_masks, expected_scores = sampler(pixels, boxes)
            assert masks.shape == (count, 3, 5, 8, 8)
            assert torch.allclose(masks, expected_masks, atol=1e-5)
            assert torch.allclose(scores, expected_scores, atol=1e-5)
