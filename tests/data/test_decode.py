import io
import math
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from cnn_cases.data import decode
from tests.data.photos import encoded, picture

CROP = {
    "name": "squeeze",
    "shorter_side": (256, 256),
    "area": (0.08, 1.0),
    "aspect": (3 / 4, 4 / 3),
    "eval_shorter_side": 256,
}
SIZES = [(375, 500), (500, 375), (224, 224), (30, 900), (900, 30), (3, 5), (1, 1)]


def distance(image, other):
    """The mean difference of two images in steps of 256."""
    return np.abs(np.asarray(image, np.int32) - np.asarray(other)).mean()


@pytest.mark.parametrize(
    ("image_format", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB")],
)
def test_every_format_becomes_rgb(image_format, mode):
    image = decode.decode(encoded(0, image_format, mode), 3)
    assert (image.shape, image.dtype) == ((20, 24, 3), np.uint8)
    assert distance(image, picture(0)) < (40 if mode == "P" else 10)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_the_number_of_channels_is_that_of_the_set_and_not_of_the_file(image_format):
    grey = decode.decode(encoded(0, image_format, "L"), 3)
    assert grey.shape == (20, 24, 3)
    assert np.ptp(grey, axis=2).max() == 0
    one = decode.decode(encoded(0, image_format, "RGB"), 1)
    assert one.shape == (20, 24, 1)
    assert distance(one[..., 0], picture(0, "L")) < 4


def test_16_bits_are_refused_and_not_made_white():
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 4), 20_000, np.uint16)).save(deep, "PNG")
    with pytest.raises(ValueError, match="it has more than 8 bits per channel; save it with 8"):
        decode.decode(deep.getvalue(), 1)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_are_turned_as_their_exif_part_says(image_format, orientation):
    """Orientation 3 is upside down; 6 is shown after a turn to the right, 8 after one to the left."""
    turned = Image.fromarray(np.rot90(picture(0), {1: 0, 3: 2, 6: 1, 8: 3}[orientation]))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = io.BytesIO()
    turned.save(data, image_format, exif=exif, quality=95)
    image = decode.decode(data.getvalue(), 3)
    assert image.shape == (20, 24, 3)
    assert distance(image, picture(0)) < 10


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_turns_are_those_of_pillow(image_format, orientation):
    exif, data = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    picture(0).save(data, image_format, exif=exif)
    with Image.open(data) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(decode.decode(data.getvalue(), 3), expected)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_an_exif_part_that_is_damaged_turns_nothing(image_format, mode):
    data = io.BytesIO()
    picture(0, mode if image_format == "JPEG" else "RGB").save(
        data, image_format, exif=b"Exif\0\0no such thing", quality=95
    )
    assert distance(decode.decode(data.getvalue(), 3), picture(0)) < 10


@pytest.mark.parametrize("header", [b"II*\0", b"II+\0\x08\0\0\0", b"no"])
def test_an_exif_part_that_is_cut_off_turns_nothing(header):
    data = io.BytesIO()
    picture(0).save(data, "JPEG", exif=b"Exif\0\0" + header, dpi=(72, 72), quality=95)
    assert distance(decode.decode(data.getvalue(), 3), picture(0)) < 10


def test_where_another_tag_is_damaged_an_image_is_still_turned():
    exif, data = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.ResolutionUnit] = 3, 2
    picture(0).rotate(180).save(data, "JPEG", exif=exif, quality=95)
    unit = b"\x01\x28\x00\x03"  # a whole number, of which this makes a text
    assert unit in data.getvalue()
    damaged = data.getvalue().replace(unit, b"\x01\x28\x00\x02")
    with Image.open(io.BytesIO(damaged)) as image, pytest.raises(struct.error, match="not an integer"):
        ImageOps.exif_transpose(image)
    assert distance(decode.decode(damaged, 3), picture(0)) < 10


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_is_white(channels):
    ink = np.zeros((4, 4, 4), np.uint8)  # black, wherever it shows
    ink[1, 1, 3], ink[2, 2, 3] = 255, 51
    for mode in ("RGBA", "LA", "PA"):
        data = io.BytesIO()
        Image.fromarray(ink).convert(mode).save(data, "TIFF" if mode == "PA" else "PNG")
        image = decode.decode(data.getvalue(), channels)
        assert (image[1, 1] == 0).all()
        assert (image[2, 2] == 204).all()
        assert (image[0] == 255).all()


