"""Pixels and boxes: heads on backbones, detectors, their training and their drawings; importing it loads Lightning."""

from .heads import create_head as create_head
from .segmentation import SemanticSegmentation as SemanticSegmentation
from .segmenter import create_segmenter as create_segmenter

__all__ = ["SemanticSegmentation", "create_head", "create_segmenter"]
