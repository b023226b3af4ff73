"""The baselines: common interface, samples by seed, training and evaluation by the scripts; and the oracles."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import GRID, SIZE, evaluate_rows, load_script, tiny_model, tiny_rows, tiny_vit_parts
from transformers import AutoModel, AutoProcessor
from transformers.models.sam.modeling_sam import SamMaskDecoder

from probabilistic_sam import ProbabilisticSamProcessor, evaluation
from probabilistic_sam.baselines import (
    DeterministicSamModel,
    DropoutSamModel,
    DropoutUNetConfig,
    DropoutUNetModel,
    EllipseConfig,
    EllipseModel,
    NoDetailModel,
    PixelPriorModel,
    ProbabilisticUNetConfig,
    ProbabilisticUNetModel,
    PromptFreePriorModel,
)
from probabilistic_sam.baselines.common import drop_channels, reconstruction_loss
from probabilistic_sam.errors import UserError
from probabilistic_sam.inference import sample_image
from probabilistic_sam.modeling_probabilistic_sam import DetailProjection

ROOT = Path(__file__).resolve().parent.parent
LOW = SIZE // 4  # side of a mask
BOXES = torch.tensor([[[8.0, 8.0, 24.0, 24.0]], [[4.0, 6.0, 20.0, 28.0]]])


def make_ellipse():
    model = EllipseModel(EllipseConfig(image_size=SIZE))
    values = {"probability_of_empty": 0.25, "log_scale_mean": -0.1, "log_scale_std": 0.4}
    model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
    return model


def make_sam(model_class, **fields):
    """The outputs of the detail network start at zero; with noise they depend on image and prompt."""
    model = model_class.from_sam(tiny_model(tiny_vit_parts, detail_hidden_size=8), **fields)
    for module in model.detail_network.modules():
        if isinstance(module, DetailProjection):
            torch.nn.init.normal_(module.weight, std=0.2)
    return model


def make_ablation(model_class):
    """The bias of the prior's mean is changed so that samples are not empty."""
    model = make_sam(model_class)
    bias = list(model.prior.parameters())[-1]
    torch.nn.init.constant_(bias[:1], 5.0)
    return model


MAKERS = {
    "dropout_unet": lambda: DropoutUNetModel(DropoutUNetConfig(image_size=SIZE, hidden_size=8, num_blocks=1)),
    "dropout_sam": lambda: make_sam(DropoutSamModel),
    "probabilistic_unet": lambda: ProbabilisticUNetModel(
        ProbabilisticUNetConfig(image_size=SIZE, hidden_size=8, num_blocks=1, latent_dim=3)
    ),
    "deterministic_sam": lambda: make_sam(DeterministicSamModel, jitter=2.0),
    "ellipse": make_ellipse,
    "no_detail": lambda: make_ablation(NoDetailModel),
    "pixel_prior": lambda: make_ablation(PixelPriorModel),
    "prompt_free_prior": lambda: make_ablation(PromptFreePriorModel),
}
TRAINED = [name for name in MAKERS if name != "ellipse"]


@pytest.fixture(params=MAKERS)
def model(request):
    torch.manual_seed(0)
    return MAKERS[request.param]().eval()


def images(count=2):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def sampled_masks(model, seed=0, num_samples=4, **changes):
    inputs = {"pixel_values": images(), "input_boxes": BOXES} | changes
    generator = torch.Generator().manual_seed(seed)
    return model.sample(**inputs, num_samples=num_samples, generator=generator).pred_masks


# ------------------------------------------------------------------------------------------------------- interface


def test_samples_follow_from_the_seed(model):
    masks = sampled_masks(model)
    assert masks.shape == (2, 1, 4, LOW, LOW) and masks.dtype == torch.float32
    torch.rand(3)  # the global generator has no effect
    assert torch.equal(sampled_masks(model), masks)
    assert not torch.allclose(sampled_masks(model, seed=1), masks)
    assert not torch.allclose(masks[:, :, 0], masks[:, :, 1])


