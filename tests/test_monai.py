"""MONAI: our models in its axis order, under its inferers, losses, engines, decoders and inverse transforms."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from gvsl_zoo import load, read_volume, write_volume
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError, GvslZooError, VolumeError
from gvsl_zoo.integrations.monai import ForMonai, image_transforms, scaled, turned
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.volume import InputWarning, Preprocessing, Volume, prepare

pytest.importorskip("monai")
NAME = "gvsl-unet-ct-nano"


@pytest.fixture(scope="module")
def model():
    return load(NAME)


def phantom(spacing=(4.0, 4.0, 4.0), shape=(24, 30, 36)) -> Volume:
    return as_volume(sample_subject(shape, torch.Generator().manual_seed(0), spacing))


def stored_as(volume: Volume, order, signs) -> Volume:
    """The same scan in another orientation: its axes permuted and turned."""
    steps = np.zeros((4, 4))
    steps[3, 3] = 1
    for axis, (old, sign) in enumerate(zip(order, signs, strict=True)):
        steps[old, axis] = sign
        steps[old, 3] = 0 if sign > 0 else volume.shape[old] - 1
    data = volume.data.transpose(order)[tuple(slice(None, None, sign) for sign in signs)]
    return Volume(np.ascontiguousarray(data), volume.affine @ steps)


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6)])
def test_turning_twice_is_the_identity_and_once_the_opposite_order(shape):
    x = torch.rand(2, 3, *shape)
    assert turned(x).shape == (2, 3, *reversed(shape)) and torch.equal(turned(turned(x)), x)
    scores = torch.rand(2, 3)
    assert torch.equal(turned(scores), scores)


@pytest.mark.parametrize(
    ("order", "signs"), [((0, 1, 2), (1, 1, 1)), ((2, 0, 1), (-1, 1, -1)), ((1, 0, 2), (-1, -1, 1))]
)
def test_a_file_in_any_orientation_gives_the_features_of_the_model_s_own_way_in(model, tmp_path, order, signs):
    path = tmp_path / "scan.nii.gz"
    write_volume(stored_as(phantom(), order, signs), path)
    image = image_transforms(model)({"image": str(path)})["image"]
    x = model.preprocess(path)
    with torch.no_grad():
        torch.testing.assert_close(turned(image[None].as_tensor()), x, rtol=0, atol=1e-6)
        features = model(x)
        theirs = ForMonai(model)(image[None].as_tensor())
        lying = model(image[None].as_tensor())
    torch.testing.assert_close(turned(theirs), features, rtol=1e-4, atol=1e-4)
    assert (turned(lying) - features).abs().mean() > 0.1  # the trap: right shape, wrong anatomy


def test_the_affine_still_tells_where_every_voxel_lies(model, tmp_path):
    path = tmp_path / "scan.nii.gz"
    write_volume(stored_as(phantom(spacing=(4.0, 2.0, 3.0)), (2, 0, 1), (-1, 1, -1)), path)
    image = image_transforms(model)({"image": str(path)})["image"]
    source = read_volume(path)
    hottest = np.unravel_index(source.data.argmax(), source.data.shape)
    world = source.affine @ [*hottest, 1]
    here = np.unravel_index(int(image.argmax()), image.shape)[1:]
    assert np.abs(image.affine.numpy() @ [*here, 1] - world)[:3].max() <= 4  # a voxel of 4 mm
    np.testing.assert_allclose(image.affine.numpy()[:3, :3], np.diag([4.0, 4.0, 4.0]), atol=1e-6)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_headed_models_and_feature_lists_are_turned_too(task):
    headed = load(NAME, task=task, num_classes=3)
    x = torch.rand(1, 1, 20, 17, 18)
    with torch.no_grad():
        assert torch.equal(turned(ForMonai(headed)(x)), headed(turned(x)))
        levels = load(NAME, features_only=True)
        for theirs, ours in zip(ForMonai(levels)(x), levels(turned(x)), strict=True):
            assert torch.equal(turned(theirs), ours)


def test_images_are_turned_as_volumes_are():
    net = UNet(2, 8).eval()
    x = torch.rand(1, 1, 20, 33)
    with torch.no_grad():
        assert torch.equal(turned(ForMonai(net)(x)), net(turned(x)))


def test_an_xmorpher_trains_on_monai_s_own_tensors_as_on_plain_ones():
    from monai.data import MetaTensor

    x, gradients = torch.rand(2, 1, 12, 9, 8), []
    for image in (x, MetaTensor(x)):
        net = XMorpher(3, 16, generator=torch.Generator().manual_seed(0)).train()
        torch.manual_seed(0)  # which paths are dropped
        ForMonai(net)(image).square().mean().backward()
        gradients.append([p.grad.as_subclass(torch.Tensor) for p in net.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("unit", ["HU", "arbitrary"])
@pytest.mark.parametrize("window", [(-100.0, 300.0), (None, None), (0.0, None)])
def test_intensities_are_scaled_as_the_model_s_own_way_in_scales_them(unit, window):
    recipe = Preprocessing(unit=unit, window=window, scale=(-1.0, 2.0))
    volume = phantom()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CT given as arbitrary units
        expected = prepare(volume, recipe).image[0, 0]
    image = torch.from_numpy(np.ascontiguousarray(volume.data.transpose(2, 1, 0))).float()
    torch.testing.assert_close(scaled(image[None], recipe)[0], expected, rtol=1e-5, atol=1e-5)
    both = scaled(torch.stack([image, 7 * image + 3]), recipe)  # each channel has its own extremes
    torch.testing.assert_close(both[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1], scaled(7 * image[None] + 3, recipe)[0])
    assert scaled(torch.full((2, 2), 50.0), recipe).isfinite().all()


@pytest.mark.parametrize("window", [(-1024.0, 1024.0), (None, None)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_without_a_finite_value_are_filled_as_the_model_s_own_way_in_fills_them(window, value):
    from monai.data import MetaTensor

    recipe = Preprocessing(unit="arbitrary", window=window, scale=(0.0, 1.0))
    data = np.random.default_rng(0).uniform(50, 500, (4, 5, 6)).astype(np.float32)
    data[0, 1, 2] = value
    image = torch.from_numpy(np.ascontiguousarray(data.transpose(2, 1, 0)))[None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = prepare(Volume(data, np.eye(4)), recipe).image[0]
    for given in (image, MetaTensor(image)):
        with pytest.warns(InputWarning, match="1 of 120 voxels were NaN or infinite and are now the smallest value"):
            found = scaled(given, recipe)
        assert type(found) is type(given)
        torch.testing.assert_close(torch.as_tensor(found).as_subclass(torch.Tensor), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(VolumeError, match="no voxel has a finite value"):
        scaled(torch.full((1, 2, 2, 2), value), recipe)


def test_windows_of_monai_give_what_the_whole_image_gives_where_one_window_holds_it(model):
    from monai.inferers import SlidingWindowInferer

    x = torch.rand(2, 1, 21, 33, 18)
    with torch.no_grad():
        whole = ForMonai(model)(x)
        windows = SlidingWindowInferer((21, 33, 18), mode="gaussian")(x, ForMonai(model))
        parts = SlidingWindowInferer((16, 16, 16), sw_batch_size=3, overlap=0.5)(x, ForMonai(model))
    torch.testing.assert_close(windows, whole, rtol=1e-4, atol=1e-5)
    assert parts.shape == whole.shape and parts.isfinite().all()


def test_labels_go_back_onto_the_file_s_own_grid_with_monai_s_inverse(model, tmp_path):
    from monai.data import DataLoader, Dataset, decollate_batch
    from monai.transforms import Invertd

    path = tmp_path / "scan.nii.gz"
    write_volume(stored_as(phantom(spacing=(4.0, 2.0, 3.0)), (2, 0, 1), (-1, 1, -1)), path)
    scans = Dataset([{"image": str(path)}], image_transforms(model))
    [batch] = DataLoader(scans)
    batch["pred"] = (batch["image"] > 0.3).float()
    [case] = decollate_batch(batch)
    back = Invertd("pred", scans.transform, orig_keys="image", nearest_interp=True)(case)["pred"]
    source = read_volume(path)
    assert back.shape[1:] == source.data.shape
    inside = torch.from_numpy(source.data > 2048 * 0.3 - 1024)
    assert (back[0].bool() == inside).float().mean() > 0.93  # the rest is the border, at 4 mm
    np.testing.assert_allclose(back.affine.numpy(), source.affine, atol=1e-5)


def test_a_training_with_monai_s_engine_and_loss_learns(tmp_path):
    pytest.importorskip("ignite")
    from monai.data import DataLoader, Dataset
    from monai.engines import SupervisedTrainer
    from monai.losses import DiceCELoss

    torch.manual_seed(0)
    subject = sample_subject((24, 30, 36), torch.Generator().manual_seed(0), (6.0, 6.0, 6.0))
    volume = as_volume(subject)
    write_volume(volume, tmp_path / "scan.nii.gz")
    body = (subject.labels > 0).numpy().astype(np.uint8).transpose(2, 1, 0)
    write_volume(Volume(body, volume.affine), tmp_path / "labels.nii.gz")
    net = load(NAME, task="segmentation", num_classes=2)
    files = [{"image": str(tmp_path / "scan.nii.gz"), "label": str(tmp_path / "labels.nii.gz")}] * 2
    losses: list[float] = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=8,
        train_data_loader=DataLoader(Dataset(files, image_transforms(net, label="label"))),
        network=ForMonai(net),
        optimizer=torch.optim.AdamW(net.parameter_groups(lr=3e-3, layer_decay=0.8)),
        loss_function=DiceCELoss(to_onehot_y=True, softmax=True),
    )
    from ignite.engine import Events

    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output[0]["loss"]))
    trainer.run()
    assert len(losses) == 16 and losses[-1] < 0.5 * losses[0]


def test_a_decoder_of_monai_s_takes_our_maps_and_gives_the_encoder_its_gradient():
    from monai.networks.nets.flexible_unet import UNetDecoder

    encoder = load(NAME, features_only=True, out_indices=(1, 2, 3, 4))
    chans = encoder.feature_info.channels()
    decoder = UNetDecoder(
        3, (1, *chans), (64, 32, 16, 8), "relu", "instance", 0.0, True, "nontrainable", "default", "nearest", None, True
    )
    out = decoder(encoder(torch.rand(1, 1, 48, 64, 32)), skip_connect=len(chans) - 1)
    assert out.shape == (1, 8, 48, 64, 32)
    out.square().mean().backward()
    gradients = [p.grad for p in encoder.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)


def test_what_has_no_one_image_in_is_refused():
    with pytest.raises(ArgumentError, match="a GVSL has no one image in and maps out"):
        ForMonai(load(NAME, task="registration"))
    with pytest.raises(ArgumentError, match="a model without a recipe for volumes"):
        image_transforms(nn.Identity())


def test_without_monai_the_error_says_so(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(GvslZooError, match=r'image_transforms needs monai; pip install "gvsl-zoo\[monai\]"'):
        image_transforms(model)
