"""Imported last by the server that test processes are forked from: what is there by then is never garbage.

Else each collection in a forked process looks through all of torch's objects, and copies the memory they are in.
"""

import gc

gc.collect()
gc.freeze()
