"""Which split and class every picture has: the layouts that people bring, as folders, zips and Parquet, on real files."""

import io
import json
import os
import stat
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sidae_lib import data, own
from sidae_lib.config import SidaeError
from tests.sets import content, write, zipped


@pytest.fixture(autouse=True)
def root(tmp_path, no_sets):
    """A folder for a set."""
    return tmp_path / "set"


def pictures(*names):
    """Grey 1, 2, ... in order."""
    return {name: i + 1 for i, name in enumerate(names)}


def seen(place):
    """split -> grey -> class, and the rest of what was loaded."""
    images = data._decode(data._find(str(place)), 4, 1, "antialias")  # as `load`, without its cache
    out = {}
    for split, part in images.splits.items():
        greys = part.images[:, 0, 0, 0].tolist()
        out[split] = dict(zip(greys, [None] * len(greys) if part.labels is None else [images.classes[c] for c in part.labels]))
    return out, images


def refused(place):
    with pytest.raises(SidaeError) as e:
        data._decode(data._find(str(place)), 4, 1, "antialias")
    assert "\n" not in str(e.value)
    return str(e.value)


CAT = {"train": {1: "cat", 2: "dog"}, "test": {3: "cat"}}
TWO = {"train": {1: "cat", 2: "dog"}}
PAIR = pictures("1.png", "2.png")
TRIO = pictures("train/1.png", "train/2.png", "test/3.png")
TABLE = "file,label\n1.png,cat\n2.png,dog\n"
CLEAR = pictures("cat/1.png", "dog/2.png")


def case(name, *values):
    """files, what splits they are, and sentences that are said of them."""
    return pytest.param(*values[:2], values[2:], id=name)


def left(n, why, *names):
    return f"Left out: {n} file{'s' * (n > 1)}, {why} ({', '.join(names)})."


