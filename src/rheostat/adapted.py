"""`Adapted`: a causal LM with a method attached and a dial. What `rheostat.adapt` and `rheostat.load` return."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rheostat.dial import Dial
from rheostat.errors import SettingError, bad_setting
from rheostat.geometry import Geometry
from rheostat.holding import Account, Table
from rheostat.kernels import library
from rheostat.methods.base import Method
from rheostat.passes import PassHooks
from rheostat.runtime.building import Unsupported
from rheostat.runtime.choosing import FORMED_STAGES, KNOWN_STAGES, OWN_GENERATE, check_runtime, refuse
from rheostat.runtime.engine import Runtime, Runtimes
from rheostat.runtime.packing import check_format
from rheostat.speculate.drafter import Drafter, Host
from rheostat.spending import (
    Compute,
    current_spending,
    has_dial,
    register_dial,
    spend,
    unregister_dial,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


OWN_CACHE = ("past_key_values", "cache_implementation")
"""Arguments of `generate` by which a caller chooses the cache."""


class Adapted(nn.Module):
    """A model whose compute is a number.

    `forward` and `generate` are the host model's own; they obey the `compute` of the enclosing `rheostat.spend`, and
    run dense outside it. The host stays reachable as `.model`, and `detach()` gives it back as it was.

    Hooks on the host announce each pass to the layers and count attention and head (`passes.PassHooks`).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method | None = None,
        dial: Dial | None = None,
        *,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        """Attach `method` (the plain model when left out) to `model`, in place.

        Raises:
            SettingError: the method refuses the model, or it is adapted already.
        """
        super().__init__()
        self.method = method or Method()
        self.method.check(model)
        if has_dial(model):
            raise SettingError("model: is adapted already; detach it first: with two, every pass would be billed twice")
        self.geometry = Geometry.from_config(model.config)
        self.method.attach(model)
        self.model = model
        register_dial(model, self._settings)
        if self.method.at("prefill").reads_prompts:
            model._prefill = self._read_prompt  # the seam of the host's `generate`, in all its modes
        self.dial = dial or Dial()
        self.report: dict[str, Any] = dict(report or {})
        """How this model was made: filled by `adapt`, saved with the artifact."""
        self._runtimes = Runtimes()
        self._table: Table | None = None
        self._hooks = PassHooks(model, self.geometry, self._settings, self.account)

    @property
    def config(self) -> Any:
        """The host's configuration."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The host's generation defaults."""
        return self.model.generation_config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The host's forward, under the enclosing `rheostat.spend`."""
        return self.model(*args, **kwargs)

    def generate(
        self,
        *args: Any,
        compute: Compute | Mapping[str, Compute] | None = None,
        runtime: str = "auto",
        weights: str = "auto",
        hold: bool = False,
        speculate: str | Drafter | None = None,
        draft_compute: float | None = None,
        draft_risk: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """The host's `generate` at `compute` (see `rheostat.spend`); left out, the enclosing `spend` decides.

        Inside a `spend` block with an explicit `compute`, the block's meter goes on counting.

        Args:
            runtime: `auto` runs what it can on our own runtime and the rest on `transformers`; `native` refuses the
                rest; `stock` is `transformers` always.
            weights: what our runtime holds the weights in: fp32, bf16, fp16, int8, int4, mixed; `auto` is the
                model's dtype.
            hold: steer each request by what it has spent, so that it ends at what was asked. Goes with `compute`; a
                `spend` block has its own.
            speculate: how to draft: `self`, `low_dial`, `prompt_lookup`, `streaming_llm`, `snapkv`, or a `Drafter`.
                Then `draft_length` is how much; `speculate.generating.generate` has the other arguments.
            draft_compute: of the `low_dial` draft; left out, the least that the dial reaches.
            draft_risk: stop drafting when the draft's own probabilities put the risk of a rejection above this.

        Raises:
            SettingError: a setting is not one of these, or our runtime was asked for and cannot run this.
        """
        from rheostat.speculate.generating import DRAFT_LENGTH, make_drafter
        from rheostat.speculate.generating import generate as draft_and_check
        from rheostat.speculate.pacing import Pace

        outer = current_spending()
        if hold and compute is None:
            raise bad_setting("hold", hold, "False where no compute is given: the enclosing spend decides")
        if (hold or (compute is None and outer is not None and outer.hold)) and speculate is not None:
            raise bad_setting("hold", True, "False with drafts, which are checked several tokens at a time")
        with nullcontext() if compute is None else spend(compute, meter=outer.meter if outer else None, hold=hold):
            if speculate is not None:
                drafter = make_drafter(speculate, self.method, self.dial.low, compute=draft_compute, risk=draft_risk)
                Pace.of(kwargs.get("draft_length", DRAFT_LENGTH))  # before anything is packed or read
                host = None
                if kwargs.get("past_key_values") is None:
                    host = self.draft_host(drafter, runtime, weights)
                return draft_and_check(self.model, self.method, drafter, *args, host=host, **kwargs)
            return self._generate(args, kwargs, runtime, weights)

    def draft_host(self, drafter: Drafter, runtime: str = "auto", weights: str = "auto") -> Host | None:
        """Our own runtime for a generation in which `drafter` drafts; None where `transformers` has to run it.

        Raises:
            SettingError: no such setting; or `native` was asked for and cannot be had.
        """
        from rheostat.runtime.speculating import NativeHost

        try:
            if drafter.needs_cache:
                raise Unsupported(f"the drafter {type(drafter).__name__}, which looks into the cache")
            native = self.runtime(runtime, weights, with_forms=True)
            if native is not None and not self.reads_prompts_on(native):
                raise Unsupported("drafts with a method that reads prompts itself")
            return None if native is None else NativeHost(native, self.settings)
        except Unsupported as reason:
            refuse(check_runtime(runtime), reason)
            return None

    def _generate(self, args: tuple[Any, ...], kwargs: dict[str, Any], runtime: str, weights: str) -> Any:
        from rheostat.runtime.generating import generate

        try:
            native = self.runtime(runtime, weights, with_forms=True)
            if native is not None:
                stages = self.method.acts_at() & OWN_GENERATE
                if stages and native.ahead is None:
                    raise Unsupported(f"generate with a method at the stage {sorted(stages)[0]}")
                return generate(self.model, native, self.settings, self.account, args, kwargs)
        except Unsupported as reason:
            refuse(runtime, reason)
        if "cache" in self.method.acts_at() and all(kwargs.get(name) is None for name in OWN_CACHE):
            kwargs = kwargs | {"past_key_values": self.method.make_cache(self.model)}
        return self.model.generate(*args, **kwargs)

    def runtime(self, runtime: str = "auto", weights: str = "auto", *, with_forms: bool = False) -> Runtime | None:
        """Our own runtime on this model, made when first asked for; None where `transformers` has to run it.

        Args:
            with_forms: the caller goes through `Batch`, which keeps the cache that the method asks for.

        Raises:
            SettingError: no such setting; or `native` was asked for and cannot be had.
        """
        check_runtime(runtime)
        try:
            format = check_format(weights, self.dtype)
            if runtime == "stock":
                return None
            stages = self.method.acts_at() - KNOWN_STAGES
            if with_forms and self.method.cache_form() is not None and self.method.draft_form() is not None:
                stages -= FORMED_STAGES
            if stages:
                raise Unsupported(f"a method at the stage {sorted(stages)[0]}")
            if (spending := current_spending()) is not None and spending.override is not None:
                raise Unsupported("an override of the routers")
            if runtime == "auto" and library() is None:
                raise Unsupported("this machine: there is no native code for it")
            found = self._runtimes.get(format)
            if found is not None and not found.fits(self.model):
                self._runtimes.clear()  # the weights changed: all formats hold old ones
                found = None
            if found is None:
                found = self._runtimes[format] = self.new_runtime(format)
            return found
        except Unsupported as reason:
            refuse(runtime, reason)
            return None

    def new_runtime(self, format: str) -> Runtime:
        """Our own runtime on this model in a weight format, whatever there is already.

        Raises:
            Unsupported: there can be none.
        """
        method = self.method
        return Runtime(
            self.model,
            format,
            self.hook_ids,
            cache_form=method.cache_form(),
            draft_form=method.draft_form(),
            ahead=method.runtime_prefill(self.model),
        )

    def reads_prompts_on(self, runtime: Runtime) -> bool:
        """Whether the runtime reads prompts as the method does; else the method reads them itself."""
        return runtime.ahead is not None or "prefill" not in self.method.acts_at()

    def detach(self) -> PreTrainedModel:
        """Take the method and the hooks off and return the host. This object is of no use afterwards."""
        self._hooks.remove()
        self.model.__dict__.pop("_prefill", None)
        unregister_dial(self.model)
        self._runtimes.clear()
        self.method.detach(self.model)
        return self.model

    @property
    def hook_ids(self) -> frozenset[int]:
        """Of the hooks set on the host, as `torch` numbers them."""
        return self._hooks.ids

    def _read_prompt(
        self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """The host's `_prefill` through the method's own `prefill`, whenever a prompt is only to be continued."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        wants_more = generation_config.output_hidden_states or generation_config.output_attentions
        chunks = generation_config.prefill_chunk_size
        if cache is None or wants_more or chunks or model_kwargs.get("inputs_embeds") is not None:
            return type(self.model)._prefill(self.model, input_ids, generation_config, model_kwargs, **kwargs)
        past = int(cache.get_seq_length())
        if mask is None:
            mask = torch.ones_like(input_ids)
        if mask.dim() != 2 or (past and mask.shape[1] not in (input_ids.shape[1], past + input_ids.shape[1])):
            return type(self.model)._prefill(self.model, input_ids, generation_config, model_kwargs, **kwargs)
        news = input_ids[:, past:] if mask.shape[1] == input_ids.shape[1] else input_ids
        logits = self.method.prefill(self.model, news, mask, cache)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=cache)

    @property
    def can_hold(self) -> bool:
        """Whether requests can be held to what they asked for: one method has a setting to turn, and its layers tell
        what tokens saved."""
        dialled = self.method.dialled()
        is_one = len(dialled) == 1 and dialled[0].holds and not self.method.at("prefill").reads_prompts
        return is_one and list(self.dial.settings) == [dialled[0].name]

    def account(self, num_rows: int) -> Account | None:
        """What holds new requests to what the enclosing `spend` asks for; None where it does not, or nothing can."""
        spending = current_spending()
        if spending is None or not spending.hold or spending.native is not None or spending.override is not None:
            return None
        if min(*spending.prefill, *spending.decode) == 1 or not self.can_hold:
            return None
        return Account.new(self.table, num_rows)

    @property
    def table(self) -> Table:
        """The dial as savings, for a model that can hold."""
        if self._table is None or self._table.dial is not self.dial:
            self._table = Table(self.dial, self.geometry, next(iter(self.dial.settings)))
        return self._table

    def choose_rows(self, cache: Any, rows: torch.Tensor) -> None:
        """Keep, repeat or drop rows [R] of a cache; those that are held go on from what each of them has spent."""
        self._hooks.choose_rows(cache, rows)

    def share_account(self, cache: Any, copy: Any) -> None:
        """The requests in `copy` of a cache go on from the same spending, each for itself."""
        self._hooks.share_account(cache, copy)

    def settings(self, phase: str, num_rows: int) -> dict[str, torch.Tensor]:
        """The native settings [B] that the enclosing `spend` asks for in a phase; empty when all run dense."""
        return self._settings(phase, num_rows, self.device)

    def _settings(self, phase: str, num_rows: int, device: torch.device) -> dict[str, torch.Tensor]:
        spending = current_spending()
        if spending is None:
            return {}
        if spending.native is not None:
            return {name: torch.full((num_rows,), value, device=device) for name, value in spending.native.items()}
        return self.dial.rows(spending.rows(phase, num_rows), device)
