"""Calls that this package does without: they run code out of data, ask the network, or write where they should not."""

import ast
import os
import pickle
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from omnissm.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (
    "kernels",
    "ssmcore",
    "vision",
    "genomics",
    "timeseries",
    "graphs",
    "configs",
    "benchmarks",
    "examples",
    "docs",
)
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
FILES += [*ROOT.glob("*.py"), *sorted((ROOT / "tests").rglob("*.py"))]

MODULES = {
    "pickle": "unpickling runs code; catch pickle.UnpicklingError only",
    **dict.fromkeys(("cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"), "unpickling runs code"),
    **dict.fromkeys(("requests", "httpx", "aiohttp", "ftplib", "urllib.request", "http.client"), "asks the network"),
}
CALLS = {
    **dict.fromkeys(("eval", "exec"), "runs text as code"),
    **dict.fromkeys(("os.system", "os.popen", "commands.getoutput"), "starts a shell"),
    **dict.fromkeys(("yaml.load", "yaml.unsafe_load", "yaml.full_load"), "builds objects; use yaml.safe_load"),
    **dict.fromkeys(("pd.read_pickle", "pandas.read_pickle"), "unpickles"),
    **dict.fromkeys(("tempfile.mktemp",), "its name can be taken by others"),
    **dict.fromkeys(("shutil.unpack_archive",), "writes where the archive says"),
    **dict.fromkeys(("torch.hub.load", "torch.hub.load_state_dict_from_url"), "asks the network and runs its code"),
    **dict.fromkeys(("socket.socket", "socket.create_connection"), "asks the network"),
}
METHODS = {
    "extractall": "writes where the archive says",
    "to_pickle": "writes what only unpickling reads",
    "load_from_checkpoint": "use read_checkpoint or read_model_folder",
}
# Calls that need an argument with this value, by the last part of their names or by the whole.
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
TRAINER = {"fit", "validate", "test", "predict"}  # with ckpt_path=, they read a checkpoint
# File and call: what is done there on purpose, and why that is safe.
ALLOWED = {
    ("ssmcore/training/checkpoints.py", "pickle"): "for the class of an error",
    ("genomics/models/__init__.py", "snapshot_download"): "asked for by the prefix hf-hub:",
    ("kernels/replay_source.py", "exec"): "lines of numbers and names that it made itself",
    ("tests/release.py", "extractall"): "with the filter for data, of archives that it made",
}
TESTS_MAY = {"exec", "eval", "pickle"}  # run the documents' blocks; measure and send what this process made


def name_of(node: ast.AST) -> str:
    """A dotted name, "" for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else "." + ".".join(reversed(parts))


def problems(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, call and reason of everything forbidden."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            names = [f"{base}.{alias.name}".strip(".") for alias in node.names]
            for name in names:
                for module, why in MODULES.items():
                    if name == module or name.startswith(f"{module}."):
                        yield node.lineno, module, why
                if name in ("huggingface_hub.snapshot_download", "huggingface_hub.hf_hub_download"):
                    yield node.lineno, name.rpartition(".")[2], "asks the network"
        if not isinstance(node, ast.Call):
            continue
        name, values = name_of(node.func), {key.arg: key.value for key in node.keywords}
        last = name.rpartition(".")[2]
        if name in CALLS:
            yield node.lineno, name, CALLS[name]
        if last in METHODS and "." in name:
            yield node.lineno, last, METHODS[last]
        if name in NEEDED:
            key, value = NEEDED[name]
            given = values.get(key)
            if not (isinstance(given, ast.Constant) and given.value is value):
                yield node.lineno, name, f"needs {key}={value}"
        if last in TRAINER and "ckpt_path" in values and isinstance(node.func, ast.Attribute | ast.Name):
            given = values.get("weights_only")
            if not (isinstance(given, ast.Constant) and given.value is True):
                yield node.lineno, f"{last}(ckpt_path=...)", "needs weights_only=True"
        shell = values.get("shell")
        if shell is not None and not (isinstance(shell, ast.Constant) and shell.value is False):
            yield node.lineno, f"{name}(shell=...)", "starts a shell"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "import urllib.request", "from http import client",
        "from huggingface_hub import snapshot_download", "eval('1')", "exec(x)", "os.system('ls')", "yaml.load(f)",
        "torch.load(f)", "torch.load(f, weights_only=False)", "torch.load(f, weights_only=flag)", "np.load(f)",
        "np.load(f, allow_pickle=True)", "frame.to_pickle(p)", "pd.read_pickle(p)", "archive.extractall(p)",
        "tarfile.open(f).extractall()", "subprocess.run('ls', shell=True)", "subprocess.Popen(x, shell=flag)",
        "trainer.fit(model, ckpt_path=p)", "self.trainer.test(m, ckpt_path=p, weights_only=False)", "tempfile.mktemp()",
        "Task.load_from_checkpoint(p)", "socket.create_connection(x)", "torch.hub.load(x)",
    ],
)  # fmt: skip
def test_the_check_finds(code):
    assert list(problems(code))


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "subprocess.run(['ls'])", "model.eval()",
        "trainer.fit(model, ckpt_path=p, weights_only=True)", "yaml.safe_load(f)", "socket.gethostname()",
        "from .pickle import x", "json.load(f)", "re.compile('x')",
    ],
)  # fmt: skip
def test_the_check_leaves_alone(code):
    assert not list(problems(code))


def test_no_forbidden_calls():
    found, used = [], set()
    for path in FILES:
        place = path.relative_to(ROOT).as_posix()
        for line, call, why in problems(path.read_text()):
            if (place, call) in ALLOWED:
                used.add((place, call))
            elif not (place.startswith("tests/") and call in TESTS_MAY):
                found.append(f"{place}:{line}: {call} {why}")
    assert not found, "\n".join(found)
    assert used == set(ALLOWED), "entries of ALLOWED that nothing needs"


class Evil:
    """Makes the folder `ran` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """Pickles that act when they are loaded, as several kinds of files."""
    monkeypatch.chdir(tmp_path)
    value = Evil()
    torch.save({"state_dict": {"w": torch.ones(1)}, "x": value}, "a.ckpt")
    torch.save((value, {}, None), "a.pt")
    np.savez("a.npz", node_ptr=np.array([value], dtype=object))
    Path("a.pkl").write_bytes(pickle.dumps(value))
    pickle.loads(Path("a.pkl").read_bytes())
    assert Path("ran").exists()  # it does what it should
    Path("ran").rmdir()


