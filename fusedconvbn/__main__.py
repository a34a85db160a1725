"""`python -m fusedconvbn` is the command `fusedconvbn`."""

import sys

from fusedconvbn.cli import main

sys.exit(main())
