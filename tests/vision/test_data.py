"""Image data: what files may hold, bad ones, parts, shards, synthetic sets, Mixup, and the task on them."""

import io
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from PIL import Image

from omnissm.vision.data import BadImageError, ImageFolder, SyntheticImages, TarShards, TorchvisionSet, read_image
from omnissm.vision.data.base import split_off
from omnissm.vision.data.shards import read_shards, write_shards
from omnissm.vision.data.synthetic import create_images
from omnissm.vision.tasks import ImageClassification


def picture(seed=0, size=(20, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 10), ("test", 3)):
        for label in ("a", "b"):
            place = tmp_path / "set" / part / label
            place.mkdir(parents=True)
            for k in range(count):
                picture(k).save(place / f"{k}.png")
    return tmp_path / "set"


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_kinds_of_images():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(np.asarray(read_image(encoded(Image.fromarray(grey))))[..., 1], grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(np.asarray(read_image(encoded(deep)))[..., 0], grey)
    dark = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))
    assert np.asarray(read_image(encoded(dark))).max() == 0  # 200 of 65,535
    assert read_image(encoded(picture().convert("CMYK"), "JPEG")).mode == "RGB"
    palette = picture().quantize(16)
    assert np.array_equal(np.asarray(read_image(encoded(palette))), np.asarray(palette.convert("RGB")))
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert np.asarray(read_image(encoded(clear))).min() == 255
    half = Image.new("LA", (4, 4), (0, 128))
    assert abs(int(np.asarray(read_image(encoded(half)))[0, 0, 0]) - 127) <= 1
    with pytest.raises(BadImageError, match=r"'x\.png' cannot be read: not an image file"):
        read_image(b"no picture", "x.png")
    with pytest.raises(BadImageError, match="truncated"):
        read_image(encoded(picture(size=(200, 200)), "JPEG")[:2000])


def test_parts_of_a_folder(folder):
    data = ImageFolder(folder, image_size=16, batch_size=4, val_share=0.2)
    assert data.classes == []
    assert data.num_classes == 2
    assert data.classes == ["a", "b"]
    sizes = {part: len(data.dataset(part)) for part in ("train", "val", "test")}
    assert sizes == {"train": 16, "val": 4, "test": 6}
    names = [set(data.dataset(part).part.names) for part in ("train", "val", "test")]
    assert not names[0] & names[1]
    batch = next(iter(data.val_dataloader()))
    assert batch.image.shape == (4, 3, 16, 16)
    assert 0 <= batch.image.min() <= batch.image.max() <= 1
    assert batch.label.tolist() == [0, 0, 1, 1]
    again = ImageFolder(folder, image_size=16, val_share=0.2)
    assert again.dataset("val").part.names == data.dataset("val").part.names
    assert data.state() == {"classes": ["a", "b"], "image_size": 16, "crop_pct": 1.0}
    plain = ImageFolder(folder / "train", image_size=16, val_share=0.0)
    assert len(plain.dataset("train")) == 20
    with pytest.raises(ValueError, match="no part 'test'"):
        plain.test_dataloader()


