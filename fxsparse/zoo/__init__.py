"""Many models through every promise of the library: each in a process of its own, the results a matrix."""

from __future__ import annotations

from fxsparse.zoo.records import EntryResult as EntryResult
from fxsparse.zoo.records import StageResult as StageResult
from fxsparse.zoo.records import Status as Status
