"""Files as they come: bit depths, palettes, films behind photos, damage in the middle, pipes."""

import os
import socket
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import PIL.Image
import pytest

from sparse_seg.data.reading import decode_image, read_image, read_label, read_label_palette
from sparse_seg.errors import DataError
from tests.data.files import (
    PALETTE,
    PNG_SIGNATURE,
    chunk,
    damaged_jpeg,
    huge_png,
    jpeg,
    palette,
    png,
    scene,
    tiff,
    turn_by_exif,
    turned,
    write,
)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("colour", [0, PALETTE])
def test_labels_keep_their_ids_at_every_bit_depth(tmp_path: Path, depth: int, colour: int) -> None:
    ids = np.random.default_rng(depth).integers(0, 2**depth, (9, 13))
    ids[0, 0] = 2**depth - 1
    colours = [(200, index % 7, 255 - index) for index in range(2**depth)]
    extra = palette(colours) if colour else b""
    extra += chunk(b"tRNS", b"\0" * (1 if colour else 2))  # a transparent index or grey value
    (tmp_path / "label.png").write_bytes(png(ids, depth, colour, extra))
    values = read_label(tmp_path / "label.png")
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, ids)
    assert read_label_palette(tmp_path / "label.png") == (colours if colour else [])


def test_a_label_of_colours_is_read_as_rgb(tmp_path: Path) -> None:
    colours = scene()
    opaque = np.dstack([colours, np.full(colours.shape[:2], 255, np.uint8)])
    for pixels in (colours, opaque):
        write(tmp_path / "label.png", pixels)
        np.testing.assert_array_equal(read_label(tmp_path / "label.png"), colours[..., ::-1])


def test_labels_that_cannot_be_ids_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "label.png"
    transparent = np.zeros((8, 8, 4), np.uint8)
    write(file, transparent)
    with pytest.raises(DataError, match=r"label\.png: the label is 4-channel uint8"):
        read_label(file)
    file.write_bytes(jpeg())
    with pytest.raises(DataError, match=r"label\.png: the label is a JPEG, which changes ids"):
        read_label(file)


@pytest.mark.parametrize(("bits", "suffix"), [(12, ".png"), (16, ".png"), (12, ".tif"), (16, ".tif")])
def test_pictures_of_more_than_8_bits_keep_their_brightness(tmp_path: Path, bits: int, suffix: str) -> None:
    shown = scene()
    shown[0, 0] = 255
    deep = shown.astype(np.uint16) << (bits - 8)
    write(tmp_path / f"image{suffix}", deep)
    picture = decode_image(tmp_path / f"image{suffix}")
    assert picture.bits == bits
    np.testing.assert_array_equal(picture.pixels, shown[..., ::-1])


def test_a_photo_with_a_film_behind_it(tmp_path: Path) -> None:
    photo = jpeg()
    film = b"\0\0\0\x18ftypmp42" + np.random.default_rng(1).bytes(3 * len(photo))
    (tmp_path / "photo.jpg").write_bytes(photo)
    (tmp_path / "motion.jpg").write_bytes(photo + film)
    np.testing.assert_array_equal(read_image(tmp_path / "motion.jpg"), read_image(tmp_path / "photo.jpg"))
    (tmp_path / "cut.jpg").write_bytes(photo[:-200] + film)
    with pytest.raises(DataError, match=r"cut\.jpg"):
        read_image(tmp_path / "cut.jpg")


def test_a_jpeg_damaged_in_the_middle_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photo.jpg").write_bytes(damaged_jpeg())
    with pytest.raises(DataError, match=r"photo\.jpg: the JPEG is damaged \(Corrupt JPEG data"):
        read_image(tmp_path / "photo.jpg")
    assert capfd.readouterr().err == "", "the error says it"


