"""The integers that describe a model. Costs are computed from them, never from weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from rheostat.errors import bad_setting


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a decoder-only transformer with gated MLPs.

    Letters used in the project: B batch, T query tokens, S cached tokens, D model width, H query heads,
    K key/value heads, d head width, F FFN width, E experts, V vocabulary.
    """

    num_layers: int
    hidden_size: int
    """D."""
    ffn_size: int
    """F, the width of the gated MLP."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool
    """Whether the output head shares the embedding matrix (one copy in memory; the head's product is paid all
    the same)."""
    windows: tuple[int, ...] = ()
    """Attention window of each layer in tokens, 0 for no limit; empty when no layer has one."""

    @classmethod
    def from_config(cls, config: Any) -> Geometry:
        """Read the sizes from a `transformers` configuration.

        Raises:
            SettingError: a size that every decoder configuration has is missing.
        """
        config = config.get_text_config(decoder=True)
        needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        missing = [name for name in needed if getattr(config, name, None) is None]
        if missing:
            raise bad_setting("model", config.model_type, f"a decoder whose configuration has {', '.join(missing)}")
        num_heads = config.num_attention_heads
        window = getattr(config, "sliding_window", None) or 0
        kinds = getattr(config, "layer_types", None) or []
        windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
        if not kinds:  # families without kinds of layers (Mistral, Phi-3) have one window for all
            windows = (window,) * config.num_hidden_layers
        return cls(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            ffn_size=config.intermediate_size,
            num_heads=num_heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
            vocab_size=config.vocab_size,
            is_tied=bool(getattr(config, "tie_word_embeddings", False)),
            windows=windows if any(windows) else (),
        )

    def first_layers(self, num_layers: int) -> Geometry:
        """The sizes of the first `num_layers` layers alone."""
        return replace(self, num_layers=num_layers, windows=self.windows[:num_layers])

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's query, key, value and output projections."""
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def channel_weights(self) -> int:
        """Weights of one FFN channel: a row of gate, a row of up, a column of down."""
        return 3 * self.hidden_size

    @property
    def ffn_weights(self) -> int:
        """Weights of one layer's FFN."""
        return self.channel_weights * self.ffn_size

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.hidden_size * self.vocab_size

    @property
    def token_flops(self) -> int:
        """FLOPs of one token in all products with weights (two a weight): what `compute` is a fraction of."""
        return 2 * (self.num_layers * (self.attention_weights + self.ffn_weights) + self.head_weights)

    def weights_of(self, num_tokens: int, num_logits: int) -> int:
        """Weights that a pass over so many tokens, of which so many give logits, multiplies."""
        layers = self.num_layers * (self.attention_weights + self.ffn_weights)
        return num_tokens * layers + num_logits * self.head_weights

    @property
    def kv_values(self) -> int:
        """Numbers that one layer caches for one token."""
        return 2 * self.num_kv_heads * self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return asdict(self) | {"windows": list(self.windows)}
