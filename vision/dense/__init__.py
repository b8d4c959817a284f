"""Pixels and boxes: heads on backbones, detectors, their training and their drawings; importing it loads Lightning."""

from .detection import Detection as Detection
from .detectors import create_detector as create_detector
from .detectors import pyramid_backbone as pyramid_backbone
from .heads import create_head as create_head
from .segmentation import SemanticSegmentation as SemanticSegmentation
from .segmenter import create_segmenter as create_segmenter

__all__ = [
    "Detection",
    "SemanticSegmentation",
    "create_detector",
    "create_head",
    "create_segmenter",
    "pyramid_backbone",
]
