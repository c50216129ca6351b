"""Weight surgery: what is placed is placed exactly, what is not is named, and a doubt is never resolved by chance."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from gvsl_zoo import load, transplant
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.surgery import alignment

NAME = "gvsl-unet-ct-nano"


def test_an_alignment_has_exactly_the_pairs_that_every_longest_common_subsequence_has():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rows, columns = torch.randint(1, 6, (2,), generator=generator).tolist()
        fits = (torch.rand(rows, columns, generator=generator) < 0.4).tolist()
        longest: list[set] = [set()]
        for size in range(1, min(rows, columns) + 1):
            found = [
                set(zip(i, j, strict=True))
                for i in itertools.combinations(range(rows), size)
                for j in itertools.combinations(range(columns), size)
                if all(fits[a][b] for a, b in zip(i, j, strict=True))
            ]
            longest = found or longest
        certain, doubtful = alignment(fits)
        assert set(certain.items()) == set.intersection(*longest)
        assert doubtful == {i for pairs in longest for i, _ in pairs} - certain.keys()


@pytest.mark.parametrize("task", ["backbone", "segmentation", "pretraining"])
def test_a_model_fits_into_its_own_backbone_whatever_holds_it(task, generator):
    settings = {"num_classes": 3} if task == "segmentation" else {}
    model = load(NAME, task=task, **settings)
    target = nn.ModuleDict({"net": UNet(3, 8, generator=generator), "head": nn.Conv3d(8, 2, 1)})
    report = transplant(model, into=target)
    assert report.matched_by == "name" and report.spread is None
    assert report.kept == ("head.weight", "head.bias")
    for name, tensor in load(NAME).state_dict().items():
        assert torch.equal(target.state_dict()[f"net.{name}"], tensor)


def test_every_tensor_of_both_sides_is_accounted_for_once(generator):
    model = load(NAME, task="pretraining")
    target = UNet(3, 8, decoder=False, generator=generator)
    report = transplant(model, into=target)
    ours, theirs = zip(*report.placed, strict=True)
    assert sorted([*ours, *(name for name, _ in report.left)]) == sorted(model.state_dict())
    assert sorted([*theirs, *report.kept]) == sorted(target.state_dict())
    text = str(report)
    assert f"{len(ours)} of {len(model.state_dict())} tensors placed, matched by name" in text
    assert all(name in text for name in model.state_dict())


def test_the_scratch_target_keeps_its_dtype_and_what_is_spread_keeps_the_response():
    model = load(NAME, features_only=True)
    target = UNet(3, 8, 3, decoder=False).to(torch.float64).eval()
    report = transplant(model, into=target)
    assert report.spread == "backbone.inc.double_conv.0.weight"
    assert {p.dtype for p in target.parameters()} == {torch.float64}
    x = torch.rand(1, 1, 20, 17, 18)
    copies = target.forward_intermediates(x.double().expand(-1, 3, -1, -1, -1))
    for ours, theirs in zip(model(x), copies, strict=True):
        torch.testing.assert_close(theirs.float(), ours, rtol=1e-4, atol=1e-4)


def test_a_state_dict_in_the_order_of_its_names_is_spread_too():
    model, target = load(NAME), UNet(3, 8, 3)
    report = transplant(dict(sorted(model.state_dict().items())), into=target)
    assert report.spread == "inc.double_conv.0.weight" and not report.left and not report.kept
    assert torch.allclose(target.inc.double_conv[0].weight.sum(1, keepdim=True), model.inc.double_conv[0].weight)


def test_a_path_a_name_and_a_state_dict_are_sources_too(tmp_path):
    model = load(NAME)
    model.save_pretrained(tmp_path / "saved")
    for source in (
        NAME,
        tmp_path / "saved",
        model.state_dict(),
        {f"module.{k}": v for k, v in model.state_dict().items()},
    ):
        target = UNet(3, 8)
        transplant(source, into=target)
        assert torch.equal(target.up4.conv.double_conv[3].weight, model.up4.conv.double_conv[3].weight)


def plain_encoder(*widths: int, in_chans: int = 1) -> nn.Sequential:
    """Two convolutions 3 a level, under names that are not ours."""
    chans = [in_chans, *widths]
    return nn.Sequential(
        *(
            nn.Sequential(nn.Conv3d(a, b, 3, padding=1), nn.BatchNorm3d(b), nn.ReLU(), nn.Conv3d(b, b, 3, padding=1))
            for a, b in itertools.pairwise(chans)
        )
    )


def test_foreign_names_are_matched_by_the_order_and_shapes_of_the_convolutions():
    model, target = load(NAME), plain_encoder(8, 16, 32, 64, 128, in_chans=2)
    report = transplant(model, into=target)
    assert report.matched_by == "structure" and report.spread == "inc.double_conv.0.weight"
    assert dict(report.placed)["down4.maxpool_conv.1.double_conv.3.bias"] == "4.3.bias"
    assert torch.equal(target[2][0].weight, model.down2.maxpool_conv[1].double_conv[0].weight)
    assert len(report.placed) == 20 and all("." in name for name in report.kept)  # batch norms
    x = torch.rand(1, 1, 6, 6, 6)
    ours, theirs = model.inc.double_conv[0](x), target[0][0](x.expand(-1, 2, -1, -1, -1))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_what_fits_in_several_places_is_left_out_and_said():
    target = nn.Sequential(plain_encoder(8, 16, 32, 64, 128), nn.Conv3d(128, 128, 3))
    report = transplant(load(NAME), into=target)
    left = dict(report.left)
    assert left["down4.maxpool_conv.1.double_conv.3.weight"] == "fits in several places"
    assert len(report.placed) == 18


def test_monai_s_basic_unet_takes_the_whole_encoder_and_monai_s_unet_a_part_of_it():
    nets = pytest.importorskip("monai.networks.nets")
    model = load(NAME)
    basic = nets.BasicUNet(3, 1, 4, features=(8, 16, 32, 64, 128, 8))
    report = transplant(model, into=basic)
    assert report.matched_by == "structure" and len(report.placed) == 20
    assert torch.equal(basic.down_4.convs.conv_1.conv.weight, model.down4.maxpool_conv[1].double_conv[3].weight)
    unet = nets.UNet(3, 1, 4, channels=(8, 16, 32, 64, 128), strides=(2, 2, 2, 2))
    report = transplant(model, into=unet)
    weights = [pair for pair in report.placed if pair[0].endswith("weight")]
    assert [ours.split(".")[0] for ours, _ in weights] == ["inc", "down1", "down2", "down3", "down4"]
    placed = unet.state_dict()
    for ours, theirs in report.placed:
        assert torch.equal(placed[theirs], model.state_dict()[ours])


def test_nn_unet_s_own_network_takes_the_encoder_once_although_it_holds_it_twice():
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    target = unet.PlainConvUNet(
        1, 5, (8, 16, 32, 64, 128), nn.Conv3d, 3, (1, 2, 2, 2, 2), 2, 3, 2, True, nn.InstanceNorm3d, {"affine": True},
        nonlin=nn.LeakyReLU,
    )  # fmt: skip
    report = transplant(load(NAME), into=target)
    assert report.matched_by == "structure" and len(report.placed) == 20
    assert all(theirs.startswith("encoder.") for _, theirs in report.placed)


def refused(source, target, match):
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ArgumentError, match=match):
        transplant(source, into=target)
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


@pytest.mark.parametrize(
    ("target", "match"),
    [
        (lambda: UNet(3, 16), r"is \(8, 1, 3, 3, 3\), not \(16, 1, 3, 3, 3\) as inc"),
        (lambda: UNet(2, 8), "UNet has no place for 3 of the convolutions"),
        (lambda: nn.Linear(3, 3), "Linear has no place for 3"),
        (lambda: nn.Sequential(nn.Conv3d(1, 8, 3), nn.Conv3d(8, 8, 3)), "Sequential has no place for 3"),
        (lambda: nn.ModuleDict({"a": UNet(3, 8), "b": UNet(3, 8)}), "in several places, among them a.inc.* and b.inc"),
    ],
    ids=["width", "axes", "nothing", "coincidence", "twins"],
)
def test_a_target_that_nothing_fits_is_refused_and_stays_untouched(target, match):
    refused(load(NAME), target(), match)


def test_a_checkpoint_that_holds_more_than_tensors_is_refused():
    refused({"epoch": 3, "state_dict": load(NAME).state_dict()}, UNet(3, 8), "holds more than tensors")


def test_a_target_that_is_no_module_is_refused():
    with pytest.raises(ArgumentError, match="a dict to transplant into; give the network itself"):
        transplant(NAME, into={})


def test_a_target_without_memory_is_refused():
    with pytest.raises(ArgumentError, match="meta device"):
        transplant(NAME, into=UNet(3, 8, device="meta"))