def test_images_with_a_generator_each_have_the_samples_that_they_have_alone(model):
    inputs = {"pixel_values": images(), "input_boxes": BOXES}
    for num_samples in (1, 5):  # neither divides the passes of a call
        generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
        together = model.sample(**inputs, num_samples=num_samples, generator=generators).pred_masks
        for index, seed in enumerate((5, 6)):
            one = {name: value[index : index + 1] for name, value in inputs.items()}
            generator = torch.Generator().manual_seed(seed)
            alone = model.sample(**one, num_samples=num_samples, generator=generator).pred_masks
            assert torch.allclose(together[index : index + 1], alone, atol=1e-4)
    with pytest.raises(ValueError, match=r"1 generators are for as many windows \(items of pixel_values\), not 2"):
        model.sample(**inputs, generator=generators[:1])
    with pytest.raises(ValueError, match="^generator is 0; accepted: "):
        model.sample(**inputs, generator=0)


def test_samples_follow_image_and_prompt(model):
    masks = sampled_masks(model)
    other_image = sampled_masks(model, pixel_values=images().flip(0))
    assert torch.equal(other_image, masks) == isinstance(model, EllipseModel)
    assert not torch.allclose(sampled_masks(model, input_boxes=BOXES.flip(0)), masks)
    several = sampled_masks(model, input_boxes=BOXES.repeat(1, 3, 1))
    assert several.shape == (2, 3, 4, LOW, LOW)


def test_image_embeddings_replace_the_image(model):
    embeddings = model.get_image_embeddings(images())
    assert embeddings.shape[-2:] == (GRID, GRID)
    assert torch.equal(sampled_masks(model, pixel_values=None, image_embeddings=embeddings), sampled_masks(model))


def test_all_outputs_of_the_processor_are_accepted(model):
    processor = ProbabilisticSamProcessor(SIZE, 24)
    inputs = processor(np.arange(40 * 40).reshape(40, 40), input_boxes=[[[4, 4, 12, 12]]])
    output = model.sample(**inputs, num_samples=3)
    (result,) = processor.post_process_samples(output.pred_masks, inputs["windows"], inputs["original_sizes"])
    assert result["masks"].shape == (3, 40, 40)
    assert (output.outline_masks is None) == (output.presence is None)
    sampled = sample_image(model, processor, np.arange(40 * 40).reshape(40, 40), {"box": [4, 4, 12, 12]}, 3)
    if output.presence is None:  # no presence in the model: counted
        assert sampled.presence == pytest.approx(1 - sampled.empty_share)
        assert np.array_equal(sampled.outlines, sampled.masks[sampled.areas > 0])


def test_model_comes_back_from_its_folder(model, tmp_path):
    model.save_pretrained(tmp_path)
    ProbabilisticSamProcessor(SIZE, 24).save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(sampled_masks(again.eval()), sampled_masks(model))
    assert AutoProcessor.from_pretrained(tmp_path).crop_size == 24


@pytest.mark.parametrize("name", TRAINED)
def test_other_prompts(name):
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    point = {"input_boxes": None, "input_points": torch.tensor([[[[9.0, 12.0]]], [[[20.0, 20.0]]]])}
    assert sampled_masks(model, **point).shape == (2, 1, 4, LOW, LOW)
    assert not torch.allclose(sampled_masks(model, **point), sampled_masks(model))
    mask = {"input_boxes": None, "input_masks": torch.zeros(2, 1, LOW, LOW).index_fill(2, torch.arange(3), 9.0)}
    assert sampled_masks(model, **mask).shape == (2, 1, 4, LOW, LOW)
    with pytest.raises(ValueError, match="A prompt must be provided"):
        sampled_masks(model, input_boxes=None)
    with pytest.raises(ValueError, match="Exactly one of pixel_values and image_embeddings"):
        sampled_masks(model, pixel_values=None)


