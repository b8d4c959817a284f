"""What stands in each layer of a stack: entries from a pattern, a number or a list, and mixers from entries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .mixers import MIXERS, create_mixer
from .parallel import DoubleMixer

Layer = str | Mapping[str, Any] | nn.Module

LETTERS: Mapping[str, str] = {
    "c": "chimera2d",
    "g": "gmu",
    "h": "hydra",
    "m": "mamba2",
    "s": "s4d",
    "t": "attention",
    "x": "mamba3",
}


def parse_pattern(pattern: str, letters: Mapping[str, str] = LETTERS) -> list[dict[str, Any]]:
    """Read a pattern such as "m2T1": letter and count, upper case with an MLP.

    Raises:
        ValueError: if the pattern is malformed or a letter is not in the table.

    Notation of Hwang, Wang & Gu (2025), H-Net.
    """
    if not re.fullmatch(r"([A-Za-z]\d+)+", pattern):
        raise ValueError(f"a pattern is letters with counts such as 'm2T1', got {pattern!r}.")
    found: list[dict[str, Any]] = []
    for letter, count in re.findall(r"([A-Za-z])(\d+)", pattern):
        if letter.lower() not in letters:
            raise ValueError(f"unknown letter {letter!r} in pattern {pattern!r}; known: {', '.join(sorted(letters))}.")
        found += [{"mixer": letters[letter.lower()], "mlp": letter.isupper()}] * int(count)
    return found


def layer_entries(
    layers: str | int | Sequence[Layer],
    *,
    mixer: str | None = None,
    attn_layers: Sequence[int] = (),
    mlp: bool = False,
    letters: Mapping[str, str] = LETTERS,
) -> list[Layer]:
    """One entry per layer from any form that `Stack` takes.

    Raises:
        ValueError: if the forms are mixed, a layer has no mixer, or there is no layer.
    """
    if not isinstance(layers, int) and (mixer is not None or len(attn_layers) or mlp):
        raise ValueError(
            "`mixer`, `attn_layers` and `mlp` go with a number of layers; a list or pattern says it all itself."
        )
    if isinstance(layers, str):
        return list(parse_pattern(layers, letters)) or _no_layer()
    if isinstance(layers, int):
        if mixer is None:
            raise ValueError(f"{layers} layers of which mixer? Name one of {', '.join(sorted(MIXERS))} as `mixer`.")
        wrong = [index for index in attn_layers if not 0 <= index < layers]
        if wrong:
            raise ValueError(f"`attn_layers` must lie in 0 to {layers - 1}, got {wrong[0]}.")
        names = ["attention" if index in attn_layers else mixer for index in range(layers)]
        return [{"mixer": name, "mlp": mlp} for name in names] or _no_layer()
    for entry in layers:
        if isinstance(entry, Mapping) and "mixer" not in entry:
            raise ValueError(f"a layer needs the entry 'mixer', got {sorted(entry)}.")
    return list(layers) or _no_layer()


def _no_layer() -> list[Layer]:
    raise ValueError("a Stack needs at least one layer, got none.")


def create_layer_mixer(
    d_model: int, options: dict[str, Any], shared: Mapping[str, Any], factory: Mapping[str, Any]
) -> nn.Module:
    """Build the mixer of a layer, or two side by side.

    Args:
        d_model: Width.
        options: Entry of the layer without its "mlp"; "mixer" is taken out of it.
        shared: Options of every mixer that is built by name, and under a name of `MIXERS` those of that mixer alone.
        factory: `device` and `dtype`.

    Raises:
        ValueError: if not two mixers stand side by side, or with options beside their own.
    """
    name = options.pop("mixer")
    if isinstance(name, str):
        of_all = {key: value for key, value in shared.items() if key not in MIXERS}
        return create_mixer(name, d_model, **{**factory, **of_all, **shared.get(name, {}), **options})
    if len(name) != 2:
        raise ValueError(f"mixers side by side are two, got {len(name)}.")
    unknown = set(options) - {"merge"}
    if unknown:
        raise ValueError(f"options of mixers side by side stand in their own entries, got {sorted(unknown)}.")
    first, second = (
        part
        if isinstance(part, nn.Module)
        else create_layer_mixer(d_model, {"mixer": part} if isinstance(part, str) else dict(part), shared, factory)
        for part in name
    )
    return DoubleMixer(d_model, first, second, **options, **factory)
