"""Heads, segmenters and detectors: sizes, gradients, and the equations of assignment and losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from omnissm.vision.dense.assignment import Assigned, assign, detection_loss, distribution_loss
from omnissm.vision.dense.detectors import choose, create_detector, pyramid_backbone
from omnissm.vision.dense.features import Features
from omnissm.vision.dense.heads import SegMANDecoder, create_head
from omnissm.vision.dense.segmentation import SemanticSegmentation
from omnissm.vision.dense.segmenter import create_segmenter, slide, unfitted
from omnissm.vision.dense.yolo import BINS, SIZES, Raw, Yolo, decoded

SMALL = {"dim": 8, "depths": [1, 1, 1, 1], "mlp_ratio": 2.0}
TOKENS = {"embed_dim": 32, "depth": 4, "headdim": 32, "d_state": 8, "dynamic_img_size": True}
TINY_YOLO = {"widths": (8, 8, 16, 16), "depths": (1, 1, 1, 1)}


@pytest.mark.parametrize("head", ["fpn", "upernet", "segman"])
def test_heads_train_all_weights_and_keep_odd_sizes(head):
    net = create_segmenter("vmamba_tiny_s1l8", 3, SMALL, head=head, head_args={"width": 8}, auxiliary=8)
    logits, second = net(torch.randn(2, 3, 70, 53), auxiliary=True)
    assert logits.shape == second.shape == (2, 3, 70, 53)
    (logits.square().mean() + second.square().mean()).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []
    net.eval()
    for size in ((1, 1), (33, 5), (31, 64)):
        assert net(torch.randn(1, 3, *size)).shape == (1, 3, *size)


@pytest.mark.parametrize(
    ("backbone", "options", "strides"),
    [
        ("hydra_vit_tiny_patch16_224", TOKENS, [4, 8, 16, 32]),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)}, [4, 8, 16, 32]),
        ("resnet10t", {}, [2, 4, 8, 16, 32]),
    ],
)
def test_any_backbone_of_timm_gives_levels(backbone, options, strides):
    features = Features(backbone, options).eval()
    assert features.strides == strides
    levels = features(torch.randn(1, 3, 64, 64))
    shapes = [tuple(level.shape) for level in levels]
    assert shapes == [(1, c, 64 // s, 64 // s) for c, s in zip(features.channels, strides)]
    torch.testing.assert_close(levels[0].mean(1), torch.zeros_like(levels[0].mean(1)), atol=1e-4, rtol=0)  # normed


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="head must be one of fpn, upernet, segman, got 'unet'"):
        create_head("unet", [8, 8], 2)
    with pytest.raises(ValueError, match="Did you mean 'vmamba_tiny"):
        create_segmenter("vmamba_tiny_s1l9", 2)
    with pytest.raises(ValueError, match="torchvision has no segmentation model 'fcn'"):
        create_segmenter("torchvision/fcn", 2)
    with pytest.raises(ValueError, match="unknown detector 'yolo9'"):
        create_detector("yolo9", 2)
    with pytest.raises(ValueError, match="name its backbone"):
        create_detector("fcos", 2)
    with pytest.raises(ValueError, match="at least 2 images"):
        create_segmenter("vmamba_tiny_s1l8", 2, SMALL, head_args={"width": 8})(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: create_head("fpn", [8, 8], 2, foo=1), "head 'fpn' has no option 'foo'"),
        (lambda: create_head("fpn", [8, 8], 2, width=0), "width of the head 'fpn' must be at least 1"),
        (lambda: create_segmenter("vmamba_tiny_s1l8", 2, {"dimm": 8}), "'vmamba_tiny_s1l8' has no option 'dimm'"),
        (lambda: create_segmenter("torchvision/fcn_resnet50", 2, {"aux": 1}), "no option 'aux'"),
        (lambda: create_segmenter("torchvision/fcn_resnet50", 2, {}, auxiliary=8), "takes no auxiliary"),
        (lambda: SemanticSegmentation("torchvision/fcn_resnet50", backbone_lr=0.1), "backbone_lr must be 1"),
        (lambda: SemanticSegmentation(label_smoothing=1.0), "label_smoothing is a share"),
        (lambda: create_detector("yolo", 2, foo=1), "detector 'yolo' has no option 'foo'"),
        (lambda: create_detector("yolo", 2, widths=[8, 8]), "3 widths"),
        (lambda: create_detector("yolo", 2, gains={"boxes": 1}), "no loss 'boxes'"),
        (lambda: create_detector("yolo", 2, nms=2.0), "overlap in"),
        (lambda: create_detector("yolo", 2, backbone_args={"depth": 1}), "'mamba_yolo_tiny' has no option 'depth'"),
        (lambda: create_detector("ssd300_vgg16", 2, backbone="resnet10t"), "has its own backbone"),
    ],
)
def test_options_that_do_nothing_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_decoder_counts_weights_as_its_equations_do():
    e, f, channels = 16, 24, (8, 16, 24, 32)
    decoder = SegMANDecoder(channels, 5, e, f)
    wide = 3 * e
    rank = math.ceil(wide / 16)
    scan = wide * wide * 2 + 9 * wide + 4 * (rank + 2) * wide + 4 * wide * (rank + 1) + 8 * wide + 2 * wide
    block = 2 * (10 * wide) + 2 * 2 * wide + scan + wide * 4 * wide * 2 + 5 * wide
    lead = sum(c * f + f for c in channels[1:]) + 3 * f * e + 2 * e
    steps = 9 * e * 2 * e + 2 * e + 25 * e * 4 * e + 4 * e + sum(k * e * e + e for k in (16, 8, 4))
    tail = 2 * (e * e + e) + wide * f + f + (5 * e + 3 * f) * e + e + e * 5 + 5
    assert sum(p.numel() for p in decoder.parameters()) == lead + steps + block + tail


def test_no_cell_is_lost_on_the_way_to_the_coarse_scan():
    """A change of any single cell at stride 8 reaches the decoder's output, also in rows that were filled up."""
    decoder = SegMANDecoder((4, 4, 4), 2, 4, 4).eval()
    levels = [torch.randn(1, 4, n, n) for n in (7, 4, 2)]
    base = decoder(levels)
    for i, j in ((0, 0), (6, 6), (3, 5)):
        moved = [level.clone() for level in levels]
        moved[0][0, :, i, j] += 1
        assert (decoder(moved) - base)[0, :, i, j].abs().max() > 1e-6