def test_ellipse_without_a_box():
    with pytest.raises(UserError, match="needs a box; accepted: prompts with input_boxes"):
        sampled_masks(make_ellipse(), input_boxes=None, input_points=torch.ones(2, 1, 1, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DropoutUNetConfig(dropout=1.0), "dropout must be at least 0 and less than 1, got 1.0"),
        (lambda: make_sam(DropoutSamModel, sampling_dropout=-0.1), "sampling_dropout must be at least 0"),
        (lambda: DropoutUNetConfig(image_size=40), "image_size must be a positive multiple of 16, got 40"),
        (lambda: ProbabilisticUNetConfig(latent_dim=0), "latent_dim must be at least 1, got 0"),
        (lambda: make_sam(DeterministicSamModel, jitter=-1.0), "jitter must not be negative, got -1.0"),
    ],
)
def test_wrong_fields(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ------------------------------------------------------------------------------------------------------- the parts


def test_dropped_channels():
    features = torch.ones(200, 50, 2, 2)
    dropped = drop_channels(features, 0.2, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert (dropped == dropped[:, :, :1, :1]).all()  # whole channels
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)
    assert drop_channels(features, 0.0, None) is features


@pytest.mark.parametrize("name", ["dropout_unet", "dropout_sam"])
def test_training_and_sampling_have_separate_dropout(name):
    model = MAKERS[name]().eval()

    def losses_and_masks():
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        inputs = {"pixel_values": images(), "input_boxes": BOXES, "labels": readers()}
        losses = [model(**inputs, generator=item).loss.item() for item in generators]
        return losses, sampled_masks(model, num_samples=2).unbind(2)

    model.config.dropout, model.config.sampling_dropout = 0.0, 0.5
    losses, masks = losses_and_masks()
    assert losses[0] == losses[1] and not torch.equal(*masks)
    model.config.dropout, model.config.sampling_dropout = 0.5, 0.0
    losses, masks = losses_and_masks()
    assert losses[0] != losses[1] and torch.equal(*masks)


def test_loss_of_one_mask_against_an_empty_and_a_full_reader():
    logits, targets = torch.zeros(1, 1, 1, 2, 2), torch.stack([torch.zeros(2, 2), torch.ones(2, 2)])[None, None]
    bce = 4 * math.log(2)
    dice = [1 - 1 / 3, 1 - 5 / 7]  # areas: 2 predicted, 0 and 4 in the targets, overlap 0 and 2
    expected = [0.5 * bce + 3 * value for value in dice]
    assert reconstruction_loss(logits, targets, 0.5, 3.0)[0, 0].tolist() == pytest.approx(expected)


def test_untrained_deterministic_sam_gives_sams_masks():
    sam = tiny_model(tiny_vit_parts, detail_hidden_size=8)
    torch.nn.init.zeros_(sam.latent_proj[2].weight)
    torch.nn.init.zeros_(sam.latent_proj[2].bias)
    expected = sam(images(), input_boxes=BOXES, latents=torch.ones(2, 1, 1, 4)).pred_masks
    for model_class in (DeterministicSamModel, DropoutSamModel):
        still = model_class.from_sam(sam, jitter=0.0, sampling_dropout=0.0).eval()
        assert torch.allclose(sampled_masks(still, num_samples=1), expected, atol=1e-5)


def test_moved_boxes_stay_within_the_jitter():
    model = make_sam(DeterministicSamModel, jitter=2.0)
    prompts = {"input_boxes": torch.tensor([[[4.0, 6.0, 24.0, 16.0]]])}
    moved = model.move_prompts(400, torch.Generator().manual_seed(0), prompts)["input_boxes"]
    shift = (moved - prompts["input_boxes"])[0].abs()
    limits = torch.tensor([4.0, 3.0, 4.0, 3.0])  # 0.1 * side + 2 px
    assert (shift <= limits).all() and (shift.amax(dim=0) > 0.85 * limits).all()
    crossed = model.move_prompts(400, None, {"input_boxes": torch.tensor([[[4.0, 6.0, 5.0, 7.0]]])})["input_boxes"]
    assert (crossed[..., 2:] >= crossed[..., :2]).all()


def test_ellipse_is_fitted_by_hand():
    masks = np.zeros((4, 20, 20), bool)
    masks[0, :10, :10], masks[1, :5, :5] = True, True  # areas 100 and 25; two empty masks
    model = make_ellipse()
    model.fit([([0.0, 0.0, 10.0, 10.0], masks)])
    assert model.probability_of_empty.item() == 0.5
    first = 0.5 * math.log(100 / (25 * math.pi))
    assert model.log_scale_mean.item() == pytest.approx(first - math.log(2) / 2)  # the other one is half as wide
    assert model.log_scale_std.item() == pytest.approx(math.log(2) / 2)


def test_ellipses_have_the_fitted_sizes():
    model = EllipseModel(EllipseConfig(image_size=256))
    model.load_state_dict(make_ellipse().state_dict())
    box = torch.tensor([[[40.0, 80.0, 200.0, 160.0]]])  # 40 x 20 pixels of the mask
    masks = model.sample(input_boxes=box, num_samples=400, generator=torch.Generator().manual_seed(0)).pred_masks > 0
    areas = masks[0, 0].sum(dim=(-2, -1)).double().numpy()
    assert (areas == 0).mean() == 0.25
    log_scales = 0.5 * np.log(areas[areas > 0] / (math.pi / 4 * 40 * 20))
    assert log_scales.mean() == pytest.approx(-0.1, abs=0.03)
    assert 0.3 < log_scales.std() <= 0.4  # less: the largest are cut at the window's edge
    rows, columns = masks[0, 0].any(dim=-1).sum(dim=-1), masks[0, 0].any(dim=-2).sum(dim=-1)
    assert (rows <= columns).all()  # twice as wide as high


@pytest.mark.parametrize(("name", "sees_sam"), [("pixel_prior", False), ("prompt_free_prior", True)])
def test_ablated_priors_do_not_depend_on_removed_inputs(name, sees_sam):
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    embeddings = model.get_image_embeddings(images())
    output = model(image_embeddings=embeddings, input_boxes=BOXES, labels=readers())
    moved = model(image_embeddings=embeddings, input_boxes=BOXES.flip(0), labels=readers())
    assert torch.equal(moved.prior_mean, output.prior_mean) and torch.equal(moved.prior_log_std, output.prior_log_std)
    assert torch.equal(moved.posterior_mean[..., 1:], output.posterior_mean[..., 1:])
    without_sam = torch.cat([torch.zeros_like(embeddings[:, :-16]), embeddings[:, -16:]], dim=1)
    blind = model(image_embeddings=without_sam, input_boxes=BOXES)
    assert torch.equal(blind.prior_mean, output.prior_mean) != sees_sam
    other_pixels = torch.cat([embeddings[:, :-16], embeddings[:, -16:].flip(0)], dim=1)
    assert not torch.equal(model(image_embeddings=other_pixels, input_boxes=BOXES).prior_mean, output.prior_mean)
    # The posterior differs between readers
    assert not torch.allclose(output.posterior_mean[0, 0, 0, 1:], output.posterior_mean[0, 0, 1, 1:])


def test_without_the_detail_network_pixels_have_no_effect():
    torch.manual_seed(0)
    model = MAKERS["no_detail"]().eval()
    embeddings = model.get_image_embeddings(images())
    other_pixels = torch.cat([embeddings[:, :-16], embeddings[:, -16:].flip(0)], dim=1)
    masks = sampled_masks(model, pixel_values=None, image_embeddings=embeddings)
    assert torch.equal(sampled_masks(model, pixel_values=None, image_embeddings=other_pixels), masks)
    # Without anything added in the decoder the masks are those of SAM with the latent
    latents = torch.zeros(2, 1, 1, model.config.latent_dim)
    latents[..., 0] = 1.0
    output = model(image_embeddings=embeddings, input_boxes=BOXES, latents=latents)
    sparse, dense = model.prompt_encoder(input_points=None, input_labels=None, input_boxes=BOXES, input_masks=None)
    sparse = sparse + model.latent_proj(latents[..., 1:])
    positions = model.get_image_wide_positional_embeddings().repeat(2, 1, 1, 1)
    decoder, image = model.mask_decoder, embeddings[:, :-16]
    expected, _ = SamMaskDecoder.forward(decoder, image, positions, sparse, dense, multimask_output=False)
    assert torch.allclose(output.pred_masks[:, 0], expected[:, 0], atol=1e-4)


# -------------------------------------------------------------------------------------------------------- training


def readers():
    """Two tiny slices with three readers each; the last mask is empty."""
    labels = torch.zeros(2, 1, 3, LOW, LOW, dtype=torch.bool)
    labels[0, 0, 0, 2:6, 2:6] = labels[0, 0, 1, 3:6, 2:5] = True
    labels[1, 0, 0, 1:5, 2:7] = labels[1, 0, 1, 2:5, 1:4] = True
    return labels


@pytest.mark.parametrize("name", TRAINED)
def test_a_few_steps_lower_the_loss(name):
    torch.manual_seed(0)
    model = MAKERS[name]().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(50 if name == "no_detail" else 25):  # which learns more slowly
        output = model(pixel_values=images(), input_boxes=BOXES, labels=readers())
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_probabilistic_unet_reports_its_latent_space():
    torch.manual_seed(0)
    model = MAKERS["probabilistic_unet"]()
    large = readers().repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    output = model(pixel_values=images(), input_boxes=BOXES, labels=large, generator=torch.Generator().manual_seed(0))
    assert output.reconstructed_masks.shape == (2, 1, 3, LOW, LOW)
    assert output.kl_divergence.shape == output.posterior_mean.shape == (2, 1, 3, 3)
    assert output.prior_mean.shape == output.prior_log_std.shape == (2, 1, 3)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(output.posterior_mean, output.posterior_log_std.exp()),
        torch.distributions.Normal(output.prior_mean[:, :, None], output.prior_log_std.exp()[:, :, None]),
    )
    assert torch.allclose(output.kl_divergence, expected, atol=1e-5)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        output.reconstructed_masks, readers().float(), reduction="none"
    ).sum(dim=(-2, -1))
    assert output.loss.item() == pytest.approx((bce + expected.sum(dim=-1)).mean().item(), rel=1e-5)
    assert not torch.allclose(
        output.posterior_mean[:, :, 0], output.posterior_mean[:, :, 1]
    )  # it depends on the masks
    with pytest.raises(ValueError, match="labels must have the shape"):
        model(pixel_values=images(), input_boxes=BOXES, labels=readers()[:, 0])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    pytest.importorskip("accelerate")
    build = pytest.importorskip("probabilistic_sam.data.build")
    path = tmp_path_factory.mktemp("baselines")
    tiny_model(tiny_vit_parts, detail_hidden_size=8).save_pretrained(path / "base")
    build.write_dataset(tiny_rows({"train": 2, "validation": 2}), path / "lidc", "Made for a test.")
    return path


