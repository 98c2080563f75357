"""How the codes of a weight are chosen: rounding to nearest, HQQ, GPTQ and AWQ, all on the grids of `grid`."""
