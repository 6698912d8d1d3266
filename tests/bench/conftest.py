"""Makes `bench`, which is not part of the installed package, importable, with all families registered."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

from bench.ops import load_families  # noqa: E402

load_families()
