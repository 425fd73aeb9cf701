"""``python -m dask_shardsql.cli``: the same as ``dask-shardsql``."""

import sys

from dask_shardsql.cli import main

if __name__ == "__main__":
    sys.exit(main())
