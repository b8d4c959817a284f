"""Masks and boxes in files: what is read, what is refused, what is counted; images and targets move together."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from omnissm.vision.data import CocoBoxes, MaskFolder, dense_base
from omnissm.vision.data.coco_file import CROWD, CUT, DEGENERATE, EMPTY, MISSING_IMAGE, UNKNOWN_CATEGORY
from omnissm.vision.data.joint import Colours, View, fitted_size, train_view
from omnissm.vision.data.masks import read_mask

CLASSES = ["background", "thing"]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path)


@pytest.fixture
def masks(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(6):
        height, width = 20 + k, 31
        save(tmp_path / "images" / f"{k}.png", rng.integers(0, 256, (height, width, 3)))
        save(tmp_path / "masks" / f"{k}.png", rng.integers(0, 2, (height, width)))
    return tmp_path


@pytest.fixture
def coco(tmp_path):
    """Ids with gaps; one image without boxes, degenerate, cut and crowd boxes."""
    for name in ("a", "b", "c"):
        save(tmp_path / "images" / f"{name}.png", np.full((40, 60, 3), 90))
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 40, "width": 60},
            {"id": 100, "file_name": "b.png", "height": 40, "width": 60},
            {"id": 3, "file_name": "c.png", "height": 40, "width": 60},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [10, 5, 20, 30], "area": 123.0, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 4, "bbox": [50, 30, 20, 20]},
            {"id": 3, "image_id": 100, "category_id": 4, "bbox": [0, 0, 30, 20], "iscrowd": 1},
            {"id": 4, "image_id": 100, "category_id": 4, "bbox": [30, 5, 1e-7, 10]},
            {"id": 5, "image_id": 100, "category_id": 4, "bbox": [70, 5, 10, 10]},
            {"id": 6, "image_id": 100, "category_id": 4, "bbox": [1, 2, float("nan"), 10]},
        ],
        "categories": [{"id": 90, "name": "late"}, {"id": 4, "name": "early"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path, content


def write(root, content, name="train.json"):
    (root / name).write_text(json.dumps(content))


def test_boxes_of_a_file_with_gaps_crowds_and_faulty_boxes(coco):
    root, _ = coco
    data = CocoBoxes(root, image_size=(40, 60), augment="none")
    assert data.num_classes == 2
    assert data.classes == ["early", "late"]
    assert data.categories == [4, 90]
    assert data.counts == {DEGENERATE: 3, CUT: 1, CROWD: 1, EMPTY: 1}
    first, second, third = data.part("train").records
    assert (first.boxes, first.labels, first.area) == ([(10, 5, 30, 35), (50, 30, 60, 40)], [1, 0], [123.0, 100.0])
    assert (second.crowd, third.boxes) == ([True], [])
    batch = next(iter(data.eval_loader("train")))
    assert batch.labels.tolist() == [[1, 0], [0, -1], [-1, -1]]
    assert batch.crowd.tolist() == [[False, False], [True, False], [False, False]]
    torch.testing.assert_close(batch.boxes[0, 0], torch.tensor([10.0, 5, 30, 35]))
    trained = data.part("train")[1][1]
    assert len(trained["labels"]) == 0  # crowd regions are not trained on


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [
        (lambda c: c["images"][0].update(file_name="gone.png"), "gone.png: image file missing", MISSING_IMAGE),
        (lambda c: c["annotations"][0].update(category_id=5), "category 5", UNKNOWN_CATEGORY),
        (lambda c: c["annotations"][0].update(image_id=8), "image 8", "annotation of an unknown image"),
        (
            lambda c: c["images"][0].update(width=61),
            "60 x 40, announced 61 x 40",
            "image of another size than announced",
        ),
    ],
)
def test_faults_of_annotation_files_raise_or_are_counted(coco, change, message, kind):
    root, content = coco
    change(content)
    write(root, content)
    with pytest.raises(ValueError, match=message):
        CocoBoxes(root).setup()
    data = CocoBoxes(root, on_bad="skip")
    assert data.num_classes == 2
    assert data.counts[kind] == 1
    assert sum(len(record.boxes) for record in data.part("train").records) in (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c["images"][0].pop("height"), "an image has no 'height'"),
        (lambda c: c["annotations"][0].pop("bbox"), "an annotation has no 'bbox'"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox must be"),
        (lambda c: c["images"][1].update(id=7), "two images with the id 7"),
        (lambda c: c["categories"][1].update(id=90), "different ids"),
        (lambda c: c["categories"][1].update(name="late"), "different names, got late, late"),
        (lambda c: c["categories"][1].update(id="x"), "a category needs a whole number as 'id'"),
        (lambda c: c["categories"][1].update(id=None), "a category needs a whole number as 'id'"),
        (lambda c: c["images"][0].update(height="tall"), "an image needs a whole number as 'height'"),
        (lambda c: c["images"][0].update(width=0), "an image needs 'width' of at least 1"),
        (lambda c: c["images"][0].update(id=[1]), "needs a number or a text as 'id'"),
        (lambda c: c["annotations"][0].update(image_id=[1]), "needs a number or a text as 'image_id'"),
        (lambda c: c["annotations"][0].update(category_id={}), "needs a number or a text as 'category_id'"),
        (lambda c: c["annotations"][0].update(iscrowd="0"), "iscrowd must be 0 or 1, got '0'"),
        (lambda c: c.update(annotations=[]), "no box to learn from"),
    ],
)
def test_broken_annotation_files(coco, change, message):
    root, content = coco
    change(content)
    write(root, content)
    with pytest.raises(ValueError, match=message):
        CocoBoxes(root, on_bad="skip").setup()


def test_other_categories_in_another_part_and_no_json(coco):
    root, content = coco
    write(root, {**content, "categories": content["categories"][::-1]}, "val.json")  # the order does not matter
    assert CocoBoxes(root).num_classes == 2
    write(root, {**content, "categories": [{"id": 4, "name": "early"}, {"id": 90, "name": "else"}]}, "val.json")
    with pytest.raises(ValueError, match="training early, late"):
        CocoBoxes(root).setup()
    (root / "train.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        CocoBoxes(root).setup()
    with pytest.raises(FileNotFoundError, match="COCO's layout"):
        CocoBoxes(root / "images").setup()


def test_masks_keep_their_size_in_evaluation(masks):
    data = MaskFolder(masks, CLASSES, image_size=16, val_share=0.5, augment="none", eval_batch_size=3)
    assert data.num_classes == 2
    batch = next(iter(data.val_dataloader()))
    assert batch.image.shape == (3, 3, 16, 16)
    for k in range(3):
        height, width = batch.size[k].tolist()
        path = data.part("val").mask_paths[k]
        torch.testing.assert_close(batch.mask[k, :height, :width], torch.from_numpy(np.array(Image.open(path))).long())
        assert (batch.mask[k, height:] == 255).all()
    names = {path.stem for part in ("train", "val") for path in data.part(part).paths}
    assert len(names) == 6


def test_a_test_on_validation_images_is_told(masks, caplog):
    data = MaskFolder(masks, CLASSES, image_size=32, val_share=0.5)
    assert len(data.test_dataloader().dataset) == 3
    assert "no test part: the validation images are tested" in caplog.text
    caplog.clear()
    rows = [f"{k},{'train' if k < 4 else 'test'}" for k in range(6)]
    (masks / "labels.csv").write_text("\n".join(["id,split", *rows]))
    data = MaskFolder(masks, CLASSES, image_size=32)
    assert len(data.test_dataloader().dataset) == 2
    assert not caplog.text


def test_masks_by_table_and_by_folders(masks):
    (masks / "labels.csv").write_text("id,split\n" + "".join(f"{k},{'val' if k > 3 else 'train'}\n" for k in range(6)))
    data = MaskFolder(masks, CLASSES)
    assert [len(data.part(name)) for name in ("train", "val")] == [4, 2]
    with pytest.raises(ValueError, match="no part 'test', only train, val"):
        data.part("test")
    (masks / "labels.csv").write_text("id,split\n0,dev\n")
    with pytest.raises(ValueError, match="expected train, val or test"):
        MaskFolder(masks, CLASSES).setup()
    (masks / "train").mkdir()
    for folder in ("images", "masks"):
        (masks / folder).rename(masks / "train" / folder)
    assert len(MaskFolder(masks, CLASSES).part("train")) == 6


@pytest.mark.parametrize(
    ("change", "message", "kind"),
    [
        (lambda r: (r / "masks" / "2.png").unlink(), "without a mask", "image without a mask"),
        (lambda r: save(r / "masks" / "2.png", np.zeros((5, 5))), "31 x 22 and 5 x 5", "image and mask differ in size"),
        (lambda r: save(r / "masks" / "2.png", np.full((22, 31), 2)), "class 2 of 2", "mask with an unknown class"),
        (lambda r: save(r / "masks" / "2.png", np.zeros((22, 31, 3))), "mode RGB", "cannot be read"),
        (lambda r: (r / "images" / "2.png").write_bytes(b"x"), "not an image", "cannot be read"),
    ],
)
def test_faults_of_masks_raise_or_are_counted(masks, change, message, kind):
    change(masks)
    with pytest.raises(ValueError, match=message):
        MaskFolder(masks, CLASSES).setup()
    data = MaskFolder(masks, CLASSES, on_bad="skip", val_share=0.2)
    data.setup()
    assert data.counts == {kind: 1}
    assert len(data.part("train")) == 4


def test_masks_and_images_of_one_name(masks):
    (masks / "images" / "2.png").unlink()
    data = MaskFolder(masks, CLASSES, val_share=0.2)
    data.setup()
    assert data.counts == {"mask without an image left out": 1}
    save(masks / "images" / "3.bmp", np.zeros((23, 31, 3)))
    with pytest.raises(ValueError, match=r"has 3.bmp and 3.png; names need different stems"):
        MaskFolder(masks, CLASSES).setup()


@pytest.mark.parametrize("in_memory", [None, False])
def test_images_cut_off_behind_their_head_are_left_out(coco, in_memory):
    root, _ = coco
    path = root / "images" / "b.png"
    save(path, np.random.default_rng(0).integers(0, 256, (40, 60, 3)))
    path.write_bytes(path.read_bytes()[:2000])
    data = CocoBoxes(root, augment="none", in_memory=in_memory, on_bad="skip")
    assert [len(data.part("train")), data.counts["cannot be read"]] == [2, 1]
    assert all(image.shape[0] == 3 for image, *_ in data.part("train"))
    with pytest.raises(ValueError, match=r"b.png' cannot be read: image file is truncated.*Use on_bad='skip'"):
        CocoBoxes(root, augment="none", in_memory=in_memory).part("train")[1]


def test_masks_too_large_are_named(masks, monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"0.png' cannot be read: Image size \(620 pixels\) exceeds limit"):
        read_mask(masks / "masks" / "0.png")


def test_images_stay_in_memory_where_they_fit(coco, monkeypatch):
    root, _ = coco
    paths = [root / "images" / name for name in ("a.png", "b.png")]
    assert dense_base.decoded_bytes(paths, 10**9) == 2 * 3 * 40 * 60
    kept, read = (CocoBoxes(root, augment="none", in_memory=keep).part("train") for keep in (None, False))
    assert (len(kept.pictures.kept), read.pictures.kept) == (3, None)
    torch.testing.assert_close(kept[0][0], read[0][0])
    monkeypatch.setattr(dense_base, "MOST_BYTES", 2 * 3 * 40 * 60)
    assert CocoBoxes(root).part("train").pictures.kept is None
    assert len(CocoBoxes(root, in_memory=True).part("train").pictures.kept) == 3


def test_masks_stay_in_memory_beside_their_images(masks, monkeypatch):
    part = MaskFolder(masks, CLASSES, val_share=0.2).part("train")
    assert len(part.pictures.kept) == len(part.kept) == len(part)
    monkeypatch.setattr(dense_base, "MOST_BYTES", 1000)
    part = MaskFolder(masks, CLASSES, val_share=0.2).part("train")
    assert part.pictures.kept is part.kept is None


def test_unknown_pixels_and_palettes(masks):
    values = np.full((22, 31), 255, np.uint8)
    values[3, 4] = 1
    image = Image.fromarray(values)
    image.putpalette([9, 9, 9] * 256)
    image.save(masks / "masks" / "2.png")
    data = MaskFolder(masks, CLASSES, val_share=0.2)
    part = next(data.part(p) for p in ("train", "val") if any(x.stem == "2" for x in data.part(p).mask_paths))
    row = [x.stem for x in part.mask_paths].index("2")
    part.view = None
    assert part[row][1].unique(return_counts=True)[1].tolist() == [1, 681]
    with pytest.raises(ValueError, match="2 to 254 classes"):
        MaskFolder(masks, ["one"])
    with pytest.raises(FileNotFoundError, match="expected images as"):
        MaskFolder(masks / "nowhere", CLASSES).setup()


@pytest.mark.parametrize("size", [(32, 48), (9, 7), (64, 64)])
def test_boxes_masks_and_images_move_together(size):
    """A bright rectangle, its mask and its box, through random views: they agree to a pixel."""
    from torchvision import tv_tensors

    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    mask = (image[0] > 0).to(torch.uint8)
    view = train_view((64, 80), "cells", {"colour": 0.0})
    kept = 0
    for seed in range(20):
        torch.manual_seed(seed)
        boxes = tv_tensors.BoundingBoxes(torch.tensor([[20.0, 10, 50, 30]]), format="XYXY", canvas_size=(40, 60))
        target = {"boxes": boxes, "labels": torch.tensor([3]), "mask": tv_tensors.Mask(mask)}
        seen, moved = view(tv_tensors.Image(image), {k: target[k] for k in ("boxes", "labels")})
        torch.manual_seed(seed)
        again, masked = view(tv_tensors.Image(image), {"mask": target["mask"]})
        torch.testing.assert_close(seen, again)
        assert seen.shape == (3, 64, 80)
        inside = torch.nonzero(masked["mask"] == 1)
        bright = torch.nonzero(seen[0] > 190)
        assert (inside.amin(0) - bright.amin(0)).abs().max() <= 1
        if len(moved["labels"]):
            kept += 1
            x0, y0, x1, y1 = moved["boxes"][0].tolist()
            found = torch.cat([inside.amin(0), inside.amax(0) + 1]).float()
            assert (torch.tensor([y0, x0, y1, x1]) - found).abs().max() <= 1
    assert kept >= 15
    fitted, _ = View(size)(tv_tensors.Image(image), {})
    assert fitted.shape == (3, *size)


def test_colours_change_as_torchvision_changes_them():
    """Brightness, contrast and saturation one after another; where nothing is cut the order is the only freedom."""
    from torchvision.transforms.v2 import functional as tvf

    image = torch.randint(90, 160, (3, 9, 11), dtype=torch.uint8)
    torch.manual_seed(5)
    brightness, contrast, saturation = (1 + 0.3 * (2 * torch.rand(3) - 1)).tolist()
    turn = 0.03 * (2 * float(torch.rand(())) - 1)
    expected = tvf.adjust_brightness(image / 255, brightness)
    expected = tvf.adjust_saturation(tvf.adjust_contrast(expected, contrast), saturation)
    torch.manual_seed(5)
    seen, _ = Colours(0.3)(image, {})
    luminance = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(*(torch.einsum("c,chw->hw", luminance, x) for x in (seen, expected)), atol=2e-3, rtol=0)
    assert (seen - expected).abs().max() < 3 * abs(turn)  # the hue's turn, in radians, of colours up to 0.2 from grey
    still, _ = Colours(0.0)(image, {})
    torch.testing.assert_close(still, image / 255, atol=1e-3, rtol=0)


def test_grey_stays_grey_and_bright_pixels_are_cut():
    grey = torch.arange(0, 256, 5, dtype=torch.uint8).expand(3, 4, -1)
    for seed in range(5):
        torch.manual_seed(seed)
        seen, _ = Colours(1.0)(grey, {})
        torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=0)
        torch.testing.assert_close(seen[0], seen[2], atol=1e-5, rtol=0)
        assert seen.min() >= 0
        assert seen.max() <= 1


def test_fitted_size_of_extreme_images():
    assert fitted_size(1, 1000, (32, 32)) == (1, 32)
    assert fitted_size(480, 640, (384, 512)) == (384, 512)
    assert fitted_size(100, 50, (64, 64)) == (64, 32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("strong", None, "augment must be one of none"),
        ("flip", {"zom": 1}, "no option 'zom'"),
        ("flip", {"zoom": 2}, "a pair"),
        ("flip", {"zoom": [2, 1]}, "a pair"),
        ("flip", {"colour": 1.5}, "strength in"),
    ],
)
def test_unknown_augmentation(name, options, message):
    with pytest.raises(ValueError, match=message):
        train_view((8, 8), name, options)


def test_real_sets(shared_data):
    for name in ("bccd_det", "wbc_seg"):
        if not (shared_data / "vision" / name).is_dir():
            pytest.skip(f"no {name}")
    boxes = CocoBoxes(shared_data / "vision" / "bccd_det", image_size=(96, 128), in_memory=False)
    assert sum(len(r.boxes) for r in boxes.part("train").records) == 1701
    assert boxes.classes == ["RBC", "WBC", "Platelets"]
    assert sum(len(r.boxes) for r in boxes.part("val").records) == 548
    masks = MaskFolder(shared_data / "vision" / "wbc_seg", ["a", "b", "c"], image_size=64, in_memory=False)
    assert [len(masks.part(name)) for name in ("train", "val")] == [160, 40]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"colour": "much"}, r"colour is a strength in \[0, 1\], got 'much'"),
        ({"colour": 1.5}, "got 1.5"),
        ({"zoom": ["a", "b"]}, r"zoom is a pair \[smallest, largest\] of positive numbers"),
        ({"zoom": [2, 1]}, "zoom is a pair"),
        ({"upside_down": "no"}, "upside_down is true or false, got 'no'"),
        ({"color": 0.1}, "no option 'color'"),
    ],
    ids=str,
)
def test_augmentations_that_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        train_view((8, 8), "cells", options)
