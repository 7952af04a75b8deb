"""Folders of images: read as they are laid out, with every unusual image converted or reported."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from tf_repvgg import runs
from tf_repvgg.data import NORMALIZATIONS, ClassificationData, ImageFolder, Preprocessing, image_checks
from tf_repvgg.tflite import flatbuffer

COLOURS = {"blue": (20, 50, 200), "green": (40, 160, 30), "red": (200, 50, 20)}
SIZE = (48, 36)


def plain(colour="red", size=SIZE, mode="RGB"):
    return Image.new("RGB", size, COLOURS[colour]).convert(mode)


def noisy():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that declares a size but has almost no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def make_folder(root, per_class=10, splits=("train", "test")):
    """root/<split>/<colour>/<number>.jpg or .png, of several sizes."""
    for split in splits:
        for colour in COLOURS:
            folder = root / split / colour
            folder.mkdir(parents=True)
            for index in range(per_class):
                name, kind = (f"{index}.jpg", "JPEG") if index % 2 else (f"{index}.PNG", "PNG")
                plain(colour, (30 + index, 40)).save(folder / name, kind)
    return root


@pytest.fixture
def flowers(tmp_path):
    return make_folder(tmp_path / "flowers", 2)


# {file name: (its bytes, and the red pixel that it becomes or the defect that is reported)}
IMAGES = {
    "grey.jpg": (encode(plain(mode="L"), "JPEG"), (91, 91, 91)),
    "cmyk.jpg": (encode(plain(mode="CMYK"), "JPEG", quality=95), (200, 50, 20)),
    "several_pictures.jpg": (
        encode(plain(), "MPO", save_all=True, append_images=[plain("blue", (8, 8))]),
        (198, 51, 18),
    ),
    "palette.png": (encode(plain().quantize(4), "PNG"), (200, 50, 20)),
    "alpha.png": (encode(Image.new("RGBA", SIZE, (200, 50, 20, 0)), "PNG"), (200, 50, 20)),
    "grey_alpha.png": (encode(plain(mode="LA"), "PNG"), (91, 91, 91)),
    "16_bit.png": (encode(Image.fromarray(np.full(SIZE, 40_000, np.uint16)), "PNG"), (156, 156, 156)),
    "1_bit.png": (encode(Image.new("1", SIZE, 1), "PNG"), (255, 255, 255)),
    "still.gif": (encode(plain(), "GIF"), (200, 50, 20)),
    "plain.bmp": (encode(plain(), "BMP"), (200, 50, 20)),
    "jpeg_called.png": (encode(plain(), "JPEG"), (198, 51, 18)),
    "empty.jpg": (b"", "empty"),
    "truncated.jpg": (encode(noisy(), "JPEG")[:1500], "damaged or truncated JPEG"),
    "truncated.png": (encode(noisy(), "PNG")[:1500], "damaged or truncated PNG"),
    "header_only.jpg": (encode(noisy(), "JPEG")[:12], "not a JPEG, PNG, GIF or BMP image"),
    "text.jpg": (b"no image at all", "not a JPEG, PNG, GIF or BMP image"),
    "photo.webp": (encode(plain(), "WEBP"), "not a JPEG, PNG, GIF or BMP image"),
    "animated.gif": (encode(plain(), "GIF", save_all=True, append_images=[noisy()]), "animated GIF"),
    "animated.png": (encode(plain(), "PNG", save_all=True, append_images=[noisy()]), "animated PNG"),
    "palette.bmp": (encode(plain(mode="P"), "BMP"), "a BMP with a palette"),
    "bomb.png": (png_header(30_000, 30_000), "30000x30000 is more than 50 megapixels"),
    "large.png": (png_header(10_000, 6_000), "10000x6000 is more than 50 megapixels"),
}
DEFECTS = {name: outcome for name, (_, outcome) in IMAGES.items() if isinstance(outcome, str)}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder with every kind of image in train/red."""
    root = make_folder(tmp_path_factory.mktemp("zoo") / "zoo", 2)
    for name, (content, _) in IMAGES.items():
        (root / "train" / "red" / name).write_bytes(content)
    (root / "train" / "red" / "folder.jpg").mkdir()
    (root / "train" / "red" / "nowhere.jpg").symlink_to(root / "missing.jpg")
    (root / "train" / "red" / ".DS_Store").write_bytes(b"not counted")
    return root


