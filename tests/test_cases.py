"""Labelled data: which cases a folder or a table holds, what is refused and how, and how subjects are dealt out."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.registry import Label
from gvsl_zoo.transfer.cases import Case, Cases, files_hash, read_cases, read_labels, split_cases

V2 = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "lung": 1, "heart": 2}, "file_ending": ".nii.gz"}
V1 = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "lung", "2": "heart"}}


def put(path: Path, value=0):
    """A scan or label file of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        from PIL import Image

        Image.fromarray(np.full((4, 5), value, np.uint8)).save(path)
    else:
        nib.Nifti1Image(np.full((4, 5, 6), value, np.int16), np.eye(4)).to_filename(path)
    return path


def nnunet(folder, facts, channels=("_0000",), ending=".nii.gz"):
    for name in ("a", "b"):
        for channel in channels:
            put(folder / "imagesTr" / f"{name}{channel}{ending}")
        put(folder / "labelsTr" / f"{name}{ending}", 1)
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


def table(folder, text):
    (folder / "data.csv").write_text(text)
    return folder / "data.csv"


def meaning(cases):
    return [(label.name, label.value) for label in cases.labels]


# --- What is read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "channels"), [(V2, ("_0000",)), (V1, ("_0000",)), (V1, ("",))], ids=["v2", "v1", "msd"]
)
def test_an_nnunet_folder_is_read_as_it_is(tmp_path, facts, channels):
    nnunet(tmp_path, facts, channels)
    put(tmp_path / "imagesTs" / f"c{channels[0]}.nii.gz")
    cases = read_cases(tmp_path)
    assert meaning(cases) == [("background", 0), ("lung", 1), ("heart", 2)] and cases.complete
    assert [(case.name, case.split) for case in cases] == [("a", None), ("b", None), ("c", "test")]
    first, _, last = cases
    assert first.images == (tmp_path / "imagesTr" / f"a{channels[0]}.nii.gz",)
    assert first.label == tmp_path / "labelsTr" / "a.nii.gz" and last.label is None


def test_channels_come_in_the_order_of_their_numbers(tmp_path):
    facts = V2 | {"channel_names": {"0": "T1", "1": "T2"}, "file_ending": ".png"}
    cases = read_cases(nnunet(tmp_path, facts, ("_0001", "_0000"), ".png"))
    assert [path.name for path in cases.cases[0].images] == ["a_0000.png", "a_0001.png"]


