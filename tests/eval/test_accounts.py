from __future__ import annotations

import torch

from rheostat.cost import Cost, Parts
from rheostat.eval.accounts import Account
from rheostat.processes import Ranks


class Others(Ranks):
    """A process that hears three times what it says."""

    def gather(self, mine):
        return [mine] * 3


def test_the_meter_adds_up_over_processes_and_the_rest_stays():
    account = Account(0.8, num_requests=5, num_truncated=1, modes={"generate"})
    account.meter.add("ffn", 10, 20, 30, 40)
    account.meter.num_prefill_tokens, account.meter.num_decode_tokens = 7, 2
    account.meter.expert_counts[1] = torch.tensor([4, 0])
    total = account.over_all(Others(0, 3))
    assert total.meter.cost == Cost(flops=Parts(ffn=30), bytes=Parts(ffn=60))
    assert total.meter.dense == Cost(flops=Parts(ffn=90), bytes=Parts(ffn=120))
    assert (total.meter.num_prefill_tokens, total.meter.num_decode_tokens) == (21, 6)
    assert total.meter.expert_counts[1].tolist() == [12, 0]
    assert (total.compute, total.num_requests, total.num_truncated, total.modes) == (0.8, 5, 1, {"generate"})
    assert account.meter.num_prefill_tokens == 7  # itself unchanged


def test_alone_it_is_the_same():
    account = Account(1.0)
    account.meter.add("head", 1, 2, 3, 4)
    assert account.over_all(Ranks()).meter.cost == account.meter.cost
