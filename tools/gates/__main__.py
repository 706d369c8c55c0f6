"""`python -m tools.gates`"""

import sys

from tools.gates.kernel_gates import main

sys.exit(main())
