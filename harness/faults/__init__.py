"""The fault bank: real bugs of Mixture-of-Experts layers, each planted in a right layer to see that it is found and named.

fault.py says what a fault is; scale.py, reduce.py, order.py, routing.py, shared.py, expert.py and shape.py hold them by
stage; corpus.py maps every public bug to a fault or to the reason why one layer cannot show it.
"""
