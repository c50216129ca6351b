"""Fine-tuning: what is drawn of labelled scans, what a run writes and goes on from, and that it learns."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from gvsl_zoo import load, model_info, registry, save_pretrained
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, TrainingError, VolumeError
from gvsl_zoo.ledger import LeakageWarning, file_hash, ledger_of
from gvsl_zoo.models.heads import ClassificationModel, SegmentationModel
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import LABELS, sample_film, sample_subject
from gvsl_zoo.pretrain.learner import make_accelerator, schedule
from gvsl_zoo.pretrain.run import Run
from gvsl_zoo.transfer import data, finetune
from gvsl_zoo.transfer.cases import read_cases, split_cases
from gvsl_zoo.transfer.config import FinetuneConfig, settings_of
from gvsl_zoo.transfer.data import Patches, box, jitter, make_batch, prepare_cases
from gvsl_zoo.transfer.entry import input_of
from gvsl_zoo.transfer.finetune import Supervised, build, make_learner, seen_by_run
from gvsl_zoo.transfer.validate import area, confusion, validate
from gvsl_zoo.volume import InputWarning

pytest.importorskip("accelerate")
NANO = "gvsl-unet-ct-nano"
MM = 12.0
LUNGS = {"right lung": LABELS["lung_right"], "left lung": LABELS["lung_left"]}
TINY = {"spacing_mm": MM, "crop": 16, "save_every": 2, "warmup_steps": 2, "bf16": False, "validation": 0.3}
CPU = torch.device("cpu")
SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def a_home_and_a_registry_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


def write(path, array, spacing=MM):
    """An array (z, y, x) as a NIfTI file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([spacing] * 3 + [1.0])
    nib.Nifti1Image(np.ascontiguousarray(np.asarray(array).T), affine).to_filename(path)
    return path


@pytest.fixture(scope="session")
def scans(tmp_path_factory):
    """Four synthetic chest CTs of 12 mm with all their labels, as images/ and labels/."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(4):
        subject = sample_subject((20, 18, 24), torch.Generator().manual_seed(number), (MM,) * 3)
        write(folder / "images" / f"s{number}.nii.gz", subject.hu.round().short())
        write(folder / "labels" / f"s{number}.nii.gz", subject.labels)
    return folder


@pytest.fixture(scope="session")
def classes(scans):
    """The same scans as a table of two classes."""
    rows = [f"images/s{n}.nii.gz,{'odd' if n % 2 else 'even'}" for n in range(4)]
    (scans / "classes.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    return scans / "classes.csv"


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Six synthetic films with masks of the lungs, and a table of classes: turned upside down or not."""
    folder, rows = tmp_path_factory.mktemp("films"), ["image,label"]
    for number in range(6):
        film = sample_film((24, 32), torch.Generator().manual_seed(number), (12.0, 12.0))
        image, masks = (255 * film.image).round().byte().numpy(), film.masks[:2].any(0).byte().numpy()
        for name, pixels in (("images", image), ("labels", masks)):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(folder / name / f"f{number}.png")
        Image.fromarray(np.ascontiguousarray(image[:: -1 if number % 2 else 1])).save(folder / f"f{number}.png")
        rows.append(f"f{number}.png,{'turned' if number % 2 else 'upright'}")
    (folder / "classes.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="session")
def film_model(tmp_path_factory):
    """A backbone for films of width 8 with random weights."""
    unet = UNet(2, 8, generator=torch.Generator().manual_seed(0))
    entry = replace(model_info("gvsl-unet-xray"), status="available", config={"ndim": 2, "width": 8}, heads=())
    entry = replace(entry, input=replace(entry.input, size=None))
    return str(save_pretrained(unet, tmp_path_factory.mktemp("films") / "model", entry=entry))


def settings(steps=4, **changed):
    return FinetuneConfig(steps=steps, **TINY | changed)


def lungs(scans):
    return read_cases(scans, labels=LUNGS)


def train(cases, folder, *args, **changed):
    return finetune.finetune(cases, settings(*args, **changed), folder, device="cpu")


def examples_of(cases, folder, **changed):
    config = settings(**changed)
    given = input_of(config, load(config.model, pretrained=False).entry)
    return prepare_cases(cases.cases, cases.labels, given, folder, complete=cases.complete)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(log):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in log]


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def stop_after(monkeypatch, calls):
    """Let so many forward passes through, then pull the plug."""
    original, left = Supervised.forward, iter(range(calls))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt("power cut")
        return original(*arguments)

    monkeypatch.setattr(Supervised, "forward", interrupted)


# --- From files to the grid ------------------------------------------------------------------------------------


def test_on_its_own_grid_a_label_map_stays_what_it_is(scans, tmp_path):
    first = examples_of(read_cases(scans), tmp_path)[0]
    stored = nib.load(scans / "labels" / "s0.nii.gz").get_fdata().T
    names = read_cases(scans).labels
    values = torch.tensor([label.value for label in names])
    assert torch.equal(values[first.target.long()].double(), torch.from_numpy(stored.copy()))
    assert first.image.shape == (1, 20, 18, 24) and 0 <= first.image.min() < first.image.max() <= 1


def test_labels_and_image_are_turned_to_the_canonical_axes_alike(scans, tmp_path):
    """The intensity of a scan made of its labels tells where each label went."""
    labels = nib.load(scans / "labels" / "s0.nii.gz")
    turned = labels.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        turned.to_filename(tmp_path / folder / "a.nii.gz")
    with pytest.warns(InputWarning, match="1 of 1 scans look unlike the model's input, so a: expected HU"):
        [example] = examples_of(read_cases(tmp_path), tmp_path)
    values = torch.tensor([label.value for label in read_cases(tmp_path).labels])
    assert torch.allclose(example.image[0] * 2048 - 1024, values[example.target.long()].float(), atol=0.01)


def test_the_class_with_the_largest_share_of_a_voxel_wins(tmp_path):
    blocks = np.zeros((4, 4, 4), np.uint8)
    blocks[:2, :2, :2], blocks[0, 2:, 2:], blocks[2:, 2:, 2:] = 1, 2, 2  # 8 of 8, 4 of 8, 8 of 8 voxels
    write(tmp_path / "images" / "a.nii", np.arange(64).reshape(4, 4, 4).astype(np.int16) * 8 - 600)
    write(tmp_path / "labels" / "a.nii", blocks)
    [example] = examples_of(read_cases(tmp_path), tmp_path, spacing_mm=2 * MM)
    assert example.target.tolist() == [[[1, 0], [0, 0]], [[0, 0], [0, 2]]]  # of equal shares the first


