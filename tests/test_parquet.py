import sys

import pandas as pd
import pytest

from placesearch.errors import InputError
from placesearch.reporting.parquet import write_parquet
from placesearch.reporting.tables import trials_frame

from test_picture_tables import RECORDS  # isort: skip


def test_each_table_is_written_with_whole_numbers_whole_and_gaps_empty(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[parquet]'")
    table = trials_frame(RECORDS)
    table.to_csv(tmp_path / "trials.csv", index=False)
    assert write_parquet(tmp_path) == [tmp_path / "trials.parquet"]
    again = pd.read_parquet(tmp_path / "trials.parquet")
    assert list(again.columns) == list(table.columns)
    assert again.placement.tolist() == table.placement.tolist()
    assert again.params.tolist() == [100, 130, 120, 112, 110, 120, 112]
    assert pd.api.types.is_integer_dtype(again.params)
    assert again.val_accuracy.isna().tolist() == [False, False, False, True, False, False, False]


def test_without_pyarrow_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    trials_frame(RECORDS).to_csv(tmp_path / "trials.csv", index=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'placesearch\[parquet\]'"):
        write_parquet(tmp_path)
    assert not (tmp_path / "trials.parquet").exists()