def test_every_kind_of_image_is_converted_or_reported(zoo, capfd):
    folder = ImageFolder(f"folder:{zoo}", bad_images="skip")
    lines = capfd.readouterr().err.splitlines()
    expected = {f"bad image 'train/red/{name}': {defect}" for name, defect in DEFECTS.items()}
    expected |= {f"bad image 'train/red/{name}': not a file" for name in ("folder.jpg", "nowhere.jpg")}
    assert set(lines) == expected and len(lines) == len(expected)
    paths = [os.path.basename(path.decode()) for path in folder._files["train"][0].numpy()]
    assert folder.num_examples("train") == 6 + len(IMAGES) - len(DEFECTS)
    assert not set(paths) & DEFECTS.keys()
    for path, (reference, _) in zip(paths, folder.list_examples("train"), strict=True):
        if path in IMAGES:
            image = folder.decode(folder.read(reference)).numpy()
            assert image.dtype == np.uint8 and image.shape[-1] == 3
            np.testing.assert_allclose(image[0, 0].astype(int), IMAGES[path][1], atol=3, err_msg=path)


def test_usable_images_are_trained_on(zoo, capfd):
    """Through the whole pipeline, both cropped while they are decoded and decoded whole."""
    for crop in ("pad", "random_resized"):
        data = ClassificationData(
            f"folder:{zoo}", None, Preprocessing((16, 16)), hold_out=False, crop=crop, flip=False, bad_images="skip"
        )
        batches = list(data.training(1, range(1)).as_numpy_iterator())
        assert len(batches) == data.num_examples("train")
        red_images = [images for images, (label,) in batches if label == data.labels.index("red")]
        pixels = {tuple(np.round(image[0, 8, 8] * 128 + 128).astype(int)) for image in red_images}
        for name, (_, outcome) in IMAGES.items():
            if name not in DEFECTS:
                assert min(np.max(np.abs(np.subtract(pixel, outcome))) for pixel in pixels) <= 3, name


def test_bad_images_are_refused_unless_they_may_be_skipped(zoo, capfd):
    count = len(DEFECTS) + 2
    with pytest.raises(ValueError, match=rf"{count} of the images of 'folder:zoo' cannot be used, see above"):
        ImageFolder(f"folder:{zoo}")
    assert len(capfd.readouterr().err.splitlines()) == count


def test_the_limit_of_megapixels_can_be_moved(flowers, capfd):
    (flowers / "train" / "red" / "larger.png").write_bytes(encode(plain(size=(100, 80)), "PNG"))
    assert ImageFolder(f"folder:{flowers}", max_megapixels=0.008).num_examples("train") == 7
    ImageFolder(f"folder:{flowers}", bad_images="skip", max_megapixels=0.0079)
    assert capfd.readouterr().err == "bad image 'train/red/larger.png': 100x80 is more than 0.0079 megapixels\n"
    # Small in its header, but padded by what a reader would have to hold in memory.
    with open(flowers / "train" / "red" / "larger.png", "ab") as file:
        file.truncate(70_000)
    ImageFolder(f"folder:{flowers}", bad_images="skip", max_megapixels=0.008)
    assert (
        "'train/red/larger.png': its 70,000 bytes are more than an image of 0.008 megapixels can have"
        in capfd.readouterr().err
    )


def test_declared_sizes_are_refused_before_anything_is_decoded(flowers, monkeypatch):
    """Neither decoder sees the image, which would take 2.7 GB."""
    (flowers / "train" / "red" / "bomb.png").write_bytes(content := png_header(30_000, 30_000))
    decoded = []
    decode = image_checks.decode
    monkeypatch.setattr(image_checks, "decode", lambda encoded: decoded.append(encoded.numpy()) or decode(encoded))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("Pillow decodes"))
    limit = Image.MAX_IMAGE_PIXELS
    assert ImageFolder(f"folder:{flowers}", bad_images="skip").num_examples("train") == 6
    assert len(decoded) == 12 and content not in decoded
    assert limit == Image.MAX_IMAGE_PIXELS  # Pillow's own, which others in the process may rely on


