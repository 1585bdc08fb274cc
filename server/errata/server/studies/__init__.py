"""Studies: one file says which models, data, measurements and seeds; one command measures all of them.

Every combination is a cell, known by the hash of all it is made from. A finished cell is on the disk whole or not at
all, so that a study that was stopped goes on where it was. Needs no server and no ledger.
"""
