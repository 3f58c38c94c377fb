"""DynaMoE: the difficulty of each token picks a nested slice of each FFN.

Nishu et al., "From Dense to Dynamic: Token-Difficulty Driven MoEfication of Pre-Trained LLMs", arXiv 2502.12325.
The idea: cut every FFN into nested slices, measure how much each slice's output differs from the whole, teach a
small router a layer to foresee it, and let one number at run time say how much difference is worth how much
compute. As published: nested slices of (e + 1) / E, labels from each slice's similarity to the whole, a light
router, one knob. Our choice, because no source states it: everything else, above all what difficulty is
(`difficulty`), the order of the channels and the re-fitted down projections (`solve`), and the decision rule
(`routing`).

Read `method` first, then `ffn` (what runs), `fitting` (what is learned without gradients), `training` (with them).
"""

from rheostat.methods.dynamoe.method import DynaMoE

__all__ = ["DynaMoE"]
