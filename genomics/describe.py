"""What a model is, in a few lines of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..ssmcore import account
from .intervals import Interval
from .likelihood import Scorer
from .loading import load_model
from .models import MODELS, create_model
from .reference import Reference


def describe_model(model: str, fasta: Path | None = None, region: str | None = None, length: int = 8192) -> str:
    """Stages, parameters, layers, operations per base and measured rates of a model.

    Args:
        model: Name of a model, or where one is stored.
        fasta: Genome on which the rates of boundaries are measured.
        region: Where; by default its first `length` bases.
        length: Bases for which operations are counted.

    Returns:
        Lines of text.

    Raises:
        ValueError: for a length below 1, or a region without a genome.
    """
    if region and fasta is None:
        raise ValueError(f"the region {region!r} is one of a genome; give its file with --fasta")
    if length < 1:
        raise ValueError(f"expected a length of at least 1 base, got {length}")
    net: Any = create_model(model) if model in MODELS and not Path(model).exists() else load_model(model)
    scorer = Scorer(net)
    parameters = sum(p.numel() for p in net.parameters())
    lines = [
        f"{scorer.name}: {parameters:,} parameters, vocabulary {scorer.vocabulary.name},"
        f" {'causal' if scorer.is_causal else 'masked'}, strands {scorer.strands}"
    ]
    targets = [float(target) for target in getattr(net, "target_ratios", ())]
    if parameters and scorer.is_causal and hasattr(net, "stage_of"):
        total, scale = 0.0, 1.0
        for stage in range(len(targets) + 1):
            positions = max(1, round(length / scale))
            parts = [part for part in account(net, positions).parts if net.stage_of(f"{part.name}.") == stage]
            flops = sum(part.flops for part in parts)
            total += flops
            size = sum(part.parameters for part in parts)
            lines.append(
                f"stage {stage}: {size:,} parameters, one element per {scale:g} bases (target),"
                f" {flops / length:,.0f} operations per base"
            )
            scale *= targets[stage] if stage < len(targets) else 1
        lines.append(f"{total / length:,.0f} operations per base at the target ratios, {length:,} bases, forward")
    if hasattr(net, "layers"):
        lines.append("layers: " + ", ".join(net.layers()))
    if hasattr(net, "config"):
        lines += [f"{name}: {value}" for name, value in net.config.items()]
    if fasta is not None:
        lines += _rates(scorer, fasta, region, length)
    return "\n".join(lines) + "\n"


def _rates(scorer: Scorer, fasta: Path, region: str | None, length: int) -> list[str]:
    genome = Reference(fasta)
    name = genome.names[0]
    place = Interval(name, 0, min(length, genome.lengths[name]))
    if region:
        place = genome.region(region)
    stages = scorer.boundaries([genome.fetch_interval(place)])[0]
    return [
        f"measured on {place}, stage {k}: {stage.mask.sum() / max(1, stage.eligible.sum()):.3f} of positions cut,"
        f" {len(place) / max(1, stage.mask.sum()):.2f} bases per chunk"
        for k, stage in enumerate(stages)
    ]
