"""The papers' numbers as data, each with its source."""

from pathlib import Path

import pandas as pd

COLUMNS = ["paper", "source", "row", "method", "pretrain_data", "data", "labels", "protocol", "backbone", "stem", "epochs",
           "metric", "value", "se", "note"]  # fmt: skip


def table(**where: str | float) -> pd.DataFrame:
    """Rows of published.csv, filtered by column. labels: share in (0, 1]; value and se in percent."""
    rows = pd.read_csv(Path(__file__).with_name("published.csv"))
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows
