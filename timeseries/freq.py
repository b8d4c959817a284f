"""Frequencies and time axes: spelling, checks, seasons, and how a time is written in messages."""

from __future__ import annotations

import re
import warnings

import numpy as np
import pandas as pd

_RENAMED = {
    "H": "h", "T": "min", "S": "s", "L": "ms", "U": "us", "N": "ns", "M": "ME", "BM": "BME", "CBM": "CBME", "SM": "SME",
    "Q": "QE", "BQ": "BQE", "Y": "YE", "A": "YE", "BY": "BYE", "BA": "BYE", "AS": "YS", "BAS": "BYS", "BH": "bh",
    "CBH": "cbh",
}  # fmt: skip
_SEASONS = {
    "s": 3600, "min": 1440, "h": 24, "D": 7, "B": 5, "W": 52, "SME": 24, "SMS": 24,
    **dict.fromkeys(("ME", "MS", "BME", "BMS", "CBME", "CBMS"), 12), **dict.fromkeys(("QE", "QS", "BQE", "BQS"), 4),
}  # fmt: skip


def normalize_freq(freq: str | int) -> str | int:
    """The spelling of a frequency that current pandas accepts: "H" becomes "h", "15T" "15min", "M" "ME".

    Raises:
        ValueError: if `freq` is neither an integer step of at least 1 nor a pandas alias.
    """
    if isinstance(freq, (int, np.integer)) and not isinstance(freq, bool):
        if freq < 1:
            raise ValueError(f"freq must be a positive step, got {freq}.")
        return int(freq)
    match = re.fullmatch(r"(\d*)([A-Za-z]+)(-[A-Za-z]{3})?", str(freq))
    spelled = f"{match[1]}{_RENAMED.get(match[2], match[2])}{match[3] or ''}" if match else str(freq)
    try:
        return pd.tseries.frequencies.to_offset(spelled).freqstr
    except ValueError:
        raise ValueError(
            f"Unknown freq {freq!r}; expected a pandas alias such as 'h', '15min', 'D', 'ME', or an integer step."
        ) from None


def season_length(freq: str | int | None) -> int:
    """The usual season in steps: an hour of seconds, a day of minutes or hours, a week of days, a year of months.

    A multiple divides it ("15min" has 96 steps a day). 1 where it does not divide, or no season is customary.
    """
    if freq is None or isinstance(freq, int):
        return 1
    offset = to_offset(freq)
    base = _SEASONS.get(offset.rule_code.split("-")[0], 1)
    return base // offset.n if base % offset.n == 0 else 1


def to_offset(freq: str) -> pd.offsets.BaseOffset:
    """The pandas offset of an alias in either spelling."""
    offset = pd.tseries.frequencies.to_offset(str(normalize_freq(freq)))
    return offset


def same_freq(one: str | int, other: str | int) -> bool:
    """Whether two spellings mean the same steps, as "60min" and "h", or "24h" and "D" do."""
    one, other = normalize_freq(one), normalize_freq(other)
    if one == other or isinstance(one, int) or isinstance(other, int):
        return one == other
    lengths = [fixed_step(freq) for freq in (one, other)]
    return lengths[0] is not None and lengths[0] == lengths[1]


def fixed_step(freq: str) -> int | None:
    """Nanoseconds of a step of fixed length, a day at most as unit; None for weeks, months and business days."""
    offset = to_offset(freq)
    if offset.rule_code == "D":
        return offset.n * 86_400_000_000_000
    return int(offset.nanos) if isinstance(offset, pd.offsets.Tick) else None


def step_times(start: np.datetime64 | int, periods: int, freq: str | int) -> np.ndarray:
    """`periods` times from `start` on, the first being `start` itself if it lies on `freq`."""
    freq = normalize_freq(freq)
    if isinstance(freq, int):
        return int(start) + freq * np.arange(periods, dtype=np.int64)
    return nanoseconds(pd.date_range(pd.Timestamp(start), periods=periods, freq=freq).to_numpy())