CONFIG = {
    "image_size": SIZE, "crop_size": 24, "batch_size": 2, "max_steps": 4, "warmup_steps": 1, "log_every": 2,
    "eval_every": 4, "eval_slices": 3, "eval_samples": 3, "checkpoint_every": 4,
    "prompts": {"union_box": 0.5, "center_point": 0.5},
}  # fmt: skip
FIELDS = {
    "dropout_unet": {"hidden_size": 8, "num_blocks": 1, "dropout": 0.5},
    "probabilistic_unet": {"hidden_size": 8, "num_blocks": 1, "latent_dim": 3},
    "dropout_sam": {"dropout": 0.2},
    "deterministic_sam": {"jitter": 3.0},
    "ellipse": {},
    "no_detail": {"energy_weight": 200.0},
    "pixel_prior": {"dice_weight": 0.0},
    "prompt_free_prior": {"energy_weight": 200.0},
}
LATENT = ("probabilistic_unet", "no_detail", "pixel_prior", "prompt_free_prior")


@pytest.fixture
def train(workspace, tmp_path, monkeypatch):
    """Run training/train.py in this process; returns the run folder."""

    def run(name, **changes):
        config = CONFIG | {"model": {"model_type": name, **FIELDS[name]}} | changes
        if name.endswith(("sam", "prior", "detail")):
            config["base_model"] = str(workspace / "base")
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        given = {
            "config": tmp_path / "config.yaml", "dataset": workspace / "lidc", "cache_dir": workspace / "cache",
            "output_dir": tmp_path / "run",
        }  # fmt: skip
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.setattr(sys, "argv", ["train.py", *(str(x) for k, v in given.items() for x in (f"--{k}", v))])
        load_script("train").main()
        return tmp_path / "run"

    return run