def test_every_place_is_a_voxel_of_its_class(scans, tmp_path):
    for example in examples_of(lungs(scans), tmp_path):
        assert set(example.places) == {1, 2}
        for k, places in example.places.items():
            assert (example.target[tuple(places.T.long())] == k).all() and 0 < len(places) <= data.PLACES


def test_values_that_were_not_asked_for_are_background_unless_the_data_name_all(scans, tmp_path):
    assert {int(k) for e in examples_of(lungs(scans), tmp_path) for k in e.target.unique()} == {0, 1, 2}
    with pytest.raises(
        VolumeError, match=r"s0\.nii\.gz' holds the labels 1, .* have no name; named are 0 background, "
    ):
        examples_of(replace(lungs(scans), complete=True), tmp_path)


def spoilt(folder, scans, **changed):
    """Two scans, the label or second channel of the first of which is changed."""
    image = nib.load(scans / "images" / "s0.nii.gz")
    array, affine = np.asarray(image.dataobj), image.affine
    image.to_filename(folder / "image.nii")
    nib.Nifti1Image(changed.get("array", array), changed.get("affine", affine)).to_filename(folder / "other.nii")
    return folder


@pytest.mark.parametrize("role", ["label", "channel"])
@pytest.mark.parametrize(
    ("changed", "match"),
    [
        (
            {"affine": np.diag([MM, MM, MM + 1, 1])},
            r"other\.nii' lies up to 19 mm beside the scan 'image\.nii'; resample",
        ),
        (
            {"array": np.zeros((3, 4, 5), np.int16)},
            r"other\.nii' has \(3, 4, 5\) voxels, the scan 'image\.nii' \(24, 18, 20\)",
        ),
    ],
    ids=["moved", "cut"],
)
def test_a_file_on_another_grid_is_refused_by_name(scans, tmp_path, role, changed, match):
    spoilt(tmp_path, scans, **{"array": np.zeros((24, 18, 20), np.int16)} | changed)
    row = "image.nii,other.nii" if role == "label" else "image.nii;other.nii,image.nii"
    (tmp_path / "data.csv").write_text(f"image,label\n{row}\n")
    cases = read_cases(tmp_path / "data.csv", labels={"one": 1})
    with pytest.raises(VolumeError, match=match):
        examples_of(cases, tmp_path)