def test_faults_of_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="train/CLASS"):
        ImageFolder(tmp_path / "gone").setup()
    (folder / "test" / "c").mkdir()
    with pytest.raises(ValueError, match="no class of the training part"):
        ImageFolder(folder).setup()
    (folder / "test" / "c").rmdir()
    (folder / "train" / "c").mkdir()
    with pytest.raises(ValueError, match=r"'.*train/c' holds no image"):
        ImageFolder(folder).setup()
    data = ImageFolder(folder, allow_empty=True)
    assert data.num_classes == 3
    for options, message in (
        ({"on_bad": "ignore"}, "on_bad"),
        ({"batch_size": 0}, "sizes must be positive"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"mixup": 0.8, "batch_size": 1}, "pairs"),
        ({"augment": "heavy"}, "augment must be"),
        ({"augment": "light", "augment_args": {"flop": 1}}, "no option 'flop'"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFolder(folder, **options)


def test_bad_files_are_named_and_counted(folder, caplog):
    bad = folder / "train" / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    data = ImageFolder(folder, image_size=16, batch_size=20, val_share=0.0)
    with pytest.raises(BadImageError, match=r"3\.png"):
        next(iter(data.train_dataloader()))
    data = ImageFolder(folder, image_size=16, batch_size=20, val_share=0.0, on_bad="skip")
    batch = next(iter(data.train_dataloader()))
    assert len(batch.image) == 19
    data.trainer = SimpleNamespace(training=True, testing=False)
    for _ in range(2):
        data.on_after_batch_transfer(batch, 0)
    assert data.bad_images == [str(bad)]
    assert caplog.text.count("3.png cannot be read and is left out (1 so far)") == 1
    data.teardown("fit")
    assert "1 images cannot be read and were left out" in caplog.text


@pytest.mark.parametrize(("processes", "sizes"), [(1, [6]), (2, [5])])
def test_a_process_with_less_than_a_batch_trains_on_what_it_has(monkeypatch, processes, sizes):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    loader = SyntheticImages(train_samples=10, batch_size=6, image_size=8).train_dataloader()
    assert [len(batch.image) for batch in loader] == sizes


def test_split_takes_from_each_class():
    labels = [0] * 10 + [1] * 20
    stay, off = split_off(labels, 0.2, seed=1)
    assert sorted(stay + off) == list(range(30))
    assert [sum(labels[k] == c for k in off) for c in (0, 1)] == [2, 4]
    assert split_off(labels, 0.2, seed=1)[1] == off != split_off(labels, 0.2, seed=2)[1]
    with pytest.raises(ValueError, match="share"):
        split_off(labels, 1.0, 0)


def test_shards(folder, tmp_path):
    data = ImageFolder(folder, image_size=16, val_share=0.0)
    data.setup()
    part = data.dataset("train").part
    paths = [type(folder)(name) for name in part.names]
    written = write_shards(paths, part.labels, data.classes, tmp_path / "tar", per_shard=8)
    assert [path.name for path in written] == [f"train-0000{k}.tar" for k in range(3)]
    shards = TarShards(tmp_path / "tar", image_size=16, val_share=0.0, num_workers=0)
    assert shards.num_classes == 2
    assert list(shards.dataset("train").part.labels) == list(part.labels)
    for k in (0, 7, 8, 19):
        torch.testing.assert_close(shards.dataset("train")[k][0], data.dataset("train")[k][0])
    assert sorted(n for b in shards.train_dataloader() for n in b.number.tolist()) == list(range(20))
    with pytest.raises(FileNotFoundError, match="omnissm vision shard"):
        TarShards(tmp_path / "none").setup()


@pytest.mark.parametrize(
    ("names", "content", "message"),
    [
        (["1.png"], b"", "has no label for '1.png'"),
        (["1.png", "1.cls"], b"cat", "holds no label"),
        (["1.png", "1.cls"], b"-1", "at least 0"),
        (["1.png", "1.json"], b"{}", "holds no label"),
        (["1.txt"], b"", "no image in"),
    ],
)
def test_faults_of_shards(tmp_path, names, content, message):
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=message):
        read_shards([path])
    path.write_bytes(b"x" * 600)
    with pytest.raises(ValueError, match="no whole, uncompressed tar file"):
        read_shards([path])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_shards_cut_off_or_compressed(tmp_path, mode):
    path = tmp_path / "train-0.tar"
    with tarfile.open(path, mode) as archive:
        for name, content in (("1.cls", b"0"), ("1.png", encoded(picture(size=(40, 40))))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if mode == "w":
        assert read_shards([path]).labels == [0]
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"'.*train-0\.tar' is no whole, uncompressed tar file"):
        read_shards([path])


