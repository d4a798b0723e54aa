"""Models on many architectures and band counts, weights files, input normalisation."""

import copy
import pickle

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models import adapt_input_conv

from geokr import assemble, models, weights
from geokr.config import ConfigError
from geokr.models import BackboneSpec, Normalise, build_backbone, build_model
from geokr.options import PretrainOptions


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "resnet10t"])
@pytest.mark.parametrize("bands", [1, 3, 4])
def test_any_backbone_takes_any_number_of_bands(name, bands):
    model = build_model(BackboneSpec(name, bands, 32), classes=5, seed=0)
    logits = model(torch.randn(2, bands, 32, 32))
    assert logits.shape == (2, 5)
    assert model.training
    fresh = timm.create_model(name, **BackboneSpec(name, bands, 32).arguments())
    fresh.load_state_dict(model.backbone.state_dict())


def test_a_vgg_is_its_convolutions_and_pooling():
    torchvision = pytest.importorskip("torchvision")
    backbone = build_backbone(BackboneSpec("vgg11_bn", 3, 32)).eval()
    assert all(key.startswith("features.") for key in backbone.state_dict())
    theirs = torchvision.models.vgg11_bn().eval()
    theirs.features.load_state_dict({k.removeprefix("features."): v for k, v in backbone.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), theirs.features(images).mean((2, 3)))
        assert build_model(BackboneSpec("vgg11_bn", 4, 32), 3, 0)(torch.randn(2, 4, 32, 32)).shape == (2, 3)


