"""The benchmark suite: ``python -m benchmarks``.

One method for every suite. Ways of doing the same run side by side in one process, each in every round and first in
turn, so that drift of the machine hits all alike. Results are compared with float64 before anything is timed, and a
peer that is wrong is not timed. Preparing, compiling and tuning are not timed but reported; a peer that cannot run
gives its reason. A file of results holds the machine, versions, clocks, the noise floor and every sample.
"""