def test_whole_jpegs_of_rare_kinds_are_read(tmp_path: Path) -> None:
    """Another sampling than cameras use, and a colour profile cut short."""
    grey = np.full((8, 24, 3), 128, np.uint8)
    made = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x411111])[1].tobytes()
    frame, scan = made.index(b"\xff\xc0"), made.index(b"\xff\xda") + 14
    blocks = b"\x28\xa2\x80\x3f"  # three of brightness and two of colour, all zero
    (tmp_path / "rare.jpg").write_bytes(
        made[: frame + 11] + b"\x31" + made[frame + 12 : scan] + blocks + b"\xff\xd9"
    )
    np.testing.assert_array_equal(read_image(tmp_path / "rare.jpg"), grey)
    profile = b"ICC_PROFILE\0\5\2" + bytes(20)
    segment = b"\xff\xe2" + (len(profile) + 2).to_bytes(2, "big") + profile
    (tmp_path / "plain.jpg").write_bytes(jpeg())
    (tmp_path / "profile.jpg").write_bytes(jpeg()[:2] + segment + jpeg()[2:])
    np.testing.assert_array_equal(read_image(tmp_path / "profile.jpg"), read_image(tmp_path / "plain.jpg"))


def test_exif_turns_photos_that_ask_for_it(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(turn_by_exif(jpeg()))
    stored = read_image(tmp_path / "photo.jpg")
    np.testing.assert_array_equal(read_image(tmp_path / "photo.jpg", upright=True), np.rot90(stored, -1))


@pytest.mark.parametrize("read", [read_image, read_label])
def test_what_is_no_regular_file_does_not_wait(tmp_path: Path, read) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket.png"))
        (tmp_path / "folder.png").mkdir()
        for file in (*sorted(tmp_path.iterdir()), Path("/dev/zero")):
            with pytest.raises(DataError, match=f"{file}: is no regular file"):
                read(file)


def test_a_header_that_promises_too_much_costs_nothing(tmp_path: Path) -> None:
    small = png(np.zeros((8, 8)), 8)
    for size in (b"\x7f\xff\xff\xff", b"\0\0\x7f\xff"):
        header = size * 2 + small[24:29]
        (tmp_path / "image.png").write_bytes(small[:8] + chunk(b"IHDR", header) + small[33:])
        for read in (read_image, read_label):
            with pytest.raises(DataError, match=r"image\.png: truncated, corrupt"):
                read(tmp_path / "image.png")
    photo = jpeg()
    frame = photo.index(b"\xff\xc0") + 5
    (tmp_path / "photo.jpg").write_bytes(photo[:frame] + b"\x7f\xff\x7f\xff" + photo[frame + 4 :])
    with pytest.raises(DataError, match=r"photo\.jpg: truncated, corrupt"):
        read_image(tmp_path / "photo.jpg")


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_only_when_asked(tmp_path: Path, orientation: int, order) -> None:
    for dtype in (np.uint8, np.uint16):
        deep = dtype == np.uint16
        pixels = (np.arange(24).reshape(4, 6) * (2730 if deep else 10)).astype(dtype)
        shown = np.asarray(pixels // (256 if deep else 1), np.uint8)
        (tmp_path / "image.tif").write_bytes(tiff(pixels, orientation, order))
        stored, upright = (read_image(tmp_path / "image.tif", upright=ask)[..., 1] for ask in (False, True))
        np.testing.assert_array_equal(stored, shown)
        np.testing.assert_array_equal(upright, turned(shown, orientation))


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(np.float32, "32-bit float"), (np.uint32, "32-bit unsigned"), (np.int16, "16-bit signed")],
)
@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_that_are_no_pixels_are_said(tmp_path: Path, dtype, said: str, order) -> None:
    (tmp_path / "depth.tif").write_bytes(tiff(np.ones((40, 60), dtype), order=order))
    with pytest.raises(DataError, match=rf"depth\.tif: is a TIFF of {said} numbers, as tifffile or rasterio"):
        read_image(tmp_path / "depth.tif")