def test_pickles_do_not_run(evil):
    from omnissm.graphs.data.packed import read_packed
    from omnissm.graphs.data.processed import read_processed
    from omnissm.ssmcore.training.arrays import read_arrays
    from omnissm.ssmcore.training.checkpoints import export_checkpoint, read_checkpoint, read_weights

    reads = [
        (read_checkpoint, "a.ckpt"), (read_weights, "a.ckpt"), (read_packed, "a.npz"), (read_arrays, "a.npz"),
        (read_processed, "a.pt"), (lambda path: read_checkpoint(path, allow_pickle=True), "a.pkl"),
        (lambda path: read_weights(path, allow_pickle=True), "a.pt"),
        (lambda path: export_checkpoint(path, "model"), "a.ckpt"),
    ]  # fmt: skip
    for read, name in reads:
        with pytest.raises(ValueError, match=r"."):
            read(name)
        assert not Path("ran").exists(), name
    assert not Path("model").exists()


def test_resuming_runs_no_code_of_the_checkpoint(tmp_path, monkeypatch, capsys):
    """A run's own last.ckpt holds plain values and tensors; one with more is refused."""
    monkeypatch.chdir(tmp_path)
    words = ["timeseries", "fit", "-c", "timeseries/sequence_classifier_waves", "--data.init_args.train_series", "24"]
    words += ["--data.init_args.length", "8", "--trainer.enable_progress_bar", "false", "--run", "x"]
    assert main([*words, "--trainer.max_epochs", "1"]) == 0
    last = Path("runs/x/checkpoints/last.ckpt")
    stored = torch.load(last, weights_only=True)
    torch.save({**stored, "callbacks": {"x": Evil()}}, last)
    capsys.readouterr()
    assert main([*words, "--trainer.max_epochs", "2", "--resume"]) == 2
    assert not Path("ran").exists()
    assert "omnissm: error: " in capsys.readouterr().err


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Whoever looks up a name or connects fails the test."""
    asked: list = []

    def refuse(*args, **kwargs):
        asked.append(args)
        raise OSError("a test without network asked for it")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    yield asked
    assert not asked


TRAIN = {
    "timeseries": "sequence_classifier_waves",
    "genomics": "hnet_tiny_synthetic",
    "vision": "hydra_vit_tiny_synthetic",
    "graphs": "dag_ssm_tiny_synthetic",
}


@pytest.mark.parametrize("domain", TRAIN)
def test_training_asks_no_network(domain, offline):
    words = [domain, "fit", "-c", f"{domain}/{TRAIN[domain]}", "--trainer.fast_dev_run", "1"]
    assert main([*words, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        [
            "genomics",
            "score",
            "--model",
            "runs/mistyped",
            "--reference",
            "a.fa",
            "--variants",
            "a.vcf",
            "--out",
            "o.tsv",
        ],
        ["timeseries", "forecast", "--checkpoint", "owner/name", "--out", "o.nc"],
        ["vision", "predict", "--checkpoint", "owner/name", "--images", "a.png"],
        ["graphs", "plot", "--checkpoint", "owner/name", "--data", "a.npz", "--out", "o.png"],
    ],
)
def test_a_mistyped_folder_is_not_looked_up_elsewhere(words, offline, capsys):
    Path("a.fa").write_text(">c\nACGT\n")
    Path("a.vcf").write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n")
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("omnissm: error: ")


def test_the_hub_is_asked_when_named(monkeypatch):
    """The prefix is what asks; the folder that comes back is read like any other."""
    import huggingface_hub

    from omnissm.genomics.loading import load_model
    from omnissm.genomics.models import PACKAGED

    asked = []

    def download(name, **_):
        asked.append(name)
        return str(PACKAGED / "dnahnet_debug_ecoli")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_model("hf-hub:owner/name")
    assert asked == ["owner/name"]


def test_a_runs_configuration_names_data_modules_only(tmp_path, monkeypatch):
    """The folder of a run may come from others: what it names is built only if it is a data module."""
    from omnissm.timeseries.forecast import run_data

    monkeypatch.chdir(tmp_path)
    content = "data:\n  class_path: pathlib.Path\n  init_args: {}\n"
    Path("config.yaml").write_text(content)
    with pytest.raises(ValueError, match="no data module; expected a subclass of SSMData"):
        run_data(".")


def test_files_are_not_more_open_than_asked(tmp_path):
    from omnissm.ssmcore.training.checkpoints import write_atomic

    old = os.umask(0o077)
    try:
        write_atomic(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