NAMES = "The classes are those that {} names.".format
LAYOUTS = [
    # splits
    case("Training and Testing", pictures("Training/cat/a.png", "Training/dog/b.png", "Testing/cat/c.png"), CAT),
    case("TRAIN and test", pictures("TRAIN/cat/a.png", "TRAIN/dog/b.png", "test/cat/c.png"), CAT),
    case("Train and valid", pictures("Train/cat/a.png", "Train/dog/b.png", "valid/cat/c.png"), CAT,
         "There is no test split, so the validation split stands for it."),
    case("eval", pictures("train/cat/a.png", "train/dog/b.png", "eval/cat/c.png"), CAT,
         "There is no test split, so the validation split stands for it."),
    case("val beside test", pictures("train/cat/a.png", "train/dog/b.png", "test/cat/c.png", "Validation/dog/d.png"), CAT,
         "The validation split stays out of training, since there is a test split."),
    case("names of two words", pictures("train_images/cat/a.png", "train_images/dog/b.png", "Test Set 1/cat/c.png"), CAT),
    case("names that share a word", pictures("cars_train/cat/a.png", "cars_train/dog/b.png", "cars_test/cat/c.png"), CAT),
    case("a split within itself",
         pictures("seg_train/seg_train/cat/a.png", "seg_train/seg_train/dog/b.png", "seg_test/seg_test/cat/c.png",
                  "seg_pred/seg_pred/d.png"), CAT, left(1, "beside the splits", "seg_pred/seg_pred/d.png")),
    case("a test split without classes", pictures("train/cat/a.png", "train/dog/b.png", "test/c.png"), TWO,
         left(1, "in test, which is taken for a split and has no class folders", "test/c.png")),
    case("a test split in one folder", pictures("train/cat/a.png", "train/dog/b.png", "test/test/c.png", "val/images/d.png"),
         TWO, left(1, "in test, which is taken for a split and has no class folders", "test/test/c.png"),
         left(1, "in val, which is taken for a split and has no class folders", "val/images/d.png")),
    case("a class called train", pictures("train/a.png", "bus/b.png", "car/c.png"),
         {"train": {1: "train", 2: "bus", 3: "car"}}),
    case("a class called train, deeper", pictures("train/images/a.png", "bus/images/b.png", "car/images/c.png"),
         {"train": {1: "train", 2: "bus", 3: "car"}}),
    case("a class called train in splits", pictures("train/train/a.png", "train/bus/b.png", "test/train/c.png"),
         {"train": {1: "train", 2: "bus"}, "test": {3: "train"}}),
    case("two classes with train in their names", pictures("steam train/a.png", "train_2/b.png"),
         {"train": {1: "steam train", 2: "train_2"}}),
    case("classes with splits in their names", pictures("train station/a.png", "test tube/b.png", "bus/c.png"),
         {"train": {1: "train station", 2: "test tube", 3: "bus"}}),
    case("classes beside test", pictures("cat/a.png", "dog/b.png", "test/cat/c.png"), CAT),
    case("classes beside a test split without classes", pictures("cat/a.png", "dog/b.png", "test/c.png"), TWO,
         left(1, "in test, which is taken for a split and has no class folders", "test/c.png")),
    case("a test split alone", pictures("Test/cat/a.png", "Test/dog/b.png"), {"test": {1: "cat", 2: "dog"}}),
    case("unlabeled alone", pictures("unlabeled/a/1.png", "unlabeled/2.png"), {"unlabeled": {1: None, 2: None}}),
    case("classes beside unlabeled", pictures("cat/a.png", "dog/b.png", "Unlabelled/c.png"), TWO | {"unlabeled": {3: None}}),
    case("one class", pictures("train/cat/a.png", "test/cat/b.png") | {"sizes.csv": "file,bytes\na.png,1\nb.png,2\n"},
         {"train": {1: "cat"}, "test": {2: "cat"}}),
    # depth
    case("a wrapper", pictures("archive/Training/cat/a.png", "archive/Training/dog/b.png", "archive/Testing/cat/c.png"), CAT),
    case("a wrapper and a preview", pictures("archive/set/cat/a.png", "archive/set/dog/b.png", "preview.png"), TWO,
         left(1, "beside the class folders", "preview.png")),
    case("folders of images", pictures("train/cat/images/1.png", "train/dog/images/2.png", "test/cat/images/1.png"), CAT),
    case("class first", pictures("cat/train/1.png", "dog/train/1.png", "cat/test/1.png", "dog/other/1.png"), CAT,
         left(1, "beside the splits", "dog/other/1.png")),
    # what is no image
    case("of the system",
         CLEAR | pictures("__MACOSX/cat/._1.png", ".hidden/3.png", "@eaDir/4.png")
         | {".DS_Store": "x", "Thumbs.db": "x", "Icon\r": "", "README.md": "x", "cow/": "", "ewe/": ""},
         TWO, "Class folders without an image are left out: cow, ewe.", left(1, ".md: not an image", "README.md"),
         left(6, "files of the system", ".DS_Store", ".hidden/3.png", "@eaDir/4.png", "Icon\ufffd", "Thumbs.db", "...")),
    case("raw photographs", CLEAR | {"cat/1.NEF": "x", "dog/2.xmp": "x"}, TWO,
         left(1, ".nef: develop raw photographs to JPEG or TIFF", "cat/1.NEF"), left(1, ".xmp: not an image", "dog/2.xmp")),
    # names of classes
    case("case", pictures("train/Cat/1.png", "train/dog/2.png", "test/cat/3.png"),
         {"train": {1: "Cat", 2: "dog"}, "test": {3: "Cat"}}),
    case("composed and decomposed", pictures("train/Caf\u00e9/1.png", "train/dog/2.png", "test/Cafe\u0301/3.png"),
         {"train": {1: "Caf\u00e9", 2: "dog"}, "test": {3: "Caf\u00e9"}}),
    # tables
    case("a table", PAIR | {"labels.csv": TABLE}, TWO, NAMES("labels.csv")),
    case("a table of a folder", pictures("images/1.png", "images/2.png") | {"labels.csv": TABLE}, TWO, NAMES("labels.csv")),
    case("shuffled lines", PAIR | {"labels.csv": "file,label\n2.png,dog\n1.png,cat\n"}, TWO, NAMES("labels.csv")),
    case("ids", pictures("a/1.png", "a/2.png") | {"train.csv": "id,breed\n1,cat\n2,dog\n"}, TWO, NAMES("train.csv")),
    case("ids with dots", pictures("a/1.x.png", "a/2.x.png") | {"train.csv": "id,breed\n1.x,cat\n2.x,dog\n"}, TWO),
    case("paths", TRIO | {"labels.csv": "label,where\ncat,./train/1.png\ndog,train/2.png\ncat,test/3.png\n"}, CAT),
    case("paths without suffix", TRIO | {"labels.csv": "label,where\ncat,train/1\ndog,train/2\ncat,test/3\n"}, CAT),
    case("paths of another machine",
         TRIO | {"labels.csv": "file,label\nC:\\me\\train\\1.png,cat\nC:\\me\\train\\2.png,dog\nC:\\me\\test\\3.png,cat"}, CAT),
    case("names in another case",
         pictures("IMG_1.PNG", "IMG_2.png") | {"labels.csv": "file,label\nimg_1.png,cat\nImg_2.PNG,dog\n"}, TWO),
    case("other columns", PAIR | {"a.csv": "photo,kind\n1.png,cat\n2.png,dog\n"}, TWO, NAMES("the column kind of a.csv")),
    case("more columns", PAIR | {"meta.csv": "photo,taken,Species\n1.png,2020,cat\n2.png,2021,dog\n"}, TWO, NAMES("meta.csv")),
    case("tabs", PAIR | {"labels.tsv": TABLE.replace(",", "\t")}, TWO, NAMES("labels.tsv")),
    case("semicolons as Excel saves", PAIR | {"labels.csv": "\ufefffile;label\r\n1.png;cat\r\n2.png;dog\r\n"}, TWO),
    case("Excel's letters", PAIR | {"labels.csv": "file;label\r\n1.png;K\u00e4fer\r\n2.png;dog\r\n".encode("cp1252")},
         {"train": {1: "K\u00e4fer", 2: "dog"}}),
    case("Excel's Unicode text", PAIR | {"labels.csv": TABLE.replace(",", "\t").encode("utf-16")}, TWO),
    case("decomposed labels", TRIO | {"labels.csv": "file,label\n1,Cafe\u0301\n2,dog\n3,Caf\u00e9\n"},
         {"train": {1: "Caf\u00e9", 2: "dog"}, "test": {3: "Caf\u00e9"}}),
    case("no line of names", PAIR | {"labels.csv": TABLE.partition("\n")[2]}, TWO, NAMES("labels.csv")),
    case("no line of names, paths of another machine", PAIR | {"labels.csv": "/a/b/1.png,cat\n/a/b/2.png,dog\n"}, TWO),
    case("no line of names, label first", PAIR | {"labels.csv": "cat,1.png\ndog,2.png\n"}, TWO),
    case("separators at the end", PAIR | {"labels.csv": "file,label\n1.png,cat,\n2.png,dog,\n"}, TWO),
    case("a column of splits",
         pictures("1.png", "2.png", "3.png", "4.png")
         | {"labels.csv": "file,label,split\n1.png,cat,Train\n2.png,dog,train\n3.png,cat,TEST\n4.png,,unlabeled\n"},
         CAT | {"unlabeled": {4: None}}),
    case("columns of 0 and 1",
         pictures("1.png", "2.png", "3.png") | {"truth.csv": "image,cat,dog\n1,1.0,0.0\n2,0.0,1.0\n3,0,0\n"}, TWO,
         left(1, "without a label", "3.png")),
    case("columns of 0 and 1 among others", PAIR | {"truth.csv": "image,age,cat,dog\n1,31,1,0\n2,,0,1\n"}, TWO),
    case("labels and images that are missing",
         pictures("1.png", "2.png", "3.png", "4.png", "5.png") | {"labels.csv": TABLE + '3.png,\n4.png,"  "\n9.png,cat\n'}, TWO,
         "1 line of labels.csv names no image (9.png).", left(3, "without a label", "3.png", "4.png", "5.png")),
    case("a class called None",
         pictures("1.png", "2.png", "3.png") | {"labels.csv": "file,label\n1.png,None\n2.png,dog\n3.png,NA\n"},
         {"train": {1: "None", 2: "dog"}}),
    case("whole numbers with a gap",
         pictures("1.png", "2.png", "3.png") | {"labels.csv": "file,label\n1.png,10.0\n2.png,2.0\n3.png,\n"},
         {"train": {1: "10", 2: "2"}}),
    case("numbers that are ids and labels",
         {f"{i}.png": i for i in range(1, 9)} | {"labels.csv": "label,id\n" + "\n".join(f"{i % 2 + 1},{i}" for i in range(9))},
         {"train": {i: str(i % 2 + 1) for i in range(1, 9)}}),
    case("a table of the whole set", PAIR | {"labels.csv": TABLE + "".join(f"{i}.png,cow\n" for i in range(3, 9))}, TWO,
         "6 lines of labels.csv name no image (3.png, 4.png, 5.png, 6.png, 7.png, ...)."),
    case("a table in each split",
         pictures("train/1.png", "train/2.png", "test/1.png")
         | {"train/labels.csv": TABLE, "test/labels.csv": "file,label\n1.png,cat\n"},
         CAT, "The classes are those that test/labels.csv, train/labels.csv name."),
    case("a table for each split",
         pictures("train/1.png", "train/2.png", "test/1.png") | {"train.csv": TABLE, "test.csv": "file,label\n1.png,cat\n"},
         CAT),
    case("a table for each split of one folder",
         pictures("img/1.png", "img/2.png", "img/3.png") | {"train.csv": TABLE, "test.csv": "file,label\n3.png,cat\n"}, CAT),
    case("a table for each of two groups",
         pictures("x/old/1.png", "x/new/2.png", "y/old/1.png") | {"x/a.csv": TABLE, "y/a.csv": TABLE.replace("cat", "cow")},
         {"train": {1: "cat", 2: "dog", 3: "cow"}}),
    case("a table and one folder", pictures("mine/1.png", "mine/2.png") | {"a.csv": "photo,kind\n1,cat\n2,dog\n"}, TWO),
    case("a Kaggle competition",
         TRIO | {"train.csv": "id,label\n1,cat\n2,dog\n", "test.csv": "id,width\n3,9\n",
                 "sample_submission.csv": "id,label\n3,cat\n"},
         TWO, NAMES("train.csv"), left(1, "without a label", "test/3.png"),
         left(2, "not used as labels", "sample_submission.csv", "test.csv")),
    case("a Kaggle competition, same names",
         pictures("train_images/1.png", "train_images/2.png", "test_images/1.png") | {"train.csv": TABLE}, TWO,
         left(1, "without a label", "test_images/1.png")),
    case("a table beside two groups",
         pictures("pets/cat/1.png", "pets/dog/2.png", "wild/cat/3.png") | {"labels.csv": "file,label\n1,cat\n2,dog\n3,cat\n"},
         {"train": {1: "cat", 2: "dog", 3: "cat"}}, NAMES("labels.csv")),
    case("class folders and another table",
         CLEAR | {"prices.csv": "a,b\n1,2\n", "sizes.csv": "file,bytes\n1.png,9\n2.png,9\n", "broken.csv": b"\xff\xfe\x00",
                  "empty.csv": ""},
         TWO, left(4, "not used as labels", "broken.csv", "empty.csv", "prices.csv", "sizes.csv")),
    case("class folders and a table that agrees", CLEAR | {"labels.csv": "file,label\n1.png,Felis\n2.png,Canis\n"}, TWO),
]


