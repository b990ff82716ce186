"""`python -m unet_fast`: the command line."""

import sys

from unet_fast.cli import main

sys.exit(main())