def test_a_film_keeps_its_pixels_and_is_resized_to_the_models_size(films, film_model, tmp_path):
    first = examples_of(read_cases(films), tmp_path, model=film_model, spacing_mm=None)[0]
    pixels = np.asarray(Image.open(films / "images" / "f0.png"))
    assert torch.allclose(first.image[0] * 255, torch.from_numpy(pixels.copy()).float(), atol=1e-4)
    assert np.array_equal(first.target, np.asarray(Image.open(films / "labels" / "f0.png")))
    classified = read_cases(films / "classes.csv", task="classification")
    changed = {"model": film_model, "spacing_mm": None, "task": "classification", "crop": (12, 16)}
    assert examples_of(classified, tmp_path, **changed)[0].image.shape == (1, 12, 16)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_film_is_what_the_loaded_model_makes_of_it_whatever_its_bits(film_model, tmp_path, bits):
    pixels = np.random.default_rng(0).integers(2 ** (bits - 3), 2**bits, (24, 32))
    Image.fromarray(pixels.astype(np.uint8 if bits == 8 else np.uint16)).save(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("image,label,case\na.png,0,a\na.png,1,b\n")
    cases = read_cases(tmp_path / "data.csv", task="classification")
    changed = {"model": film_model, "spacing_mm": None, "task": "classification", "crop": (12, 16)}
    example = examples_of(cases, tmp_path, **changed)[0]
    model = train(cases, tmp_path / "run", 1, validation=0.0, **changed)
    assert torch.equal(example.image[None], model.preprocess(tmp_path / "a.png"))
    assert example.image.std() > 0.05 and not example.doubts


def test_each_channel_of_a_film_is_scaled_from_its_own_extremes_as_in_use(film_model, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 200, (24, 32)).astype(np.uint8)
    for name, divisor in (("a", 1), ("b", 4)):
        Image.fromarray(pixels // divisor).save(tmp_path / f"{name}.png")
    (tmp_path / "data.csv").write_text("image,label,case\na.png;b.png,0,x\nb.png;a.png,1,y\n")
    cases = read_cases(tmp_path / "data.csv", task="classification")
    changed = {"model": film_model, "spacing_mm": None, "task": "classification", "unit": "arbitrary", "crop": (24, 32)}
    example = examples_of(cases, tmp_path, **changed)[0]
    assert example.image.shape[0] == 2
    assert example.image.amin((1, 2)).tolist() == [0, 0] and example.image.amax((1, 2)).tolist() == [1, 1]


def test_a_film_in_a_nifti_file_is_turned_with_its_labels(film_model, tmp_path):
    mask = np.zeros((24, 32), np.uint8)
    mask[2:9, 3:20] = 1
    for folder, array in (("images", mask * 200), ("labels", mask)):
        (tmp_path / folder).mkdir()
        nib.Nifti1Image(array[:, :, None], np.diag([-1.0, 1.0, 1.0, 1.0])).to_filename(tmp_path / folder / "a.nii")
    config = {"model": film_model, "spacing_mm": None}
    [example] = examples_of(read_cases(tmp_path), tmp_path, **config)
    assert torch.equal(example.image[0] > 0.5, example.target == 1) and example.target.sum() == mask.sum()


def test_an_empty_film_is_doubted(film_model, tmp_path):
    Image.fromarray(np.full((24, 32), 7, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("image,label,case\na.png,0,a\na.png,1,b\n")
    cases = read_cases(tmp_path / "data.csv", task="classification")
    with pytest.warns(InputWarning, match="2 of 2 scans .*, so a: every voxel is 7: an empty image$"):
        examples_of(cases, tmp_path, model=film_model, spacing_mm=None, task="classification")


def test_prepared_scans_are_not_read_again(scans, tmp_path, monkeypatch):
    cases, cache = lungs(scans), {}
    given = input_of(settings(), load(NANO).entry)
    before = prepare_cases(cases.cases, cases.labels, given, tmp_path, complete=False, cache=cache)
    monkeypatch.setattr(data, "prepare_scan", lambda *args: pytest.fail("it was read again"))
    again = prepare_cases(cases.cases, cases.labels, given, tmp_path, complete=False, cache=cache)
    assert all(a is b for a, b in zip(before, again, strict=True)) and len(cache) == 4


def test_what_is_too_much_for_the_memory_lies_in_a_file_and_is_the_same(scans, tmp_path, monkeypatch):
    before = examples_of(lungs(scans), tmp_path)
    monkeypatch.setattr(data, "MEMORY_BYTES", before[0].image.nbytes)
    again = examples_of(lungs(scans), tmp_path)
    assert all(torch.equal(a.image, b.image) for a, b in zip(before, again, strict=True))
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full disk to try")
def test_a_full_disk_is_told_with_a_remedy(tmp_path, monkeypatch):
    told = pytest.raises(TrainingError, match=r"a prepared scan of 2 MB .*: No space left on device; free space")
    with Path("/dev/full").open("r+b") as full, told:
        monkeypatch.setattr(data.tempfile, "TemporaryFile", lambda **_: full)
        data._mapped(torch.rand(1, 80, 80, 80), tmp_path)


# --- What a step draws -----------------------------------------------------------------------------------------


def test_a_patch_is_a_function_of_seed_and_number_alone(scans, tmp_path):
    examples = examples_of(lungs(scans), tmp_path)
    one, two = (Patches(examples, settings(), (16,) * 3) for _ in range(2))
    expected = [one[k] for k in range(6)]
    for k in (4, 1, 5, 0):
        assert all(map(torch.equal, two[k], expected[k]))
    assert not torch.equal(one[1].image, Patches(examples, settings(seed=1), (16,) * 3)[1].image)


def test_every_other_patch_is_centred_on_a_class_each_as_often(scans, tmp_path):
    examples = examples_of(lungs(scans), tmp_path)
    patches = Patches(examples, settings(augment=0), (1, 1, 1))  # of one voxel, so that it is the centre
    drawn = [int(patches[2 * k].target) for k in range(60)]
    assert set(drawn) == {1, 2} and 15 < drawn.count(1) < 45
    assert [int(patches[2 * k + 1].target) for k in range(30)].count(0) > 10


@pytest.mark.parametrize("crop", [(8, 8, 8), (16, 30, 16), (40, 40, 40)], ids=str)
def test_patches_have_the_size_asked_for(scans, tmp_path, crop):
    config = settings(crop=crop)
    patches = Patches(examples_of(lungs(scans), tmp_path), config, crop)
    images, targets = make_batch([patches[0], patches[1]], [0, 1], config, crop, CPU)
    assert images.shape == (2, 1, *crop) and targets.shape == (2, *crop) and targets.dtype == torch.int64


@pytest.mark.parametrize("augment", [0.0, 1.0])
def test_patches_reach_every_corner_of_a_scan(scans, tmp_path, augment):
    [first, *_] = examples_of(lungs(scans), tmp_path)
    numbers = torch.arange(first.target.numel()).view(1, *first.target.shape).float()
    crop, seen = (8, 8, 8), set()
    patches = Patches([replace(first, image=numbers, places={})], settings(augment=augment), crop)
    margin = patches.margins[0]
    for number in range(400):
        seen |= set(box(patches[number].image, [margin] * 3, crop).flatten().tolist())
    assert {0.0, numbers.max().item(), numbers[0, 0, 0, -1].item(), numbers[0, -1, 0, 0].item()} <= seen


def test_one_pose_moves_image_and_labels(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "jitter", lambda image, *_: image)
    config, crop = settings(), (16, 16, 16)
    examples = [replace(e, image=e.target[None].float()) for e in examples_of(lungs(scans), tmp_path)]
    patches = Patches(examples, config, crop)
    images, targets = make_batch([patches[k] for k in range(4)], list(range(4)), config, crop, CPU)
    away = (images[:, 0] - targets).abs()  # linear against nearest interpolation
    assert away.mean() < 0.12 and (away[targets == 2].median() < 0.25)
    assert not torch.equal(
        images, torch.stack([p.image[:, 4:-4, 4:-4, 4:-4] for p in map(patches.__getitem__, range(4))])
    )


def test_without_augmentation_a_patch_is_a_part_of_its_scan(scans, tmp_path):
    config, crop = settings(augment=0), (8, 8, 8)
    examples = examples_of(lungs(scans), tmp_path)[:1]
    patch = Patches(examples, config, crop)[0]
    images, _ = make_batch([patch], [0], config, crop, CPU)
    windows = examples[0].image[0].unfold(0, 8, 1).unfold(1, 8, 1).unfold(2, 8, 1)
    assert (windows == images[0, 0]).flatten(3).all(-1).any()


def test_a_box_beyond_the_image_is_filled_with_zeros():
    x = torch.arange(1.0, 28).view(1, 3, 3, 3)
    out = box(x, (-1, 1, 2), (5, 2, 3))
    assert (
        out.shape == (1, 5, 2, 3)
        and torch.equal(out[0, 1:4, :, :1], x[0, :, 1:, 2:])
        and out.sum() == x[0, :, 1:, 2:].sum()
    )


def test_jitter_stays_in_the_unit_range_and_is_none_without_strength(generator):
    x = torch.rand(1, 1, 12, 12, 12, generator=generator)
    assert torch.allclose(jitter(x, 0.0, generator), x)
    drawn = [jitter(x, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])
    assert all(y.min() >= 0 and y.max() <= 1 and (y - x).abs().max() < 0.5 for y in drawn)


# --- Validation ------------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """Logits from an image that is its own label map."""

    def __init__(self, count):
        super().__init__()
        self.count, self.weight = count, torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return -(x[:, :1] - torch.arange(self.count).view(1, -1, *[1] * (x.ndim - 2))).abs() * self.weight


def test_a_perfect_network_has_a_dice_of_one(scans, tmp_path):
    cases = lungs(scans)
    examples = [replace(e, image=e.target[None].float()) for e in examples_of(cases, tmp_path)]
    scores = validate(Oracle(3), examples, cases.labels, settings(), (16, 16, 16))
    assert scores == {"dice": 1.0, "dice_right lung": 1.0, "dice_left lung": 1.0}
    wrong = [
        replace(e, image=1.0 * (e.target[None] == 1) + (e.target[None] == 2)) for e in examples
    ]  # all lung is left
    scores = validate(Oracle(3), wrong, cases.labels, settings(), (16, 16, 16))
    assert scores["dice_right lung"] == 0 and 0.5 < scores["dice_left lung"] < 0.9


def test_the_confusion_table_counts_every_voxel_once(generator):
    found, truth = (torch.randint(3, (5, 6, 7), generator=generator).byte() for _ in range(2))
    table = confusion(found, truth, 3)
    assert table.sum() == found.numel() and table[1, 2] == ((truth == 1) & (found == 2)).sum()


def test_the_area_is_how_often_a_positive_outranks_a_negative():
    positive = torch.tensor([True, True, False, False])
    for scores, expected in (([4, 3, 2, 1], 1.0), ([1, 2, 3, 4], 0.0), ([1, 1, 1, 1], 0.5), ([4, 2, 3, 1], 0.75)):
        assert area(torch.tensor(scores), positive) == expected


# --- What a run writes -----------------------------------------------------------------------------------------


def test_a_run_logs_every_step_and_its_folder_holds_what_was_said(scans, tmp_path):
    model = train(lungs(scans), tmp_path / "my lungs", 3)
    log = records(tmp_path / "my lungs")
    assert [record["step"] for record in log] == [1, 2, 3]
    for record in log:
        assert record["loss"] == pytest.approx(record["cross_entropy"] + record["soft_dice_loss"], rel=1e-5)
        assert ("dice" in record and "dice_left lung" in record) == (record["step"] > 1)
    names = {path.name for path in (tmp_path / "my lungs").iterdir()}
    assert names == {"log.jsonl", "config.json", "cases.json", "checkpoints", "model.safetensors", ".lock"} | {
        *("curves.png", "README.md", "LICENSE", "preprocessor_config.json", "registry.yaml", "tensorboard")
    }
    noted = json.loads((tmp_path / "my lungs" / "cases.json").read_text())
    assert len(noted["train"]) == 3 and len(noted["val"]) == 1 and not set(noted["train"]) & set(noted["val"])
    assert isinstance(model, SegmentationModel) and not model.training


def test_the_model_of_a_run_carries_its_labels_its_input_and_its_origin(scans, tmp_path):
    entry = train(lungs(scans), tmp_path / "2 lungs", 1).entry
    assert [(label.name, label.value) for label in entry.labels] == [
        ("background", 0),
        ("left lung", LUNGS["left lung"]),
        ("right lung", LUNGS["right lung"]),
    ]
    assert all(label.colour for label in entry.labels[1:]) and entry.heads == ("segmentation",)
    assert entry.name == "run-2-lungs" and f"{NANO}, full fine-tuning, 3 subjects, 1 steps" in entry.summary
    assert entry.input.spacing_mm == (MM,) * 3 and entry.training.steps == 1 and "seed 0" in entry.training.recipe
    assert f"made from {NANO} (Apache-2.0)" in entry.licence.weights and "He et al." in entry.citation
    assert entry.input.window == (16, 16, 16) and input_of(settings(mode="linear"), entry).window == (96, 96, 96)
    assert entry.objective == "supervised" and entry.tasks == ("backbone", "segmentation", "classification")


def test_a_run_carries_the_ledger_of_its_weights_and_the_scans_it_trained_and_validated_on(scans, tmp_path):
    files = sorted((scans / "images").iterdir())
    data = replace(lungs(scans), cases=(*lungs(scans).cases[:3], replace(lungs(scans).cases[3], split="test")))
    base, own = load(NANO).entry.ledger, {file_hash(path) for path in files[:3]}
    again = train(data, tmp_path / "a", 1).entry.ledger
    assert again.complete and set(again.scans) == {*base.scans, *own}
    scratch = train(data, tmp_path / "b", 1, from_scratch=True).entry.ledger
    assert scratch.complete and set(scratch.scans) == own


def test_validation_on_what_was_seen_is_warned_of(scans):
    split = split_cases(lungs(scans), validation=0.3)
    known = ledger_of(split.val[0].images)
    with pytest.warns(LeakageWarning, match=f"or the weights saw before: {split.val[0].name}$"):
        assert len(seen_by_run(split, known).scans) == 4
    twice = split._replace(train=(*split.train, replace(split.val[0], name="again")))
    with pytest.warns(LeakageWarning, match=f": {split.val[0].name}$"):
        seen_by_run(twice, ledger_of([]))


def test_a_run_on_more_scans_than_an_entry_lists_does_not_claim_to_list_all(scans, monkeypatch):
    split = split_cases(lungs(scans), validation=0.3)
    monkeypatch.setattr("gvsl_zoo.ledger.MOST_LISTED", 3)
    known = seen_by_run(split, ledger_of([]))
    assert len(known.scans) == 3 and not known.complete


def test_a_runs_folder_serves_its_head_its_backbone_and_new_heads(scans, tmp_path):
    model = train(lungs(scans), tmp_path, 2)
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(load(tmp_path, task="segmentation")(x), model(x))
        assert torch.equal(load(tmp_path)(x), model.backbone(x))
    assert load(tmp_path, features_only=True).feature_info.channels() == [8, 16, 32, 64, 128]
    assert load(tmp_path, task="segmentation", num_classes=5)(x).shape[1] == 5
    assert load(tmp_path, task="classification", num_classes=2)(x).shape == (1, 2)


def test_a_finished_run_can_be_listed_in_a_registry_and_has_a_card(scans, tmp_path, monkeypatch):
    train(lungs(scans), tmp_path / "mine", 2)
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(tmp_path / "mine" / "registry.yaml"))
    entry = load("mine", task="segmentation").entry
    values = {result.metric: result.value for result in entry.evaluation}
    assert values["Dice"] == pytest.approx(records(tmp_path / "mine")[-1]["dice"], abs=1e-4)
    assert set(values) == {"Dice", "Dice of left lung", "Dice of right lung"}
    card = (tmp_path / "mine" / "README.md").read_text()
    assert 'task="segmentation"' in card and "| 1 | left lung |" in card and "not a medical device" in card


def test_what_validates_best_is_kept(scans, tmp_path, monkeypatch):
    scores = iter([0.1, 0.7, 0.7, 0.3])
    monkeypatch.setattr(finetune, "validate", lambda *_: {"dice": next(scores)})
    after = {}

    def note(record):
        if record["step"] == 6:
            after.update(load(tmp_path, task="segmentation").state_dict())

    finetune.finetune(lungs(scans), settings(8), tmp_path, device="cpu", progress=note)
    last = Run(tmp_path, settings(8)).latest().tensors["model"]
    kept = load(tmp_path, task="segmentation").state_dict()
    assert same(kept, after) and not same(kept, last)  # of equal scores the later one


def test_without_validation_the_last_weights_are_kept(scans, tmp_path):
    model = train(lungs(scans), tmp_path, 3, validation=0.0)
    assert same(model.state_dict(), Run(tmp_path, settings(3)).latest().tensors["model"])
    assert "Nothing has been measured" in model.entry.limits and "dice" not in records(tmp_path)[-1]


def test_averaged_weights_are_the_ones_that_are_validated_and_kept(scans, tmp_path):
    model = train(lungs(scans), tmp_path, 2, ema=0.5)
    tensors = Run(tmp_path, settings(2)).latest().tensors
    assert same(model.state_dict(), tensors["ema"]) and not same(model.state_dict(), tensors["model"])


def test_a_model_for_ct_learns_mr_on_a_grid_of_its_own(scans, tmp_path):
    for name in ("a", "b"):
        hu = np.asarray(nib.load(scans / "images" / "s0.nii.gz").dataobj).T
        write(tmp_path / "images" / f"{name}.nii", (hu + 1024).astype(np.float32) * (1e-3 if name == "a" else 1e3))
        write(tmp_path / "labels" / f"{name}.nii", np.asarray(nib.load(scans / "labels" / "s0.nii.gz").dataobj).T)
    cases = read_cases(tmp_path, labels=LUNGS)
    model = train(cases, tmp_path / "run", 1, unit="arbitrary", spacing_mm=(MM, MM, 10.0))
    assert model.entry.modality == "MR" and model.entry.input.intensity.unit == "arbitrary"
    images = [model.preprocess(tmp_path / "images" / f"{name}.nii") for name in "ab"]
    assert images[0].shape == (1, 1, 20, 18, 29) and torch.allclose(*images, atol=1e-4)


def test_several_channels_are_learnt_together(scans, tmp_path):
    rows = [f"{scans}/images/s{n}.nii.gz;{scans}/images/s{n}.nii.gz,{scans}/labels/s{n}.nii.gz" for n in range(2)]
    (tmp_path / "data.csv").write_text("\n".join(["image,label", *rows]))
    model = train(read_cases(tmp_path / "data.csv", labels=LUNGS), tmp_path / "run", 1, augment=0)
    assert load(tmp_path / "run", task="segmentation")(torch.rand(1, 2, 16, 16, 16)).shape[1] == 3
    assert model.entry.config["in_chans"] == 2


# --- Going on --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{"ema": 0.9}, {"mode": "linear"}, {"from_scratch": True}, {"head_steps": 3}], ids=str
)
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(scans, tmp_path, monkeypatch, changed):
    whole = train(lungs(scans), tmp_path / "whole", 5, **changed)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            train(lungs(scans), tmp_path / "cut", 5, **changed)
    assert len(records(tmp_path / "cut")) == 3
    assert same(train(lungs(scans), tmp_path / "cut", 5, **changed).state_dict(), whole.state_dict())
    assert untimed(records(tmp_path / "cut")) == untimed(records(tmp_path / "whole"))


def test_the_best_weights_survive_an_interruption(scans, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "validate", lambda *_: {"dice": 0.9})
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            train(lungs(scans), tmp_path, 6)
    best = load(tmp_path).state_dict()
    monkeypatch.setattr(finetune, "validate", lambda *_: {"dice": 0.1})
    train(lungs(scans), tmp_path, 6)
    assert same(load(tmp_path).state_dict(), best)


def test_a_run_does_not_depend_on_the_global_generator(scans, tmp_path):
    torch.manual_seed(1)
    first = train(lungs(scans), tmp_path / "a", 2, from_scratch=True)
    torch.manual_seed(2)
    again = train(lungs(scans), tmp_path / "b", 2, from_scratch=True)
    assert same(first.state_dict(), again.state_dict())
    other = train(lungs(scans), tmp_path / "c", 2, from_scratch=True, seed=1)
    assert not same(first.state_dict(), other.state_dict())


def test_patches_drawn_ahead_by_workers_are_the_same(scans, tmp_path):
    alone = train(lungs(scans), tmp_path / "a", 2)
    ahead = finetune.finetune(lungs(scans), settings(2), tmp_path / "b", device="cpu", workers=1)
    assert same(alone.state_dict(), ahead.state_dict())


def test_sigterm_saves_and_ends_with_its_code(scans, tmp_path):
    cases, config = lungs(scans), settings(3, save_every=10)
    whole = finetune.finetune(cases, config, tmp_path / "whole", device="cpu")

    def terminate(record):
        if record["step"] == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit, match="143"):
        finetune.finetune(cases, config, tmp_path / "cut", device="cpu", progress=terminate)
    assert Run(tmp_path / "cut", config).latest().step == 2
    assert same(finetune.finetune(cases, config, tmp_path / "cut", device="cpu").state_dict(), whole.state_dict())


def signal_at(monkeypatch, name, call):
    """SIGTERM comes as a function of a run is called so often."""
    original, left = getattr(finetune, name), iter(range(call))

    def interrupted(*arguments):
        if next(left, None) is None:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(finetune, name, interrupted)


@pytest.mark.parametrize("where", [("validate", 0), ("forward_backward", 1)], ids=["in validation", "before it"])
def test_a_validation_that_had_to_wait_is_made_up_for(scans, tmp_path, monkeypatch, where):
    """The scores fall, so that those weights are kept whose validation had to wait."""
    fall, seen = iter([0.9, 0.5, 0.4] * 2), []

    def falling(net, *arguments):
        scores = validate(net, *arguments)
        seen.append(bool(scores))
        return {"dice": next(fall)} if scores else {}

    monkeypatch.setattr(finetune, "validate", falling)
    whole = train(lungs(scans), tmp_path / "whole", 6)
    with monkeypatch.context() as patch:
        signal_at(patch, *where)
        with pytest.raises(SystemExit, match="143"):
            train(lungs(scans), tmp_path / "cut", 6)
    assert not seen[-1] and "dice" not in records(tmp_path / "cut")[-1]
    assert Run(tmp_path / "cut", settings(6)).latest().step == 2
    assert same(train(lungs(scans), tmp_path / "cut", 6).state_dict(), whole.state_dict())
    assert untimed(records(tmp_path / "cut")) == untimed(records(tmp_path / "whole"))


def test_a_run_that_is_to_stop_while_it_makes_up_for_a_validation_still_has_to(scans, tmp_path, monkeypatch):
    for _ in range(2):
        with monkeypatch.context() as patch:
            signal_at(patch, "validate", 0)
            with pytest.raises(SystemExit, match="143"):
                train(lungs(scans), tmp_path)
        assert [("dice" in record) for record in records(tmp_path)] == [False, False]
    train(lungs(scans), tmp_path)
    assert [("dice" in record) for record in records(tmp_path)] == [False, True, False, True]


def test_a_run_whose_log_is_lost_is_told_so(scans, tmp_path):
    train(lungs(scans), tmp_path, 1)
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"log\.jsonl is lost, and with it what the run measured; .* are whole"):
        train(lungs(scans), tmp_path, 1)


