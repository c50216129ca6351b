"""nnU-Net: our network as it builds its own, plans and weights as it reads them, and its own commands on a phantom."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from gvsl_zoo import load, write_volume
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError, GvslZooError, WeightsError
from gvsl_zoo.integrations.nnunet import CT, NnUNet, export_checkpoint, unet_strides, write_plans
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.volume import InputWarning, Volume

NAME = "gvsl-unet-ct-nano"


def network(ndim=3, deep_supervision=True, input_channels=1, num_classes=3):
    net = NnUNet(input_channels, num_classes, 8, unet_strides(ndim), deep_supervision)
    return net.eval()


@pytest.mark.parametrize("shape", [(37, 20, 33), (16, 48, 32), (45, 33)])
def test_every_decoder_level_is_supervised_finest_first(shape):
    net, x = network(len(shape)), torch.rand(2, 1, *shape)
    with torch.no_grad():
        logits = net(x)
        assert [out.shape for out in logits] == [(2, 3, *(-(-n // 2**i) for n in shape)) for i in range(4)]
        net.decoder.deep_supervision = False  # what nnU-Net does before it predicts
        assert torch.equal(net(x), logits[0])


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("shape", [(37, 20, 33), (45, 33)])
def test_the_size_of_the_feature_maps_is_what_the_convolutions_return(shape, deep_supervision):
    net, seen = network(len(shape), deep_supervision), []
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    with torch.no_grad():
        out = net(torch.rand(1, 1, *shape))
    assert len(seen) == 18 + (len(out) if deep_supervision else 1)
    assert net.compute_conv_feature_map_size(shape) == sum(seen)


def test_other_strides_are_refused():
    with pytest.raises(ArgumentError, match=r"strides .* the U-Net has \[\[1, 1, 1\], \[2, 2, 2\]"):
        NnUNet(1, 2, 8, [[1, 1, 1], [1, 2, 2]])


PLANS = {
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "NibabelIOWithReorient",
    "original_median_spacing_after_transp": [5.0, 1.0, 2.0],
    "original_median_shape_after_transp": [20, 100, 50],
    "transpose_forward": [1, 0, 2],
    "transpose_backward": [1, 0, 2],
    "configurations": {
        "2d": {"patch_size": [96, 48], "architecture": {}},
        "3d_lowres": {
            "data_identifier": "nnUNetPlans_3d_lowres",
            "batch_size": 2,
            "patch_size": [20, 96, 50],
            "median_image_size_in_voxels": [20, 100, 50],
            "spacing": [5.0, 1.0, 2.0],
            "normalization_schemes": [CT, "ZScoreNormalization"],
            "architecture": {"network_class_name": "theirs"},
            "next_stage": "3d_cascade_fullres",
        },
        "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
    },
    "foreground_intensity_properties_per_channel": {"0": {"mean": 9.0, "max": 300.0}, "1": {"mean": 5.0}},
}


def written(tmp_path, model, plans=PLANS, **settings):
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans))
    return json.loads(write_plans(model, tmp_path / "nnUNetPlans.json", **settings).read_text())


def test_plans_name_our_network_and_bring_the_axes_back_to_z_y_x(tmp_path):
    plans = written(tmp_path, load(NAME, in_chans=2))
    [(name, configuration)] = plans["configurations"].items()
    assert name == "3d_lowres" and "next_stage" not in configuration
    assert plans["plans_name"] == "gvslPlans" and configuration["data_identifier"] == "gvslPlans_3d_lowres"
    assert plans["transpose_forward"] == plans["transpose_backward"] == [0, 1, 2]
    assert configuration["spacing"] == plans["original_median_spacing_after_transp"] == [1.0, 5.0, 2.0]
    assert configuration["patch_size"] == [96, 32, 64] and configuration["batch_size"] == 2
    assert configuration["architecture"] == {
        "network_class_name": "gvsl_zoo.integrations.nnunet.NnUNet",
        "arch_kwargs": {"width": 8, "strides": unet_strides(3)},
        "_kw_requires_import": [],
    }


def test_the_ct_channel_gets_the_model_s_window_and_the_other_what_was_planned(tmp_path):
    plans = written(tmp_path, load(NAME, in_chans=2), name="mine")
    assert plans["configurations"]["3d_lowres"]["normalization_schemes"] == [CT, "ZScoreNormalization"]
    ct, other = plans["foreground_intensity_properties_per_channel"].values()
    hu = np.array([-3000.0, -1024.0, 0.0, 512.0, 1024.0, 3000.0])
    scaled = (hu.clip(ct["percentile_00_5"], ct["percentile_99_5"]) - ct["mean"]) / ct["std"]
    np.testing.assert_array_equal(scaled, [0, 0, 0.5, 0.75, 1, 1])
    assert ct["max"] == 300 and other == {"mean": 5.0}


def test_a_reader_that_does_not_reorient_is_warned_about(tmp_path):
    with pytest.warns(InputWarning, match="SimpleITKIO leaves scans .*NibabelIOWithReorient"):
        written(tmp_path, load(NAME, in_chans=2), PLANS | {"image_reader_writer": "SimpleITKIO"})


@pytest.mark.parametrize(
    ("in_chans", "plans", "match"),
    [
        (1, PLANS, "2 channels in the plans, 1 in the model; load the model with in_chans=2"),
        (2, PLANS | {"configurations": {"2d": PLANS["configurations"]["2d"]}}, "no 3D configuration"),
        (2, json.loads(json.dumps(PLANS).replace(CT, "ZScoreNormalization")), "model takes HU, but no channel does"),
        (2, {"plans_name": "x"}, "is not nnU-Net v2's plans"),
    ],
    ids=["channels", "axes", "modality", "no plans"],
)
def test_plans_that_the_model_does_not_fit_are_refused(tmp_path, in_chans, plans, match):
    with pytest.raises(ArgumentError, match=match):
        written(tmp_path, load(NAME, in_chans=in_chans), plans)
    assert not (tmp_path / "gvslPlans.json").exists()


def test_nothing_is_replaced_unasked(tmp_path):
    net = load(NAME, in_chans=2)
    written(tmp_path, net)
    with pytest.raises(ArgumentError, match="exists already"):
        written(tmp_path, net)
    export_checkpoint(net, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="exists already"):
        export_checkpoint(net, tmp_path / "w.pth")
    export_checkpoint(net, tmp_path / "w.pth", overwrite=True)


@pytest.mark.parametrize("name", ["", ".", "a/b"])
def test_plans_get_the_name_of_a_file(tmp_path, name):
    with pytest.raises(ArgumentError, match=f"name='{name}' of the new plans"):
        written(tmp_path, load(NAME, in_chans=2), name=name)


def test_plans_that_cannot_be_written_are_an_error_in_words(tmp_path):
    (tmp_path / "mine.json").mkdir()
    with pytest.raises(GvslZooError, match=r"cannot write .*mine\.json: Is a directory"):
        written(tmp_path, load(NAME, in_chans=2), name="mine", overwrite=True)


@pytest.mark.parametrize("task", ["backbone", "segmentation", "registration"])
def test_the_checkpoint_holds_all_but_the_segmentation_layers(tmp_path, task):
    model = load(NAME, task=task, **({"num_classes": 2} if task == "segmentation" else {}))
    path = export_checkpoint(model, tmp_path / "w.pth")
    weights = torch.load(path, weights_only=True)["network_weights"]
    net = network()
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected and missing and all(".seg_layers." in name for name in missing)
    x = torch.rand(1, 1, 20, 20, 20)
    torch.testing.assert_close(net.backbone(x), load(NAME)(x))


def test_a_module_that_is_no_model_of_the_zoo_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="a UNet is no model of the zoo"):
        export_checkpoint(UNet(3, 8), tmp_path / "w.pth")
    with pytest.raises(ArgumentError, match="has no U-Net with a decoder"):
        export_checkpoint(load(NAME, features_only=True), tmp_path / "w.pth")


# --- With nnU-Net itself ----------------------------------------------------------------------------------------------


def test_nn_unet_finds_and_builds_the_network_of_the_plans_and_loads_the_checkpoint(tmp_path):
    plans_handling = pytest.importorskip("nnunetv2.utilities.plans_handling.plans_handler")
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    model = load(NAME, in_chans=2)
    configuration = plans_handling.PlansManager(written(tmp_path, model)).get_configuration("3d_lowres")
    assert configuration.pool_op_kernel_sizes == unet_strides(3)
    net = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        2,
        4,
        deep_supervision=True,
    )
    assert isinstance(net, NnUNet) and net.decoder.deep_supervision
    load_pretrained_weights(net, export_checkpoint(model, tmp_path / "w.pth"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(net.backbone.state_dict()[name], tensor)


def test_nn_unet_s_preprocessing_gives_the_network_what_the_model_s_own_gives(tmp_path):
    pytest.importorskip("nnunetv2")
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient
    from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization

    model = load(NAME)
    subject = sample_subject((20, 24, 28), torch.Generator().manual_seed(0), (4.0, 4.0, 4.0))
    volume = as_volume(subject)
    turned = Volume(volume.data[::-1].transpose(1, 0, 2), volume.affine @ flip_x_and_swap(volume.shape[0]))
    write_volume(turned, tmp_path / "scan.nii.gz")
    one = json.loads(json.dumps(PLANS))
    one["configurations"]["3d_lowres"]["normalization_schemes"] = [CT]
    plans = written(tmp_path, model, one)
    image, _ = NibabelIOWithReorient().read_images([str(tmp_path / "scan.nii.gz")])
    image = CTNormalization(
        use_mask_for_norm=False, intensityproperties=plans["foreground_intensity_properties_per_channel"]["0"]
    ).run(image)
    torch.testing.assert_close(torch.from_numpy(image), model.preprocess(volume)[0], rtol=0, atol=1e-6)


def flip_x_and_swap(size):
    """New voxel (j, i, k) -> old voxel (size - 1 - i, j, k)."""
    return np.array([[0, -1, 0, size - 1], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


@pytest.mark.slow
def test_every_block_of_the_page_runs_and_nn_unet_trains_from_our_weights(tmp_path, monkeypatch):
    pytest.importorskip("nnunetv2")
    from test_docs import run_blocks

    monkeypatch.chdir(tmp_path)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    make_data_set(tmp_path / "raw" / "Dataset001_Scans", tmp_path / "scans")
    names, blocks = run_blocks("nnunet.md", monkeypatch)
    assert blocks == 5
    assert len(names["report"].placed) == 20
    run = tmp_path / "results" / "Dataset001_Scans" / "nnUNetTrainer__gvslPlans__3d_fullres"
    log = next((run / "fold_0").glob("training_log_*.txt")).read_text()
    losses = [float(x) for x in re.findall(r"(?:train|val)_loss (\S+)", log)]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    numbers = [np._core.multiarray.scalar, np.dtype, np.dtypes.Float32DType, np.dtypes.Float64DType]  # of its log
    with torch.serialization.safe_globals(numbers):
        checkpoint = torch.load(run / "fold_0" / "checkpoint_final.pth", weights_only=True)
    trained = checkpoint["network_weights"]
    moved = [
        float((trained[f"backbone.{name}"] - tensor).abs().max()) for name, tensor in names["net"].state_dict().items()
    ]
    assert 0 < max(moved) < 0.01  # three small steps away from our weights, not from random ones
    import nibabel as nib

    labels = nib.load(tmp_path / "labels" / "new.nii.gz")
    assert labels.shape == nib.load(tmp_path / "scans" / "new_0000.nii.gz").shape


def make_data_set(folder, scans):
    """Five phantoms with the body as the label, and one to predict."""
    for name in (folder / "imagesTr", folder / "labelsTr", scans):
        name.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        subject = sample_subject((32, 36, 40), generator, (8.0, 8.0, 8.0))
        volume = as_volume(subject)
        write_volume(volume, folder / "imagesTr" / f"p{i}_0000.nii.gz" if i < 5 else scans / "new_0000.nii.gz")
        body = (subject.labels > 0).numpy().astype(np.uint8).transpose(2, 1, 0)
        if i < 5:
            write_volume(Volume(body, volume.affine), folder / "labelsTr" / f"p{i}.nii.gz")
    settings = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "body": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    (folder / "dataset.json").write_text(json.dumps(settings))
