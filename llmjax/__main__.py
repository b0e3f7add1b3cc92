"""``python -m llmjax``."""

import sys

from llmjax.cli.main import main

sys.exit(main())
