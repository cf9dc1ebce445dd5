"""moe-harness: a correctness and regression test bench for Mixture-of-Experts layers."""

__version__ = "0.1.0"