@pytest.mark.parametrize("files, splits, sentences", LAYOUTS)
def test_layouts(root, tmp_path, files, splits, sentences):
    """As a folder, and as a zip in a wrapper, with backslashes as some Windows programs write them."""
    found, images = seen(write(root, files))
    assert found == splits and {*sentences} <= {*images.notes}
    again, other = seen(zipped(tmp_path / "set.zip", files, lambda n: f"./my set/{n}".replace("/", "\\")))
    assert again == splits and other.fingerprint == images.fingerprint and other.classes == images.classes
    assert sorted(other.left) == sorted(images.left)


TWICE = "can be read in two ways: "
LABELS = "or name the class of each image in a labels.csv (columns file and label)."
REFUSED = [
    case("two groups", pictures("pets/cat/1.png", "pets/dog/2.png", "wild/lion/3.png"),
         TWICE + "2 outer folders are the classes (pets, wild), or 3 inner ones (cat, dog, lion). Keep one level of folders, "
         + LABELS),
    case("patients", pictures("patient 1/ill/1.png", "patient 1/well/2.png", "patient 2/well/3.png"),
         TWICE + "2 outer folders are the classes (patient 1, patient 2), or 2 inner ones (ill, well)."),
    case("groups of splits", pictures("a/train/cat/1.png", "a/train/dog/2.png", "b/train/cat/3.png"),
         TWICE + "2 outer folders are the classes (a, b), or 2 inner ones (cat, dog)."),
    case("two training splits", pictures("train/cat/1.png", "train/dog/2.png", "Training/cat/3.png", "Training/dog/4.png"),
         "holds Training, train, which all are names of the train split; keep one, or rename what is a class."),
    case("loose images", PAIR, "set has no class folders; sort its images into set/<class>/, " + LABELS),
    case("one folder", pictures("photos/1.png", "photos/2.png"),
         "set has only one class folder (photos); sort its images into "),
    case("one folder beside images", pictures("1.png", "2.png", "thumbs/3.png"), "set has only one class folder (thumbs); "),
    case("splits without classes", pictures("train/cat.0.png", "train/dog.0.png", "test1/1.png"),
         "set/train has no class folders; sort its images into train/<class>/, " + LABELS),
    case("images and masks", pictures("images/1.png", "Masks/1.png"),
         "holds Masks beside images, which is no class; give the images alone, sorted into class folders, " + LABELS),
    case("a class of the test split alone", pictures("train/cat/1.png", "train/dog/2.png", "test/cow/3.png"),
         "cow is a class that"),
    case("a table that contradicts",
         pictures("cat/1.png", "dog/2.png", "dog/3.png") | {"labels.csv": "file,label\n1,x\n2,x\n3,y\n"},
         TWICE + "the folders are the classes (cat, dog), or labels.csv names them (x, y). Remove the one that is wrong."),
    case("a table of another name that contradicts",
         CLEAR | pictures("dog/3.png") | {"meta.csv": "f,species\n1,x\n2,x\n3,y\n"}, "or meta.csv names them (x, y)."),
    case("two tables that contradict", PAIR | {"labels.csv": TABLE, "old.csv": TABLE.replace("cat", "dog")},
         "1.png is cat in train by line 2 of labels.csv, and dog in train by line 2 of old.csv; keep one."),
    case("a line for each box", PAIR | {"labels.csv": TABLE + "1.png,dog\n"},
         "1.png is cat in train by line 2 of labels.csv, and dog in train by line 4 of labels.csv; keep one."),
    case("one name for two images", pictures("a/1.png", "b/1.png", "b/2.png") | {"labels.csv": TABLE},
         "Line 2 of labels.csv names 1.png, which can be a/1.png, b/1.png; write its whole path."),
    case("one name for two images, no line of names", PAIR | {"1.jpg": 3, "labels.csv": "2,dog\n1,cat\n"},
         "Line 2 of labels.csv names 1, which can be 1.jpg, 1.png; "),
    case("a table of other images", PAIR | {"labels.csv": "file,label\nx,cat\ny,dog\n"},
         "(columns file and label). Besides, few of its images are named in labels.csv, 1.png for one is not."),
    case("a table of test images, which train does not hold",
         pictures("train/1.png", "train/2.png") | {"labels.csv": "file,label\ntest/1.png,cat\ntest/2.png,dog\n"},
         "few of its images are named in labels.csv, train/1.png for one is not."),
    case("no column of labels", PAIR | {"meta.csv": "file,width,height\n1.png,9,8\n2.png,7,6\n"},
         "Besides, meta.csv has no column called label."),
    case("two columns of labels", PAIR | {"labels.csv": "file,class,species\n1.png,a,b\n2.png,c,d\n"},
         "labels.csv has several columns of labels (class, species); keep one."),
    case("several classes an image", PAIR | {"labels.csv": "file,cat,dog\n1,1,1\n2,0,1\n"},
         "labels.csv has lines with several 1s; an image can have one class."),
    case("no labels at all", PAIR | {"labels.csv": "file,label\n1.png,\n2.png,\n"},
         "No image has a label in labels.csv; fill its column of labels."),
    case("an odd split", PAIR | {"labels.csv": "file,label,split\n1.png,cat,train\n2.png,dog,holdout\n"},
         "labels.csv has holdout in its column split, which is no split; write train, test, val or unlabeled."),
    case("a split that is missing", PAIR | {"labels.csv": "file,label,split\n1.png,cat,train\n2.png,dog,\n"},
         "labels.csv has nothing in its column split, which is no split; "),
    case("splits by numbers", PAIR | {"labels.csv": "file,label,split\n1.png,cat,0\n2.png,dog,1\n"},
         "labels.csv has 0 in its column split, which is no split; "),
    case("a table that is none", PAIR | {"labels.csv": 'file,label\n1.png,cat\n2.png,"dog\n'},
         "labels.csv could not be read ("),
    case("nothing", {"empty/": ""}, "set has no usable split: it holds no files. It needs images in train/<class>/ and "
         "test/<class>/, in <class>/, or in unlabeled/."),
    case("only an archive", {"archive.zip": b"PK"}, "it holds 1 file (.zip: unpack it)."),
    case("only documents", {"a.txt": "x", "b.txt": "x"}, "it holds 2 files (.txt: not an image)."),
]