def test_whatever_the_plugin_of_a_format_raises_is_said_of_the_image(monkeypatch):
    def failing(*_):
        raise RuntimeError("Conversion from YUV failed")

    monkeypatch.setattr(decode.Image, "open", failing)
    with pytest.raises(ValueError, match="Conversion from YUV failed"):
        decode.decode(encoded(0, "PNG"), 3)


def test_bytes_after_the_image_do_no_harm():
    whole = decode.decode(encoded(0), 3)
    assert distance(decode.decode(encoded(0) + b"left over", 3), whole) < 1


@pytest.mark.parametrize(
    "data", [b"", b"no image", encoded(0)[:300], encoded(0)[:20], encoded(0, "PNG")[:-200]], ids=len
)
def test_what_is_no_whole_image_is_refused_in_the_same_words_each_time(data):
    messages = set()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\w") as error:
            decode.decode(data, 3)
        messages.add(str(error.value))
    assert len(messages) == 1
    assert "0x" not in messages.pop()


def training_boxes(height, width, count=300, **crop):
    rng = np.random.default_rng(0)
    return [decode.training_box(height, width, 224, rng, CROP | crop) for _ in range(count)]


@pytest.mark.parametrize("name", decode.CROPS)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_every_box_lies_in_its_image(name, height, width):
    boxes = training_boxes(height, width, name=name, count=100)
    boxes.append(decode.evaluation_box(height, width, 224, CROP | {"name": name}))
    for top, left, box_height, box_width in boxes:
        assert min(top, left) >= 0 < min(box_height, box_width)
        assert top + box_height <= height
        assert left + box_width <= width


def test_squeezing_sees_the_whole_image():
    assert set(training_boxes(375, 500)) == {(0, 0, 375, 500)}
    assert decode.evaluation_box(375, 500, 224, CROP) == (0, 0, 375, 500)


def test_crops_of_a_resized_image_have_every_size_and_place():
    boxes = np.array(training_boxes(256, 300, count=3000, name="shorter_side", shorter_side=(256, 512)))
    np.testing.assert_array_equal(boxes[:, 2], boxes[:, 3])
    # At 256 pixels the crop is 224 of the 256, at 512 half as much.
    assert (boxes[:, 2].min(), boxes[:, 2].max()) == (112, 224)
    sides = 256 * 224 / boxes[:, 2]
    assert np.histogram(sides, 4, (256, 512))[0].min() > 3000 / 4 * 0.85
    largest = boxes[boxes[:, 2] == 224]
    assert (boxes[:, 0].min(), boxes[:, 0].max() > 135) == (0, True)  # 256 - 112 at most
    assert largest[:, 0].max() <= 32


def test_patches_have_the_areas_and_shapes_that_are_asked_for():
    boxes = np.array(training_boxes(375, 500, count=3000, name="area"))
    shares = boxes[:, 2] * boxes[:, 3] / (375 * 500)
    ratios = boxes[:, 3] / boxes[:, 2]
    assert 0.075 < shares.min() < 0.1
    assert 0.9 < shares.max() <= 1
    assert 0.73 < ratios.min() < 0.77
    assert 1.3 < ratios.max() < 1.36
    small = ratios[shares < 0.4]  # where every ratio fits
    assert abs(np.log(small).mean()) < 0.02
    assert {*boxes[:, 0]} > {0}
    assert np.corrcoef(boxes[:, 0], boxes[:, 1])[0, 1] < 0.9


def test_the_areas_of_patches_are_uniform_and_their_ratios_are_of_width_to_height():
    boxes = np.array(training_boxes(400, 500, count=3000, name="area", area=(0.1, 0.3), aspect=(1.0, 3.0)))
    shares, ratios = boxes[:, 2] * boxes[:, 3] / (400 * 500), boxes[:, 3] / boxes[:, 2]
    np.testing.assert_allclose(
        np.quantile(shares, [0, 0.25, 0.5, 0.75, 1]), [0.1, 0.15, 0.2, 0.25, 0.3], atol=0.01
    )
    np.testing.assert_allclose(np.quantile(ratios, [0, 0.5, 1]), [1, math.sqrt(3), 3], atol=0.05)


