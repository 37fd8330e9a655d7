"""Finding the convolutional blocks of a record, and where SE goes in each.

One principle: SE recalibrates what the block has newly computed, once, at the last value before it joins what bypassed
the block (Hu et al., sections 3.3 and 6.4). Blocks are recognised by what their graphs do, never by a name.
"""
