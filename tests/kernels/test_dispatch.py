"""Which backend runs, and what is said when it cannot."""

import subprocess
import sys
import warnings

import pytest
import torch

from omnissm.kernels import BackendError, available_backends, dispatch, linear_scan, use_backend
from omnissm.kernels.dispatch import choose

CPU = torch.zeros(1)


@pytest.fixture
def calls(monkeypatch):
    """Names of the implementations that linear_scan called."""
    from importlib import import_module

    op = import_module("omnissm.kernels.linear_scan.op")
    seen = []
    for name in ("reference", "chunked"):
        original = getattr(op, f"linear_scan_{name}")
        monkeypatch.setattr(op, f"linear_scan_{name}", lambda *a, n=name, f=original: seen.append(n) or f(*a))
    return seen


def test_order_of_preference(calls, monkeypatch):
    a = torch.rand(1, 3, 2)
    linear_scan(a, a)
    monkeypatch.setenv("SSM_BACKEND", "reference")
    linear_scan(a, a)
    with use_backend("chunked"):
        linear_scan(a, a)
        linear_scan(a, a, backend="reference")
        with use_backend("reference"):
            linear_scan(a, a)
        linear_scan(a, a)
    linear_scan(a, a)
    assert calls == ["chunked", "reference", "chunked", "reference", "reference", "chunked", "reference"]


def test_use_backend_ends_with_an_exception():
    with pytest.raises(RuntimeError, match="stop"), use_backend("reference"):
        raise RuntimeError("stop")
    assert choose("auto", CPU, op="op") == "chunked"


def test_unknown_names(monkeypatch):
    with pytest.raises(
        ValueError, match="op: unknown backend 'cuda'; expected one of auto, reference, chunked, triton"
    ):
        choose("cuda", CPU, op="op")
    with pytest.raises(ValueError, match="use_backend: unknown backend 'tritn'"), use_backend("tritn"):
        pass
    monkeypatch.setenv("SSM_BACKEND", "fast")
    with pytest.raises(ValueError, match="SSM_BACKEND: unknown backend 'fast'"):
        choose("auto", CPU, op="op")


def test_explicit_request_is_refused_with_the_reason():
    with pytest.raises(BackendError, match=r"backend='triton' is not possible here: op has no triton implementation"):
        choose("triton", CPU, op="op", implementations=("reference", "chunked"))
    with (
        pytest.raises(BackendError, match=r"\(from use_backend\) is not possible here: too odd. Use backend='auto' or"),
        use_backend("triton"),
    ):
        choose("auto", CPU, op="op", obstacle="too odd")


def test_automatic_choice_falls_back_with_one_warning(monkeypatch):
    class OnGPU:
        device = torch.device("cuda")

    monkeypatch.setattr(dispatch, "triton_obstacle", lambda kind: "no compiler")
    dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="slower chunked path: no compiler"):
        assert choose("auto", OnGPU(), op="op") == "chunked"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("auto", OnGPU(), op="op") == "chunked"
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda kind: None)
    assert choose("auto", OnGPU(), op="op") == "triton"
    assert choose("auto", OnGPU(), op="op", obstacle="no") == "chunked"


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", "Triton needs a CUDA tensor, got device 'cpu'"),
        ("import os, triton; os.environ['TRITON_INTERPRET'] = '1'", "TRITON_INTERPRET was set after Triton"),
    ],
    ids=["no interpreter", "set too late"],
)
def test_reason_on_cpu(before, expected, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = f"{before}\nfrom omnissm.kernels import available_backends\nprint(available_backends('cpu')['triton'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert expected in done.stdout


def test_available_backends_has_a_reason_or_none():
    found = available_backends()
    assert set(found) == {"reference", "chunked", "triton"}
    assert found["reference"] is None
    assert found["chunked"] is None
    assert "meta" in available_backends("meta")["triton"]