def test_ten_patches_are_tried_before_the_largest_is_taken():
    boxes = training_boxes(100, 100, count=3000, name="area", area=(0.5, 1.0), aspect=(1 / 3, 3.0))
    # A share s fits with probability -log(s) / log(3), on average 2 * (0.5 - 0.5 * log(2)) / log(3).
    fits = (1 - math.log(2)) / math.log(3)
    assert boxes.count((0, 0, 100, 100)) / 3000 == pytest.approx((1 - fits) ** 10, abs=0.015)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(30, 900, (0, 430, 30, 40)), (900, 30, (430, 0, 40, 30)), (3, 3, (0, 0, 3, 3))],
)
def test_where_no_patch_fits_the_largest_at_the_centre_is_taken(height, width, box):
    boxes = training_boxes(height, width, count=3, name="area", area=(1.0, 1.0), aspect=(3 / 4, 4 / 3))
    assert box in boxes


@pytest.mark.parametrize("name", ["shorter_side", "area"])
def test_evaluation_sees_the_centre(name):
    settings = CROP | {"name": name}
    assert decode.evaluation_box(256, 356, 224, settings) == (16, 66, 224, 224)
    assert decode.evaluation_box(512, 512, 224, settings) == (32, 32, 448, 448)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_the_right_size_stays_as_it_is(channels):
    image = np.random.default_rng(0).integers(0, 256, (9, 12, channels), np.uint8)
    np.testing.assert_array_equal(decode.framed(image, (0, 3, 9, 9), 9, 0), image[:, 3:])


def test_far_smaller_images_are_means_of_all_pixels():
    stripes = np.tile(np.uint8([[[0], [255]]]), (64, 32, 1))
    assert np.ptp(decode.framed(stripes, (0, 0, 64, 64), 8, 0)) == 0
    assert abs(decode.framed(stripes, (0, 0, 64, 64), 8, 0).mean() - 127.5) <= 0.5


def test_images_of_three_times_the_side_are_means_too():
    stripes = np.tile(np.uint8([[[0], [0], [240]]]), (24, 8, 1))
    np.testing.assert_array_equal(decode.framed(stripes, (0, 0, 24, 24), 8, 0), 80)


def test_a_side_that_shrinks_is_averaged_where_the_other_grows():
    stripes = np.tile(np.uint8([[[0], [255]]]), (60, 240, 1))
    assert (
        np.ptp(decode.framed(stripes, (0, 0, 60, 480), 96, 0)[:, 1:-1]) <= 52
    )  # of 5 pixels, 2 or 3 are bright


def test_a_resized_box_is_the_crop_of_the_resized_image():
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 6, 3), np.uint8))
    image = image.resize((120, 100), Image.Resampling.BICUBIC)
    box = decode.evaluation_box(100, 120, 28, CROP | {"name": "shorter_side", "eval_shorter_side": 50})
    expected = np.asarray(image.resize((60, 50), Image.Resampling.BILINEAR))[11:39, 16:44]
    assert distance(decode.framed(np.asarray(image), box, 28, 0), expected) < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "zoom"}, "data.crop.name = 'zoom' is unknown; known: squeeze, shorter_side, area"),
        (
            {"name": "shorter_side", "shorter_side": (200, 256)},
            r"data.crop.shorter_side = \(200, 256\) must be at least data.image_size = 224",
        ),
        ({"name": "shorter_side", "shorter_side": (300, 256)}, "the smaller one first"),
        ({"name": "area", "area": (0.0, 1.0)}, r"data.crop.area = \(0.0, 1.0\) must be two fractions"),
        ({"name": "area", "area": (0.5, 0.1)}, "data.crop.area"),
        ({"name": "area", "aspect": (1e-300, 1.0)}, "between 1/8192 and 8192, the smaller first"),
        ({"name": "area", "aspect": (2.0, 1.0)}, r"data.crop.aspect = \(2.0, 1.0\) must be two ratios"),
        ({"name": "area", "eval_shorter_side": 200}, "data.crop.eval_shorter_side = 200 must be at least"),
    ],
)
def test_impossible_crops_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        decode.check(224, CROP | settings)


def test_what_is_wrong_with_a_file_is_said():
    with pytest.raises(ValueError, match="no image"):
        decode.decode(b"GIF", 3)
    with pytest.raises(ValueError, match="truncated"):
        decode.decode(encoded(0)[:-100], 3)


@pytest.mark.parametrize(
    ("record", "file"),
    [
        ({"file_name": b"a.png"}, "a.png"),
        ({"image/filename": b"\xe4.png"}, "\N{REPLACEMENT CHARACTER}.png"),
        ({"file_name": 7}, "7"),
        ({}, ""),
    ],
)
def test_whatever_a_set_calls_the_name_of_a_file_can_be_in_a_message(record, file):
    assert decode.file_of(record) == file
