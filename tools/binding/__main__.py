"""`python -m tools.binding`"""

import os
import sys

from tools.binding.matrix import parse, run

sys.exit(run(parse(), os.environ))