def test_four_digits_beyond_the_channels_are_a_part_of_the_name_of_a_test_case_too(tmp_path):
    (tmp_path / "dataset.json").write_text(
        json.dumps({"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}})
    )
    for name, folders in (("amos_0001", ("imagesTr", "labelsTr")), ("amos_0004", ("imagesTr", "labelsTr"))):
        for folder in folders:
            put(tmp_path / folder / f"{name}.nii.gz")
    for name in ("amos_0002", "amos_0003"):
        put(tmp_path / "imagesTs" / f"{name}.nii.gz")
    assert [case.name for case in read_cases(tmp_path)] == ["amos_0001", "amos_0004", "amos_0002", "amos_0003"]


def test_a_folder_whose_cases_all_lack_a_channel_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="a, b lack some of 2 channels; add the files"):
        read_cases(nnunet(tmp_path, V2 | {"channel_names": {"0": "CT", "1": "PET"}}))


def test_a_folder_of_images_and_labels_is_paired_by_name(tmp_path):
    for name, value in (("scan_0001", 3), ("scan_0002", 0)):  # four digits that are no channel
        put(tmp_path / "images" / f"{name}.nii.gz")
        put(tmp_path / "labels" / f"{name}.nii.gz", value)
    (tmp_path / "images" / ".hidden.nii.gz").write_bytes(b"")
    (tmp_path / "images" / "notes.txt").write_text("not a scan")
    cases = read_cases(tmp_path)
    assert [case.name for case in cases] == ["scan_0001", "scan_0002"] and len(cases) == 2
    assert meaning(cases) == [("background", 0), ("3", 3)]


def test_a_table_says_everything_about_its_cases(tmp_path):
    for name in ("x_0", "x_1", "y", "m"):
        put(tmp_path / f"{name}.nii.gz")
    text = "image,label,case,subject,split\nx_0.nii.gz; x_1.nii.gz,m.nii.gz,first,Ann,train\n"
    cases = read_cases(table(tmp_path, text), labels={"tumour": 4})
    assert not cases.complete and meaning(cases) == [("background", 0), ("tumour", 4)]
    images = (tmp_path / "x_0.nii.gz", tmp_path / "x_1.nii.gz")
    assert cases.cases == (Case("first", "Ann", images, tmp_path / "m.nii.gz", "train"),)


@pytest.mark.parametrize(
    ("texts", "labels", "values", "names"),
    [
        (("ill", "well"), None, [0, 1], ["ill", "well"]),
        (("10", "9"), None, [10, 9], ["9", "10"]),
        (("1", "0"), {"no": 0, "yes": 1}, [1, 0], ["no", "yes"]),
        (("ill", "well"), {"well": 0, "ill": 1}, [1, 0], ["well", "ill"]),
    ],
)
def test_classes_are_numbers_or_names(tmp_path, texts, labels, values, names):
    for name in "ab":
        put(tmp_path / f"{name}.png")
    text = f"image,label\na.png,{texts[0]}\nb.png,{texts[1]}\n"
    cases = read_cases(table(tmp_path, text), task="classification", labels=labels)
    assert [case.label for case in cases] == values and [label.name for label in cases.labels] == names


def test_a_subject_is_read_from_a_bids_name_and_else_is_the_case(tmp_path):
    for name in ("sub-01_ses-1", "sub-01_ses-2", "liver_7"):
        for folder in ("images", "labels"):
            put(tmp_path / folder / f"{name}.nii", 1)
    assert [case.subject for case in read_cases(tmp_path)] == ["liver_7", "sub-01", "sub-01"]


def test_labels_that_are_near_have_different_colours(tmp_path):
    cases = read_cases(nnunet(tmp_path, V2), labels={str(k): k for k in range(1, 40)})
    background, *others = cases.labels
    assert background == Label("background", 0) and len({label.colour for label in others}) == 39


# --- What is refused -------------------------------------------------------------------------------------------


def change(folder, name, action):
    path = folder / name
    if action is None:
        path.unlink()
    elif isinstance(action, dict):
        path.write_text(json.dumps(action))
    else:
        put(path)


@pytest.mark.parametrize(
    ("name", "action", "match"),
    [
        ("labelsTr/b.nii.gz", None, r"imagesTr'?: b without a label file of the same name; put it into labelsTr"),
        ("imagesTr/b_0000.nii.gz", None, r"labelsTr'?: b without an image of the same name"),
        ("imagesTr/b_0002.nii.gz", "put", r"'b' has the channels 0, 2; number them from _0000 on"),
        ("imagesTr/b_0001.nii.gz", "put", r"b lack some of 1 channels|'b' has 2 channels"),
        ("imagesTr/b.nii.gz", "put", r"two files for channel 0 of 'b'"),
        ("dataset.json", None, r"dataset\.json' cannot be read"),
        ("dataset.json", {"labels": {"a": 1}}, r"no description of a data set \(KeyError: 'modality'\)"),
        ("dataset.json", V2 | {"file_ending": ".mha"}, r"file_ending '\.mha'; convert the files to \.nii\.gz"),
        ("dataset.json", V2 | {"labels": {"background": 0, "all": [1, 2]}}, r"label 'all': \[1, 2\]; regions and"),
        ("dataset.json", V2 | {"labels": {"background": 0, "a": 1, "ignore": 2}}, r"label 'ignore': 2; regions"),
        ("dataset.json", V2 | {"labels": {"background": 0}}, "only label is 'background'; two classes"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_with_the_file_and_a_remedy(tmp_path, name, action, match):
    change(nnunet(tmp_path, V2), name, action)
    with pytest.raises(ArgumentError, match=match):
        read_cases(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("image\na.nii.gz\n", "lacks the column image or label; give the columns image, label"),
        ("image,label\n", "has no rows"),
        ("image,label\n,a.nii.gz\n", "line 2 names no image"),
        (
            "image,label,split\na.nii.gz,a.nii.gz,training\n",
            "line 2: split 'training'; use train, val, test",
        ),
        ("image,label\na.nii.gz,a.nii.gz\na.nii.gz,a.nii.gz\n", r"2 cases 'a'; give each a name .*column case"),
        ("image,label\nz.nii.gz,a.nii.gz\n", "case 'z': there is no file '.*z.nii.gz'"),
        ("image,label\na.nii.gz,z.nii.gz\n", "case 'a': there is no file '.*z.nii.gz'"),
        ("image,label,case\na.nii.gz,a.nii.gz,1\na.nii.gz;a.nii.gz,a.nii.gz,2\n", "'2' has 2 channels, '1' 1"),
    ],
)
def test_a_table_that_is_not_right_is_refused_with_its_line(tmp_path, text, match):
    put(tmp_path / "a.nii.gz")
    with pytest.raises(ArgumentError, match=match):
        read_cases(table(tmp_path, text))


def test_what_holds_no_cases_is_refused(tmp_path):
    for given, match in ((tmp_path, "neither imagesTr/ nor images/"), (tmp_path / "no", "no data at")):
        with pytest.raises(ArgumentError, match=match):
            read_cases(given)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    with pytest.raises(ArgumentError, match="holds no case"):
        read_cases(tmp_path)
    with pytest.raises(ArgumentError, match="is a folder; list scans and classes in a CSV"):
        read_cases(tmp_path, task="classification")
    with pytest.raises(ArgumentError, match="task 'detection'; choose from segmentation, classification"):
        read_cases(tmp_path, task="detection")


@pytest.mark.parametrize("labels", [{"a": 1, "b": 1}, {"a": -1}, {"a": 1.5}], ids=str)
def test_two_labels_need_two_values(tmp_path, labels):
    with pytest.raises(ArgumentError, match="give each name a value of its own"):
        read_cases(nnunet(tmp_path, V2), labels=labels)


def test_a_class_without_a_name_is_refused(tmp_path):
    put(tmp_path / "a.png")
    path = table(tmp_path, "image,label,case\na.png,ill,1\na.png,odd,2\n")
    with pytest.raises(ArgumentError, match="the classes odd, which have no label"):
        read_cases(path, task="classification", labels={"ill": 0, "well": 1})


@pytest.mark.parametrize(("value", "match"), [(0.5, "holds fractions, not labels"), (-1, "holds the label -1")])
def test_a_label_file_of_something_else_is_refused(tmp_path, value, match):
    nib.Nifti1Image(np.full((2, 2, 2), value, np.float32), np.eye(4)).to_filename(tmp_path / "a.nii")
    with pytest.raises(VolumeError, match=rf"a\.nii' {match}"):
        read_labels(tmp_path / "a.nii")


def test_a_damaged_film_is_refused_by_name(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(VolumeError, match=r"a\.png"):
        read_labels(tmp_path / "a.png")


# --- Changes ---------------------------------------------------------------------------------------------------


def test_the_hash_of_files_tells_every_change_but_not_where_they_lie(tmp_path):
    hashes = set()
    for folder, change in (("a", {}), ("b", {}), ("c", {"mirrored": True}), ("d", {"mm": 2.0}), ("e", {"label": 2})):
        voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
        (tmp_path / folder).mkdir()
        image = nib.Nifti1Image(voxels[:: -1 if "mirrored" in change else 1], np.eye(4) * change.get("mm", 1.0))
        image.to_filename(tmp_path / folder / "x.nii")
        label = put(tmp_path / folder / "y.nii", change.get("label", 1))
        hashes.add(files_hash([Case("x", "x", (tmp_path / folder / "x.nii",), label)]))
    hashes |= {files_hash([Case("x", "x", (), label)]) for label in (0, 1)}
    assert len(hashes) == 4 + 2


def test_a_file_that_has_changed_is_hashed_again(tmp_path):
    case = Case("x", "x", (put(tmp_path / "x.nii", 1),), 0)
    before = files_hash([case])
    put(tmp_path / "x.nii", 12)
    assert files_hash([case]) != before


# --- Subjects --------------------------------------------------------------------------------------------------


def cases_of(*subjects, split=None, label=0):
    rows = tuple(Case(f"{i}", name, (), label, split) for i, name in enumerate(subjects))
    return Cases("classification", rows, (Label("no", 0), Label("yes", 1)))


def subjects(cases):
    return {case.subject for case in cases}


@pytest.mark.parametrize("seed", range(5))
def test_no_subject_is_trained_and_validated_on(seed):
    split = split_cases(cases_of(*"aabbbccddeeff"), seed=seed, validation=0.3)
    assert not subjects(split.train) & subjects(split.val) and len(subjects(split.val)) == 2
    assert subjects(split.train) | subjects(split.val) == set("abcdef")


def test_fewer_subjects_are_a_part_of_more_and_validation_stays():
    cases = cases_of(*"abcdefghij")
    one, three = (split_cases(cases, subjects=n) for n in (1, 3))
    assert subjects(one.train) < subjects(three.train) and len(three.train) == 3
    assert one.val == three.val == split_cases(cases).val


def test_the_seed_decides_the_split():
    cases = cases_of(*map(str, range(20)))
    assert split_cases(cases, seed=1) == split_cases(cases, seed=1) != split_cases(cases, seed=2)


def of_classes(*labels):
    """A case and subject a label."""
    rows = tuple(Case(f"{i}", f"{i}", (), label) for i, label in enumerate(labels))
    return Cases("classification", rows, tuple(Label(str(k), k) for k in sorted(set(labels))))


@pytest.mark.parametrize("seed", range(5))
def test_as_many_subjects_as_there_are_classes_hold_every_class_and_fewer_are_a_part_of_more(seed):
    cases, before = of_classes(*[0] * 12, *[1] * 5, *[2] * 3), set()
    for count in range(3, 21):
        train = split_cases(cases, seed=seed, validation=0, subjects=count).train
        counts = [sum(case.label == k for case in train) for k in range(3)]
        assert max(counts) - min(counts) <= 1 or counts[2] == 3
        assert before < subjects(train)
        before = subjects(train)


@pytest.mark.parametrize("seed", range(5))
def test_of_every_class_about_the_same_share_is_held_out(seed):
    split = split_cases(of_classes(*[0] * 20, *[1] * 10, *[2] * 2), seed=seed, validation=0.3)
    counts = [sum(case.label == k for case in split.val) for k in range(3)]
    assert sum(counts) == 10 and abs(counts[0] - 6) <= 1 and abs(counts[1] - 3) <= 1 and counts[2] < 2


def test_what_the_data_say_of_their_split_holds():
    rows = [*cases_of(*"abc"), *cases_of(*"de", split="val"), *cases_of(*"fg", split="test")]
    split = split_cases(Cases("classification", tuple(rows), ()))
    assert (subjects(split.train), subjects(split.val), subjects(split.test)) == (set("abc"), set("de"), set("fg"))


def test_of_a_single_subject_nothing_is_held_out():
    assert split_cases(cases_of("a")).val == () == split_cases(cases_of(*"ab"), validation=0).val
    assert len(split_cases(cases_of(*"ab"), validation=0.9).train) == 1


def test_a_case_without_a_label_is_left_out():
    rows = (*cases_of("a"), *cases_of("b", label=None))
    assert split_cases(Cases("classification", rows, ())).train == rows[:1]


@pytest.mark.parametrize(
    ("rows", "settings", "match"),
    [
        (
            (*cases_of("a", split="train"), *cases_of("a", split="test")),
            {},
            "'a' is in the splits train and test",
        ),
        (cases_of(*"abcde").cases, {"subjects": 5}, "4 labelled subjects to train on, 5 wanted"),
        (cases_of(*"ab", label=None).cases, {}, "0 labelled subjects to train on, at least 1 wanted"),
        (cases_of("a").cases, {"validation": 1}, r"validation 1; give a share of the subjects in \[0, 1\)"),
    ],
)
def test_a_split_that_cannot_be_is_refused(rows, settings, match):
    with pytest.raises(ArgumentError, match=match):
        split_cases(Cases("classification", rows, ()), **settings)
