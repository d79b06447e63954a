"""Every model type of the installed transformers, tiny: compressed, loaded, compared, saved, calibrated.

python -m tests.zoo                 all types, those with a result in .cache/zoo left out, then the table
python -m tests.zoo rwkv t5gemma    these, again
"""