def test_a_run_goes_on_only_with_its_own_settings_and_cases(scans, tmp_path):
    train(lungs(scans), tmp_path, 1)
    with pytest.raises(ArgumentError, match="other settings: steps 1 -> 2, seed 0 -> 1"):
        train(lungs(scans), tmp_path, 2, seed=1)
    with pytest.raises(ArgumentError, match=r"other cases or labels \(cases\.json\); give the same, or another"):
        train(read_cases(scans, labels={"lung": LUNGS["left lung"]}), tmp_path, 1)


def test_a_run_whose_label_files_have_changed_is_not_gone_on_with(scans, tmp_path):
    for name in ("images", "labels"):
        for path in (scans / name).iterdir():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    train(lungs(tmp_path), tmp_path / "run", 1)
    cases = json.loads((tmp_path / "run/cases.json").read_text())
    (tmp_path / "labels" / f"{cases['train'][0]}.nii.gz").write_bytes(
        (tmp_path / "labels" / f"{cases['val'][0]}.nii.gz").read_bytes()
    )
    with pytest.raises(ArgumentError, match=r"images or labels have changed since the run in .* began"):
        train(lungs(tmp_path), tmp_path / "run", 1)
    del cases["files"]  # as in a run of before
    (tmp_path / "run/cases.json").write_text(json.dumps(cases))
    train(lungs(tmp_path), tmp_path / "run", 1)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(scans, tmp_path, monkeypatch):
    original, left = Supervised.forward, iter(range(2))

    def broken(*arguments):
        terms = original(*arguments)
        return terms if next(left, None) is not None else {k: v * float("nan") for k, v in terms.items()}

    monkeypatch.setattr(Supervised, "forward", broken)
    with pytest.raises(TrainingError, match=r"loss became nan .* at step 3; the checkpoints"):
        train(lungs(scans), tmp_path, 4)
    assert all(t.isfinite().all() for t in Run(tmp_path, settings()).latest().tensors["model"].values())


