"""The tables of a report as Parquet, for programs that would rather not guess the types of a CSV."""

from pathlib import Path

import pandas as pd

from placesearch.errors import InputError


def write_parquet(folder: Path) -> list[Path]:
    """Write each table of a report folder as Parquet beside its CSV.

    Args:
        folder: The report folder.

    Returns:
        What was written.

    Raises:
        InputError: If pyarrow is not installed.
        OSError: If the folder cannot be read or written to.
    """
    written = []
    for path in sorted(folder.glob("*.csv")):
        table = pd.read_csv(path, dtype_backend="numpy_nullable")
        try:
            table.to_parquet(path.with_suffix(".parquet"), engine="pyarrow", index=False)
        except ImportError:
            raise InputError("Parquet needs pyarrow: pip install 'placesearch[parquet]'") from None
        written.append(path.with_suffix(".parquet"))
    return written
