"""Reading image files of every mode, and finding them behind command-line arguments."""

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from dyntune.core.errors import DataError
from dyntune.data import expand_images, read_image
from dyntune.data.images import image_suffixes, list_images


def rgb(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_grey_palette_and_two_level_images_keep_their_colours(tmp_path):
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (rgb(tmp_path / "grey.png") == grey[..., None]).all()

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 150, 100])
    palette.putdata([1, 0])
    palette.save(tmp_path / "palette.png")
    assert rgb(tmp_path / "palette.png").tolist() == [[[200, 150, 100], [10, 20, 30]]]

    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert rgb(tmp_path / "bits.png").tolist() == [[[255] * 3, [0] * 3]]


def test_transparent_images_are_laid_on_white(tmp_path):
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 100, 200, 51]]], np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "rgba.png")
    alpha = pixels[..., 3:] / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(rgb(tmp_path / "rgba.png") - expected).max() <= 1

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 150, 100])
    palette.putdata([0, 1])
    palette.save(tmp_path / "clear.png", transparency=0)
    assert rgb(tmp_path / "clear.png").tolist() == [[[255, 255, 255], [200, 150, 100]]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 257, 25700, 32768, 65535]], np.uint16)
    # Written by hand, so that the file does not depend on how Pillow would store the array.
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(png)
    assert rgb(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 100, 128, 255]


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DataError, match=r"float\.tiff.*no defined white"):
        read_image(tmp_path / "float.tiff")


def test_cmyk_jpeg_has_the_colour_of_its_inks(tmp_path):
    # Full cyan ink takes all red out; half black ink halves what is left.
    Image.new("CMYK", (16, 16), (255, 0, 0, 128)).save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(rgb(tmp_path / "ink.jpg") - [0, 127, 127]).max() <= 3


@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_exif_orientation_turns_the_image_upright(tmp_path, orientation):
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels)
    image.save(tmp_path / "turned.png", exif=exif)
    if orientation == 6:  # to be shown turned a quarter clockwise
        assert (rgb(tmp_path / "turned.png") == np.rot90(pixels, k=-1)).all()
    with Image.open(tmp_path / "turned.png") as stored:
        assert (rgb(tmp_path / "turned.png") == np.asarray(ImageOps.exif_transpose(stored))).all()


def test_a_malformed_exif_tag_does_not_keep_an_image_from_being_turned(tmp_path):
    orientation = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    text_for_a_number = struct.pack("<HHI4s", 0x0128, 2, 4, b"ab")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + orientation + text_for_a_number + bytes(4)
    Image.new("RGB", (8, 6), "red").save(tmp_path / "photo.jpg", exif=exif)
    assert rgb(tmp_path / "photo.jpg").shape == (8, 6, 3)


def test_a_truncated_jpeg_is_an_error_that_names_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = tmp_path / "whole.jpg"
    Image.fromarray(noise).save(whole)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert read_image(whole).size == (64, 64)
    with pytest.raises(DataError, match=r"cut\.jpg.*truncated"):
        read_image(cut)


def test_missing_and_non_image_files_are_errors_that_name_them(tmp_path):
    (tmp_path / "words.jpg").write_text("no image")
    with pytest.raises(DataError, match=r"words\.jpg.*cannot be read"):
        read_image(tmp_path / "words.jpg")
    with pytest.raises(DataError, match=r"absent\.jpg.*no such"):
        read_image(tmp_path / "absent.jpg")


@pytest.mark.parametrize("name", ["photo.jpg", "drawing.eps"])
def test_a_program_in_the_place_of_an_image_is_not_run(tmp_path, monkeypatch, name):
    """Pillow has Ghostscript run PostScript, whatever its file is called."""
    ran, interpreter = tmp_path / "ran", tmp_path / "gs"
    interpreter.write_text(f"#!/bin/sh\ntouch {ran}\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", str(interpreter))
    (tmp_path / name).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with Image.open(tmp_path / name) as image, pytest.raises(OSError):
        image.load()
    assert ran.exists()
    ran.unlink()
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_image(tmp_path / name)
    assert not ran.exists() and ".eps" not in image_suffixes()


def test_a_pipe_in_the_place_of_an_image_is_no_wait(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png.*no regular file"):
        read_image(tmp_path / "a.png")


@pytest.fixture
def photos(tmp_path):
    for name in ("b.JPG", "a.png", "deep/er/c.webp", "notes.txt", "._a.png", ".hidden/d.png", "odd[1].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_expand_images_takes_files_folders_and_patterns(photos):
    def names(*arguments):
        return [str(path.relative_to(photos)) for path in expand_images([str(photos / each) for each in arguments])]

    assert names("") == ["a.png", "b.JPG", "deep/er/c.webp", "odd[1].png"]
    assert names("b.JPG", "a.png") == ["b.JPG", "a.png"]
    assert names("*.png") == ["a.png", "odd[1].png"]
    assert names("**/*.webp") == ["deep/er/c.webp"]
    assert names("de*") == ["deep/er/c.webp"]
    assert names("odd[1].png") == ["odd[1].png"]
    assert names("notes.txt") == ["notes.txt"]
    (photos / "odd[1].png").rename(photos / "deep/odd[1].png")
    (photos / "deep").rename(photos / "set [2024] {a}")
    assert names("set [2024] {a}/*.png") == ["set [2024] {a}/odd[1].png"]
    assert names("set [2024] {a}/er/*.webp") == names("set*/er/*") == ["set [2024] {a}/er/c.webp"]
    (photos / "set [2024] {a}").rename(photos / "deep")
    (photos / "deep/odd[1].png").rename(photos / "odd[1].png")
    assert names("b.JPG", "*") == ["b.JPG", "a.png", "deep/er/c.webp", "odd[1].png"]


@pytest.mark.parametrize("argument", ["gone.jpg", "*.gif", "empty", "", "~nobody/x.png"])
def test_expand_images_names_the_argument_that_matches_nothing(photos, argument, monkeypatch):
    (photos / "empty").mkdir()
    monkeypatch.chdir(photos)
    with pytest.raises(DataError, match=f"no image found for '{argument.replace('*', '[*]')}'"):
        expand_images(["a.png", argument])


def test_a_folder_linked_into_itself_is_listed_once(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "again").symlink_to(tmp_path)
    assert expand_images([str(tmp_path)]) == [tmp_path / "a.png"]


def test_what_a_pattern_finds_beside_images_is_counted(tmp_path, caplog):
    for name in ("a.png", "notes.txt", "more.txt", "b.csv", ".hidden"):
        (tmp_path / name).touch()
    assert expand_images([str(tmp_path / "*")]) == [tmp_path / "a.png"]
    assert caplog.messages == [
        f"{tmp_path / '*'}: left out 3 files that are no images which Pillow reads: 2 .txt, 1 .csv."
    ]


def test_an_error_names_the_usual_suffixes_and_counts_the_others(tmp_path):
    with pytest.raises(DataError) as error:
        expand_images([str(tmp_path)])
    assert re.search(r"\(\.jpg, \.jpeg, \.png, .* and \d+ more\)", str(error.value)) and len(str(error.value)) < 300


def test_a_folder_that_cannot_be_looked_into_is_named_and_not_left_out(tmp_path, monkeypatch):
    for folder in ("", "more"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / folder / "1.png")
    assert len(list_images(tmp_path)) == 2
    look = os.scandir

    def scandir(path):
        if Path(path).name == "more":
            raise PermissionError(13, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"more: the folder cannot be looked into \(Permission denied\)"):
        list_images(tmp_path)