def evaluate(workspace, model, output, *more):
    arguments = ["--model", str(model), "--dataset", str(workspace / "lidc"), "--output", str(output), *more]
    load_script("evaluate").main([*arguments, "--num_samples", "3", "--max_slices", "3", "--device", "cpu"])
    return json.loads(output.read_text())


@pytest.mark.parametrize("name", FIELDS)
def test_scripts_train_and_score(name, train, workspace, tmp_path):
    run = train(name, **({"max_steps": 0} if name == "ellipse" else {}))
    model = AutoModel.from_pretrained(run)
    assert model.config.model_type == name
    assert all(getattr(model.config, field) == value for field, value in FIELDS[name].items())
    best = json.loads((run / "best.json").read_text())
    assert 0 <= best["all/ged"] <= 2
    latent = name in LATENT
    assert ("posterior_iou" in best) == latent
    if name != "ellipse":
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        training = next(line for line in lines if "loss" in line)
        assert training.keys() - {"seconds"} == {"step", "loss", "reconstruction_loss", "grad_norm", "lr"} | (
            {
                "probabilistic_unet": {"kl"},
                "no_detail": {"outline_kl", "presence_nll", "energy_distance", "iou_loss"},
                "pixel_prior": {"outline_kl", "presence_nll", "iou_loss"},
                "prompt_free_prior": {"outline_kl", "presence_nll", "energy_distance", "iou_loss"},
            }.get(name, set())
        )
    content = evaluate(workspace, run, tmp_path / "results.json")
    assert ("collapse" in content) == latent
    assert content["sampling"] == "together"
    assert content["results"]["all"]["count"] == 3


