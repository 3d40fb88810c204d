"""Quality, speed and size of a compressed model beside its dense original, and what turns that into a verdict.

`quality` perplexity, KL and top-1 agreement; `tasks` and `significance` lm-eval with a paired test; `speed`, `decode`
and `memory` the benchmark; `gate` and `junit` the verdict; `report`, `table`, `html` and `card` what people read.
"""
