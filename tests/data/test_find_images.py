"""Which images a folder of classes has: order, labels, links, what is left out or refused."""

import os

import pytest
from PIL import Image

from ait_jax.data import image_folder
from ait_jax.data.image_folder import find_images
from ait_jax.data.sources import DataError, Fit, load_images
from tests.support.image_files import fill, noise, save

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "set")


# Finding ------------------------------------------------------------------------------------------


def test_classes_and_files_are_sorted_as_torchvision_does(tmp_path):
    names = ["b/2.PNG", "b/10.jpg", "b/in/9.JpEg", "b/in/deep/1.tiff", "B/x.webp", "a b/z.bmp",
             "a b/y.ppm", "a b/.x.tif"]  # fmt: skip
    for name in [*names, "b/notes.txt", "b/3.gif", "top.jpg", "b/jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found, classes = find_images(str(tmp_path))
    assert classes == ["B", "a b", "b"]
    assert [(str(path.relative_to(tmp_path)), label) for path, label in found] == [
        ("B/x.webp", 0), ("a b/.x.tif", 1), ("a b/y.ppm", 1), ("a b/z.bmp", 1), ("b/10.jpg", 2),
        ("b/2.PNG", 2), ("b/in/9.JpEg", 2), ("b/in/deep/1.tiff", 2),
    ]  # fmt: skip


def test_folders_that_hold_no_classes(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "flat").mkdir()
    save(noise(4, 4), tmp_path / "flat" / "a.png")
    for name in ("", str(tmp_path / "none"), str(tmp_path / "file")):
        with pytest.raises(DataError, match="must name an existing folder") as caught:
            load_images(f"folder:{name}", "", "test")
        assert f"data.name = 'folder:{name}'" in str(caught.value)
    with pytest.raises(DataError, match="must hold a folder of images for each class"):
        load_images(f"folder:{tmp_path / 'flat'}", "", "test")
    monkeypatch.setenv("HOME", str(tmp_path))
    save(noise(4, 4), tmp_path / "good" / "c" / "a.png")
    assert len(find_images("~/good")[0]) == 1


def test_a_class_without_images_is_named(folder):
    (folder / "class2b" / "empty").mkdir(parents=True)
    (folder / "class2b" / "list.txt").touch()
    with pytest.raises(DataError, match=r"class2b holds no images \(jpg, jpeg, png, bmp") as caught:
        load_images(f"folder:{folder}", "", "test", fit=Fit((8, 8, 3)))
    assert len(str(caught.value).splitlines()) == 1


def test_the_number_of_classes_must_be_the_teachers(folder):
    name, fit = f"folder:{folder}", Fit((8, 8, 3))
    assert load_images(name, "", "test", fit=fit, num_classes=4).total == 23
    for wrong in (3, 5):
        with pytest.raises(DataError, match=f"4 class folders, .*num_classes = {wrong}") as caught:
            load_images(name, "", "test", fit=fit, num_classes=wrong)
        assert name in str(caught.value)


def tree(root, *names):
    """Small images, each of a grey of its own, with a class in each folder."""
    for i, name in enumerate(names):
        save(Image.new("L", (8, 8), 10 * i + 1), root / name)
    return root


def relative(root):
    return [(str(path.relative_to(root)), label) for path, label in find_images(str(root))[0]]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("a/again", "."),
        ("a/in/again", ".."),
        ("a/in/again", "."),
        ("a/up", ".."),  # to the folder of all classes
        ("a/in/up", "../../.."),
        ("a/absolute", "{root}/a"),
        ("a/in/root", "/"),
    ],
)
def test_links_that_lead_round_in_circles(tmp_path, link, target):
    root = tree(tmp_path / "set", "a/1.png", "a/in/2.png", "b/3.png")
    wanted = relative(root)
    assert len(wanted) == 3
    (root / link).symlink_to(target.format(root=root))
    assert relative(root) == wanted
    assert load_images(f"folder:{root}", "", "", fit=Fit((8, 8, 1))).total == 3


def test_circles_of_several_links(tmp_path):
    """Through a folder outside, which leads back to itself, to the class and to all classes."""
    root = tree(tmp_path / "set", "a/1.png", "b/2.png")
    outside = tree(tmp_path / "outside", "3.png", "in/4.png")
    (root / "a" / "out").symlink_to(outside)
    for i, target in enumerate((outside, root / "a", root, outside / "in")):
        (outside / "in" / f"back{i}").symlink_to(target)
    wanted = [("a/1.png", 0), ("a/out/3.png", 0), ("a/out/in/4.png", 0), ("b/2.png", 1)]
    assert relative(root) == wanted


