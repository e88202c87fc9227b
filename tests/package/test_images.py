"""读者自己的图像：各种位深、透明、转向、太大、损坏；路径里有方括号，文件名里有 test。"""

import numpy as np
import pytest
from PIL import Image

import book_utils
from book_utils import image_files, image_folder, open_rgb

RAMP = np.linspace(0, 1, 64)[None].repeat(4, axis=0)         # 从黑到白
EXPECTED = np.round(RAMP * 255)


def pixels(picture) -> np.ndarray:
    image = open_rgb(picture)
    assert image.mode == "RGB"
    return np.asarray(image).astype(float)


@pytest.mark.parametrize(("name", "values"), [
    ("16.png", (RAMP * 65535).astype(np.uint16)),
    ("16.tif", (RAMP * 65535).astype(np.uint16)),
    ("32.tif", (RAMP * 65535).astype(np.int32)),
    ("float.tif", RAMP.astype(np.float32)),
    ("float255.tif", (RAMP * 255).astype(np.float32)),
    ("8.png", EXPECTED.astype(np.uint8)),
])
def test_depths_are_rescaled(tmp_path, name, values):
    Image.fromarray(values).save(tmp_path / name)
    assert np.abs(pixels(tmp_path / name) - EXPECTED[..., None]).max() <= 1
    assert np.abs(pixels(Image.fromarray(values)) - EXPECTED[..., None]).max() <= 1


def test_hidden_colours_are_composed_on_white(tmp_path):
    colours = np.zeros((4, 3, 4), dtype=np.uint8)
    colours[..., 0] = 200                                       # 到处都藏着红色
    colours[:, 1, 3], colours[:, 2, 3] = 128, 255
    Image.fromarray(colours).save(tmp_path / "rgba.png")
    gray = Image.fromarray(np.dstack([np.full((4, 3), 10), colours[..., 3]]).astype(np.uint8), mode="LA")
    gray.save(tmp_path / "la.png")
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=0)

    red = pixels(tmp_path / "rgba.png")[0]
    assert red[0].tolist() == [255, 255, 255] and red[2].tolist() == [200, 0, 0]
    assert np.abs(red[1] - [227, 127, 127]).max() <= 1
    assert pixels(tmp_path / "la.png")[0, [0, 2]].tolist() == [[255] * 3, [10] * 3]
    assert pixels(tmp_path / "p.png")[0].tolist() == [[255, 255, 255], [0, 0, 200]]


def test_photos_are_turned_upright(tmp_path):
    image = Image.fromarray(np.repeat(EXPECTED.astype(np.uint8)[..., None], 3, axis=2))
    exif = image.getexif()
    exif[0x0112] = 6                                            # 要顺时针转 90 度
    image.save(tmp_path / "a.jpg", exif=exif)
    assert open_rgb(tmp_path / "a.jpg").size == (4, 64)


@pytest.mark.parametrize("values", [np.full((4, 4), np.nan), np.full((4, 4), -0.5), np.full((4, 4), 1000.0)])
def test_floats_out_of_range_are_explained(tmp_path, values):
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="x.tif 的取值应在 0 到 1（或 0 到 255）之间"):
        open_rgb(tmp_path / "x.tif")


def huge_png(path, side: int = 14_200) -> None:
    """两亿像素、全黑的 PNG：文件不到 30 KB。"""
    Image.new("1", (side, side)).save(path)


def test_two_hundred_megapixels_are_refused(tmp_path, recwarn):
    huge_png(tmp_path / "huge.png")
    for read in (open_rgb, lambda path: image_folder(path.parent)):
        with pytest.raises(ValueError, match="huge.png 太大，超过 89,478,485 个像素.*请先把它缩小"):
            read(tmp_path / "huge.png")
    assert not [warning for warning in recwarn if "Decompression" in str(warning.category)]


@pytest.mark.parametrize("keep", [0, 60, 200])
def test_damaged_files_are_named(tmp_path, keep):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "坏.png")
    (tmp_path / "坏.png").write_bytes((tmp_path / "坏.png").read_bytes()[:keep])
    with pytest.raises(ValueError, match="坏.png 读不出来"):
        open_rgb(tmp_path / "坏.png")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="没有.png 读不出来"):
        open_rgb(tmp_path / "没有.png")


@pytest.fixture
def folder(tmp_path):
    """路径里有方括号与星号，有子文件夹，文件名里有 train 与 test，还混着别的文件。"""
    folder = tmp_path / "[D_DATA]照片*"
    names = ["a.png", "test_b.png", "train.JPG", "子文件夹/test/c.webp"]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + i, 8), (40 * i, 0, 0)).save(folder / name)
    (folder / "说明.txt").write_text("不是图像", encoding="utf-8")
    (folder / ".缓存.png").write_bytes(b"")
    return folder


def test_every_image_is_found(folder):
    found = image_files(folder)
    assert [str(path.relative_to(folder)) for path in found] == ["a.png", "test_b.png", "train.JPG", "子文件夹/test/c.webp"]
    dataset = image_folder(str(folder))
    assert dataset.column_names == ["image"]
    assert [image.size for image in dataset["image"]] == [(8, 8), (9, 8), (10, 8), (11, 8)]


def test_folders_without_images_are_explained(tmp_path):
    with pytest.raises(ValueError, match="没有文件夹"):
        image_files(tmp_path / "没有")
    (tmp_path / "说明.txt").write_text("不是图像", encoding="utf-8")
    with pytest.raises(ValueError, match="里没有图像"):
        image_folder(tmp_path)


def test_exported_folder_reads_back(tmp_path):
    """export_imagefolder 写出的也是 8 位 RGB。"""
    dataset = book_utils.butterfly_dataset(3, image_size=16)
    folder = book_utils.export_imagefolder(dataset, tmp_path / "out")
    again = image_folder(folder)
    assert all(np.array_equal(a["image"], b["image"]) for a, b in zip(dataset, again, strict=True))
    book_utils.export_imagefolder([{"image": Image.new("RGBA", (4, 4), (255, 0, 0, 0))}], tmp_path / "clear")
    assert Image.open(tmp_path / "clear" / "00000.png").mode == "RGB"
