"""Low-rank adapters (LoRA) while a training runs, through `peft`; folded into the weights at its end."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from rheostat import families
from rheostat.methods.base import MeteredFFN


def targets(model: nn.Module, wanted: set[str]) -> list[str]:
    """The FFN projections that training changes."""
    return [
        name
        for name, _ in model.named_modules()
        if name.endswith(families.FFN_PROJECTIONS) and f"{name}.weight" in wanted
    ]


class Adapters:
    """Low-rank adapters on every FFN projection, through `peft`."""

    def __init__(self, model: PreTrainedModel, rank: int, wanted: set[str]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.model = model
        found = targets(model, wanted)
        kept = [p for n, p in model.named_parameters() if p.requires_grad and (".router." in n or ".downs." in n)]
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=found), model)
        for parameter in kept:  # peft freezes all that is not an adapter
            parameter.requires_grad_(True)
        self._set_naive(True)

    def merge(self) -> None:
        """Fold the adapters into the weights and take them off."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in list(self.model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                parent = self.model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], module.get_base_layer())
        self._set_naive(False)

    def _set_naive(self, value: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, MeteredFFN):
                module.is_naive = value
