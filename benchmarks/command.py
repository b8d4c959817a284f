"""A benchmark as a command: what its user caused ends with one line and exit code 2, like `omnissm` itself."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from omnissm.__main__ import is_bad_input, one_line


def leave(main: Callable[[], int | None]) -> None:
    """Run the program and end the process with its exit code; faults of the program itself keep their traceback."""
    try:
        code = main()
    except Exception as error:
        import torch  # the page of results needs none

        if not torch.cuda.is_available() and re.search("NVIDIA|CUDA", str(error)):
            text = "this machine has no CUDA device that torch can use; take --device cpu where the program has it."
        elif is_bad_input(error):
            text = one_line(error)
        else:
            raise
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {text}\n")
        code = 2
    sys.exit(code)
