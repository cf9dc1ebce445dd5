"""`python -m harness` is `moe-harness`."""

import sys

from harness.cli import main

sys.exit(main())
