"""Passes: one rewrite a file, each with a contract that is checked whenever it runs. `Pass` shows how to write one."""

from __future__ import annotations

from fxsparse.passes.equivalence import DIFFERENT as DIFFERENT
from fxsparse.passes.equivalence import EXACT as EXACT
from fxsparse.passes.equivalence import Close as Close
from fxsparse.passes.equivalence import Equivalence as Equivalence
from fxsparse.passes.fold_masks import FoldMasks as FoldMasks
from fxsparse.passes.infra import Pass as Pass
from fxsparse.passes.infra import PassResult as PassResult
from fxsparse.passes.infra import Pipeline as Pipeline
from fxsparse.passes.infra import PipelineResult as PipelineResult
from fxsparse.passes.infra import Record as Record
from fxsparse.passes.infra import Stage as Stage
from fxsparse.passes.insert_masks import InsertMasks as InsertMasks
from fxsparse.passes.instrument_fisher import InstrumentFisher as InstrumentFisher
from fxsparse.passes.instrument_fisher import RemoveFisher as RemoveFisher
from fxsparse.passes.lower_forms import Form as Form
from fxsparse.passes.lower_forms import LayerRecord as LayerRecord
from fxsparse.passes.lower_forms import LoweringResult as LoweringResult
from fxsparse.passes.lower_shared_support import legal_forms as legal_forms
from fxsparse.passes.lower_shared_support import lower_shared_support as lower_shared_support
from fxsparse.passes.mask_effective import MaskEffective as MaskEffective
from fxsparse.passes.mask_parameters import MaskParameters as MaskParameters
from fxsparse.passes.snapshot import graphs_of as graphs_of
from fxsparse.passes.swap_modules import SwapModules as SwapModules
from fxsparse.passes.verify import Verification as Verification
from fxsparse.passes.verify import Verify as Verify
from fxsparse.passes.verify import verify_equal as verify_equal

PASSES: tuple[type[Pass], ...] = (SwapModules, InsertMasks, MaskEffective, MaskParameters, FoldMasks)
