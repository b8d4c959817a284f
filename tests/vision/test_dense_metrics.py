"""Average precision and overlap against pycocotools, torchmetrics and the definition, on random predictions."""

import contextlib
import io
import json
import math

import pytest
import torch

from omnissm.vision.data.dense_batches import collate_boxes
from omnissm.vision.dense.detection import compare
from omnissm.vision.dense.detectors import Found
from omnissm.vision.dense.metrics import average_precision, confusion, mean_overlap, overlap_table, precision_table


def test_overlap_is_that_of_torchmetrics_and_of_the_definition():
    from torchmetrics.classification import MulticlassJaccardIndex

    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 4, (6, 17, 13), generator=generator)
    said = torch.where(torch.rand(truth.shape, generator=generator) < 0.6, truth, (truth + 1) % 4)
    truth[torch.rand(truth.shape, generator=generator) < 0.1] = 255
    metric = confusion(4)
    for k in range(0, 6, 2):
        metric.update(said[k : k + 2], truth[k : k + 2])
    peer = MulticlassJaccardIndex(4, average="none", ignore_index=255)
    rows = overlap_table(metric.compute(), "abcd")
    torch.testing.assert_close(torch.tensor([row["iou"] for row in rows]), peer(said, truth))
    known = truth != 255
    for k, row in enumerate(rows):
        hit = ((said == k) & (truth == k)).sum()
        assert row["recall"] == pytest.approx(float(hit / (truth == k).sum()))
        assert row["precision"] == pytest.approx(float(hit / ((said == k) & known).sum()))
        assert row["dice"] == pytest.approx(2 * row["iou"] / (1 + row["iou"]))
    mean = mean_overlap(metric.compute())
    assert mean["miou"] == pytest.approx(sum(row["iou"] for row in rows) / 4)
    assert mean["accuracy"] == pytest.approx(float((said == truth)[known].float().mean()))


def test_a_class_that_does_not_occur_is_left_out_of_the_mean():
    metric = confusion(3)
    metric.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 0]]))
    assert mean_overlap(metric.compute())["miou"] == pytest.approx(0.5)
    assert math.isnan(overlap_table(metric.compute(), "abc")[2]["iou"])


def scene(seed, images=12):
    """Random boxes of three classes, crowds among them, and predictions that miss, double and blur some."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.rand(*size, generator=generator)

    samples, predicted = [], []
    for k in range(images):
        count = int(rand(1) * 7)
        corner, extent = rand(count, 2) * 60, 5 + rand(count, 2) * 35
        boxes = torch.cat([corner, (corner + extent).clamp(max=100)], dim=1)
        labels = (rand(count) * 3).long()
        area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        target = {"boxes": boxes, "labels": labels, "crowd": rand(count) < 0.15, "area": area}
        samples.append((torch.zeros(3, 50, 50), target, (100, 100), k))
        shift = torch.randn(count, 4, generator=generator) * 3
        keep, extra = rand(count) < 0.8, int(rand(1) * 4)
        more = rand(extra, 2) * 60
        found = torch.cat([(boxes + shift)[keep], torch.cat([more, more + 20], dim=1)])
        named = torch.cat([labels[keep], (rand(extra) * 3).long()])
        predicted.append((found.clamp(0, 100), rand(len(found)), named))
    return samples, predicted


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_precision_is_that_of_pycocotools(seed):
    """Our path (batches of images at half size, back to pixels of the originals) beside pycocotools on JSON files."""
    pytest.importorskip("pycocotools")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    samples, predicted = scene(seed)
    half = [(image, {**t, "boxes": t["boxes"] / 2}, size, k) for image, t, size, k in samples]
    batch = collate_boxes(half)
    metric = average_precision()
    metric.update(*compare([Found(boxes / 2, scores, labels) for boxes, scores, labels in predicted], batch))
    ours = metric.compute()

    def entry(box):
        return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]

    truth = {"info": {}, "images": [{"id": k} for k in range(len(samples))], "annotations": []}
    truth["categories"] = [{"id": c} for c in (1, 2, 3)]
    results = []
    for _, target, _, k in samples:
        for box, label, crowd, area in zip(*(target[n] for n in ("boxes", "labels", "crowd", "area"))):
            about = {"id": len(truth["annotations"]) + 1, "image_id": k, "category_id": int(label) + 1}
            truth["annotations"].append({**about, "bbox": entry(box), "iscrowd": int(crowd), "area": float(area)})
        for box, score, label in zip(*predicted[k]):
            results.append({"image_id": k, "category_id": int(label) + 1, "bbox": entry(box), "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = json.loads(json.dumps(truth))
        coco.createIndex()
        peer = COCOeval(coco, coco.loadRes(results), "bbox")
        peer.evaluate()
        peer.accumulate()
        peer.summarize()
    assert 0.1 < peer.stats[0] < 0.9
    for key, value in zip(("map", "map_50", "map_75"), peer.stats[:3]):
        assert float(ours[key]) == pytest.approx(value, abs=1e-6)
    assert float(ours["mar_100"]) == pytest.approx(peer.stats[8], abs=1e-6)
    rows = precision_table(ours, "abc")
    curves = peer.eval["precision"][:, :, :, 0, -1]
    for k, row in enumerate(rows):
        assert row["ap"] == pytest.approx(curves[:, :, k].mean(), abs=1e-6)
        assert row["ap50"] == pytest.approx(curves[0, :, k].mean(), abs=1e-6)
        assert row["ap75"] == pytest.approx(curves[5, :, k].mean(), abs=1e-6)


def test_a_class_without_boxes_has_no_precision():
    pytest.importorskip("pycocotools")
    metric = average_precision()
    box = torch.tensor([[0.0, 0, 10, 10]])
    one = {"boxes": box, "labels": torch.tensor([1])}
    metric.update([{**one, "scores": torch.tensor([0.9])}], [one])
    rows = precision_table(metric.compute(), ["a", "b", "c"])
    assert rows[1]["ap"] == pytest.approx(1.0)
    assert all(math.isnan(rows[k]["ap"]) for k in (0, 2))
