"""Everything that knows torch.fx: capture, recording, editing, matching, rendering, accounting."""

from fxsparse.graph.accounting import Accounting as Accounting
from fxsparse.graph.accounting import count as count
from fxsparse.graph.capture import Capture as Capture
from fxsparse.graph.capture import Refusal as Refusal
from fxsparse.graph.capture import capture as capture
from fxsparse.graph.captured import CapturedModule as CapturedModule
from fxsparse.graph.captured import graphs_of as graphs_of
from fxsparse.graph.clone import isolated_clone as isolated_clone
from fxsparse.graph.clone import structural_clone as structural_clone
from fxsparse.graph.flops import micronet_flops as micronet_flops
from fxsparse.graph.flops import rigl_training_flops as rigl_training_flops
from fxsparse.graph.inputs import fresh_inputs as fresh_inputs
from fxsparse.graph.inputs import split_inputs as split_inputs
from fxsparse.graph.match import WeightKind as WeightKind
from fxsparse.graph.match import WeightUse as WeightUse
from fxsparse.graph.match import parameter_reads as parameter_reads
from fxsparse.graph.match import verify_match_complete as verify_match_complete
from fxsparse.graph.match import weight_uses as weight_uses
from fxsparse.graph.provenance import Provenance as Provenance
from fxsparse.graph.provenance import stamp as stamp
from fxsparse.graph.recorder import Recording as Recording
from fxsparse.graph.recorder import Use as Use
from fxsparse.graph.recorder import record as record
from fxsparse.graph.render import diff as diff
from fxsparse.graph.render import render as render
from fxsparse.graph.scopes import preserved_rng as preserved_rng
