"""Batches split over replicas: together the replicas see the images of a single process, each once."""

import numpy as np
import pytest
from helpers.datasets import assert_same_batches, hashable, write_pictures

from tf_repvgg.data import ClassificationData, Preprocessing, image_split
from tf_repvgg.data.shards import Shard

# {name: numbers of the replicas of each process}
LAYOUTS = {
    "2 processes": (range(1), range(1, 2)),
    "1 process, 2 devices": (range(2),),
    "2 processes, 4 devices": (range(2), range(2, 4)),
    "3 processes": (range(1), range(1, 2), range(2, 3)),
}


def join(parts, replicas):
    """The batches of all replicas: of each step, the parts of every process, which has as many as it has replicas."""
    steps = [
        [batch for part, own in zip(parts, replicas, strict=True) for batch in part[step * len(own) :][: len(own)]]
        for step in range(len(parts[0]) // len(replicas[0]))
    ]
    return [tuple(np.concatenate(tensors) for tensors in zip(*batches, strict=True)) for batches in steps]


def read_parts(replicas, make_batches):
    total = replicas[-1].stop
    return [list(make_batches(Shard(own, total)).as_numpy_iterator()) for own in replicas]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("drop_remainder", [True, False])
def test_replicas_together_see_the_batches_of_one_process(digits, layout, drop_remainder):
    """Cropped alike, in a second epoch too, and continued in the middle of an epoch."""
    replicas = LAYOUTS[layout]

    def make_batches(shard, first_step=0):
        epochs = range(first_step > 0, 2)
        return digits.training(132, epochs, None, None, first_step, drop_remainder, shard)

    expected = list(make_batches(Shard()).as_numpy_iterator())
    assert len(expected) == 2 * (10 if drop_remainder else 11)
    parts = read_parts(replicas, make_batches)
    assert_same_batches(expected, join(parts, replicas))
    sizes = [len(labels) for part in parts for _, labels in part]
    assert max(sizes) == 132 // replicas[-1].stop and min(sizes) >= (max(sizes) if drop_remainder else 117 // 4)
    middle = read_parts(replicas, lambda shard: make_batches(shard, first_step=3))
    assert_same_batches(list(make_batches(Shard(), first_step=3).as_numpy_iterator()), join(middle, replicas))


@pytest.mark.parametrize("crop", ["pad", "random_resized"])
@pytest.mark.parametrize("drop_remainder", [True, False])
def test_images_that_are_decoded_anew_are_split_too(tmp_path_factory, monkeypatch, crop, drop_remainder):
    monkeypatch.setattr(image_split, "_CACHE_BYTES", 0)
    folder = write_pictures(tmp_path_factory.mktemp("pictures"))
    data = ClassificationData("tiny", folder, Preprocessing((16, 16)), hold_out=False, crop=crop)
    for replicas in LAYOUTS.values():
        if 12 % replicas[-1].stop or 10 % replicas[-1].stop:
            continue

        def make_batches(shard):
            return data.training(10, range(2), None, None, 0, drop_remainder, shard)

        expected = list(make_batches(Shard()).as_numpy_iterator())
        assert sum(len(labels) for _, labels in expected) == 2 * (20 if drop_remainder else 24)
        assert_same_batches(expected, join(read_parts(replicas, make_batches), replicas))


def test_only_images_of_this_process_are_decoded(tmp_path, monkeypatch):
    """A random window costs most of the time of a step's input."""
    data = ClassificationData("tiny", write_pictures(tmp_path), Preprocessing((16, 16)), hold_out=False)
    is_computed, sizes = Shard(range(1), 3).split([10, 10, 4])
    assert is_computed.sum() == sizes.sum() == 3 + 3 + 1
    images = list(data._images["train"].images(is_computed).as_numpy_iterator())
    assert len(images) == 7


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation_sees_every_image_once_and_gives_every_replica_some(digits, layout):
    replicas = LAYOUTS[layout]
    (everything,) = digits.evaluation("test", 360).as_numpy_iterator()
    parts = read_parts(replicas, lambda shard: digits.evaluation("test", 100, shard))
    assert all(
        len(part) == digits.evaluation_steps("test", 100) * len(own) for part, own in zip(parts, replicas, strict=True)
    )
    assert all(len(labels) for part in parts for _, labels in part)
    images = np.concatenate([images for part in parts for images, _ in part])
    assert sorted(hashable(images)) == sorted(hashable(everything[0]))


def test_randaugment_and_mixup_differ_between_replicas_and_are_reproducible():
    data = ClassificationData("digits", hold_out=False, rand_augment_operations=1, mixup_alpha=0.5)
    replicas = LAYOUTS["2 processes, 4 devices"]

    def read():
        return read_parts(replicas, lambda shard: data.training(64, range(1), None, 2, 0, True, shard))

    parts, again = read(), read()
    for part, same in zip(parts, again, strict=True):
        assert_same_batches(part, same)
    ratios = [labels[(labels > 0) & (labels < 1)].min() for part in parts for _, labels in part]
    assert len(set(ratios)) == len(ratios) == 2 * 4  # mixup's, one for each replica and step


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((3, 128, True), "batch size 128 cannot be split evenly over 3 replicas; give a multiple of 3"),
        ((4, 1436, False), "a batch of 1 image cannot be split over 4 replicas; choose another batch size, drop"),
        ((512, 512, True, "test"), "a batch of 360 images cannot be split over 512 replicas"),
    ],
)
def test_batches_that_cannot_be_split_are_refused(digits, arguments, message):
    with pytest.raises(ValueError, match=message):
        digits.check_replicas(*arguments)


def test_a_process_has_replicas_among_all():
    for replicas in (range(0), range(1, 3)):
        with pytest.raises(ValueError, match="they must be among the 2 of all processes"):
            Shard(replicas, 2)
