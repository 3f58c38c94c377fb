"""QuantSpec: the model drafts for itself with 4-bit weights and a 4-bit view of its cache, and checks with all it has.

Paper: arXiv 2502.10424. The idea in five lines:

- Keys and values are kept in two nibble planes; the upper plane alone is a 4-bit cache, both together an 8-bit one.
- Drafting reads the upper plane and 4-bit copies of the weights; checking reads both planes and the full weights.
- So one cache serves both, and the draft is the same network: it is nearly always right.
- The newest tokens stay in full precision, which makes rejected drafts cheap to forget.
- The text is that of the model on the 8-bit cache, token for token.
"""

from rheostat.methods.quantspec.method import QuantSpec

__all__ = ["QuantSpec"]
