"""Segmenters and detectors as graphs without Python: `torch.export` and ONNX."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...ssmcore.training.checkpoints import check_writable, write_atomic
from ..scans import plain_scans
from ..tasks import normalized
from .detectors import YoloDetector
from .predictor import DenseModel


class Graph(nn.Module):
    """Images in [0, 1] to logits (b, classes, height, width), or boxes (b, A, 4) and scores (b, A, classes)."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Any:
        """Normalise images (b, 3, height, width) and apply the network."""
        return self.net(normalized(image, self.net))


def exported(model: DenseModel, batch: int | None = None) -> torch.export.ExportedProgram:
    """Graph of a model at its image size; suppression of overlapping boxes is left to the caller.

    Args:
        model: Segmenter, or detector with the head of `Yolo`.
        batch: Images at a time; None for any number.

    Raises:
        ValueError: for a detector of torchvision, whose outputs have no fixed form, or a batch of no image.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"a graph takes at least 1 image at a time, got batch={batch}.")
    if model.kind == "detection" and not isinstance(model.net, YoloDetector):
        raise ValueError("only detectors with detector='yolo' can be exported; those of torchvision cannot.")
    example = torch.zeros(batch or 2, 3, *model.image_size, device=next(model.net.parameters()).device)
    shapes = None if batch else ({0: torch.export.Dim.DYNAMIC},)
    with torch.no_grad(), plain_scans():
        return torch.export.export(Graph(model.net).eval(), (example,), dynamic_shapes=shapes)


def write_graph(model: DenseModel, out: Path, batch: int | None = None) -> None:
    """Write a graph: .pt2 for `torch.export.load`, .onnx for other runtimes.

    In ONNX the input is `image`, the output `logits`, or `boxes` and `scores`; see `Graph`.

    Args:
        model: What to export.
        out: The file.
        batch: Images at a time; None for any number (.pt2), or 1 (.onnx).

    Raises:
        ImportError: if ONNX is asked for and onnxscript is missing.
        ValueError: for another ending or a model without a graph.
        OSError: if the file cannot be written, before the work.
    """
    check_writable(out.parent)
    buffer = io.BytesIO()
    if out.suffix == ".pt2":
        torch.export.save(exported(model, batch), buffer)
    elif out.suffix == ".onnx":
        try:
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ImportError('ONNX files need onnxscript: pip install "omnissm[onnx]"') from error
        names = ["boxes", "scores"] if model.kind == "detection" else ["logits"]
        graph = exported(model, 1 if batch is None else batch)
        program = torch.onnx.export(graph, dynamo=True, verbose=False, input_names=["image"], output_names=names)
        buffer.write(program.model_proto.SerializeToString())  # type: ignore[union-attr]
    else:
        raise ValueError(f"got the name {str(out)!r}, expected one ending in .pt2 or .onnx.")
    write_atomic(out, buffer.getvalue())