def test_windows_of_a_pointwise_network_give_the_whole():
    net = torch.nn.Conv2d(3, 2, 1)
    image = torch.randn(3, 37, 90)
    for window in ((16, 32), (64, 64), (37, 90)):
        torch.testing.assert_close(slide(net, image, window), net(image[None])[0])
    with pytest.raises(ValueError, match="overlap"):
        slide(net, image, (8, 8), 1.0)


def test_unfitting_cuts_what_was_filled_up():
    maps = torch.zeros(2, 32, 32)
    maps[:, :16] = 1  # an image of 20 x 40 fills the upper half
    torch.testing.assert_close(unfitted(maps, (20, 40)), torch.ones(2, 20, 40))


def test_segmentation_loss_ignores_unknown_pixels_and_knows_perfection():
    task = SemanticSegmentation("vmamba_tiny_s1l8", SMALL, head="fpn", head_args={"width": 8}, num_classes=3, dice=1.0)
    mask = torch.randint(0, 3, (2, 8, 8))
    mask[0, :4] = 255
    logits = torch.randn(2, 3, 8, 8)
    other = logits.clone()
    other[0, :, :4] = 50 * torch.randn(3, 4, 8)
    torch.testing.assert_close(task.loss(logits, mask), task.loss(other, mask))
    known = mask != 255
    share = logits.softmax(1)
    expected = F.cross_entropy(logits, mask, ignore_index=255)
    scores = []
    for k in range(3):
        hit = share[:, k][known & (mask == k)].sum()
        scores.append((2 * hit + 1) / (share[:, k][known].sum() + (mask == k).sum() + 1))
    torch.testing.assert_close(task.loss(logits, mask), expected + 1 - torch.stack(scores).mean())
    perfect = 50 * F.one_hot(mask.where(known, 0), 3).movedim(-1, 1).float()
    assert task.loss(perfect, mask) < 1e-3
    assert task.loss(logits, torch.full_like(mask, 255)).isfinite()