def test_links_to_folders_and_files_elsewhere(tmp_path):
    tree(tmp_path / "else", "more/1.png", "more/deep/2.PNG", "single.png", "class/3.png")
    root = tree(tmp_path / "set", "a/0.png", "a/z/9.png")
    (root / "a" / "more").symlink_to(tmp_path / "else" / "more")
    (root / "a" / "once more").symlink_to("../../else/more")
    (root / "a" / "deep").symlink_to(tmp_path / "else" / "more" / "deep")
    (root / "a" / "b").symlink_to("z")  # The folder's own place is the one that counts.
    (root / "a" / "link.png").symlink_to(tmp_path / "else" / "single.png")
    (root / "c").symlink_to(tmp_path / "else" / "class")
    found = relative(root)
    assert [name for name, _ in found if name.startswith("a/z")] == ["a/z/9.png"]
    assert {name.split("/")[-1] for name, _ in found} == {
        "0.png", "9.png", "1.png", "2.PNG", "link.png", "3.png"
    }  # fmt: skip
    assert len(found) == 6 and found[-1] == ("c/3.png", 1)
    assert found == relative(root)
    images = load_images(f"folder:{root}", "", "", fit=Fit((8, 8, 1)))
    assert sorted(images.images[:, 0, 0, 0]) == [1, 1, 11, 11, 21, 31]


@pytest.mark.parametrize("target", ["b", "b/in", "{outside}"])
def test_one_folder_in_two_classes_is_refused(tmp_path, target):
    root = tree(tmp_path / "set", "a/1.png", "b/2.png", "b/in/3.png")
    outside = tree(tmp_path / "outside", "4.png")
    (root / "b" / "out").symlink_to(outside)
    (root / "a" / "link").symlink_to(root / target.format(outside=outside))
    with pytest.raises(
        DataError, match=r"\(class 'a'\) and .* \(class 'b'\) are the same"
    ) as caught:
        find_images(str(root))
    assert str(root / "a" / "link") in str(caught.value)
    (root / "a" / "link").unlink()
    assert len(find_images(str(root))[0]) == 4
    # A class that is another one, or all of them.
    for name, other in (("c", "a"), ("c", "."), ("c", str(outside))):
        (root / name).symlink_to(other)
        with pytest.raises(DataError, match=r"are the same folder, .* only one label"):
            find_images(str(root))
        (root / name).unlink()


@pytest.mark.parametrize("link", ["b", "a/2.png", "a/more", "a/in/more"])
def test_links_that_lead_nowhere_are_named(tmp_path, link):
    root = tree(tmp_path / "set", "a/1.png", "a/in/1.png")
    (root / link).symlink_to("gone")
    (root / "a" / ".#1.png").symlink_to("user@host")  # of an editor
    with pytest.raises(DataError, match=r"leads nowhere \(gone\): mend it, or remove it") as caught:
        find_images(str(root))
    assert str(root / link) in str(caught.value)
    (root / link).unlink()
    assert len(find_images(str(root))[0]) == 2
    (root / "a" / "self").symlink_to("self")
    with pytest.raises(DataError, match="a/self"):
        find_images(str(root))


def test_what_is_no_image_by_its_name_or_kind(tmp_path):
    """macOS leaves `._NAME` beside files on foreign disks; a pipe could not be read to its end."""
    root = tree(tmp_path / "set", "a/1.png", "a/.2.JPG", "a/in/3.TiFf")
    for name in ("a/._1.png", "a/in/._3.tiff"):
        (root / name).write_bytes(b"\0\5\x16\7")
    os.mkfifo(root / "a" / "pipe.png")
    assert relative(root) == [("a/.2.JPG", 0), ("a/1.png", 0), ("a/in/3.TiFf", 0)]
    (root / "b").mkdir()
    (root / "b" / "._1.png").touch()
    with pytest.raises(DataError, match="b holds no images"):
        find_images(str(root))


@pytest.mark.parametrize("name", ["", "a", "a/in"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, name):
    """Its images would be missing without a word."""
    root = tree(tmp_path / "set", "a/1.png", "a/in/2.png")
    scandir = os.scandir

    def refused(folder):  # The superuser may read any folder.
        if str(folder) == str(root / name):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(image_folder.os, "scandir", refused)
    with pytest.raises(DataError, match="cannot be read: Permission denied") as caught:
        find_images(str(root))
    assert str(root / name) in str(caught.value)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["1", "2", "10"], ("'10' is label 1", "'2', label 2")),
        (["0", "5", "50", "7"], ("'50' is label 2", "'7', label 3")),
        (["-1", "-2", "0"], ("'-1' is label 0", "'-2', label 1")),
        (["01", "02", "10"], None),
        (["0", "1", "2"], None),
        (["1", "2", "10", "other"], None),
        (["n10", "n2"], None),
    ],
)
def test_numbered_classes_in_the_order_of_text_are_hinted_at(tmp_path, caplog, names, said):
    tree(tmp_path, *(f"{name}/image.png" for name in names))
    assert load_images(f"folder:{tmp_path}", "", "").classes == tuple(sorted(names))
    assert len(caplog.messages) == (said is not None)
    for part in said or ():
        assert part in caplog.text


def test_leading_zeros_order_numbered_classes(tmp_path, caplog):
    """What the hint advises."""
    tree(tmp_path, *(f"{i}/image.png" for i in range(12)))
    assert load_images(f"folder:{tmp_path}", "", "").images[2, 0, 0, 0] == 101
    assert "leading zeros (01, 02, 10)" in caplog.text
    for i in range(12):
        (tmp_path / str(i)).rename(tmp_path / f"{i:02}")
    caplog.clear()
    images = load_images(f"folder:{tmp_path}", "", "").images
    assert images[:, 0, 0, 0].tolist() == [10 * i + 1 for i in range(12)] and not caplog.messages