@pytest.mark.parametrize("files, sentence, _", REFUSED)
def test_what_is_not_clear_is_refused(root, files, sentence, _):
    assert sentence in refused(write(root, files))


def test_numbers_stand_in_their_order(root):
    _, images = seen(write(root, {f"{i}.png": i for i in range(12)} | {
        "labels.csv": "file,label\n" + "".join(f"{i}.png,{i}\n" for i in range(12))}))  # fmt: skip
    assert images.classes == tuple(map(str, range(12))) and images.split("train").labels.tolist() == [*range(12)]


def test_a_name_counts_once_however_it_is_written(tmp_path):
    """Case, composed letters and the order of a table's lines change nothing of what a set is."""
    ways = [pictures("train/caf\u00e9/a.png", "train/dog/b.png", "test/dog/c.png", "train/dog/d.png"),
            pictures("Train/CAFE\u0301/A.png", "Train/Dog/B.png", "TEST/DOG/c.png", "Train/Dog/D.png"),
            pictures("1.png", "2.png", "3.png", "4.png")
            | {"x.csv": "file,label,split\n4,dog,train\n3,dog,test\n2,dog,train\n1,Caf\u00e9,train\n"}]
    assert len({seen(write(tmp_path / str(i), files))[1].fingerprint for i, files in enumerate(ways)}) == 1