def test_layout_and_order(tmp_path):
    root = make_folder(tmp_path / "colours", 10)
    folder = ImageFolder(f"folder:{root}/")
    assert (folder.name, folder.labels, folder.splits) == (
        "folder:colours",
        ("blue", "green", "red"),
        ["train", "test"],
    )
    assert ImageFolder("folder:colours", data_dir=str(tmp_path)).labels == folder.labels
    data = ClassificationData(f"folder:{root}", None, Preprocessing((8, 8)))
    assert [data.num_examples(split) for split in ("train", "validation", "test")] == [27, 3, 30]
    assert data.num_classes == 3 and data.image_shape == (8, 8, 3)
    labels = [label for _, label in folder.list_examples("train").as_numpy_iterator()]
    assert sorted(labels) == [0] * 10 + [1] * 10 + [2] * 10
    assert len(set(labels[:8])) == 3  # mixed, so that a tenth has images of every class
    for images, image_labels in data.evaluation("test", 30).as_numpy_iterator():
        for image, label in zip(images, image_labels, strict=True):
            np.testing.assert_allclose(image[4, 4] * 128 + 128, COLOURS[folder.labels[label]], atol=4)
    # A new image does not change the order of the others.
    paths = list(folder._files["train"][0].numpy())
    plain().save(root / "train" / "red" / "another.png")
    more = list(ImageFolder(f"folder:{root}")._files["train"][0].numpy())
    assert [path for path in more if b"another" not in path] == paths
    first, second = ([label for _, label in folder.list_examples("train", shuffle_seed=seed)] for seed in (1, 2))
    assert list(map(int, first)) != list(map(int, second))


def test_validation_folder_of_its_own(tmp_path):
    root = make_folder(tmp_path / "colours", 2, ("train", "val", "test"))
    data = ClassificationData(f"folder:{root}", None, Preprocessing((8, 8)))
    assert data.splits == {"train": "train", "validation": "validation", "test": "test"}
    everything = ClassificationData(f"folder:{root}", None, Preprocessing((8, 8)), hold_out=False)
    assert everything.num_examples("train") == 12
    assert len(list(everything.images("train"))) == 12
    (root / "validation").mkdir()
    with pytest.raises(ValueError, match="'colours' has both validation and val; remove one of them"):
        ImageFolder(f"folder:{root}")


