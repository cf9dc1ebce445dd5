"""What a Mixture-of-Experts layer must compute: the specification as data and the law in float64.

A leaf: imports torch alone, shares no code with anything it judges. Read `spec.py`, then `moe.py`.
"""
