"""`python -m pykvcache`: the command line, see pykvcache/cli/."""

import sys

from pykvcache.cli import main

sys.exit(main())
