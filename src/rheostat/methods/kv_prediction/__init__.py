"""KV Prediction (arXiv 2410.08391): a cheap auxiliary reads the prompt, a linear map turns what it made into the
model's cache, and only the model writes.

    tokens but the last --> auxiliary --> features x --> keys_i = W_i x + b_i, values_i = U_i x + c_i  for every layer i
    the last token ------------------------------------> the model, on that cache --> first token, and all that follow

Keys are predicted as they leave the projection; the model's own key norm and rotation are applied afterwards, so the
map does not depend on the position. Per prompt token the auxiliary and the map are paid in place of the model.

Where we deviate (each on the method's page in the documentation): the default auxiliary is the model's own first k
layers, which cost no memory and whose own caches are exact; the map reads the residual stream, not the auxiliary's
cache; it is solved by ridge regression before any training; the first token of a text is exact.
"""

from rheostat.methods.kv_prediction.method import KVPrediction

__all__ = ["KVPrediction"]