def test_nothing_is_written_into_the_folder(root):
    write(root, {f"{c}/{i}.png": 9 * i for i in range(5) for c in ("cat", "dog")} | {"more.zip": "x", "list.csv": "x"})
    before = [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in (root, *sorted(root.rglob("*")))]
    name, notes = own.prepare(str(root), 4)
    assert "There is no test split: 2 of 10 images, a fifth of each class, became one." in notes
    assert data.load(name, size=4).splits.keys() == {"train", "test"} == data.load(name, size=8).splits.keys()
    assert before == [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in (root, *sorted(root.rglob("*")))]


def test_files_of_the_system_change_nothing(root):
    """A file browser writes them as it likes; the set is not read again for them."""
    stamps = data._find(str(write(root, CLEAR))).stamps
    assert data._find(str(write(root, {".DS_Store": "x", "cat/Thumbs.db": "y"}))).stamps == stamps


# --- zips -----------------------------------------------------------------------------------------------------------


def test_an_archive_of_arrays_or_parquet(tmp_path):
    out = io.BytesIO()
    np.savez(out, train_images=np.full((2, 4, 4), 7, np.uint8), train_labels=[0, 1])
    assert seen(zipped(tmp_path / "a.zip", {"x/set.npz": out.getvalue(), "x/preview.png": 3}))[0] == {"train": {7: "1"}}
    assert seen(zipped(tmp_path / "b.zip", {"train-0.parquet": rows([1, 2], ["cat", "dog"])}))[0] == TWO


@pytest.mark.parametrize("name", ["../out.png", "a/../../out.png", "/out.png", "\\out.png", "C:\\out.png", "a\\..\\out.png"])
def test_no_member_leads_out(tmp_path, name):
    path = zipped(tmp_path / "set.zip", CLEAR | {name: 3})
    assert f"set.zip has a member that points outside ({name}); take it only from who made it." in refused(path)
    assert {p.name for p in tmp_path.iterdir()} <= {"set.zip", "data"}


