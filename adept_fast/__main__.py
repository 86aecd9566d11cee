"""`python -m adept_fast` is the command `adept-fast`."""

import sys

from adept_fast.cli.main import main

sys.exit(main())