# --- Processes -------------------------------------------------------------------------------------------------

WORKER = """\
import json, sys, torch
from gvsl_zoo.transfer.cases import read_cases
from gvsl_zoo.transfer.config import FinetuneConfig
from gvsl_zoo.transfer.finetune import finetune
torch.set_num_threads(1)
cases, out, values = sys.argv[1:]
config = FinetuneConfig.from_dict(json.loads(values))
model = finetune(read_cases(cases, task=config.task), config, out, device="cpu")
assert model.num_classes == 2
"""
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.mark.slow
def test_two_processes_learn_as_one_with_the_doubled_batch(classes, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    given = TINY | {"task": "classification", "steps": 4, "head_steps": 2, "validation": 0.0}
    for name, batch, processes in (("one", 2, []), ("two", 1, TWO)):
        call = [sys.executable, *processes, str(tmp_path / "worker.py"), str(classes), str(tmp_path / name)]
        call.append(json.dumps(given | {"batch_size": batch}))
        done = subprocess.run(call, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
    for ours, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3), ours["step"]
        assert ours["gradient"] == pytest.approx(theirs["gradient"], rel=2e-2), ours["step"]


# --- What is trained -------------------------------------------------------------------------------------------


def test_a_linear_probe_leaves_the_backbone_as_it_was_and_is_an_ordinary_model(scans, tmp_path):
    model = train(lungs(scans), tmp_path, 3, mode="linear")
    assert same(model.backbone.state_dict(), load(NANO).state_dict())
    fresh = build(settings(mode="linear"), 3, 1).head.state_dict()
    assert not same(model.head.state_dict(), fresh)


def test_frozen_features_are_those_of_the_backbone_and_are_made_once(scans, tmp_path, monkeypatch):
    cases, cache = lungs(scans), {}
    finetune.finetune(cases, settings(1, mode="linear"), tmp_path / "a", device="cpu", cache=cache)
    features = [example for key, example in cache.items() if example.image.shape[0] == 8]
    assert len(features) == 4 and len(cache) == 8
    images = {example.name: example.image for example in cache.values() if example.image.shape[0] == 1}
    with torch.no_grad():
        dense = load(NANO)(images[features[0].name][None])[0]
    assert torch.allclose(features[0].image, dense, atol=1e-4)
    monkeypatch.setattr(finetune, "sliding_window", lambda *_, **__: pytest.fail("computed again"))
    finetune.finetune(cases, settings(1, mode="linear"), tmp_path / "b", device="cpu", cache=cache)


def test_layers_learn_slower_towards_the_input_but_not_from_scratch():
    rates = []
    for changed in ({}, {"from_scratch": True}, {"mode": "linear"}):
        config = settings(**changed)
        rates.append(make_learner(build(config, 3, 1), config, make_accelerator("cpu")).peaks)
    assert rates[0] == sorted(rates[0]) and rates[0][-1] == 5e-3 and rates[0][0] == pytest.approx(5e-3 * 0.8**9)
    assert set(rates[1]) == {1e-2} and rates[2] == [0.3]


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_the_head_learns_alone_first_and_then_the_network_with_it(scans, classes, tmp_path, task):
    cases = lungs(scans) if task == "segmentation" else read_cases(classes, task=task)
    given, start = {"task": task, "validation": 0.0}, load(NANO).state_dict()
    alone = train(cases, tmp_path / "alone", 3, head_steps=3, **given)
    assert same(alone.backbone.state_dict(), start)
    fresh = build(settings(task=task), alone.num_classes, 1).head.state_dict()
    assert not same(alone.head.state_dict(), fresh)
    both = train(cases, tmp_path / "both", 4, head_steps=3, **given)
    assert not same(both.backbone.state_dict(), start)
    assert untimed(records(tmp_path / "alone")) == untimed(records(tmp_path / "both"))[:3]


def test_a_run_does_not_go_on_from_other_weights_than_it_started_from(scans, tmp_path, monkeypatch):
    base = load(NANO)
    base.save_pretrained(tmp_path / "base")
    given = {"model": str(tmp_path / "base"), "mode": "linear"}
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt, match="power cut"):
        train(lungs(scans), tmp_path / "run", 4, **given)
    monkeypatch.undo()
    with torch.no_grad():
        next(base.parameters()).mul_(2)
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(ArgumentError, match=r"the weights that the run in .* started from have changed; give them"):
        train(lungs(scans), tmp_path / "run", 4, **given)