def raw_of(centres, strides, scores, distances):
    return Raw(scores, distances, centres, strides)


def test_boxes_are_means_of_distributions_around_the_centre():
    distances = torch.full((1, 1, 4, BINS), -1e4)
    for side, value in enumerate((1, 2, 3, 4)):
        distances[0, 0, side, value] = 0
    distances[0, 0, 3, 5] = 0  # half 4, half 5
    raw = raw_of(torch.tensor([[12.0, 20.0]]), torch.tensor([8.0]), torch.zeros(1, 1, 2), distances)
    torch.testing.assert_close(decoded(raw)[0, 0], torch.tensor([12.0 - 8, 20 - 16, 12 + 24, 20 + 36]))


def test_distribution_loss_is_least_at_the_target():
    target = torch.tensor([0.0, 3.25, 14.9, 99.0, -3.0])
    best = torch.full((5, BINS), -1e3)
    for k, value in enumerate(target.clamp(0, 14.99).tolist()):
        low = int(value)
        best[k, low] = math.log(max(1 - (value - low), 1e-30))
        best[k, low + 1] = math.log(max(value - low, 1e-30))
    entropy = distribution_loss(best, target)
    share = target.clamp(0, 14.99) % 1
    expected = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share))
    torch.testing.assert_close(entropy, expected, atol=1e-5, rtol=1e-5)
    assert (distribution_loss(torch.randn(5, BINS), target) > entropy).all()


def assigned(probability, boxes, raw, truth, labels, **options):
    """Of one image."""
    return Assigned(*(x[0] for x in assign(probability[None], boxes[None], raw, truth[None], labels[None], **options)))


def grid(rows, columns, stride):
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return (torch.stack([x, y], -1).flatten(0, 1) + 0.5) * stride


def test_assignment_against_a_plain_loop():
    generator = torch.Generator().manual_seed(3)
    centres = torch.cat([grid(8, 8, 8.0), grid(4, 4, 16.0)])
    strides = torch.cat([torch.full((64,), 8.0), torch.full((16,), 16.0)])
    probability = torch.rand(80, 3, generator=generator)
    boxes = torch.cat([centres - 14, centres + 14], 1) + 4 * torch.randn(80, 4, generator=generator)
    truth = torch.tensor([[4.0, 4, 40, 36], [20, 10, 50, 60], [1, 1, 3, 3]])
    labels = torch.tensor([0, 2, 1])
    raw = raw_of(centres, strides, None, None)
    found = assigned(probability, boxes, raw, truth, labels, top=5)

    def iou(a, b):
        edges = torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])
        inner = edges.clamp(min=0).prod()
        return float(inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner))

    taken = {}
    for k in range(3):
        inside = [a for a in range(80) if (centres[a] > truth[k, :2]).all() and (centres[a] < truth[k, 2:]).all()]
        inside = inside or [int((centres[:64] - truth[k].view(2, 2).mean(0)).square().sum(1).argmin())]
        merit = {a: float(probability[a, labels[k]]) ** 0.5 * iou(boxes[a], truth[k]) ** 6 for a in inside}
        for a in sorted(inside, key=lambda a: -merit[a])[:5]:
            taken.setdefault(a, []).append((k, merit[a]))
    owner = {a: max(pairs, key=lambda pair: iou(boxes[a], truth[pair[0]])) for a, pairs in taken.items()}
    assert sorted(owner) == found.positive.nonzero()[:, 0].tolist()
    assert {a: k for a, (k, _) in owner.items()} == {a: int(found.box[a]) for a in owner}
    for k in range(3):
        own = {a: merit for a, (box, merit) in owner.items() if box == k}
        best = max(iou(boxes[a], truth[k]) for a in own)
        for a, merit in own.items():
            expected = merit / max(own.values()) * best
            assert float(found.weight[a]) == pytest.approx(expected, abs=1e-5)
    assert found.weight[~found.positive].sum() == 0


