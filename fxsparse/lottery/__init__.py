"""Winning tickets: iterative magnitude pruning with rewinding, ticket files, run directories.

The short way::

    task = Task(build=lambda: lenet_300_100(64, 10), train=splits.train, validation=splits.validation, epochs=20)
    rounds = find_tickets(task, IMP(rate="0.2", target="0.9"), "runs/lenet/seed_0", seed=0)
    ticket = load_ticket(rounds[-1].ticket)          # checked: hashes, shapes, counts, finite values
    model = ticket.apply(lenet_300_100(64, 10), final=True)

* `Task` (fxsparse.training.loop) says what is trained: `build`, `train` and `validation` (`.inputs`, `.labels`),
  `epochs`, `batch_size`, `optimizer(parameters)`, `scheduler(optimizer, total_steps)`, `loss`. The same task trains
  other methods: ``state = start(task, seed)``, ``attach(state.model, state.optimizer, method, task.total_steps)``,
  ``fit(state, task, on_epoch=...)``, ``evaluate(state.model, splits.test)``.
* `IMP` holds the settings; `IMP.counts` the exact number of weights alive after each round.
* `find_tickets` runs one seed in a directory and goes on where a killed run stopped; `Round` has `index`, `alive`,
  `total`, `sparsity`, `metrics` (validation_accuracy, validation_loss, best_step), `history`, `ticket` (path),
  `trained`.
  `progress` is called with a `Progress` at the start of each stretch and after each epoch.
* `Ticket.apply(model)` loads the weights to retrain from, `apply(model, final=True)` the trained ones; the model may be
  plain (masks are installed at the parameters) or come from `fxsparse.transform`. `Ticket.build()` makes the model
  where the ticket names a factory of fxsparse.models (`Origin(factory="fxsparse.models:lenet_300_100",
  arguments={...})`), `Ticket.example_inputs()` inputs for it.
* `RunDirectory.open(results_dir, name, config, data_fingerprint)` is a context manager for
  ``<results_dir>/<name>-<hash>``; `.seed(s)` is the directory of a seed.
"""

from fxsparse.lottery.canonical import canonical_json as canonical_json
from fxsparse.lottery.canonical import sha256_json as sha256_json
from fxsparse.lottery.counts import CountRule as CountRule
from fxsparse.lottery.counts import Counts as Counts
from fxsparse.lottery.counts import FinalRound as FinalRound
from fxsparse.lottery.counts import rounds_needed as rounds_needed
from fxsparse.lottery.imp import find_tickets as find_tickets
from fxsparse.lottery.prune import Scope as Scope
from fxsparse.lottery.prune import prune_global as prune_global
from fxsparse.lottery.prune import prune_layerwise as prune_layerwise
from fxsparse.lottery.records import Origin as Origin
from fxsparse.lottery.records import Progress as Progress
from fxsparse.lottery.records import Round as Round
from fxsparse.lottery.regroup import Projection as Projection
from fxsparse.lottery.regroup import RegroupReport as RegroupReport
from fxsparse.lottery.regroup import regroup as regroup
from fxsparse.lottery.regroup_ticket import regroup_ticket as regroup_ticket
from fxsparse.lottery.rewind import DataOrder as DataOrder
from fxsparse.lottery.rewind import Rewind as Rewind
from fxsparse.lottery.rewind import RewindOptimizer as RewindOptimizer
from fxsparse.lottery.rewind import Step as Step
from fxsparse.lottery.run_directory import RunDirectory as RunDirectory
from fxsparse.lottery.run_directory import config_hash as config_hash
from fxsparse.lottery.settings import IMP as IMP
from fxsparse.lottery.ticket import Ticket as Ticket
from fxsparse.lottery.ticket import load_ticket as load_ticket
from fxsparse.lottery.ticket_save import save_ticket as save_ticket
