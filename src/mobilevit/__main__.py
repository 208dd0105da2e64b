"""`python -m mobilevit` is the `mobilevit` command."""

import sys

from mobilevit.cli import main

sys.exit(main())