def test_folders_that_cannot_be_used(tmp_path, flowers, capfd):
    def assert_refused(match, error=ValueError, **options):
        with pytest.raises(error, match=match):
            ClassificationData(f"folder:{flowers}", None, Preprocessing((8, 8)), hold_out=False, **options)

    with pytest.raises(ValueError, match=r"images of dataset .* differ in size; give the size to resize them to"):
        ClassificationData(f"folder:{flowers}")
    (flowers / "test" / "yellow").mkdir()
    plain().save(flowers / "test" / "yellow" / "a.png")
    assert_refused("'folder:flowers' has the class 'yellow' in test but not in train")
    (flowers / "train" / "yellow").mkdir()
    assert_refused("'folder:flowers' has no usable image of the class 'yellow' in train")
    (flowers / "train" / "yellow" / "a.png").write_bytes(b"")
    assert_refused("1 of the images of 'folder:flowers' cannot be used")
    assert_refused("no usable image of the class 'yellow' in train", bad_images="skip")
    os.mkdir(os.fsencode(flowers / "train") + b"/\xff")
    assert_refused(r"the name of the class folder '.*/train/\\udcff' is not UTF-8; rename the folder")
    os.rmdir(os.fsencode(flowers / "train") + b"/\xff")
    os.rename(flowers / "test", flowers / "tests")
    (flowers / "train" / "yellow" / "a.png").unlink()
    plain().save(flowers / "train" / "yellow" / "a.png")
    assert_refused("no test or validation split, but train")
    os.rename(flowers / "train", flowers / "training")
    assert_refused("'flowers' has no folder 'train'; put the images into flowers/train/<label>/")
    (flowers / "train").mkdir()
    assert_refused("'folder:flowers' has 0 classes in train; a classifier needs at least two")
    (flowers / "train" / "red").mkdir()
    assert_refused("'folder:flowers' has 1 class in train")
    with pytest.raises(FileNotFoundError, match=r"folder '.*/nothing' does not exist; give --dataset=folder:PATH"):
        ClassificationData(f"folder:{tmp_path}/nothing")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, run_forked):
    """A model trained on a folder and exported, by the commands of a user: (folder, workdir, their output)."""
    folder = tmp_path_factory.mktemp("own_images")
    root = make_folder(folder / "colours", 16)
    (root / "train" / "red" / "empty.png").write_bytes(b"")
    commands = [
        [
            "train/main.py",
            f"--dataset=folder:{root}",
            f"--workdir={folder}/run",
            *("--bad_images=skip", "--variant=digits", "--epochs=4", "--batch_size=8", "--warmup_epochs=0.5"),
            *("--image_size=16", "--evaluation_resize=18", "--crop=random_resized", "--normalization=imagenet"),
        ],
        [
            "export/main.py",
            f"--workdir={folder}/run",
            "--dataset=folder:colours",
            f"--data_dir={folder}",
            *("--bad_images=skip", "--calibration_images=40", "--latency_runs=50"),
        ],
    ]
    printed = []
    for command in commands:
        outcome = run_forked(*command)
        assert outcome.status == 0, outcome.stderr[-3000:]
        printed.append(outcome.stderr)
    return root, folder / "run", printed


def test_labels_and_preprocessing_reach_the_exported_file(exported):
    root, workdir, printed = exported
    metadata = json.loads((workdir / "input.json").read_text())
    assert metadata == {
        "dataset": "folder:colours",
        "validation_held_out": True,
        "size": [16, 16],
        "mean": [123.675, 116.28, 103.53],
        "std": [58.395, 57.12, 57.375],
        "resize_shorter_side": 18,
        "labels": ["blue", "green", "red"],
    }
    content = (workdir / "export" / "int8_w8_per_channel.tflite").read_bytes()
    flat = flatbuffer.unpack(content)
    (entry,) = [entry for entry in flat.metadata if entry.name == b"TF_REPVGG_INPUT"]
    assert json.loads(bytes(flat.buffers[entry.buffer].data)) == metadata
    # The path to the folder stays on this machine.
    assert str(root.parent).encode() not in content
    assert str(root.parent) not in (workdir / "config.flags").read_text()
    assert "--dataset=folder:colours" in (workdir / "config.flags").read_text().splitlines()
    assert all("bad image 'train/red/empty.png': empty" in text for text in printed)


def test_export_preprocesses_as_in_training(exported):
    """Against this test's own reading of the images: accuracy in both programs, and the range that calibration saw."""
    root, workdir, _ = exported
    report = json.loads((workdir / "export" / "export.json").read_text())
    data = ClassificationData(
        f"folder:{root}", None, Preprocessing((16, 16), *NORMALIZATIONS["imagenet"], 18), bad_images="skip"
    )
    model = runs.load_model(workdir)
    images, labels = (np.concatenate(part) for part in zip(*data.evaluation("test").as_numpy_iterator(), strict=True))
    top1 = 100 * np.mean(model(images).numpy().argmax(axis=1) == labels)
    assert report["float_training_form_top1_percent"] == pytest.approx(top1, abs=0.01)
    assert report["images"] == 48
    seen = np.stack(list(data.calibration(40)))
    tensor = flatbuffer.unpack((workdir / "export" / "int8_w8_per_channel.tflite").read_bytes()).subgraphs[0]
    (scale,) = tensor.tensors[tensor.inputs[0]].quantization.scale
    assert scale == pytest.approx((seen.max() - seen.min()) / 255, rel=0.01)
    # The model distinguishes colours, not normalizations.
    assert top1 > 60
