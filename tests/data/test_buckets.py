"""Buckets keep an image's shape, steps have one shape, every image gets its share, and nothing has a state."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from ambient_sd.data.buckets import BucketStream, assign, make_buckets, nearest_bucket, read_buckets
from ambient_sd.data.stream import process_batches
from ambient_sd.utils.errors import UserError


def test_buckets_of_512_are_those_that_fill_its_area() -> None:
    buckets = make_buckets(512, 64)
    assert (512, 512) in buckets
    assert (704, 320) not in buckets, "wider than 2:1"
    assert {(448, 576), (576, 448), (384, 640), (640, 384)} <= set(buckets)
    assert all(w % 64 == h % 64 == 0 and w * h <= 512**2 and 0.5 <= w / h <= 2 for w, h in buckets)
    assert {(h, w) for w, h in buckets} == set(buckets)
    assert make_buckets(64, 64) == ((64, 64),)


def test_a_given_list_is_read_as_height_and_width() -> None:
    assert read_buckets(" 512,768; 640,640 ", 512, 64) == ((640, 640), (768, 512))
    assert read_buckets("auto", 512, 64) == make_buckets(512, 64)
    for text, word in (("512", "pairs"), ("512,", "pairs"), ("a,b", "pairs"), ("512,700", "multiples of 64"), ("0,64", "multiples"),
                       ("", "pairs"), ("512,512;", "pairs"), ("-64,64", "pairs")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            read_buckets(text, 512, 64)
    with pytest.raises(UserError, match="use 512"):
        read_buckets("auto", 500, 64)


def test_an_image_takes_the_nearest_shape_and_a_group_that_of_its_first() -> None:
    buckets = make_buckets(512, 64)
    for size in ((512, 512), (3000, 2000), (900, 1600), (5000, 100)):
        bucket = nearest_bucket(size, buckets)
        distance = abs(math.log(bucket[0] / bucket[1] * size[1] / size[0]))
        assert all(distance <= abs(math.log(w / h * size[1] / size[0])) + 1e-9 for w, h in buckets)
    assigned = assign([(512, 512), (512, 440), (512, 400)], ["a", "a", "b"], buckets)
    assert assigned == {"a": (512, 512), "b": nearest_bucket((512, 400), buckets)}
    assert nearest_bucket((512, 440), buckets) != (512, 512), "alone it would have another shape, hence another noise"


BUCKET_OF = [(64, 64)] * 50 + [(48, 80)] * 7 + [(80, 48)] * 20


def test_every_step_has_one_shape_on_any_number_of_processes() -> None:
    stream = BucketStream(BUCKET_OF, 8, seed=3)
    alone = [p for batch in process_batches(0, 40, batch_size=8, accumulation=1, rank=0, processes=1) for p in batch]
    for batch in process_batches(0, 40, batch_size=8, accumulation=1, rank=0, processes=1):
        assert len({BUCKET_OF[stream.image(p)] for p in batch}) == 1
    shared = [
        [p for batch in process_batches(0, 40, batch_size=2, accumulation=2, rank=r, processes=2) for p in batch]
        for r in range(2)
    ]
    assert sorted(shared[0] + shared[1]) == alone
    assert len({BUCKET_OF[stream.image(p)] for p in alone}) == 3


def test_a_position_is_a_function_of_the_seed_alone() -> None:
    forward, backward = BucketStream(BUCKET_OF, 8, seed=3), BucketStream(BUCKET_OF, 8, seed=3)
    positions = list(range(8 * 3000))
    late = {p: backward.image(p) for p in reversed(positions)}
    assert all(forward.image(p) == late[p] for p in positions)
    other = BucketStream(BUCKET_OF, 8, seed=4)
    assert any(other.image(p) != late[p] for p in positions[:80])


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_every_image_gets_its_share(batch: int) -> None:
    stream = BucketStream(BUCKET_OF, batch, seed=0)
    steps = 40 * 77 // batch
    seen = Counter(stream.image(p) for p in range(steps * batch))
    assert len(seen) == 77, "even where a batch is larger than the bucket"
    mean = steps * batch / 77
    # One step more or less of a bucket of m images is batch / m views of each.
    for index, bucket in enumerate(BUCKET_OF):
        assert abs(seen[index] - mean) <= 3 * batch / BUCKET_OF.count(bucket) + 2


def test_images_of_a_bucket_come_in_permutations() -> None:
    stream = BucketStream(BUCKET_OF, 5, seed=1)
    large = [q for p in range(5 * 60) if BUCKET_OF[q := stream.image(p)] == (64, 64)]
    assert sorted(large[:50]) == list(range(50))
    assert sorted(large[50:100]) == list(range(50))
    assert large[:50] != large[50:100]
