"""A runtime for the decoder families we know: it reads a model's weights and runs it without `transformers`' layers.

`transformers` stays the reference: the same model gives the same text there, and whatever the runtime does not know
runs there. Shapes: B batch, T query tokens, S cached tokens, D model width, H query heads, K key/value heads, d head
width, F FFN width, E experts, V vocabulary, L layers, U router width.
"""