def test_colours_that_opencv_misreads_are_said(tmp_path: Path) -> None:
    PIL.Image.new("LAB", (40, 60)).save(tmp_path / "Lab colours.tif")
    deep = cv2.imencode(".tif", scene().astype(np.uint16))[1].tobytes()
    planes = struct.pack("<HHI", 284, 3, 1)
    (tmp_path / "16-bit channels in separate planes.tif").write_bytes(
        deep.replace(planes + b"\1", planes + b"\2")
    )
    for file in tmp_path.iterdir():
        with pytest.raises(DataError, match=rf"\.tif: is a TIFF of {file.stem}, .* save it in RGB"):
            read_image(file)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_a_transparent_tiff_keeps_its_colours(tmp_path: Path, compression: str) -> None:
    photo, file = PIL.Image.fromarray(scene()), tmp_path / "photo.tif"
    photo.putalpha(100)
    photo.save(file, compression=compression, tiffinfo={274: 6})
    np.testing.assert_array_equal(read_image(file), scene())
    np.testing.assert_array_equal(read_image(file, upright=True), np.rot90(scene(), -1))
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"photo\.tif: truncated, corrupt"):
        read_image(file)


def test_a_cut_tiff_is_truncated(tmp_path: Path) -> None:
    whole = tiff(np.ones((40, 60), np.uint8))
    beyond = b"II+\0\x08\0\0\0" + b"\xff" * 60  # a BigTIFF whose directory lies beyond all files
    for content in (whole[:5], whole[:9], whole[:100], whole[:-60], beyond):
        (tmp_path / "image.tif").write_bytes(content)
        with pytest.raises(DataError, match=r"image\.tif: truncated, corrupt"):
            read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("read", [read_image, read_label])
def test_pictures_larger_than_opencv_reads_are_not_called_corrupt(tmp_path: Path, read) -> None:
    (tmp_path / "wide.png").write_bytes(huge_png(2, 1_100_000))
    with pytest.raises(DataError, match=r"wide\.png: is 2x1100000 px, larger than OpenCV reads .* tiles"):
        read(tmp_path / "wide.png")
    header = (40_000).to_bytes(4) * 2 + b"\1\0\0\0\0"
    content = chunk(b"IHDR", header) + chunk(b"IDAT", bytes(200_000)) + chunk(b"IEND", b"")
    (tmp_path / "many.png").write_bytes(PNG_SIGNATURE + content)
    with pytest.raises(DataError, match=r"many\.png: is 40000x40000 px, larger"):
        read(tmp_path / "many.png")


def test_formats_that_are_not_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "photo.png"
    for content, what in (
        (b"8BPS\0\1" + bytes(100), "is a Photoshop document, which is not read here; save it as PNG"),
        (bytes(128) + b"DICM" + bytes(9), "is a DICOM file"),
        (b"\0\0\0\x20ftypisom" + bytes(100), "is a film"),
        (b"RIFF\0\1\0\0AVI LIST" + bytes(100), "is a video"),
        (b"\0\0\1\0" + bytes(100), "is an icon"),
        (bytes(100) + b"TRUEVISION-XFILE.\0", "is a TGA picture"),
        (b"version https://git-lfs.github.com/spec/v1\noid", r"is a pointer of Git LFS \(git lfs pull gets"),
    ):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"photo.png: {what}"):
            read_image(file)
    file.write_bytes(tiff(np.ones((8, 8), np.uint8)))
    with pytest.raises(DataError, match=r"photo\.png: the label is a TIFF; save it as an 8-bit PNG"):
        read_label(file)


def test_heic_is_read_by_pillows_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "IMG_1.HEIC"
    file.write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DataError, match=r"IMG_1\.HEIC: is a HEIC photo; to read it, pip install pillow-heif"):
        read_image(file)
    photo = PIL.Image.fromarray(scene())
    registered: list[bool] = []
    plugin = SimpleNamespace(register_heif_opener=lambda: registered.append(True))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(PIL.Image, "open", lambda data: photo)
    np.testing.assert_array_equal(read_image(file), scene())
    assert registered == [True]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    with pytest.raises(DataError, match=r"IMG_1\.HEIC: truncated, corrupt"):
        read_image(file)
