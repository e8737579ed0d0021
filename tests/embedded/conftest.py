"""The scripts in `embedded/` import each other by name, as they do when one of them is run."""

import sys
from pathlib import Path

EMBEDDED = Path(__file__).resolve().parents[2] / "embedded"
sys.path.insert(0, str(EMBEDDED))
