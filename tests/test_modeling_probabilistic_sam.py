"""The model: shapes, samples, latents, losses by hand, warm start and round trips, on tiny configurations."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import GRID, SIZE, sam_parts, tiny_inputs, tiny_labels, tiny_model, tiny_vit_parts
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor, SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamMaskDecoder

from probabilistic_sam import ProbabilisticSamConfig, ProbabilisticSamModel, ProbabilisticSamProcessor
from probabilistic_sam.loss_probabilistic_sam import (
    energy_distance,
    gaussian_kl,
    latent_kl,
    log_probability_of_presence,
    mean_iou,
    soft_jaccard_distance,
)
from probabilistic_sam.modeling_probabilistic_sam import (
    EMPTY_LOGIT,
    Readers,
    box_map,
    noise_given_presence,
    pack_pixels,
    point_maps,
    prompt_maps,
    spread_noise,
)


@pytest.fixture(params=[sam_parts, tiny_vit_parts], ids=["vit", "tiny_vit"])
def model(request):
    return tiny_model(request.param)


@pytest.fixture
def inputs():
    return tiny_inputs()


def test_samples_have_the_documented_shapes(model, inputs):
    output = model.sample(**inputs, num_samples=5)
    assert output.pred_masks.shape == (2, 3, 5, 4 * GRID, 4 * GRID)
    assert output.iou_scores.shape == (2, 3, 5)
    assert output.latents.shape == (2, 3, 5, 4)
    assert output.prior_mean.shape == output.prior_log_std.shape == (2, 3, 4)
    assert output.loss is None and output.posterior_mean is None


def test_same_seed_same_samples_other_seed_other_samples(model, inputs):
    first, second, other = (
        model.sample(**inputs, num_samples=4, generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert torch.equal(first.pred_masks, second.pred_masks)
    assert not torch.equal(first.latents, other.latents)


def test_samples_change_with_the_outline_and_are_empty_without_presence(model, inputs):
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 5
    latents[..., 0] = torch.tensor([1.0, 1.0, -1.0, 0.5])
    masks = model(**inputs, latents=latents).pred_masks
    assert not torch.allclose(masks[:, :, 0], masks[:, :, 1], atol=1e-6)
    assert (masks[:, :, 2] == EMPTY_LOGIT).all() and (masks[:, :, (0, 1, 3)] != EMPTY_LOGIT).all()


def test_samples_depend_on_image_and_prompt(model, inputs):
    latents = torch.ones(2, 3, 1, 4)
    masks = model(**inputs, latents=latents).pred_masks
    other_image = model(
        pixel_values=inputs["pixel_values"].flip(0), input_boxes=inputs["input_boxes"], latents=latents
    )
    assert not torch.allclose(masks, other_image.pred_masks, atol=1e-6)
    assert not torch.allclose(masks[:, 0], masks[:, 1], atol=1e-6)
    prior = model(**inputs).prior_mean
    assert not torch.allclose(prior[:, 0], prior[:, 1], atol=1e-6)


def test_prompts_of_an_image_and_images_of_a_batch_do_not_mix(model, inputs):
    latents = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0)).abs()
    masks = model(**inputs, latents=latents).pred_masks
    alone = model(
        pixel_values=inputs["pixel_values"][1:], input_boxes=inputs["input_boxes"][1:, 2:], latents=latents[1:, 2:]
    ).pred_masks
    assert torch.allclose(masks[1:, 2:], alone, atol=1e-5)


def test_image_embeddings_replace_pixel_values(model, inputs):
    embeddings = model.get_image_embeddings(inputs["pixel_values"])
    latents = torch.ones(2, 3, 2, 4)
    given = {"image_embeddings": embeddings, "input_boxes": inputs["input_boxes"], "latents": latents}
    with torch.no_grad():  # as in get_image_embeddings: with gradients attention uses another kernel
        assert torch.equal(model(**inputs, latents=latents).pred_masks, model(**given).pred_masks)


def test_embeddings_of_sam_alone_are_refused(model, inputs):
    sam = model.vision_encoder(inputs["pixel_values"]).last_hidden_state
    with pytest.raises(
        ValueError, match=r"image_embeddings must have the shape \(B, 32, 2, 2\), .*got \(2, 16, 2, 2\)"
    ):
        model(image_embeddings=sam, input_boxes=inputs["input_boxes"])


def test_prompt_maps_have_one_channel_per_kind_of_prompt():
    boxes, points = torch.tensor([[[4.0, 4, 20, 20]]]), torch.tensor([[[[9.0, 12.0], [20.0, 20.0]]]])
    maps = prompt_maps(SIZE, 8, input_boxes=boxes)
    assert maps.shape == (1, 1, 4, 8, 8) and maps.sum(dim=(-2, -1))[0, 0].tolist() == [16.0, 0.0, 0.0, 0.0]
    maps = prompt_maps(SIZE, 8, points, torch.tensor([[[1, 0]]]), boxes, torch.ones(1, 1, 8, 8))
    assert torch.equal(maps[:, :, 1:3], point_maps(points, torch.tensor([[[1, 0]]]), SIZE, 8))
    assert maps[0, 0, 3].sum() == 64
    with pytest.raises(ValueError, match="A prompt must be provided"):
        prompt_maps(SIZE, 8)


def test_pixels_are_packed_by_cell_of_the_grid():
    grey = torch.arange(64.0).reshape(8, 8)  # the mean of each 4 x 4 block of the image
    image = grey.repeat_interleave(4, dim=0).repeat_interleave(4, dim=1).expand(1, 3, 32, 32)
    packed = pack_pixels(image)
    assert packed.shape == (1, 16, 2, 2)
    assert packed[0, :, 0, 1].tolist() == grey[:4, 4:].flatten().tolist()


def test_spread_noise_has_one_sample_in_each_interval_and_is_normal():
    noise = spread_noise((3, 2, 16, 4), torch.Generator().manual_seed(0), "cpu")
    level = torch.special.ndtr(noise.double())
    assert torch.equal((level * 16).floor().sort(dim=2).values[0, 0, :, 0], torch.arange(16.0))
    assert ((level * 16).floor().sort(dim=2).values == torch.arange(16.0)[:, None]).all()
    single = spread_noise((1, 1, 1, 20_000), torch.Generator().manual_seed(0), "cpu")  # one sample: ordinary noise
    assert single.mean().abs() < 0.03 and (single.std() - 1).abs() < 0.03
    # Samples of one call are not sorted
    assert not torch.equal(noise[0, 0, :, 0].argsort(), noise[0, 0, :, 1].argsort())


def test_share_of_empty_samples_is_the_probability_to_the_nearest_sample(model, inputs):
    output = model.sample(**inputs, num_samples=16)
    empty = (output.pred_masks == EMPTY_LOGIT).flatten(3).all(dim=-1).float().mean(dim=2)
    expected = torch.special.ndtr(-output.prior_mean[..., 0])
    assert ((empty - expected).abs() <= 1 / 16 + 1e-6).all()


def test_outlines_are_the_same_samples_given_presence(model, inputs):
    output = model.sample(**inputs, num_samples=8, generator=torch.Generator().manual_seed(0))
    annotated = output.latents[..., 0] > 0
    assert 0 < annotated.float().mean() < 1
    assert torch.equal(output.pred_masks[annotated], output.outline_masks[annotated])
    assert (output.pred_masks[~annotated] == EMPTY_LOGIT).all()
    given_presence = torch.cat([output.latents[..., :1].abs(), output.latents[..., 1:]], dim=-1)
    with torch.no_grad():
        assert torch.equal(output.outline_masks, model(**inputs, latents=given_presence).pred_masks)
    assert torch.equal(output.presence, torch.special.ndtr(output.prior_mean[..., 0]))


def test_noise_given_presence_by_hand():
    noise = torch.special.ndtri(torch.tensor([[0.25, 0.1], [0.5, 0.2], [0.75, 0.3]]))
    for mean, levels in {
        0.0: [0.625, 0.75, 0.875],  # of the levels .5 to 1: one quarter, one half, three quarters
        float(torch.special.ndtri(torch.tensor(0.2))): [0.85, 0.9, 0.95],  # of the levels .8 to 1
    }.items():
        given = noise_given_presence(noise, torch.tensor([mean]))
        assert torch.special.ndtr(given[:, 0]).tolist() == pytest.approx(levels, abs=1e-6)
        assert torch.equal(given[:, 1:], noise[:, 1:])


def test_noise_given_presence_is_the_noise_of_the_samples_that_annotate():
    noise = spread_noise((1, 1, 20_000, 2), torch.Generator().manual_seed(0), "cpu")
    mean = 0.4
    given = noise_given_presence(noise, torch.tensor([mean]))[..., 0].flatten()
    kept = noise[..., 0][noise[..., 0] > -mean]
    levels = torch.linspace(0.01, 0.99, 25)
    assert torch.allclose(given.quantile(levels), kept.quantile(levels), atol=0.01)
    density, share = math.exp(-(mean**2) / 2) / math.sqrt(2 * math.pi), 0.5 * math.erfc(-mean / math.sqrt(2))
    assert given.mean().item() == pytest.approx(density / share, abs=1e-3)  # of a truncated normal


@pytest.mark.parametrize("mean", [-100.0, -8.0, -3.0, 0.0, 9.0])
def test_noise_given_presence_is_always_present_and_evenly_spread(mean):
    noise = spread_noise((1, 1, 64, 2), torch.Generator().manual_seed(0), "cpu")
    given = noise_given_presence(noise, torch.tensor([mean - 1, mean]))[0, 0, :, 0]
    assert torch.isfinite(given).all() and (given + mean > 0).all()
    assert (given.argsort() == noise[0, 0, :, 0].argsort()).all() or mean == -100
    if mean == 9:  # always present: nothing to condition on
        assert torch.allclose(given, noise[0, 0, :, 0], atol=1e-5)
    if mean in (-3, 0):
        tail = torch.special.ndtr(-given.double()) / torch.special.ndtr(torch.tensor(mean).double())
        assert torch.equal((tail * 64).floor().sort().values, torch.arange(64.0))


def test_a_lesion_that_is_present_can_be_empty_on_some_of_its_slices():
    means = torch.tensor([-0.5, 0.3, -2.0])
    noise = spread_noise((1, 1, 1000, 2), torch.Generator().manual_seed(0), "cpu")
    annotated = means[:, None] + noise_given_presence(noise, means)[0, 0, :, 0] > 0  # (3, 1000)
    assert annotated[1].all()
    expected = torch.special.ndtr(means) / torch.special.ndtr(means.max())
    assert torch.allclose(annotated.float().mean(dim=1), expected, atol=1e-3)


def test_equally_seeded_generators_make_one_sample_one_reader_on_all_slices(model, inputs):
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    output = model.sample(**inputs, num_samples=16, generator=generators)
    noise = (output.latents - output.prior_mean[:, :, None]) / output.prior_log_std.exp()[:, :, None]
    assert torch.allclose(noise[0], noise[1], atol=1e-4)
    assert not torch.allclose(output.latents[0], output.latents[1], atol=1e-2)
    # Who annotates where fewer do also annotates where more do
    fewer, more = (output.latents[index, 0, :, 0] > 0 for index in output.prior_mean[:, 0, 0].argsort())
    assert (fewer <= more).all()


def test_an_untrained_detail_network_adds_nothing_and_a_trained_one_sees_single_pixels():
    model = tiny_model()
    network = model.detail_network
    for projection in (network.coarse_out, network.middle_out, network.fine_out):
        assert not projection.weight.any() and not projection.bias.any()
        torch.nn.init.normal_(projection.weight, generator=torch.Generator().manual_seed(0))
    embeddings = model.get_image_embeddings(torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)))
    given = {"input_boxes": torch.tensor([[[4.0, 4, 20, 20]]]), "latents": torch.ones(1, 1, 1, 4)}
    masks = model(image_embeddings=embeddings, **given).pred_masks
    embeddings[0, -1, 0, 0] += 1.0  # one pixel of the low-resolution mask, the same for SAM's encoder
    assert not torch.allclose(masks, model(image_embeddings=embeddings, **given).pred_masks, atol=1e-4)


def test_chunks_of_samples_change_nothing(monkeypatch, inputs):
    model = tiny_model()
    latents = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    whole = model(**inputs, latents=latents).pred_masks
    monkeypatch.setattr("probabilistic_sam.modeling_probabilistic_sam.MAX_DECODED", 12)  # two samples a call
    assert torch.allclose(model(**inputs, latents=latents).pred_masks, whole, atol=1e-6)


def test_points_and_masks_are_prompts_too(model, inputs):
    pixels = inputs["pixel_values"]
    points = torch.tensor([[[[10.0, 10], [20, 20]]]] * 2)
    labels = torch.tensor([[[1, 0]]] * 2)
    one = model.sample(pixels, input_points=points, input_labels=labels, num_samples=3)
    assert one.pred_masks.shape == (2, 1, 3, 8, 8)
    both = model.sample(pixels, input_points=points, input_boxes=inputs["input_boxes"][:, :1], num_samples=3)
    assert both.pred_masks.shape == (2, 1, 3, 8, 8)
    masks = torch.full((2, 1, 8, 8), -10.0)
    masks[..., 2:6, 2:6] = 10.0
    sampled = model.sample(pixels, input_masks=masks, num_samples=3)
    assert sampled.pred_masks.shape == (2, 1, 3, 8, 8)
    assert not torch.allclose(sampled.prior_mean, model.sample(pixels, input_masks=-masks).prior_mean)


@pytest.mark.parametrize("padding", [-1, -10])
def test_where_a_padding_point_lies_does_not_matter(model, inputs, padding):
    def samples(x):
        points = torch.tensor([[[[10.0, 10], [x, x]]]] * 2)
        labels = torch.tensor([[[1, padding]]] * 2)
        generator = torch.Generator().manual_seed(0)
        return model.sample(inputs["pixel_values"], input_points=points, input_labels=labels, generator=generator)

    first, second = samples(0.0), samples(25.0)
    assert torch.equal(first.prior_mean, second.prior_mean) and torch.equal(first.pred_masks, second.pred_masks)


@pytest.mark.parametrize("box", [False, True])
def test_padding_points_change_nothing(model, inputs, box):
    boxes = {"input_boxes": inputs["input_boxes"][:, :1]} if box else {}

    def samples(points, labels):
        given = {"input_points": torch.tensor([[points]] * 2), "input_labels": torch.tensor([[labels]] * 2)}
        return model.sample(inputs["pixel_values"], **given, **boxes, generator=torch.Generator().manual_seed(0))

    alone = samples([[10.0, 10.0]], [1])
    padded = samples([[10.0, 10.0], [-10.0, -10.0], [-10.0, -10.0]], [1, -10, -10])
    outside = samples([[10.0, 10.0], [20.0, 20.0]], [1, 0])
    for name in ("prior_mean", "outline_masks", "iou_scores"):
        assert torch.allclose(alone[name], padded[name], atol=1e-5)
        assert not torch.allclose(alone[name], outside[name], atol=1e-5)


def test_not_a_number_does_not_look_like_an_empty_mask(model, inputs):
    output = model.sample(**inputs | {"pixel_values": inputs["pixel_values"] * torch.nan}, num_samples=4)
    assert output.pred_masks.isnan().all() and output.presence.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": None}, "Exactly one of pixel_values"),
        ({"image_embeddings": torch.zeros(2, 16, 2, 2)}, "Exactly one of pixel_values"),
        ({"input_boxes": None}, "A prompt must be provided"),
        ({"input_boxes": torch.zeros(2, 4)}, r"input_boxes must have the shape \(B, P, 4\), got \(2, 4\)"),
        ({"input_boxes": torch.zeros(2, 1, 5)}, r"input_boxes must have the shape \(B, P, 4\), got \(2, 1, 5\)"),
        ({"input_boxes": torch.zeros(2, 0, 4)}, r"input_boxes must have the shape \(B, P, 4\), got \(2, 0, 4\)"),
        ({"input_masks": torch.zeros(2, 8, 8)}, r"input_masks must have the shape \(B, 1, h, w\), got \(2, 8, 8\)"),
        (
            {"input_masks": torch.zeros(2, 1, 16, 16)},
            r"input_masks must have the shape \(B, 1, 8, 8\), got \(2, 1, 16, 16\)",
        ),
        (
            {"input_points": torch.zeros(2, 2, 3, 2), "input_labels": torch.zeros(2, 3)},
            r"input_labels \(2, 3\) do not fit input_points \(2, 2, 3, 2\)",
        ),
        ({"num_samples": 2.0}, r"num_samples must be a whole number, got 2\.0"),
        ({"input_boxes": torch.zeros(3, 1, 4)}, "input_boxes are for 3 images, but there are 2"),
        ({"input_points": torch.zeros(2, 1, 1, 2)}, "same number of prompts per image, got 1 and 3"),
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"latents": torch.zeros(2, 3, 1, 5)}, r"latents must have the shape \(2, 3, 'S', 4\), got \(2, 3, 1, 5\)"),
        ({"latents": torch.zeros(2, 3, 4)}, r"latents must have the shape \(2, 3, 'S', 4\), got \(2, 3, 4\)"),
        ({"labels": torch.zeros(2, 2, 4, 8, 8)}, r"labels must have the shape"),
        ({"labels": torch.zeros(2, 3, 4, 8, 8), "latents": torch.zeros(2, 3, 1, 4)}, "Only one of labels and latents"),
        (
            {"input_points": torch.zeros(2, 3, 1, 2), "input_labels": torch.full((2, 3, 1), 2)},
            "got 2 in 6 of 6 places",
        ),
    ],
)
def test_wrong_arguments_are_named(inputs, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**{**inputs, **change})


def test_fields_of_version_0_1_are_read_as_the_new_ones(tmp_path):
    config = ProbabilisticSamConfig(**sam_parts(), presence_weight=7.0)
    assert ProbabilisticSamConfig(**sam_parts(), drawing_weight=7.0).presence_weight == 7.0
    old = {name: value for name, value in config.to_dict().items() if name != "presence_weight"}
    (tmp_path / "config.json").write_text(json.dumps(old | {"drawing_weight": 7.0, "latent_injection": "sparse"}))
    read = ProbabilisticSamConfig.from_pretrained(tmp_path)
    assert read.presence_weight == 7.0 and "drawing_weight" not in read.to_dict()
    assert "latent_injection" not in read.to_dict()


@pytest.mark.parametrize("field", [{"latent_dim": 1}, {"latent_injection": "token"}, {"latent_dim": "x"}])
def test_configuration_refuses_wrong_fields(field):
    with pytest.raises(Exception, match="latent"):
        ProbabilisticSamConfig(**sam_parts(), **field)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"energy_weight": 1.0, "num_energy_samples": 1},
            "num_energy_samples must be at least 2 with energy_weight 1",
        ),
        ({"num_energy_samples": -1}, "num_energy_samples must be at least 0 with energy_weight 0, got -1"),
        ({"detail_hidden_size": 20}, "detail_hidden_size must be a multiple of 8, got 20"),
        ({"prompt_encoder_config": {"image_size": 64}}, "one image_size, a multiple of 16, and patch_size 16, got 32"),
        ({"vision_config": {"image_size": 64}}, "one image_size, a multiple of 16, and patch_size 16, got 64 and 32"),
        ({"vision_config": {"patch_size": 8}}, "and patch_size 16, got 32 and 32, and 8"),
    ],
)
def test_configuration_refuses_sizes_that_do_not_fit(changes, message):
    parts = sam_parts()
    for name, value in changes.items():
        parts[name] = parts[name] | value if isinstance(value, dict) else value
    with pytest.raises(Exception, match=message):
        ProbabilisticSamConfig(**parts)


def test_embeddings_accept_what_has_no_effect(model, inputs):
    pixels = inputs["pixel_values"]
    expected = model.get_image_embeddings(pixels)
    assert torch.equal(model.get_image_embeddings(pixels, output_attentions=False), expected)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        model.get_image_embeddings(pixels, output_attentions=True)


def test_every_latent_weight_and_the_encoder_get_gradients(inputs):
    model = tiny_model(energy_weight=1.0).train()
    labels = torch.zeros(2, 3, 4, 8, 8, dtype=torch.bool)
    labels[:, :, 0, 2:5, 2:5] = labels[:, :, 2, 1:6, 2:6] = True
    output = model(**inputs, labels=labels)
    output.loss.backward()
    assert output.reconstructed_masks.shape == (2, 3, 4, 8, 8)
    assert output.pred_masks is output.latents is output.iou_scores is None
    assert output.posterior_mean.shape == output.posterior_log_std.shape == output.kl_divergence.shape == (2, 3, 4, 4)
    for name, parameter in model.named_parameters():
        if name.startswith((*model.new_modules, "vision_encoder.layers", "mask_decoder.transformer")):
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    for part in (*model.new_modules, "vision_encoder"):
        gradients = [
            p.grad.abs().sum() for n, p in model.named_parameters() if n.startswith(part) and p.grad is not None
        ]
        assert sum(gradients) > 0, part


def test_posterior_over_outlines_of_an_empty_mask_is_the_prior(inputs):
    labels = torch.zeros(2, 3, 2, 8, 8)
    labels[:, :, 0, 2:5, 2:5] = 1
    output = tiny_model()(**inputs, labels=labels)
    assert torch.equal(output.kl_divergence[:, :, 1, 1:], torch.zeros(2, 3, 3))
    assert (output.reconstructed_masks[:, :, 1] == EMPTY_LOGIT).all()
    log_present, log_empty = log_probability_of_presence(output.prior_mean[..., 0])
    assert torch.allclose(output.kl_divergence[:, :, 0, 0], -log_present)
    assert torch.allclose(output.kl_divergence[:, :, 1, 0], -log_empty)
    # The posterior is the prior in coordinate 0, and for a reader without an outline in all
    for name in ("mean", "log_std"):
        posterior, prior = output[f"posterior_{name}"], output[f"prior_{name}"]
        assert torch.equal(posterior[:, :, 1], prior)
        assert torch.equal(posterior[:, :, 0, 0], prior[..., 0])
        assert not torch.isclose(posterior[:, :, 0, 1:], prior[..., 1:]).any()


def test_kl_of_the_presence_is_that_of_the_truncated_normal_distribution():
    """KL(posterior || prior) by numerical integration: the posterior is the prior N(mean, 1) on one side of 0."""
    z = torch.linspace(-12, 12, 1_000_001, dtype=torch.double)
    mean = torch.tensor([0.7, -1.3], dtype=torch.double)
    annotated = torch.tensor([[[True, False]], [[True, False]]])
    prior = mean[:, None, None, None].expand(2, 1, 2, 2), torch.zeros(2, 1, 2, 2, dtype=torch.double)
    kl = latent_kl(*prior, *prior, annotated)
    assert not kl[..., 1].any()
    for index, center in enumerate(mean):
        density = torch.exp(-0.5 * (z - center) ** 2) / math.sqrt(2 * math.pi)
        for reader, side in enumerate((z > 0, z <= 0)):
            posterior = density * side / torch.trapezoid(density * side, z)
            integrand = torch.where(side, posterior * torch.log(posterior / density), 0.0).nan_to_num()
            assert kl[index, 0, reader, 0].item() == pytest.approx(torch.trapezoid(integrand, z).item(), abs=1e-4)


def test_mean_iou_is_that_of_the_readers_who_count():
    logits = torch.tensor([[[1.0, 1.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, 0.0]]])  # two pixels, and none
    readers = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    counts = torch.tensor([True, True, False])
    assert mean_iou(logits, readers, counts).tolist() == pytest.approx([(1 / 2 + 1 / 4) / 2, 0])
    assert mean_iou(logits, readers, ~counts).tolist() == pytest.approx([1 / 2, 0])
    assert mean_iou(logits, readers, counts & ~counts).tolist() == [0, 0]


def test_only_the_iou_head_learns_from_the_iou_loss(inputs):
    model = tiny_model(energy_weight=1.0)
    labels = torch.zeros(2, 3, 2, 8, 8)
    labels[:, :, 0, 2:5, 2:5] = 1
    names, weights = zip(*((n, w) for n, w in model.named_parameters() if w.requires_grad), strict=True)
    loss = model(**inputs, labels=labels).iou_loss
    learning = {
        name
        for name, gradient in zip(names, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
        if gradient is not None
    }
    assert learning and all(name.startswith("mask_decoder.iou_prediction_head.") for name in learning)


def test_iou_loss_is_the_squared_error_of_the_scores_of_all_decoded_masks(inputs, monkeypatch):
    model, decoded = tiny_model(energy_weight=1.0, num_energy_samples=3), []
    decode = model.decode_outlines
    monkeypatch.setattr(model, "decode_outlines", lambda *given: decoded.append(decode(*given)) or decoded[-1])
    labels = torch.zeros(2, 3, 2, 8, 8)
    labels[0, :, 0, 2:5, 2:5] = 1  # the second reader annotated nothing, and in image 1 nobody did
    loss = model.train()(**inputs, labels=labels).iou_loss
    ((masks, scores),) = decoded
    masks, reader = masks[0] > 0, labels[0, :, :1] > 0
    iou = (masks & reader).sum(dim=(-2, -1)) / (masks | reader).sum(dim=(-2, -1))
    expected = ((scores[0] - iou) ** 2).mean() / 2  # image 1 counts as 0
    assert scores.shape == (2, 3, 5) and loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_samples_of_the_energy_distance_are_of_the_prior_and_of_readers_who_are_present(inputs, monkeypatch):
    model, decoded = tiny_model(energy_weight=1.0, num_energy_samples=3, seed=1), []
    decode = model.decode_outlines
    monkeypatch.setattr(model, "decode_outlines", lambda *given: decoded.append(decode(*given)) or decoded[-1])
    labels = torch.zeros(2, 3, 3, 8, 8)
    labels[:, :, 0, 2:5, 2:5] = 1  # of three readers one annotated, one did not, one is absent
    reader_mask = torch.tensor([True, True, False]).expand(2, 3, 3)
    torch.manual_seed(0)
    output = model.train()(**inputs, labels=labels, reader_mask=reader_mask)
    ((masks, _),) = decoded  # of the three readers, and three samples of the prior
    samples, reader = masks.sigmoid().flatten(3)[:, :, [1, 3, 4, 5]], labels[:, :, :1].flatten(3)
    cross, within = soft_jaccard_distance(samples, reader), soft_jaccard_distance(samples, samples)
    expected = 2 * cross.mean() - within.sum(dim=(-2, -1)).mean() / 12
    assert output.energy_distance.item() == pytest.approx(expected.item(), rel=2e-6)


def test_iou_loss_weighs_a_window_by_its_readers(inputs, monkeypatch):
    model, decoded = tiny_model(energy_weight=1.0, num_energy_samples=3), []
    decode = model.decode_outlines
    monkeypatch.setattr(model, "decode_outlines", lambda *given: decoded.append(decode(*given)) or decoded[-1])
    labels, present = tiny_labels(), torch.ones(2, 3, 2, dtype=torch.bool)
    present[0, :, 1] = False
    loss = model.train()(**inputs, labels=labels, reader_mask=present).iou_loss
    ((masks, scores),) = decoded
    errors = []
    for image, slots, readers in ((0, [0, 2, 3, 4], [0]), (1, [0, 1, 2, 3, 4], [0, 1])):
        mask, reader = masks[image][:, slots, None] > 0, labels[image][:, None, readers] > 0
        iou = ((mask & reader).sum((-2, -1)) / (mask | reader).sum((-2, -1))).mean(-1)
        errors += [((scores[image][:, slots] - iou) ** 2).mean()] * len(readers)
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_labels_are_resized_by_area():
    labels = torch.zeros(1, 1, 1, 16, 16)
    labels[..., 0, 0] = labels[..., 4, 4:6] = 1  # a quarter of cell (0, 0), half of cell (2, 2)
    assert Readers.read(labels, None, None, (1, 1), 8).targets[0, 0, 0].nonzero().tolist() == [[2, 2]]


def test_points_without_labels_are_inside(inputs):
    model, points = tiny_model(), torch.tensor([[[[10.0, 10]]]] * 2)

    def prior(**labels):
        return model.sample(inputs["pixel_values"], input_points=points, **labels).prior_mean

    inside, outside = (torch.full((2, 1, 1), value) for value in (1, 0))
    assert torch.equal(prior(), prior(input_labels=inside))
    assert not torch.allclose(prior(), prior(input_labels=outside), atol=1e-4)


def test_packed_pixels_are_the_mean_of_the_colours_and_points_do_not_add_up():
    colour = torch.tensor([0.0, 30, 90])[None, :, None, None].expand(1, 3, 32, 32)
    assert torch.equal(pack_pixels(colour), torch.full((1, 16, 2, 2), 40.0))
    points = torch.tensor([[[[4.0, 4.0], [4.0, 4.0]]]])
    assert point_maps(points, torch.ones(1, 1, 2), 16, 2).max().item() == 1


def test_loss_is_the_sum_of_its_documented_parts(inputs):
    labels = torch.zeros(2, 3, 2, 8, 8)
    labels[:, :, :, 2:5, 2:5] = 1
    weights = {"bce_weight": 2.0, "dice_weight": 4.0, "kl_weight": 0.5, "presence_weight": 7.0, "energy_weight": 3.0}
    model = tiny_model(**weights, num_energy_samples=2)
    output = model(**inputs, labels=labels, generator=torch.Generator().manual_seed(0))
    probability, pixels = output.reconstructed_masks.double().sigmoid(), (-2, -1)
    bce = -(labels * probability.log() + (1 - labels) * (1 - probability).log()).sum(dim=pixels)
    dice = 1 - (2 * (probability * labels).sum(pixels) + 1) / (probability.sum(pixels) + labels.sum(pixels) + 1)
    assert output.reconstruction_loss.item() == pytest.approx((2 * bce + 4 * dice).mean().item(), rel=1e-5)
    kl = output.kl_divergence
    expected = output.reconstruction_loss + 0.5 * kl[..., 1:].sum(-1).mean() + 7 * kl[..., 0].mean()
    expected = expected + 3 * output.energy_distance + output.iou_loss
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_labels_of_the_image_size_are_resized(inputs):
    small = torch.zeros(2, 3, 2, 8, 8)
    small[..., 2:5, 2:6] = 1
    large = small.repeat_interleave(4, -1).repeat_interleave(4, -2)
    model = tiny_model()
    losses = [model(**inputs, labels=x, generator=torch.Generator().manual_seed(0)).loss for x in (small, large)]
    assert torch.equal(*losses)


# ------------------------------------------------------------------------------------------------ formulas by hand


def test_box_map_covers_cells_by_their_share():
    cover = box_map(torch.tensor([[[4.0, 0.0, 8.0, 12.0]]]), image_size=16, grid=2)  # cells of 8 px
    assert torch.allclose(cover, torch.tensor([[[[0.5, 0.0], [0.25, 0.0]]]]))


@pytest.mark.parametrize("padding", [-1, -10])
def test_point_maps_separate_inside_from_outside_and_leave_padding_out(padding):
    points = torch.tensor([[[[4.0, 4.0], [12.0, 12.0], [4.0, 12.0]]]])
    maps = point_maps(points, torch.tensor([[[1, 0, padding]]]), image_size=16, grid=2)
    step = math.exp(-0.5)
    assert torch.allclose(maps[0, 0, 0], torch.tensor([[1.0, step], [step, step**2]]))
    assert torch.allclose(maps[0, 0, 1], torch.tensor([[step**2, step], [step, 1.0]]))


def test_probabilities_of_annotated_and_empty_sum_to_one():
    log_present, log_empty = log_probability_of_presence(torch.tensor([0.0, 1.0, -30.0]))
    assert torch.allclose(log_present.exp() + log_empty.exp(), torch.ones(3))
    assert log_present[0].item() == pytest.approx(math.log(0.5))
    assert torch.isfinite(log_present).all()


def test_gaussian_kl_by_hand():
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert gaussian_kl(zero, zero, zero, zero).item() == 0
    assert gaussian_kl(one, zero, zero, zero).item() == pytest.approx(0.5)
    expected = 0.5 * (math.exp(2) - 1) - 1
    assert gaussian_kl(zero, one, zero, zero).item() == pytest.approx(expected, rel=1e-6)


def test_gaussian_kl_is_that_of_torch():
    mean, log_std, prior_mean, prior_log_std = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).double()
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(prior_mean, prior_log_std.exp()))
    assert torch.allclose(gaussian_kl(mean, log_std, prior_mean, prior_log_std), expected)


def test_soft_jaccard_distance_is_a_metric_on_soft_masks():
    masks = torch.rand(500, 3, 20, generator=torch.Generator().manual_seed(0))
    distance = soft_jaccard_distance(masks, masks)  # (500, 3, 3)
    assert torch.allclose(distance.diagonal(dim1=1, dim2=2), torch.zeros(500, 3), atol=1e-6)
    assert torch.allclose(distance, distance.transpose(1, 2))
    assert (distance[:, 0, 2] <= distance[:, 0, 1] + distance[:, 1, 2] + 1e-6).all()
    left, right = torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[0.0, 1, 1, 1]])
    assert soft_jaccard_distance(left, right, smooth=0).item() == pytest.approx(1 - 1 / 4)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [item.numel() for item in tree_leaves(result) if isinstance(item, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_soft_jaccard_distance_has_the_values_and_gradients_of_its_formula_in_less_memory():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(2, 3, count, 50, generator=generator, dtype=torch.double) for count in (4, 5))
    b[0, 0, :2] = (b[0, 0, :2] > 0.5).double()  # readers' masks
    b[1, 2, 0] = a[1, 2, 3] = 0.0  # two equal, empty masks
    weight = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.double)
    given = [item.requires_grad_() for item in (a, b)]
    pairs = a[..., :, None, :], b[..., None, :, :]
    expected = 1 - (torch.minimum(*pairs).sum(-1) + 1) / (torch.maximum(*pairs).sum(-1) + 1)
    with LargestTensor() as largest:
        distance = soft_jaccard_distance(*given)
    assert torch.allclose(distance, expected, rtol=1e-12)
    assert distance[1, 2, 3, 0].item() == 0
    assert largest.elements == 2 * 3 * 4 * 5  # the distances, not the 50 pixels of each pair
    gradients = torch.autograd.grad((distance * weight).sum(), given)
    wanted = torch.autograd.grad((expected * weight).sum(), given)
    assert all(torch.allclose(ours, theirs, rtol=1e-10) for ours, theirs in zip(gradients, wanted, strict=True))


def test_energy_distance_by_hand_leaves_out_what_does_not_count():
    a, b = torch.tensor([1.0, 1, 0, 0]), torch.tensor([0.0, 0, 1, 1])
    samples, readers = torch.stack([a, b, a]), torch.stack([a, b])
    yes, d = torch.tensor, 1 - 1 / 5  # disjoint masks of 2 px: (0 + 1) / (4 + 1) shared
    value = energy_distance(samples, yes([True, True, False]), readers, yes([True, False]))
    assert value.item() == pytest.approx(2 * (0 + d) / 2 - d)
    assert energy_distance(samples, yes([True] * 3), readers, yes([False, False])).item() == 0


# ------------------------------------------------------------------------------------------- other people's weights


@pytest.mark.parametrize("prompts", [1, 5])
def test_decoder_equals_that_of_sam_in_masks_and_gradients(prompts):
    model, generator = tiny_model().double(), torch.Generator().manual_seed(0)
    decoder = model.mask_decoder
    with torch.no_grad():
        for value in decoder.parameters():  # biases too, which start at 0
            value.add_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.double))
    image, dense = torch.randn(2, 2, 16, 2, 2, generator=generator, dtype=torch.double)
    sparse = torch.randn(2, prompts, 3, 16, generator=generator, dtype=torch.double)
    positions = torch.randn(1, 16, 2, 2, generator=generator, dtype=torch.double)
    given = [item.requires_grad_() for item in (image, positions, sparse, dense)]
    nothing = torch.zeros(2, 4, 4, 4).double(), torch.zeros(2, 2, 8, 8).double()  # as a new detail network gives
    masks, scores = decoder(*given, *nothing)
    repeated = positions.expand(2, -1, -1, -1)
    expected, expected_scores = SamMaskDecoder.forward(decoder, image, repeated, sparse, dense, multimask_output=False)
    assert torch.allclose(masks, expected[:, :, 0]) and torch.allclose(scores, expected_scores[:, :, 0])

    weights = [value for name, value in decoder.named_parameters() if "mlps" not in name and "iou_pred" not in name]
    target = torch.randn(masks.shape, generator=generator, dtype=torch.double)
    gradients = torch.autograd.grad((masks * target).sum(), [*given, *weights])
    wanted = torch.autograd.grad((expected[:, :, 0] * target).sum(), [*given, *weights])
    assert all(torch.allclose(ours, theirs, atol=1e-9) for ours, theirs in zip(gradients, wanted, strict=True))
    assert all(item.any() for item in wanted[4:6])


def test_warm_start_from_a_sam_directory_leaves_only_the_latent_networks_new(tmp_path):
    torch.manual_seed(0)
    sam = SamModel(SamConfig(**sam_parts()))
    sam.save_pretrained(tmp_path)
    model, info = ProbabilisticSamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and all(key.startswith(model.new_modules) for key in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in sam.state_dict().items())
    assert model.config.model_type == "probabilistic_sam"
    assert all(torch.isfinite(value).all() and value.abs().max() < 1e3 for value in own.values())


@pytest.mark.parametrize("parts", [sam_parts, tiny_vit_parts], ids=["vit", "tiny_vit"])
def test_round_trip_is_bit_equal_and_the_auto_classes_find_it(tmp_path, inputs, parts):
    model = tiny_model(parts)
    model.save_pretrained(tmp_path)
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    expected = model.sample(**inputs, num_samples=2, generator=torch.Generator().manual_seed(0)).pred_masks
    for auto in (ProbabilisticSamModel, AutoModel, AutoModelForMaskGeneration):
        loaded = auto.from_pretrained(tmp_path)
        assert isinstance(loaded, ProbabilisticSamModel)
        state = loaded.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(
            loaded.sample(**inputs, num_samples=2, generator=torch.Generator().manual_seed(0)).pred_masks, expected
        )
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    assert type(config.vision_config) is type(model.config.vision_config)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, ProbabilisticSamProcessor)
    assert (processor.image_size, processor.crop_size) == (SIZE, 24)


def test_half_precision_weights_load_as_float32_when_the_configuration_says_so(tmp_path):
    model = tiny_model().half()
    model.config.dtype = "float32"
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"float16"', '"float32"'))
    assert ProbabilisticSamModel.from_pretrained(tmp_path).dtype == torch.float32


def test_gradients_flow_to_the_latents(inputs):
    model = tiny_model()
    latents = torch.ones(2, 3, 2, 4, requires_grad=True)
    model(**inputs, latents=latents).pred_masks.sum().backward()
    assert (latents.grad[..., 1:].abs().sum() > 0) and np.all(latents.grad[..., 0].numpy() == 0)


def test_one_generator_per_image_makes_images_independent(model, inputs):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    together = model.sample(**inputs, num_samples=4, generator=generators).latents
    for index, seed in enumerate((5, 6)):
        one = {name: value[index : index + 1] for name, value in inputs.items()}
        alone = model.sample(**one, num_samples=4, generator=torch.Generator().manual_seed(seed)).latents
        assert torch.allclose(alone, together[index : index + 1], atol=1e-5)
    with pytest.raises(ValueError, match=r"1 generators are for as many windows \(items of pixel_values\), not 2"):
        model.sample(**inputs, generator=generators[:1])


@pytest.mark.parametrize("wrong", [0, "0", np.random.default_rng(0), [torch.Generator(), 1]])
def test_only_generators_are_sources_of_noise(model, inputs, wrong):
    for arguments in ({}, {"labels": tiny_labels()}):
        with pytest.raises(
            ValueError, match=r"^generator is .*; accepted: torch\.Generator\(\)\.manual_seed\(seed\), a list"
        ):
            model(**inputs, **arguments, generator=wrong)


def test_one_generator_per_image_makes_reconstructions_independent(model, inputs):
    labels = tiny_labels()
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    with torch.no_grad():
        together = model(**inputs, labels=labels, generator=generators).reconstructed_masks
        for index, seed in enumerate((5, 6)):
            one = {name: value[index : index + 1] for name, value in inputs.items()} | {"labels": labels[index, None]}
            alone = model(**one, generator=torch.Generator().manual_seed(seed)).reconstructed_masks
            assert torch.allclose(alone, together[index : index + 1], atol=1e-4)
        with pytest.raises(ValueError, match=r"1 generators are for as many windows \(items of pixel_values\), not 2"):
            model(**inputs, labels=labels, generator=generators[:1])
