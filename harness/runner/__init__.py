"""The refactored MoE runner: who scales, who reduces and when is one plan a call, the steps carry the field's names.

Read `plan.py` first, then `moe_runner.py`, which carries the plan out.
"""