def test_bombs(tmp_path):
    """One large file, and many that are small, as their headers say it."""
    def claiming(path, files, size):
        zipped(path, files)
        raw = bytearray(path.read_bytes())
        at = 0
        while (at := raw.find(b"PK\x01\x02", at)) >= 0:  # the size in each line of the table of contents
            raw[at + 24:at + 28] = size.to_bytes(4, "little")
            at += 4
        path.write_bytes(raw)
        return path

    one = refused(claiming(tmp_path / "one.zip", {"cat/1.png": 1}, 3 * 10**9))
    assert "holds cat/1.png, which unpacks to over a hundred times its size, 3,000,000,000 bytes" in one
    many = refused(claiming(tmp_path / "many.zip", {f"cat/{i}.png": 1 for i in range(9)}, 10**9))
    assert "many.zip unpacks to over a hundred times its size, 9,000,000,000 bytes; take it only from who made it." in many


def test_archives_that_cannot_be_read(tmp_path):
    path = zipped(tmp_path / "set.zip", CLEAR)
    whole = path.read_bytes()
    for cut in (b"", whole[:50], whole[:-30]):
        path.write_bytes(cut)
        assert "set.zip could not be read (" in (why := refused(path)) and why.endswith("it must be a whole zip file.")
    contents = whole.index(b"PK\x01\x02")
    path.write_bytes(whole[:contents + 8] + b"\x01" + whole[contents + 9:])
    assert "set.zip is locked with a password; unpack it and give the folder." in refused(path)
    path.write_bytes(whole[:contents + 10] + b"\x09" + whole[contents + 11:])
    assert "set.zip is packed in a way Python cannot read; unpack it and give the folder." in refused(path)


