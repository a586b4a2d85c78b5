"""What holds for every test and for the processes that tests start."""

import os
import sys
from pathlib import Path

# tests compute on small tensors, where a second thread costs more than it brings
os.environ.setdefault("OMP_NUM_THREADS", "1")

# `from tests import oracle` works wherever pytest is started from, and in spawned processes
sys.path.insert(0, str(Path(__file__).parents[1]))
