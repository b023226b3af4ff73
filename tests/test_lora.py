"""Fine-tuning with adapters of `peft`: only the adapters change, and they can be merged, saved and loaded."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import sam_parts, tiny_inputs, tiny_labels, tiny_model, tiny_vit_parts

# peft and we use the names of gradient checkpointing that all accepted versions of transformers know
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")

DECODER = ["q_proj", "k_proj", "v_proj", "out_proj"]  # as recommended in the README


@pytest.fixture
def given():
    latents = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0)).abs()
    return {**tiny_inputs(), "latents": latents}


def with_adapters(model, **kwargs):
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": DECODER, **kwargs}))


def loss_of(model):
    return model(**tiny_inputs(), labels=tiny_labels(), generator=torch.Generator().manual_seed(0)).loss


def test_every_adapter_affects_the_masks(given):
    model = tiny_model()
    plain = model(**given).pred_masks
    model = with_adapters(model, init_lora_weights=False)
    adapters = {name: value for name, value in model.named_parameters() if "lora_" in name}
    attentions = 2 * 3 + 1  # two layers of three, and one at the end
    assert len(adapters) == 2 * len(DECODER) * attentions
    loss_of(model).backward()
    for name, value in adapters.items():
        assert value.grad is not None and value.grad.any(), name
    with torch.no_grad():
        for name, value in adapters.items():
            if "lora_B" in name:
                kept = value.clone()
                with_it = model(**given).pred_masks
                value.zero_()
                assert not torch.equal(model(**given).pred_masks, with_it), name
                value.copy_(kept)
    with model.disable_adapter():
        assert torch.allclose(model(**given).pred_masks, plain, atol=1e-5)


@pytest.mark.parametrize("parts", [sam_parts, tiny_vit_parts], ids=["vit", "tiny_vit"])
def test_training_changes_adapters_and_saved_modules_only(parts):
    model = with_adapters(tiny_model(parts), modules_to_save=["prior", "posterior", "latent_proj"])
    before = copy.deepcopy(model.state_dict())
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    losses = []
    for _ in range(8):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    for part in ("k_proj.lora_A", "v_proj.lora_B", "prior.modules_to_save", "latent_proj.modules_to_save"):
        assert any(part in name for name in changed), part


def test_merged_and_saved_adapters_give_the_same_masks(tmp_path, given):
    base = tiny_model()
    model = with_adapters(
        copy.deepcopy(base), modules_to_save=["prior", "latent_proj"], init_lora_weights=False
    ).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value.add_(0.1)
        expected = model(**given)
        assert not torch.allclose(base(**given).pred_masks, expected.pred_masks, atol=1e-3)
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        merged = model.merge_and_unload()
        assert type(merged) is type(base) and merged.state_dict().keys() == base.state_dict().keys()
        for other in (loaded, merged):
            output = other(**given)
            for name in ("pred_masks", "iou_scores", "prior_mean"):
                assert torch.allclose(output[name], expected[name], atol=1e-5), name
    assert loaded.sample(**tiny_inputs(), num_samples=3).pred_masks.shape == (2, 3, 3, 8, 8)


def test_adapters_that_the_decoder_could_not_use_are_refused():
    with pytest.raises(ValueError, match="ConvTranspose2d.* is not supported"):
        with_adapters(tiny_model(), target_modules=["upscale_conv1"])


@pytest.mark.parametrize("parts", [sam_parts, tiny_vit_parts], ids=["vit", "tiny_vit"])
def test_adapters_in_the_encoder_train_with_gradient_checkpointing(parts):
    model = with_adapters(tiny_model(parts, latent_dropout=0.0), target_modules=["qkv"], init_lora_weights=False)
    gradients = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        loss_of(model).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if "lora_" in name})
    for name, gradient in gradients[0].items():
        assert gradient.any() and torch.allclose(gradient, gradients[1][name], atol=1e-5), name
