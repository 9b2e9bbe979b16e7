"""`python -m vmodel`."""

import sys

from vmodel.cli import main

sys.exit(main())