def test_a_cell_of_two_boxes_stays_with_one_of_them():
    """A third box overlaps it most, but has its cells elsewhere."""
    centres, strides = torch.tensor([[10.0, 10], [14, 14]]), torch.full((2,), 8.0)
    truth = torch.tensor([[0.0, 0, 20, 12], [0, 0, 12, 20], [0, 0, 20, 20]])
    boxes = torch.tensor([[0.0, 0, 19, 18], [0, 0, 20, 20]])
    probability = torch.tensor([[1.0, 1.0, 0.1], [0.1, 0.1, 1.0]])
    found = assigned(probability, boxes, raw_of(centres, strides, None, None), truth, torch.arange(3), top=1)
    assert found.positive.tolist() == [True, True]
    assert found.box.tolist() == [0, 2]


def test_the_best_cell_of_a_tiny_box_has_its_overlap_as_soft_label():
    centres, strides = grid(8, 8, 8.0), torch.full((64,), 8.0)
    boxes = torch.cat([centres - 60, centres + 60], 1)  # as an untrained head has them
    truth = torch.tensor([[19.0, 19, 22, 22]])
    found = assigned(torch.full((64, 1), 0.01), boxes, raw_of(centres, strides, None, None), truth, torch.tensor([0]))
    assert found.positive.sum() == 1
    assert float(found.weight.max()) == pytest.approx(9 / 120**2, rel=1e-4)


def test_losses_of_a_batch_are_those_of_its_images():
    """Images with three, one and no box, one of them too small for a centre, in a batch and each alone."""
    centres = torch.cat([grid(8, 8, 8.0), grid(4, 4, 16.0)])
    strides = torch.cat([torch.full((64,), 8.0), torch.full((16,), 16.0)])
    boxes = torch.tensor(
        [[[4.0, 4, 40, 36], [20, 10, 50, 60], [1, 1, 3, 3]], [[9, 9, 30, 41]] + [[0] * 4] * 2, [[0] * 4] * 3]
    )
    labels = torch.tensor([[0, 2, 1], [1, -1, -1], [-1, -1, -1]])
    scores, distances = torch.randn(3, 80, 3), 2 * torch.randn(3, 80, 4, BINS)
    raw = raw_of(centres, strides, scores, distances)
    found = assign(scores.sigmoid(), decoded(raw), raw, boxes, labels)
    whole = detection_loss(raw, boxes, labels)
    sums, total = dict.fromkeys(whole, 0.0), 0.0
    for k, count in enumerate((3, 1, 0)):
        own = raw._replace(scores=scores[k : k + 1], distances=distances[k : k + 1])
        parts = detection_loss(own, boxes[k : k + 1, :count], labels[k : k + 1, :count])
        if count:
            alone = assigned(scores[k].sigmoid(), decoded(own)[0], own, boxes[k, :count], labels[k, :count])
            for batched, one in zip(found, alone):
                torch.testing.assert_close(batched[k], one)
        share = float(found.weight[k].sum())
        total += share
        for name, value in parts.items():
            sums[name] += value * max(1.0, share)
    assert not found.positive[2].any()
    for name, value in whole.items():
        torch.testing.assert_close(value, sums[name] / total)


