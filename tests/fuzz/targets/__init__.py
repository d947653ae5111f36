"""One module per reader: ``run(data)`` may raise UserError and nothing else.

Optional names of a module: ``DICTIONARY``, tokens that the mutator inserts, and ``seeds()``, inputs made on the spot
beside the files in ``tests/fuzz/corpus/TARGET/``. A new target is one file here; nothing else has to know it.
"""
