"""Two shortcuts of Triton's interpreter for tests: the same operations on the same numbers, fewer of them in Python.

Where a function that a kernel calls finds the language replaced by the interpreter's, it is not replaced again. A scan
takes a step along its axis for all other positions at once; the interpreter takes one position at a time.
"""

from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Put the shortcuts in place until the patch is undone."""
    patch.setattr(interpreter.InterpretedFunction, "__call__", _call)
    patch.setattr(interpreter.ScanOps, "generic_scan", _scan)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if any(tl.core.is_builtin(language.full) for language in (tl, tl.core)):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def _scan(self: Any, inputs: Any) -> list[Any]:
    moved = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    outputs = [np.empty_like(x) for x in moved]
    for k in range(len(moved[0])):
        new = tuple(self.to_tensor(x[k], given.dtype) for x, given in zip(moved, inputs))
        if k:
            before = tuple(self.to_tensor(y[k - 1], given.dtype) for y, given in zip(outputs, inputs))
            found = self.combine_fn.fn(*before, *new)
            new = found if isinstance(found, tuple) else (found,)
        for y, value in zip(outputs, new):
            y[k] = np.reshape(value.handle.data, y[k].shape)
    return [self.to_tensor(np.moveaxis(y, 0, self.axis), given.dtype) for y, given in zip(outputs, inputs)]
