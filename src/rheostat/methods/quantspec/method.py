"""QuantSpec's configuration and touchpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from rheostat import families
from rheostat.caches.counting import body_length, check_groups, saved_bytes
from rheostat.cost import Cost, Parts, dense_cost
from rheostat.errors import SettingError, bad_setting
from rheostat.geometry import Geometry
from rheostat.methods.base import Method
from rheostat.methods.quantspec.twins import TwinLinear, drafting
from rheostat.runtime.weights import CacheForm, DraftForm
from rheostat.speculate.drafter import Drafter, State, Stopping
from rheostat.speculate.drafting import SelfDrafter
from rheostat.spending import current_spending

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

PLACES = ("ffn", "attention", "head")


@dataclass(frozen=True, kw_only=True)
class QuantSpec(Method):
    """Drafts with 4-bit weights and a 4-bit view of the cache, checks with all of both (arXiv 2502.10424).

    It is lossless with respect to the model on the 8-bit cache; a prompt and answer of fewer than 2G tokens are in
    full precision altogether.
    """

    name: ClassVar[str] = "quantspec"
    stages: ClassVar[frozenset[str]] = frozenset({"cache", "decode"})

    group_size: int = 128
    """G: tokens of a key group; the newest G to 2G - 1 tokens stay in full precision."""
    value_group_size: int = 0
    """Channels of a value group; 0 is the whole head (as published, where both are 128)."""
    draft_weights: tuple[str, ...] = ("ffn", "attention")
    """Whose weights the draft reads in 4 bits: ffn (as published), attention, head. None: it shares all weights."""
    weight_group_size: int = 32
    """Inputs that share a scale in the draft's weights (published: 128, which does not divide every model)."""
    remember_views: bool = False
    """Keep the cache as numbers besides its bits: without a kernel that reads bits, faster; and no memory is saved."""

    def __post_init__(self) -> None:
        check_groups(self.group_size, self.value_group_size, name="quantspec.")
        size = self.weight_group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size % 2:
            raise bad_setting("quantspec.weight_group_size", size, "an even integer of at least 2")
        if not isinstance(self.draft_weights, tuple) or not set(self.draft_weights) <= set(PLACES):
            raise bad_setting("quantspec.draft_weights", self.draft_weights, f"a list of {', '.join(PLACES)}")

    # -- attach and detach

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model whose widths the groups do not divide."""
        families.family_of(model)
        head_dim = Geometry.from_config(model.config).head_dim
        check_groups(self.group_size, self.value_group_size, head_dim, name="quantspec.")
        for _, _, linear in self._linears(model):
            if isinstance(linear, TwinLinear):
                raise SettingError("model: has QuantSpec attached already; detach it first")
            if linear.in_features % self.weight_group_size:
                allowed = f"a divisor of every width it quantises, {linear.in_features} among them"
                raise bad_setting("quantspec.weight_group_size", self.weight_group_size, allowed)

    def attach(self, model: PreTrainedModel) -> None:
        """Put a `TwinLinear` in the place of every linear layer that the draft reads in 4 bits."""
        self.check(model)
        for parent, name, linear in self._linears(model):
            setattr(parent, name, TwinLinear(linear, self.weight_group_size))

    def detach(self, model: PreTrainedModel) -> None:
        """Put the host's own layers back."""
        for parent, name, linear in self._linears(model):
            if isinstance(linear, TwinLinear):
                setattr(parent, name, linear.host)

    def _linears(self, model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Linear]]:
        """(parent, name in it, layer) of all that `draft_weights` names; a head that is an embedding's twin too."""
        found = []
        for layer in families.layers(model):
            for path, module in layer.named_modules():
                in_ffn = "ffn" in self.draft_weights and path.endswith(families.FFN_PROJECTIONS)
                in_attention = "attention" in self.draft_weights and path.startswith("self_attn.")
                if isinstance(module, nn.Linear) and (in_ffn or in_attention):
                    parent, _, name = path.rpartition(".")
                    found.append((layer.get_submodule(parent), name, module))
        if "head" in self.draft_weights:
            head = families.head(model)
            name = next(name for name, module in model.named_children() if module is head)
            found.append((model, name, head))  # type: ignore[arg-type]
        return found

    # -- running

    def make_cache(self, model: PreTrainedModel) -> Cache:
        """A hierarchical one, read in 8 bits."""
        from rheostat.caches.hierarchical import HierarchicalCache  # here, because it is built on transformers

        return HierarchicalCache(
            model.config,
            group_size=self.group_size,
            value_group_size=self.value_group_size,
            is_remembering=self.remember_views,
        )

    def cache_form(self) -> CacheForm:
        """In planes."""
        return CacheForm(group_size=self.group_size, value_group_size=self.value_group_size)

    def draft_form(self) -> DraftForm:
        """4 bits of everything that has them. Our own runtime has groups of its own for weights."""
        return DraftForm(places=self.draft_weights)

    def drafter(self, stopping: Stopping | None = None) -> Drafter:
        """The model itself, in 4 bits."""
        return FourBitDrafter(stopping, self.draft_weights, self.weight_group_size)

    def cost(
        self,
        geometry: Geometry,
        *,
        compute: float = 1.0,
        num_tokens: int,
        past: int = 0,
        num_logits: int = 1,
        itemsize: int = 2,
    ) -> Cost:
        """The dense cost, less what the 8-bit body of a cache of `past` tokens does not read."""
        self.check_compute(geometry, compute)
        dense = dense_cost(geometry, num_tokens=num_tokens, past=past, num_logits=num_logits, itemsize=itemsize)
        return dense + Cost(bytes=Parts(scores=-self.cache_savings(geometry, past, itemsize, bits=8)))

    def cache_savings(self, geometry: Geometry, past: int, itemsize: int, bits: int) -> int:
        """Bytes of the full cache of `past` tokens that reading `bits` bits of its body leaves out, for one row."""
        body = body_length(past, self.group_size)
        sizes = (self.group_size, self.value_group_size or geometry.head_dim)
        num_layers = geometry.windows.count(0) if geometry.windows else geometry.num_layers
        one = saved_bytes(body, geometry.num_kv_heads, geometry.head_dim, sizes, bits, itemsize)
        return num_layers * one


class FourBitDrafter(SelfDrafter):
    """Reads the upper plane of the cache and the 4-bit weights."""

    def __init__(self, stopping: Stopping | None, places: tuple[str, ...], group: int) -> None:
        super().__init__(stopping)
        self.places, self.group = places, group

    @contextmanager
    def reading(self, state: State) -> Iterator[None]:
        """4 bits of everything that has them; the weights' savings go to the meter, the cache bills its own."""
        if state.cache is None:
            with state.host.cheaply():
                yield
            return
        cache: Any = state.cache
        spending = current_spending()
        before = {} if spending is None else dict(spending.meter.side_bytes)
        with cache.reading(4), drafting():
            yield
        if spending is None:
            return
        meter, itemsize = spending.meter, state.model.dtype.itemsize
        for part in self.places:  # of what was read: slices of an FFN, where a dial says so
            read = meter.side_bytes.get(part, 0) - before.get(part, 0)
            meter.add("draft", 0, read * (4 * self.group + 32) // (8 * itemsize * self.group) - read, 0, 0)
