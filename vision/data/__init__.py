"""Data modules of this domain; importing this package loads Lightning."""

from .base import ImageData as ImageData
from .batches import ImageBatch as ImageBatch
from .coco import CocoBoxes as CocoBoxes
from .dense_batches import DetectionBatch as DetectionBatch
from .dense_batches import SegmentationBatch as SegmentationBatch
from .folder import ImageFolder as ImageFolder
from .masks import MaskFolder as MaskFolder
from .reading import BadImageError as BadImageError
from .reading import read_image as read_image
from .shards import TarShards as TarShards
from .synthetic import SyntheticImages as SyntheticImages
from .torchvision_sets import TorchvisionSet as TorchvisionSet

__all__ = [
    "BadImageError",
    "CocoBoxes",
    "DetectionBatch",
    "ImageBatch",
    "ImageData",
    "ImageFolder",
    "MaskFolder",
    "SegmentationBatch",
    "SyntheticImages",
    "TarShards",
    "TorchvisionSet",
    "read_image",
]