def test_mixup():
    data = SyntheticImages(train_samples=32, batch_size=9, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    batch = next(iter(data.train_dataloader()))
    data.trainer = SimpleNamespace(training=True, testing=False)
    mixed = data.on_after_batch_transfer(batch, 0)
    assert mixed.image.shape[0] == mixed.label.shape[0] == 8  # pairs
    torch.testing.assert_close(mixed.label.sum(1), torch.ones(8))
    data.trainer = SimpleNamespace(training=False, testing=False)
    assert data.on_after_batch_transfer(batch, 0) is batch
    light = SyntheticImages(augment="light").dataset("train")
    strong = SyntheticImages(augment="imagenet").dataset("train")
    assert light[0][0].shape == strong[0][0].shape == (3, 32, 32)


def test_synthetic_sets():
    for kind, classes in (("quadrant", 4), ("signal", 2)):
        images, labels = create_images(kind, 400, 16, seed=3)
        assert np.array_equal(images, create_images(kind, 400, 16, seed=3)[0])
        assert np.bincount(labels).min() > 400 / classes / 2
    half = images.reshape(400, 4, 4, 4, 4, 3)
    assert half.mean() == pytest.approx(128, abs=2)
    means = (
        create_images("quadrant", 200, 16)[0].astype(float).reshape(200, 2, 8, 2, 8, 3).mean((2, 4, 5)).reshape(200, 4)
    )
    assert np.array_equal(means.argmax(1), create_images("quadrant", 200, 16)[1])
    with pytest.raises(ValueError, match="multiple of patches"):
        create_images("signal", 2, 15)
    with pytest.raises(ValueError, match="Unknown synthetic set"):
        SyntheticImages(kind="stripes")


def test_losses():
    task = ImageClassification("vmamba_tiny_s1l8", {"dim": 8, "depths": [1, 1, 1, 1]}, num_classes=3)
    logits, label = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    soft = F.one_hot(label, 3).float()
    torch.testing.assert_close(task.losses(logits, label), task.losses(logits, soft))
    torch.testing.assert_close(task.losses(logits, label, 0.1), task.losses(logits, soft * 0.9 + 0.1 / 3))
    task.loss = "bce"
    torch.testing.assert_close(task.losses(logits, label, 0.1), task.losses(logits, soft, 0.1))
    with pytest.raises(ValueError, match="loss must be"):
        ImageClassification(loss="mse")
    with pytest.raises(ValueError, match="Did you mean"):
        ImageClassification("hydra_vit_tny_patch16_224")


def test_metrics_count_every_image_once():
    """Uneven last batch: shares are of all images, and equal those computed at once."""
    data = SyntheticImages(val_samples=50, eval_batch_size=16)
    task = ImageClassification("vmamba_tiny_s1l8", {"dim": 8, "depths": [1, 1, 1, 1]}, num_classes=4)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    found = trainer.validate(task, data, verbose=False)[0]
    images, labels = zip(*((image, label) for image, label, _ in data.dataset("val")), strict=False)
    with torch.no_grad():
        logits = task.eval()(torch.stack(images[:50]))
    target = torch.tensor(labels[:50])
    assert found["val/accuracy"] == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert found["val/loss"] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-4)
    assert found["val/top5"] == 1.0


def test_torchvision_set(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part, count in (("train", 20), ("t10k", 10)):
        head = np.array([2051, count, 28, 28], dtype=">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels[:count].tobytes())
        head = np.array([2049, count], dtype=">i4").tobytes()
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels[:count].tobytes())
    data = TorchvisionSet("MNIST", tmp_path, val_share=0.5, image_size=28, eval_batch_size=10)
    assert data.num_classes == 10
    assert {part: len(data.dataset(part)) for part in ("train", "val", "test")} == {"train": 10, "val": 10, "test": 10}
    assert sorted(data.dataset("val").part.labels) == list(range(10))
    batch = next(iter(data.test_dataloader()))
    assert batch.label.tolist() == list(range(10))
    torch.testing.assert_close(batch.image[:, 1], torch.from_numpy(pixels[:10]).float() / 255)
    with pytest.raises(FileNotFoundError, match="download=True"):
        TorchvisionSet("MNIST", tmp_path / "none").setup()


@pytest.mark.parametrize("kind", ["quadrant", "signal"])
def test_a_small_model_learns(kind):
    pl.seed_everything(0, verbose=False)
    data = SyntheticImages(
        kind, image_size=16, train_samples=256 if kind == "quadrant" else 768, val_samples=128, batch_size=32
    )
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "headdim": 16, "d_state": 8}
    task = ImageClassification(
        "hydra_vit_tiny_patch16_224",
        options,
        num_classes=data.num_classes,
        optimizer=lambda g: torch.optim.AdamW(g, lr=5e-3),
    )
    trainer = pl.Trainer(
        max_epochs=8, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        num_sanity_val_steps=0, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, data)
    assert float(trainer.callback_metrics["val/accuracy"]) > 0.9