def test_no_boxes_train_the_scores_only():
    net = create_detector("yolo", 2, (64, 64), backbone_args=TINY_YOLO)
    parts = net.losses(torch.rand(2, 3, 64, 64), torch.zeros(2, 0, 4), torch.zeros(2, 0).long())
    assert float(parts["box"]) == float(parts["distribution"]) == 0
    assert parts["score"] > 0
    boxes = torch.tensor([[[0.0, 0, 10, 10], [5, 5, 5.5, 5.5]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    parts = net.losses(torch.rand(2, 3, 64, 64), boxes, torch.tensor([[0, 1], [-1, -1]]))
    assert all(value.isfinite() and value > 0 for value in parts.values())


def test_perfect_predictions_have_little_loss():
    """Cells that say exactly the box, and scores that equal the soft labels' targets."""
    centres, strides = grid(8, 8, 8.0), torch.full((64,), 8.0)
    truth = torch.tensor([[[8.0, 16.0, 40.0, 48.0]]])
    sides = torch.cat([centres - truth[0, 0, :2], truth[0, 0, 2:] - centres], 1) / 8
    inside = (sides > 0).all(1)
    low = sides.clamp(0, 14.9)
    distances = torch.full((1, 64, 4, BINS), -30.0)
    distances.scatter_(-1, low.long()[None, ..., None], torch.log1p(-(low % 1))[None, ..., None])
    distances.scatter_(-1, low.long()[None, ..., None] + 1, torch.log(low % 1 + 1e-12)[None, ..., None])
    scores = torch.full((1, 64, 2), -30.0)
    scores[0, inside, 1] = 30.0
    parts = detection_loss(raw_of(centres, strides, scores, distances), truth, torch.tensor([[1]]))
    assert parts["box"] < 1e-4
    assert parts["distribution"] < 0.7  # the entropy of a half: log 2
    worse = detection_loss(raw_of(centres + 9, strides, scores, distances), truth, torch.tensor([[1]]))
    assert worse["box"] > 0.1


def test_boxes_that_overlap_a_surer_one_of_their_class_are_dropped():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [50, 50, 60, 60]])
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.7], [0.02, 0.3]])
    found = choose(boxes, scores, 0.1, 0.5, 10)
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.3]))
    assert found.labels.tolist() == [0, 1, 1]
    assert len(choose(boxes, scores, 0.1, 0.5, 2).boxes) == 2
    assert choose(boxes, scores, 0.95, 0.5, 2).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("name", "count"),
    [("mamba_yolo_tiny", 6_129_192), ("mamba_yolo_base", 21_822_992), ("mamba_yolo_large", 57_620_256)],
)
def test_parameters_of_mamba_yolo(name, count):
    with torch.device("meta"):
        net = Yolo(name, 80)
    assert sum(p.numel() for p in net.parameters()) == count
    assert set(SIZES) >= {name}