def test_frozen_weights_of_sam_do_not_change(train, workspace):
    base = AutoModel.from_pretrained(workspace / "base").state_dict()
    tuned = AutoModel.from_pretrained(train("dropout_sam")).state_dict()
    changed = {name.split(".")[0] for name, value in tuned.items() if not torch.equal(value, base[name])}
    assert changed == {"mask_decoder", "detail_network"}


def test_sam_without_training_steps(train, workspace):
    base = AutoModel.from_pretrained(workspace / "base").state_dict()
    run = train("deterministic_sam", max_steps=0)
    assert all(torch.equal(value, base[name]) for name, value in AutoModel.from_pretrained(run).state_dict().items())
    assert json.loads((run / "best.json").read_text())["step"] == 0


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ellipse", {}, "max_steps is 4; accepted for an ellipse, which is fitted: 0"),
        ("dropout_unet", {"model": {"model_type": "unet"}}, "model_type is 'unet'; accepted: probabilistic_sam, dro"),
        (
            "dropout_unet",
            {"model": {"model_type": "dropout_unet", "latent_dim": 3}},
            "unknown field 'model.latent_dim'",
        ),
        (
            "dropout_unet",
            {"model": {"model_type": "dropout_unet", "image_size": 64}},
            "unknown field 'model.image_size'",
        ),
        ("dropout_unet", {"model": {"model_type": "dropout_unet", "dropout": 2}}, "dropout must be at least 0"),
        ("dropout_unet", {"model": {"model_type": "dropout_sam"}}, "base_model is not given"),
        ("dropout_sam", {"model": {"model_type": "dropout_sam", "dropout": -1}}, "dropout must be at least 0"),
    ],
)
def test_wrong_training_configuration(train, name, changes, message):
    with pytest.raises(UserError, match=message):
        train(name, **changes)


