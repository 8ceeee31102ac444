"""Feature cards as data: what results, pages and analyses of weights read of a set of SAEs."""