def test_small_and_odd_images_in_mamba_yolo():
    net = Yolo(num_classes=2, backbone_args=TINY_YOLO).eval()
    for rows, columns in ((7, 9), (33, 64), (64, 96)):
        raw = net(torch.rand(1, 3, rows, columns))
        up = [-(-side // 32) * 32 for side in (rows, columns)]
        assert raw.scores.shape == (1, sum(up[0] // s * (up[1] // s) for s in (8, 16, 32)), 2)
        assert decoded(raw).isfinite().all()
    with pytest.raises(ValueError, match="needs 8, 16 and 32"):
        Yolo("hydra_vit_tiny_patch16_224", 2, {**TOKENS, "patch_size": 8})


@pytest.mark.parametrize(
    ("detector", "options"),
    [
        ("yolo", {"backbone": "vmamba_tiny_s1l8", "backbone_args": SMALL, "widths": (8, 8, 8)}),
        ("yolo", {"backbone_args": TINY_YOLO}),
        ("fcos", {"backbone": "resnet10t", "width": 32}),
        ("retinanet", {"backbone": "vmamba_tiny_s1l8", "backbone_args": SMALL, "width": 16}),
        ("faster_rcnn", {"backbone": "vmamba_tiny_s1l8", "backbone_args": SMALL, "width": 16}),
        ("faster_rcnn", {"backbone": "hydra_vit_tiny_patch16_224", "backbone_args": TOKENS, "width": 16}),
    ],
)
def test_detectors_train_all_weights_and_find_boxes_inside(detector, options):
    net = create_detector(detector, 2, (64, 96), **options)
    boxes = torch.tensor([[[2.0, 2, 30, 31], [20, 10, 60, 50]], [[10, 10, 90, 60], [0, 0, 0, 0]]])
    parts = net.losses(torch.rand(2, 3, 64, 96), boxes, torch.tensor([[0, 1], [1, -1]]))
    torch.stack(list(parts.values())).sum().backward()
    unused = [name for name, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    for found in net.eval().detect(torch.rand(2, 3, 64, 96), 0.0):
        assert found.labels.numel() == 0 or 0 <= int(found.labels.min()) <= int(found.labels.max()) < 2
        assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn", "ssdlite320_mobilenet_v3_large"])
def test_no_detector_hides_boxes_that_are_less_sure_than_its_own_threshold(detector):
    """An untrained one is sure of nothing; all its boxes lie below what torchvision shows by itself."""
    torch.manual_seed(0)
    pyramid = {} if detector.startswith("ssd") else {"backbone": "resnet10t", "width": 64}
    net, image = create_detector(detector, 40, (64, 64), **pyramid).eval(), torch.rand(1, 3, 64, 64)
    scores = net.detect(image, 1e-4)[0].scores.detach()
    middle = float(scores.median())
    assert middle < 0.2
    assert (net.detect(image, middle)[0].scores >= middle).all()
    name = "box_score_thresh" if detector == "faster_rcnn" else "score_thresh"
    if not detector.startswith("ssd"):
        strict = create_detector(detector, 40, (64, 64), **pyramid, **{name: 0.9}).eval()
        assert strict.detect(image, 1e-4)[0].scores.numel() == 0


def test_any_pyramid_in_mask_rcnn():
    from torchvision.models.detection import MaskRCNN

    net = MaskRCNN(pyramid_backbone("vmamba_tiny_s1l8", SMALL, width=16), 3, min_size=64, max_size=64)
    target = {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
    losses = net([torch.rand(3, 64, 64)], [target])
    assert {"loss_mask", "loss_box_reg"} <= set(losses)
    assert all(loss.isfinite() for loss in losses.values())


def test_plain_scans_equal_the_op():
    from omnissm.vision.models.vmamba import SS2D
    from omnissm.vision.scans import plain_scans

    mixer = SS2D(8, d_state=3, ratio=2.0).eval()
    x = torch.randn(2, 5, 7, 8)
    with torch.no_grad():
        expected = mixer(x)
        with plain_scans():
            torch.testing.assert_close(mixer(x), expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(mixer(x), expected, rtol=0, atol=0)


def test_detector_in_16_bit_stays_near():
    net = create_detector("yolo", 2, (64, 64), backbone_args=TINY_YOLO)
    images, boxes = torch.rand(2, 3, 64, 64), torch.tensor([[[2.0, 2, 30, 31]], [[10, 10, 60, 60]]])
    labels = torch.tensor([[0], [1]])
    expected = net.losses(images, boxes, labels)
    with torch.autocast("cpu", torch.bfloat16):
        found = net.losses(images, boxes, labels)
        corners = net.eval()(images)[0]
    assert corners.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in found.values())
    for name in ("score", "distribution"):
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_detector_learns_eight_images_by_heart():
    pytest.importorskip("pycocotools")
    from omnissm.vision.dense.metrics import average_precision

    net = create_detector("yolo", 2, (64, 64), backbone_args=TINY_YOLO)
    generator = torch.Generator().manual_seed(1)
    images, boxes, labels = torch.full((8, 3, 64, 64), 0.5), torch.zeros(8, 2, 4), torch.zeros(8, 2).long()
    for k in range(8):
        for j in range(2):
            w, h = torch.randint(12, 28, (2,), generator=generator).tolist()
            x, y = 32 * j + int(torch.randint(33 - w, (), generator=generator)), 3 * k
            label = int(torch.randint(2, (), generator=generator))
            images[k, :, y : y + h, x : x + w] = 0
            images[k, 2 * label, y : y + h, x : x + w] = 1
            boxes[k, j], labels[k, j] = torch.tensor([x, y, x + w, y + h]), label
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
    for _ in range(240):
        optimizer.zero_grad()
        torch.stack(list(net.losses(images, boxes, labels).values())).sum().backward()
        optimizer.step()
    metric = average_precision()
    with torch.no_grad():
        found = net.eval().detect(images, 0.001)
    predicted = [{"boxes": f.boxes, "scores": f.scores, "labels": f.labels} for f in found]
    metric.update(predicted, [{"boxes": b, "labels": n} for b, n in zip(boxes, labels)])
    assert float(metric.compute()["map"]) > 0.8
