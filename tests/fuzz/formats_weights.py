"""Packed graphs, data of PyTorch Geometric, weights, states and checkpoints."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from formats_genomics import arrays, pack_npz
from fuzzing import Format, Payload, write_all
from hypothesis import strategies as st
from safetensors.torch import save

from omnissm.graphs.data.packed import PARTS, read_packed
from omnissm.graphs.data.processed import read_processed
from omnissm.graphs.data.sets import Cora
from omnissm.ssmcore import SequenceModel
from omnissm.ssmcore.cache import load_state, save_state
from omnissm.ssmcore.checkpoints import load_checkpoint, to_checkpoint
from omnissm.ssmcore.training.checkpoints import read_checkpoint, read_model_folder


def edges_of(nodes: int) -> st.SearchStrategy[Any]:
    return (
        st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=5) if nodes else st.just([])
    )


graph = st.integers(0, 5).flatmap(
    lambda nodes: st.fixed_dictionaries(
        {
            "nodes": st.just(nodes),
            "edges": edges_of(nodes),
            "part": st.sampled_from(PARTS),
            "y": st.floats(-9, 9, width=32),
        }
    )
)
graph_models = st.fixed_dictionaries(
    {
        "graphs": st.lists(graph, min_size=1, max_size=4),
        "undirected": st.booleans(),
        "edge_attr": st.booleans(),
        "seed": st.integers(0, 999),
        "type": st.sampled_from(["float32", "int8", "float16", "int64", "bool"]),
    }
)


def graph_arrays(model: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(model["seed"])
    graphs = model["graphs"]
    edges = [edge for g in graphs for edge in g["edges"]]
    found = {
        "node_ptr": np.cumsum([0, *(g["nodes"] for g in graphs)]).astype(np.int32),
        "edge_ptr": np.cumsum([0, *(len(g["edges"]) for g in graphs)]).astype(np.int32),
        "x": rng.integers(0, 2, (sum(g["nodes"] for g in graphs), 2)).astype(model["type"]),
        "edge_index": np.array(edges, np.int16).reshape(-1, 2).T,
        "y": np.array([[g["y"]] for g in graphs], np.float32),
        "split": np.array([PARTS.index(g["part"]) for g in graphs], np.uint8),
        "undirected": np.array(model["undirected"]),
    }
    if model["edge_attr"]:
        found["edge_attr"] = rng.standard_normal((len(edges), 3)).astype(np.float32)
    return found


def packed_graphs(model: Any) -> Payload:
    return arrays(graph_arrays(model))


def read_graphs(path: Path, model: Any) -> list[Any]:
    graphs, parts = read_packed(path)
    return [
        (g.x.numpy(), g.edge_index.numpy(), None if g.edge_attr is None else g.edge_attr.numpy(), g.y.numpy(), part)
        for g, part in zip(graphs, parts, strict=True)
    ]


def as_graphs(model: Any) -> list[Any]:
    held, found = graph_arrays(model), []
    for k, g in enumerate(model["graphs"]):
        nodes, edges = slice(*held["node_ptr"][k : k + 2]), slice(*held["edge_ptr"][k : k + 2])
        ends = np.array(g["edges"], np.int64).reshape(-1, 2).T
        features = held["edge_attr"][edges] if model["edge_attr"] else None
        if model["undirected"]:
            two = ends[0] != ends[1]  # a self loop is its own other direction
            ends = np.concatenate([ends, ends[::-1][:, two]], 1)
            features = None if features is None else np.concatenate([features, features[two]])
        # With as many nodes as graphs `y` is the graphs'.
        found.append((held["x"][nodes].astype(np.float64), ends, features, held["y"][k : k + 1], g["part"]))
    return found


# Cora, and what PyTorch Geometric prepares

citations = st.integers(1, 6).flatmap(
    lambda nodes: st.fixed_dictionaries(
        {
            "words": st.lists(st.sets(st.integers(0, 3)), min_size=nodes, max_size=nodes),
            "edges": st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=6),
            "labels": st.lists(st.integers(0, 3), min_size=nodes, max_size=nodes),
        }
    )
)


def cora(model: Any) -> Payload:
    words = [sorted(w) for w in model["words"]]
    return arrays(
        {
            "x_indptr": np.cumsum([0, *map(len, words)]).astype(np.int32),
            "x_indices": np.array([w for row in words for w in row], np.int16),
            "num_features": np.array(4),
            "edge_index": np.array(model["edges"], np.int16).reshape(-1, 2).T,
            "y": np.array(model["labels"], np.int8),
            "split": np.arange(len(words), dtype=np.int8) % 3,
        }
    )


def read_cora(path: Path, model: Any) -> Any:
    parts = Cora(str(path)).read_parts()
    return [parts["train"][0].edge_index.numpy(), *((p[0].x.numpy() > 0, p[0].y.numpy()) for p in parts.values())]


def as_cora(model: Any) -> Any:
    count = len(model["words"])
    x = np.array([[w in row for w in range(4)] for row in model["words"]])
    ends = np.array(model["edges"], np.int64).reshape(-1, 2).T
    split, y = np.arange(count) % 3, np.array(model["labels"])
    return [np.concatenate([ends, ends[::-1]], 1), *((x, np.where(split == k, y, -1)) for k in range(3))]


def processed(model: Any) -> Payload:
    words = torch.tensor([[w in row for w in range(4)] for row in model["words"]]).float()
    ends = torch.tensor(model["edges"], dtype=torch.int64).reshape(-1, 2).T
    parts = {"x": torch.cat([words, words]), "edge_index": torch.cat([ends, ends], 1), "y": torch.tensor([1.0, 2.0])}
    slices = {
        "x": torch.tensor([0, len(words), 2 * len(words)]),
        "edge_index": torch.tensor([0, ends.shape[1], 2 * ends.shape[1]]),
        "y": torch.tensor([0, 1, 2]),
    }
    return {"a.pt": saved((parts, slices, None))}


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def read_pyg(path: Path, model: Any) -> Any:
    return [(g.x.numpy(), g.edge_index.numpy(), g.y.numpy()) for g in read_processed(path)]


def as_pyg(model: Any) -> Any:
    x = np.array([[float(w in row) for w in range(4)] for row in model["words"]])
    ends = np.array(model["edges"], np.int64).reshape(-1, 2).T
    return [(x, ends, np.array([1.0])), (x, ends, np.array([2.0]))]


# Weights

shapes = st.lists(st.integers(0, 3), max_size=3)
weights_models = st.fixed_dictionaries(
    {
        "tensors": st.dictionaries(
            st.text("ab.é", min_size=1, max_size=4),
            st.tuples(shapes, st.sampled_from(["float32", "bfloat16", "int64", "bool", "float8_e4m3fn"])),
            min_size=1,
            max_size=3,
        ),
        "seed": st.integers(0, 999),
    }
)


def tensors(model: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(model["seed"])
    return {
        name: torch.randn(shape, generator=generator).to(getattr(torch, kind))
        for name, (shape, kind) in model["tensors"].items()
    }


def as_bytes(state: Mapping[str, torch.Tensor]) -> list[Any]:
    return sorted(
        (name, str(t.dtype), tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else [])
        for name, t in state.items()
    )


def model_folder(model: Any) -> Payload:
    config = {"omnissm": "0.1.0", "model": "timeseries/x", "args": {"a": 1}, "task": {}}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(tensors(model)),
        "data.json": b'{"classes": ["a"]}',
    }


def read_folder(path: Path, model: Any) -> Any:
    found = read_model_folder(path.parent)
    return [as_bytes(found.state), found.config["args"], dict(found.files)]


def as_folder(model: Any) -> Any:
    return [as_bytes(tensors(model)), {"a": 1}, {"data.json": '{"classes": ["a"]}'}]


def checkpoint(model: Any) -> Payload:
    return {"a.ckpt": saved({"state_dict": tensors(model), "epoch": 3, "callbacks": {"x": [1.5, None, "é"]}})}


def read_ckpt(path: Path, model: Any) -> Any:
    found = read_checkpoint(path)
    return [as_bytes(found.get("state_dict", {})), found.get("epoch"), found.get("callbacks")]


def as_ckpt(model: Any) -> Any:
    return [as_bytes(tensors(model)), 3, {"x": [1.5, None, "é"]}]


# States and published checkpoints of sequence models

NET = SequenceModel(64, "m2t1", vocab_size=11).eval()
IDS = torch.arange(6)[None] % 11


def state_file(model: Any) -> Payload:
    import tempfile

    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        save_state(NET.prefill(IDS[:, :model])[1], f"{scratch}/a")
        return {"a.safetensors": Path(f"{scratch}/a").read_bytes()}


def next_logits(state: Any, length: int) -> np.ndarray:
    with torch.no_grad():
        return NET.step(IDS[:, length], state)[0].numpy()


def read_state(path: Path, model: Any) -> Any:
    state = load_state(path)
    try:
        return next_logits(state, model)
    except (RuntimeError, AttributeError, IndexError):  # a state of another shape does not fit the model
        return None


def as_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return next_logits(NET.prefill(IDS[:, :model])[1], model)


def published(model: Any) -> Payload:
    state, config = to_checkpoint(NET_PLAIN, "state_spaces")
    kept = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if model["parts"]:
        names = sorted(kept)
        cut = {n: f"model-{k % 2}.safetensors" for k, n in enumerate(names)}
        files = {
            f"model-{k}.safetensors": save({n: kept[n] for n in names if cut[n] == f"model-{k}.safetensors"})
            for k in range(2)
        }
        index = {"model.safetensors.index.json": json.dumps({"weight_map": cut}).encode()}
        return {"config.json": json.dumps(config).encode(), **index, **files}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(kept)}


NET_PLAIN = SequenceModel(64, "m2", vocab_size=16).eval()


def read_published(path: Path, model: Any) -> np.ndarray:
    with torch.no_grad():
        return load_checkpoint(path.parent)(IDS).numpy()


def as_published(model: Any) -> np.ndarray:
    with torch.no_grad():
        return NET_PLAIN(IDS).numpy()


FORMATS = [
    Format("packed-graphs", graph_models, packed_graphs, read_graphs, as_graphs, pack_npz),
    Format("cora", citations, cora, read_cora, as_cora, pack_npz),
    Format("pyg-processed", citations, processed, read_pyg, as_pyg),
    Format("model-folder", weights_models, model_folder, read_folder, as_folder),
    Format("ckpt", weights_models, checkpoint, read_ckpt, as_ckpt),
    Format("state", st.integers(1, 5), state_file, read_state, as_logits, weight=0.5),
    Format(
        "published-checkpoint",
        st.fixed_dictionaries({"parts": st.booleans()}),
        published,
        read_published,
        as_published,
        write_all,
        weight=0.5,
    ),
]
