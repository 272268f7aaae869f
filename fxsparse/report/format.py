"""Numbers as a reader wants them: the same text in the terminal and on the page."""

from __future__ import annotations

from fxsparse.report.statistics import Summary

MISSING = "–"


def percent(value: float, digits: int = 1) -> str:
    """A fraction in [0, 1] as percent.

    >>> percent(0.9)
    '90.0 %'
    """
    return f"{100 * value:.{digits}f} %"


def accuracy(summary: Summary) -> str:
    """Mean and standard deviation in percent; the deviation is left out where there is only one value.

    >>> accuracy(Summary(0.9653, 0.0042, 0.0104, 3))
    '96.5 ± 0.4 %'
    """
    if summary.deviation is None:
        return f"{100 * summary.mean:.1f} %"
    return f"{100 * summary.mean:.1f} ± {100 * summary.deviation:.1f} %"


def count(value: int) -> str:
    """An exact count with thousands separators."""
    return f"{value:,}"


def short_count(value: float) -> str:
    """A count in three significant digits with k, M or G.

    >>> [short_count(n) for n in (950, 50_200, 999_999, 4_089_184_256)]
    ['950', '50.2 k', '1.00 M', '4.09 G']
    """
    for factor, suffix in ((1, ""), (1e3, " k"), (1e6, " M"), (1e9, " G")):
        scaled = value / factor
        if scaled < 999.5 or suffix == " G":
            break
    digits = 0 if suffix == "" or scaled >= 99.95 else 1 if scaled >= 9.995 else 2
    return f"{scaled:.{digits}f}{suffix}"


def size(value: int) -> str:
    """Bytes in kB or MB (powers of ten).

    >>> size(205_312)
    '205 kB'
    """
    return f"{short_count(value)}B" if value >= 1000 else f"{value} B"


def milliseconds(value: float) -> str:
    """A latency in milliseconds, three decimals below one and two above.

    >>> milliseconds(0.01234), milliseconds(12.3456)
    ('0.012', '12.35')
    """
    return f"{value:.3f}" if value < 1 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Seconds or minutes and seconds.

    >>> duration(8.24), duration(160)
    ('8.2 s', '2 min 40 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds.

    >>> clock(7.2), clock(3725)
    ('0:07', '62:05')
    """
    whole = round(seconds)
    return f"{whole // 60}:{whole % 60:02d}"
