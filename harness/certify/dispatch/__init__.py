"""How rows reach their experts and come home: a space of its own, beside that of who scales and who reduces.

What a transport does with rows, ids and placements meets no scale, transform or padding, and those meet no rank, id or
row; the two share the calls alone (kernel, swap, micro-batches), which both spaces have. Here nothing is stacked: every
rank runs its real layer, its real transport and its real experts, over real shards of weights that tell who they are.
"""