def test_images_of_another_range_than_0_to_1_are_refused(scans, tmp_path):
    entry = model_info(NANO)
    wide = replace(entry.input, intensity=replace(entry.input.intensity, scale=(-1.0, 1.0)))
    save_pretrained(load(NANO), tmp_path / "base", entry=replace(entry, input=wide, sources=(), proof=None))
    with pytest.raises(ArgumentError, match=f"{NANO} takes images from -1 to 1; fine-tuning knows only 0 to 1"):
        train(lungs(scans), tmp_path / "run", 1, model=str(tmp_path / "base"))


def test_a_run_replaces_no_file_of_other_origin(scans, tmp_path):
    for name in ("README.md", "config.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text('{"mine": true}')
        with pytest.raises(ArgumentError, match=f"holds files of other origin: {name}; choose another folder"):
            train(lungs(scans), folder, 1)
        assert [path.name for path in folder.iterdir()] == [name]


def test_a_run_called_as_a_device_of_windows_is_renamed(scans, tmp_path):
    model = train(lungs(scans), tmp_path / "aux", 1)
    assert model.entry.name == "run-aux" and "in_chans" not in model.entry.config


def test_a_checkpoint_that_was_being_replaced_is_found_again(scans, tmp_path):
    train(lungs(scans), tmp_path, 2)
    checkpoint = tmp_path / "checkpoints" / "00000002"
    checkpoint.rename(checkpoint.with_name(".00000002.old"))
    with Run(tmp_path, settings(2)).locked():
        assert [path.name for path in checkpoint.parent.iterdir()] == ["00000002"]


def test_each_part_of_a_run_warms_up_and_cools_down():
    config = settings(8, head_steps=3)
    rates = [finetune.rate(step, config) for step in range(8)]
    assert rates[:3] == [finetune.HEAD_RATE * schedule(step, 3, 2) for step in range(3)]
    assert rates[3:] == [schedule(step, 5, 2) for step in range(5)]
    for given, heads in (({}, [2, 0, 0]), ({"head_steps": 5}, [5, 0, 0]), ({"head_steps": 0}, [0, 0, 0])):
        arms = ({}, {"from_scratch": True}, {"mode": "linear"})
        assert [settings(8, **given, **changed).steps_of_head for changed in arms] == heads


def test_the_rate_of_a_whole_network_falls_with_its_width():
    whole, scratch, linear = settings(8), settings(8, from_scratch=True), settings(8, mode="linear")
    assert [whole.peak_rate(channels) for channels in (128, 256, 512)] == [5e-3, 2.5e-3, 1.25e-3]
    assert scratch.peak_rate(256) == 2 * whole.peak_rate(256)
    assert linear.peak_rate(128) == linear.peak_rate(512)
    assert settings(8, learning_rate=0.01).peak_rate(512) == 0.01
    wide = load("gvsl-unet-ct-small", task="segmentation", num_classes=2, pretrained=False)
    head = finetune.make_learner(wide, settings(8), make_accelerator("cpu")).optimizer.param_groups[-1]
    assert head["lr"] == 2.5e-3


@pytest.mark.parametrize("mode", ["full", "linear"])
def test_a_classification_learns_its_encoder_or_its_head_alone(classes, tmp_path, mode):
    cases = read_cases(classes, task="classification")
    model = train(cases, tmp_path, 2, task="classification", mode=mode)
    record = records(tmp_path)[-1]
    assert isinstance(model, ClassificationModel) and {"cross_entropy", "accuracy", "auc"} <= record.keys()
    assert [label.name for label in model.entry.labels] == ["even", "odd"] and "soft_dice_loss" not in record
    moved = {
        name
        for name, tensor in load(NANO).state_dict().items()
        if not torch.equal(tensor, model.backbone.state_dict()[name])
    }
    encoder = {f"{level.module}." for level in model.backbone.levels[: model.backbone.encoder_levels]}
    assert bool(moved) == (mode == "full") and all(name.startswith(tuple(encoder)) for name in moved)
    assert load(tmp_path)(torch.rand(1, 1, 16, 16, 16)).shape[1] == 8  # the decoder is in the file as well


@pytest.mark.parametrize("task", ["segmentation", "classification"])
@pytest.mark.parametrize("mode", ["full", "linear"])
def test_films_are_learnt_like_volumes(films, film_model, tmp_path, task, mode):
    cases = read_cases(films if task == "segmentation" else films / "classes.csv", task=task)
    model = train(cases, tmp_path, 2, task=task, mode=mode, model=film_model, spacing_mm=None)
    assert model.entry.ndim == 2 and model.entry.input.size == ((16, 16) if task == "classification" else None)
    logits = model(torch.rand(1, 1, 16, 16))
    assert logits.shape == ((1, 2, 16, 16) if task == "segmentation" else (1, 2))


def test_a_fine_tuned_model_can_be_fine_tuned_again(scans, tmp_path):
    train(lungs(scans), tmp_path / "a", 1)
    again = train(lungs(scans), tmp_path / "b", 1, model=str(tmp_path / "a"))
    assert "a, full fine-tuning" in again.entry.summary


# --- What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"task": "detection"}, "task 'detection' in the settings"),
        ({"mode": "half"}, "mode 'half'"),
        ({"unit": "SUV"}, "unit 'SUV'"),
        ({"steps": 0}, "a count below 1"),
        ({"crop": (16, 0, 16)}, r"crop \(16, 0, 16\)"),
        ({"spacing_mm": -1.0}, "spacing_mm -1.0"),
        ({"head_steps": 5}, "head_steps 5 of 4"),
        ({"head_steps": -1}, "head_steps -1"),
        ({"layer_decay": 0.0}, "layer_decay 0.0"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"clip_norm": 0.0}, "clip_norm 0.0"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
        ({"learning_rate": float("inf")}, "learning_rate inf"),
        ({"spacing_mm": (1.0, float("nan"), 1.0)}, r"spacing_mm \(1.0, nan, 1.0\)"),
        ({"augment": float("nan")}, "augment nan"),
        ({"augment": 1.5}, "augment 1.5"),  # beyond 1 the ranges of poses are cut off
    ],
)
def test_settings_that_cannot_be_are_refused(changed, match):
    with pytest.raises(ArgumentError, match=match):
        settings(**changed)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"crop": (16, 16)}, r"crop \(16, 16\) for a model of 3 axes; give one number, or 3"),
        ({"spacing_mm": (2.0, 2.0)}, r"spacing_mm \(2\.0, 2\.0\) for a model of 3 axes"),
        ({"unit": "grey"}, "unit 'grey' for a model of 3 axes"),
        ({"task": "classification"}, "cases of a segmentation for the task classification"),
        ({"subjects": 4}, "3 labelled subjects to train on, 4 wanted"),
    ],
)
def test_settings_that_do_not_fit_the_model_or_the_data_are_refused(scans, tmp_path, changed, match):
    with pytest.raises(ArgumentError, match=match):
        train(lungs(scans), tmp_path / "run", **changed)