def nanoseconds(times: np.ndarray) -> np.ndarray:
    """Times as datetime64[ns], which holds the years 1678 to 2262; numpy would turn others into wrong ones.

    Raises:
        ValueError: naming the first time that it cannot hold.
    """
    out = times.astype("datetime64[ns]")
    wrong = (out.astype(times.dtype) != times) & ~np.isnat(times)
    if wrong.any():
        raise ValueError(
            f"Time {times[wrong][0]} in row {int(wrong.argmax())} lies outside of the years 1678 to 2262, which "
            "nanoseconds hold; correct it."
        )
    return out


def infer_freq(times: np.ndarray) -> str | int | None:
    """The frequency that these sorted times follow exactly, or None when they are irregular or fewer than three."""
    if len(times) < 3:
        return None
    if np.issubdtype(times.dtype, np.integer):
        steps = np.diff(times)
        return int(steps[0]) if steps[0] > 0 and (steps == steps[0]).all() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pandas 4 will return an offset, and pandas 3 says so each time
        freq = pd.infer_freq(pd.DatetimeIndex(times))
    return None if freq is None else normalize_freq(getattr(freq, "freqstr", freq))


def base_step(times: np.ndarray) -> float:
    """Median step in units of the time coordinate (nanoseconds or integers)."""
    steps = np.diff(times).astype(np.float64)
    return float(np.median(steps)) if steps.size else 1.0


def check_times(times: np.ndarray) -> None:
    """Times must be datetime64 or integers, present, increasing and without duplicates.

    Raises:
        ValueError: naming the first offending place.
    """
    if times.dtype.kind not in "Miu":
        raise ValueError(
            f"Coordinate 'time' has dtype {times.dtype}, expected datetime64 or integers; convert it with "
            "pandas.to_datetime(..., utc=True)."
        )
    if times.dtype.kind == "u" and (times > np.iinfo(np.int64).max).any():
        raise ValueError(f"Coordinate 'time' holds {times.max()}, beyond int64; subtract an offset.")
    if times.size == 0:
        raise ValueError("The series has no time steps; expected at least one row.")
    if times.dtype.kind == "M" and np.isnat(times).any():
        raise ValueError(
            f"Coordinate 'time' has no valid time at row {int(np.isnat(times).argmax())}; drop the row or correct it."
        )
    back = times[1:] <= times[:-1]
    if not back.any():
        return
    row = int(back.argmax()) + 1
    if times[row] == times[row - 1]:
        raise ValueError(
            f"Duplicate time {stamp(times[row])} at row {row}; use regularize(ds, freq, duplicates='first' or 'mean')."
        )
    raise ValueError(
        f"Times are not sorted: row {row} is {stamp(times[row])}, after {stamp(times[row - 1])}; use "
        "ds.sortby('time') or regularize(ds, freq)."
    )


def check_freq(times: np.ndarray, freq: str | int) -> None:
    """Sorted times must follow `freq` without a gap.

    Raises:
        ValueError: showing the first gap and its place.
    """
    freq = normalize_freq(freq)
    if isinstance(freq, int) != (times.dtype.kind in "iu"):
        raise ValueError(
            f"freq {freq!r} does not fit a time coordinate of {times.dtype}; integer steps go with integer times, "
            "aliases with datetime64."
        )
    expected = step_times(times[0], len(times), freq)
    wrong = expected != times
    if not wrong.any():
        return
    row = int(wrong.argmax())
    if row == 0:
        raise ValueError(
            f"Times do not follow freq {freq!r}: the first, {stamp(times[0])}, is not on it; use regularize(ds, "
            "freq) or correct freq."
        )
    raise ValueError(
        f"Times do not follow freq {freq!r}: after {stamp(times[row - 1])} (row {row - 1}) comes {stamp(times[row])}, "
        f"expected {stamp(expected[row])}; use regularize(ds, {freq!r}) to fill gaps with NaN, or remove the "
        "attribute 'freq'."
    )


def stamp(time: np.datetime64 | np.integer) -> str:
    """A time as people write it: 2013-02-03 04:00."""
    if not np.issubdtype(np.asarray(time).dtype, np.datetime64):
        return str(int(time))
    text = pd.Timestamp(time).isoformat(sep=" ")
    return text.removesuffix(":00") if text.count(":") == 2 else text
