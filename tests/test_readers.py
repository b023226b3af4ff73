"""Labels, absent readers and readers whose few pixels vanish in resizing: their effect on the losses."""

import pytest
import torch
from test_baselines import BOXES, MAKERS, TRAINED, images, readers
from tiny import tiny_inputs, tiny_labels, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from probabilistic_sam.loss_probabilistic_sam import log_probability_of_presence
from probabilistic_sam.modeling_probabilistic_sam import EMPTY_LOGIT


@pytest.fixture
def inputs():
    return tiny_inputs()


def run(model, inputs, **given):
    return model(**inputs, **given, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda labels: labels * 255, "255 in 174 of 768 places"),
        (lambda labels: (labels * 255).to(torch.uint8), "255 in 174 of 768 places"),
        (lambda labels: labels * 2 - 1, "-1 in 594 of 768 places"),
        (lambda labels: labels * 0.5, "0.5 in 174 of 768 places"),
        (lambda labels: labels.masked_fill(labels > 0, torch.nan), "nan in 174 of 768 places"),
    ],
)
def test_labels_other_than_0_and_1_are_refused_whatever_their_size(inputs, change, found):
    labels = tiny_labels()
    large = labels.repeat_interleave(4, -1).repeat_interleave(4, -2)
    message = r"^labels must be boolean or hold only 0 \(outside\), 1 \(inside\); got "
    with pytest.raises(ValueError, match=message + found):
        tiny_model()(**inputs, labels=change(labels))
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs, labels=change(large))


@pytest.mark.parametrize("name", TRAINED)
def test_baselines_refuse_such_labels_too(name):
    model = MAKERS[name]()
    with pytest.raises(ValueError, match="got 255 in"):
        model(images(), input_boxes=BOXES, labels=readers() * 255)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float64])
def test_labels_of_any_type_give_one_loss(inputs, dtype):
    model = tiny_model()
    assert torch.equal(
        run(model, inputs, labels=tiny_labels().to(dtype)).loss, run(model, inputs, labels=tiny_labels()).loss
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"reader_mask": torch.ones(2, 3, 2)}, "reader_mask must be boolean and have the shape"),
        (
            {"annotated": torch.ones(2, 3, 1, dtype=torch.bool)},
            r"annotated must be .* \(2, 3, 2\), got .* \(2, 3, 1\)",
        ),
        ({"annotated": torch.zeros(2, 3, 2, dtype=torch.bool)}, "annotated must be true for every reader whose"),
    ],
)
def test_wrong_reader_arguments_are_named(inputs, given, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs, labels=tiny_labels(), **given)
    with pytest.raises(ValueError, match="describe labels, but there are none"):
        tiny_model()(**inputs, **given)


def test_readers_who_are_all_present_change_nothing(inputs):
    model, labels = tiny_model(energy_weight=2.0), tiny_labels()
    labels[0, :, 1] = 0
    plain = run(model, inputs, labels=labels)
    given = {"reader_mask": torch.ones(2, 3, 2, dtype=torch.bool), "annotated": labels.flatten(3).any(dim=-1)}
    told = run(model, inputs, labels=labels, **given)
    for name, value in plain.items():
        assert torch.allclose(told[name], value, rtol=1e-6), name


def test_an_absent_reader_takes_no_part(inputs):
    """Their labels do not matter, and every mean is over those who are present."""
    weights = {"kl_weight": 0.5, "presence_weight": 7.0, "energy_weight": 3.0}
    model, labels = tiny_model(**weights, num_energy_samples=2), tiny_labels()
    reader_mask = torch.ones(2, 3, 2, dtype=torch.bool)
    reader_mask[0, :, 1] = reader_mask[1, 2] = False  # one reader for image 0, none for the last prompt of image 1
    output = run(model, inputs, labels=labels, reader_mask=reader_mask)
    other = labels.masked_fill(~reader_mask[..., None, None], torch.nan)
    same = run(model, inputs, labels=other, reader_mask=reader_mask)
    for name, value in output.items():
        assert torch.equal(same[name], value), name
    assert not output.kl_divergence[~reader_mask].any()
    assert (output.reconstructed_masks[~reader_mask] == EMPTY_LOGIT).all()

    present = reader_mask.double()
    probability, pixels = output.reconstructed_masks.double().sigmoid(), (-2, -1)
    bce = -(labels * probability.log() + (1 - labels) * (1 - probability).log()).sum(dim=pixels)
    dice = 1 - (2 * (probability * labels).sum(pixels) + 1) / (probability.sum(pixels) + labels.sum(pixels) + 1)
    reconstruction = ((bce + 10 * dice) * present).sum() / 7  # 3 + 4 readers are present
    assert output.reconstruction_loss.item() == pytest.approx(reconstruction.item(), rel=1e-5)
    kl = output.kl_divergence
    expected = reconstruction + 0.5 * kl[..., 1:].sum() / 7 + 7 * kl[..., 0].sum() / 7 + 3 * output.energy_distance
    expected = expected + output.iou_loss
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_energy_distance_leaves_out_absent_readers_and_windows_without_one(inputs):
    model, labels = tiny_model(energy_weight=1.0), tiny_labels()
    model.eval()
    reader_mask = torch.ones(2, 3, 2, dtype=torch.bool)
    reader_mask[1] = False
    half = run(model, inputs, labels=labels, reader_mask=reader_mask).energy_distance
    labels[1] = 0  # all readers are present and empty: the distance of this image is 0
    assert half.item() == pytest.approx(2 * run(model, inputs, labels=labels).energy_distance.item(), rel=1e-5)