# --------------------------------------------------------------------------------------------------------- oracles


def test_oracles_by_hand():
    masks = np.zeros((4, 1, 4), bool)  # readers annotated 0, 1, 2 and 4 pixels
    masks[1, 0, :1] = masks[2, 0, :2] = masks[3] = True
    majority = evaluation.Oracle("oracle:majority").sample(masks, 3, None)
    assert majority.tolist() == [[[True, False, False, False]]] * 3  # 3 of 4; a tie, 2 of 4, is outside
    sampled = (
        evaluation.Oracle("oracle:readers").sample(masks, 1000, torch.Generator().manual_seed(0)).sum(axis=(1, 2))
    )
    shares = [(sampled == area).mean() for area in (0, 1, 2, 4)]
    assert shares == pytest.approx([0.25] * 4, abs=0.05)


def test_oracle_of_shape_uses_the_readers_who_annotated():
    masks = np.zeros((4, 1, 4), bool)  # two of four annotated the same two pixels: a tie of all, but these two agree
    masks[2:, 0, :2] = True
    scores = evaluation.score_oracle(evaluation.Oracle("oracle:majority"), masks, 3, seed=0)
    # In `all` the samples are empty: 2 * 1/2 - 0 - 1/2; in `shape` they equal the masks of the two readers
    assert scores["all"]["ged"] == pytest.approx(0.5)
    assert scores["shape"]["ged"] == 0
    assert (scores["shape"]["empty_rate_samples"], scores["shape"]["empty_rate_readers"]) == (1, 0.5)
    masks[3] = False  # one reader: not in `shape`
    assert evaluation.score_oracle(evaluation.Oracle("oracle:majority"), masks, 3, seed=0)["shape"] is None


def test_oracles_are_scored(workspace, tmp_path):
    from probabilistic_sam.data import row_seed
    from probabilistic_sam.data.format import decode_masks, load_split

    readers_, majority = (
        evaluate(workspace, f"oracle:{kind}", tmp_path / f"{kind}.json")["results"]["all"]
        for kind in ("readers", "majority")
    )
    assert majority["sample_diversity"]["mean"] == 0
    assert readers_["ged"]["mean"] < majority["ged"]["mean"]

    # One slice by hand: two readers, one of whom annotated; k of three samples equal that reader's mask. Distances
    # are 0 or 1, so GED = 2 * 1/2 - 2 (k / 3) (1 - k / 3) - 1/2
    row = next(row for row in load_split(workspace / "lidc", "validation") if row["num_nonempty"] < 4)
    annotated = decode_masks(row).any(axis=(1, 2))
    row["masks"] = [row["masks"][index] for index in (annotated.argmax(), annotated.argmin())]
    ((scores,),) = evaluate_rows(evaluation.Oracle("oracle:readers"), None, [row], "union_box", 3, (0,))
    generator = torch.Generator().manual_seed(row_seed(row, "samples 0 None"))
    share = (torch.randint(2, (3,), generator=generator) == 0).double().mean().item()
    assert scores["all"]["ged"] == pytest.approx(0.5 - 2 * share * (1 - share))


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("oracle:median", (), "--model is oracle:median; accepted: a model, oracle:majority, oracle:readers"),
        ("oracle:readers", ("--prompt", "reader_box"), "oracle:readers takes no prompt"),
    ],
)
def test_wrong_oracles(workspace, tmp_path, model, more, message):
    with pytest.raises(UserError, match=message):
        evaluate(workspace, model, tmp_path / "results.json", *more)