def test_a_label_that_no_training_case_holds_is_refused(scans, tmp_path):
    cases = read_cases(scans, labels=LUNGS | {"unicorn": 99})
    with pytest.raises(ArgumentError, match="none of 3 training cases holds unicorn on the model's grid"):
        train(cases, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # so that the next call starts anew


def test_a_class_of_no_training_case_is_refused_without_a_word_about_grids(classes, tmp_path):
    cases = read_cases(classes, task="classification")
    with pytest.raises(ArgumentError, match=r"none of 1 training cases is of the class (odd|even); train") as told:
        train(cases, tmp_path / "run", task="classification", subjects=1)
    assert "grid" not in str(told.value)


def test_settings_come_from_names_and_from_text():
    config = settings_of(5, {"mode": None, "crop": 32, "seed": 3}, ("ema=0.5", "crop=[8, 16, 24]"))
    assert config == FinetuneConfig(5, seed=3, ema=0.5, crop=(8, 16, 24))
    with pytest.raises(ArgumentError, match="unknown settings width"):
        settings_of(5, {}, ("width=8",))


# --- The command, and real scans -------------------------------------------------------------------------------


def call(*arguments):
    result = CliRunner().invoke(main, ["finetune", *map(str, arguments)])
    return result.exit_code, result.output


def test_the_command_trains_on_an_nnunet_folder_resumes_and_says_what_it_made(scans, tmp_path):
    for number in range(3):
        for source, target in (
            (f"images/s{number}", f"imagesTr/s{number}_0000"),
            (f"labels/s{number}", f"labelsTr/s{number}"),
        ):
            (tmp_path / target).parent.mkdir(exist_ok=True)
            (tmp_path / f"{target}.nii.gz").write_bytes((scans / f"{source}.nii.gz").read_bytes())
    facts = {"channel_names": {"0": "CT"}, "labels": {name: value for name, value in LABELS.items()}}
    (tmp_path / "dataset.json").write_text(json.dumps(facts | {"file_ending": ".nii.gz"}))
    common = ["--data", tmp_path, "--out", tmp_path / "run", "--steps", 2, "--spacing-mm", MM, "--crop", 16]
    common += ["--labels", f"lung={LUNGS['left lung']}", "--device", "cpu", "--set", "bf16=false", "--json"]
    code, output = call(*common)
    facts = json.loads(output)
    assert code == 0 and facts["run"] == str(tmp_path / "run") and {"dice", "dice_lung"} <= facts.keys()
    assert load(tmp_path / "run", task="segmentation").num_classes == 2
    code, output = call(*common)
    assert code == 2 and re.search("holds a run; add --resume to go on with it", output)
    assert call(*common, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--labels", "lung"], "write NAME=VALUE"),
        (["--labels", "lung=1=2"], "write NAME=VALUE"),
        (["--labels", "lung=10,lung=11"], "'lung=10,lung=11' gives a name twice; give each of them one value"),
        (["--set", "depth=5"], "unknown settings depth"),
    ],
)
def test_a_wrong_call_is_told(scans, tmp_path, arguments, match):
    code, output = call("--data", scans, "--out", tmp_path / "run", "--steps", 1, *arguments)
    assert code == 2 and re.search(match, output) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_short_fine_tuning_finds_the_lungs_of_a_subject_it_has_not_seen(scans, tmp_path):
    train(lungs(scans), tmp_path, 60, save_every=60, warmup_steps=10)
    assert records(tmp_path)[-1]["dice"] > 0.5


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the shared scans are not here")
def test_ten_real_brains_teach_a_model_for_ct_where_the_hippocampus_is(tmp_path):
    names = sorted((SHARED / "mr" / "hippocampus").glob("*_seg.nii.gz"))[:12]
    rows = [f"{str(name).replace('_seg', '')},{name}" for name in names]
    (tmp_path / "data.csv").write_text("\n".join(["image,label", *rows]))
    cases = read_cases(tmp_path / "data.csv", labels={"anterior": 1, "posterior": 2})
    changed = {"unit": "arbitrary", "spacing_mm": 1.0, "crop": 48, "save_every": 100, "warmup_steps": 20, "bf16": True}
    train(cases, tmp_path / "run", 100, validation=0.2, **changed)
    assert records(tmp_path / "run")[-1]["dice"] > 0.4