def test_random_weights_are_a_function_of_the_seed_and_leave_the_generator_alone():
    spec = BackboneSpec("test_resnet", 3, 32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (build_model(spec, 4, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["backbone.conv1.0.weight"], c["backbone.conv1.0.weight"])
    assert not torch.equal(a["head.weight"], c["head.weight"])


def test_the_head_is_float32_under_autocast():
    model = build_model(BackboneSpec("test_resnet", 3, 32), 4, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(2, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (BackboneSpec("resnet1o1", 3, 32), "did you mean 'resnet101'"),
        (BackboneSpec("test_resnet", 3, 32, drop_path=0.1), None),
        (BackboneSpec("vgg11", 3, 32, drop_path=0.1), "not for every architecture"),
    ],
)
def test_what_timm_cannot_build(spec, message):
    if message is None:
        build_backbone(spec)
        return
    with pytest.raises(ConfigError, match=message):
        build_backbone(spec)


def test_images_too_small_for_the_architecture():
    with pytest.raises(ConfigError, match=r"data\.image_size"):
        build_model(BackboneSpec("vgg11", 3, 8), 4, 0)


def test_imagenet_weights_without_a_network(monkeypatch):
    def offline(*arguments, pretrained=False, **keywords):
        assert pretrained
        raise OSError("cannot reach the weights")

    monkeypatch.setattr(models.timm, "create_model", offline)
    with pytest.raises(ConfigError, match=r"model\.init=imagenet.*cannot be had.*model\.init=random"):
        build_backbone(BackboneSpec("resnet18", 4, 64), pretrained=True)


def test_a_weights_file_goes_in_its_classifier_left_out(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(8)
        source = timm.create_model("test_resnet", num_classes=10).state_dict()
    safetensors.torch.save_file(source, tmp_path / "w.safetensors")
    torch.save({"state_dict": source}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        backbone = build_backbone(BackboneSpec("test_resnet", 3, 32))
        weights.load_into(backbone, weights.read_state(tmp_path / name), name)
        assert all(torch.equal(value, source[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("bands", [1, 2, 4, 7])
def test_the_first_convolution_is_adapted_as_timm_does_and_aloud(bands, caplog):
    source = timm.create_model("test_resnet", num_classes=0).state_dict()
    backbone = build_backbone(BackboneSpec("test_resnet", bands, 32))
    weights.load_into(backbone, source, "file")
    expected = adapt_input_conv(bands, source["conv1.0.weight"].clone())
    torch.testing.assert_close(backbone.state_dict()["conv1.0.weight"], expected)
    assert f"takes 3 bands; adapted to {bands}" in caplog.text


def first_of(bands, given, wanted):
    """The first convolution of a backbone with these bands, and what it was filled with."""
    source = timm.create_model("test_resnet", num_classes=0, in_chans=len(given)).state_dict()
    backbone = build_backbone(BackboneSpec("test_resnet", bands, 32))
    weights.load_into(backbone, source, "file", given, wanted)
    return backbone.state_dict()["conv1.0.weight"], source["conv1.0.weight"]


def test_bands_of_a_weights_file_go_where_they_belong(caplog):
    caplog.set_level("INFO")
    got, given = first_of(3, ("B4 red", "B3 green", "B2 blue"), ("blue", "green", "red"))
    assert torch.equal(got, given.flip(1))
    assert "takes B4 red, B3 green, B2 blue; put in place for blue, green, red" in caplog.text
    got, given = first_of(3, ("nir", "red", "green", "blue"), ("red", "green", "blue"))
    torch.testing.assert_close(got, given[:, 1:] * 4 / 3)
    got, given = first_of(5, ("red", "green", "blue"), ("coastal", "blue", "green", "red", "nir"))
    torch.testing.assert_close(got[:, 1:4], given.flip(1) * 3 / 5)
    torch.testing.assert_close(got[:, 0], got[:, 4])
    torch.testing.assert_close(got.sum(1), given.sum(1))  # what a grey image gives
    got, given = first_of(3, ("a", "b", "c"), ("c", "b", "a"))
    assert torch.equal(got, given.flip(1))
    caplog.clear()
    got, given = first_of(3, ("a", "b", "c"), ("band_1", "band_2", "band_3"))
    assert torch.equal(got, given)
    assert "takes a, b, c, taken in this order for band_1, band_2, band_3" in caplog.text


@pytest.mark.parametrize(
    ("bands", "channels"),
    [
        (("red", "green", "blue"), (0, 1, 2)),
        (("B2 blue", "B3 green", "B4 red"), (2, 1, 0)),
        (("blue", "green", "red", "nir"), (2, 1, 0, None)),
        (("vv", "vh", "dem"), (0, 1, 2)),
        (("B02", "B03", "B04"), (2, 1, 0)),
        (("band_1", "band_2", "band_3"), (0, 1, 2)),
    ],
)
def test_imagenet_sees_red_green_and_blue_wherever_they_are(monkeypatch, bands, channels):
    made = {n: build_backbone(BackboneSpec("test_resnet", n, 32)) for n in (3, 4)}
    for backbone in made.values():  # timm's weights, one number a channel
        weight = backbone.get_parameter("conv1.0.weight")
        weight.data[:] = torch.arange(1.0, 1 + weight.shape[1]).view(1, -1, 1, 1)
    pretrained = lambda spec, pretrained=False: copy.deepcopy(made[spec.bands])  # noqa: E731
    monkeypatch.setattr(models, "build_backbone", pretrained)
    monkeypatch.setattr(assemble, "build_backbone", pretrained)
    options = PretrainOptions.model_validate({"train": {"max_steps": 1}, "model": {"init": "imagenet"}})
    spec = BackboneSpec("test_resnet", len(bands), 32)
    student = assemble.build_student(options, spec, 2, 0, fresh=True, bands=bands)
    expected = [2.0 if place is None else 1.0 + place for place in channels]
    scale = 3 / len(bands)
    got = student.backbone.get_parameter("conv1.0.weight")[0, :, 0, 0].tolist()
    assert got == pytest.approx([value * scale for value in expected])


def test_weights_that_do_not_fit_are_named():
    backbone = build_backbone(BackboneSpec("test_resnet", 3, 32))
    state = backbone.state_dict()
    del state["bn1.weight"]
    state["other.weight"] = torch.zeros(1)
    state["bn1.bias"] = torch.zeros(3)
    with pytest.raises(ConfigError) as caught:
        weights.load_into(backbone, state, "file.safetensors")
    for part in ("file.safetensors", "1 missing: bn1.weight", "1 unknown: other.weight", "bn1.bias (3,) instead of"):
        assert part in str(caught.value)


def test_a_malicious_pickle_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path / "executed").mkdir, ()

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"a": Evil()}))
    torch.save({"a": Evil()}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        with pytest.raises(ConfigError, match="not a weights file"):
            weights.read_state(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(ConfigError, match="no such weights file"):
        weights.read_state(tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigError, match="damaged"):
        weights.read_state(tmp_path / "bad.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ConfigError, match="mapping of names to tensors"):
        weights.read_state(tmp_path / "list.pth")


def test_normalisation_against_numpy_keeps_the_memory_format():
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    mean, std = [120.0, 80.5, 33.3], [40.0, 50.0, 60.1]
    images = torch.from_numpy(raw).permute(0, 3, 1, 2)
    out = Normalise(mean, std, torch.device("cpu"))(images)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    expected = (raw.astype(np.float64) - mean) / std
    np.testing.assert_allclose(out.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)
    half = torch.randn(2, 3, 4, 4).half()
    assert torch.equal(Normalise(mean, std, torch.device("cpu"))(half), half.float())