def test_a_batch_without_any_reader_has_loss_zero(inputs):
    nobody = torch.zeros(2, 3, 2, dtype=torch.bool)
    assert run(tiny_model(energy_weight=1.0), inputs, labels=tiny_labels(), reader_mask=nobody).loss.item() == 0


def test_a_reader_whose_pixels_vanished_counts_as_one_who_annotated(inputs):
    model, labels = tiny_model(energy_weight=1.0), tiny_labels()
    labels[:, :, 1] = 0
    annotated = torch.ones(2, 3, 2, dtype=torch.bool)
    vanished = run(model, inputs, labels=labels, annotated=annotated)
    empty = run(model, inputs, labels=labels)
    log_annotated, log_empty = log_probability_of_presence(vanished.prior_mean[..., 0])
    assert torch.equal(vanished.kl_divergence[:, :, 1, 0], -log_annotated)
    assert torch.equal(empty.kl_divergence[:, :, 1, 0], -log_empty)
    # Nothing is known of the outline: no reconstruction, no KL, and the same energy distance
    assert torch.equal(vanished.posterior_mean[:, :, 1], vanished.prior_mean)
    assert not vanished.kl_divergence[:, :, 1, 1:].any()
    assert torch.equal(vanished.reconstruction_loss, empty.reconstruction_loss)
    assert torch.equal(vanished.energy_distance, empty.energy_distance)
    assert (vanished.reconstructed_masks[:, :, 1] != EMPTY_LOGIT).all()
    difference = (vanished.loss - empty.loss).item()
    assert difference == pytest.approx((log_empty - log_annotated).mean().item() / 2, rel=1e-3)


def test_a_pixel_that_vanishes_in_resizing_is_an_annotation(inputs):
    """Labels at the size of the image tell who annotated, also without `annotated`."""
    model, labels = tiny_model(), torch.zeros(2, 3, 2, 32, 32)
    labels[:, :, 0, 5, 5] = 1
    output = run(model, inputs, labels=labels)
    log_annotated, log_empty = log_probability_of_presence(output.prior_mean[..., 0])
    assert torch.equal(output.kl_divergence[:, :, 0, 0], -log_annotated)
    assert torch.equal(output.kl_divergence[:, :, 1, 0], -log_empty)


@pytest.mark.parametrize("name", TRAINED)
def test_baselines_leave_out_absent_readers_and_unknown_outlines(name):
    torch.manual_seed(0)
    model, labels = MAKERS[name]().eval(), readers()  # the third reader is empty

    def loss(labels, **given):
        generator = torch.Generator().manual_seed(0)
        return model(images(), input_boxes=BOXES, labels=labels, generator=generator, **given).loss.item()

    present = torch.tensor([[[True, True, False]]] * 2)
    other = labels.clone()
    other[:, :, 2] = True
    absent = loss(labels, reader_mask=present)
    assert loss(other, reader_mask=present) == absent != loss(labels)
    if hasattr(model, "latent_proj"):  # with presence, which knows that the reader annotated
        assert loss(labels, annotated=torch.ones_like(present)) != absent
    else:
        assert loss(labels, annotated=torch.ones_like(present)) == pytest.approx(absent, rel=1e-6)
        if not hasattr(model, "posterior"):  # one mask for all: the mean over two readers by hand
            assert absent == pytest.approx(loss(labels[:, :, :2]), rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- noise


class NoDouble(TorchDispatchMode):
    """Fails if a float64 tensor or random numbers are made on a device other than the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, torch.Tensor) and item.device.type != "cpu":
                assert item.dtype != torch.float64, func
                assert torch.Tag.nondeterministic_seeded not in func.tags, func
        return result


@pytest.mark.parametrize("name", ["probabilistic_sam", *TRAINED])
@pytest.mark.parametrize("training", [False, True])
def test_noise_is_made_on_the_cpu_and_never_in_double_precision_on_the_device(name, training):
    """The device is "meta", which computes no numbers but runs the same operations as Apple's GPU."""
    model = tiny_model(energy_weight=1.0, latent_dropout=0.0) if name == "probabilistic_sam" else MAKERS[name]()
    model = model.to("meta").train(training)
    if hasattr(model.config, "latent_dropout"):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # dropout of the networks uses the device's random numbers
    given = {"pixel_values": images().to("meta"), "input_boxes": BOXES.to("meta")}
    with NoDouble():
        model(**given, labels=readers().to("meta"))
        assert model.sample(**given, num_samples=3).pred_masks.device.type == "meta"
