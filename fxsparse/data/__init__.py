"""Data sets that need no download, and their exact splits."""

from __future__ import annotations

from fxsparse.data.digits import digits as digits
from fxsparse.data.idx import idx_folder as idx_folder
from fxsparse.data.idx import read_idx as read_idx
from fxsparse.data.splits import Split as Split
from fxsparse.data.splits import Splits as Splits
from fxsparse.data.splits import fingerprint as fingerprint
from fxsparse.data.splits import split_counts as split_counts
from fxsparse.data.splits import stratified_split as stratified_split
