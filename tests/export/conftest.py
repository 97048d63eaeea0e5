"""Makes ``networks`` importable by name for the tests of models and exports."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))
