"""Images, masks, boxes and shards."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzzing import Format, Payload, write_all
from hypothesis import strategies as st
from PIL import Image

from omnissm.vision.data import CocoBoxes, MaskFolder
from omnissm.vision.data.reading import read_image
from omnissm.vision.data.shards import TarShards

KINDS = [
    *(f"png {mode}" for mode in ("L", "RGB", "RGBA", "P", "1", "I;16")),
    *("bmp RGB", "tif RGB", "tif F", "ppm RGB", "pgm L", "webp RGB", "gif P", "jpg L"),
]
sides = st.integers(1, 9)
image_models = st.fixed_dictionaries(
    {
        "size": st.tuples(sides, sides),
        "seed": st.integers(0, 999),
        "kind": st.sampled_from(KINDS),
    }
)


def pixels(model: Any, mode: str) -> np.ndarray:
    rng = np.random.default_rng(model["seed"])
    rows, columns = model["size"]
    match mode:
        case "RGB" | "RGBA":
            values = rng.integers(0, 256, (rows, columns, len(mode)), np.uint8)
            if mode == "RGBA":
                values[..., 3] = rng.choice([0, 255], (rows, columns))
            return values
        case "1":
            return rng.random((rows, columns)) < 0.5
        case "I;16":
            return rng.integers(256, 2**16, (rows, columns), np.uint16)
        case "F":
            return rng.random((rows, columns), np.float32)
    return rng.integers(0, 256, (rows, columns), np.uint8)


def palette(model: Any) -> np.ndarray:
    return np.random.default_rng(model["seed"] + 1).integers(0, 256, (256, 3), np.uint8)


def encoded(model: Any) -> Payload:
    ending, mode = model["kind"].split()
    values = pixels(model, mode)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette(palette(model).tobytes())
    buffer = io.BytesIO()
    kind = {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm"}.get(ending, ending)
    image.save(buffer, kind, **({"lossless": True} if ending == "webp" else {}))
    return {f"a.{ending}": buffer.getvalue()}


def colours(path: Path, model: Any) -> np.ndarray:
    found = np.asarray(read_image(path))
    if found.ndim != 3 or found.shape[2] != 3 or found.dtype != np.uint8:
        raise AssertionError(f"read {found.shape} {found.dtype}")
    return found if model["kind"] != "jpg L" else np.array(found.shape)


def as_colours(model: Any) -> np.ndarray:
    ending, mode = model["kind"].split()
    values = pixels(model, mode)
    if ending == "jpg":
        return np.array([*model["size"], 3])
    if mode == "RGB":
        return values
    if mode == "RGBA":
        return np.where(values[..., 3:] == 0, 255, values[..., :3])
    if mode == "P":
        return palette(model)[values]
    grey = values / 257 if mode == "I;16" else values * {"1": 255, "F": 255}.get(mode, 1)
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, 2)


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


# Masks

mask_models = st.fixed_dictionaries(
    {
        "size": st.tuples(sides, sides),
        "seed": st.integers(0, 999),
        "count": st.integers(1, 3),
        "table": st.booleans(),
        "on_bad": st.sampled_from(["raise", "skip"]),
    }
)


def mask_of(model: Any, k: int) -> np.ndarray:
    rng = np.random.default_rng(model["seed"] + k)
    return rng.choice(np.array([0, 1, 255], np.uint8), model["size"])


def masks(model: Any) -> Payload:
    found: Payload = {}
    if model["table"]:
        rows = [f"n{k},{'train' if k == 0 else 'val'}" for k in range(model["count"])]
        found["labels.csv"] = "\n".join(["id,split", *rows]).encode()
    for k in range(model["count"]):
        found[f"images/n{k}.png"] = png(pixels({**model, "seed": model["seed"] + 50 + k}, "RGB"))
        found[f"masks/n{k}.png"] = png(mask_of(model, k))
    return found


def in_root(payload: Mapping[str, bytes], folder: Path, model: Any) -> Path:
    write_all(payload, folder, model)
    return folder


def read_masks(path: Path, model: Any) -> list[Any]:
    data = MaskFolder(path, ["a", "b"], image_size=12, val_share=0.0, on_bad=model["on_bad"], augment="none")
    data.setup()
    found = []
    for name in ("train", "val"):
        if name in data._parts:
            part = copy.copy(data.part(name))
            part.view = None  # as in evaluation: masks keep their size
            found.append([part[k][1].numpy().astype(np.uint8) for k in range(len(part))])
    return found


def as_masks(model: Any) -> list[Any]:
    every = [mask_of(model, k) for k in range(model["count"])]
    parts = [every[:1], every[1:]] if model["table"] else [every, []]
    return [part for part in parts if part]


# Boxes

sizes = st.one_of(st.just(0.0), st.floats(0.5, 12, width=16))  # sides far below a pixel count as none
boxes = st.tuples(st.integers(-3, 8), st.integers(-3, 8), sizes, sizes)
coco_models = st.fixed_dictionaries(
    {
        "ids": st.lists(st.integers(0, 2**40), min_size=1, max_size=3, unique=True),
        "categories": st.lists(st.integers(0, 10**6), min_size=1, max_size=3, unique=True),
        "boxes": st.lists(st.tuples(boxes, st.integers(0, 2), st.integers(0, 2)), max_size=4),
        "on_bad": st.sampled_from(["raise", "skip"]),
    }
)


def coco_content(model: Any) -> dict[str, Any]:
    return {
        "images": [
            {"id": key, "file_name": f"{k}.png", "height": 8, "width": 10} for k, key in enumerate(model["ids"])
        ],
        "categories": [{"id": key, "name": f"c{key}"} for key in model["categories"]],
        "annotations": [
            {
                "id": k,
                "image_id": model["ids"][image % len(model["ids"])],
                "category_id": model["categories"][category % len(model["categories"])],
                "bbox": list(box),
                "iscrowd": 0,
            }
            # The first box makes sure that there is one to learn from.
            for k, (box, image, category) in enumerate([((1, 1, 4.0, 4.0), 0, 0), *model["boxes"]])
        ],
    }


def coco(model: Any) -> Payload:
    images = {f"images/{k}.png": png(np.zeros((8, 10, 3), np.uint8)) for k in range(len(model["ids"]))}
    return {"train.json": json.dumps(coco_content(model)).encode(), **images}


def read_boxes(path: Path, model: Any) -> list[Any]:
    data = CocoBoxes(path, image_size=16, on_bad=model["on_bad"], augment="none")
    data.setup()
    part = data.part("train")
    for k in range(len(part)):
        image, target, _, _ = part[k]
        assert torch.isfinite(image).all()
        assert torch.isfinite(target["boxes"]).all()
    return [(r.image_id, [tuple(b) for b in r.boxes], r.labels) for r in part.records]


def as_boxes(model: Any) -> list[Any]:
    content = coco_content(model)
    order = sorted(model["categories"])
    found: dict[int, tuple[list[Any], list[int]]] = {key: ([], []) for key in model["ids"]}
    for entry in content["annotations"]:
        x, y, width, height = entry["bbox"]
        left, top, right, bottom = max(0, x), max(0, y), min(10, x + width), min(8, y + height)
        if min(right - left, bottom - top) > 1e-2:
            found[entry["image_id"]][0].append((left, top, right, bottom))
            found[entry["image_id"]][1].append(order.index(entry["category_id"]))
    return [(key, *found[key]) for key in model["ids"]]


# Shards

shard_models = st.fixed_dictionaries(
    {
        "size": st.tuples(sides, sides),
        "seed": st.integers(0, 999),
        "labels": st.lists(st.integers(0, 4), min_size=1, max_size=3),
        "kind": st.sampled_from(["cls", "json"]),
        "folder": st.sampled_from(["", "a/", "../", "/abs/"]),
    }
)


def shard(model: Any) -> Payload:
    found: Payload = {}
    for k, label in enumerate(model["labels"]):
        found[f"{model['folder']}{k}.png"] = png(pixels({**model, "seed": model["seed"] + k}, "RGB"))
        found[f"{model['folder']}{k}.{model['kind']}"] = (
            f" {label}\n" if model["kind"] == "cls" else json.dumps({"label": label})
        ).encode()
    found["classes.json"] = json.dumps([f"c{k}" for k in range(5)]).encode()
    return found


def pack_shard(payload: Mapping[str, bytes], folder: Path, model: Any) -> Path:
    with tarfile.open(folder / "train-00000.tar", "w") as archive:
        for name, content in payload.items():
            if name == "classes.json":
                (folder / name).write_bytes(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def read_shard(path: Path, model: Any) -> list[Any]:
    before = sorted(path.parent.rglob("*"))
    data = TarShards(path, val_share=0.0, image_size=8)
    data.setup()
    part = data._parts["train"]
    found = [(np.asarray(part.read(k)), data.classes[label]) for k, label in enumerate(part.labels)]
    assert sorted(path.parent.rglob("*")) == before, "reading a shard wrote files"
    return found


def as_shard(model: Any) -> list[Any]:
    return [
        (pixels({**model, "seed": model["seed"] + k}, "RGB"), f"c{label}") for k, label in enumerate(model["labels"])
    ]


FORMATS = [
    Format("image", image_models, encoded, colours, as_colours),
    Format("masks", mask_models, masks, read_masks, as_masks, in_root),
    Format("coco", coco_models, coco, read_boxes, as_boxes, in_root),
    Format("shards", shard_models, shard, read_shard, as_shard, pack_shard),
]
