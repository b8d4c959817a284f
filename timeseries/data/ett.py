"""Electricity transformer temperature (ETT): ETTh1, ETTh2 hourly, ETTm1, ETTm2 every 15 minutes; seven variates.

Zhou et al., "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting" (2021). The borders are
the customary 12, 4 and 4 months of 30 days, so that results compare with published ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from ..frames import from_wide
from ..splits import ETT_BORDERS, Cut
from .base import ForecastingData

VARIATES = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
FREQS = {"ETTh1": "h", "ETTh2": "h", "ETTm1": "15min", "ETTm2": "15min"}


class ETT(ForecastingData):
    """One of the four ETT files, with the standard borders.

    Args:
        root: Folder with ETTh1.csv and the like.
        name: "ETTh1", "ETTh2", "ETTm1" or "ETTm2".
        options: Arguments of `ForecastingData`; `train`, `val` and `test` replace the standard borders.
    """

    def __init__(self, root: str, name: str = "ETTh1", **options: Any) -> None:
        if name not in FREQS:
            raise ValueError(f"Unknown ETT file {name!r}; expected one of {', '.join(FREQS)}.")
        self.root, self.file = Path(root), name
        super().__init__(**options)

    def borders(self) -> dict[str, Cut | None]:
        """12, 4 and 4 months of 30 days; what follows is unused, as in published results."""
        steps_per_hour = 4 if self.freq == "15min" else 1
        train, val, test = (steps_per_hour * hours for hours in ETT_BORDERS)
        return {"train": train, "val": val, "test": test}

    @property
    def variates(self) -> list[str]:
        """The six loads and the oil temperature OT."""
        return list(VARIATES)

    @property
    def freq(self) -> str:
        """Hourly or every 15 minutes."""
        return FREQS[self.file]

    def prepare_data(self) -> None:
        """Check that the file is there.

        Raises:
            FileNotFoundError: with the place where the files come from.
        """
        path = self.root / f"{self.file}.csv"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; expected a folder with {', '.join(f'{name}.csv' for name in FREQS)} "
                "from https://github.com/zhouhaoyi/ETDataset (folder ETT-small)."
            )

    def read(self) -> xr.Dataset:
        """The file as it is, 17,420 hours or four times that."""
        self.prepare_data()
        frame = pd.read_csv(self.root / f"{self.file}.csv", parse_dates=["date"])
        return from_wide(frame, time="date", variates=VARIATES, freq=self.freq)
