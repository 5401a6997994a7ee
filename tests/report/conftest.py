"""What the tests of the report share."""

from __future__ import annotations

import sys
from pathlib import Path

# report_folders.py lies beside the tests, which are no package.
sys.path.insert(0, str(Path(__file__).parent))
