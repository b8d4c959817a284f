"""Makes the harness importable for these tests and the processes that they start."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
