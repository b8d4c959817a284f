"""Embeddings of sequences: pooled vectors, or all of a layer, in Parquet, Zarr or NumPy files."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .files import atomic_path
from .likelihood import Scorer
from .progress import Progress
from .sequence import normalise, reverse_complement

Pooling = Literal["mean", "max", "last", "none", "chunks"]
Strands = Literal["fwd", "mean", "concat"]
SUFFIXES = (".npz", ".parquet", ".zarr")


class Embedding(NamedTuple):
    """Embedding of one sequence.

    Attributes:
        name: Its name.
        values: (d,) pooled, or (m, d).
        starts: (m,) base where each vector begins, for "none" and "chunks".
    """

    name: str
    values: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]


def embed_sequences(
    scorer: Scorer,
    sequences: Iterable[tuple[str, str | bytes]],
    *,
    layer: str | None = None,
    pooling: Pooling = "mean",
    strands: Strands = "fwd",
    progress: bool | None = False,
) -> list[Embedding]:
    """Embeddings in input order.

    Args:
        scorer: A model with layers.
        sequences: Names and bases.
        layer: One of the model's layers; None takes the last.
        pooling: "mean", "max", "last" give a vector; "none" one for each base, "chunks" for each chunk of the layer.
        strands: "fwd" reads forward; "mean" and "concat" join both directions, of pooled vectors only.
        progress: Show how far it is on stderr.

    Raises:
        ValueError: for a layer that the model lacks, or strands that cannot be joined.
    """
    scorer.check_layer(layer)
    if strands != "fwd" and pooling in ("none", "chunks"):
        raise ValueError(f"pooling {pooling!r} gives vectors for places, which differ between strands; use strands fwd")
    named = [(name, normalise(sequence)) for name, sequence in sequences]
    empty = [name for name, bases in named if not bases]
    if empty:
        raise ValueError(f"sequence {empty[0]!r} has no bases")
    found: list[Embedding | None] = [None] * len(named)
    bar = Progress("sequences", len(named), show=progress)
    for batch in scorer.batches([bases for _, bases in named]):
        chosen = [named[k][1] for k in batch]
        forward = _of_batch(scorer, chosen, layer, pooling)
        if strands != "fwd":
            other = _of_batch(scorer, [reverse_complement(bases) for bases in chosen], layer, pooling)
            forward = [(_join(a, b, strands), starts) for (a, starts), (b, _) in zip(forward, other)]
        for k, (values, starts) in zip(batch, forward):
            found[k] = Embedding(named[k][0], values, starts)
        bar.add(len(batch))
    bar.close()
    return [entry for entry in found if entry is not None]


def _of_batch(scorer: Scorer, sequences: Sequence[bytes], layer: str | None, pooling: Pooling) -> list[Any]:
    if pooling == "chunks":
        return scorer.chunks(sequences, layer)
    whole = scorer.embeddings(sequences, layer)
    if pooling == "none":
        return [(values, np.arange(len(values))) for values in whole]
    pool = {"mean": lambda v: v.mean(axis=0), "max": lambda v: v.max(axis=0), "last": lambda v: v[-1]}[pooling]
    return [(pool(values), np.zeros(0, np.int64)) for values in whole]


def _join(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32], strands: Strands) -> npt.NDArray[np.float32]:
    return np.concatenate([a, b]) if strands == "concat" else ((a + b) / 2).astype(np.float32)


def write_embeddings(out: str | Path, found: Sequence[Embedding], facts: dict[str, Any]) -> None:
    """Write embeddings; those with several vectors each lie one after the other, with `offsets`.

    Args:
        out: .npz and .zarr hold `names`, `values`, `offsets`, `starts`; .parquet has a row for each sequence.
        found: The embeddings.
        facts: Model, layer, pooling and so on, kept beside the values.

    Raises:
        ImportError: if a package for the format is missing.
        ValueError: for another suffix.
    """
    stacked = [np.atleast_2d(entry.values) for entry in found]
    arrays = {
        "values": np.concatenate(stacked) if stacked else np.zeros((0, 0), np.float32),
        "offsets": np.concatenate([[0], np.cumsum([len(values) for values in stacked])]).astype(np.int64),
        "starts": np.concatenate([entry.starts for entry in found]) if found else np.zeros(0, np.int64),
    }
    names = [entry.name for entry in found]
    suffix = Path(out).suffix
    if suffix == ".npz":
        with atomic_path(out) as temporary, open(temporary, "wb") as file:
            text = {f"about_{key}": np.array(str(value)) for key, value in facts.items()}
            np.savez(file, names=np.array(names, dtype=str), **arrays, **text)  # type: ignore[arg-type]
    elif suffix == ".parquet":
        _write_parquet(out, found, facts)
    elif suffix == ".zarr":
        _write_zarr(Path(out), names, arrays, facts)
    else:
        raise ValueError(f"unknown kind of output {str(out)!r}; expected {', '.join(SUFFIXES)}")


def _write_parquet(out: str | Path, found: Sequence[Embedding], facts: dict[str, Any]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('Parquet needs pyarrow; run: pip install "omnissm[io]"') from error
    columns = {
        "name": pa.array([entry.name for entry in found], pa.string()),
        "embedding": pa.array([entry.values.ravel().tolist() for entry in found], pa.list_(pa.float32())),
    }
    if any(entry.values.ndim > 1 for entry in found):
        columns["starts"] = pa.array([entry.starts.tolist() for entry in found], pa.list_(pa.int64()))
    metadata = {key: str(value) for key, value in facts.items()}
    with atomic_path(out) as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), temporary)


def _write_zarr(out: Path, names: list[str], arrays: dict[str, Any], facts: dict[str, Any]) -> None:
    try:
        import zarr
    except ImportError as error:
        raise ImportError('Zarr needs zarr; run: pip install "omnissm[io]"') from error
    if out.exists():
        raise ValueError(f"{str(out)!r} exists; remove it or choose another name")
    temporary = out.with_name(f".tmp.{out.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    group = zarr.open_group(str(temporary), mode="w", zarr_format=3)
    for name, values in arrays.items():
        chunks = (min(1024, max(1, len(values))), *values.shape[1:])
        array = group.create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=tuple(max(1, c) for c in chunks)
        )
        array[...] = values
    group.attrs.update({"names": names, **{key: str(value) for key, value in facts.items()}})
    temporary.rename(out)
