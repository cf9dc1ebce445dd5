"""The runner's whole space of decisions, enumerated and held against the law; the result is a certificate."""
