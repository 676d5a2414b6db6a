"""``python -m bayeslora``."""

import sys

from bayeslora.command.main import main

sys.exit(main())