def test_names_and_links_within_archives(tmp_path):
    """macOS writes UTF-8 without saying so, and links; of a name that was written twice the last counts."""
    path = tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as z:
        link = zipfile.ZipInfo("dog/link.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        z.writestr(link, "2.png")
        for name, what in (("Cafe\u0301/1.png", 1), ("dog/2.png", 9)):
            z.writestr(name, content(what))
        with pytest.warns(UserWarning, match="Duplicate name"):
            z.writestr("dog/2.png", content(2))
    raw = path.read_bytes()
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = raw.index("Cafe\u0301".encode(), raw.index(start))
        at = raw.rindex(start, 0, at) + flags
        raw = raw[:at] + b"\0\0" + raw[at + 2:]
    path.write_bytes(raw)
    found, images = seen(path)
    assert found == {"train": {1: "Caf\u00e9", 2: "dog"}}
    assert left(1, "links that lead nowhere or out of the folder", "dog/link.png") in images.notes


def test_other_archives_must_be_unpacked(root, tmp_path):
    with tarfile.open(path := tmp_path / "set.tar.gz", "w:gz") as t:
        t.add(write(root, CLEAR), "set")
    assert "unpack other archives" in refused(path)


def test_names_that_cannot_be_printed(root):
    """Written by a machine of other letters, or by mistake."""
    write(root, {"cat/1.png": 1, "cat/2.png": 1, "a\nb/1.png": 2, "a\nb/2.png": 2})
    os.rename(root / "cat", os.fsencode(root) + b"/K\xe4fer")
    found, images = seen(root)
    assert found == {"train": {1: "K\ufffdfer", 2: "a\ufffdb"}} and "".join((*images.classes, *images.notes)).encode()
    assert own.prepare(str(root), 4)


# --- links, and what may not be read --------------------------------------------------------------------------------


def test_links(root, tmp_path):
    write(tmp_path / "elsewhere", pictures("cat/8.png", "9.png"))
    write(root, pictures("train/cat/1.png", "train/dog/2.png", "kept/3.png") | {"test/": "", "ring/a/": "", "ring/b/": ""})
    for link, target in {"train/cow": tmp_path / "elsewhere" / "cat", "train/dog/9.png": tmp_path / "elsewhere" / "9.png",
                         "train/dog/lost.png": "nowhere.png", "train/dog/self.png": "self.png", "test/cat": "../kept",
                         "train/cat/circle": "..", "ring/a/to": "../b", "ring/b/to": "../a"}.items():  # fmt: skip
        (root / link).symlink_to(target)
    (tmp_path / "link").symlink_to(root)
    for place in (root, tmp_path / "link"):
        found, images = seen(place)
        assert found == {"train": {1: "cat", 2: "dog"}, "test": {3: "cat"}}
        assert left(4, "links that lead nowhere or out of the folder", "train/cow", "train/dog/9.png", "train/dog/lost.png",
                    "train/dog/self.png") in images.notes  # fmt: skip


@pytest.fixture
def nobody(root, monkeypatch):
    """Root may read everything, so the test runs as another account. Gives a folder in which that may write."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777)
        real, effective, saved = os.getresuid()
        os.setresuid(*(65534, 65534, 0) if effective == 0 else (-1, -1, -1))
        yield Path(place)
        os.setresuid(real, effective, saved)


def test_what_may_not_be_read_is_left_out(nobody):
    root = write(nobody / "set", CLEAR | pictures("cat/3.png", "cow/4.png"))
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "3.png").chmod(0)
    (root / "cow").chmod(0)
    found, images = seen(root)
    assert found == TWO and left(1, "not plain files", "cat/pipe.png") in images.notes
    assert left(2, "which this account may not read", "cat/3.png", "cow") in images.notes
    root.chmod(0)
    assert refused(root).endswith("check that this account may read it.")
    root.chmod(0o777)
    (root / "cow").chmod(0o777)


# --- Parquet --------------------------------------------------------------------------------------------------------


def rows(images, labels=None, names=None, column="label", struct=True, group=100, **more):
    """As Hugging Face writes them: {bytes, path}, and the names of the classes in the schema."""
    cells = [content(v) if isinstance(v, int) else v for v in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary()
    columns = {"image": pa.array([{"bytes": c, "path": None} if struct else c for c in cells], kind)}
    columns |= {} if labels is None else {column: labels}
    about = {"image": {"_type": "Image"}} | ({column: {"names": names, "_type": "ClassLabel"}} if names else {})
    table = pa.table(columns | more).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": about}})})
    out = io.BytesIO()
    parquet.write_table(table, out, row_group_size=group)
    return out.getvalue()


DOGS = ["dog", "cat"]  # not in the order of the alphabet
PARQUET = [
    case("a repository",
         {f"data/{name}.parquet": rows([i + 1], [int(i != 1)], DOGS) for i, name in enumerate(
             ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "validation-00000-of-00001"))}
         | {"README.md": "x", "logo.png": 9},
         CAT, "The validation split stays out of training, since there is a test split.",
         left(2, "beside the tables or arrays", "README.md", "logo.png")),
    case("validation", {"train-0.parquet": rows([1, 2], [1, 0], DOGS), "validation-0.parquet": rows([3], [1], DOGS)}, CAT,
         "There is no test split, so the validation split stands for it."),
    case("folders",
         {"default/train/0000.parquet": rows([1, 2], [1, 0], DOGS), "default/test/0000.parquet": rows([3], [1], DOGS)}, CAT),
    case("names of each file",
         {"train-0.parquet": rows([1, 2], [1, 0], DOGS), "test-0.parquet": rows([3], [0], ["cat", "dog"])}, CAT),
    case("labels of the test split unknown",
         {"train-0.parquet": rows([1, 2], [1, 0], DOGS), "test-0.parquet": rows([3], [-1], DOGS)}, TWO,
         left(1, "without a label", "test-0.parquet/0-0")),
    case("no label known", {"train-0.parquet": rows([1], [-1], DOGS)}, {"unlabeled": {1: None}}),
    case("no labels", {"train-0.parquet": rows([1])}, {"unlabeled": {1: None}}),
    case("words", {"train-0.parquet": rows([1, 2], ["cat", "dog"], struct=False)}, TWO),
    case("words of another column", {"train-0.parquet": rows([1, 2], ["cat", "dog"], column="kind")}, TWO,
         "The classes of train-0.parquet are those of its column kind."),
    case("categories", {"train-0.parquet": rows([1, 2], pa.array(["cat", "dog"]).dictionary_encode(), id=[1, 2])}, TWO),
    case("yes and no", {"train-0.parquet": rows([1, 2], [True, False])}, {"train": {1: "True", 2: "False"}}),
    case("numbers with a gap", {"train-0.parquet": rows([1, 2, 3], [10.0, 2.0, None])}, {"train": {1: "10", 2: "2"}},
         left(1, "without a label", "train-0.parquet/0-2")),
    case("damaged", {"train-0.parquet": rows([1, b"words", 2, content(9)[:40], None], [1, 0, 0, 0, 1], DOGS, group=2)}, TWO,
         left(3, "damaged or unreadable", "train-0.parquet/0-1", "train-0.parquet/1-1", "train-0.parquet/2-0")),
    case("many groups", {"train-0.parquet": rows(list(range(200)), [i % 2 for i in range(200)], DOGS, group=1)},
         {"train": {i: DOGS[i % 2] for i in range(200)}}),
]


@pytest.mark.parametrize("files, splits, sentences", PARQUET)
def test_parquet(root, files, splits, sentences):
    found, images = seen(write(root, files))
    assert found == splits and {*sentences} <= {*images.notes}


def test_a_parquet_file(root):
    path = write(root, {"train.parquet": rows([1, 2, 3], [10, 2, 2]), "test.parquet": b"another"}) / "train.parquet"
    found, images = seen(path)
    assert found == {"train": {1: "10", 2: "2", 3: "2"}} and images.classes == ("2", "10")
    path.write_bytes(rows([1, 2], [1, 0], DOGS))
    assert seen(path)[1].classes == ("dog", "cat")


@pytest.mark.parametrize("content, sentence", [
    (rows([1, 2], [0, 1], DOGS)[:-9], "could not be read (ArrowInvalid: "),
    (b"", "it must be a whole Parquet file."),
    (rows([1], [0], column="fine_label", coarse_label=[0]), "set: a.parquet needs one column of images, with the bytes of "
     "their files, and one of labels, called label; it has the columns image, fine_label, coarse_label."),
    (rows([], pa.array([], pa.int64())), "set has no usable split: a.parquet has no lines."),
    (rows([b"words"], [0]), "set has no usable split: no image of a.parquet can be read.")])  # fmt: skip
def test_parquet_that_cannot_be_read(root, content, sentence):
    assert sentence in refused(write(root, {"a.parquet": content}))


def test_parquet_without_pyarrow(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refused(write(root, {"a.parquet": b""})).endswith(
        "set holds Parquet, and pyarrow, which reads it, is not installed: pip install pyarrow.")


def test_letters_of_two_cases_are_two_classes(root):
    names = pictures("A/a.png", "A/b.png", "a/c.png", "a/d.png", "b/e.png", "b/f.png")
    images = data.load(own.prepare(str(write(root, names)))[0])
    assert images.classes == ("A", "a", "b") and images.split("train").labels.tolist() == [0, 1, 2]


def test_one_image_a_class_makes_no_test_split(root):
    images = data.load(own.prepare(str(write(root, pictures("cat/a.png", "dog/b.png"))))[0])
    assert [*images.splits] == ["train"] and "There is no test split, and no class has two images to make one." in images.notes


# --- what newcomers brought -----------------------------------------------------------------------------------------


def labelled(columns, n=10):
    """Pictures 0.png, 1.png ... of classes a and b in turn, and a table of them in another order."""
    order = [(7 * i) % n for i in range(n)]
    lines = [",".join(columns), *(",".join(cell(k, i) for cell in columns.values()) for k, i in enumerate(order))]
    return {f"{i}.png": i + 1 for i in range(n)} | {"labels.csv": "\n".join(lines)}


@pytest.mark.parametrize("columns", [
    {"": lambda k, i: f"{k}", "file": lambda k, i: f"{i}.png", "label": lambda k, i: "ab"[i % 2]},  # as pandas writes an index
    {"rank": lambda k, i: f"{k}", "file": lambda k, i: f"{i}.png", "label": lambda k, i: "ab"[i % 2]},
    {"rank": lambda k, i: f"{k}", "image": lambda k, i: f"{i}", "label": lambda k, i: "ab"[i % 2]},
    {"id": lambda k, i: f"{k}", "filename": lambda k, i: f"{i}", "label": lambda k, i: "ab"[i % 2]},
    {"id": lambda k, i: f"{k}", "photo": lambda k, i: f"{i}.PNG", "label": lambda k, i: "ab"[i % 2]}])  # fmt: skip
def test_numbers_of_lines_are_no_names_of_pictures(root, columns):
    out, _ = seen(write(root, labelled(columns)))
    assert out == {"train": {i + 1: "ab"[i % 2] for i in range(10)}}


def test_labels_are_no_names_of_pictures(root):
    files = labelled({"file": lambda k, i: f"img_{i}.png", "label": lambda k, i: f"{i % 2}"})
    with pytest.raises(SidaeError, match=r"few of its images are named in labels.csv, 0.png for one is not\."):
        data.load(str(write(root, files)))


@pytest.mark.parametrize("files, words", [
    (pictures("images/train/a.png", "masks/train/a.png"), "holds masks beside images, which is no class"),
    (pictures("train/a.png", "train_masks/a.png"), "holds train_masks beside images, which is no class"),
    (pictures("p0/a.png", "p1/b.png", "p2/c.png") | {"labels.csv": "patient,diagnosis\np0,ill\np1,ill\np2,well\n"},
     r"two ways: the folders are the classes \(p0, p1, p2\), or labels.csv names them \(ill, well\)"),
    (pictures("control/a.png", "test/b.png"),
     "only one class folder .control..*test is taken for a split; rename it if it is a class"),
    (pictures("cat/a.png") | {"dog/b.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"},
     r"only one class folder .*Left out: 1 file, \.heic: install pillow-heif \(dog/b.heic\)")])  # fmt: skip
def test_what_newcomers_brought_is_refused_with_the_reason(root, files, words):
    with pytest.raises(SidaeError, match=words):
        data.load(str(write(root, files)))


def test_a_mask_beside_its_image_is_none(root):
    names = ["good/1.png", "good/1_mask.png", "bad/1.png", "bad/1_mask_1.png", "bad/with_mask.png"]
    out, images = seen(write(root, pictures(*names)))
    assert out == {"train": {1: "good", 3: "bad", 5: "bad"}} and images.left == (("", "a mask beside its image", 2),)


def test_a_folder_of_class_names_by_number_stays_what_it_is(root):
    out, _ = seen(write(root, pictures("0/a.png", "1/b.png") | {"labels.csv": "id,label\n0,cat\n1,dog\n"}))
    assert out == {"train": {1: "0", 2: "1"}}


def test_a_file_whose_name_is_a_split_is_read_anew_where_it_has_another(root):
    content = rows([1, 2], [1, 0], DOGS)
    write(root, {"train.parquet": content, "sub/test.parquet": content})
    assert [*data.load(str(root / "train.parquet")).splits] == ["train"]
    assert [*data.load(str(root / "sub" / "test.parquet")).splits] == ["test"]


def test_a_folder_with_the_name_of_a_set_is_spoken_of(root, monkeypatch):
    monkeypatch.chdir(write(root, pictures("digits/cat/a.png", "digits/dog/b.png")))
    name, notes = own.prepare("digits")
    assert name == "digits" and notes[-1] == "digits is the set of that name; for the folder write ./digits."
    assert data.load(own.prepare("./digits")[0]).classes == ("cat", "dog")
