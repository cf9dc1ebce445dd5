"""Labelled layers: twins in which every expert shard, shared shard and bias copy owns a column of the hidden dimension.

A down-projection is one-hot in its column, activations and scores are saturated, so no two terms of a sum ever meet and all
other addends are exact zeros: an output row is the list of who was added how often, times what, in any order, dtype and
grid. columns.py says whose column is whose, plan.py which tokens visit whom, tensors.py makes the numbers.
"""
